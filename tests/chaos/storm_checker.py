"""Checks the guarantees after a chaos test, with the control plane's journal and handler traces.

The reports of pools are not used. After the end of the lease that a worker was last granted, the
worker may send nothing for the item, and no handler may start or continue. The margin: a request
may be sent in time and read late, and a handler may be cancelled in time and end late, so both
count only after `slack` seconds and the lag measured at that time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Line = Mapping[str, Any]

WAKE_SECONDS = 2.0
"""Time within which a handler must end after its process resumed with an expired lease."""
CLOCK_SECONDS = 0.05
"""Largest difference between the clocks of the database and of the control plane's processes.

The system's clock, which the database uses, may be set by some milliseconds during the test.
"""
_ENDS = frozenset({"returned", "raised", "cancelled"})


class SnapshotItem(NamedTuple):
    """One item in a snapshot of the control plane's store."""

    id: str
    state: str
    holder: str | None
    lease_end: float | None
    acknowledged: bool
    beaten: bool


@dataclass(slots=True)
class HandlerRun:
    """One run of a handler; `end` is the end of its process if the handler recorded no end."""

    pid: int
    start: float
    end: float
    how: str


@dataclass
class StormResult:
    """The result of checking a storm: violated guarantees, and counts of events.

    Attributes:
        broken: One sentence for each violation of a guarantee.
        counts: The number of each kind of event, which shows that faults happened.
        latest: The largest number of seconds from the end of a lease to the arrival of a request of
            its holder.
        clock_change: The largest number of seconds by which the system's clock was set since the
            start of the storm. After more than `CLOCK_SECONDS`, the times of a database cannot be
            compared with those of processes.
    """

    broken: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    latest: float = 0.0
    clock_change: float = 0.0


