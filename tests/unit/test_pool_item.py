"""The states of an item, the order of end reasons, and the items that a pool owns."""

from __future__ import annotations

import asyncio
import random
from contextvars import copy_context
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise, product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast, get_args

import pytest

from workpool.handlers import Handler
from workpool.pool.pool_item import (
    TRANSITIONS,
    EndReason,
    ItemState,
    OwnedItems,
    PoolItem,
    Transition,
)
from workpool.testing.virtual_time import in_virtual_time
from workpool.wire.items import WorkItem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool import Session

# The documented table of transitions; each pair of state and transition without a row must raise.
ALLOWED = {
    ("delivered", "slot"): "acking",
    ("delivered", "adopted"): "beginning",
    ("delivered", "closed"): "closed",
    ("acking", "acknowledged"): "beginning",
    ("acking", "closed"): "closed",
    ("beginning", "started"): "running",
    ("beginning", "ended"): "completing",
    ("beginning", "closed"): "closed",
    ("running", "ended"): "completing",
    ("running", "closed"): "closed",
    ("completing", "closed"): "closed",
}
PAIRS = list(product(get_args(ItemState), get_args(Transition)))
REASONS = [
    "RETURNED", "RAISED", "TIMED_OUT", "STALLED", "DRAINED", "RELEASED", "STOP_REQUESTED",
    "HANDED_OFF", "STOPPED", "LOST",
]  # fmt: skip


async def handler_function(session: Session) -> None:
    """A handler that is never called."""


first, second = (
    Handler(name=name, call=handler_function, plugin="test")
    for name in ("test.first", "test.second")
)


def make_item(
    work_id: str = "work_1",
    session_id: str = "sesn_1",
    run_by: Handler | None = None,
    **changes: Any,
) -> PoolItem:
    work_item = WorkItem(
        id=work_id,
        type="session",
        session_id=session_id,
        environment_id="env_1",
        state="queued",
        metadata=MappingProxyType({}),
        created_at=datetime(2026, 3, 1, tzinfo=UTC),
        acknowledged_at=None,
        started_at=None,
        latest_heartbeat_at=None,
        last_heartbeat=None,
        stop_requested_at=None,
        stopped_at=None,
    )
    return PoolItem(replace(work_item, **changes), run_by, copy_context(), 0.0)


def make_item_in_state(state: str) -> PoolItem:
    item = make_item()
    item.state = cast("ItemState", state)
    return item


def test_item_state_table_equals_documented_table() -> None:
    assert dict(TRANSITIONS) == ALLOWED


@pytest.mark.parametrize(("state", "transition"), [pair for pair in PAIRS if pair in ALLOWED])
def test_allowed_state_transition_moves_item_to_expected_state(
    state: ItemState, transition: Transition
) -> None:
    item = make_item_in_state(state)
    item.advance_state(transition)
    assert item.state == ALLOWED[state, transition]


@pytest.mark.parametrize(("state", "transition"), [pair for pair in PAIRS if pair not in ALLOWED])
def test_forbidden_transition_raises_and_keeps_state(
    state: ItemState, transition: Transition
) -> None:
    item = make_item_in_state(state)
    with pytest.raises(RuntimeError, match=f"'{transition}' is not allowed in '{state}'"):
        item.advance_state(transition)
    assert item.state == state


def test_item_in_any_state_can_reach_final_state_closed() -> None:
    assert make_item().state == "delivered"
    for state in get_args(ItemState):
        seen = {state}
        while new := {after for (before, _), after in ALLOWED.items() if before in seen} - seen:
            seen |= new
        assert "closed" in seen
    assert not [pair for pair in ALLOWED if pair[0] == "closed"]


@pytest.mark.parametrize(
    ("changes", "held_before"),
    [
        ({}, False),
        ({"acknowledged_at": datetime(2026, 3, 1, tzinfo=UTC)}, True),
        ({"last_heartbeat": "hb_1"}, True),
    ],
)
def test_polled_item_with_ack_or_heartbeat_counts_as_previously_held(
    changes: dict[str, Any], *, held_before: bool
) -> None:
    assert make_item(**changes).held_before == held_before


def test_end_reasons_are_ordered_like_rows_of_completion_table() -> None:
    assert [reason.name for reason in EndReason] == REASONS
    assert all(lesser < greater for lesser, greater in pairwise(EndReason))


