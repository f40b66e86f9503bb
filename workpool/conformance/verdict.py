"""The four verdicts on a clause, and the errors with which a check ends."""

from __future__ import annotations

import enum


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
