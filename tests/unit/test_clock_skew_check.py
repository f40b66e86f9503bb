"""`workpool check` compares the local clock with a `Date` header, which has whole seconds only."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from workpool.cli.check import check_clock_difference

DATE = "Sun, 01 Mar 2026 12:00:00 GMT"
THEN = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("offset", "request_seconds", "status"),
    [
        (0.0, 0.01, "ok"),
        (0.99, 0.01, "ok"),
        (5.9, 0.01, "ok"),
        (6.1, 0.01, "warn"),
        (-4.9, 0.01, "ok"),
        (-5.1, 0.01, "warn"),
        # The answer took 8 s, so up to 8 s of the offset may not be clock skew.
        (10.0, 8.0, "ok"),
        (3600.0, 0.01, "warn"),
    ],
)
def test_clock_skew_beyond_five_seconds_is_a_warning(
    offset: float, request_seconds: float, status: str
) -> None:
    found = check_clock_difference(DATE, THEN + timedelta(seconds=offset), request_seconds)
    assert found.status == status
    assert found.exit == 0


def test_clock_skew_message_says_whether_local_clock_is_behind_or_ahead() -> None:
    assert "60 s behind" in check_clock_difference(DATE, THEN - timedelta(seconds=60), 0.0).message
    assert "ahead of" in check_clock_difference(DATE, THEN + timedelta(seconds=60), 0.0).message


@pytest.mark.parametrize("date", ["yesterday", "Sun, 01 Mar 2026 12:00:00 -0000"])
def test_date_header_without_valid_time_is_reported_as_no_date(date: str) -> None:
    assert "no date" in check_clock_difference(date, THEN, 0.0).message
