"""All clauses of the protocol. Each module has the clauses of one part of the protocol page."""

from typing import Final

from workpool.conformance.clause import Clause
from workpool.conformance.clauses import (
    acks,
    auth_and_errors,
    conversations,
    delivery,
    heartbeats,
    leases,
    optional_calls,
    stops,
)

_PARTS: Final = (
    auth_and_errors,
    delivery,
    leases,
    acks,
    heartbeats,
    stops,
    optional_calls,
    conversations,
)

CLAUSES: Final[tuple[Clause, ...]] = tuple(
    each for part in _PARTS for each in vars(part).values() if isinstance(each, Clause)
)
"""All clauses in the order of the protocol page."""
