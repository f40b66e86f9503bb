"""The number of one run of an item, and the mark that keeps that run from being counted.

Where the metadata cannot be written, `RunCounts` counts the runs of this process instead.

The metadata `workpool.attempt` holds the number of the last run; it is absent after the first run.
The next run has the next number, unless the last run left the mark `workpool.released`: then it has
the same number. A patch made here has the same effect when it is applied twice, so it may be sent
again after a lost answer. This module sends nothing.
See workpool/docs/architecture.md, "The end of a session".
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    Patch = dict[str, str | None]

ATTEMPT: Final = "workpool.attempt"
ERROR: Final = "workpool.error"
RELEASED: Final = "workpool.released"
REMEMBERED_ITEMS: Final = 10_000
"""The number of items whose runs are counted in memory."""
_NUMBER = re.compile(r"[1-9][0-9]{0,8}").fullmatch


class Attempt:
    """One run of an item, according to the item's metadata.

    Attributes:
        number: 1 for the first run.
        marked: The control plane has confirmed the mark of this run.
    """

    __slots__ = ("_first", "_notes", "_number", "marked", "number")

    def __init__(self, metadata: Mapping[str, str], *, redelivered: bool) -> None:
        """Number the run.

        Args:
            metadata: The item's metadata, as its acknowledgement returned them.
            redelivered: The item was held before.
        """
        stored = metadata.get(ATTEMPT, "1")
        counts = redelivered and RELEASED not in metadata
        self._first = int(stored) if _NUMBER(stored) else 1
        self.number = self._first + counts
        self.marked = False
        self._number: Patch = {} if stored == str(self.number) else {ATTEMPT: str(self.number)}
        self._notes: Patch = dict.fromkeys(metadata.keys() & {ERROR, RELEASED})

    def count_here(self, earlier: int) -> None:
        """Number the run by the `earlier` runs of this process.

        What was to be written stays so, in case the mark can be written after all.
        """
        # Not their sum: a mark that was written nevertheless has the number of the same runs.
        self.number = max(self._first, 1 + earlier)

    def opening(self) -> Patch:
        """Return the patch that must be written before the handler starts; empty if none is."""
        return self._notes | self._number

    def opened(self) -> None:
        """Record that the opening patch was applied."""
        self._notes, self._number = {}, {}

    def mark(self, reason: str) -> Patch:
        """Return the patch that keeps this run from being counted."""
        patch = self._notes | self._number | {RELEASED: reason}
        self._notes[RELEASED] = None  # from now on the mark may exist, whatever the answer
        return patch

    def closing(self, notes: Mapping[str, str]) -> Patch:
        """Return `notes` and the deletion of the notes of earlier ends; may be empty."""
        return {**self._notes, **notes}


class RunCounts:
    """Counts runs of this process that ended with neither a release nor a stop, by work id."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, int] = OrderedDict()

    def add(self, work_id: str) -> None:
        """Count a run; the items that were counted the longest ago are forgotten."""
        self._counts[work_id] = self._counts.pop(work_id, 0) + 1
        if len(self._counts) > REMEMBERED_ITEMS:
            self._counts.popitem(last=False)

    def of(self, work_id: str) -> int:
        """Return the number of an item's runs."""
        return self._counts.get(work_id, 0)
