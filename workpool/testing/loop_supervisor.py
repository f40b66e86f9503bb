"""A supervisor whose lease renewer has no thread of its own, which virtual time would not allow."""

from __future__ import annotations

import asyncio
from typing import Final

from workpool.pool.lease_renewer import LeaseRenewer
from workpool.pool.supervisor import Supervisor
from workpool.testing.virtual_time import VirtualLoop

CHECK_SECONDS: Final = 5.0
"""Longest time between two checks of all leases: longer than on a thread, as each costs time."""


class ThreadlessLeaseRenewer(LeaseRenewer):
    """A lease renewer on the handlers' loop, without a thread of its own."""

    check_seconds = CHECK_SECONDS

    def _start_thread(self) -> asyncio.Future[None]:
        self._loop = self._handlers_loop
        return self._loop.create_task(self._renew_until_stopped(), name="lease-renewer")

    def _join_thread(self) -> None:
        """Do nothing, since the lease renewer has no thread."""


class ThreadlessSupervisor(Supervisor):
    """A supervisor without a renewer thread, for a pool in virtual time.

    Its lease renewer runs on the handlers' loop, and its lease clock is the clock of that loop.
    """

    _renewer = ThreadlessLeaseRenewer

    async def _open_and_run_pool(self) -> None:
        self._use_virtual_clocks()
        await super()._open_and_run_pool()

    def _use_virtual_clocks(self) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(loop, VirtualLoop):
            self._clock, self._wall = loop.machine_time, loop.wall_time
