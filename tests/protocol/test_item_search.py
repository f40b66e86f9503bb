"""Searches for items. If the control plane cannot search, the client filters the whole list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.protocol.conftest import ENV, TOKEN, ApiClient
from workpool import Settings
from workpool.errors import RefusedError
from workpool.server import ControlPlane, operations
from workpool.wire import client as client_module
from workpool.wire.client import WorkClient
from workpool.wire.item_search import ItemSearch
from workpool.wire.items import parse_stats

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.manual_clock import ManualClock

STATES = ("queued", "starting", "active", "stopping", "stopped")


@pytest.fixture
async def item_ids(qoder_api: ApiClient) -> dict[str, str]:
    """Create an item in each state, and a failed one; return their ids by state and "failed"."""
    found = {
        state: await qoder_api.create_item_in_state(state, "worker") for state in reversed(STATES)
    }
    failed = await qoder_api.create_item_in_state("stopped")
    qoder_api.plane.operations.update_metadata(ENV, failed, {"workpool.error": "ValueError"})
    return found | {"failed": failed}


async def search_items(api: ApiClient, **params: str) -> tuple[list[str], Any]:
    answer = await api("GET", api.work_url(), params=params)
    assert answer.status == 200
    assert answer.body["selected"] is True
    return [item["id"] for item in answer.body["data"]], answer.body["next_page"]


async def test_search_by_state_finds_the_items_in_that_state(
    api: ApiClient, item_ids: dict[str, str]
) -> None:
    for state in STATES[:-1]:
        assert await search_items(api, state=state) == ([item_ids[state]], None)
    assert await search_items(api, state="stopped") == (
        [item_ids["stopped"], item_ids["failed"]],
        None,
    )


async def test_search_for_failed_items_finds_only_stopped_items_with_error(
    api: ApiClient, item_ids: dict[str, str]
) -> None:
    api.plane.operations.update_metadata(
        ENV, item_ids["queued"], {"workpool.error": "of an earlier run"}
    )
    assert await search_items(api, failed="true") == ([item_ids["failed"]], None)
    assert len((await search_items(api, failed="false"))[0]) == len(item_ids)


async def test_search_in_descending_order_continues_with_older_items(
    api: ApiClient, item_ids: dict[str, str]
) -> None:
    expected = sorted(item_ids.values(), reverse=True)
    found, token = await search_items(api, order="desc", limit="4")
    assert found == expected[:4]
    assert await search_items(api, order="desc", limit="4", page=token) == (expected[4:], None)


async def test_search_page_ends_after_reading_limited_number_of_items(
    api: ApiClient, item_ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "LOOKED_AT_MAX", 4)
    found, token = await search_items(api, failed="true")
    assert (found, token is None) == ([], False)
    assert await search_items(api, failed="true", page=token) == ([item_ids["failed"]], None)


async def test_full_last_page_has_no_next_page(api: ApiClient, item_ids: dict[str, str]) -> None:
    assert await search_items(api, state="stopped", limit="2") == (
        [item_ids["stopped"], item_ids["failed"]],
        None,
    )
    found, token = await search_items(api, state="stopped", limit="1")
    assert found == [item_ids["stopped"]]
    assert await search_items(api, state="stopped", limit="1", page=token) == (
        [item_ids["failed"]],
        None,
    )


@pytest.mark.parametrize(
    "params", [{"state": "lost"}, {"failed": "yes"}, {"order": "up"}, {"state": ""}]
)
async def test_item_search_with_unknown_parameter_value_is_400(
    api: ApiClient, params: dict[str, str]
) -> None:
    answer = await api("GET", api.work_url(), params=params)
    assert (answer.status, answer.error["param"]) == (400, next(iter(params)))


async def test_stats_count_running_and_stopped_items(
    qoder_api: ApiClient, item_ids: dict[str, str]
) -> None:
    stats = await qoder_api.queue_stats()
    assert (stats["running"], stats["stopped"]) == (3, 2)
    qoder_api.plane.operations.stop_item(ENV, item_ids["active"], force=True)
    stats = await qoder_api.queue_stats()
    assert (stats["running"], stats["stopped"]) == (2, 3)


class ItemSearchMiddleware:
    """Middleware that makes a control plane support, ignore or refuse the parameters of a search.

    Attributes:
        helps: Whether the control plane supports searches.
        refuses: Whether a control plane without searches answers them with 400, instead of
            ignoring their parameters.
        lists: The number of list requests.
    """

    def __init__(self) -> None:
        self.refuses = False
        self.helps = True
        self.lists = 0

    @web.middleware
    async def handle_request(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        self.lists += request.path.endswith("/work")
        unknown = {"state", "failed", "order"} & set(request.query)
        if self.helps or not unknown:
            return await handler(request)
        if self.refuses:
            return web.json_response({"error": {"type": "invalid_request_error"}}, status=400)
        kept = {name: text for name, text in request.query.items() if name not in unknown}
        return await handler(request.clone(rel_url=request.rel_url.with_query(kept)))


@pytest.fixture
def item_search_middleware() -> ItemSearchMiddleware:
    return ItemSearchMiddleware()


@pytest.fixture
async def control_plane(
    clock: ManualClock, item_search_middleware: ItemSearchMiddleware
) -> AsyncIterator[ControlPlane]:
    async with ControlPlane(
        environments=(ENV,),
        tokens={TOKEN: None},
        now=clock,
        middlewares=[item_search_middleware.handle_request],
    ) as plane:
        yield plane


@pytest.fixture
async def client(control_plane: ControlPlane) -> AsyncIterator[WorkClient]:
    settings = Settings(base_url=control_plane.base_url, token=TOKEN, environment_id=ENV)
    async with WorkClient(settings) as client:
        yield client


@pytest.fixture(params=["helps", "ignores", "refuses"])
def item_search_support(
    request: pytest.FixtureRequest, item_search_middleware: ItemSearchMiddleware
) -> str:
    item_search_middleware.helps = request.param == "helps"
    item_search_middleware.refuses = request.param == "refuses"
    return str(request.param)


async def test_client_item_search_has_same_result_if_control_plane_supports_no_search(
    client: WorkClient, item_ids: dict[str, str], clock: ManualClock, item_search_support: str
) -> None:
    failed = await client.find(ItemSearch(20, failed=True))
    assert [item.id for item in failed.items] == [item_ids["failed"]]
    assert failed.complete
    assert failed.read == (1 if item_search_support == "helps" else 6)
    clock.advance(1)
    (newer,) = await client.enqueue()
    newest = await client.find(ItemSearch(1, newest=True))
    assert [item.id for item in newest.items] == [newer.id]
    assert not newest.complete
    active = await client.find(ItemSearch(20, "active"))
    assert [item.id for item in active.items] == [item_ids["active"]]


async def test_client_search_reads_limited_number_of_pages(
    client: WorkClient,
    control_plane: ControlPlane,
    item_search_middleware: ItemSearchMiddleware,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item_search_middleware.helps = False
    monkeypatch.setattr(client_module, "FIND_PAGES_MAX", 3)
    items = control_plane.enqueue(500)
    found = await client.find(ItemSearch(20, failed=True))
    assert (found.items, found.read, found.complete) == ([], 300, False)
    assert (item_search_middleware.lists, found.last_id) == (3, items[299].id)
    found = await client.find(ItemSearch(20, failed=True), after_id=found.last_id)
    assert (found.read, found.complete) == (200, True)


async def test_client_search_without_support_of_control_plane_reads_limited_number_of_items(
    client: WorkClient, control_plane: ControlPlane
) -> None:
    items = control_plane.enqueue(7)
    found = await client.find(ItemSearch(5))
    assert ([item.id for item in found.items], found.read) == ([each.id for each in items[:5]], 5)
    assert (found.complete, found.last_id) == (False, items[4].id)


async def test_client_item_search_raises_refused_error_if_control_plane_refuses_item_list(
    client: WorkClient, item_search_middleware: ItemSearchMiddleware
) -> None:
    item_search_middleware.helps, item_search_middleware.refuses = False, True
    with pytest.raises(RefusedError):
        await client.find(ItemSearch(5), after_id="work_unknown")


@pytest.mark.usefixtures("item_ids")
async def test_client_reads_the_counts_of_running_and_stopped_items(client: WorkClient) -> None:
    stats = await client.stats()
    assert (stats.running, stats.stopped) == (3, 2)


@pytest.mark.parametrize("more", [{}, {"running": None, "stopped": "many"}, {"running": True}])
def test_missing_or_malformed_item_counts_in_stats_are_parsed_as_none(
    more: dict[str, object],
) -> None:
    stats = parse_stats({"depth": 1, "pending": 0, **more})
    assert (stats.depth, stats.running, stats.stopped) == (1, None, None)
