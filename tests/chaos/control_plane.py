"""The control plane of a chaos test, as a process that injects faults and writes a journal.

`python control_plane.py CONFIG`, where CONFIG is the JSON of a `ControlPlaneConfig`. The journal is
one line of JSON per fact, written as it happens: received requests, applied and stored changes,
injected faults. Its times are this machine's CLOCK_BOOTTIME in seconds, whatever the control
plane's clock says.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from workpool.pool.lease_renewer import new_event_loop
from workpool.server import ControlPlane, History, PostgresStore, ServeError, SqliteStore
from workpool.testing import Faults
from workpool.testing.fault import Fault, combine_faults
from workpool.testing.fault_plan import read_fault_plan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.server import Record

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

TICK_SECONDS = 0.05
DATABASE = "postgresql://"
LAG_SECONDS = 0.1


def seconds_since_boot() -> float:
    """Return the seconds since the boot of the machine, sleep included: equal in all processes."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True)
class ControlPlaneConfig:
    """The configuration of one control plane process.

    Attributes:
        store: A file of SQLite, or the URL of a database, which then records the history itself.
        offset: The control plane's clock minus `seconds_since_boot`. A database has its own clock.
    """

    store: str
    journal: str
    environment: str
    token: str
    port: int
    offset: float
    seed: int
    faults: str = ""


class ItemHistoryInJournalFile(History):
    """A history that writes each line to a file immediately, so that a `kill -9` loses none."""

    def __init__(self, path: str, offset: float) -> None:
        super().__init__(0)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._offset = offset

    def write_journal_line(self, what: str, **facts: Any) -> None:
        os.write(
            self._file, orjson.dumps({"t": seconds_since_boot(), "what": what, **facts}) + b"\n"
        )

    def add(self, record: Record) -> None:
        facts = record._asdict()
        for name in ("time", "lease_end"):
            if facts[name] is not None:
                facts[name] -= self._offset
        self.write_journal_line("record", **facts)

    def write_snapshot(self, what: str, plane: ControlPlane) -> None:
        """Write the state of all items; the fields are those of `storm_checker.SnapshotItem`."""
        items = plane.operations.list_items(plane.environments[0], 1_000_000).items
        self.write_journal_line(
            what,
            items=[
                (
                    item.id,
                    item.state,
                    item.holder,
                    None if item.lease_end is None else item.lease_end / 1e6 - self._offset,
                    item.acknowledged_at is not None,
                    item.heartbeat_at is not None,
                )
                for item in items
            ],
        )

    @web.middleware
    async def record_arriving_requests(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """Outermost middleware: write a journal line when a request for an item arrives."""
        if "work_id" in request.match_info:
            self.write_journal_line("came", **_describe_request_for_journal(request))
        return await handler(request)

    @web.middleware
    async def record_successful_requests(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """Innermost middleware: write a journal line for a successful call for an item.

        The line is written before a fault changes the answer.
        """
        response = await handler(request)
        if "work_id" in request.match_info and response.status == 200:
            self.write_journal_line("durable", **_describe_request_for_journal(request))
        return response


def _describe_request_for_journal(request: web.Request) -> dict[str, str | None]:
    tail = request.path.rpartition("/")[2]
    work_id = request.match_info["work_id"]
    op = tail if tail != work_id else {"GET": "get", "POST": "update"}[request.method]
    return {"op": op, "work_id": work_id, "worker": request.headers.get("Worker-ID")}


def install_faults(
    config: ControlPlaneConfig,
    faults: Faults,
    plane: ControlPlane,
    journal: ItemHistoryInJournalFile,
) -> None:
    """Inject the faults that the file lists, and record each injection in the journal."""
    if not config.faults:
        return
    read_fault_plan(Path(config.faults)).add_rules_to(faults, plane)
    for rule, planned in zip(faults.rules, read_fault_plan(Path(config.faults)).fault, strict=True):
        name = f"{planned.kind} {getattr(planned, 'code', '')}".strip()
        assert isinstance(rule.fault, Fault)
        rule.fault = make_fault_with_journal_entry(rule.fault, name, journal)


def make_fault_with_journal_entry(
    fault: Fault, name: str, journal: ItemHistoryInJournalFile
) -> Fault:
    """Return a fault that writes an entry to the journal, and then does the same as `fault`."""

    def write_fault_to_journal(_environment_id: str, work_id: str | None) -> None:
        journal.write_journal_line("fault", kind=name, work_id=work_id)

    return combine_faults([Fault(before=write_fault_to_journal), fault])


async def record_loop_lag(journal: ItemHistoryInJournalFile) -> None:
    """Write a line to the journal after each delay of this event loop.

    A delayed event loop reads requests late, so the checker allows requests to arrive late then.
    """
    while True:
        before = seconds_since_boot()
        await asyncio.sleep(TICK_SECONDS)
        lag = seconds_since_boot() - before - TICK_SECONDS
        if lag > LAG_SECONDS:
            journal.write_journal_line("lag", seconds=lag)


def build_control_plane(
    config: ControlPlaneConfig, faults: Faults, journal: ItemHistoryInJournalFile
) -> ControlPlane:
    """Return the control plane with its store and middlewares."""
    middlewares = [
        journal.record_arriving_requests,
        faults.middleware,
        journal.record_successful_requests,
    ]
    if config.store.startswith(DATABASE):
        return ControlPlane(
            environments=(config.environment,),
            tokens={config.token: None},
            store=PostgresStore(config.store, history=True),
            port=config.port,
            middlewares=middlewares,
        )
    plane = ControlPlane(
        environments=(config.environment,),
        tokens={config.token: None},
        store=SqliteStore(config.store),
        port=config.port,
        now=lambda: seconds_since_boot() + config.offset,
        middlewares=middlewares,
    )
    plane.operations.history = journal
    return plane


async def serve_control_plane(config: ControlPlaneConfig) -> None:
    journal = ItemHistoryInJournalFile(config.journal, config.offset)
    faults = Faults(config.seed, remember=False)
    plane = build_control_plane(config, faults, journal)
    install_faults(config, faults, plane, journal)
    has_index = not config.store.startswith(DATABASE)
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    async with plane, asyncio.TaskGroup() as group:
        if has_index:
            journal.write_snapshot("boot", plane)
        ticking = group.create_task(record_loop_lag(journal))
        print(plane.port, flush=True)  # noqa: T201 - the parent waits for it
        await ending.wait()
        if has_index:
            journal.write_snapshot("end", plane)
        ticking.cancel()


if __name__ == "__main__":
    given = orjson.loads(sys.argv[1])
    config = ControlPlaneConfig(
        **{field.name: given[field.name] for field in fields(ControlPlaneConfig)}
    )
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            runner.run(serve_control_plane(config))
        except ServeError as error:  # raised, for example, if the database is not available
            sys.exit(f"cannot start: {error}")
