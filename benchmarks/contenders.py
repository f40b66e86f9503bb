"""The contenders: the pool, a bare loop that makes the same calls, and clients of other projects.

All contenders run no-op items, eight at a time, with the longest poll that is allowed.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from workpool import Session, Supervisor, WorkClient, handler

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Coroutine, Sequence

    from arena import Contender, Meter, Plane

    from workpool import Settings, WorkItem

CONCURRENCY = 8
BLOCK_MS = 999
LEASE_SECONDS = 60


@dataclass(frozen=True)
class Entry:
    """A contender of the benchmarks.

    Attributes:
        package: The package that must be installed (`pip install -e '.[bench]'`).
        divisor: The number of items is divided by it, so that slow contenders finish in time.
    """

    name: str
    run: Contender
    package: str
    divisor: int = 1

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


async def bare(plane: Plane, meter: Meter) -> None:
    """A loop written by hand with aiohttp: the lower bound."""
    headers = {"Authorization": f"Bearer {plane.token}", "Worker-ID": f"bare-{os.getpid()}"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def call(method: str, path: str, body: bytes | None = None) -> Any:
            url = f"{plane.base_url}/environments/{plane.environment_id}/work/{path}"
            async with session.request(method, url, data=body) as response:
                response.raise_for_status()
                return orjson.loads(await response.read())

        async def loop() -> None:
            while True:
                item = await call("GET", f"poll?block_ms={BLOCK_MS}&reclaim_older_than_ms=5000")
                if item is None:
                    continue
                meter.claimed()
                work_id = item["id"]
                await call("POST", f"{work_id}/ack")
                first = f"expected_last_heartbeat=NO_HEARTBEAT&desired_ttl_seconds={LEASE_SECONDS}"
                await call("POST", f"{work_id}/heartbeat?{first}")
                meter.started(item["metadata"])
                await call("POST", f"{work_id}/stop", b'{"force":true}')
                meter.stopped()

        await _run_loops(loop)


async def workpool(
    plane: Plane,
    meter: Meter,
    *,
    supervisor: type[Supervisor] = Supervisor,
    plugins: Sequence[object] = (),
    **settings: Any,
) -> None:
    """The pool with its defaults and metrics, or with other settings, plugins or parts."""

    class Counted(WorkClient):
        """A client that reports claims and stops to the meter, by one more call for each."""

        async def poll(self, *args: Any, **named: Any) -> WorkItem | None:
            item = await super().poll(*args, **named)
            if item is not None:
                meter.claimed()
            return item

        async def stop(self, *args: Any, **named: Any) -> WorkItem | None:
            item = await super().stop(*args, **named)
            meter.stopped()
            return item

    def connect(settings: Settings) -> WorkClient:
        return Counted(settings)

    @handler
    async def nothing(session: Session) -> None:
        meter.started(session.item.metadata)

    usual = {
        "concurrency": CONCURRENCY,
        "block_ms": BLOCK_MS,
        "lease_ttl": LEASE_SECONDS,
        "drain_timeout": 0,
    }
    pool = supervisor(
        plane.settings(**usual | settings), plugins=[nothing, *plugins], connect=connect
    )
    async with pool:
        await pool.wait()


async def client(plane: Plane, meter: Meter) -> None:
    """`WorkClient` without the pool: the same loop as `bare`, but answers are validated."""
    async with WorkClient(plane.settings(concurrency=CONCURRENCY)) as work:

        async def loop() -> None:
            while True:
                item = await work.poll(BLOCK_MS, 5000)
                if item is None:
                    continue
                meter.claimed()
                await work.ack(item.id)
                await work.heartbeat(item.id, ttl=LEASE_SECONDS)
                meter.started(item.metadata)
                await work.stop(item.id, force=True)
                meter.stopped()

        await _run_loops(loop)


async def qca_sdk(plane: Plane, meter: Meter) -> None:
    """The same loop as `bare`, with the vendor's own SDK."""
    client = importlib.import_module("qca").AsyncManaged(pat=plane.token, base_url=plane.base_url)
    work, environment = client.environments.work, {"environment_id": plane.environment_id}

    async def loop() -> None:
        while True:
            item = await work.poll(**environment, block_ms=BLOCK_MS, worker_id=f"qca-{os.getpid()}")
            if item is None:
                continue
            meter.claimed()
            await work.ack(
                item.id, **environment, extra_headers={"Worker-ID": f"qca-{os.getpid()}"}
            )
            await work.heartbeat(
                item.id,
                **environment,
                expected_last_heartbeat="NO_HEARTBEAT",
                desired_ttl_seconds=LEASE_SECONDS,
            )
            meter.started(item.metadata)
            await work.stop(item.id, **environment, force=True)
            meter.stopped()

    async with client:
        await _run_loops(loop)


async def anthropic(plane: Plane, meter: Meter) -> None:
    """The work poller of the SDK `anthropic`: three calls, without a heartbeat."""
    client = importlib.import_module("anthropic").AsyncAnthropic(
        auth_token=plane.token, base_url=plane.anthropic_base_url.removesuffix("/v1")
    )
    work = client.beta.environments.work

    async def loop() -> None:
        poller = work.poller(
            environment_id=plane.environment_id, environment_key=plane.token, auto_stop=False
        )
        async for item in poller:
            meter.claimed()
            meter.started(item.metadata)
            await work.stop(item.id, environment_id=plane.environment_id, force=True)
            meter.stopped()

    async with client:
        await _run_loops(loop)


async def _run_loops(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(loop(), name="loop")


ENTRIES = (
    Entry("bare", bare, "aiohttp"),
    Entry("workpool", workpool, "workpool"),
    Entry("qca-sdk", qca_sdk, "qca", 5),
    Entry("anthropic", anthropic, "anthropic", 5),
)
"""The first contender is the base of the ratios."""


def parse_contenders(
    parser: argparse.ArgumentParser, *default: str, entries: Sequence[Entry] = ENTRIES
) -> tuple[argparse.Namespace, list[Entry]]:
    """Read the command line with `--only NAME …`. Return the options and the installed entries."""
    names = [entry.name for entry in entries]
    parser.add_argument("--only", nargs="+", choices=names, default=default or names)
    options = parser.parse_args()
    return options, [entry for entry in entries if entry.name in options.only and entry.installed]
