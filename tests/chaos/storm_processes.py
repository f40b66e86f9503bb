"""The processes of a chaos test: control planes and workers, with a record of their signals.

A `StormProcesses` starts them on the loopback interface and ends all of them when its block ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tests.chaos.balancer import Balancer
from tests.chaos.control_plane import ControlPlaneConfig, seconds_since_boot
from tests.reserved_port import reserve_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    Process = asyncio.subprocess.Process

HERE = Path(__file__).parent
ENVIRONMENT, TOKEN = "env_0199cccccccc70008000000000000001", "token-of-the-storm"
LEASE_SECONDS = 10
SECONDS = 60.0
"""Maximum time for the start or end of a process on a loaded machine."""
SETTINGS = {
    "TOKEN": TOKEN,
    "ENVIRONMENT_ID": ENVIRONMENT,
    "LEASE_TTL": str(LEASE_SECONDS),
    "RECLAIM_OLDER_THAN_MS": "2000",
    "REQUEST_TIMEOUT": "3",
    "STOP_GRACE": "2",
    "METRICS_LISTEN": "off",
    "STATS_INTERVAL": "0",
}
_NUMBERS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cont": signal.SIGCONT}


def boot_time_by_system_clock() -> float:
    """Return the system's clock minus `seconds_since_boot`; constant until the clock is set."""
    readings = []
    for _ in range(5):
        before = seconds_since_boot()
        now = datetime.now(UTC).timestamp()
        after = seconds_since_boot()
        readings.append((after - before, now - (before + after) / 2))
    # A busy machine may interrupt this process between two clocks: use the fastest reading.
    return min(readings)[1]


class StartError(Exception):
    """A process ended before it was ready."""


