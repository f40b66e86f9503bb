"""Updates of an item's metadata.

See workpool/docs/protocol.md, "Update metadata".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.protocol.conftest import ApiClient


@pytest.mark.usefixtures("memory_and_sqlite_stores")
@pytest.mark.parametrize(
    ("patch", "metadata"),
    [
        ({"new": "x"}, {"a": "1", "b": "2", "new": "x"}),
        ({"a": "changed"}, {"a": "changed", "b": "2"}),
        ({"a": None}, {"b": "2"}),
        ({"a": ""}, {"a": "", "b": "2"}),
        ({"unknown": None}, {"a": "1", "b": "2"}),
        ({"a": None, "b": "3", "": "empty key"}, {"b": "3", "": "empty key"}),
        ({}, {"a": "1", "b": "2"}),
        (
            {"nul\u0000": "\u0000", "emoji": "🙂"},
            {"a": "1", "b": "2", "nul\0": "\0", "emoji": "🙂"},
        ),
    ],
)
async def test_metadata_update_sets_given_keys_removes_null_keys_and_keeps_others(
    api: ApiClient, patch: object, metadata: object
) -> None:
    (item,) = api.plane.enqueue(metadata={"a": "1", "b": "2"})
    before = (await api.get(item.id)).body
    answer = await api.update(item.id, json={"metadata": patch})
    assert (answer.status, answer.body) == (200, {**before, "metadata": metadata})
    assert (await api.get(item.id)).body == answer.body


async def test_update_without_metadata_changes_nothing(qoder_api: ApiClient) -> None:
    (item,) = qoder_api.plane.enqueue(metadata={"a": "1"})
    answer = await qoder_api.update(item.id, json={"other": 1})
    assert (answer.status, answer.body["metadata"]) == (200, {"a": "1"})


async def test_anthropic_metadata_update_without_metadata_is_400(anthropic_api: ApiClient) -> None:
    (item,) = anthropic_api.plane.enqueue()
    answer = await anthropic_api.update(item.id, json={})
    assert answer.status == 400
    assert answer.error["param"] == "metadata"


@pytest.mark.parametrize("state", ["queued", "starting", "active", "stopping", "stopped"])
async def test_metadata_update_is_accepted_in_every_item_state(api: ApiClient, state: str) -> None:
    work_id = await api.create_item_in_state(state)
    answer = await api.update(work_id, json={"metadata": {"k": "v"}})
    assert (answer.status, answer.body["metadata"]) == (200, {"k": "v"})
    assert answer.body["state"] == state


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"null",
        b"[]",
        b'{"metadata": null}',
        b'{"metadata": []}',
        b'{"metadata": "x"}',
        b'{"metadata": {"a": "changed", "b": 1}}',
        b'{"metadata": {"a": "changed", "b": true}}',
        b'{"metadata": {"a": "changed", "b": {}}}',
        b'{"metadata": {"a": "changed", "b": ["x"]}}',
        b'{"metadata": {"a": "changed", "b": NaN}}',
        b'{"metadata": {"a": "\xff"}}',
        b'{"metadata": {"a": "\\ud800"}}',
        b'{"metadata": {"a": "x"}',
        b'{"metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    ],
)
async def test_malformed_update_is_400_and_leaves_metadata_unchanged(
    api: ApiClient, body: bytes
) -> None:
    (item,) = api.plane.enqueue(metadata={"a": "1"})
    answer = await api.update(item.id, data=body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert (await api.get(item.id)).body["metadata"] == {"a": "1"}
