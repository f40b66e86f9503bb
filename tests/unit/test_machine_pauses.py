"""The lease clock, which also counts while the machine sleeps, and the detection of pauses."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from tests.manual_clock import ManualClock
from workpool.pool.machine_pauses import (
    PAUSE_SECONDS,
    MachinePauseDetector,
    choose_suspend_aware_clock,
    lease_clock,
)


def test_lease_clock_is_monotonic_across_threads() -> None:
    seen = [lease_clock()]
    thread = threading.Thread(target=lambda: seen.append(lease_clock()))
    thread.start()
    thread.join()
    seen.append(lease_clock())
    assert seen == sorted(seen)
    assert seen[-1] - seen[0] < 30


@pytest.mark.skipif(
    not hasattr(time, "CLOCK_BOOTTIME"), reason="this platform has no CLOCK_BOOTTIME"
)
def test_lease_clock_includes_time_of_machine_sleep_on_linux(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "clock_gettime", float)
    assert choose_suspend_aware_clock()() == float(time.CLOCK_BOOTTIME)


def test_lease_clock_counts_sleep_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS `time.monotonic` stands still while the machine sleeps."""
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(time, "clock_gettime", float)
    assert choose_suspend_aware_clock()() == float(time.CLOCK_MONOTONIC)


def test_lease_clock_is_time_monotonic_on_platforms_other_than_linux_and_macos(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    before = time.monotonic()
    assert before <= choose_suspend_aware_clock()() <= time.monotonic()


@pytest.mark.parametrize(
    ("lease", "wall", "paused"),
    [
        (0, 0, False),
        (3_600, 3_600, False),  # Both clocks count the time for which the machine sleeps.
        # A jump below PAUSE_SECONDS counts as a correction of the wall clock, not as a pause.
        (0, 1.9, False),
        (0, -1.9, False),
        (0, PAUSE_SECONDS, True),
        (5, 5 + PAUSE_SECONDS, True),
        (0, 86_400, True),
        # After a restore from a snapshot, a machine's wall clock may jump back.
        (0, -PAUSE_SECONDS, True),
    ],
)
def test_wall_clock_jump_relative_to_lease_clock_counts_as_machine_pause(
    lease: float, wall: float, *, paused: bool
) -> None:
    clock, wall_clock = ManualClock(100.0), ManualClock(1_772_366_400.0)
    detector = MachinePauseDetector(clock, wall_clock)
    before = detector.wall_clock_offset()
    clock.advance(lease)
    wall_clock.advance(wall)
    assert detector.was_machine_paused(since=before) == paused