class StormChecker:
    """Finds violations of the guarantees in the journal and the handlers' trace.

    Args:
        journal: The journal of all control plane processes, followed by lags measured elsewhere.
        trace: The trace of the handlers.
        actions: The actions of the storm in order: `kill`, `stop`, `cont`, `exit` of a `pid`.
        workers: The Worker-ID of each process id.
    """

    def __init__(
        self,
        journal: Iterable[Line],
        trace: Iterable[Line],
        actions: Iterable[Line],
        workers: Mapping[int, str],
        *,
        slack: float,
    ) -> None:
        self._journal = list(journal)
        self._trace = list(trace)
        self._actions = list(actions)
        self._workers = workers
        self._slack = slack
        self.verdict = StormResult()
        # For each worker and item, the time of each grant and the end of the granted lease. The
        # grants are in ascending order.
        self._grants: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        self._first_acked_at: dict[tuple[str, str], float] = {
            (line["worker_id"], line["work_id"]): line["t"]
            for line in reversed(self._journal)
            if line["what"] == "record" and line["kind"] == "acked"
        }
        self._holder: dict[str, str | None] = {}
        self._cut: set[tuple[str, str]] = set()
        self._durable: dict[str, set[str]] = defaultdict(set)
        self._lags = [
            (line["t"] - line["seconds"] - 1.0, line["t"] + 1.0, line["seconds"])
            for line in self._journal
            if line["what"] == "lag"
        ]

    def check_storm(self, enqueued: Sequence[str]) -> StormResult:
        """Check a storm. `enqueued` has the ids of the items that the storm created."""
        for line in self._journal:
            what = line["what"]
            if what == "record":
                self._check_history_record(line)
            elif what == "came":
                self._check_request_arrives_within_lease(line)
            elif what == "durable" and line["worker"] is not None:
                self._durable[line["work_id"]].add(line["op"])
            elif what in {"boot", "end"}:
                self.verdict.counts["boots"] += what == "boot"
                self._check_answered_calls_are_stored(
                    line["t"], [SnapshotItem(*item) for item in line["items"]]
                )
            elif what == "fault":
                self._record_fault(line["kind"], line["work_id"])
        self._check_no_item_is_lost(enqueued)
        self._check_runs_against_leases()
        self.verdict.counts.update(f"action: {action['what']}" for action in self._actions)
        return self.verdict

    def _add_violation(self, text: str) -> None:
        self.verdict.broken.append(text)

    def _check_history_record(self, line: Line) -> None:
        work_id, worker, kind = line["work_id"], line["worker_id"], line["kind"]
        self.verdict.counts[f"record: {kind}"] += 1
        holder = self._holder.get(work_id)
        if kind == "acked" or (kind == "heartbeat" and worker == holder):
            self._holder[work_id] = worker
            self._grants[worker, work_id].append((line["t"], line["lease_end"]))
        elif kind in {"lapsed", "stopped"}:
            self._holder[work_id] = None
        if None not in {worker, holder} and worker != holder and kind in {"metadata", "stopped"}:
            # Count this request, but report no violation: an injected delay can make the control
            # plane apply a request after the lease, although the worker sent it in time.
            # `_check_request_arrives_within_lease` reports the requests that were sent late.
            self.verdict.counts["applied late to another's item"] += 1

    def _record_fault(self, kind: str, work_id: str | None) -> None:
        self.verdict.counts[f"fault: {kind}"] += 1
        holder = self._holder.get(work_id or "")
        if kind == "expired" and holder is not None:
            # The fault has ended the lease early. The holder cannot know this, so the holder's run
            # of the item may overlap the next run of the item.
            self._cut.add((holder, work_id or ""))

    def _check_request_arrives_within_lease(self, line: Line) -> None:
        worker, work_id, op = line["worker"], line["work_id"], line["op"]
        # Neither an ack nor an operator's request needs a lease.
        if worker is None or op == "ack":
            return
        self.verdict.counts[f"came: {op}"] += 1
        grants = self._grants.get((worker, work_id))
        if not grants:
            acked_at = self._first_acked_at.get((worker, work_id), float("inf"))
            if acked_at > line["t"] + CLOCK_SECONDS:
                self._add_violation(f"{worker} sent {op} for {work_id}, which it never held")
            return
        late = line["t"] - grants[-1][1]
        self.verdict.latest = max(self.verdict.latest, late)
        if late > self._slack + self._total_loop_lag_near(line["t"]):
            holder = self._holder.get(work_id)
            self._add_violation(
                f"{worker} sent {op} for {work_id} {late:.2f} s after its lease; held by {holder}"
            )

    def _total_loop_lag_near(self, at: float) -> float:
        """Return for how many seconds event loops were delayed near the time `at`, in total."""
        return float(sum(lag for since, until, lag in self._lags if since <= at <= until))

    def _check_answered_calls_are_stored(self, at: float, items: Sequence[SnapshotItem]) -> None:
        """Check that the effects of all answered calls are in a snapshot of the store."""
        known = {item.id: item for item in items}
        for work_id, ops in self._durable.items():
            item = known.get(work_id)
            kept = item is not None and (
                (item.state == "stopped" or "stop" not in ops)
                and (item.acknowledged or "ack" not in ops)
                and (item.beaten or "heartbeat" not in ops)
            )
            if not kept:
                self._add_violation(f"{work_id}: answered {sorted(ops)}, then forgotten: {item}")
        for item in items:
            self._holder[item.id] = item.holder if item.lease_end is not None else None
            if item.lease_end is not None and item.holder is not None:
                self._grants[item.holder, item.id].append((at, item.lease_end))

    def _check_no_item_is_lost(self, enqueued: Sequence[str]) -> None:
        ends = [line["items"] for line in self._journal if line["what"] == "end"]
        states = {item[0]: item[1] for item in (ends[-1] if ends else [])}
        self.verdict.counts["enqueued"] = len(states)
        self.verdict.counts["stopped"] = sum(state == "stopped" for state in states.values())
        for work_id in {*enqueued, *states}:
            if states.get(work_id) != "stopped":
                self._add_violation(f"{work_id} is lost: {states.get(work_id)}")

    def _check_runs_against_leases(self) -> None:
        for work_id, runs in self._group_runs_by_item().items():
            self.verdict.counts["runs"] += len(runs)
            self.verdict.counts["runs again"] += len(runs) - 1
            for run in runs:
                self.verdict.counts[f"run {run.how}"] += 1
                self._check_run_is_within_lease(work_id, run)
            for number, run in enumerate(runs):
                for later in runs[number + 1 :]:
                    if later.start < run.end:
                        self._check_overlap_of_runs(work_id, run, later)

    def _group_runs_by_item(self) -> dict[str, list[HandlerRun]]:
        gone = {
            action["pid"]: action["t"]
            for action in self._actions
            if action["what"] in {"kill", "exit"}
        }
        runs: dict[str, list[HandlerRun]] = defaultdict(list)
        for line in self._trace:
            mine = [run for run in runs[line["work_id"]] if run.pid == line["pid"]]
            if line["what"] == "start":
                end = gone.get(line["pid"], float("inf"))
                runs[line["work_id"]].append(HandlerRun(line["pid"], line["t"], end, "cut off"))
            elif line["what"] in _ENDS:
                mine[-1].end, mine[-1].how = line["t"], line["what"]
        return runs

    def _check_run_is_within_lease(self, work_id: str, run: HandlerRun) -> None:
        """Check that a run began and ended within a lease of its worker."""
        worker = self._workers.get(run.pid, "")
        grants = self._grants.get((worker, work_id), [])
        granted_at = [at for at, _ in grants]
        place = bisect_right(granted_at, run.start)
        if not place:
            self._add_violation(f"{worker} ran {work_id} without a lease")
            return
        late = run.start - grants[place - 1][1]
        if late > self._slack + self._total_loop_lag_near(run.start):
            self._add_violation(f"{worker} began {work_id} {late:.2f} s after its lease")
        lease_end = grants[bisect_right(granted_at, run.end) - 1][1]
        until = lease_end + self._slack + self._total_loop_lag_near(lease_end)
        for stopped, woke in self._suspensions_of_process(run.pid):
            if run.start <= stopped <= run.end:
                until = max(until, woke + WAKE_SECONDS + self._total_loop_lag_near(woke))
                self.verdict.counts["runs whose lease ended while stopped"] += lease_end < woke
        if run.end > until:
            self._add_violation(
                f"{worker} went on with {work_id} for {run.end - until:.2f} s too long"
            )

    def _check_overlap_of_runs(self, work_id: str, run: HandlerRun, later: HandlerRun) -> None:
        """Record the overlap of two runs as a violation, or count the reason that excuses it."""
        worker, other = self._workers.get(run.pid, ""), self._workers.get(later.pid, "")
        seconds = min(run.end, later.end) - later.start
        if (worker, work_id) in self._cut:
            self.verdict.counts["overlaps excused: lease expired by a fault"] += 1
        elif any(
            run.start <= stopped <= later.start <= woke + WAKE_SECONDS
            for stopped, woke in self._suspensions_of_process(run.pid)
        ):
            self.verdict.counts["overlaps excused: process was stopped"] += 1
        elif seconds > self._slack + self._total_loop_lag_near(later.start):
            self._add_violation(
                f"{work_id} was run by {worker} and {other} at once for {seconds:.2f} s"
            )
        else:
            self.verdict.counts["overlaps within the margin"] += 1

    def _suspensions_of_process(self, pid: int) -> list[tuple[float, float]]:
        """Return the pairs of times at which a process was suspended and resumed."""
        mine = [action for action in self._actions if action["pid"] == pid]
        stopped = [action["t"] for action in mine if action["what"] == "stop"]
        return list(
            zip(stopped, (action["t"] for action in mine if action["what"] == "cont"), strict=False)
        )
