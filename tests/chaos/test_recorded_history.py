"""The check of a recorded history: it finds each kind of violation, and none in a valid history."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.chaos.recorded_history import violations
from workpool.server import Record

if TYPE_CHECKING:
    from workpool.server.history import Kind
    from workpool.wire.protocol import State

A, B = "one-aaaaaaaa", "two-bbbbbbbb"


def record(
    time: float, kind: Kind, worker: str | None, state: State, lease_end: float | None = None
) -> Record:
    return Record(time, "w", kind, worker, state, lease_end)


def held(time: float, worker: str) -> list[Record]:
    """Return the records of a delivery, an ack and a heartbeat: a lease of ten seconds."""
    return [
        record(time, "delivered", worker, "queued"),
        record(time, "acked", worker, "starting", time + 60),
        record(time, "heartbeat", worker, "active", time + 10),
    ]


CREATED = record(0, "created", None, "queued")
LAPSED = record(11, "lapsed", A, "queued")
STOPPED = record(20, "stopped", B, "stopped")
VALID = [CREATED, *held(1, A), LAPSED, *held(12, B), STOPPED]


def test_valid_history_has_no_violation() -> None:
    conflict = Record(21, "w", "conflict", A, "stopped", None, "heartbeat")
    assert list(violations([*VALID, conflict])) == []


@pytest.mark.parametrize(
    ("history", "violation"),
    [
        (VALID[:-1], "w is not stopped"),
        (VALID[1:], "w was not created once"),
        ([CREATED, *VALID], "w was not created once"),
        ([CREATED, *held(1, A), *held(5, B), STOPPED], f"w was held by {A} until"),
        ([*VALID, STOPPED], "w was stopped 2 times"),
        ([*VALID, *held(21, A)], "delivered after its stop"),
        ([CREATED, *held(5, A), record(4, "stopped", A, "stopped")], "stopped at 4.000000 after"),
    ],
)
def test_violation_of_each_kind_is_reported(history: list[Record], violation: str) -> None:
    found = list(violations(history))
    assert any(violation in text for text in found), found
