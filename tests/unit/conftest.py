"""A lease on virtual time, against the control plane's own operations."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from workpool import Settings
from workpool.events import HeartbeatFinished
from workpool.pool.lease import Lease
from workpool.server import Operations
from workpool.testing.local import LocalClient, Script
from workpool.testing.virtual import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import Event
    from workpool.server import Record
    from workpool.testing.local import Trouble

ENVIRONMENT = "env_00000000000070008000000000000001"
START = 1_772_366_400.0  # 2026-03-01T12:00:00Z


class Bench:
    """One keeper's share of the world (a `Pulse`), a control plane and another worker.

    Attributes:
        ahead: Seconds that the control plane's clock is ahead of ours.
        sent: When each call of ours was sent, and which.
        results: When each beat of ours was settled, and how.
        changes: When the handlers' loop was told, and what the fate was then.
    """

    def __init__(
        self, *, ttl: int = 60, request_timeout: float = 10.0, **troubles: list[Trouble | None]
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.clock: Callable[[], float] = loop.machine_time
        self.lease_ttl = ttl
        self.request_timeout = request_timeout
        self.renewing = True
        self.ahead = 0.0
        self.sent: list[tuple[float, str]] = []
        self.results: list[tuple[float, HeartbeatFinished]] = []
        self.changes: list[tuple[float, str]] = []
        self.script = Script(**troubles)
        self.operations = Operations(
            [ENVIRONMENT], now=lambda: START + self.clock() + self.ahead, history_limit=None
        )
        self.settings = Settings(
            environment_id=ENVIRONMENT, base_url="http://127.0.0.1:1", token=ENVIRONMENT
        )
        self.calls = LocalClient(
            self.operations, self.settings, troubles=self._note, worker_id="ours"
        )
        self.rival = LocalClient(self.operations, self.settings, worker_id="rival")

    def _note(self, op: str, work_id: str | None) -> Trouble | None:
        self.sent.append((self.clock(), op))
        return self.script(op, work_id)

    def observe(self, event: Event) -> None:
        assert isinstance(event, HeartbeatFinished)
        self.results.append((self.clock(), event))

    def tell(self, callback: Callable[[], None]) -> None:
        self.loop.call_soon(callback)

    async def claim(self) -> Lease:
        """Create an item and make it ours; its beats begin with `keep`."""
        await self.calls.__aenter__()
        await self.rival.__aenter__()
        self.operations.enqueue(ENVIRONMENT)
        return await self.take()

    async def take(self) -> Lease:
        """Make the item that is in the queue ours."""
        item = await self.calls.poll()
        assert item is not None
        acked_at = self.clock()
        item = await self.calls.ack(item.id)
        lease = Lease(item, acked_at, self, lambda: self.changes.append((self.clock(), lease.fate)))
        self.sent.clear()
        return lease

    async def steal(self, work_id: str) -> None:
        """Let the rival have an item that is back in the queue."""
        item = await self.rival.poll()
        assert item is not None
        assert item.id == work_id
        await self.rival.ack(work_id)

    @property
    def lost_at(self) -> float:
        """When the handlers' loop was told that the lease is lost."""
        return next(time for time, fate in self.changes if fate == "lost")

    async def keep(self, lease: Lease, seconds: float) -> None:
        """Keep the lease for so long, or until it is over."""
        task = self.loop.create_task(lease.keep())
        await asyncio.wait({task}, timeout=seconds)
        task.cancel()
        await asyncio.wait({task})

    def times(self, op: str) -> list[float]:
        return [time for time, name in self.sent if name == op]

    def outcomes(self) -> list[str]:
        return [event.result for _, event in self.results]

    def history(self, lease: Lease, kind: str) -> list[Record]:
        return [each for each in self.operations.history.of(lease.item.id) if each.kind == kind]


@pytest.fixture
def bench() -> type[Bench]:
    """The bench, to be set up inside virtual time."""
    return Bench
