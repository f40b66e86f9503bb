"""The cost of a held lease: memory, and CPU with its heartbeats.

    python benchmarks/leases.py [--leases N …] [--seconds N] [--only NAME …]

A contender claims all items and holds them with leases of 60 s, renewed every 20 s. It is measured
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
from arena import Contest, Meter, Plane, Watched, compete, control_plane, enqueue, table, versions
from contenders import BLOCK_MS, LEASE_SECONDS, Entry, parse_contenders

from workpool import Session, Supervisor, handler

RENEW_SECONDS = 20
"""Send heartbeats at the pool's rate and, as the pool does, spread over time."""
LEASES = (100, 1000, 10_000)


async def bare(plane: Plane, meter: Meter) -> None:
    """A loop written by hand with aiohttp, and a task for each lease."""
    headers = {"Authorization": f"Bearer {plane.token}", "Worker-ID": f"bare-{os.getpid()}"}
    async with aiohttp.ClientSession(headers=headers) as session, asyncio.TaskGroup() as group:

        async def call(method: str, path: str) -> Any:
            url = f"{plane.base_url}/environments/{plane.environment_id}/work/{path}"
            async with session.request(method, url) as response:
                response.raise_for_status()
                return orjson.loads(await response.read())

        async def hold(work_id: str) -> None:
            expected = "NO_HEARTBEAT"
            while True:
                query = f"expected_last_heartbeat={expected}&desired_ttl_seconds={LEASE_SECONDS}"
                try:
                    beat = await call("POST", f"{work_id}/heartbeat?{query}")
                except aiohttp.ClientResponseError:
                    meter.lost += 1
                    return
                if expected == "NO_HEARTBEAT":
                    meter.stopped()
                expected = beat["last_heartbeat"]
                await asyncio.sleep(RENEW_SECONDS)

        while True:
            item = await call("GET", f"poll?block_ms={BLOCK_MS}")
            if item is not None:
                await call("POST", f"{item['id']}/ack")
                group.create_task(hold(item["id"]))


async def workpool(plane: Plane, meter: Meter) -> None:
    """The pool, with as many slots as there are leases, and handlers that wait."""

    @handler
    async def wait(session: Session) -> None:
        meter.stopped()
        try:
            await session.interrupted()
        except asyncio.CancelledError:
            meter.lost += 1
            raise

    settings = plane.settings(
        concurrency=meter.warm_up + 1, lease_ttl=LEASE_SECONDS, block_ms=BLOCK_MS, drain_timeout=0
    )
    async with Supervisor(settings, plugins=[wait]) as supervisor:
        await supervisor.wait()


ENTRIES = (Entry("bare", bare, "aiohttp"), Entry("workpool", workpool, "workpool"))


def measure(entry: Entry, leases: int, seconds: float, settle: float) -> Watched:
    """Measure a contender while it holds the leases, on a control plane of its own."""
    with control_plane() as plane:
        uvloop.run(enqueue(plane, leases))
        contest = Contest(entry.run, plane, 0, leases, watch=seconds, settle=settle)
        with compete(contest) as receive:
            receive()
            watched: Watched = receive()
    return watched


def report(found: dict[tuple[str, int], Watched], alone: dict[str, Watched]) -> str:
    """Return the table; `alone` has the measurement of each contender with a single lease."""
    rows = []
    for (name, leases), each in found.items():
        kib = (each.memory - alone[name].memory) / leases / 1024
        cpu = each.cpu_percent - alone[name].cpu_percent
        numbers = (f"{kib:.1f}", f"{each.rate:.1f}", f"{cpu:.2f}", f"{1000 * cpu / leases:.3f}")
        rows.append([name, str(leases), *numbers, str(each.lost)])
    head = ("contender", "leases", "KiB each", "requests/s", "CPU % of a core", "per 1,000")
    return table((*head, "lost"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and CPU of a held lease.")
    parser.add_argument("--leases", type=int, nargs="+", default=LEASES)
    parser.add_argument("--seconds", type=float, default=40, help="how long each is watched")
    parser.add_argument("--settle", type=float, default=5, help="from the last claim until then")
    options, entries = parse_contenders(parser, entries=ENTRIES)
    alone: dict[str, Watched] = {}
    found: dict[tuple[str, int], Watched] = {}
    for entry in entries:
        alone[entry.name] = measure(entry, 1, options.seconds, options.settle)
        for leases in options.leases:
            found[entry.name, leases] = measure(entry, leases, options.seconds, options.settle)
    print(report(found, alone))
    print(f"\n{options.seconds:g} s each. {versions()}")


if __name__ == "__main__":
    main()
