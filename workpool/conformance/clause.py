"""The clauses of the protocol: name, rule and check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.conformance.trial import Trial

Check: TypeAlias = "Callable[[Trial], Awaitable[None]]"
When: TypeAlias = Literal["together", "last"]


@dataclass(frozen=True, slots=True)
class Clause:
    """One clause of the protocol.

    Attributes:
        name: The name on the protocol page.
        rule: The rule in one sentence.
        check: Raises a `DepartureError` unless the rule holds.
        when: "last": checked alone after all others, with an empty queue.
    """

    name: str
    rule: str
    check: Check
    when: When


def clause(name: str, rule: str, *, when: When = "together") -> Callable[[Check], Clause]:
    """Turn a coroutine function into the clause that it checks."""
    return lambda check: Clause(name, rule, check, when)
