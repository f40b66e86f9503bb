"""Start, end and options of the embedded control plane."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web

from tests.protocol.conftest import CLOUD, ENV, LIMITED, OTHER, TOKEN, ApiClient
from workpool.server import (
    DEFAULT_ENVIRONMENT,
    ControlPlane,
    ServeError,
    SqliteStore,
    parse_token_file,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


async def test_control_plane_without_options_has_documented_defaults(
    http_session: aiohttp.ClientSession,
) -> None:
    async with ControlPlane() as plane:
        assert plane.environments == (DEFAULT_ENVIRONMENT,)
        assert plane.base_url == f"http://127.0.0.1:{plane.port}/api/v1/cloud"
        assert plane.anthropic_base_url == f"http://127.0.0.1:{plane.port}/v1"
        assert len(plane.token) >= 32
        assert plane.token not in repr(plane)
        api = ApiClient(plane, http_session, "qoder", token=plane.token)
        (item,) = plane.enqueue(metadata={"k": "v"})
        claimed = (await api.poll(DEFAULT_ENVIRONMENT, params={"block_ms": "999"})).body
        assert (claimed["id"], claimed["metadata"]) == (item.id, {"k": "v"})
        assert plane.summary().enqueued == 1


async def test_two_control_planes_have_different_tokens() -> None:
    assert ControlPlane().token != ControlPlane().token


async def test_session_with_two_items_has_metadata_of_first_and_status_of_second_item(
    http_session: aiohttp.ClientSession,
) -> None:
    async with ControlPlane(environments=(ENV,), tokens={TOKEN: None}) as plane:
        (first,) = plane.enqueue(metadata={"of": "the session"})
        (second,) = plane.enqueue(session_id=first.session_id)
        assert first.session_id == second.session_id
        api = ApiClient(plane, http_session, "qoder")
        await api.ack(second.id)
        await api.heartbeat(second.id)
        session = (await api("GET", f"{api.base_url}/sessions/{first.session_id}")).body
        assert (session["status"], session["metadata"]) == ("running", {"of": "the session"})


async def test_control_plane_opened_fifty_times_leaves_no_task_or_thread(
    tmp_path: Path, reserved_port: int
) -> None:
    tasks, threads = asyncio.all_tasks(), threading.active_count()
    for number in range(50):
        # A start would fail if an earlier control plane still listened on the port.
        plane = ControlPlane(port=reserved_port, store=SqliteStore(tmp_path / f"{number % 2}.db"))
        async with plane, aiohttp.ClientSession() as session:
            api = ApiClient(plane, session, "qoder", token=plane.token)
            assert (await api.poll(DEFAULT_ENVIRONMENT)).status == 200
    names = {thread.name for thread in threading.enumerate()}
    assert "workpool-store" not in names
    # The default executor of the event loop keeps up to 8 threads. If each of the 50 control planes
    # had left a thread running, the number would be higher.
    assert threading.active_count() <= threads + 8
    assert asyncio.all_tasks() == tasks
    gc.collect()


async def test_failed_start_of_control_plane_leaves_store_unlocked(tmp_path: Path) -> None:
    path = tmp_path / "work.db"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        plane = ControlPlane(port=port, store=SqliteStore(path))
        with pytest.raises(ServeError, match=f"127.0.0.1 port {port}"):
            await plane.__aenter__()
    # This start would fail if the first store still had its lock on the file.
    async with ControlPlane(store=SqliteStore(path)):
        pass


async def test_cancelled_start_of_control_plane_leaves_store_unlocked(tmp_path: Path) -> None:
    path = tmp_path / "work.db"
    for steps in range(8):
        plane = ControlPlane(store=SqliteStore(path))
        entering = asyncio.get_running_loop().create_task(plane.__aenter__())
        for _ in range(steps):
            await asyncio.sleep(0)
        if not entering.cancel():
            await plane.__aexit__(None, None, None)
        else:
            with pytest.raises(asyncio.CancelledError):
                await entering
    async with ControlPlane(store=SqliteStore(path)):
        pass


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"environments": ()}, "at least one"),
        ({"environments": (ENV, ENV)}, "none twice"),
        ({"environments": (ENV,), "cloud_environments": (ENV,)}, "none twice"),
        ({"environments": ("a b",)}, "'a b': not an id"),
        ({"environments": ("",)}, "not an id"),
        ({"tokens": {"": None}}, "1 to 1024 printable"),
        ({"tokens": {"two words": None}}, "1 to 1024 printable"),
        ({"tokens": {TOKEN: frozenset({"env_typo"})}}, "'env_typo', which is not served"),
        ({"host": "256.0.0.1"}, "cannot listen"),
        ({"port": 70000}, "port 70000: not in 0-65535"),
        ({"port": -1}, "port -1: not in"),
    ],
)
async def test_invalid_options_are_refused_at_start(
    options: dict[str, object], problem: str
) -> None:
    with pytest.raises(ServeError, match=problem) as error:
        await ControlPlane(**options).__aenter__()  # type: ignore[arg-type]  # options as data
    assert TOKEN not in str(error.value)
    assert "two words" not in str(error.value)


async def test_control_plane_on_ipv6_address_answers(http_session: aiohttp.ClientSession) -> None:
    async with ControlPlane(host="::1") as plane:
        assert plane.base_url.startswith("http://[::1]:")
        api = ApiClient(plane, http_session, "qoder", token=plane.token)
        assert (await api.poll(DEFAULT_ENVIRONMENT)).status == 200


async def test_control_plane_listens_on_given_port(reserved_port: int) -> None:
    async with ControlPlane(port=reserved_port) as plane:
        assert plane.port == reserved_port


async def test_error_about_port_in_use_names_port_and_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port}: .*; choose another port, or 0"):
            await ControlPlane(port=port).__aenter__()


async def test_middlewares_of_control_plane_can_replace_every_response(
    http_session: aiohttp.ClientSession,
) -> None:
    @web.middleware
    async def replace_404_by_503(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        response = await handler(request)
        return web.Response(status=503) if response.status == 404 else response

    async with ControlPlane(middlewares=[replace_404_by_503]) as plane:
        api = ApiClient(plane, http_session, "qoder", token=plane.token)
        assert (await api("GET", api.base_url)).status == 503
        assert (await api.poll(DEFAULT_ENVIRONMENT)).status == 200


def test_token_file_is_parsed_into_tokens_and_environments() -> None:
    text = f"# who may call\n\n{TOKEN}\n{LIMITED} {ENV} {OTHER}\n   padded\t{CLOUD}  \n"
    assert parse_token_file(text) == {
        TOKEN: None,
        LIMITED: frozenset({ENV, OTHER}),
        "padded": frozenset({CLOUD}),
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no token in it"),
        ("# only this\n\n", "no token in it"),
        ("first\nsecret-token\n\nsecret-token env_1\n", "line 4: the token of an earlier line"),
        ("secret-token env_1 env/2\n", "line 1: not an environment id"),
        ("fine\n\u00fcmlaut-secret-token\n", "line 2: a token must be"),
        ("secret-token" * 100, "line 1: a token must be"),
    ],
)
def test_mistake_in_token_file_is_reported_by_line_without_token(text: str, problem: str) -> None:
    with pytest.raises(ServeError, match=problem) as error:
        parse_token_file(text)
    assert "secret" not in str(error.value)
