"""The call `enqueue`, which creates items.

See workpool/docs/protocol.md, "Create work".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.protocol.conftest import ApiClient


@pytest.mark.parametrize(
    ("body", "count", "metadata"),
    [
        (b"", 1, {}),
        (b"{}", 1, {}),
        (b'{"count": 3}', 3, {}),
        (b'{"count": 1000}', 1000, {}),
        (b'{"metadata": {"job": "report"}, "type": "session"}', 1, {"job": "report"}),
        (b'{"colour": ["ignored"]}', 1, {}),
    ],
)
async def test_enqueued_items_are_returned_in_order_of_creation(
    api: ApiClient, body: bytes, count: int, metadata: dict[str, str]
) -> None:
    answer = await api("POST", api.work_url(), data=body)
    assert answer.status == 200
    assert set(answer.body) == {"data"}
    items = answer.body["data"]
    assert len(items) == count
    assert [item["id"] for item in items] == sorted({item["id"] for item in items})
    assert len({item["data"]["id"] for item in items}) == count
    assert all(item["state"] == "queued" and item["metadata"] == metadata for item in items)
    assert await api.claim_item() == items[0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"count": 0}', "count"),
        (b'{"count": 1001}', "count"),
        (b'{"count": -1}', "count"),
        (b'{"count": 1.0}', "count"),
        (b'{"count": true}', "count"),
        (b'{"count": "1"}', "count"),
        (b'{"count": null}', "count"),
        (b'{"count": 1e400}', None),
        (b'{"count": 99999999999999999999999999999999}', "count"),
        (b'{"metadata": null}', "metadata"),
        (b'{"metadata": []}', "metadata"),
        (b'{"metadata": {"a": 1}}', "metadata"),
        (b'{"metadata": {"a": null}}', "metadata"),
        (b'{"type": 1}', "type"),
        (b'{"type": null}', "type"),
        (b'{"type": ""}', "type"),
        (b'{"script": null}', "script"),
        (b'{"script": {}}', "script"),
        (b'{"script": "Bash"}', "script"),
        (b'{"script": ["Bash"]}', "script"),
        (b'{"script": [{"input": {}}]}', "script"),
        (b'{"script": [{"name": ""}]}', "script"),
        (b'{"script": [{"name": "Bash", "input": []}]}', "script"),
        (b'{"script": [{"name": "Bash", "custom": 1}]}', "script"),
        (b'{"script": [{"name": "Bash"}, {"name": "Bash", "permission": "maybe"}]}', "script"),
        (b'{"script": [{"name": "Bash", "permission": []}]}', "script"),
        (b'{"script": [' + b",".join([b'{"name": "Bash"}'] * 1001) + b"]}", "script"),
        (
            b'{"script": [{"name": "B", "input": ' + b'{"a":' * 251 + b"1" + b"}" * 252 + b"]}",
            "script",
        ),
        (
            b'{"count": 1000, "script": [{"name": "'
            + b"B" * 99
            + b'", "input": {"command": "'
            + b"x" * 17_000
            + b'"}}]}',
            "script",
        ),
        (b"null", None),
        (b"[]", None),
        (b"{", None),
        (b" ", None),
    ],
)
async def test_malformed_enqueue_body_is_400_and_creates_nothing(
    api: ApiClient, body: bytes, param: str | None
) -> None:
    answer = await api("POST", api.work_url(), data=body)
    assert answer.status == 400
    if param is not None:
        assert answer.error["param"] == param
    assert (await api.queue_stats())["depth"] == 0


async def test_enqueue_with_type_other_than_session_creates_item_of_that_type(
    api: ApiClient,
) -> None:
    answer = await api("POST", api.work_url(), json={"type": "healthcheck"})
    assert answer.status == 200
    assert (await api.claim_item())["data"]["type"] == "healthcheck"


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_item_created_in_one_dialect_is_delivered_in_the_other(
    qoder_api: ApiClient, anthropic_api: ApiClient
) -> None:
    created = (await anthropic_api("POST", anthropic_api.work_url())).body["data"][0]
    assert (await qoder_api.claim_item())["id"] == created["id"]
