"""All clauses, one module for each part of the protocol page."""

from typing import Final

from workpool.conformance.clause import Clause
from workpool.conformance.clauses import (
    acks,
    conventions,
    delivery,
    heartbeats,
    leases,
    reading,
    stops,
    talking,
)

_PARTS: Final = (conventions, delivery, leases, acks, heartbeats, stops, reading, talking)

CLAUSES: Final[tuple[Clause, ...]] = tuple(
    each for part in _PARTS for each in vars(part).values() if isinstance(each, Clause)
)
"""All clauses in the order of the protocol page."""
