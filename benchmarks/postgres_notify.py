"""The cost of NOTIFY: commits per second of 1, 2 and 4 nodes, with and without notifications.

    python benchmarks/postgres_notify.py URL [--seconds N] [--connections N]

Each node is a process whose connections update rows of their own, one commit each. `none`: no
notifications. `hub`: the node's `NotificationHub` sends one for all updates since the last one. `in
the transaction`: each update also calls `pg_notify`. One more process listens. The
database should sync commits to its disk, as `fsync = on` does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import uvloop

from workpool.server.postgres.notifications import CHANNEL, NotificationHub, make_work_topic

if TYPE_CHECKING:
    from collections.abc import Callable

NONE, HUB, INSIDE = "none", "hub", "in the transaction"
UPDATE: Final = "UPDATE counted SET value = value + 1 WHERE id = $1"
UPDATE_AND_NOTIFY: Final = f"""
WITH changed AS (UPDATE counted SET value = value + 1 WHERE id = $1 RETURNING id)
SELECT pg_notify('{CHANNEL}', 'node' || chr(10) || '1 work:env_' || id) FROM changed"""  # noqa: S608 - our own words


async def run_committing_process(
    url: str, kind: str, first: int, connections: int, seconds: float
) -> None:
    """Commit updates for some seconds; print the number of commits and the CPU seconds."""
    hub = NotificationHub(url)
    opened = [await asyncpg.connect(url) for _ in range(connections)]
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(hub.run()) if kind == HUB else None
        if sending is not None:
            await hub.listening.wait()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        start, cpu = time.perf_counter(), time.process_time()

        async def commit_until_time_is_over(place: int, announce: Callable[[str], Any]) -> int:
            row, sql = first + place, UPDATE_AND_NOTIFY if kind == INSIDE else UPDATE
            commits = 0
            while time.perf_counter() < start + seconds:
                await opened[place].execute(sql, row)
                commits += 1
                announce(make_work_topic(f"env_{row}"))
            return commits

        def skip_change_notification(_: str) -> None:
            pass

        async with asyncio.TaskGroup() as committing:
            announce = hub.announce_topic_changes if kind == HUB else skip_change_notification
            tasks = [
                committing.create_task(commit_until_time_is_over(n, announce))
                for n in range(connections)
            ]
        commits = sum(task.result() for task in tasks)
        print(json.dumps([commits, time.process_time() - cpu]), flush=True)
        if sending is not None:
            sending.cancel()


def measure_commit_rate(
    url: str, kind: str, nodes: int, connections: int, seconds: float
) -> tuple[float, ...]:
    """Return the commits per second of all nodes together, and the CPU µs per commit."""
    words = [sys.executable, __file__, url, "--node", kind, "--seconds", str(seconds)]
    processes = [
        subprocess.Popen(  # noqa: S603 - our own words
            [*words, "--connections", str(connections), "--first", str(number * connections)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(nodes)
    ]
    results = []
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None
        results.append(json.loads(process.stdout.readline()))
        process.communicate()
    commits, cpu = (sum(column) for column in zip(*results, strict=True))
    return commits / seconds, cpu / commits * 1e6


async def create_counter_table(url: str, rows: int) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE IF NOT EXISTS counted (id int PRIMARY KEY, value int)")
    await connection.execute("TRUNCATE counted")
    await connection.execute("INSERT INTO counted SELECT n, 0 FROM generate_series(0, $1) n", rows)
    await connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--node", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.node:
        uvloop.run(
            run_committing_process(
                given.url, given.node, given.first, given.connections, given.seconds
            )
        )
        return
    asyncio.run(create_counter_table(given.url, 4 * given.connections))
    print("| nodes | notifications | commits/s | CPU of the nodes µs/commit |\n| - | - | -: | -: |")
    for nodes in (1, 2, 4):
        found: dict[str, list[tuple[float, ...]]] = {NONE: [], HUB: [], INSIDE: []}
        for _ in range(given.rounds):
            for kind, results in found.items():
                results.append(
                    measure_commit_rate(given.url, kind, nodes, given.connections, given.seconds)
                )
        for kind, results in found.items():
            rate, cpu = (statistics.median(column) for column in zip(*results, strict=True))
            print(f"| {nodes} | {kind} | {rate:.0f} | {cpu:.0f} |", flush=True)


if __name__ == "__main__":
    main()
