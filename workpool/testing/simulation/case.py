"""What an invariant judges: the control plane's history and the trace, put in order.

A *tenure* is one worker's time with one item, from its acknowledgement on, as the control plane
granted it. Its promise is the end of the lease by its own last beat; what the operator or somebody
else does to the item later breaks no promise that was made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from workpool.testing.simulation.trace import FOREVER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from workpool.server import Record
    from workpool.testing.simulation.trace import Node, Run, Sent, Trace

WRITES: Final = frozenset({"heartbeat", "stop", "update"})
ACK_SECONDS: Final = 60.0
"""How long acks may be tried: a pause meanwhile ends the claim, whichever was applied."""
START: Final = 86_400.0
"""When every simulation begins, by the control plane's clock: long ago, for exact floats."""


@dataclass(slots=True, eq=False, repr=False)
class Tenure:
    """One worker's time with one item.

    Attributes:
        promises: When the control plane said so, and until when the lease was to last.
        ended: When the item was not this worker's any more.
        stop_wished: When an operator first asked for its end.
        how: Detached: a child that its worker had started took the item over.
        stopped_by: Who stopped it; None when its lease lapsed.
        usurper: Who, with a lease that the operator had ended early, repeated its first beat on it:
            NO_HEARTBEAT names no owner.
    """

    work_id: str
    worker_id: str
    began: float
    promises: list[tuple[float, float]] = field(default_factory=list)
    ended: float = FOREVER
    how: Literal["lapsed", "stopped", "detached"] | None = None
    stop_wished: float = FOREVER
    stopped_by: str | None = None
    usurper: str | None = None

    def promised(self, at: float) -> float:
        """Until when the lease was to last, by what had been said at that moment."""
        place = bisect_right(self.promises, (at, FOREVER)) - 1
        return self.promises[max(place, 0)][1]

    @property
    def last_promise(self) -> float:
        """Until when it was to last in the end."""
        return self.promises[-1][1]


@dataclass(slots=True, eq=False, repr=False)
class Case:
    """One simulation, ready to be judged.

    Attributes:
        history: On the loop's clock.
        counted: What the metrics counted meanwhile, by name and labels.
    """

    history: list[Record]
    trace: Trace
    counted: Mapping[tuple[str, ...], float]
    tenures: dict[str, list[Tenure]] = field(init=False)
    sent: dict[tuple[Node, str], list[Sent]] = field(init=False)
    runs: dict[str, list[Run]] = field(init=False)
    stopped: dict[str, Record] = field(init=False)

    def __post_init__(self) -> None:
        """Put everything in order."""
        children = frozenset(node.worker_id for node in self.trace.nodes if node.child)
        self.tenures = _tenures(self.history, children)
        self.stopped = {each.work_id: each for each in self.history if each.kind == "stopped"}
        self.stopped |= {
            each.work_id: each
            for each in self.history
            if each.kind == "lapsed" and each.state == "stopped"
        }
        self.sent = defaultdict(list)
        for call in self.trace.sent:
            if call.work_id is not None:
                self.sent[call.node, call.work_id].append(call)
        self.runs = defaultdict(list)
        for run in self.trace.runs:
            self.runs[run.work_id].append(run)

    def tenure(self, node: Node, work_id: str, at: float) -> Tenure | None:
        """The pool's last tenure of the item that had begun by then."""
        found = None
        for tenure in self.tenures.get(work_id, ()):
            if tenure.worker_id == node.worker_id and tenure.began <= at:
                found = tenure
        return found

    def usurped(self, node: Node, work_id: str) -> bool:
        """Whether the pool's beats went to another's lease, its own having been broken."""
        tenures = self.tenures.get(work_id, ())
        usurped = any(tenure.usurper == node.worker_id for tenure in tenures)
        return usurped and any(broken == work_id for _, broken in self.trace.broken)

    def all_tenures(self) -> Iterable[tuple[Node, Tenure]]:
        """Every tenure and whose it was."""
        nodes = {node.worker_id: node for node in self.trace.nodes}
        for tenures in self.tenures.values():
            for tenure in tenures:
                yield nodes[tenure.worker_id], tenure

    def run_of(self, node: Node, tenure: Tenure) -> Run | None:
        """The handler's run in a tenure; what it did alone, if no child had come."""
        found = None
        for run in self.runs.get(tenure.work_id, ()):
            if run.node is node and tenure is self.tenure(node, tenure.work_id, run.started):
                found = run
        return found

    def disturbed(self, node: Node, tenure: Tenure, until: float = FOREVER) -> bool:
        """Whether anything befell the pool or its calls for the item during the tenure."""
        since = tenure.began - 0.01
        return (
            any(
                call.trouble is not None and call.over_at >= since and call.at <= until
                for call in self.sent[node, tenure.work_id]
            )
            or any(
                delay.node is node
                and delay.work_id in {tenure.work_id, None}
                and delay.until >= since
                and delay.since <= until
                for delay in self.trace.delays
            )
            or node.paused(since, min(until, tenure.last_promise + 1))
            or node.paused_unseen(since - ACK_SECONDS, until)  # while its ack waited to be sent
            or node.crashed <= min(until, tenure.last_promise)
            or self.broken(tenure)
        )

    def broken(self, tenure: Tenure) -> bool:
        """Whether the lease was ended before the promised time."""
        return any(
            work_id == tenure.work_id and tenure.began <= at <= tenure.last_promise
            for at, work_id in self.trace.broken
        ) or (tenure.how == "lapsed" and tenure.ended < tenure.last_promise - 0.001)


def _tenures(history: Iterable[Record], children: frozenset[str]) -> dict[str, list[Tenure]]:
    found: dict[str, list[Tenure]] = defaultdict(list)
    for record in history:
        if record.kind == "acked":
            tenure = Tenure(record.work_id, str(record.worker_id), record.time)
            tenure.promises.append((record.time, _end(record)))
            found[record.work_id].append(tenure)
            continue
        tenures = found.get(record.work_id)
        if not tenures or tenures[-1].how is not None:
            continue
        if record.kind == "heartbeat" and record.worker_id != tenures[-1].worker_id:
            if children & {str(record.worker_id), tenures[-1].worker_id}:
                tenures.append(_handed_over(tenures[-1], record))
            else:
                tenures[-1].usurper = record.worker_id
            continue
        _continue(tenures[-1], record)
    return found


def _handed_over(tenure: Tenure, record: Record) -> Tenure:
    tenure.ended, tenure.how = record.time, "detached"
    child = Tenure(record.work_id, str(record.worker_id), record.time)
    child.promises.append((record.time, _end(record)))
    child.stop_wished = tenure.stop_wished
    return child


def _continue(tenure: Tenure, record: Record) -> None:
    if record.kind == "heartbeat":
        tenure.promises.append((record.time, _end(record)))
    elif record.kind == "stop_requested":
        tenure.stop_wished = min(tenure.stop_wished, record.time)
    elif record.kind in {"lapsed", "stopped"}:
        tenure.ended = record.time
        tenure.how = "lapsed" if record.kind == "lapsed" else "stopped"
        tenure.stopped_by = record.worker_id


def _end(record: Record) -> float:
    return FOREVER if record.lease_end is None else record.lease_end - START
