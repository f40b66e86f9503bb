"""The lease clock, which also counts while the machine sleeps, and the detection of pauses."""

from __future__ import annotations

import sys
import threading
import time

import pytest

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


def test_lease_clock_of_other_platforms_is_the_monotonic_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    before = time.monotonic()
    assert before <= choose_suspend_aware_clock()() <= time.monotonic()


class MovableLeaseAndWallClocks:
    """A lease clock and a wall clock that the test moves."""

    def __init__(self) -> None:
        self.lease = 100.0
        self.wall = 1_772_366_400.0
        self.detector = MachinePauseDetector(lambda: self.lease, lambda: self.wall)

    def move_clocks_and_detect_pause(self, lease: float, wall: float) -> bool:
        """Move both clocks, and return whether the detector reports a pause."""
        before = self.detector.wall_clock_offset()
        self.lease += lease
        self.wall += wall
        return self.detector.was_machine_paused(since=before)


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
    assert MovableLeaseAndWallClocks().move_clocks_and_detect_pause(lease, wall) == paused
