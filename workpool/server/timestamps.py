"""Times of the control plane: whole microseconds since the epoch, in UTC.

They are integers, so that a lease ends exactly `ttl_seconds` after its heartbeat, and the text of a
heartbeat stands for one time only.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

SECOND: Final = 1_000_000
MILLISECOND: Final = 1_000

_RFC3339: Final = re.compile(
    r"(\d{4}-\d{2}-\d{2})[Tt](\d{2}:\d{2}:)(\d{2})(?:\.\d+)?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)
_HEARTBEAT_TEXT: Final = re.compile(r"(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2})\.(\d{6})Z", re.ASCII)
_LEAP_SECOND: Final = "60"


def make_system_clock() -> Callable[[], float]:
    """Return a clock in epoch seconds: the current wall time, advanced by a monotonic clock.

    A wall clock that is set forward would end every lease at once while the workers, which use
    monotonic clocks, still hold them. CLOCK_BOOTTIME also counts the time of a suspension.
    """
    monotonic_seconds = time.monotonic
    if hasattr(time, "CLOCK_BOOTTIME"):

        def monotonic_seconds() -> float:
            return time.clock_gettime(time.CLOCK_BOOTTIME)

    start = datetime.now(UTC).timestamp() - monotonic_seconds()
    return lambda: start + monotonic_seconds()


@lru_cache(maxsize=4096)
def _format_utc_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def format_time_with_whole_seconds(instant: int) -> str:
    """Return a time as RFC 3339 with whole seconds."""
    return _format_utc_second(instant // SECOND) + "Z"


def format_heartbeat_time(instant: int) -> str:
    """Return a time as RFC 3339 with microseconds, the form of heartbeat times."""
    seconds, microseconds = divmod(instant, SECOND)
    return f"{_format_utc_second(seconds)}.{microseconds:06d}Z"


def parse_heartbeat_time(text: str) -> int | None:
    """Parse a text that `format_heartbeat_time` can return; None for any other text."""
    match = _HEARTBEAT_TEXT.fullmatch(text)
    if match is None:
        return None
    seconds, microseconds = match.groups()
    try:
        moment = datetime.fromisoformat(seconds + "+00:00")
    except ValueError:
        return None
    return int(moment.timestamp()) * SECOND + int(microseconds)


def is_rfc3339(text: str) -> bool:
    """Return whether `text` is an RFC 3339 time, which may have the leap second 60."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        return False
    day, minute, second = match.groups()
    try:
        datetime.fromisoformat(f"{day}T{minute}{'59' if second == _LEAP_SECOND else second}")
    except ValueError:
        return False
    return True


def to_utc_text(text: str) -> str | None:
    """Convert an RFC 3339 time to the form of `format_heartbeat_time`; None: a malformed time."""
    if not is_rfc3339(text):
        return None
    try:
        moment = datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        return None  # RFC 3339 allows leap seconds and the year 0, `datetime` does not
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(len("2026-03-01T12:00:00.000000Z"), "0")


class TimeRange(NamedTuple):
    """Bounds of a time range, as texts that `format_heartbeat_time` returns; None: no bound."""

    gt: str | None = None
    gte: str | None = None
    lt: str | None = None
    lte: str | None = None

    def contains(self, time: str) -> bool:
        """Return whether `time` is within all bounds."""
        return (
            (self.gt is None or time > self.gt)
            and (self.gte is None or time >= self.gte)
            and (self.lt is None or time < self.lt)
            and (self.lte is None or time <= self.lte)
        )
