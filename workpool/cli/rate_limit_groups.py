"""The rate limits that environments of one account share.

See workpool/docs/operating.md, "Several environments".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workpool.errors import SettingsError
from workpool.wire.http.rate_limiter import RateLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workpool.settings import Settings


def find_shared_rate_limits(environments: Sequence[Settings]) -> dict[str | None, RateLimits]:
    """Return the rate limits of each environment, by its id.

    Environments of one account get the same `RateLimits` object, so that they share its limits.

    Raises:
        SettingsError: Environments of one account have different limits, or a credential cannot be
            read.
    """
    groups: dict[object, list[Settings]] = {}
    problems: list[str] = []
    for each in environments:
        key = each.rate_limit_group or (each.base_url, each.read_token())
        groups.setdefault(key, []).append(each)
    found: dict[str | None, RateLimits] = {}
    for members in groups.values():
        for name in ("read", "write"):
            rates = {getattr(each, f"{name}_limit") for each in members}
            if len(rates) > 1:
                ids = ", ".join(str(each.environment_id) for each in members)
                origins = dict.fromkeys(each.origin_of(f"{name}_rate") for each in members)
                sources = ", ".join(origin for origin in origins if origin)
                problems.append(
                    f"{name}_rate: must be the same for {ids}, which share it (from {sources})"
                )
        limits = RateLimits(members[0].read_limit, members[0].write_limit)
        found |= {each.environment_id: limits for each in members}
    if problems:
        raise SettingsError(tuple(problems))
    return found
