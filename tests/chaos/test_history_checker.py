"""Tests that the check of a recorded history finds each kind of violation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.chaos.history_checker import find_history_violations
from workpool.server import Record

if TYPE_CHECKING:
    from workpool.server.history import Kind
    from workpool.wire.protocol import State

A, B = "one-aaaaaaaa", "two-bbbbbbbb"


def make_record(
    time: float, kind: Kind, worker: str | None, state: State, lease_end: float | None = None
) -> Record:
    return Record(time, "w", kind, worker, state, lease_end)


def make_lease_records(time: float, worker: str) -> list[Record]:
    """Return the records of a delivery, of an ack, and of a heartbeat with a lease of 10 s."""
    return [
        make_record(time, "delivered", worker, "queued"),
        make_record(time, "acked", worker, "starting", time + 60),
        make_record(time, "heartbeat", worker, "active", time + 10),
    ]


CREATED = make_record(0, "created", None, "queued")
LAPSED = make_record(11, "lapsed", A, "queued")
STOPPED = make_record(20, "stopped", B, "stopped")
VALID = [CREATED, *make_lease_records(1, A), LAPSED, *make_lease_records(12, B), STOPPED]


def test_history_checker_finds_no_violation_in_valid_history() -> None:
    conflict = Record(21, "w", "conflict", A, "stopped", None, "heartbeat")
    assert list(find_history_violations([*VALID, conflict])) == []
    assert list(find_history_violations([*VALID[:-1], conflict, STOPPED])) == []


@pytest.mark.parametrize(
    ("history", "violation"),
    [
        (VALID[:-1], "w is not stopped"),
        (VALID[1:], "w was not created once"),
        ([CREATED, *VALID], "w was not created once"),
        (
            [CREATED, *make_lease_records(1, A), *make_lease_records(5, B), STOPPED],
            f"w was held by {A} until",
        ),
        ([*VALID, STOPPED], "w was stopped 2 times"),
        ([*VALID, *make_lease_records(21, A)], "delivered after its stop"),
        (
            [CREATED, *make_lease_records(5, A), make_record(4, "stopped", A, "stopped")],
            "stopped at 4.000000 after",
        ),
    ],
)
def test_history_checker_reports_each_kind_of_violation(
    history: list[Record], violation: str
) -> None:
    found = list(find_history_violations(history))
    assert any(violation in text for text in found), found