class StormProcesses:
    """The control plane processes and workers of one chaos test, with their files in one folder.

    Args:
        folder: Holds the store, the journal, the trace and the logs.
        write_rate: The own limit of writes per second of each worker; 0 = unlimited.
        store: The URL of the database of all planes; empty: a file of SQLite for the only one.
        planes: The number of the control plane's processes; several are behind a balancer.

    Attributes:
        base_url: The base URL of the control plane, the same after each restart.
        offset: The system's clock minus `seconds_since_boot`.
        workers: The running or the last process of each name.
        actions: The actions on processes, in order: `kill`, `stop`, `cont`, `exit` of a `pid`.
        broken: Errors of the processes.
    """

    def __init__(
        self, folder: Path, write_rate: float = 0.0, *, store: str = "", planes: int = 1
    ) -> None:
        self.folder = folder
        self._write_rate = write_rate
        self.workers: dict[str, Process] = {}
        self.actions: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self._store = store or str(folder / "work.db")
        self._planes: dict[int, Process] = {}
        self._logs: dict[int, Path] = {}
        self.offset = boot_time_by_system_clock()
        self._reserved = ExitStack()
        port, *self._ports = (
            self._reserved.enter_context(reserve_port()) for _ in range(planes + 1)
        )
        self._balancer = Balancer(port, self._ports) if planes > 1 else None
        self.base_url = f"http://127.0.0.1:{port if planes > 1 else self._ports[0]}/api/v1/cloud"

    async def __aenter__(self) -> Self:
        if self._balancer is not None:
            await self._balancer.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in (*self.workers.values(), *self._planes.values()):
            if process.returncode is None:
                process.kill()
                await process.wait()
        if self._balancer is not None:
            await self._balancer.__aexit__(kind, error, trace)
        self._reserved.close()

    async def start_control_plane(
        self, seed: int, *, number: int = 0, faults: str = "", ahead: float = 0.0
    ) -> None:
        """Start a control plane process, after killing the one with the same number if it runs.

        Args:
            seed: The seed of its faults.
            number: The number of the process.
            faults: The file of its faults; empty: none.
            ahead: Seconds by which its clock is ahead.

        Raises:
            StartError: The process ended instead.
        """
        await self.kill_control_plane(number)
        config = ControlPlaneConfig(
            store=self._store,
            journal=str(self.folder / "journal"),
            environment=ENVIRONMENT,
            token=TOKEN,
            port=self._ports[number],
            offset=self.offset + ahead,
            seed=seed,
            faults=faults,
        )
        with self._open_log(f"plane-{number}") as log:
            plane = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.chaos.control_plane", json.dumps(asdict(config))),
                cwd=HERE.parents[1],
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        self._planes[number] = plane
        assert plane.stdout is not None
        ready = b""
        try:
            async with asyncio.timeout(SECONDS):
                ready = await plane.stdout.readline()
        finally:
            if not ready:  # the process has ended, or the storm has ended and cancels this start
                del self._planes[number]
                with suppress(ProcessLookupError):
                    plane.kill()
                status = await plane.wait()
        if not ready:
            raise StartError(f"control plane {number} ended: {status}")

    async def kill_control_plane(self, number: int) -> None:
        """Kill a process of the control plane, if it runs, and wait for its end."""
        plane = self._planes.get(number)
        if plane is not None:
            if plane.returncode is not None:
                self.broken.append(f"control plane {number} ended by itself: {plane.returncode}")
            with suppress(ProcessLookupError):
                plane.kill()
            await plane.wait()
            del self._planes[number]

    async def stop_control_planes(self) -> None:
        """Terminate all control plane processes, which write their last snapshots."""
        for number, plane in self._planes.items():
            if plane.returncode is not None:
                self.broken.append(f"control plane {number} ended by itself: {plane.returncode}")
                continue
            plane.terminate()
            async with asyncio.timeout(SECONDS):
                await plane.wait()

    async def start_worker(self, name: str, base_url: str = "", *flags: str) -> None:
        """Start `workpool run`, connected to the control plane directly if `base_url` is empty."""
        foreign = ("WORKPOOL_", "QODER_PAT", "ANTHROPIC_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        settings = {
            **SETTINGS,
            "BASE_URL": base_url or self.base_url,
            "WORKER_ID": name,
            "WRITE_RATE": str(self._write_rate),
        }
        with self._open_log(f"worker-{len(self._logs) + 1}") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "workpool", "run", "storm_handlers", *flags),
                env={
                    **inherited,
                    **{f"WORKPOOL_{key}": value for key, value in settings.items()},
                    "STORM_TRACE": str(self.folder / "trace"),
                    "NO_PROXY": "127.0.0.1",
                },
                cwd=HERE,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=log,
            )
        self.workers[name] = process
        self._logs[process.pid] = Path(log.name)

    @contextmanager
    def _open_log(self, name: str) -> Iterator[IO[str]]:
        """Open a log file. The process that is started in the `with` block inherits the file."""
        with (self.folder / f"{name}.log").open("a") as file:
            yield file

    def send_signal(self, what: str, name: str) -> None:
        """Send the signal `kill`, `stop` or `cont` to a worker, and record it with its time."""
        process = self.workers[name]
        if process.returncode is None:
            self.actions.append({"t": seconds_since_boot(), "what": what, "pid": process.pid})
            process.send_signal(_NUMBERS[what])
        elif what == "kill":
            self.broken.append(f"worker {name} ended by itself: {process.returncode}")

    async def kill_worker(self, name: str) -> None:
        """Kill a worker by SIGKILL and wait for its end."""
        self.send_signal("kill", name)
        await self.workers[name].wait()

    def was_killed(self, name: str) -> bool:
        """Return whether the latest worker process with this name was killed by SIGKILL."""
        pid = self.workers[name].pid
        return any(action["pid"] == pid and action["what"] == "kill" for action in self.actions)

    async def wait_for_clean_exit(self, name: str) -> None:
        """Wait for the end of a worker, and record an exit status other than 0 as an error."""
        process = self.workers[name]
        try:
            async with asyncio.timeout(SECONDS):
                status = await process.wait()
        except TimeoutError:
            self.broken.append(f"worker {name} did not end")
            return
        self.actions.append({"t": seconds_since_boot(), "what": "exit", "pid": process.pid})
        if status != 0:
            self.broken.append(f"worker {name} ended with {status}")

    def find_control_plane_errors(self) -> list[str]:
        """Return the last line of each traceback in the logs of the control plane."""
        found = []
        for path in sorted(self.folder.glob("plane-*.log")):
            tracebacks = path.read_text().split("Traceback (most recent call last):\n")[1:]
            for text in tracebacks:
                ends = [line for line in text.splitlines() if line and not line.startswith(" ")]
                found.append(f"{path.name}: {ends[0] if ends else 'a traceback'}")
        return found

    def worker_ids_by_pid(self) -> dict[int, str]:
        """Return the Worker-ID of each worker process that logged its start, by process id."""
        said = {
            pid: re.search(r"pool started .*\bworker_id=(\S+)", path.read_text())
            for pid, path in self._logs.items()
        }
        return {pid: found[1] for pid, found in said.items() if found}
