"""The servers, database and workers of a measured system, and the CPU time of their processes.

A `MeasuredSystem` is a control plane in memory or on SQLite, nodes on one PostgreSQL database, or a
job queue of another project. Its workers share the servers in turn and count their stops together.
CPU times are those of all threads of a process, read from /proc.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import uvloop
from backlog_setup import POSTGRES, Backlog, create_backlog_in_memory, create_backlog_in_store
from benchmark_runs import (
    LIMIT_SECONDS,
    ControlPlaneAddress,
    ProgramMeter,
    enqueue_items,
    run_process,
)

from workpool import WorkClient
from workpool.pool.lease_renewer import new_event_loop
from workpool.server import ControlPlane, MemoryStore, PostgresStore, SqliteStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.sharedctypes import Synchronized
    from typing import Self

    from benchmark_runs import ComparedProgram

    Stops = Synchronized[int]

MEMORY = "memory"
TICK_SECONDS = 0.002
BATCH = 10
"""The lowest depth of a queue."""
RETENTION_SECONDS = 86_400
Target: TypeAlias = Callable[..., None]
"""The main function of a process. It gets a pipe, to which it sends its process id, and `Stops`."""
_PROC = Path("/proc")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_processes = get_context("spawn")


@dataclass(frozen=True)
class MeasuredSystem:
    """A queue service with its servers, database and workers.

    Attributes:
        enqueue: Creates the given number of items, and returns once they are stored.
        worker: Returns the target of the worker process of this number.
        servers: The ids of the control plane's processes.
        database: The id of the database's first process; the others are its children.
        settled: Returns once no item is in progress: a worker may count a stop before its answer.
        plane: The address of the first control plane.
    """

    enqueue: Callable[[int], None]
    worker: Callable[[int], Target]
    servers: Sequence[int] = ()
    database: int | None = None
    settled: Callable[[], None] = lambda: None
    plane: ControlPlaneAddress | None = None


@dataclass(frozen=True)
class ResourceUse:
    """The CPU seconds of each process and the wall clock time, in total or for a period.

    Attributes:
        machine: The CPU seconds used by all programs of this machine, and the total with idle ones.
    """

    wall: float
    machine: tuple[float, ...]
    servers: tuple[float, ...]
    database: float
    workers: tuple[float, ...]

    def subtract_earlier_use(self, begin: ResourceUse) -> ResourceUse:
        return ResourceUse(
            self.wall - begin.wall,
            _subtract_tuples(self.machine, begin.machine),
            _subtract_tuples(self.servers, begin.servers),
            self.database - begin.database,
            _subtract_tuples(self.workers, begin.workers),
        )

    @property
    def total_cpu_seconds(self) -> float:
        return sum(self.servers) + self.database + sum(self.workers)


@dataclass(frozen=True)
class RunMeasurement:
    """The CPU and wall clock time that a system needed for a number of items."""

    items: int
    use: ResourceUse

    @property
    def items_per_second(self) -> float:
        return self.items / self.use.wall

    def ms_per_item(self, seconds: float) -> float:
        """Convert seconds of the whole run to milliseconds per item."""
        return seconds / self.items * 1000


@dataclass
class MeterWithSharedCounter(ProgramMeter):
    """A meter that counts stopped items in a counter that all workers share."""

    stops: Stops | None = None

    def record_item_stop(self) -> None:
        count_stopped_item(self.stops)


def count_stopped_item(stops: Stops | None) -> None:
    """Add one stopped item to the counter that all workers share."""
    assert stops is not None
    with stops.get_lock():
        stops.value += 1


class WorkerProcesses:
    """The worker processes of a system, which run until the end of the `with` block."""

    def __init__(self, system: MeasuredSystem, workers: int) -> None:
        self.pids: list[int] = []
        self._system = system
        self._workers = workers
        self._stops: Stops = _processes.Value("q", 0)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for number in range(self._workers):
                receive = stack.enter_context(run_process(self._system.worker(number), self._stops))
                self.pids.append(receive())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_usage(self) -> ResourceUse:
        """Return the CPU time that each process has used so far, and the wall clock time."""
        system = self._system
        return ResourceUse(
            time.monotonic(),
            read_machine_cpu_seconds(),
            tuple(map(read_process_cpu_seconds, system.servers)),
            0.0 if system.database is None else read_process_tree_cpu_seconds(system.database),
            tuple(map(read_process_cpu_seconds, self.pids)),
        )

    @property
    def stopped_item_count(self) -> int:
        """The number of items that were stopped so far."""
        return self._stops.value

    def wait_for_stopped_items(self, stops: int) -> None:
        """Wait until `stops` items were stopped."""
        until = time.monotonic() + LIMIT_SECONDS
        while self.stopped_item_count < stops:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.stopped_item_count} of {stops} items were stopped")
            time.sleep(TICK_SECONDS)


def measure_run(system: MeasuredSystem, items: int, warm_up: int, workers: int) -> RunMeasurement:
    """Enqueue items for workers that already poll; measure until all the items are stopped."""
    with WorkerProcesses(system, workers) as team:
        system.enqueue(warm_up)
        team.wait_for_stopped_items(warm_up)
        system.settled()
        begin = team.read_usage()
        system.enqueue(items)
        team.wait_for_stopped_items(warm_up + items)
        system.settled()
        return RunMeasurement(items, team.read_usage().subtract_earlier_use(begin))


def measure_at_queue_depth(system: MeasuredSystem, items: int, warm_up: int) -> RunMeasurement:
    """Measure the cost and the rate of handled items at an almost constant queue depth.

    Each handled batch of items is replaced by a new batch. There is one worker for each control
    plane process.
    """
    assert system.plane is not None
    with WorkerProcesses(system, len(system.servers)) as team:
        return asyncio.run(_run_items_at_queue_depth(team, system.plane, items, warm_up))


async def _run_items_at_queue_depth(
    team: WorkerProcesses, plane: ControlPlaneAddress, items: int, warm_up: int
) -> RunMeasurement:
    """Enqueue a new batch of items whenever a batch was handled, and measure after the warm-up.

    The size of a batch is the same for every queue depth, since each request has a fixed cost.
    """
    async with WorkClient(plane.client_settings()) as client, asyncio.timeout(LIMIT_SECONDS):
        added, first = 0, 0
        begin: ResourceUse | None = None
        while begin is None or team.stopped_item_count < first + items:
            if begin is None and team.stopped_item_count >= warm_up:
                begin, first = team.read_usage(), team.stopped_item_count
            if team.stopped_item_count >= added + BATCH:
                added += len(await client.enqueue(BATCH))
            else:
                await asyncio.sleep(TICK_SECONDS)
        return RunMeasurement(
            team.stopped_item_count - first, team.read_usage().subtract_earlier_use(begin)
        )


@contextmanager
def serve_control_planes(
    store: str,
    program: ComparedProgram,
    *,
    backlog: Backlog,
    nodes: int = 1,
    database: int | None = None,
) -> Iterator[MeasuredSystem]:
    """Start one or several control plane processes on a store that already has a backlog.

    Args:
        store: `MEMORY`, a new file of SQLite, or the URL of a database without workpool's tables.
        program: The program that each worker runs.
        backlog: The items in the store when the first process starts.
        nodes: The number of processes.
        database: The id of the database's first process.
    """
    if store != MEMORY:
        create_backlog_in_store(store, backlog)
    with ExitStack() as stack:
        ready = [
            stack.enter_context(run_process(_run_control_plane, store, backlog))()
            for _ in range(nodes)
        ]
        planes: list[ControlPlaneAddress] = [plane for plane, _ in ready]
        yield MeasuredSystem(
            enqueue=lambda number: asyncio.run(enqueue_items(planes[0], number)),
            worker=lambda number: partial(_run_worker, program, planes[number % nodes]),
            servers=[pid for _, pid in ready],
            database=database,
            plane=planes[0],
        )


def read_machine_cpu_seconds() -> tuple[float, float]:
    """Return two sums of CPU seconds since the machine's boot: used seconds, and used plus idle."""
    first = (_PROC / "stat").read_text().partition("\n")[0]
    user, nice, system, idle, waiting, *others = map(int, first.split()[1:9])
    used = user + nice + system + sum(others)
    return used / _TICKS_PER_SECOND, (used + idle + waiting) / _TICKS_PER_SECOND


