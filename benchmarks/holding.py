"""One process that holds many sessions with their leases, or with their event streams open.

Another process measures it, together with its control plane and the database.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from contenders import BLOCK_MS, LEASE_SECONDS
from fleet import Team, Use, own_kib

from workpool import Session, Supervisor, WorkClient, handler
from workpool.wire.protocol import ENQUEUE_COUNT_MAX

if TYPE_CHECKING:
    from arena import Contender, Meter, Plane
    from fleet import System

SCRIPT = [{"name": "wait", "input": {}, "custom": True}]
"""The agent of each session uses one tool, whose result never comes."""
_ESTABLISHED = "01"


@dataclass(frozen=True)
class Held:
    """The cost of `sessions` held sessions; memory is each process's own, in KiB."""

    sessions: int
    use: Use
    worker_kib: int
    server_kib: int
    connections: int
    running: int

    def percent(self, seconds: float) -> float:
        """Return CPU seconds of the period in percent of one core."""
        return 100 * seconds / self.use.wall


def holder(sessions: int, *, streams: bool) -> Contender:
    """Return a contender that holds this number of sessions."""
    return partial(_hold_sessions, sessions=sessions, streams=streams)


async def _hold_sessions(plane: Plane, meter: Meter, *, sessions: int, streams: bool) -> None:
    @handler
    async def wait(session: Session) -> None:
        if not streams:
            meter.stopped()
            await session.interrupted()
            return
        async with session.events.stream() as stream:
            meter.stopped()
            async for _ in stream:
                pass

    settings = plane.settings(
        concurrency=sessions, lease_ttl=LEASE_SECONDS, block_ms=BLOCK_MS, drain_timeout=0
    )
    async with Supervisor(settings, plugins=[wait]) as supervisor:
        await supervisor.wait()


def watch(system: System, sessions: int, *, seconds: float, settle: float, streams: bool) -> Held:
    """Let one worker of the system hold this number of sessions, and return the cost."""
    assert system.plane is not None
    with Team(system, 1) as team:
        asyncio.run(_enqueue_sessions(system.plane, sessions, streams=streams))
        team.wait(sessions)
        time.sleep(settle)
        begin = team.use()
        time.sleep(seconds)
        use = team.use().since(begin)
        [worker], [server] = team.pids, system.servers
        return Held(
            sessions,
            use,
            own_kib(worker),
            own_kib(server),
            _count_connections(worker),
            asyncio.run(_count_leases(system.plane)),
        )


async def _enqueue_sessions(plane: Plane, count: int, *, streams: bool) -> None:
    async with WorkClient(plane.settings()) as client:
        for start in range(0, count, ENQUEUE_COUNT_MAX):
            number = min(ENQUEUE_COUNT_MAX, count - start)
            await client.enqueue(number, script=SCRIPT if streams else None)


async def _count_leases(plane: Plane) -> int:
    """Return the number of leases that the control plane counts."""
    async with WorkClient(plane.settings()) as client:
        return (await client.stats()).running or 0


def _count_connections(pid: int) -> int:
    """Return the number of the process's established TCP connections over IPv4."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text("ascii").splitlines()[1:]
    columns = (line.split() for line in lines)
    established = {each[9] for each in columns if each[3] == _ESTABLISHED}
    targets = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(target.removeprefix("socket:[").rstrip("]") in established for target in targets)
