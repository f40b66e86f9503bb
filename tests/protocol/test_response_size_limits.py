"""Limits of the size of responses, and of the memory that slow readers of a stream use."""

from __future__ import annotations

import asyncio
import tracemalloc
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

import orjson
import pytest

from tests.protocol.conftest import ENV, TOKEN, ApiClient, HttpAnswer
from tests.protocol.test_events import create_scripted_session, events_path, send_events
from workpool import Settings, WorkClient
from workpool.server import APIError, Item
from workpool.server.answer_limits import (
    ITEM_BYTES,
    METADATA_ENTRIES_MAX,
    METADATA_LIMIT_BYTES,
    NEW_METADATA_LIMIT_BYTES,
)
from workpool.server.http.server_dialects import DIALECTS
from workpool.wire.protocol import ANSWER_LIMIT_BYTES

if TYPE_CHECKING:
    from workpool.server import ControlPlane
    from workpool.wire.protocol import Dialect

MEGABYTE = 1_000_000


def make_metadata_of_size(size: int) -> dict[str, str]:
    """Return metadata of `size` bytes as compact JSON."""
    frame = len(orjson.dumps({"k": ""}))
    return {"k": "x" * (size - frame)}


async def post_json(api: ApiClient, url: str, content: object) -> HttpAnswer:
    return await api("POST", url, data=BytesIO(orjson.dumps(content)))


def open_work_client(plane: ControlPlane) -> WorkClient:
    settings = Settings(environment_id=ENV, token=TOKEN, base_url=plane.base_url)
    return WorkClient(settings)


async def test_responses_about_largest_item_are_readable_by_worker(qoder_api: ApiClient) -> None:
    created = await post_json(
        qoder_api, qoder_api.work_url(), {"metadata": make_metadata_of_size(4_000_000)}
    )
    assert created.status == 200
    work_id = created.body["data"][0]["id"]
    grown = make_metadata_of_size(METADATA_LIMIT_BYTES)
    async with open_work_client(qoder_api.plane) as client:
        item = await client.poll()
        assert item is not None
        assert item.id == work_id
        await client.ack(work_id)
        await client.update_metadata(work_id, grown)
        await client.heartbeat(work_id, expected=None)
        assert (await client.get(work_id)).metadata == grown
        assert [each.id async for each in client.list()] == [work_id]
        await client.stop(work_id, force=True)
    session_id = item.session_id
    url = f"{qoder_api.base_url}/sessions/{session_id}"
    async with qoder_api.http.get(url, headers={"Authorization": f"Bearer {TOKEN}"}) as response:
        assert len(await response.read()) <= ANSWER_LIMIT_BYTES


async def test_enqueue_with_metadata_above_limit_is_refused_with_limit_in_message(
    api: ApiClient,
) -> None:
    too_large = make_metadata_of_size(NEW_METADATA_LIMIT_BYTES + 1)
    with pytest.raises(APIError, match=str(NEW_METADATA_LIMIT_BYTES)) as caught:
        api.plane.enqueue(metadata=too_large)
    assert (caught.value.status, caught.value.param) == (400, "metadata")
    assert len(api.plane.operations.get_queue(ENV)) == 0
    assert len(api.plane.enqueue(metadata=make_metadata_of_size(NEW_METADATA_LIMIT_BYTES))) == 1


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_update_above_metadata_limit_is_refused_and_not_applied(api: ApiClient) -> None:
    (item,) = api.plane.enqueue(metadata=make_metadata_of_size(NEW_METADATA_LIMIT_BYTES))
    patches = [{f"more {number}": "y" * 30_000} for number in range(3)]
    answers = [await api.update(item.id, json={"metadata": patch}) for patch in patches]
    assert [answer.status for answer in answers] == [200, 200, 400]
    assert answers[2].error["param"] == "metadata"
    assert str(METADATA_LIMIT_BYTES) in answers[2].error["message"]
    kept = (await api.get(item.id)).body["metadata"]
    assert set(kept) == {"k", "more 0", "more 1"}
    assert (await api.update(item.id, json={"metadata": {"k": None}})).status == 200