def read_process_cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has used so far."""
    user, system, *_ = _read_cpu_ticks(pid)
    return (user + system) / _TICKS_PER_SECOND


def read_process_tree_cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and its children, including ended ones."""
    children = [child for child in _list_pids() if _read_parent_pid(child) == pid]
    return sum(_read_cpu_ticks(pid)) / _TICKS_PER_SECOND + sum(
        map(read_process_cpu_seconds, children)
    )


def _read_cpu_ticks(pid: int) -> tuple[int, int, int, int]:
    """Return the CPU ticks of a process in user and system mode, then of its ended children."""
    fields = _read_stat_fields(pid)
    user, system, *ended = map(int, fields[11:15]) if fields else (0, 0, 0, 0)
    return user, system, ended[0], ended[1]


def _read_parent_pid(pid: int) -> int | None:
    fields = _read_stat_fields(pid)
    return int(fields[1]) if fields else None


def _read_stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name; empty if the process has ended."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()


def _list_pids() -> list[int]:
    return [int(each.name) for each in _PROC.iterdir() if each.name.isdecimal()]


def _subtract_tuples(after: tuple[float, ...], before: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(last - first for last, first in zip(after, before, strict=True))


def _run_control_plane(pipe: Connection, store: str, backlog: Backlog) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve_control_plane(pipe, store, backlog))


async def _serve_control_plane(pipe: Connection, store: str, backlog: Backlog) -> None:
    plane = ControlPlane(
        store=_create_store(store),
        tokens={"token-of-the-benchmark": None},
        history_limit=0,
        retention=RETENTION_SECONDS,
    )
    async with plane:
        if store == MEMORY:
            create_backlog_in_memory(plane, backlog)
        address = ControlPlaneAddress(
            plane.base_url, plane.anthropic_base_url, plane.token, plane.environments[0]
        )
        pipe.send((address, os.getpid()))
        await asyncio.get_running_loop().create_future()  # serve until the process is terminated


def _create_store(place: str) -> MemoryStore | SqliteStore | PostgresStore:
    if place.startswith(POSTGRES):
        return PostgresStore(place)
    return MemoryStore() if place == MEMORY else SqliteStore(place)


def _run_worker(
    program: ComparedProgram, plane: ControlPlaneAddress, pipe: Connection, stops: Stops
) -> None:
    pipe.send(os.getpid())
    uvloop.run(program(plane, MeterWithSharedCounter(0, 0, stops=stops)))
