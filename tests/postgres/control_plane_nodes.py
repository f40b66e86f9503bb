"""Nodes of the control plane on one database, and a client that never repeats a request.

`python -m tests.postgres.control_plane_nodes URL [CALL]` is a node in its own process, for
tests that kill it. It prints its base URL. With CALL (`ack`, `poll`, …) it carries out each such
request, prints `held`, and does not answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from aiohttp import web

from tests.postgres.cluster import extend_database_limits
from workpool.conformance.api import WorkCallClient
from workpool.server import ControlPlane, PostgresStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    import aiohttp

SECONDS = 60.0
"""Maximum time of every wait; a loaded machine may need most of it for the start of a process."""
ENV, TOKEN = "env_0199aaaaaaaa70008000000000000001", "token-of-everything"


class NodeAnswer(NamedTuple):
    """The status, the JSON body and the headers of a node's answer."""

    status: int
    body: Any
    headers: Mapping[str, str]


class NodeClient(WorkCallClient[NodeAnswer]):
    """A client that calls one node in the name of one worker."""

    environment = ENV

    def __init__(self, http: aiohttp.ClientSession, base_url: str, worker: str = "w") -> None:
        self.base_url = base_url
        self._http = http
        self._worker = worker

    async def __call__(self, method: str, url: str, **options: Any) -> NodeAnswer:
        headers = {"Authorization": f"Bearer {TOKEN}", "Worker-ID": self._worker}
        async with self._http.request(method, url, headers=headers, **options) as response:
            content = await response.read()
            body = json.loads(content) if content else None
            return NodeAnswer(response.status, body, response.headers)

    async def enqueue(self, count: int = 1) -> NodeAnswer:
        """Create `count` items."""
        return await self("POST", self.work_url(), json={"count": count})


def make_node(url: str, middlewares: tuple[Any, ...] = ()) -> ControlPlane:
    """Return a control plane, not yet started, that records its history in a database."""
    return ControlPlane(
        environments=(ENV,),
        tokens={TOKEN: None},
        store=PostgresStore(url, history=True),
        middlewares=middlewares,
    )


@asynccontextmanager
async def start_node_process(url: str, *call: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a node in a process of its own; its first line of output is its base URL."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.postgres.control_plane_nodes", url, *call),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def read_line(process: asyncio.subprocess.Process) -> str:
    """Return the next line of a node's output."""
    assert process.stdout is not None
    async with asyncio.timeout(SECONDS):
        return (await process.stdout.readline()).decode().strip()


async def _run_node_until_killed(url: str, call: str) -> None:
    @web.middleware
    async def withhold_answer(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        response = await handler(request)
        if call and request.path.endswith("/" + call):
            print("held", flush=True)  # noqa: T201 - the parent process waits for it
            await asyncio.Event().wait()
        return response

    async with make_node(url, (withhold_answer,)) as plane:
        print(plane.base_url, flush=True)  # noqa: T201 - the parent process waits for it
        await asyncio.Event().wait()


if __name__ == "__main__":
    extend_database_limits(pytest.MonkeyPatch())
    asyncio.run(_run_node_until_killed(sys.argv[1], "".join(sys.argv[2:])))
