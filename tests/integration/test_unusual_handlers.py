"""Unusual results and errors of handlers affect only their own session."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from workpool import Release, Session, handler
from workpool.events import ItemDeclined, ItemReceived, SessionFinished
from workpool.server.http.server_dialects import DIALECTS
from workpool.testing import literal, status

if TYPE_CHECKING:
    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder, Request


class PhaseEnum(enum.StrEnum):
    PHASE = "phase"
    DONE = "done"


class MappingChangedDuringIteration(Mapping[str, str]):
    """A mapping that changes while it is read, as if by another thread."""

    def __getitem__(self, key: str) -> str:
        raise KeyError(key)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("changed size during iteration")


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise LookupError("no words")


async def test_enum_members_in_result_and_metadata_are_written_as_strings(
    run_one_item: Any,
) -> None:
    async def return_enum_members(session: Session) -> Mapping[str, str]:
        await session.update_metadata({PhaseEnum.DONE: PhaseEnum.PHASE})
        return {PhaseEnum.PHASE: PhaseEnum.DONE}

    final = await run_one_item(return_enum_members)
    assert (final.outcome, final.metadata) == ("completed", {"done": "phase", "phase": "done"})


async def test_result_that_raises_while_it_is_read_fails_session(run_one_item: Any) -> None:
    async def return_mapping_changed_during_iteration(_: Session) -> Mapping[str, str]:
        return MappingChangedDuringIteration()

    final = await run_one_item(return_mapping_changed_during_iteration)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.metadata == {"workpool.error": "RuntimeError"}


async def test_result_changed_after_return_is_written_as_returned(
    run_one_item: Any, faults: Faults
) -> None:
    shared: dict[str, Any] = {"rows": "42"}

    def change_result_during_request() -> bytes:
        shared["rows"] = 43
        return b""

    async def return_mapping(_: Session) -> Mapping[str, str]:
        return shared

    faults.add(literal(change_result_during_request, 503), "update", times=1)
    final = await run_one_item(return_mapping)
    assert (final.outcome, final.metadata) == ("completed", {"rows": "42"})


async def test_placeholder_is_reported_for_error_that_cannot_be_converted_to_text(
    run_one_item: Any,
) -> None:
    async def raise_unprintable_error(_: Session) -> None:
        raise UnprintableError

    final = await run_one_item(raise_unprintable_error, report_errors="message")
    assert final.outcome == "failed"
    assert final.metadata == {"workpool.error": "UnprintableError: <exception str() failed>"}


@pytest.mark.parametrize(
    ("reason", "note"),
    [(ValueError("why"), "why"), (None, "None"), (UnprintableError(), "<exception str() failed>")],
    ids=["error", "none", "mute"],
)
async def test_release_reason_of_any_type_is_written_as_text(
    run_one_item: Any, reason: Any, note: str
) -> None:
    async def release_with_reason(_: Session) -> None:
        raise Release(reason)

    final = await run_one_item(release_with_reason, report_errors="message")
    assert (final.outcome, final.item.state) == ("released", "active")
    assert final.metadata == {"workpool.released": note}


@pytest.mark.parametrize("delay", [float("nan"), "60", None])
async def test_release_with_invalid_delay_uses_default_delay(run_one_item: Any, delay: Any) -> None:
    async def release_session_with_delay(_: Session) -> None:
        release = Release("later")
        release.delay = delay
        raise release

    final = await run_one_item(release_session_with_delay)
    assert (final.outcome, final.item.state) == ("released", "active")
    assert final.sent[-1].query["desired_ttl_seconds"] == "10"


@pytest.mark.parametrize("op", ["ack", "get"])
async def test_control_plane_response_about_another_item_is_ignored(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, op: Any
) -> None:
    """A faulty proxy may mix up answers, and return the answer to a different request."""

    @handler
    async def return_at_once(_: Session) -> None:
        return None

    ours, other = control_plane.enqueue(2)

    def make_response_with_other_item() -> bytes:
        item = control_plane.operations.get_item(control_plane.environments[0], other.id)
        return orjson.dumps(DIALECTS["qoder"].item_json(item) | {"state": "starting"})

    def is_request_for_our_item(request: Request) -> bool:
        return request.work_id == ours.id

    if op == "get":
        # The pool reads the item only if a heartbeat was applied but not answered.
        faults.add(status(503, applied=True), "heartbeat", times=1, where=is_request_for_our_item)
    faults.add(literal(make_response_with_other_item), op, times=1, where=is_request_for_our_item)
    async with make_pool(return_at_once):
        await recorder.wait_for(SessionFinished, count=2)
    assert {event.outcome for event in recorder.of(SessionFinished)} == {"completed"}
    assert len(faults.of(op, work_id=ours.id)) == 2


async def test_session_whose_handler_cancels_its_own_task_fails(run_one_item: Any) -> None:
    async def cancel_own_task(_: Session) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    final = await run_one_item(cancel_own_task)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.metadata == {"workpool.error": "CancelledError"}


@pytest.mark.parametrize(
    ("size", "outcome"),
    [(1_500_000, "completed"), (5_000_000, "failed")],
    ids=["fits", "too_large"],
)
async def test_result_is_written_if_within_size_limit_and_otherwise_fails_session(
    run_one_item: Any, size: int, outcome: str
) -> None:
    async def return_long_text(_: Session) -> dict[str, str]:
        return {"text": "x" * size}

    final = await run_one_item(return_long_text)
    assert (final.outcome, final.item.state) == (outcome, "stopped")
    assert (len(final.metadata.get("text", "")) == size) is (outcome == "completed")
    assert ("workpool.error" in final.metadata) is (outcome == "failed")


async def test_next_item_of_session_is_acknowledged_after_ack_response_with_wrong_session_id(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    @handler(type="session")
    async def return_at_once(_: Session) -> None:
        return None

    (item,) = control_plane.enqueue()

    def make_response_with_other_session() -> bytes:
        acked = DIALECTS["qoder"].item_json(
            control_plane.operations.ack_item(control_plane.environments[0], item.id)
        )
        return orjson.dumps(acked | {"data": {"type": "session", "id": "sess_other"}})

    faults.add(literal(make_response_with_other_session), "ack", times=1)
    async with make_pool(return_at_once) as pool:
        await recorder.wait_for(SessionFinished)
        again = orjson.dumps(DIALECTS["qoder"].item_json(item) | {"id": "work_again"})
        faults.add(literal(again), "poll", times=1)
        claimed = await recorder.wait_for(ItemReceived, count=2)
        assert claimed.item.session_id == item.session_id
        await faults.wait_for("ack", work_id="work_again")
    assert not recorder.of(ItemDeclined)
    assert pool.abandoned == 0
