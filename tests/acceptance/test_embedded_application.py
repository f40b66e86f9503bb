"""The embedding examples as real processes: with a wrong token, and under SIGTERM.

See workpool/docs/embedding.md, "When the pool fails".
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, NamedTuple, Protocol

import aiohttp
import pytest

from tests.acceptance.conftest import ENVIRONMENT, TOKEN, RunningCommand
from tests.test_docs import find_code_block_containing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from workpool.server import ControlPlane, Item

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

REPORTS = """
from workpool import Session, handler

@handler
async def wait(session: Session) -> dict[str, str]:
    print("session runs", flush=True)
    await session.interrupted()
    return {"done": "when asked"}
"""
EXAMPLES = (
    "program",
    "ending",
    "vital_aiohttp",
    "vital_fastapi",
    "web_aiohttp",
    "web_fastapi",
)
AIOHTTP = "import socket, sys\nfrom {module} import app, web\n"
AIOHTTP += "web.run_app(app, sock=socket.socket(fileno=int(sys.argv[1])))\n"
TRIAL = pytest.mark.trial
"""Only the extra `trials` has FastAPI and uvicorn."""


class RunningApplication(NamedTuple):
    """The process of an embedding application, and the address of its HTTP server."""

    command: RunningCommand
    url: str


class ExampleApplicationStarter(Protocol):
    async def __call__(self, module: str, **variables: str) -> RunningApplication: ...


@pytest.fixture
async def start_example_application(
    command_working_directory: Path, control_plane: ControlPlane
) -> AsyncIterator[ExampleApplicationStarter]:
    """Return a function that starts a process with an example of the page `embedding.md`."""
    (command_working_directory / "reports.py").write_text(REPORTS)
    for name in EXAMPLES:
        (command_working_directory / f"{name}.py").write_text(
            find_code_block_containing(f"# {name}.py")
        )
    commands: list[RunningCommand] = []

    async def start_process(module: str, **variables: str) -> RunningApplication:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            number = str(listener.fileno())
            arguments = ["-m", module]
            if module.endswith("aiohttp"):
                arguments = ["-c", AIOHTTP.format(module=module), number]
            elif module.endswith("fastapi"):
                arguments = ["-m", "uvicorn", f"{module}:app", "--fd", number]
            inherited = {k: v for k, v in os.environ.items() if not k.startswith("WORKPOOL_")}
            settings = {
                "WORKPOOL_BASE_URL": control_plane.base_url,
                "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
                "QODER_PAT": TOKEN,
            }
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *arguments),
                cwd=command_working_directory,
                env={**inherited, **settings, **variables},
                pass_fds=[listener.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            commands.append(RunningCommand(process))
            return RunningApplication(commands[-1], f"http://127.0.0.1:{listener.getsockname()[1]}")

    yield start_process
    for command in commands:
        await command.kill()


def read_stored_item(plane: ControlPlane, item: Item) -> Item:
    return plane.operations.get_queue(ENVIRONMENT).get_item(item.id)


async def get_status_and_text(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Check a condition repeatedly until another process has made it true."""
    async with asyncio.timeout(45):
        while not await condition():  # noqa: ASYNC110 - another process changes it
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("module", "status"),
    [
        ("program", 0),
        ("vital_aiohttp", 0),
        ("web_aiohttp", 0),
        pytest.param("vital_fastapi", -signal.SIGTERM, marks=TRIAL),
        pytest.param("web_fastapi", -signal.SIGTERM, marks=TRIAL),
    ],
)
async def test_application_under_sigterm_lets_its_session_end(
    start_example_application: ExampleApplicationStarter,
    control_plane: ControlPlane,
    command_working_directory: Path,
    module: str,
    status: int,
) -> None:
    if module == "program":
        # The handler of this example ends at once. The test needs a handler that waits for a drain.
        path = command_working_directory / "program.py"
        path.write_text(path.read_text().replace("[greet]", '["reports"]'))
    [item] = control_plane.enqueue()
    application, _ = await start_example_application(module)
    await application.wait_for_output("session runs")
    application.send_signal(signal.SIGTERM)
    assert await application.wait_for_exit() == status
    assert read_stored_item(control_plane, item).state == "stopped"
    assert read_stored_item(control_plane, item).metadata["done"] == "when asked"


@pytest.mark.parametrize(
    ("module", "status"),
    [
        ("program", 1),
        ("vital_aiohttp", 1),
        pytest.param("vital_fastapi", -signal.SIGTERM, marks=TRIAL),
    ],
)
async def test_application_with_a_wrong_token_ends_and_logs_the_reason(
    start_example_application: ExampleApplicationStarter, module: str, status: int
) -> None:
    application, _ = await start_example_application(module, QODER_PAT="wrong")
    assert await application.wait_for_exit() == status
    assert "RefusedError: poll: 401" in application.err


@pytest.mark.parametrize("module", ["web_aiohttp", pytest.param("web_fastapi", marks=TRIAL)])
async def test_application_reports_not_ready_after_wrong_token_stopped_its_pool(
    start_example_application: ExampleApplicationStarter, module: str
) -> None:
    application, url = await start_example_application(module, QODER_PAT="wrong")

    async def live_path_answers_503() -> bool:
        return (await get_status_and_text(f"{url}/live"))[0] == 503

    await wait_until(live_path_answers_503)
    status, body = await get_status_and_text(f"{url}/ready")
    assert status == 503
    assert "failed: RefusedError" in body
    application.send_signal(signal.SIGTERM)
    await application.wait_for_exit()


@pytest.mark.parametrize(
    "module", ["program", "vital_aiohttp", pytest.param("vital_fastapi", marks=TRIAL)]
)
async def test_application_with_wrong_settings_does_not_start(
    start_example_application: ExampleApplicationStarter, module: str
) -> None:
    application, _ = await start_example_application(module, WORKPOOL_CONCURRENCY="many")
    assert await application.wait_for_exit() in {1, 3}
    assert "concurrency: must be a whole number, 1 or more (from WORKPOOL_CONCURRENCY)" in (
        application.err
    )
