"""Tests that the storm's checker finds each kind of violation, and none in a valid trace."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos.storm_checker import WAKE_SECONDS, StormChecker, StormResult

A, B = "one-aaaaaaaa", "two-bbbbbbbb"
WORKERS = {1: A, 2: B}
SLACK = 1.0
Lines = list[dict[str, Any]]


def make_history_record(
    t: float, kind: str, worker: str | None, lease_end: float | None = None
) -> Any:
    return {
        "t": t,
        "what": "record",
        "time": t,
        "work_id": "w",
        "kind": kind,
        "worker_id": worker,
        "lease_end": lease_end,
    }


def make_arrived_request(t: float, op: str, worker: str | None) -> Any:
    return {"t": t, "what": "came", "op": op, "work_id": "w", "worker": worker}


def make_answered_call(t: float, op: str, worker: str) -> Any:
    return {"t": t, "what": "durable", "op": op, "work_id": "w", "worker": worker}


def make_snapshot(t: float, what: str, state: str = "stopped", *, acked: bool = True) -> Any:
    return {"t": t, "what": what, "items": [["w", state, None, None, acked, acked]]}


def make_trace_line(t: float, pid: int, what: str) -> Any:
    return {"t": t, "what": what, "pid": pid, "work_id": "w"}


def make_lease_records(t: float, worker: str) -> Lines:
    """Return the records of an ack with a lease of 60 s and of a heartbeat with a lease of 10 s."""
    return [
        make_history_record(t, "acked", worker, t + 60),
        make_history_record(t, "heartbeat", worker, t + 10),
    ]


STOPPED = [
    make_arrived_request(8, "stop", A),
    make_history_record(8, "stopped", A),
    make_answered_call(8, "stop", A),
]
CALM = [
    make_history_record(0, "created", None),
    *make_lease_records(1, A),
    *STOPPED,
    make_snapshot(9, "end"),
]
CALM_TRACE = [make_trace_line(2, 1, "start"), make_trace_line(7, 1, "returned")]
LEASE_PASSED_TO_B = [
    *make_lease_records(0, A),
    make_history_record(10, "lapsed", A),
    *make_lease_records(12, B),
]
END = [make_history_record(15, "stopped", B), make_snapshot(30, "end")]


def check_storm_records(journal: Lines, trace: Lines, actions: Lines | None = None) -> StormResult:
    return StormChecker(journal, trace, actions or [], WORKERS, slack=SLACK).check_storm(["w"])


def test_storm_checker_finds_no_violation_in_trace_without_faults() -> None:
    verdict = check_storm_records(CALM, CALM_TRACE)
    assert verdict.broken == []
    assert verdict.counts["runs"] == verdict.counts["enqueued"] == verdict.counts["stopped"] == 1


@pytest.mark.parametrize(
    ("journal", "trace", "violation"),
    [
        ([*CALM[:-1], make_snapshot(9, "end", "queued")], CALM_TRACE, "w is lost: queued"),
        (CALM[:-1], CALM_TRACE, "w is lost: None"),
        ([*CALM[:-1], make_snapshot(9, "boot", "active"), CALM[-1]], CALM_TRACE, "then forgotten"),
        (
            [
                make_answered_call(1, "ack", A),
                make_snapshot(2, "boot", "queued", acked=False),
                *CALM,
            ],
            CALM_TRACE,
            "answered ['ack'], then forgotten",
        ),
        (
            [*LEASE_PASSED_TO_B, make_arrived_request(13, "stop", A), *END],
            [],
            f"{A} sent stop for w 3.00 s after",
        ),
        (
            [*LEASE_PASSED_TO_B, make_arrived_request(13, "update", A), *END],
            [],
            f"{A} sent update for w 3.00 s after",
        ),
        (
            [*LEASE_PASSED_TO_B, make_arrived_request(13, "heartbeat", A), *END],
            [],
            f"{A} sent heartbeat for w 3.00 s",
        ),
        (
            [*make_lease_records(0, A), make_arrived_request(1, "stop", B), *CALM],
            [],
            f"{B} sent stop for w, which it never held",
        ),
        (
            CALM,
            [make_trace_line(0.5, 1, "start"), make_trace_line(7, 1, "returned")],
            f"{A} ran w without a lease",
        ),
        (
            [*LEASE_PASSED_TO_B, *END],
            [make_trace_line(11.5, 1, "start"), make_trace_line(11.6, 1, "returned")],
            f"{A} began w 1.50 s after its lease",
        ),
        (
            [*LEASE_PASSED_TO_B, *END],
            [make_trace_line(1, 1, "start"), make_trace_line(13, 1, "cancelled")],
            f"{A} went on with w for 2.00 s too long",
        ),
        (
            [*LEASE_PASSED_TO_B, *END],
            [
                make_trace_line(1, 1, "start"),
                make_trace_line(12.5, 2, "start"),
                make_trace_line(14, 2, "returned"),
                make_trace_line(15, 1, "raised"),
            ],
            f"w was run by {A} and {B} at once for 1.50 s",
        ),
    ],
)
def test_storm_checker_reports_each_kind_of_violation(
    journal: Lines, trace: Lines, violation: str
) -> None:
    found = check_storm_records(journal, trace).broken
    assert any(violation in text for text in found), found


def test_storm_checker_accepts_late_request_if_event_loop_was_delayed() -> None:
    journal = [*LEASE_PASSED_TO_B, make_arrived_request(12.5, "update", A), *END]
    assert check_storm_records(journal, []).broken
    assert (
        check_storm_records([*journal, {"t": 12.6, "what": "lag", "seconds": 2.0}], []).broken == []
    )
    assert check_storm_records([*journal, {"t": 22.6, "what": "lag", "seconds": 2.0}], []).broken


def test_storm_checker_accepts_request_that_the_database_clock_dates_before_its_ack() -> None:
    early, too_early = (make_arrived_request(t, "heartbeat", A) for t in (0.96, 0.9))
    assert check_storm_records([early, *CALM], CALM_TRACE).broken == []
    found = check_storm_records([too_early, *CALM], CALM_TRACE).broken
    assert found == [f"{A} sent heartbeat for w, which it never held"]


def test_storm_checker_accepts_ack_without_lease_and_stop_request_of_operator() -> None:
    journal = [
        *LEASE_PASSED_TO_B,
        make_arrived_request(13, "stop", None),
        make_arrived_request(14, "ack", A),
        *END,
    ]
    assert check_storm_records(journal, []).broken == []


WOKEN = [
    make_trace_line(1, 1, "start"),
    make_trace_line(12.5, 2, "start"),
    make_trace_line(14, 2, "returned"),
]
STOP = [{"t": 2, "what": "stop", "pid": 1}, {"t": 16, "what": "cont", "pid": 1}]


def test_storm_checker_allows_resumed_process_a_short_time_to_end_its_run() -> None:
    verdict = check_storm_records(
        [*LEASE_PASSED_TO_B, *END], [*WOKEN, make_trace_line(16.1, 1, "cancelled")], STOP
    )
    assert verdict.broken == []
    assert verdict.counts["runs whose lease ended while stopped"] == 1
    assert verdict.counts["overlaps excused: process was stopped"] == 1
    late = check_storm_records(
        [*LEASE_PASSED_TO_B, *END],
        [*WOKEN, make_trace_line(16.1 + WAKE_SECONDS, 1, "cancelled")],
        STOP,
    )
    assert any("went on with w" in text for text in late.broken)
    sent = check_storm_records(
        [*LEASE_PASSED_TO_B, make_arrived_request(16.1, "update", A), *END], WOKEN, STOP
    )
    assert any("sent update" in text for text in sent.broken)


def test_storm_checker_reports_handler_run_after_lease_end_unless_worker_was_killed() -> None:
    kill = [{"t": 5, "what": "kill", "pid": 1}]
    assert check_storm_records([*LEASE_PASSED_TO_B, *END], WOKEN, kill).broken == []
    assert check_storm_records([*LEASE_PASSED_TO_B, *END], WOKEN, []).broken


def test_storm_checker_accepts_lease_that_an_injected_fault_ended_early() -> None:
    fault = {"t": 3, "what": "fault", "kind": "expired", "work_id": "w"}
    handed_on = [
        *make_lease_records(0, A),
        fault,
        make_history_record(3, "lapsed", A),
        *make_lease_records(4, B),
        *END,
    ]
    trace = [
        make_trace_line(1, 1, "start"),
        make_trace_line(5, 2, "start"),
        make_trace_line(6, 2, "returned"),
    ]
    verdict = check_storm_records(handed_on, [*trace, make_trace_line(9, 1, "cancelled")])
    assert verdict.broken == []
    assert verdict.counts["overlaps excused: lease expired by a fault"] == 1
    assert check_storm_records(handed_on, [*trace, make_trace_line(12, 1, "cancelled")]).broken
