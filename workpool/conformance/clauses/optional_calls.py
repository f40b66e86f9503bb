"""Clauses about calls that a worker does not need: metadata, reads, lists, statistics.

See workpool/docs/protocol.md, "Keys that may not read", "Update metadata", "Read an item",
"List items" and "Read queue statistics".
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from workpool.conformance.clause import clause
from workpool.conformance.clause_trial import is_bad_request
from workpool.conformance.clauses.auth_and_errors import UNKNOWN
from workpool.conformance.clauses.delivery import require_readable_item
from workpool.conformance.verdict import (
    ClauseDiffersError,
    raise_clause_broken_unless,
    raise_clause_differs_unless,
)
from workpool.wire.items import parse_stats

if TYPE_CHECKING:
    from workpool.conformance.api import Answer
    from workpool.conformance.clause_trial import ClauseTrial

SET: Final = "workpool.conform.set"
DELETED: Final = "workpool.conform.deleted"
NO_WRITE: Final = "results are dropped, and attempts are counted in memory"
NO_READ: Final = "a lost answer is cleared up through the list"
PAGES_MAX: Final = 100


@clause("update-merges", "Keys are set, deleted and kept as the patch says.")
async def check_metadata_patch_is_merged(trial: ClauseTrial) -> None:
    """Set three keys; then delete one, set one to an empty text and leave one unchanged."""
    subject = await trial.claim_item()
    first = await trial.api.update(
        subject.id, json={"metadata": {SET: "1", DELETED: "1", f"{SET}.kept": "1"}}
    )
    _raise_clause_differs_if_refused(first, NO_WRITE)
    raise_clause_broken_unless(first.ok, str(first))
    second = await trial.api.update(subject.id, json={"metadata": {SET: "", DELETED: None}})
    raise_clause_broken_unless(second.ok, str(second))
    metadata = second.get("metadata") or {}
    raise_clause_broken_unless(
        metadata.get(f"{SET}.kept") == "1", "a key that the patch does not name is lost"
    )
    raise_clause_broken_unless(DELETED not in metadata, "null does not delete a key")
    raise_clause_differs_unless(metadata.get(SET) == "", "an empty string is no value")


@clause("update-stopped", "A stopped item can be updated.")
async def check_stopped_item_can_be_updated(trial: ClauseTrial) -> None:
    """Send a metadata patch for a stopped item, and check that it is accepted."""
    subject = await trial.create_active_item()
    await trial.stop_item(subject, force=True)
    answer = await trial.api.update(subject.id, json={"metadata": {SET: "1"}})
    _raise_clause_differs_if_refused(answer, NO_WRITE)
    raise_clause_differs_unless(answer.ok, str(answer))


@clause("update-invalid", "A value that is neither string nor null is a 400.")
async def check_metadata_patch_with_number_is_refused(trial: ClauseTrial) -> None:
    """Send a metadata patch with a number as value, and check that it is refused."""
    subject = await trial.claim_item()
    answer = await trial.api.update(subject.id, json={"metadata": {SET: 1}})
    _raise_clause_differs_if_refused(answer, NO_WRITE)
    raise_clause_differs_unless(is_bad_request(answer), str(answer))


@clause("get-item", "The answer is the item.")
async def check_item_can_be_read(trial: ClauseTrial) -> None:
    """Read an item, and parse the answer as a worker does."""
    subject = await trial.claim_item()
    answer = await trial.api.get(subject.id)
    _raise_clause_differs_if_refused(answer, NO_READ)
    raise_clause_broken_unless(answer.ok and answer.get("id") == subject.id, str(answer))
    require_readable_item(answer.body)


@clause("get-unknown", "An unknown item is a 404.")
async def check_read_of_unknown_item_is_not_found(trial: ClauseTrial) -> None:
    """Read an item that does not exist."""
    answer = await trial.api.get(f"work_{UNKNOWN}")
    _raise_clause_differs_if_refused(answer, NO_READ)
    raise_clause_differs_unless(answer.status == HTTPStatus.NOT_FOUND, str(answer))


@clause("list-pages", "`page` with the former `next_page` answers the next items.", when="last")
async def check_pages_of_list_contain_each_item_once(trial: ClauseTrial) -> None:
    """Read two pages of one item each, then look for this clause's items in the whole list."""
    subjects = [await trial.claim_item(), await trial.claim_item()]
    first = await _read_page(trial, "1")
    _raise_clause_differs_if_refused(
        first, "lost answers cannot be cleared up under a key that may not read items"
    )
    token = first.get("next_page")
    raise_clause_differs_unless(isinstance(token, str) and token, "the list has one page")
    second = await _read_page(trial, "1", token)
    ids = [row.get("id") for page in (first, second) for row in _list_rows_of_page(page)]
    raise_clause_broken_unless(len(set(ids)) == len(ids) > 1, "the second page repeats the first")
    seen = await _list_all_item_ids(trial)
    missing = [subject for subject in subjects if subject.id not in seen]
    raise_clause_broken_unless(not missing, "an item is on no page")


@clause("list-order", "Items come in ascending order of ids.", when="last")
async def check_list_is_in_order_of_creation(trial: ClauseTrial) -> None:
    """Create two items, and compare the creation times in the list."""
    await trial.claim_item()
    # Wait for more than 1 s, so that the creation times differ even if the control plane rounds
    # times to seconds.
    await trial.wait_while_other_clauses_run(1.1)
    await trial.claim_item()
    answer = await _read_page(trial, "100")
    _raise_clause_differs_if_refused(answer, "the order is not known")
    times = [str(row.get("created_at")) for row in _list_rows_of_page(answer)]
    raise_clause_differs_unless(times == sorted(times), "the newest item comes first")


@clause("stats-counts", "The answer counts a queued item.", when="last")
async def check_statistics_count_queued_item(trial: ClauseTrial) -> None:
    """Create an item, and check that the queue statistics count it."""
    await trial.create_item()
    answer = await trial.api("GET", trial.api.work_url("/stats"))
    _raise_clause_differs_if_refused(answer, "the metrics of the remote queue are missing")
    raise_clause_differs_unless(answer.ok, str(answer))
    try:
        stats = parse_stats(answer.body)
    except ValueError as error:
        raise ClauseDiffersError(f"a worker cannot read it: {error}") from None
    raise_clause_differs_unless(stats.depth > 0, "`depth` is 0 while an item is queued")


def _raise_clause_differs_if_refused(answer: Answer, consequence: str) -> None:
    """Raise `ClauseDiffersError` if the credential may not make the call or the call is missing."""
    raise_clause_differs_unless(not answer.is_refused, f"{answer}: {consequence}")


async def _read_page(trial: ClauseTrial, limit: str, page: str | None = None) -> Answer:
    query = {"limit": limit} if page is None else {"limit": limit, "page": page}
    return await trial.api("GET", trial.api.work_url(), params=query)


def _list_rows_of_page(answer: Answer) -> list[dict[str, Any]]:
    rows = answer.get("data")
    raise_clause_broken_unless(answer.ok and isinstance(rows, list), str(answer))
    return [row for row in rows if isinstance(row, dict)]


async def _list_all_item_ids(trial: ClauseTrial) -> set[str]:
    seen: set[str] = set()
    token: str | None = None
    for _ in range(PAGES_MAX):
        page = await _read_page(trial, "100", token)
        seen.update(str(row.get("id")) for row in _list_rows_of_page(page))
        token = None if page.get("has_more") is False else page.get("next_page")
        if not token:
            return seen
    raise ClauseDiffersError(f"the list has more than {PAGES_MAX} pages")
