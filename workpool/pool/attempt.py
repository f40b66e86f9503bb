"""The number of one run of an item, and the mark that keeps that run from being counted.

The metadata `workpool.attempt` holds the number of the last run, absent for 1. The next run counts
on from it, unless the last one left the mark `workpool.released`: then it has the same number.
A patch made here has the same effect when it is applied twice, so it may be sent again after a
lost answer. Nothing here sends anything.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    Patch = dict[str, str | None]

ATTEMPT: Final = "workpool.attempt"
ERROR: Final = "workpool.error"
RELEASED: Final = "workpool.released"
_NUMBER = re.compile(r"[1-9][0-9]{0,8}").fullmatch


class Attempt:
    """One run of an item, as its metadata know it.

    Attributes:
        number: 1 for the first run.
        marked: The control plane has confirmed the mark of this run.
    """

    __slots__ = ("_notes", "_number", "marked", "number")

    def __init__(self, metadata: Mapping[str, str], *, redelivered: bool) -> None:
        """`metadata`: of the item, as its acknowledgement returned it."""
        stored = metadata.get(ATTEMPT, "1")
        counts = redelivered and RELEASED not in metadata
        self.number = (int(stored) if _NUMBER(stored) else 1) + counts
        self.marked = False
        self._number: Patch = {} if stored == str(self.number) else {ATTEMPT: str(self.number)}
        self._notes: Patch = {key: None for key in (ERROR, RELEASED) if key in metadata}

    def opening(self) -> Patch:
        """Return the patch that must be written before the handler starts; empty: none."""
        return self._notes | self._number

    def opened(self) -> None:
        """Note that the opening patch is applied."""
        self._notes, self._number = {}, {}

    def mark(self, reason: str) -> Patch:
        """Return the patch that keeps this run from being counted."""
        patch = self._notes | self._number | {RELEASED: reason}
        self._notes[RELEASED] = None  # from now on it may be applied, whatever the answer
        return patch

    def closing(self, notes: Mapping[str, str]) -> Patch:
        """Return `notes` with the deletion of every note of an earlier end; empty: none."""
        return {**self._notes, **notes}
