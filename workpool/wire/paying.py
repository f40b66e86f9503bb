"""Requests that keep within our own rate limits (design §5): each waits for its token, then goes.

The wait counts against the caller's time. A request whose time is over is not sent.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TypeVar

from workpool.errors import TransientError
from workpool.wire import calls

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    import aiohttp
    from yarl import URL

    from workpool.wire.budget import Budget
    from workpool.wire.calls import Call
    from workpool.wire.transport import Transport

T = TypeVar("T")


class Paying:
    """A transport that is paid for.

    Args:
        transport: Sends what is paid.
        seconds: How long a request may take, where the caller says nothing else.
    """

    def __init__(self, transport: Transport, seconds: float) -> None:
        self._transport = transport
        self._seconds = seconds
        self.on_budget_wait: Callable[[str, float], None] | None = None
        """Told of each wait for our own rate limit: "read" or "write", seconds."""

    def bearing(self, token: str) -> Paying:
        """The same with a token of its own."""
        other = Paying(self._transport.bearing(token), self._seconds)
        other.on_budget_wait = self.on_budget_wait
        return other

    def send(
        self,
        call: Call[T],
        url: URL,
        timeout: float | None,
        budget: Budget | None,
        body: bytes | None = None,
    ) -> Coroutine[Any, Any, T]:
        """Send one request; `budget` None: it waits for nothing."""
        seconds = self._seconds if timeout is None else timeout
        if budget is None or not budget.limited:
            return self._transport.send(call, url, seconds, body)
        return self._paid(budget, call, url, seconds, body)

    async def open(
        self, url: URL, headers: Mapping[str, str], budget: Budget
    ) -> aiohttp.ClientResponse:
        """Open an event stream."""
        until = time.monotonic() + self._seconds
        await self.pay(budget, calls.STREAM, self._seconds)
        return await self._transport.open_stream(url, until - time.monotonic(), headers)

    async def pay(self, budget: Budget, op: str, seconds: float) -> None:
        """Take one token of our rate limit, waiting for it if need be.

        Raises:
            TransientError: `seconds` were not enough; nothing was sent.
        """
        if not budget.limited or budget.try_take():
            return
        started = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                await budget.take()
        except TimeoutError:
            problem = "waited too long for our own rate limit"
            raise TransientError(op, None, problem, reason="timeout") from None
        finally:
            if self.on_budget_wait is not None:
                self.on_budget_wait(budget.kind, time.monotonic() - started)

    async def _paid(
        self, budget: Budget, call: Call[T], url: URL, seconds: float, body: bytes | None
    ) -> T:
        until = time.monotonic() + seconds
        await self.pay(budget, call.op, seconds)
        return await self._transport.send(call, url, until - time.monotonic(), body)
