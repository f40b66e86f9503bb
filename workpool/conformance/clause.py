"""A clause of the protocol, and the four verdicts about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.conformance.trial import Trial

Check: TypeAlias = "Callable[[Trial], Awaitable[None]]"
When: TypeAlias = Literal["together", "last"]


class Verdict(enum.Enum):
    """The result of one clause, from good to bad."""

    HOLDS = "holds"
    DIFFERS = "differs harmlessly"
    UNTRIED = "could not be tried"
    BREAKS = "breaks workers"


class DepartureError(Exception):
    """A clause does not hold, or could not be tried; the message says what was seen."""

    verdict = Verdict.UNTRIED


class Differs(DepartureError):
    """The control plane does something else, and workers are prepared for it."""

    verdict = Verdict.DIFFERS


class Untried(DepartureError):
    """The clause could not be tried."""


class Breaks(DepartureError):
    """A worker loses an item, runs it twice, or fails."""

    verdict = Verdict.BREAKS


def same_or_differs(holds: object, seen: str) -> None:
    """Raise `Differs` unless the condition holds."""
    if not holds:
        raise Differs(seen)


def same_or_breaks(holds: object, seen: str) -> None:
    """Raise `Breaks` unless the condition holds."""
    if not holds:
        raise Breaks(seen)


@dataclass(frozen=True, slots=True)
class Clause:
    """One clause of the protocol.

    Attributes:
        name: Its name on the protocol page.
        rule: What it says.
        check: Raises a `DepartureError` unless it holds.
        when: "last": after all others, alone, when the queue is empty.
    """

    name: str
    rule: str
    check: Check
    when: When


def clause(name: str, rule: str, *, when: When = "together") -> Callable[[Check], Clause]:
    """Turn a coroutine function into the clause that it checks."""
    return lambda check: Clause(name, rule, check, when)
