"""Runs a compared program in one process, and its control plane in another process.

Benchmarks compare programs: the pool, for example. Each runs alone in a new process, against
the same control plane as the others. It reports claims, starts and stops to its `ProgramMeter`.
All benchmarks of this folder use this module. A run measures either a number of items
(`BenchmarkResult`), or the cost of a program in a period after its warm-up
(`ResourceUsageInPeriod`).
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
from aiohttp import web

from workpool import Settings, WorkClient
from workpool.server import ControlPlane
from workpool.wire.protocol import ENQUEUE_COUNT_MAX

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from multiprocessing.connection import Connection
    from multiprocessing.sharedctypes import Synchronized

SENT = "sent"
"""The metadata that holds when an item was enqueued, on the monotonic clock."""
_processes = multiprocessing.get_context("spawn")
LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class ControlPlaneAddress:
    """The address and token of a control plane, and a counter of the requests that it received."""

    base_url: str
    anthropic_base_url: str
    token: str
    environment_id: str
    requests: Synchronized[int] | None = None

    def client_settings(self, **more: Any) -> Settings:
        """Return settings for a client or pool of workpool that uses this control plane."""
        return Settings(
            base_url=self.base_url, token=self.token, environment_id=self.environment_id, **more
        )


@dataclass(frozen=True)
class ClockReading:
    """The CPU seconds of this process so far, and the time of the wall clock."""

    cpu: float
    wall: float

    @classmethod
    def read_clocks(cls) -> ClockReading:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_utime + usage.ru_stime, time.monotonic())


@dataclass
class ProgramMeter:
    """Measures a program from its claim number `warm_up` + 1 until all items are stopped."""

    warm_up: int
    items: int
    begin: ClockReading | None = None
    end: ClockReading | None = None
    waits: list[float] = field(default_factory=list)
    """Seconds from the call that enqueued an item to the start of its handler."""
    lost: int = 0
    """Leases that were not held to the end."""
    warm: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    _claimed: int = 0
    _stopped: int = 0

    def record_item_claim(self) -> None:
        """Record that a poll returned an item."""
        self._claimed += 1
        if self._claimed == self.warm_up + 1:
            self.begin = ClockReading.read_clocks()

    def record_handler_start(self, metadata: Mapping[str, str]) -> None:
        """Record that the handler of an item was called."""
        if SENT in metadata and self.begin is not None:
            self.waits.append(time.monotonic() - float(metadata[SENT]))

    def record_item_stop(self) -> None:
        """Record that the control plane answered the request to stop an item."""
        self._stopped += 1
        if self._stopped == self.warm_up:
            self.warm.set()
        if self._stopped == self.warm_up + self.items:
            self.end = ClockReading.read_clocks()
            self.done.set()


@dataclass(frozen=True)
class BenchmarkResult:
    """The time that a program needed for its items, and how long each item waited to start."""

    items: int
    cpu_seconds: float
    wall_seconds: float
    waits: list[float]

    @property
    def cpu_ms(self) -> float:
        return self.cpu_seconds / self.items * 1000

    @property
    def items_per_second(self) -> float:
        return self.items / self.wall_seconds


@dataclass(frozen=True)
class ResourceUsageInPeriod:
    """The resources that a program used in a period. `memory` counts private bytes only."""

    cpu_seconds: float
    wall_seconds: float
    requests: int
    memory: int
    lost: int

    @property
    def cpu_percent(self) -> float:
        """The CPU time in percent of one core."""
        return 100 * self.cpu_seconds / self.wall_seconds

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.wall_seconds


ComparedProgram = Callable[[ControlPlaneAddress, ProgramMeter], Coroutine[Any, Any, None]]
"""Claims and runs items until it is cancelled, and reports them to the meter."""


@dataclass(frozen=True)
class BenchmarkRun:
    """The options of one measurement: a program, and how many items it handles after the warm-up.

    With `watch`, the cost of the program is measured for that many seconds instead, beginning
    `settle` seconds after the warm-up.
    """

    program: ComparedProgram
    plane: ControlPlaneAddress
    items: int
    warm_up: int
    watch: float = 0.0
    settle: float = 0.0


@contextmanager
def serve_control_plane() -> Iterator[ControlPlaneAddress]:
    """Run a control plane in memory, in its own process, on a free loopback port."""
    requests: Synchronized[int] = _processes.Value("q", 0)
    with run_process(_run_control_plane, requests) as receive:
        yield replace(receive(), requests=requests)


@contextmanager
def start_benchmark_run(run: BenchmarkRun) -> Iterator[Callable[[], Any]]:
    """Run and measure a program in a process of its own.

    It yields a function that waits for a message of that process: the first message is None
    after the warm-up, the second one is the measurement.
    """
    with run_process(_run_measured_program, run) as receive:
        yield receive


async def enqueue_items(plane: ControlPlaneAddress, count: int) -> None:
    """Enqueue `count` items at the control plane."""
    async with WorkClient(plane.client_settings()) as client:
        for start in range(0, count, ENQUEUE_COUNT_MAX):
            await client.enqueue(min(ENQUEUE_COUNT_MAX, count - start))


def describe_cores_and_versions() -> str:
    """Return the number of cores and the versions of packages, for the line below a table."""
    packages = ("workpool", "aiohttp", "uvloop", "qca-sdk", "anthropic")
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    found = [f"{name} {installed[name]}" for name in packages if name in installed]
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(found)}."


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column is aligned left, the numbers right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def format_row(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join((first, *others))} |"

    rule = [
        ("-" * (width - 1) + ":") if number else "-" * width for number, width in enumerate(widths)
    ]
    return "\n".join(format_row(cells) for cells in (head, rule, *rows))


def format_ratio(value: float, base: float) -> str:
    """Return `value / base` as the text of a table cell, or a dash if `base` is 0."""
    return f"{value / base:.2f} ×" if base else "—"


@contextmanager
def run_process(target: Callable[..., None], *args: object) -> Iterator[Callable[[], Any]]:
    """Run `target(pipe, *args)` in a process, and yield a function that receives its messages."""
    ours, theirs = _processes.Pipe()
    running = _processes.Process(target=target, args=(theirs, *args), daemon=True)
    running.start()
    # The new process has a copy of `theirs`, so this process closes its own copy. Otherwise `recv`
    # would hang after the end of the new process.
    theirs.close()

    def receive_message() -> Any:
        if not ours.poll(LIMIT_SECONDS):
            raise TimeoutError(f"{target} said nothing for {LIMIT_SECONDS:.0f} s")
        # `recv` raises EOFError if the process has failed; stderr has the traceback.
        return ours.recv()

    try:
        yield receive_message
    finally:
        ours.close()
        running.terminate()
        running.join()


def _run_control_plane(pipe: Connection, requests: Synchronized[int]) -> None:
    uvloop.run(_serve_control_plane(pipe, requests))


async def _serve_control_plane(pipe: Connection, requests: Synchronized[int]) -> None:
    @web.middleware
    async def count_received_request(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        requests.value += 1
        return await handler(request)

    async with ControlPlane(middlewares=[count_received_request]) as plane:
        pipe.send(
            ControlPlaneAddress(
                plane.base_url, plane.anthropic_base_url, plane.token, plane.environments[0]
            )
        )
        await asyncio.get_running_loop().create_future()  # serve until the process is terminated


def _run_measured_program(pipe: Connection, run: BenchmarkRun) -> None:
    uvloop.run(_measure_program_and_send_result(pipe, run))


async def _measure_program_and_send_result(pipe: Connection, run: BenchmarkRun) -> None:
    meter = ProgramMeter(run.warm_up, run.items)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run.program(run.plane, meter), name="program")
        await meter.warm.wait()
        pipe.send(None)
        pipe.send(
            await (
                _measure_usage_in_period(run, meter)
                if run.watch
                else _await_benchmark_result(meter)
            )
        )
        task.cancel()


async def _await_benchmark_result(meter: ProgramMeter) -> BenchmarkResult:
    await meter.done.wait()
    assert meter.begin is not None
    assert meter.end is not None
    return BenchmarkResult(
        meter.items,
        meter.end.cpu - meter.begin.cpu,
        meter.end.wall - meter.begin.wall,
        meter.waits,
    )


async def _measure_usage_in_period(run: BenchmarkRun, meter: ProgramMeter) -> ResourceUsageInPeriod:
    requests = run.plane.requests
    assert requests is not None
    await asyncio.sleep(run.settle)
    gc.collect()
    memory = private_memory_kib(os.getpid()) * 1024
    sent, begin = requests.value, ClockReading.read_clocks()
    await asyncio.sleep(run.watch)
    end = ClockReading.read_clocks()
    return ResourceUsageInPeriod(
        end.cpu - begin.cpu,
        end.wall - begin.wall,
        requests.value - sent,
        memory,
        meter.lost,
    )


def private_memory_kib(pid: int) -> int:
    """Return the memory in KiB that only this process uses, without shared libraries."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith("Private_Dirty:")]
    return int(kib)
