"""The cost of a worker process with many waiting sessions, with or without an event stream each.

Another process measures the worker, the control plane and the database.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark_runs import private_memory_kib
from compared_programs import BLOCK_MS, LEASE_SECONDS
from system_measurements import ResourceUse, WorkerProcesses

from workpool import Session, Supervisor, WorkClient, handler
from workpool.wire.protocol import ENQUEUE_COUNT_MAX

if TYPE_CHECKING:
    from benchmark_runs import ComparedProgram, ControlPlaneAddress, ProgramMeter
    from system_measurements import MeasuredSystem

SCRIPT = [{"name": "wait", "input": {}, "custom": True}]
"""The agent of each session uses one tool, whose result never comes."""
_ESTABLISHED = "01"


@dataclass(frozen=True)
class WaitingSessionsCost:
    """The cost of many waiting sessions in one worker. Shared memory is not counted."""

    sessions: int
    use: ResourceUse
    worker_kib: int
    server_kib: int
    connections: int
    running: int

    def convert_to_percent_of_core(self, seconds: float) -> float:
        """Convert CPU seconds used in the measured period to percent of one core."""
        return 100 * seconds / self.use.wall


def make_program_with_waiting_sessions(sessions: int, *, streams: bool) -> ComparedProgram:
    """Return a program that claims `sessions` sessions, whose handlers wait without end."""
    return partial(_run_waiting_sessions, sessions=sessions, streams=streams)


async def _run_waiting_sessions(
    plane: ControlPlaneAddress, meter: ProgramMeter, *, sessions: int, streams: bool
) -> None:
    @handler
    async def wait_until_interrupted(session: Session) -> None:
        if not streams:
            meter.record_item_stop()
            await session.interrupted()
            return
        async with session.events.stream() as stream:
            meter.record_item_stop()
            async for _ in stream:
                pass

    settings = plane.client_settings(
        concurrency=sessions, lease_ttl=LEASE_SECONDS, block_ms=BLOCK_MS, drain_timeout=0
    )
    async with Supervisor(settings, plugins=[wait_until_interrupted]) as supervisor:
        await supervisor.wait()


def measure_waiting_sessions(
    system: MeasuredSystem, sessions: int, *, seconds: float, settle: float, streams: bool
) -> WaitingSessionsCost:
    """Let one worker run a number of sessions that wait, and return their cost."""
    assert system.plane is not None
    with WorkerProcesses(system, 1) as team:
        asyncio.run(_enqueue_items_for_sessions(system.plane, sessions, streams=streams))
        team.wait_for_stopped_items(sessions)
        time.sleep(settle)
        begin = team.read_usage()
        time.sleep(seconds)
        use = team.read_usage().subtract_earlier_use(begin)
        [worker], [server] = team.pids, system.servers
        return WaitingSessionsCost(
            sessions,
            use,
            private_memory_kib(worker),
            private_memory_kib(server),
            _count_connections(worker),
            asyncio.run(_count_leases(system.plane)),
        )


async def _enqueue_items_for_sessions(
    plane: ControlPlaneAddress, count: int, *, streams: bool
) -> None:
    async with WorkClient(plane.client_settings()) as client:
        for start in range(0, count, ENQUEUE_COUNT_MAX):
            number = min(ENQUEUE_COUNT_MAX, count - start)
            await client.enqueue(number, script=SCRIPT if streams else None)


async def _count_leases(plane: ControlPlaneAddress) -> int:
    """Return the number of running items according to the control plane."""
    async with WorkClient(plane.client_settings()) as client:
        return (await client.stats()).running or 0


def _count_connections(pid: int) -> int:
    """Return the number of established TCP connections over IPv4 of the process `pid`."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text("ascii").splitlines()[1:]
    columns = (line.split() for line in lines)
    established = {each[9] for each in columns if each[3] == _ESTABLISHED}
    targets = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(target.removeprefix("socket:[").rstrip("]") in established for target in targets)
