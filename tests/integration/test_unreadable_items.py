"""Items that the worker cannot read must not delay the other items of the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web

from workpool import Session, handler
from workpool.events import PollerBackedOff, PollFinished, SessionFinished
from workpool.wire.endpoints import ANSWER_LIMIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PADDING = "x" * ANSWER_LIMIT_BYTES


@handler
async def return_at_once(_: Session) -> None:
    pass


def too_large_item(item: dict[str, Any]) -> bytes:
    item["metadata"]["pad"] = PADDING
    return orjson.dumps(item)


def too_large_item_with_id_at_end(item: dict[str, Any]) -> bytes:
    return orjson.dumps({"pad": {"x": PADDING}, **item})


def malformed_item(item: dict[str, Any]) -> bytes:
    return orjson.dumps(item | {"state": "odd"})


@pytest.fixture(params=[too_large_item, too_large_item_with_id_at_end, malformed_item])
def unreadable_items(
    faults: Faults, request: pytest.FixtureRequest
) -> Callable[[dict[str, Any]], bytes]:
    """Return a function that makes an item unreadable.

    A fault applies the function to each polled item whose metadata have the key `bad`.
    """
    make_unreadable: Callable[[dict[str, Any]], bytes] = request.param

    async def corrupt_items_marked_bad(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        response = await handler(request)
        assert isinstance(response, web.Response)
        item = orjson.loads(response.text or "")
        if item is None or "bad" not in item["metadata"]:
            return response
        return web.Response(body=make_unreadable(item), content_type="application/json")

    faults.add(corrupt_items_marked_bad, "poll")
    return make_unreadable


async def test_thirty_unreadable_items_do_not_prevent_other_items(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
    unreadable_items: Callable[[dict[str, Any]], bytes],
) -> None:
    bad = control_plane.enqueue(count=30, metadata={"bad": "yes"})
    control_plane.enqueue(count=10)
    async with make_pool(return_at_once):
        await recorder.wait_for(SessionFinished, count=10)
    assert not recorder.of(PollerBackedOff)
    # Without pauses after unreadable items, there would be thousands of polls.
    assert len(recorder.of(PollFinished)) < 1000
    lines = [each for each in caplog.records if each.message.startswith("item cannot be read")]
    if unreadable_items is too_large_item_with_id_at_end:
        assert len(lines) == 1
    else:
        named = {each.id for each in bad if each.id in {vars(line)["work_id"] for line in lines}}
        assert len(named) == len(lines) == 30
    for each in bad:
        assert (
            control_plane.operations.get_item(control_plane.environments[0], each.id).state
            == "queued"
        )
