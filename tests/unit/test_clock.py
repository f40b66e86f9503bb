"""The lease clock: monotonic, the same on every thread, and running while the machine sleeps."""

from __future__ import annotations

import importlib
import threading
import time
from typing import TYPE_CHECKING

import pytest

from workpool.pool import clock

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def reloaded() -> Iterator[None]:
    yield
    importlib.reload(clock)


def test_it_never_goes_back_and_both_threads_read_the_same_one() -> None:
    seen = [clock.lease_clock()]
    thread = threading.Thread(target=lambda: seen.append(clock.lease_clock()))
    thread.start()
    thread.join()
    seen.append(clock.lease_clock())
    assert seen == sorted(seen)
    assert seen[-1] - seen[0] < 30


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux has it")
def test_sleep_of_the_machine_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "clock_gettime", float)
    assert clock.lease_clock() == float(time.CLOCK_BOOTTIME)


@pytest.mark.usefixtures("reloaded")
def test_without_such_a_clock_the_platforms_monotonic_one_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    importlib.reload(clock)
    before = time.monotonic()
    assert before <= clock.lease_clock() <= time.monotonic()
