"""`workpool top` shows the state of workers in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from workpool.cli.top import SESSION_COLUMNS, WORKER_COLUMNS

if TYPE_CHECKING:
    from tests.acceptance.conftest import CommandRunner, CommandStarter
    from workpool.server import ControlPlane

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


async def test_top_command_shows_running_session_and_marks_unreachable_address(
    start_command: CommandStarter, control_plane: ControlPlane, run_in_process: CommandRunner
) -> None:
    (item,) = control_plane.enqueue(metadata={"do": "wait"})
    command = await start_command("run", "handlers", WORKPOOL_METRICS_LISTEN="127.0.0.1:0")
    url = (
        (await command.wait_for_log("metrics served")).partition("url=")[2].partition("/metrics")[0]
    )
    await command.wait_for_log("wait runs")
    shown = await run_in_process("top", "--once", url, "http://127.0.0.1:1")
    assert shown.status == 0
    assert item.session_id in shown.out
    assert "handlers.wait" in shown.out
    assert "no answer" in shown.out


async def test_top_command_without_terminal_prints_column_names_of_both_tables(
    run_in_process: CommandRunner,
) -> None:
    shown = await run_in_process("top", "--once", "http://127.0.0.1:1")
    workers, worker, sessions = shown.out.splitlines()
    assert workers.split("\t") == list(WORKER_COLUMNS)
    assert worker.startswith("http://127.0.0.1:1\tno answer\t")
    assert sessions.split("\t") == list(SESSION_COLUMNS)


async def test_top_command_fails_when_no_worker_answers(run_in_process: CommandRunner) -> None:
    shown = await run_in_process("top", "--once", "http://127.0.0.1:1", "nonsense")
    assert shown.status == 1
    assert "not a URL" in shown.out


async def test_top_command_escapes_control_characters_in_answer_of_worker(
    run_in_process: CommandRunner,
) -> None:
    async def answer_with_control_characters(_: web.Request) -> web.Response:
        status = {"worker_id": "w", "reasons": ["\x1b[2J[red]disk full"], "sessions": []}
        return web.json_response(status)

    app = web.Application()
    app.router.add_get("/live.json", answer_with_control_characters)
    async with TestServer(app) as server:
        shown = await run_in_process("top", "--once", str(server.make_url("")))
    assert shown.status == 0
    assert "\x1b[2J" not in shown.out
    assert "[red]disk full" in shown.out


@pytest.mark.parametrize(
    ("body", "expected_text"), [("{", "its answer is not JSON"), ("[1]", "not a worker")]
)
async def test_top_command_fails_for_address_that_answers_without_worker_status(
    run_in_process: CommandRunner, body: str, expected_text: str
) -> None:
    async def answer_without_worker_status(_: web.Request) -> web.Response:
        return web.Response(text=body)

    app = web.Application()
    app.router.add_get("/live.json", answer_without_worker_status)
    async with TestServer(app) as server:
        shown = await run_in_process("top", "--once", str(server.make_url("")))
    assert shown.status == 1
    assert expected_text in shown.out
