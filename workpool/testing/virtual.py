"""Time travel: an event loop on which a day of waiting takes no time.

The loop's clock stands still while anything runs and jumps to the next timer when nothing does, so
a test is as fast as its work and the same on every machine. For code that waits on this loop alone:
what threads or sockets are about to bring is not waited for.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

P = ParamSpec("P")
T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose `time()` starts at 0 and moves by waiting only.

    Attributes:
        slept: Seconds for which the machine was suspended so far: this loop's clock and timers
            stood still meanwhile, as those of a real one do; `machine_time` went on.
        paused: Seconds for which the virtual machine was paused: only `wall_time` went on.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self.slept = self.paused = 0.0
        super().__init__(_Jumps(self._jump))
        # A timer is due this much early: after a month a float is too coarse for the default, and
        # one that is due exactly now would never be.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        """Return seconds of virtual time."""
        return self._now

    def machine_time(self) -> float:
        """Return virtual seconds with those of suspension: the clock that leases are on."""
        return self._now + self.slept

    def wall_time(self) -> float:
        """Return virtual seconds that go on whatever happens to the machine."""
        return self.machine_time() + self.paused

    def pause(self, seconds: float) -> None:
        """Pause the virtual machine."""
        self.paused += seconds

    def suspend(self, seconds: float) -> None:
        """Put the machine to sleep."""
        self.slept += seconds

    def _jump(self, seconds: float) -> None:
        self._now += seconds


class _Jumps(selectors.DefaultSelector):
    """A selector that lets time pass instead of waiting."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            # No timer is set, so nothing can happen: fail instead of waiting without end.
            raise RuntimeError("every task waits for something that no timer brings about")
        if not ready and timeout:
            self._jump(timeout)
        return ready


def run_virtual(main: Coroutine[object, object, T]) -> T:
    """Run `main` in virtual time, as `asyncio.run` does in real time.

    Raises:
        RuntimeError: `main` waits for something that nothing on its loop can bring about.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def in_virtual_time(test: Callable[P, Coroutine[object, object, T]]) -> Callable[P, T]:
    """Make an `async def` test one that runs in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_virtual(test(*args, **kwargs))

    return run
