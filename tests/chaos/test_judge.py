"""The judge: it finds each kind of violation, and none in a valid trace."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos.judge import WAKE_SECONDS, Judge, Verdict

A, B = "one-aaaaaaaa", "two-bbbbbbbb"
WORKERS = {1: A, 2: B}
SLACK = 1.0
Lines = list[dict[str, Any]]


def record(t: float, kind: str, worker: str | None, lease_end: float | None = None) -> Any:
    return {
        "t": t,
        "what": "record",
        "time": t,
        "work_id": "w",
        "kind": kind,
        "worker_id": worker,
        "lease_end": lease_end,
    }


def came(t: float, op: str, worker: str | None) -> Any:
    return {"t": t, "what": "came", "op": op, "work_id": "w", "worker": worker}


def durable(t: float, op: str, worker: str) -> Any:
    return {"t": t, "what": "durable", "op": op, "work_id": "w", "worker": worker}


def snapshot(t: float, what: str, state: str = "stopped", *, acked: bool = True) -> Any:
    return {"t": t, "what": what, "items": [["w", state, None, None, acked, acked]]}


def ran(t: float, pid: int, what: str) -> Any:
    return {"t": t, "what": what, "pid": pid, "work_id": "w"}


def held(t: float, worker: str) -> Lines:
    """Return the records of a delivery, an ack and a heartbeat: a lease of ten seconds."""
    return [record(t, "acked", worker, t + 60), record(t, "heartbeat", worker, t + 10)]


STOPPED = [came(8, "stop", A), record(8, "stopped", A), durable(8, "stop", A)]
CALM = [record(0, "created", None), *held(1, A), *STOPPED, snapshot(9, "end")]
CALM_TRACE = [ran(2, 1, "start"), ran(7, 1, "returned")]
HANDED_ON = [*held(0, A), record(10, "lapsed", A), *held(12, B)]
END = [record(15, "stopped", B), snapshot(30, "end")]


def judged(journal: Lines, trace: Lines, actions: Lines | None = None) -> Verdict:
    return Judge(journal, trace, actions or [], WORKERS, slack=SLACK).judge(["w"])


def test_judge_accepts_trace_without_faults() -> None:
    verdict = judged(CALM, CALM_TRACE)
    assert verdict.broken == []
    assert verdict.counts["runs"] == verdict.counts["enqueued"] == verdict.counts["stopped"] == 1


@pytest.mark.parametrize(
    ("journal", "trace", "violation"),
    [
        ([*CALM[:-1], snapshot(9, "end", "queued")], CALM_TRACE, "w is lost: queued"),
        (CALM[:-1], CALM_TRACE, "w is lost: None"),
        ([*CALM[:-1], snapshot(9, "boot", "active"), CALM[-1]], CALM_TRACE, "then forgotten"),
        (
            [durable(1, "ack", A), snapshot(2, "boot", "queued", acked=False), *CALM],
            CALM_TRACE,
            "answered ['ack'], then forgotten",
        ),
        ([*HANDED_ON, came(13, "stop", A), *END], [], f"{A} sent stop for w 3.00 s after"),
        ([*HANDED_ON, came(13, "update", A), *END], [], f"{A} sent update for w 3.00 s after"),
        ([*HANDED_ON, came(13, "heartbeat", A), *END], [], f"{A} sent heartbeat for w 3.00 s"),
        ([*held(0, A), came(1, "stop", B), *CALM], [], f"{B} sent stop for w, which it never held"),
        (CALM, [ran(0.5, 1, "start"), ran(7, 1, "returned")], f"{A} ran w without a lease"),
        (
            [*HANDED_ON, *END],
            [ran(11.5, 1, "start"), ran(11.6, 1, "returned")],
            f"{A} began w 1.50 s after its lease",
        ),
        (
            [*HANDED_ON, *END],
            [ran(1, 1, "start"), ran(13, 1, "cancelled")],
            f"{A} went on with w for 2.00 s too long",
        ),
        (
            [*HANDED_ON, *END],
            [
                ran(1, 1, "start"),
                ran(12.5, 2, "start"),
                ran(14, 2, "returned"),
                ran(15, 1, "raised"),
            ],
            f"w was run by {A} and {B} at once for 1.50 s",
        ),
    ],
)
def test_judge_reports_each_kind_of_violation(journal: Lines, trace: Lines, violation: str) -> None:
    found = judged(journal, trace).broken
    assert any(violation in text for text in found), found


def test_judge_excuses_late_request_by_measured_lag() -> None:
    journal = [*HANDED_ON, came(12.5, "update", A), *END]
    assert judged(journal, []).broken
    assert judged([*journal, {"t": 12.6, "what": "lag", "seconds": 2.0}], []).broken == []
    assert judged([*journal, {"t": 22.6, "what": "lag", "seconds": 2.0}], []).broken


def test_judge_accepts_stops_of_operators_and_late_acks() -> None:
    journal = [*HANDED_ON, came(13, "stop", None), came(14, "ack", A), *END]
    assert judged(journal, []).broken == []


WOKEN = [ran(1, 1, "start"), ran(12.5, 2, "start"), ran(14, 2, "returned")]
STOP = [{"t": 2, "what": "stop", "pid": 1}, {"t": 16, "what": "cont", "pid": 1}]


def test_judge_lets_suspended_process_end_its_handler_after_it_resumes() -> None:
    verdict = judged([*HANDED_ON, *END], [*WOKEN, ran(16.1, 1, "cancelled")], STOP)
    assert verdict.broken == []
    assert verdict.counts["runs whose lease ended while stopped"] == 1
    assert verdict.counts["overlaps excused: process was stopped"] == 1
    late = judged([*HANDED_ON, *END], [*WOKEN, ran(16.1 + WAKE_SECONDS, 1, "cancelled")], STOP)
    assert any("went on with w" in text for text in late.broken)
    sent = judged([*HANDED_ON, came(16.1, "update", A), *END], WOKEN, STOP)
    assert any("sent update" in text for text in sent.broken)


def test_judge_reports_run_of_lost_lease_unless_its_process_was_killed() -> None:
    kill = [{"t": 5, "what": "kill", "pid": 1}]
    assert judged([*HANDED_ON, *END], WOKEN, kill).broken == []
    assert judged([*HANDED_ON, *END], WOKEN, []).broken


def test_judge_allows_run_until_original_end_of_lease_that_expired_early() -> None:
    fault = {"t": 3, "what": "fault", "kind": "expired", "work_id": "w"}
    handed_on = [*held(0, A), fault, record(3, "lapsed", A), *held(4, B), *END]
    trace = [ran(1, 1, "start"), ran(5, 2, "start"), ran(6, 2, "returned")]
    verdict = judged(handed_on, [*trace, ran(9, 1, "cancelled")])
    assert verdict.broken == []
    assert verdict.counts["overlaps excused: lease expired by a fault"] == 1
    assert judged(handed_on, [*trace, ran(12, 1, "cancelled")]).broken
