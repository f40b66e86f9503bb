"""Helper that uses up the burst of a rate limiter."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workpool.wire.http.rate_limiter import RateLimiter


def acquire_all_tokens(limiter: RateLimiter) -> int:
    """Acquire as many tokens as possible right now, and return their number."""
    return next(count for count in range(10_000) if not limiter.try_acquire())
