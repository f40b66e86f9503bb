"""The lease clock counts sleep on every platform; a pause is a jump between the two clocks."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from workpool.pool import lease_clock
from workpool.pool.lease_clock import PAUSE_SECONDS, PauseDetector

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def reloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test change the platform before it loads the module again."""
    with monkeypatch.context() as changes:
        yield changes
    importlib.reload(lease_clock)


def test_lease_clock_never_goes_back_and_is_the_same_on_every_thread() -> None:
    seen = [lease_clock.lease_clock()]
    thread = threading.Thread(target=lambda: seen.append(lease_clock.lease_clock()))
    thread.start()
    thread.join()
    seen.append(lease_clock.lease_clock())
    assert seen == sorted(seen)
    assert seen[-1] - seen[0] < 30


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux has this clock")
def test_lease_clock_counts_sleep_on_linux(reloaded: pytest.MonkeyPatch) -> None:
    reloaded.setattr(time, "clock_gettime", float)
    importlib.reload(lease_clock)
    assert lease_clock.lease_clock() == float(time.CLOCK_BOOTTIME)


def test_lease_clock_counts_sleep_on_macos(reloaded: pytest.MonkeyPatch) -> None:
    """There `time.monotonic` stands still while the machine sleeps."""
    reloaded.delattr(time, "CLOCK_BOOTTIME", raising=False)
    reloaded.setattr(sys, "platform", "darwin")
    reloaded.setattr(time, "clock_gettime", float)
    importlib.reload(lease_clock)
    assert lease_clock.lease_clock() == float(time.CLOCK_MONOTONIC)


def test_lease_clock_of_other_platforms_is_the_monotonic_one(
    reloaded: pytest.MonkeyPatch,
) -> None:
    reloaded.delattr(time, "CLOCK_BOOTTIME", raising=False)
    reloaded.setattr(sys, "platform", "win32")
    importlib.reload(lease_clock)
    before = time.monotonic()
    assert before <= lease_clock.lease_clock() <= time.monotonic()


class Clocks:
    """A lease clock and a wall clock in hand."""

    def __init__(self) -> None:
        self.lease = 100.0
        self.wall = 1_772_366_400.0
        self.detector = PauseDetector(lambda: self.lease, lambda: self.wall)

    def paused_after(self, lease: float, wall: float) -> bool:
        """Move both clocks, and return whether that is a pause."""
        before = self.detector.offset()
        self.lease += lease
        self.wall += wall
        return self.detector.paused(since=before)


@pytest.mark.parametrize(
    ("lease", "wall", "paused"),
    [
        (0, 0, False),
        (3_600, 3_600, False),  # time that both count, sleep included
        (0, 1.9, False),  # a correction
        (0, -1.9, False),
        (0, PAUSE_SECONDS, True),
        (5, 5 + PAUSE_SECONDS, True),
        (0, 86_400, True),
        (0, -PAUSE_SECONDS, True),  # restored from a snapshot, with a wall clock that is behind
    ],
)
def test_pause_is_a_jump_of_the_wall_clock_against_the_lease_clock(
    lease: float, wall: float, *, paused: bool
) -> None:
    assert Clocks().paused_after(lease, wall) == paused
