"""Checks the history of items that a database has recorded against the guarantees of a queue.

The checks are those that need no other records; `storm_checker` compares the history with the
workers' requests and the handlers' traces.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from tests.simulation.finished_simulation import FinishedSimulation
from tests.simulation.invariants import every_item_is_stopped_in_the_end
from tests.simulation.trace import Trace
from workpool.server import Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.postgres.cluster import Cluster

_HISTORY = """
    SELECT coalesce(json_agg(json_build_array(
        time, work_id, kind, worker_id, state, lease_end, op) ORDER BY number), '[]')
    FROM history
"""


def read_history(cluster: Cluster, url: str, offset: float) -> list[Record]:
    """Return the history that a database recorded, with times in seconds since the machine's boot.

    Args:
        cluster: The server of the database.
        url: The URL of the database.
        offset: The time of the boot, in seconds since the epoch.
    """

    def to_seconds_since_boot(microseconds: int | None) -> float | None:
        return None if microseconds is None else microseconds / 1e6 - offset

    return [
        Record(
            to_seconds_since_boot(time) or 0.0,
            work_id,
            kind,
            worker_id,
            state,
            to_seconds_since_boot(lease_end),
            op,
        )
        for time, work_id, kind, worker_id, state, lease_end, op in json.loads(
            cluster.execute(_HISTORY, url)
        )
    ]


def find_history_violations(history: Sequence[Record]) -> Iterator[str]:
    """Yield a sentence for each violation of a guarantee in the history."""
    case = FinishedSimulation(list(history), Trace(), {})
    yield from every_item_is_stopped_in_the_end(case)
    for work_id, leases in case.leases.items():
        for lease, later in pairwise(leases):
            if later.began < lease.ended:
                yield (
                    f"{work_id} was held by {lease.worker_id} until {lease.ended:.3f} and by "
                    f"{later.worker_id} from {later.began:.3f} on"
                )
    records: dict[str, list[Record]] = defaultdict(list)
    for record in history:
        records[record.work_id].append(record)
    for work_id, found in records.items():
        yield from _find_item_violations(work_id, found)


def _find_item_violations(work_id: str, records: Sequence[Record]) -> Iterator[str]:
    kinds = [record.kind for record in records]
    if kinds.count("created") != 1 or kinds[0] != "created":
        yield f"{work_id} was not created once, before everything else: {kinds}"
    ends = [
        place
        for place, record in enumerate(records)
        if record.kind in {"stopped", "lapsed"} and record.state == "stopped"
    ]
    if len(ends) > 1:
        yield f"{work_id} was stopped {len(ends)} times"
    for record in records[ends[0] + 1 :] if ends else ():
        if record.kind not in {"conflict", "metadata"}:
            yield f"{work_id}: {record.kind} after its stop"
    # A refused call changes nothing, so its record may be written while another call changes the
    # item: between the time of that change and its record.
    changes = [record for record in records if record.kind != "conflict"]
    for earlier, later in pairwise(changes):
        if later.time < earlier.time:
            yield f"{work_id}: {later.kind} at {later.time:.6f} after {earlier.time:.6f}"
