"""The calls that a worker can do without: metadata, reading, listing, statistics.

See workpool/docs/protocol.md, "Keys that may not read", "Update metadata", "Read an item",
"List items" and "Read queue statistics".
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from workpool.conformance.clause import clause
from workpool.conformance.clauses.auth_and_errors import UNKNOWN
from workpool.conformance.clauses.delivery import readable
from workpool.conformance.trial import is_bad_request
from workpool.conformance.verdict import Differs, same_or_breaks, same_or_differs
from workpool.wire.items import parse_stats

if TYPE_CHECKING:
    from workpool.conformance.api import Answer
    from workpool.conformance.trial import Trial

SET: Final = "workpool.conform.set"
DELETED: Final = "workpool.conform.deleted"
NO_WRITE: Final = "results are dropped, and attempts are counted in memory"
NO_READ: Final = "a lost answer is cleared up through the list"
PAGES_MAX: Final = 100


@clause("update-merges", "Keys are set, deleted and kept as the patch says.")
async def merge_patch(trial: Trial) -> None:
    """Set two keys, then delete one and set the other to an empty text."""
    subject = await trial.claim()
    first = await trial.api.update(
        subject.id, json={"metadata": {SET: "1", DELETED: "1", f"{SET}.kept": "1"}}
    )
    _check_allowed(first, NO_WRITE)
    same_or_breaks(first.ok, str(first))
    second = await trial.api.update(subject.id, json={"metadata": {SET: "", DELETED: None}})
    same_or_breaks(second.ok, str(second))
    metadata = second.get("metadata") or {}
    same_or_breaks(metadata.get(f"{SET}.kept") == "1", "a key that the patch does not name is lost")
    same_or_breaks(DELETED not in metadata, "null does not delete a key")
    same_or_differs(metadata.get(SET) == "", "an empty string is no value")


@clause("update-stopped", "A stopped item can be updated.")
async def update_of_a_stopped_item(trial: Trial) -> None:
    """Write metadata of a stopped item."""
    subject = await trial.active()
    await trial.stop(subject, force=True)
    answer = await trial.api.update(subject.id, json={"metadata": {SET: "1"}})
    _check_allowed(answer, NO_WRITE)
    same_or_differs(answer.ok, str(answer))


@clause("update-invalid", "A value that is neither string nor null is a 400.")
async def patch_with_a_number(trial: Trial) -> None:
    """Write a number as metadata."""
    subject = await trial.claim()
    answer = await trial.api.update(subject.id, json={"metadata": {SET: 1}})
    _check_allowed(answer, NO_WRITE)
    same_or_differs(is_bad_request(answer), str(answer))


@clause("get-item", "The answer is the item.")
async def read_of_an_item(trial: Trial) -> None:
    """Read an item as a worker does."""
    subject = await trial.claim()
    answer = await trial.api.get(subject.id)
    _check_allowed(answer, NO_READ)
    same_or_breaks(answer.ok and answer.get("id") == subject.id, str(answer))
    readable(answer.body)


@clause("get-unknown", "An unknown item is a 404.")
async def read_of_an_unknown_item(trial: Trial) -> None:
    """Read an item that does not exist."""
    answer = await trial.api.get(f"work_{UNKNOWN}")
    _check_allowed(answer, NO_READ)
    same_or_differs(answer.status == HTTPStatus.NOT_FOUND, str(answer))


@clause("list-pages", "`page` with the former `next_page` answers the next items.", when="last")
async def pages_of_the_list(trial: Trial) -> None:
    """Read two pages of one item each, then find all items of this clause in the list."""
    subjects = [await trial.claim(), await trial.claim()]
    first = await _read_page(trial, "1")
    _check_allowed(first, "lost answers cannot be cleared up under a key that may not read items")
    token = first.get("next_page")
    same_or_differs(isinstance(token, str) and token, "the list has one page")
    second = await _read_page(trial, "1", token)
    ids = [row.get("id") for page in (first, second) for row in _rows_of(page)]
    same_or_breaks(len(set(ids)) == len(ids) > 1, "the second page repeats the first")
    seen = await _all_ids(trial)
    missing = [subject for subject in subjects if subject.id not in seen]
    same_or_breaks(not missing, "an item is on no page")


@clause("list-order", "Items come in ascending order of ids.", when="last")
async def order_of_the_list(trial: Trial) -> None:
    """Compare the creation times of the list."""
    await trial.claim()
    await trial.wait(1.1)  # times may be rounded to seconds
    await trial.claim()
    answer = await _read_page(trial, "100")
    _check_allowed(answer, "the order is not known")
    times = [str(row.get("created_at")) for row in _rows_of(answer)]
    same_or_differs(times == sorted(times), "the newest item comes first")


@clause("stats-counts", "The answer counts a queued item.", when="last")
async def statistics(trial: Trial) -> None:
    """Create an item and compare the counts."""
    await trial.create()
    answer = await trial.api("GET", trial.api.work("/stats"))
    _check_allowed(answer, "the metrics of the remote queue are missing")
    same_or_differs(answer.ok, str(answer))
    try:
        stats = parse_stats(answer.body)
    except ValueError as error:
        raise Differs(f"a worker cannot read it: {error}") from None
    same_or_differs(stats.depth > 0, "`depth` is 0 while an item is queued")


def _check_allowed(answer: Answer, consequence: str) -> None:
    """Raise `Differs` if the key may not make the call at all."""
    same_or_differs(not answer.refused, f"{answer}: {consequence}")


async def _read_page(trial: Trial, limit: str, page: str | None = None) -> Answer:
    query = {"limit": limit} if page is None else {"limit": limit, "page": page}
    return await trial.api("GET", trial.api.work(), params=query)


def _rows_of(answer: Answer) -> list[dict[str, Any]]:
    rows = answer.get("data")
    same_or_breaks(answer.ok and isinstance(rows, list), str(answer))
    return [row for row in rows if isinstance(row, dict)]


async def _all_ids(trial: Trial) -> set[str]:
    seen: set[str] = set()
    token: str | None = None
    for _ in range(PAGES_MAX):
        page = await _read_page(trial, "100", token)
        seen.update(str(row.get("id")) for row in _rows_of(page))
        token = None if page.get("has_more") is False else page.get("next_page")
        if not token:
            return seen
    raise Differs(f"the list has more than {PAGES_MAX} pages")
