"""A clause of the protocol: its name, its rule and the function that checks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.conformance.clause_trial import ClauseTrial

Check: TypeAlias = "Callable[[ClauseTrial], Awaitable[None]]"
When: TypeAlias = Literal["together", "last"]


@dataclass(frozen=True, slots=True)
class Clause:
    """One clause (rule) of the protocol, with the function that checks it.

    Attributes:
        name: The name on the protocol page.
        rule: The rule in one sentence.
        check: Raises a `ClauseNotConfirmedError` unless the rule holds.
        when: "last": the clause is checked alone after all other clauses, with an empty queue.
    """

    name: str
    rule: str
    check: Check
    when: When


def clause(name: str, rule: str, *, when: When = "together") -> Callable[[Check], Clause]:
    """Return a decorator that makes a `Clause` of the coroutine function that checks the clause."""
    return lambda check: Clause(name, rule, check, when)