@pytest.mark.parametrize(("one", "other"), list(product(EndReason, EndReason)))
def test_item_keeps_more_severe_of_two_end_reasons_in_either_order(
    one: EndReason, other: EndReason
) -> None:
    item = make_item()
    assert item.end_reason is None
    item.add_end_reason(one)
    item.add_end_reason(other)
    assert item.end_reason is max(one, other)


@in_virtual_time
async def test_wait_for_condition_of_item_ends_when_notification_finds_condition_true() -> None:
    item, met = make_item(), list[int]()
    loop = asyncio.get_running_loop()
    for seconds in (1, 2, 3):
        loop.call_later(seconds, met.append, seconds)
        loop.call_later(seconds, item.notify_waiters)
    await item.wait_until(lambda: len(met) == 2)
    assert loop.time() == pytest.approx(2)


@in_virtual_time
async def test_wait_for_item_condition_ends_at_once_if_true_else_at_time_limit() -> None:
    item = make_item()
    loop = asyncio.get_running_loop()
    item.notify_waiters()  # No task waits, so this notification must have no effect.
    await item.wait_until(lambda: False, 5)
    assert loop.time() == pytest.approx(5)
    await item.wait_until(lambda: True)
    assert loop.time() == pytest.approx(5)


@in_virtual_time
async def test_notification_wakes_all_tasks_that_wait_for_condition_of_item() -> None:
    item = make_item()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        met: list[int] = []
        for _ in range(3):
            group.create_task(item.wait_until(lambda: bool(met)))
        await asyncio.sleep(1)
        met.append(1)
        item.notify_waiters()


def test_owned_item_is_found_and_counted_until_it_is_removed() -> None:
    owned, item = OwnedItems(), make_item(run_by=first)
    assert (len(owned), owned.find_item("work_1"), owned.copy_items()) == (0, None, [])
    owned.add_item(item)
    assert (len(owned), owned.find_item("work_1"), owned.copy_items()) == (1, item, [item])
    assert owned.has_agent_session("sesn_1")
    assert (owned.count_items(first), owned.count_items(second)) == (1, 0)
    owned.remove_item(item)
    assert (len(owned), owned.find_item("work_1"), owned.copy_items()) == (0, None, [])
    assert not owned.has_agent_session("sesn_1")
    assert owned.count_items(first) == 0


def test_owned_item_without_handler_does_not_count_as_running_session() -> None:
    owned = OwnedItems()
    item = make_item()
    owned.add_item(item)
    assert not owned.has_agent_session("sesn_1")
    owned.remove_item(item)
    assert len(owned) == 0


def test_several_items_without_session_id_can_be_owned_simultaneously() -> None:
    owned = OwnedItems()
    one, other = (make_item(work_id, "", first) for work_id in ("work_1", "work_2"))
    owned.add_item(one)
    assert not owned.has_agent_session("")
    owned.add_item(other)
    owned.remove_item(one)
    assert owned.count_items(first) == 1
    owned.remove_item(other)
    assert owned.count_items(first) == 0


def test_item_with_session_id_changed_by_ack_is_removed_from_owned_items() -> None:
    """The answer to the ack replaces `work_item`, and the new one may have another session id."""
    owned, item = OwnedItems(), make_item(run_by=first)
    owned.add_item(item)
    item.work_item = replace(item.work_item, session_id="sesn_other")
    owned.remove_item(item)
    assert not owned.has_agent_session("sesn_1")


def test_owned_items_can_be_removed_while_iterating_over_copy() -> None:
    owned, item = OwnedItems(), make_item(run_by=first)
    owned.add_item(item)
    for each in owned.copy_items():
        owned.remove_item(each)
    assert len(owned) == 0


def make_random_items(dice: random.Random) -> Iterator[PoolItem]:
    for number in range(200):
        yield make_item(f"work_{number}", f"sesn_{number}", dice.choice((first, second, None)))


def test_counts_of_owned_items_are_correct_after_random_changes() -> None:
    dice = random.Random(0)  # noqa: S311 - repeatable, guards nothing
    owned, mine = OwnedItems(), list[PoolItem]()
    for item in make_random_items(dice):
        owned.add_item(item)
        mine.append(item)
        while mine and dice.random() < 0.4:
            owned.remove_item(mine.pop(dice.randrange(len(mine))))
        assert set(owned.copy_items()) == set(mine)
        for each in (first, second):
            assert owned.count_items(each) == sum(item.handler is each for item in mine)
        for each_item in mine:
            assert owned.has_agent_session(each_item.session_id) == (each_item.handler is not None)
