"""Tests of the example plugin on a real control plane, as a model for the tests of a plugin."""

import pytest

from workpool.events import SessionFinished, SessionStarted
from workpool.testing import Kit, in_virtual_time
from workpool_echo import echo

ONE_HOUR = {"seconds": "3600"}


async def test_echo_returns_text_as_metadata_and_logs_it(
    workpool: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    result = await workpool.run_session(echo, metadata={"text": "hi", "seconds": "0"})

    assert (result.outcome, result.metadata["echo"]) == ("completed", "hi")
    logged = [record.message for record in caplog.records if record.name == "workpool.session"]
    assert logged == ["echo: 'hi' started", "echo: 'hi' done"]


async def test_echo_without_text_returns_hello(workpool: Kit) -> None:
    result = await workpool.run_session(echo, metadata={"seconds": "0"})

    assert result.metadata["echo"] == "hello"


@in_virtual_time
async def test_echo_runs_for_requested_seconds(workpool: Kit) -> None:
    result = await workpool.run_session(echo, metadata=ONE_HOUR)

    assert result.outcome == "completed"
    assert 3600 <= result.seconds < 3601


async def test_echo_stores_text_stopped_early_as_metadata_if_operator_stops_item(
    workpool: Kit,
) -> None:
    (item,) = workpool.enqueue(metadata=ONE_HOUR)
    async with workpool.pool(echo):
        await workpool.wait_for(SessionStarted)
        workpool.stop(item)
        finished = await workpool.wait_for(SessionFinished)

    assert finished.outcome == "stopped"
    assert workpool.item(item).metadata["echo"] == "stopped early"


async def test_echo_handler_that_runs_during_drain_releases_its_item(workpool: Kit) -> None:
    (item,) = workpool.enqueue(metadata=ONE_HOUR)
    async with workpool.pool(echo):
        await workpool.wait_for(SessionStarted)
    finished = await workpool.wait_for(SessionFinished)

    assert finished.outcome == "released"
    assert workpool.item(item).metadata["workpool.released"] == "Release"


async def test_echo_with_malformed_seconds_fails_session(workpool: Kit) -> None:
    result = await workpool.run_session(echo, metadata={"seconds": "soon"})

    assert (result.outcome, type(result.error)) == ("failed", ValueError)
