"""The route `/scale/{environment_id}` for autoscalers, and the tokens that it accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from workpool.scaling import FLEET_NUMBERS
from workpool.server import ControlPlane, PostgresStore
from workpool.wire.items import parse_item

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.postgres.cluster import Cluster
    from workpool.server import Store

ENV = "env_0199aaaaaaaa70008000000000000001"
OTHER = "env_0199aaaaaaaa70008000000000000002"
CLOUD = "env_0199aaaaaaaa70008000000000000003"
TOKEN, LIMITED, KEY = "token-Zx9", "limited-Zx9", "key-Zx9"
SCALE, SCALE_LIMITED = "scale-Zx9", "scale-limited-Zx9"
PROXY_HEADERS = {"Host": "queue.example"}
"""Headers of a request through a proxy, which needs a token on loopback too."""


def make_control_plane(
    host: str = "127.0.0.1", store: Store | PostgresStore | None = None
) -> ControlPlane:
    return ControlPlane(
        environments=(ENV, OTHER),
        cloud_environments=(CLOUD,),
        tokens={TOKEN: None, LIMITED: frozenset({OTHER})},
        worker_keys=(KEY,),
        scale_tokens={SCALE: None, SCALE_LIMITED: frozenset({OTHER})},
        host=host,
        store=store,
    )


async def fetch_scale_numbers(
    plane: ControlPlane,
    path: str = ENV,
    headers: Mapping[str, str] | None = None,
    query: Mapping[str, str] | None = None,
) -> tuple[int, Any]:
    url = f"http://127.0.0.1:{plane.port}/scale/{path}"
    async with (
        aiohttp.ClientSession() as http,
        http.get(url, headers=headers, params=query or {}) as answer,
    ):
        return answer.status, await answer.json()


@pytest.mark.usefixtures("every_kind_of_store")
async def test_scale_route_counts_unfinished_items_and_recommends_workers(
    store: Store | PostgresStore,
) -> None:
    async with make_control_plane(store=store) as plane:
        items = await plane.engine.enqueue(ENV, count=7)
        await plane.engine.ack_item(ENV, items[0].id, "worker-1")
        await plane.engine.stop_item(ENV, items[6].id, None, force=True)
        status, numbers = await fetch_scale_numbers(
            plane, query={"slots_per_worker": "2", "min_replicas": "1"}
        )
        assert (status, list(numbers)) == (200, list(FLEET_NUMBERS))
        assert (numbers["queued"], numbers["pending"], numbers["running"]) == (5, 0, 1)
        assert (numbers["unfinished"], numbers["recommended_replicas"]) == (6, 3)
        assert 0 <= numbers["oldest_queued_seconds"] < 60
        _, limited = await fetch_scale_numbers(
            plane, query={"slots_per_worker": "1", "max_replicas": "2"}
        )
        assert limited["recommended_replicas"] == 2
        assert (await fetch_scale_numbers(plane, OTHER))[1]["recommended_replicas"] == 0


async def test_age_of_oldest_item_on_postgres_follows_clock_of_database(
    postgres: Cluster, database_url: str
) -> None:
    store = PostgresStore(database_url)
    await store.migrate()
    hour_ago = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - 3600000000"
    postgres.execute(
        "CREATE OR REPLACE FUNCTION workpool_now() RETURNS bigint LANGUAGE sql VOLATILE "
        f"AS $$ {hour_ago} $$",
        database_url,
    )
    async with make_control_plane(store=store) as plane:
        await plane.engine.enqueue(ENV)
        _, numbers = await fetch_scale_numbers(plane)
        assert 0 <= numbers["oldest_queued_seconds"] < 600


@pytest.mark.parametrize(
    "query",
    [
        {"slots_per_worker": "0"},
        {"slots_per_worker": "-1"},
        {"min_replicas": "3", "max_replicas": "2"},
        {"max_replicas": "many"},
    ],
)
async def test_scale_with_invalid_query_is_400(query: dict[str, str]) -> None:
    async with make_control_plane() as plane:
        status, body = await fetch_scale_numbers(plane, query=query)
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(("environment", "status"), [("env_unknown", 404), (CLOUD, 400)])
async def test_scale_request_for_unknown_or_cloud_environment_is_refused(
    environment: str, status: int
) -> None:
    async with make_control_plane() as plane:
        assert (await fetch_scale_numbers(plane, environment))[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Bearer {SCALE}"}, 200),
        ({"X-Api-Key": SCALE}, 200),
        ({"Authorization": f"Bearer {SCALE_LIMITED}"}, 403),
        ({"Authorization": f"Bearer {TOKEN}"}, 200),
        ({"Authorization": f"Bearer {LIMITED}"}, 403),
        ({"Authorization": f"Bearer {KEY}"}, 200),
    ],
)
async def test_scale_route_behind_proxy_needs_token_of_the_environment(
    headers: dict[str, str], status: int
) -> None:
    """A request over loopback needs no token, unless its `Host` shows that a proxy forwarded it.

    Without this rule, a proxy on the same machine would show the numbers to all its clients.
    """
    async with make_control_plane() as plane:
        assert (await fetch_scale_numbers(plane, headers=PROXY_HEADERS | headers))[0] == status


async def test_scale_route_on_non_loopback_address_needs_token() -> None:
    async with make_control_plane("0.0.0.0") as plane:  # noqa: S104 - it is what this test is about
        assert (await fetch_scale_numbers(plane))[0] == 401
        assert (await fetch_scale_numbers(plane, headers={"X-Api-Key": SCALE}))[0] == 200


async def test_request_to_other_path_with_scale_token_is_401() -> None:
    async with make_control_plane() as plane, aiohttp.ClientSession() as http:
        for path in ("/v1/environments", f"/v1/environments/{ENV}/work/stats"):
            url = f"http://127.0.0.1:{plane.port}{path}"
            async with http.get(url, headers={"X-Api-Key": SCALE}) as answer:
                assert answer.status == 401


async def test_scale_request_with_item_token_is_403() -> None:
    async with make_control_plane() as plane, aiohttp.ClientSession() as http:
        plane.enqueue()
        url = f"http://127.0.0.1:{plane.port}/v1/environments/{ENV}/work/poll"
        async with http.get(url, headers={"X-Api-Key": TOKEN}) as answer:
            item = parse_item(await answer.json())
        assert item.sessions_token is not None
        token = item.sessions_token.get_secret_value()
        status, _ = await fetch_scale_numbers(
            plane, headers=PROXY_HEADERS | {"Authorization": f"Bearer {token}"}
        )
        assert status == 403
