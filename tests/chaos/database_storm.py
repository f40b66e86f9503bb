"""A chaos test in which three control planes and their PostgreSQL database fail repeatedly.

`python -m tests.chaos.database_storm --seed 1` runs it for a minute. It does the same as `storm`,
but the control planes are behind a balancer, so that the calls for one item reach all of them. They
are killed and started again one by one, and the database is restarted or killed. The database
itself records the history of all changes.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.chaos.control_plane import seconds_since_boot
from tests.chaos.history_checker import find_history_violations, read_history
from tests.chaos.storm import KINDS, Storm, StormSettings, format_report, parse_settings
from tests.chaos.storm_processes import SECONDS, StartError, StormProcesses
from tests.postgres.cluster import remove_cluster, start_cluster

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tests.chaos.storm_checker import StormResult
    from tests.postgres.cluster import Cluster

PLANES = 3
DATABASE_EVERY = 15.0
"""Mean time in seconds between two restarts of the database."""

_SNAPSHOT = """
    SELECT json_build_object(
        't', extract(epoch FROM statement_timestamp()),
        'items', coalesce(json_agg(json_build_array(
            id, state, holder, lease_end, acknowledged_at IS NOT NULL, heartbeat_at IS NOT NULL
        )), '[]'))
    FROM items
"""
"""All items, as lists of the fields of `storm_checker.SnapshotItem`, and the current time."""


class DatabaseStorm(Storm):
    """One chaos test on a new database, whose server is also stopped, killed and started again."""

    # Leave out the fault `expired`: it changes items in memory, but here they are in the database.
    kinds = [kind for kind in KINDS if kind["kind"] != "expired"]  # noqa: RUF012 - never changed

    def __init__(self, settings: StormSettings, folder: Path, cluster: Cluster) -> None:
        self._cluster = cluster
        self._url = cluster.create_database()
        self._snapshots: list[dict[str, Any]] = []
        self._restart: asyncio.Task[None] | None = None
        super().__init__(settings, folder)

    def _make_storm_processes(self, folder: Path) -> StormProcesses:
        return StormProcesses(folder, self.settings.write_rate, store=self._url, planes=PLANES)

    async def _start_control_planes(self, faults: str = "") -> None:
        for number in range(PLANES):
            await self._start_control_plane(number, faults)

    async def _start_control_plane(self, number: int, faults: str) -> None:
        """Start a control plane process; try again while the database is not available."""
        seed = self._random.randrange(1 << 30)
        async with asyncio.timeout(SECONDS):
            while True:
                with suppress(StartError):
                    await self._fleet.start_control_plane(seed, number=number, faults=faults)
                    return
                await asyncio.sleep(0.5)

    def _list_control_plane_faults(self) -> list[Coroutine[Any, Any, None]]:
        return [self._kill_control_plane(), self._restart_database_repeatedly()]

    async def _kill_control_plane(self) -> None:
        """Repeatedly kill a random control plane, and start it again at once or a little later."""
        every = self.settings.plane_kill_every / PLANES
        while True:
            await asyncio.sleep(every * self._random.uniform(0.7, 1.3))
            number = self._random.randrange(PLANES)
            self._record_storm_action("kill plane")
            await self._fleet.kill_control_plane(number)
            await asyncio.sleep(self._random.uniform(0, 2))
            await self._start_control_plane(number, str(self._faults))

    async def _restart_database_repeatedly(self) -> None:
        """Repeatedly stop or kill the database, and start it again at once or a little later."""
        while True:
            await asyncio.sleep(DATABASE_EVERY * self._random.uniform(0.7, 1.3))
            crash, away = self._random.random() < 0.5, self._random.choice([0, 0, 4])
            self._record_storm_action("database killed" if crash else "database stopped")
            # The thread continues if the method `_restart_database_repeatedly` is cancelled. So
            # store the task that waits for the thread. `_end_faults_and_finish_items` awaits it.
            self._restart = asyncio.create_task(  # noqa: TID251 - `_end_faults_and_finish_items` awaits it
                asyncio.to_thread(self._restart_database, away, crash=crash)
            )
            await asyncio.shield(self._restart)
            await self._take_snapshot("boot")

    def _restart_database(self, away: float, *, crash: bool) -> None:
        if crash:
            self._cluster.kill_all_processes()
        else:
            self._cluster.stop()
        time.sleep(away)
        self._cluster.start()

    def _record_storm_action(self, what: str) -> None:
        self._fleet.actions.append({"t": seconds_since_boot(), "what": what, "pid": 0})

    async def _take_snapshot(self, what: str) -> None:
        found = json.loads(await asyncio.to_thread(self._cluster.execute, _SNAPSHOT, self._url))
        for item in found["items"]:
            item[3] = None if item[3] is None else item[3] / 1e6 - self._fleet.offset
        self._snapshots.append({**found, "t": found["t"] - self._fleet.offset, "what": what})

    async def _end_faults_and_finish_items(self, *args: Any) -> None:
        if self._restart is not None:
            await self._restart
        await super()._end_faults_and_finish_items(*args)
        await self._take_snapshot("end")

    def _collect_journal_lines(self) -> list[dict[str, Any]]:
        """Return the lines of control planes, database and snapshots in order of time."""
        history = read_history(self._cluster, self._url, self._fleet.offset)
        records = [{"t": each.time, "what": "record", **each._asdict()} for each in history]
        found = [*super()._collect_journal_lines(), *records, *self._snapshots]
        return sorted(found, key=lambda line: float(line["t"]))

    def _check_workpool_guarantees(self) -> StormResult:
        verdict = super()._check_workpool_guarantees()
        history = read_history(self._cluster, self._url, self._fleet.offset)
        verdict.broken += [
            *find_history_violations(history),
            *self._fleet.find_control_plane_errors(),
        ]
        return verdict


def main() -> None:
    """Run one chaos test, and print its result and the folder of its files.

    The exit status is 1 if a guarantee was violated.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = parse_settings(__doc__)
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    cluster = start_cluster()
    try:
        verdict = asyncio.run(DatabaseStorm(settings, folder, cluster).run_storm())
    finally:
        (folder / "database.log").write_text(cluster.read_log())
        remove_cluster(cluster)
    print(f"{folder}\n{format_report(settings, verdict)}")  # noqa: T201 - what it is for
    sys.exit(1 if verdict.broken else 0)


if __name__ == "__main__":
    main()
