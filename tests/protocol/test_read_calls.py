"""Reads of one item, the list, the statistics and the session.

See workpool/docs/protocol.md, "Read an item" and "List items".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from yarl import URL

from tests.protocol.conftest import ENV, LIMITED, OTHER

if TYPE_CHECKING:
    from tests.manual_clock import ManualClock
    from tests.protocol.conftest import ApiClient


@pytest.mark.parametrize(
    "work_id",
    [
        "work_4e43a33e401a4038abe36845dff55165",  # a well-formed id that no item has
        "work_",
        "x",
        "sess_" + "0" * 32,
        "WORK_" + "0" * 32,
        "%00",
        "%ff%fe",
        "a%2Fb",
        "%F0%9F%99%82",
        "w" * 4000,
        "work_" + "0" * 31 + "%7B",
    ],
)
@pytest.mark.parametrize("call", ["get", "ack", "heartbeat", "stop", "update"])
async def test_unknown_or_malformed_item_id_is_404(
    qoder_api: ApiClient, call: str, work_id: str
) -> None:
    method, suffix = {
        "get": ("GET", ""),
        "ack": ("POST", "/ack"),
        "heartbeat": ("POST", "/heartbeat"),
        "stop": ("POST", "/stop"),
        "update": ("POST", ""),
    }[call]
    url = URL(qoder_api.work_url(f"/{work_id}{suffix}"), encoded=True)
    answer = await qoder_api(method, url)  # type: ignore[arg-type]  # an encoded URL, not to be quoted
    assert answer.status == 404
    assert answer.error["type"] == "not_found_error"


async def test_item_of_another_environment_is_404(api: ApiClient) -> None:
    (item,) = api.plane.enqueue(environment_id=OTHER)
    assert (await api.get(item.id)).status == 404
    assert (await api("GET", api.work_url(f"/{item.id}", OTHER))).status == 200


async def read_item_page(api: ApiClient, **params: Any) -> dict[str, Any]:
    answer = await api("GET", api.work_url(), params={k: str(v) for k, v in params.items()})
    assert answer.status == 200
    body: dict[str, Any] = answer.body
    assert set(body) == {"data", "first_id", "last_id", "has_more", "next_page"}
    ids = [item["id"] for item in body["data"]]
    assert ids == sorted(ids)
    assert body["first_id"] == (ids[0] if ids else None)
    assert body["last_id"] == (ids[-1] if ids else None)
    assert (body["next_page"] is not None) is body["has_more"]
    return {**body, "ids": ids}


async def test_list_of_empty_queue_has_no_items(api: ApiClient) -> None:
    assert await read_item_page(api) == {
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
        "next_page": None,
        "ids": [],
    }


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_item_list_can_be_paged_forward_to_last_item(api: ApiClient) -> None:
    ids = [item.id for item in api.plane.enqueue(45)]
    page = await read_item_page(api)
    seen = page["ids"]
    assert len(seen) == 20
    while page["has_more"]:
        page = await read_item_page(api, page=page["next_page"], limit=20)
        seen += page["ids"]
    assert seen == ids


async def test_item_list_before_an_id_can_be_paged_back_to_first_item(api: ApiClient) -> None:
    ids = [item.id for item in api.plane.enqueue(10)]
    page = await read_item_page(api, before_id=ids[8], limit=3)
    assert page["ids"] == ids[5:8]
    page = await read_item_page(api, page=page["next_page"], limit=3)
    assert page["ids"] == ids[2:5]
    page = await read_item_page(api, page=page["next_page"], limit=3)
    assert page["ids"] == ids[0:2]
    assert not page["has_more"]


@pytest.mark.parametrize(("limit", "count"), [("1", 1), ("99", 99), ("100", 100), ("1000", 100)])
async def test_list_limit_is_capped_at_100(api: ApiClient, limit: str, count: int) -> None:
    ids = [item.id for item in api.plane.enqueue(101)]
    page = await read_item_page(api, limit=limit)
    assert page["ids"] == ids[:count]
    assert page["has_more"]


async def test_full_last_page_of_items_has_no_next_page(api: ApiClient) -> None:
    ids = [item.id for item in api.plane.enqueue(4)]
    assert not (await read_item_page(api, after_id=ids[1], limit=2))["has_more"]
    assert not (await read_item_page(api, before_id=ids[2], limit=2))["has_more"]


async def test_pages_after_or_before_an_id_exclude_the_item_of_that_id(api: ApiClient) -> None:
    ids = [item.id for item in api.plane.enqueue(3)]
    assert (await read_item_page(api, after_id=ids[0]))["ids"] == ids[1:]
    assert (await read_item_page(api, before_id=ids[2]))["ids"] == ids[:2]
    assert (await read_item_page(api, after_id=ids[2]))["ids"] == []
    assert (await read_item_page(api, before_id=ids[0]))["ids"] == []


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "ten"}, "limit"),
        ({"limit": ""}, "limit"),
        ({"limit": "1.5"}, "limit"),
        ({"after_id": "x"}, "after_id"),
        ({"after_id": ""}, "after_id"),
        ({"before_id": "work_"}, "before_id"),
        ({"before_id": "work_" + "g" * 32}, "before_id"),
        ({"page": "x"}, "page"),
        ({"page": ""}, "page"),
        ({"page": "work_" + "0" * 32}, "page"),
        ({"page": "sideways-work_" + "0" * 32}, "page"),
        ({"page": "after-x"}, "page"),
    ],
)
async def test_invalid_cursor_or_limit_of_list_is_400(
    api: ApiClient, params: dict[str, str], param: str
) -> None:
    answer = await api("GET", api.work_url(), params=params)
    assert answer.status == 400
    assert answer.error["param"] == param


@pytest.mark.parametrize(
    "names", [("after_id", "before_id"), ("after_id", "page"), ("page", "before_id")]
)
async def test_item_list_with_two_cursor_parameters_is_400(
    api: ApiClient, names: tuple[str, str]
) -> None:
    (item,) = api.plane.enqueue()
    value = {"after_id": item.id, "before_id": item.id, "page": f"after-{item.id}"}
    answer = await api("GET", api.work_url(), params={name: value[name] for name in names})
    assert answer.status == 400


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_stats_count_queued_and_pending_items(api: ApiClient, clock: ManualClock) -> None:
    assert await api.queue_stats() == {
        "type": "work_queue_stats",
        "depth": 0,
        "pending": 0,
        "oldest_queued_at": None,
        "workers_polling": 0,
        "running": 0,
        "stopped": 0,
    }
    api.plane.enqueue(3)
    clock.advance(1)
    await api.claim_item(worker="a")
    stats = await api.queue_stats()
    assert (stats["depth"], stats["pending"], stats["workers_polling"]) == (2, 1, 1)
    assert stats["oldest_queued_at"] == "2026-03-01T12:00:00Z"
    # After the reclaim window, a poll may receive the delivered item again. So the item counts in
    # `depth`, and not in `pending` anymore.
    clock.advance(5)
    stats = await api.queue_stats()
    assert (stats["depth"], stats["pending"]) == (3, 0)


async def test_stats_exclude_acknowledged_and_stopped_items(
    api: ApiClient, clock: ManualClock
) -> None:
    for state in ("starting", "active", "stopping", "stopped"):
        await api.create_item_in_state(state)
    stats = await api.queue_stats()
    assert (stats["depth"], stats["pending"], stats["oldest_queued_at"]) == (0, 0, None)
    # The leases of the items in `starting` and `active` expire now, so both items are queued again.
    clock.advance(60)
    stats = await api.queue_stats()
    assert (stats["depth"], stats["pending"]) == (2, 0)
    assert stats["oldest_queued_at"] == "2026-03-01T12:00:00Z"


async def test_stats_count_each_worker_id_that_polled_within_30_seconds_once(
    api: ApiClient, clock: ManualClock
) -> None:
    for worker in ("a", "b", "a", None):
        await api.poll(worker=worker)
    assert (await api.queue_stats())["workers_polling"] == 2
    clock.advance(29.9)
    await api.poll(worker="b")
    clock.advance(0.1)
    assert (await api.queue_stats())["workers_polling"] == 1
    clock.advance(30)
    assert (await api.queue_stats())["workers_polling"] == 0


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("queued", "idle"),
        ("starting", "idle"),
        ("active", "running"),
        ("stopping", "canceling"),
        ("stopped", "idle"),
    ],
)
async def test_session_status_follows_state_of_item(
    qoder_api: ApiClient, state: str, status: str
) -> None:
    work_id = await qoder_api.create_item_in_state(state)
    await qoder_api.update(work_id, json={"metadata": {"only": "the item's"}})
    session_id = (await qoder_api.get(work_id)).body["data"]["id"]
    answer = await qoder_api("GET", f"{qoder_api.base_url}/sessions/{session_id}")
    assert answer.status == 200
    assert answer.body["id"] == session_id
    assert answer.body["type"] == "session"
    assert answer.body["status"] == status
    assert answer.body["environment_id"] == "env_0199aaaaaaaa70008000000000000001"
    assert answer.body["metadata"] == {}
    assert answer.body["agent"]["id"]


async def test_anthropic_session_status_is_running_while_item_state_is_stopping(
    anthropic_api: ApiClient,
) -> None:
    work_id = await anthropic_api.create_item_in_state("stopping")
    session_id = (await anthropic_api.get(work_id)).body["data"]["id"]
    answer = await anthropic_api("GET", f"{anthropic_api.base_url}/sessions/{session_id}")
    assert answer.body["status"] == "running"


async def test_item_changes_and_new_events_advance_updated_at_of_session(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("starting")
    own = api.plane.operations.get_item(ENV, work_id).session_id
    session_id = (await api.get(work_id)).body["data"]["id"]

    async def read_item_update_time() -> str:
        body = (await api("GET", f"{api.base_url}/sessions/{session_id}")).body
        updated: str = body["updated_at"]
        return updated

    assert await read_item_update_time() == "2026-03-01T12:00:00.000000Z"
    clock.advance(1)
    await api.heartbeat(work_id, "NO_HEARTBEAT")
    assert await read_item_update_time() == "2026-03-01T12:00:01.000000Z"
    clock.advance(1)
    api.plane.emit(own, {"type": "session.status_running"})
    assert await read_item_update_time() == "2026-03-01T12:00:02.000000Z"
    clock.advance(1)
    await api.stop(work_id)
    assert await read_item_update_time() == "2026-03-01T12:00:03.000000Z"


@pytest.mark.parametrize("prefix", ["session_", "sesn_"])
async def test_anthropic_session_is_found_by_id_with_prefix_session_or_sesn(
    anthropic_api: ApiClient, prefix: str
) -> None:
    (item,) = anthropic_api.plane.enqueue(metadata={"k": "v"})
    digits = item.session_id.removeprefix("sess_")
    answer = await anthropic_api("GET", f"{anthropic_api.base_url}/sessions/{prefix}{digits}")
    assert answer.status == 200
    assert answer.body["id"] == f"session_{digits}"
    assert answer.body["metadata"] == {"k": "v"}


async def test_unknown_session_is_404(api: ApiClient) -> None:
    (item,) = api.plane.enqueue()
    for session_id in ("sess_" + "0" * 32, "session_", "x", item.id, "%00"):
        assert (await api("GET", f"{api.base_url}/sessions/{session_id}")).status == 404


async def test_read_of_session_in_environment_that_token_forbids_is_403(api: ApiClient) -> None:
    (item,) = api.plane.enqueue(environment_id=OTHER)
    url = f"{api.base_url}/sessions/{item.session_id}"
    assert (await api("GET", url)).status == 200
    api.token = LIMITED
    assert (await api("GET", url)).status == 403
    api.token = None
    assert (await api("GET", url)).status == 401
