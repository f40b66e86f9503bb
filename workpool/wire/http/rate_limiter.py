"""A client's own rate limits: a token bucket for reads and one for writes.

Clients on several event loops, and so on several threads, may share a limiter: a lock guards its
state and is never held across an await. An unlimited limiter (`limited` is False) is never used.

Calls that wait are served by priority: completions first; claims and the calls of handlers take
turns after that; calls of one priority in the order in which they came.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from workpool.wire.http.call_options import Priority

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["read", "write"]
BURST_SECONDS: Final = 0.25
"""The part of a second's requests that may be sent at once after a quiet time."""
_DEBT_SHARE: Final = 0.75
_RECHECK_SECONDS: Final = 1.0
"""The longest single wait, so that a waiter whose thread ended cannot block the others for good."""
_NEXT_TURN: Final = {Priority.CLAIM: Priority.HANDLER, Priority.HANDLER: Priority.CLAIM}


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    """A call that waits for a token.

    Attributes:
        priority: The priority of the call.
        loop: The event loop of the call.
        moved: Set on `loop` when the call should try again to take a token.
    """

    priority: Priority
    loop: asyncio.AbstractEventLoop
    moved: asyncio.Event


class _WaiterQueue:
    """The calls that wait for a token, by priority. Callers must hold the limiter's lock."""

    def __init__(self) -> None:
        self._waiters: dict[Priority, deque[_Waiter]] = {each: deque() for each in Priority}
        self._turn = Priority.CLAIM

    def add_waiter(self, waiter: _Waiter) -> None:
        self._waiters[waiter.priority].append(waiter)

    def discard_waiter(self, waiter: _Waiter) -> None:
        # If the waiter's loop is closed, `find_first_waiter` may have removed the waiter already.
        with suppress(ValueError):
            self._waiters[waiter.priority].remove(waiter)

    def find_first_waiter(self) -> _Waiter | None:
        """Return the waiter that is served next."""
        for priority in (Priority.COMPLETION, self._turn, _NEXT_TURN[self._turn]):
            waiters = self._waiters[priority]
            while waiters and waiters[0].loop.is_closed():
                waiters.popleft()
            if waiters:
                return waiters[0]
        return None

    def new_call_must_wait(self, priority: Priority) -> bool:
        """Return whether a new call of this priority must wait behind a call that waits already."""
        first = self.find_first_waiter()
        return first is not None and (priority, first.priority) not in _OVERTAKES

    def remove_served_waiter(self, waiter: _Waiter) -> None:
        """Remove a waiter that got its token, and choose the priority that is served next.

        Claims and the calls of handlers take turns.
        """
        self.discard_waiter(waiter)
        self._turn = _NEXT_TURN.get(waiter.priority, self._turn)


_OVERTAKES: Final = {(Priority.COMPLETION, other) for other in _NEXT_TURN}


class RateLimiter:
    """A token bucket that fills with `rate` tokens per second; one request takes one token.

    Heartbeats never wait, even if no token is left. The tokens that they overdraw are then
    subtracted from the new tokens, but at most three quarters of these: the last quarter is left
    for all other calls, completions first.

    Args:
        kind: The kind of requests, for observers.
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
        # Read and write the next four attributes only while the lock is held.
        self._tokens = self._burst
        self._debt = 0.0
        self._filled_at = clock()
        self._line = _WaiterQueue()

    def try_acquire(self, priority: Priority = Priority.HANDLER) -> bool:
        """Take a token and return True, or return False if the call would have to wait."""
        with self._lock:
            return not self._line.new_call_must_wait(priority) and self._take_token() == 0

    async def acquire(self, priority: Priority = Priority.HANDLER) -> None:
        """Take a token. If none is left, wait for one in the order of the priorities.

        A cancelled call takes no token.
        """
        waiter = _Waiter(priority, asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._line.add_waiter(waiter)
        try:
            # There is no await between the successful attempt and the return, so a cancellation
            # cannot lose the token.
            while delay := self._serve_waiter(waiter):
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await waiter.moved.wait()
                waiter.moved.clear()
        finally:
            with self._lock:
                self._line.discard_waiter(waiter)
            self._wake_first()

    def refund(self) -> None:
        """Return a token that was acquired and not used."""
        with self._lock:
            self._tokens = min(self._burst, self._tokens + 1)
        self._wake_first()

    def charge(self) -> None:
        """Count a heartbeat against the limit; it is sent at once even if no token is left."""
        with self._lock:
            self._add_tokens()
            # `_debt` is the number of tokens that heartbeats used and that are not subtracted yet.
            # It is at most the tokens of one second, so that many heartbeats at once do not delay
            # the other calls for long.
            self._debt = min(self._debt + 1, max(1.0, self.rate))

    def _serve_waiter(self, waiter: _Waiter) -> float:
        """Try to take a token for `waiter`; possible only if `waiter` is the first in line.

        Returns 0 if a token was taken, else the seconds until `waiter` should try again.
        """
        with self._lock:
            first = self._line.find_first_waiter()
            if first is not waiter:
                return _RECHECK_SECONDS
            delay = self._take_token()
            if delay == 0:
                self._line.remove_served_waiter(waiter)
            return min(delay, _RECHECK_SECONDS)

    def _take_token(self) -> float:
        """Take a token and return 0. If none is left, return the seconds until the next one."""
        self._add_tokens()
        missing = 1 - self._tokens
        if missing <= 0:
            self._tokens -= 1
            return 0.0
        # While `_debt` is positive, heartbeats use three quarters of the new tokens, which reduces
        # `_debt`; one quarter is left for this call. Wait at least a millisecond, the resolution of
        # timers.
        return max(0.001, min(missing / (1 - _DEBT_SHARE), missing + self._debt) / self.rate)

    def _add_tokens(self) -> None:
        now = self._clock()
        grown = max(0.0, now - self._filled_at) * self.rate
        self._filled_at = now
        paid = min(self._debt, grown * _DEBT_SHARE)
        self._debt -= paid
        self._tokens = min(self._burst, self._tokens + grown - paid)

    def _wake_first(self) -> None:
        with self._lock:
            first = self._line.find_first_waiter()
        if first is not None:
            # A RuntimeError means that the waiter's loop is closed; `find_first_waiter` removes
            # such a waiter.
            with suppress(RuntimeError):
                first.loop.call_soon_threadsafe(first.moved.set)


class RateLimits:
    """Limits the requests per second of one account. Thread-safe.

    Give the same object to all clients and supervisors of the account, even on different event
    loops and threads.

    Args:
        read_rate: Reads per second; 0 = unlimited.
        write_rate: Writes per second; 0 = unlimited.
    """

    def __init__(self, read_rate: float, write_rate: float) -> None:
        self.read = RateLimiter("read", read_rate)
        self.write = RateLimiter("write", write_rate)