async def test_size_limit_for_metadata_applies_to_metadata_as_json(api: ApiClient) -> None:
    """The metadata here are within the limit in memory, but above it as JSON.

    A control character takes one byte in memory and six bytes (an escape) in JSON.
    """
    with pytest.raises(APIError):
        api.plane.enqueue(metadata={"k": "\0" * MEGABYTE})


async def test_metadata_with_too_many_entries_are_refused(api: ApiClient) -> None:
    allowed = {str(number): "" for number in range(METADATA_ENTRIES_MAX)}
    (item,) = api.plane.enqueue(metadata=allowed)
    with pytest.raises(APIError, match=str(METADATA_ENTRIES_MAX)):
        api.plane.enqueue(metadata={**allowed, "more": ""})
    answer = await api.update(item.id, json={"metadata": {"more": ""}})
    assert (answer.status, answer.error["param"]) == (400, "metadata")
    assert (await api.update(item.id, json={"metadata": {"more": "", "0": None}})).status == 200


@pytest.mark.parametrize(
    ("suffix", "body"),
    [
        ("/environments", {"name": "e", "config": {"type": "self_hosted"}}),
        ("/sessions", {"agent": "agent_1", "environment_id": ENV}),
    ],
)
async def test_environment_or_session_with_metadata_above_limit_is_refused(
    anthropic_api: ApiClient, suffix: str, body: dict[str, Any]
) -> None:
    content = {**body, "metadata": make_metadata_of_size(NEW_METADATA_LIMIT_BYTES + 1)}
    answer = await post_json(anthropic_api, anthropic_api.base_url + suffix, content)
    assert (answer.status, answer.error["param"]) == (400, "metadata")


async def test_enqueue_with_response_above_limit_is_refused(api: ApiClient) -> None:
    content = {"count": 1000, "metadata": make_metadata_of_size(4_000_000)}
    answer = await post_json(api, api.work_url(), content)
    assert (answer.status, answer.error["param"]) == (400, "count")
    assert str(ANSWER_LIMIT_BYTES) in answer.error["message"]
    assert len(api.plane.operations.get_queue(ENV)) == 0


async def test_largest_enqueue_response_is_readable_by_worker(qoder_api: ApiClient) -> None:
    size = ANSWER_LIMIT_BYTES // 1000 - 1024
    async with open_work_client(qoder_api.plane) as client:
        items = await client.enqueue(count=1000, metadata=make_metadata_of_size(size))
        assert len(items) == 1000
    content = {"count": 1000, "metadata": make_metadata_of_size(size + 1)}
    assert (await post_json(qoder_api, qoder_api.work_url(), content)).status == 400


async def read_ids_and_largest_page_size(
    api: ApiClient, url: str, **query: str
) -> tuple[list[str], int]:
    """Return the ids on all pages of a list, and the size of the largest page in bytes."""
    ids: list[str] = []
    largest = 0
    headers = {"Authorization": f"Bearer {TOKEN}"}
    while True:
        async with api.http.get(url, params={"limit": "100", **query}, headers=headers) as response:
            content = await response.read()
        largest = max(largest, len(content))
        page = orjson.loads(content)
        rows = [row["id"] for row in page["data"]]
        ends = [page[name].rpartition("_")[2] for name in ("first_id", "last_id")]
        assert ends == [row.rpartition("_")[2] for row in (rows[0], rows[-1])]
        assert page["has_more"] is (page["next_page"] is not None)
        ids += rows
        if page["next_page"] is None:
            return ids, largest
        query = {**query, "page": page["next_page"]}
        query.pop("before_id", None)


