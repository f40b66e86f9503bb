"""Reports the start, the status and the end of the pool to systemd.

A service of `Type=notify` gets the address of a datagram socket in `NOTIFY_SOCKET`; without that
variable nothing here runs. Reports are sent from the thread of the lease renewer, so that the
watchdog notices a process in which no thread runs anymore: nothing inside the process can.
See workpool/docs/operating.md, "systemd".
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Final

from workpool.logs import readable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from workpool.pool.status import Status

log = logging.getLogger("workpool")

REPORT_SECONDS: Final = 1.0
"""Longest time between two reports, in seconds."""
EXTEND_SECONDS: Final = 45.0
"""Seconds until the end of the process after its last report; the pool closes within 30 s."""
STATUS_CHARACTERS: Final = 500
_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class ServiceReporter:
    """Reports the status of one pool to the service manager. Created before the pool starts.

    Removes its variables from the environment, so that child processes do not report as the worker.

    Attributes:
        wanted: Whether a service manager waits for reports.
    """

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status
        address, microseconds, pid = (os.environ.pop(name, "") for name in _VARIABLES)
        self.wanted = bool(address)
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        ours = not pid or pid == str(os.getpid())
        self._watchdog = int(microseconds) / 1_000_000 if ours and microseconds else None
        self._sent: frozenset[str] = frozenset()
        self._failed = False

    @asynccontextmanager
    async def reporting_to_service_manager(self) -> AsyncIterator[None]:
        """A context in which the pool is reported as ready and alive; its end reports the stop.

        Entered on the loop of the lease renewer, once plugins and exporter are open.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # If the service manager does not read, a blocking send would stop the renewal of leases.
        self._socket.setblocking(False)
        with closing(self._socket):
            async with asyncio.TaskGroup() as group:
                repeating = group.create_task(self._send_reports_periodically(), name="systemd")
                try:
                    yield
                finally:
                    repeating.cancel()
                    self._send_status_report(ending=True)

    async def _send_reports_periodically(self) -> None:
        # Send three reports in each watchdog interval, so that systemd does not kill the process
        # when two of them are late.
        interval = min(REPORT_SECONDS, (self._watchdog or 3 * REPORT_SECONDS) / 3)
        while True:
            self._send_status_report()
            await asyncio.sleep(interval)

    def _send_status_report(self, *, ending: bool = False) -> None:
        status = self._status()
        facts = {"READY=1", f"STATUS={_status_text(status)}"}
        repeated = [] if self._watchdog is None else ["WATCHDOG=1"]
        if status.draining or ending:
            facts.add("STOPPING=1")
            # Ask for more time: `drain_timeout` may be longer than systemd's limit for a stop.
            repeated.append(f"EXTEND_TIMEOUT_USEC={EXTEND_SECONDS * 1_000_000:.0f}")
        news = sorted(facts - self._sent)
        if self._send_datagram("\n".join(news + repeated)):
            self._sent = frozenset(facts)

    def _send_datagram(self, lines: str) -> bool:
        """Send a datagram and return whether it was sent; only the first error is logged."""
        if not lines:
            return True
        try:
            self._socket.sendto(lines.encode(), self._address)
        except OSError as error:
            if not self._failed:
                log.warning(
                    "service manager was not notified: %s",
                    error.strerror,
                    extra={"error": error.strerror},
                )
            self._failed = True
            return False
        return True


def _status_text(status: Status) -> str:
    state = "ready" if status.ready else "not ready: " + "; ".join(status.reasons)
    sessions = f"{status.running} running, {status.waiting} waiting"
    return readable(f"{state}; sessions: {sessions}", STATUS_CHARACTERS)
