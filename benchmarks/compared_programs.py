"""The programs that benchmarks compare: the pool, a loop with the same requests, other SDKs.

All programs run no-op items, eight at a time, with the longest poll that is allowed.
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

    from benchmark_runs import ComparedProgram, ControlPlaneAddress, ProgramMeter

    from workpool import Settings, WorkItem

CONCURRENCY = 8
BLOCK_MS = 999
LEASE_SECONDS = 60


@dataclass(frozen=True)
class BenchmarkEntry:
    """A program to be compared with others in a benchmark, and the package that it needs.

    Attributes:
        package: The package that must be installed (`pip install -e '.[bench]'`).
        divisor: The number of items is divided by it, so that slow programs finish in time.
    """

    name: str
    run: ComparedProgram
    package: str
    divisor: int = 1

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


async def run_bare_aiohttp_loop(plane: ControlPlaneAddress, meter: ProgramMeter) -> None:
    """Run items in a loop written by hand with aiohttp, as the lower bound of the cost."""
    headers = {"Authorization": f"Bearer {plane.token}", "Worker-ID": f"bare-{os.getpid()}"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def send_request(method: str, path: str, body: bytes | None = None) -> Any:
            url = f"{plane.base_url}/environments/{plane.environment_id}/work/{path}"
            async with session.request(method, url, data=body) as response:
                response.raise_for_status()
                return orjson.loads(await response.read())

        async def run_items_until_cancelled() -> None:
            while True:
                item = await send_request(
                    "GET", f"poll?block_ms={BLOCK_MS}&reclaim_older_than_ms=5000"
                )
                if item is None:
                    continue
                meter.record_item_claim()
                work_id = item["id"]
                await send_request("POST", f"{work_id}/ack")
                first = f"expected_last_heartbeat=NO_HEARTBEAT&desired_ttl_seconds={LEASE_SECONDS}"
                await send_request("POST", f"{work_id}/heartbeat?{first}")
                meter.record_handler_start(item["metadata"])
                await send_request("POST", f"{work_id}/stop", b'{"force":true}')
                meter.record_item_stop()

        await _run_concurrent_loops(run_items_until_cancelled)


async def run_pool(
    plane: ControlPlaneAddress,
    meter: ProgramMeter,
    *,
    supervisor: type[Supervisor] = Supervisor,
    plugins: Sequence[object] = (),
    **settings: Any,
) -> None:
    """Run items in a pool with these plugins. `settings` override the benchmarks' defaults."""

    class MeteredClient(WorkClient):
        """A client that also reports claims and stops to the meter."""

        async def poll(self, *args: Any, **named: Any) -> WorkItem | None:
            item = await super().poll(*args, **named)
            if item is not None:
                meter.record_item_claim()
            return item

        async def stop(self, *args: Any, **named: Any) -> WorkItem | None:
            item = await super().stop(*args, **named)
            meter.record_item_stop()
            return item

    def connect_client_with_meter(settings: Settings) -> WorkClient:
        return MeteredClient(settings)

    @handler
    async def do_no_work(session: Session) -> None:
        meter.record_handler_start(session.item.metadata)

    usual = {
        "concurrency": CONCURRENCY,
        "block_ms": BLOCK_MS,
        "lease_ttl": LEASE_SECONDS,
        "drain_timeout": 0,
    }
    pool = supervisor(
        plane.client_settings(**usual | settings),
        plugins=[do_no_work, *plugins],
        connect=connect_client_with_meter,
    )
    async with pool:
        await pool.wait()


async def run_workpool_client_loop(plane: ControlPlaneAddress, meter: ProgramMeter) -> None:
    """Run items as `run_bare_aiohttp_loop` does, but with `WorkClient`, which validates answers."""
    async with WorkClient(plane.client_settings(concurrency=CONCURRENCY)) as work:

        async def run_items_until_cancelled() -> None:
            while True:
                item = await work.poll(BLOCK_MS, 5000)
                if item is None:
                    continue
                meter.record_item_claim()
                await work.ack(item.id)
                await work.heartbeat(item.id, ttl=LEASE_SECONDS)
                meter.record_handler_start(item.metadata)
                await work.stop(item.id, force=True)
                meter.record_item_stop()

        await _run_concurrent_loops(run_items_until_cancelled)


async def run_qca_sdk(plane: ControlPlaneAddress, meter: ProgramMeter) -> None:
    """Run items as `run_bare_aiohttp_loop` does, but with `qca`, the SDK of the vendor."""
    client = importlib.import_module("qca").AsyncManaged(pat=plane.token, base_url=plane.base_url)
    work, environment = client.environments.work, {"environment_id": plane.environment_id}

    async def run_items_until_cancelled() -> None:
        while True:
            item = await work.poll(**environment, block_ms=BLOCK_MS, worker_id=f"qca-{os.getpid()}")
            if item is None:
                continue
            meter.record_item_claim()
            await work.ack(
                item.id, **environment, extra_headers={"Worker-ID": f"qca-{os.getpid()}"}
            )
            await work.heartbeat(
                item.id,
                **environment,
                expected_last_heartbeat="NO_HEARTBEAT",
                desired_ttl_seconds=LEASE_SECONDS,
            )
            meter.record_handler_start(item.metadata)
            await work.stop(item.id, **environment, force=True)
            meter.record_item_stop()

    async with client:
        await _run_concurrent_loops(run_items_until_cancelled)


async def run_anthropic_sdk(plane: ControlPlaneAddress, meter: ProgramMeter) -> None:
    """Run items with the work poller of the SDK `anthropic`: three requests each, no heartbeat."""
    client = importlib.import_module("anthropic").AsyncAnthropic(
        auth_token=plane.token, base_url=plane.anthropic_base_url.removesuffix("/v1")
    )
    work = client.beta.environments.work

    async def run_items_until_cancelled() -> None:
        poller = work.poller(
            environment_id=plane.environment_id, environment_key=plane.token, auto_stop=False
        )
        async for item in poller:
            meter.record_item_claim()
            meter.record_handler_start(item.metadata)
            await work.stop(item.id, environment_id=plane.environment_id, force=True)
            meter.record_item_stop()

    async with client:
        await _run_concurrent_loops(run_items_until_cancelled)


async def _run_concurrent_loops(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(loop(), name="loop")


ENTRIES = (
    BenchmarkEntry("bare", run_bare_aiohttp_loop, "aiohttp"),
    BenchmarkEntry("workpool", run_pool, "workpool"),
    BenchmarkEntry("qca-sdk", run_qca_sdk, "qca", 5),
    BenchmarkEntry("anthropic", run_anthropic_sdk, "anthropic", 5),
)
"""The first program is the base of the ratios."""


def parse_selected_programs(
    parser: argparse.ArgumentParser, *default: str, entries: Sequence[BenchmarkEntry] = ENTRIES
) -> tuple[argparse.Namespace, list[BenchmarkEntry]]:
    """Parse the command line. Return the options and the selected programs that are installed."""
    names = [entry.name for entry in entries]
    parser.add_argument("--only", nargs="+", choices=names, default=default or names)
    options = parser.parse_args()
    return options, [
        entry for entry in entries if entry.name in options.only and entry.is_installed
    ]
