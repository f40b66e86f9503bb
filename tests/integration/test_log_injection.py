"""Log records with hostile answers of a control plane contain no forged line and no token."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from workpool import Session, handler
from workpool.events import ItemDeclined, PollerBackedOff, SessionFinished
from workpool.logs import JsonFormatter, TextFormatter
from workpool.server.http.server_dialects import DIALECTS
from workpool.testing import literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder

FORGED = "\n2026-03-01T12:00:00.250Z ERROR   workpool.pool forged\r\x1b[2J\x9b31m\x7f\u202e\u2066"


@handler
async def return_at_once(_: Session) -> None:
    pass


@handler
async def raise_error_with_metadata(session: Session) -> None:
    raise ValueError(session.item.metadata["text"])


@pytest.fixture(params=[TextFormatter, JsonFormatter])
def log_output(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """Return a buffer that receives all log lines in one of the formats of the command line."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(request.param())
    root = logging.getLogger()
    root.addHandler(handler)
    level, root.level = root.level, logging.INFO
    yield written
    root.removeHandler(handler)
    root.level = level


@pytest.fixture
def serve_hostile_item(control_plane: ControlPlane, faults: Faults) -> Callable[[str], None]:
    """Return a function that answers one poll with an item of the given type."""

    def answer_with_hostile_item(kind: str) -> None:
        (item,) = control_plane.enqueue()
        answer = DIALECTS["qoder"].item_json(item)
        answer["data"]["type"] = kind
        faults.add(literal(orjson.dumps(answer)), "poll", times=1)

    return answer_with_hostile_item


def check_log_lines(output: io.StringIO, token: str, limit: int) -> None:
    text = output.getvalue()
    assert text.replace("\n", "").isprintable()
    assert not [line for line in text.split("\n") if line.startswith("2026-03-01")]
    assert token not in text
    assert len(text) < limit


async def test_hostile_type_of_declined_item_is_escaped_and_shortened_in_log(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    serve_hostile_item: Callable[[str], None],
    log_output: io.StringIO,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    serve_hostile_item(control_plane.token + FORGED + "x" * 3_900_000)
    async with make_pool(return_at_once, block_ms=20):
        await recorder.wait_for(ItemDeclined)
    check_log_lines(log_output, control_plane.token, 5_000)
    (record,) = [each for each in caplog.records if each.message == "item declined"]
    message = vars(record)["type"]
    # The record itself is shortened, not only its formatted text: applications may format it.
    assert len(message) < 300
    assert message.isprintable()
    assert control_plane.token not in message


async def test_hostile_error_of_control_plane_is_escaped_and_shortened_in_log(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    log_output: io.StringIO,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = control_plane.token + FORGED + "\u200f" * 1_000_000
    envelope = {"error": {"message": text, "type": text, "param": text}}
    faults.add(literal(orjson.dumps(envelope), 500), "poll", times=1)
    async with make_pool(return_at_once, block_ms=20):
        await recorder.wait_for(PollerBackedOff)
    check_log_lines(log_output, control_plane.token, 5_000)
    (message,) = [each for each in caplog.messages if each.startswith("poll failed")]
    assert len(message) < 600
    assert message.isprintable()
    assert control_plane.token not in message


async def test_hostile_text_in_handler_traceback_is_escaped_and_shortened_in_log(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, log_output: io.StringIO
) -> None:
    text = f"{control_plane.token}{FORGED}" + FORGED * 20_000
    control_plane.enqueue(metadata={"text": text})
    async with make_pool(raise_error_with_metadata, block_ms=20):
        await recorder.wait_for(SessionFinished)
    assert "raise_error_with_metadata" in log_output.getvalue()
    check_log_lines(log_output, control_plane.token, 120_000)
