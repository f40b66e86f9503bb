"""Answers of a container engine that the plugin's client must survive."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from workpool_container.engine import Engine, EngineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


@asynccontextmanager
async def engine_that_answers(
    folder: Path, remove: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> AsyncIterator[Engine]:
    """Yield the client of an engine whose removals are answered by `remove`."""

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"ApiVersion": "1.41"})

    app = web.Application()
    app.router.add_get("/version", version)
    app.router.add_delete("/{path:.*/containers/one}", remove)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(folder / "engine.sock")).start()
        async with Engine(str(folder / "engine.sock")) as engine:
            yield engine
    finally:
        await runner.cleanup()


async def test_removal_during_unfinished_stop_is_tried_again(tmp_path: Path) -> None:
    problem = {"message": "cannot remove container: container state improper: stopped"}
    answers = [web.json_response(problem, status=500), web.json_response(problem, status=500)]

    async def remove(_: web.Request) -> web.Response:
        return answers.pop() if answers else web.Response(status=204)

    async with engine_that_answers(tmp_path, remove) as engine:
        await engine.remove("one")
    assert not answers


async def test_removal_that_always_fails_is_error_with_engine_text(tmp_path: Path) -> None:
    async def remove(_: web.Request) -> web.Response:
        return web.json_response({"message": "no space left on device"}, status=500)

    async with engine_that_answers(tmp_path, remove) as engine:
        with pytest.raises(EngineError, match="no space left on device"):
            await engine.remove("one")
