"""The four verdicts on a clause, and the errors by which a check returns a verdict."""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """The result of one clause, from best to worst."""

    HOLDS = "holds"
    DIFFERS = "differs harmlessly"
    UNTRIED = "could not be tried"
    BREAKS = "breaks workers"


class DepartureError(Exception):
    """A clause does not hold, or was not tried; the message describes the observation."""

    verdict = Verdict.UNTRIED


class Differs(DepartureError):
    """The control plane differs in a way that workers are prepared for."""

    verdict = Verdict.DIFFERS


class Untried(DepartureError):
    """The clause could not be tried."""


class Breaks(DepartureError):
    """The control plane differs so that a worker loses an item, runs it twice, or fails."""

    verdict = Verdict.BREAKS


def same_or_differs(holds: object, seen: str) -> None:
    """Raise `Differs` unless the condition holds."""
    if not holds:
        raise Differs(seen)


def same_or_breaks(holds: object, seen: str) -> None:
    """Raise `Breaks` unless the condition holds."""
    if not holds:
        raise Breaks(seen)
