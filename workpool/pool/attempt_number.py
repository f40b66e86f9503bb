"""The number of an item's run, and the metadata that store the number.

The metadata `workpool.attempt` holds the number of an item's last run; it is absent after the first
run. The next run has the next number, unless the last run left the mark `workpool.released`: then
it has the same number. A patch made here has the same effect when it is applied twice, so it may be
sent again after a lost answer. Where the metadata cannot be written, `LocalRunCounter` counts the
runs of this process instead.

See workpool/docs/architecture.md, "The end of a session".
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from workpool.wire.protocol import OUR_ERROR

if TYPE_CHECKING:
    from collections.abc import Mapping

    Patch = dict[str, str | None]

ATTEMPT: Final = "workpool.attempt"
RELEASED: Final = "workpool.released"
RETRIES: Final = "workpool.retries"
REMEMBERED_ITEMS: Final = 10_000
"""Number of items whose runs are counted in memory."""
_match_number = re.compile(r"[1-9][0-9]{0,8}").fullmatch


class AttemptNumber:
    """The number of one run of an item, and the metadata patches that store the number.

    Attributes:
        number: 1 for the first run.
        retry: The retry number of the handler's first call: the number that a released run stored
            in the metadata, else 0.
        marked: Whether the control plane has confirmed the mark of this run.
    """

    __slots__ = ("_deletions", "_first", "_number_patch", "marked", "number", "retry")

    def __init__(self, metadata: Mapping[str, str], *, redelivered: bool) -> None:
        """Determine the number of this run from the item's metadata.

        Args:
            metadata: The item's metadata in the answer to the acknowledgement.
            redelivered: Whether the item was held before.
        """
        stored = metadata.get(ATTEMPT, "1")
        counts = redelivered and RELEASED not in metadata
        self._first = int(stored) if stored != "1" and _match_number(stored) else 1
        self.number = self._first + counts
        self.marked = False
        number = str(self.number)
        self._number_patch: Patch = {} if stored == number else {ATTEMPT: number}
        retries = metadata.get(RETRIES, "") if RELEASED in metadata else ""
        self.retry = int(retries) if _match_number(retries) else 0
        self._deletions: Patch = {}
        for key in (OUR_ERROR, RELEASED, RETRIES):
            if key in metadata:
                self._deletions[key] = None

    def set_number_from_local_count(self, earlier: int) -> None:
        """Set `number` from a count of the item's runs in this process, without the metadata.

        `earlier` is the count before this run. The metadata patches stay as they are, so that they
        are right if metadata can be written later.
        """
        # Use the greater number and not a sum: `_first`, the number in the metadata, and `earlier`
        # may count the same runs.
        self.number = max(self._first, 1 + earlier)

    def make_run_number_metadata(self) -> Patch:
        """Return the metadata to write before the handler is called: the number of this run.

        Empty if the metadata has this number already.
        """
        return self._deletions | self._number_patch

    def clear_written_run_number(self) -> None:
        """Record that the result of `make_run_number_metadata` was written."""
        self._deletions, self._number_patch = {}, {}

    def make_release_metadata(self, reason: str, retry: int) -> Patch:
        """Return metadata that exclude this run from the attempts and pass `retry` to the next run.

        After this call, `make_session_end_metadata` deletes them again, even if their write seems
        to have failed: the control plane may have applied it.
        """
        patch = self._deletions | self._number_patch | {RELEASED: reason}
        self._deletions[RELEASED] = None
        if retry:
            patch[RETRIES] = str(retry)
            self._deletions[RETRIES] = None
        return patch

    def make_session_end_metadata(self, notes: Mapping[str, str]) -> Patch:
        """Return the metadata patch for the end of the session: it sets `notes`, deletes old keys.

        `notes` is the result or the error. A key is deleted by the value None.
        """
        return {**self._deletions, **notes}


class LocalRunCounter:
    """For each work id, counts the runs in this process that ended without a release or a stop."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, int] = OrderedDict()

    def count_item_run(self, work_id: str) -> None:
        """Count a run of an item; beyond the limit, forget the item with the oldest run."""
        self._counts[work_id] = self._counts.pop(work_id, 0) + 1
        if len(self._counts) > REMEMBERED_ITEMS:
            self._counts.popitem(last=False)

    def number_of_runs(self, work_id: str) -> int:
        """Return the number of runs that were counted for an item."""
        return self._counts.get(work_id, 0)