async def test_item_list_is_split_into_pages_within_response_size_limit(api: ApiClient) -> None:
    items = [api.plane.enqueue(metadata=make_metadata_of_size(MEGABYTE))[0].id for _ in range(11)]
    ids, largest = await read_ids_and_largest_page_size(api, api.work_url())
    assert ids == items
    assert 3 * MEGABYTE < largest <= ANSWER_LIMIT_BYTES
    ids, largest = await read_ids_and_largest_page_size(api, api.work_url(), before_id=items[-1])
    assert sorted(ids) == items[:-1]
    assert ids[:3] == items[-5:-2] or ids[:3] == items[-4:-1]
    assert largest <= ANSWER_LIMIT_BYTES


async def test_item_page_stays_within_response_limit_if_items_have_largest_metadata(
    api: ApiClient,
) -> None:
    for _ in range(3):
        (item,) = api.plane.enqueue()
        api.plane.operations.update_metadata(
            ENV, item.id, make_metadata_of_size(METADATA_LIMIT_BYTES)
        )
    ids, largest = await read_ids_and_largest_page_size(api, api.work_url())
    assert len(ids) == 3
    assert largest <= ANSWER_LIMIT_BYTES


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_session_list_is_split_into_pages_within_response_size_limit(
    anthropic_api: ApiClient, order: str
) -> None:
    for _ in range(7):
        anthropic_api.plane.enqueue(metadata=make_metadata_of_size(MEGABYTE))
    ids, largest = await read_ids_and_largest_page_size(
        anthropic_api, anthropic_api.base_url + "/sessions", order=order
    )
    assert len(set(ids)) == 7
    assert ids == sorted(ids, reverse=order == "desc")
    assert largest <= ANSWER_LIMIT_BYTES


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_event_list_is_split_into_pages_within_response_size_limit(
    api: ApiClient, order: str
) -> None:
    session_id = create_scripted_session(api)
    for _ in range(9):
        assert (await send_events(api, session_id, make_message_of_size(MEGABYTE))).status == 200
    ids, largest = await read_ids_and_largest_page_size(
        api, events_path(api, session_id, "/events"), order=order
    )
    assert sorted(ids) == [event["id"] for event in api.plane.events(session_id)]
    assert ids == sorted(ids, reverse=order == "desc")
    assert largest <= ANSWER_LIMIT_BYTES


def make_message_of_size(size: int) -> dict[str, Any]:
    return {"type": "user.message", "content": [{"type": "text", "text": "x" * size}]}


async def test_server_uses_limited_memory_for_streams_whose_clients_do_not_read(
    qoder_api: ApiClient,
) -> None:
    session_id = create_scripted_session(qoder_api)
    for _ in range(20):
        assert (
            await send_events(qoder_api, session_id, make_message_of_size(MEGABYTE))
        ).status == 200
    whole = sum(len(orjson.dumps(event)) for event in qoder_api.plane.events(session_id))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        writers = [await open_stream_and_stop_reading(qoder_api, session_id) for _ in range(10)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for writer in writers:
        writer.close()
    assert peak - before < 2 * whole


async def open_stream_and_stop_reading(api: ApiClient, session_id: str) -> asyncio.StreamWriter:
    """Open a stream that replays all events, and read only its beginning."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.plane.port, limit=1024)
    url = events_path(api, session_id, "/events/stream")
    lines = [
        f"GET {url[url.index('/api') :]} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {TOKEN}",
        "Last-Event-ID: unknown",
    ]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    await reader.readuntil(b"user.message")
    return writer


def test_size_limit_for_item_leaves_room_for_all_fields_besides_metadata(dialect: str) -> None:
    item = Item(
        id="work_" + "0" * 32,
        environment_id="e" * 128,
        session_id="sess_" + "0" * 32,
        type="t" * 64,
        state="starting",
        created_at=1,
        acknowledged_at=1,
        started_at=1,
        heartbeat_at=1,
        stop_requested_at=1,
        stopped_at=1,
    )
    shown = DIALECTS[cast("Dialect", dialect)].item_json(item)
    assert None not in shown.values()
    assert len(orjson.dumps(shown)) < ITEM_BYTES
