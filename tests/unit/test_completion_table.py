"""The completion of a session for each end reason, its error text in metadata, its outcome."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest

from workpool import Release
from workpool.pool.completion import (
    NOTE_LIMIT,
    RELEASE_DELAY_SECONDS,
    TABLE,
    find_completion_actions,
    find_outcome_of_expired_lease,
    find_release_exception,
    make_metadata_text,
    read_release_delay_seconds,
    str_without_raising,
)
from workpool.pool.pool_item import EndReason

# The documented table, copied literally and in its order, because a session with several end
# reasons uses the one that is lowest in the table.
COPY = [
    ("RETURNED", "stop", "result", "completed"),
    ("RAISED", "stop", "error", "failed"),
    ("TIMED_OUT", "stop", "error", "timed_out"),
    ("STALLED", "stop", "error", "stalled"),
    ("DRAINED", "release", "reason", "released"),
    ("RELEASED", "release", "reason", "released"),
    ("STOP_REQUESTED", "stop", "result", "stopped"),
    ("HANDED_OFF", "untouched", "none", "detached"),
    ("STOPPED", "untouched", "none", "stopped"),
    ("LOST", "untouched", "none", "lease_lost"),
]


class StandInWithGivenAttributes:
    """A stand-in for an ended item, or for its lease, with only the given attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.id = "work_1"
        self.__dict__.update(attributes)


def test_completion_table_equals_documented_table() -> None:
    assert [
        (reason.name, row.item, row.metadata, row.outcome) for reason, row in TABLE.items()
    ] == COPY
    assert set(TABLE) == set(EndReason)


@pytest.mark.parametrize("pair", list(combinations([row[0] for row in COPY], 2)))
def test_end_reason_in_later_row_of_completion_table_outranks_earlier_ones(
    pair: tuple[str, str],
) -> None:
    upper, lower = pair
    assert max(EndReason[upper], EndReason[lower]) is EndReason[lower]


@pytest.mark.parametrize("reason", list(EndReason))
def test_each_end_reason_selects_its_own_row_of_completion_table(reason: EndReason) -> None:
    item: Any = StandInWithGivenAttributes(end_reason=reason)
    assert find_completion_actions(item) is TABLE[reason]


def test_completion_of_session_without_end_reason_raises_runtime_error() -> None:
    item: Any = StandInWithGivenAttributes(end_reason=None)
    with pytest.raises(RuntimeError, match="nothing ends"):
        find_completion_actions(item)


@pytest.mark.parametrize(
    ("status", "stop_requested", "outcome"),
    [
        ("handed_off", False, "detached"),
        ("handed_off", True, "detached"),
        ("stopped", False, "stopped"),
        ("released", True, "stopped"),
        ("lost", True, "stopped"),
        ("released", False, "released"),
        ("lost", False, "released"),
        ("held", False, "released"),
    ],
)
def test_outcome_of_session_depends_on_lease_status_and_stop_request(
    status: str, outcome: str, *, stop_requested: bool
) -> None:
    lease: Any = StandInWithGivenAttributes(status=status, stop_requested=stop_requested)
    assert find_outcome_of_expired_lease(lease) == outcome


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("", ""),
        ("short", "short"),
        ("x" * 512, "x" * 512),
        ("x" * 513, "x" * 512),
        ("☃" * 600, "☃" * 512),
        ("a\ud800b", "a?b"),
    ],
)
def test_error_text_in_metadata_is_shortened_to_512_valid_unicode_characters(
    text: str, note: str
) -> None:
    assert NOTE_LIMIT == 512
    assert make_metadata_text(text) == note


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


def test_safe_str_returns_text_for_error_whose_str_method_fails() -> None:
    assert str_without_raising(ValueError("why")) == "why"
    assert "UnprintableError" not in str_without_raising("reason")
    assert isinstance(str_without_raising(UnprintableError()), str)


@pytest.mark.parametrize(
    ("delay", "seconds"),
    [(0, 0), (12.5, 12.5), (math.inf, math.inf), (math.nan, 10), ("5", 10), (None, 10)],
)
def test_invalid_release_delay_is_replaced_by_default(delay: Any, seconds: float) -> None:
    assert RELEASE_DELAY_SECONDS == 10
    release = Release("why")
    release.delay = delay
    assert read_release_delay_seconds(release) == seconds


def test_exception_group_of_release_exceptions_counts_as_the_one_with_longest_delay() -> None:
    short, long = Release("short", 11), Release("long", 19)
    assert find_release_exception(short) is short
    assert find_release_exception(ExceptionGroup("g", [short, ExceptionGroup("g", [long])])) is long


def test_exception_group_of_release_and_other_exceptions_counts_as_no_release() -> None:
    assert find_release_exception(ValueError()) is None
    assert (
        find_release_exception(
            ExceptionGroup("g", [Release(), ExceptionGroup("g", [ValueError()])])
        )
        is None
    )


def test_release_exception_in_deeply_nested_exception_group_is_recognised() -> None:
    error: Exception = Release("deep")
    innermost = error
    for _ in range(5_000):
        error = ExceptionGroup("g", [error])
    assert find_release_exception(error) is innermost
    # Free the nested groups one by one. To free them all at once, Python would recurse 5,000 times.
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
