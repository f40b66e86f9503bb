"""Our own rate limits: a token bucket for reads and one for writes (design §5).

A budget may be shared by the clients of two event loops, that is by two threads: a lock, held for
microseconds and never across an await, guards all that changes. Those who wait stand in one line
and are served in its order. An unlimited budget (`limited` is False) is never asked.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["read", "write"]
BURST_SECONDS: Final = 0.25
"""How much of a second's worth may be spent at once after a quiet time."""
_DEBT_SHARE: Final = 0.75
_RECHECK_SECONDS: Final = 1.0
"""Bounds every wait, so that a turn whose thread died cannot hold up the line for good."""


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """A place in the line; `moved` belongs to `loop` and is set there."""

    loop: asyncio.AbstractEventLoop
    moved: asyncio.Event


class Budget:
    """A token bucket that fills with `rate` tokens per second; one token pays for one request.

    Heartbeats must not wait, so they run up a debt instead, which is paid back out of at most three
    quarters of what comes in: the last quarter is for everybody else.

    Args:
        kind: What it limits, for observers.
        rate: Requests per second; 0 = unlimited.
        clock: Monotonic seconds, the same in all threads.
    """

    def __init__(
        self, kind: Kind, rate: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.kind = kind
        self.rate = rate
        self.limited = rate > 0
        self._clock = clock
        self._burst = max(1.0, rate * BURST_SECONDS)
        self._lock = threading.Lock()
        # The four below: only with the lock held.
        self._tokens = self._burst
        self._debt = 0.0
        self._filled_at = clock()
        self._line: deque[_Turn] = deque()

    def try_take(self) -> bool:
        """Take a token if there is one and nobody waits for it."""
        with self._lock:
            return not self._line and self._take() == 0

    async def take(self) -> None:
        """Take a token, waiting in line for it; a cancelled wait takes none."""
        turn = _Turn(asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._line.append(turn)
        try:
            # From the claim that succeeds to the return there is no await: a cancellation cannot
            # come between and lose the token.
            while delay := self._claim(turn):
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await turn.moved.wait()
                turn.moved.clear()
        finally:
            with self._lock, suppress(ValueError):
                self._line.remove(turn)
            self._wake_first()

    def give_back(self) -> None:
        """Return a token that was taken and not used."""
        with self._lock:
            self._tokens = min(self._burst, self._tokens + 1)
        self._wake_first()

    def debit(self) -> None:
        """Count a request that did not wait."""
        with self._lock:
            self._fill()
            # Bounded to a second's worth: a storm of heartbeats must not slow us down for long.
            self._debt = min(self._debt + 1, max(1.0, self.rate))

    def _claim(self, turn: _Turn) -> float:
        """Take a token if this turn is the first; else seconds until it is worth asking again."""
        with self._lock:
            # Only this turn's own coroutine leaves the line, unless its loop is gone.
            while self._line and self._line[0].loop.is_closed():
                self._line.popleft()
            if self._line and self._line[0] is not turn:
                return _RECHECK_SECONDS
            return min(self._take(), _RECHECK_SECONDS)

    def _take(self) -> float:
        """Take a token and return 0, or return seconds until there is one."""
        self._fill()
        missing = 1 - self._tokens
        if missing <= 0:
            self._tokens -= 1
            return 0.0
        # While there is debt, only a quarter of what comes in is ours. Never less than a
        # millisecond: a timer that fires a little early must not spin.
        return max(0.001, min(missing / (1 - _DEBT_SHARE), missing + self._debt) / self.rate)

    def _fill(self) -> None:
        now = self._clock()
        grown = max(0.0, now - self._filled_at) * self.rate
        self._filled_at = now
        paid = min(self._debt, grown * _DEBT_SHARE)
        self._debt -= paid
        self._tokens = min(self._burst, self._tokens + grown - paid)

    def _wake_first(self) -> None:
        with self._lock:
            first = self._line[0] if self._line else None
        if first is not None:
            with suppress(RuntimeError):  # its loop is closed; _claim drops it
                first.loop.call_soon_threadsafe(first.moved.set)


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a process may ask of one control plane; share it between clients of the same pool."""

    read: Budget
    write: Budget
