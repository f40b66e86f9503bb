"""The four verdicts on a clause, and the exceptions with which a check reports a verdict."""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """The result of checking one clause. The members are ordered from best to worst."""

    HOLDS = "holds"
    DIFFERS = "differs harmlessly"
    UNTRIED = "could not be tried"
    BREAKS = "breaks workers"


class ClauseNotConfirmedError(Exception):
    """A clause does not hold, or could not be checked. The message says what was observed."""

    verdict = Verdict.UNTRIED


class ClauseDiffersError(ClauseNotConfirmedError):
    """The control plane differs from the clause in a way that workers can handle."""

    verdict = Verdict.DIFFERS


class ClauseUntriedError(ClauseNotConfirmedError):
    """The clause could not be checked, for example because no item could be created."""


class ClauseBrokenError(ClauseNotConfirmedError):
    """The control plane breaks the clause, so a worker can lose an item, run it twice or fail."""

    verdict = Verdict.BREAKS


def raise_clause_differs_unless(holds: object, seen: str) -> None:
    """Raise `ClauseDiffersError` with the observation `seen` unless the condition holds."""
    if not holds:
        raise ClauseDiffersError(seen)


def raise_clause_broken_unless(holds: object, seen: str) -> None:
    """Raise `ClauseBrokenError` with the observation `seen` unless the condition holds."""
    if not holds:
        raise ClauseBrokenError(seen)
