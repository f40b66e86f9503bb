"""The four verdicts on a clause, and the exceptions with which a check reports a verdict."""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """The result of the check of one clause, from best to worst."""

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
    """The clause could not be checked, for example because no item could be created."""


class Breaks(DepartureError):
    """The control plane differs in a way that makes a worker lose an item, run it twice or fail."""

    verdict = Verdict.BREAKS


def differs_unless(holds: object, seen: str) -> None:
    """Raise `Differs` with the observation `seen` unless the condition holds."""
    if not holds:
        raise Differs(seen)


def breaks_unless(holds: object, seen: str) -> None:
    """Raise `Breaks` with the observation `seen` unless the condition holds."""
    if not holds:
        raise Breaks(seen)
