"""Tests of the engine client, with an engine that refuses to remove a container."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from workpool_container.engine_client import EngineClient, EngineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


@asynccontextmanager
async def engine_with_removal_handler(
    directory: Path, answer_removal_request: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> AsyncIterator[EngineClient]:
    """Yield the client of an engine that answers each removal with `answer_removal_request`."""

    async def answer_version_request(_: web.Request) -> web.Response:
        return web.json_response({"ApiVersion": "1.41"})

    app = web.Application()
    app.router.add_get("/version", answer_version_request)
    app.router.add_delete("/{path:.*/containers/one}", answer_removal_request)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(directory / "engine.sock")).start()
        async with EngineClient(str(directory / "engine.sock")) as engine:
            yield engine
    finally:
        await runner.cleanup()


async def test_third_removal_of_container_succeeds_if_engine_refuses_two(
    tmp_path: Path,
) -> None:
    problem = {"message": "cannot remove container: container state improper: stopped"}
    responses = [web.json_response(problem, status=500), web.json_response(problem, status=500)]

    async def answer_removal_request(_: web.Request) -> web.Response:
        return responses.pop() if responses else web.Response(status=204)

    async with engine_with_removal_handler(tmp_path, answer_removal_request) as engine:
        await engine.remove_container("one")
    assert not responses


async def test_container_removal_that_engine_always_refuses_raises_message_of_engine(
    tmp_path: Path,
) -> None:
    async def answer_removal_request(_: web.Request) -> web.Response:
        return web.json_response({"message": "no space left on device"}, status=500)

    async with engine_with_removal_handler(tmp_path, answer_removal_request) as engine:
        with pytest.raises(EngineError, match="no space left on device"):
            await engine.remove_container("one")
