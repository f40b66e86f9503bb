"""The cost of holding a lease: memory, and the CPU time of its heartbeats.

    python benchmarks/leases.py [--leases N …] [--seconds N] [--only NAME …]

A program claims all items and holds them with leases of 60 s, renewed every 20 s. It is measured
once it holds them. Memory is the process's own, less that of a process with a single lease, divided
by the number of leases. `bare` has one task per item that sleeps and sends heartbeats, and checks
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

import aiohttp
import orjson
import uvloop
from benchmark_runs import (
    BenchmarkRun,
    ControlPlaneAddress,
    ProgramMeter,
    ResourceUsageInPeriod,
    describe_cores_and_versions,
    enqueue_items,
    format_table,
    serve_control_plane,
    start_benchmark_run,
)
from compared_programs import BLOCK_MS, LEASE_SECONDS, BenchmarkEntry, parse_selected_programs

from workpool import Session, Supervisor, handler

RENEW_SECONDS = 20
"""Send heartbeats at the pool's rate and, as the pool does, spread over time."""
LEASES = (100, 1000, 10_000)


async def hold_leases_with_bare_aiohttp_loop(
    plane: ControlPlaneAddress, meter: ProgramMeter
) -> None:
    """Hold leases in a loop written by hand with aiohttp, with one task for each lease."""
    headers = {"Authorization": f"Bearer {plane.token}", "Worker-ID": f"bare-{os.getpid()}"}
    async with aiohttp.ClientSession(headers=headers) as session, asyncio.TaskGroup() as group:

        async def send_request(method: str, path: str) -> Any:
            url = f"{plane.base_url}/environments/{plane.environment_id}/work/{path}"
            async with session.request(method, url) as response:
                response.raise_for_status()
                return orjson.loads(await response.read())

        async def renew_lease_repeatedly(work_id: str) -> None:
            expected = "NO_HEARTBEAT"
            while True:
                query = f"expected_last_heartbeat={expected}&desired_ttl_seconds={LEASE_SECONDS}"
                try:
                    beat = await send_request("POST", f"{work_id}/heartbeat?{query}")
                except aiohttp.ClientResponseError:
                    meter.lost += 1
                    return
                if expected == "NO_HEARTBEAT":
                    meter.record_item_stop()
                expected = beat["last_heartbeat"]
                await asyncio.sleep(RENEW_SECONDS)

        while True:
            item = await send_request("GET", f"poll?block_ms={BLOCK_MS}")
            if item is not None:
                await send_request("POST", f"{item['id']}/ack")
                group.create_task(renew_lease_repeatedly(item["id"]))


async def hold_leases_with_pool(plane: ControlPlaneAddress, meter: ProgramMeter) -> None:
    """Hold leases in a pool. The pool has a slot for each lease, and its handlers only wait."""

    @handler
    async def wait_until_interrupted(session: Session) -> None:
        meter.record_item_stop()
        try:
            await session.interrupted()
        except asyncio.CancelledError:
            meter.lost += 1
            raise

    settings = plane.client_settings(
        concurrency=meter.warm_up + 1, lease_ttl=LEASE_SECONDS, block_ms=BLOCK_MS, drain_timeout=0
    )
    async with Supervisor(settings, plugins=[wait_until_interrupted]) as supervisor:
        await supervisor.wait()


ENTRIES = (
    BenchmarkEntry("bare", hold_leases_with_bare_aiohttp_loop, "aiohttp"),
    BenchmarkEntry("workpool", hold_leases_with_pool, "workpool"),
)


def measure_held_leases(
    entry: BenchmarkEntry, leases: int, seconds: float, settle: float
) -> ResourceUsageInPeriod:
    """Measure a program while it holds the leases, with a control plane of its own."""
    with serve_control_plane() as plane:
        uvloop.run(enqueue_items(plane, leases))
        run = BenchmarkRun(entry.run, plane, 0, leases, watch=seconds, settle=settle)
        with start_benchmark_run(run) as receive:
            receive()
            watched: ResourceUsageInPeriod = receive()
    return watched


def format_report(
    found: dict[tuple[str, int], ResourceUsageInPeriod], alone: dict[str, ResourceUsageInPeriod]
) -> str:
    """Return the table of costs per lease. The costs of a single lease (`alone`) are subtracted."""
    rows = []
    for (name, leases), each in found.items():
        kib = (each.memory - alone[name].memory) / leases / 1024
        cpu = each.cpu_percent - alone[name].cpu_percent
        numbers = (
            f"{kib:.1f}",
            f"{each.requests_per_second:.1f}",
            f"{cpu:.2f}",
            f"{1000 * cpu / leases:.3f}",
        )
        rows.append([name, str(leases), *numbers, str(each.lost)])
    head = ("program", "leases", "KiB each", "requests/s", "CPU % of a core", "per 1,000")
    return format_table((*head, "lost"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and CPU of a held lease.")
    parser.add_argument("--leases", type=int, nargs="+", default=LEASES)
    parser.add_argument("--seconds", type=float, default=40, help="how long each is watched")
    parser.add_argument("--settle", type=float, default=5, help="from the last claim until then")
    options, entries = parse_selected_programs(parser, entries=ENTRIES)
    alone: dict[str, ResourceUsageInPeriod] = {}
    found: dict[tuple[str, int], ResourceUsageInPeriod] = {}
    for entry in entries:
        alone[entry.name] = measure_held_leases(entry, 1, options.seconds, options.settle)
        for leases in options.leases:
            found[entry.name, leases] = measure_held_leases(
                entry, leases, options.seconds, options.settle
            )
    print(format_report(found, alone))
    print(f"\n{options.seconds:g} s each. {describe_cores_and_versions()}")


if __name__ == "__main__":
    main()
