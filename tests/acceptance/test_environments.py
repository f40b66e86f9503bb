"""One real process that works for several environments.

See workpool/docs/operating.md, "Several environments".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import tempfile
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import pytest

from tests.acceptance.conftest import ENVIRONMENT, SECONDS, TOKEN
from workpool.server import ControlPlane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.acceptance.conftest import CommandStarter, RunningCommand

OTHER = "env_0199bbbbbbbb70008000000000000004"
KEYS = {
    "key-of-the-first-Zx9": frozenset({ENVIRONMENT}),
    "key-of-the-other-Zx9": frozenset({OTHER}),
}
SLOW = f"""
from contextlib import asynccontextmanager
from workpool import hookimpl

@hookimpl
def workpool_lifespan(supervisor):
    return slowly(supervisor.settings.environment_id)

@asynccontextmanager
async def slowly(environment_id):
    while environment_id == "{OTHER}" and not Path("open").exists():
        print("opens slowly", file=sys.stderr, flush=True)
        await asyncio.sleep(0.05)
    yield
"""


class ServiceManagerSocket:
    """A replacement for systemd: a datagram socket that receives the worker's reports."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="wp-")
        self.address = f"{self._folder.name}/notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # noqa: FBT003 - the signature of the standard library
        self._socket.bind(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._folder.cleanup()

    def receive_new_datagrams(self) -> str:
        """Return the datagrams that have arrived since the last call."""
        found = ""
        with contextlib.suppress(BlockingIOError):
            while True:
                found += self._socket.recv(4096).decode() + "\n"
        return found


pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


@pytest.fixture
async def control_plane() -> AsyncIterator[ControlPlane]:
    """Return a control plane with two environments, each with a token of its own."""
    tokens = {TOKEN: None, **KEYS}
    async with ControlPlane(environments=(ENVIRONMENT, OTHER), tokens=tokens) as control_plane:
        yield control_plane


@pytest.fixture
def two_environments_config_file(
    command_working_directory: Path, control_plane: ControlPlane
) -> Path:
    """Write a configuration file with both environments, and their token files; return its path."""
    for name, token in zip("ab", KEYS, strict=True):
        (command_working_directory / f"{name}.token").write_text(token)
    path = command_working_directory / "pool.toml"
    path.write_text(f"""
        [workpool]
        base_url = "{control_plane.base_url}"
        plugins = ["handlers"]
        metrics_listen = "127.0.0.1:0"
        concurrency = 4
        [workpool.environments.{ENVIRONMENT}]
        token_file = "a.token"
        [workpool.environments.{OTHER}]
        token_file = "b.token"
        """)
    return path


def replace_text_in_file(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def append_line_to_file(file: Path, line: str) -> None:
    file.write_text(f"{file.read_text()}\n{line}\n")


def remove_file(file: Path) -> None:
    file.unlink()


async def wait_for_exporter_url(worker: RunningCommand) -> str:
    line = await worker.wait_for_log("metrics served url=")
    return line.partition("url=")[2].split()[0].removesuffix("/metrics")


async def get_status_and_text_from_exporter(worker: RunningCommand, path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as http,
        http.get(await wait_for_exporter_url(worker) + path) as answer,
    ):
        return answer.status, await answer.text()


async def get_live_status_of_worker(worker: RunningCommand) -> Any:
    return json.loads((await get_status_and_text_from_exporter(worker, "/live.json"))[1])


async def test_sessions_of_both_environments_run_and_sigterm_drains_both(
    start_command_without_settings: CommandStarter,
    control_plane: ControlPlane,
    two_environments_config_file: Path,
) -> None:
    del two_environments_config_file
    items = [
        control_plane.enqueue(metadata={"do": "wait"}, environment_id=each)[0]
        for each in (ENVIRONMENT, OTHER)
    ]
    worker = await start_command_without_settings("run", "--config", "pool.toml")
    for item, each in zip(items, (ENVIRONMENT, OTHER), strict=True):
        line = await worker.wait_for_log(item.id)
        assert f"environment_id={each}" in line
        assert "wait runs" in line
    _, metrics = await get_status_and_text_from_exporter(worker, "/metrics")
    for each in (ENVIRONMENT, OTHER):
        assert f'workpool_slots{{environment_id="{each}",state="busy"}} 1.0' in metrics
        assert f'workpool_slots{{environment_id="{each}",state="free"}} ' in metrics
    status, body = await get_status_and_text_from_exporter(worker, "/readyz")
    assert (status, json.loads(body)) == (200, {"status": "ready"})
    assert json.loads((await get_status_and_text_from_exporter(worker, "/scale"))[1])["busy"] == 2
    shown = await get_live_status_of_worker(worker)
    assert (shown["slots"]["busy"], shown["slots"]["limit"]) == (2, 4)
    assert [each["environment_id"] for each in shown["environments"]] == [ENVIRONMENT, OTHER]
    assert {each["environment_id"] for each in shown["sessions"]} == {ENVIRONMENT, OTHER}
    top = await start_command_without_settings("top", "--once", await wait_for_exporter_url(worker))
    assert await top.wait_for_exit() == 0
    rows = [line.split("\t")[:3] for line in top.out.splitlines()]
    for each in (ENVIRONMENT, OTHER):
        assert [f"{shown['worker_id']} {each}", "ready", "1"] in rows
    worker.send_signal(signal.SIGTERM)
    for each in (ENVIRONMENT, OTHER):
        await worker.wait_for_log(f"last scrape wait_seconds=20.0 environment_id={each}")
    # The drains of both environments wait for a scrape of the metrics; one scrape ends both waits.
    await get_status_and_text_from_exporter(worker, "/metrics")
    assert await worker.wait_for_exit() == 0
    assert worker.err.count("result=clean") == 2
    found = [control_plane.operations.get_item(each.environment_id, each.id) for each in items]
    assert [each.metadata["done"] for each in found] == ["when asked"] * 2


async def test_refused_environment_is_reported_while_other_environment_continues(
    start_command_without_settings: CommandStarter,
    control_plane: ControlPlane,
    two_environments_config_file: Path,
) -> None:
    replace_text_in_file(
        two_environments_config_file.parent / "b.token", "key-of-the-other", "revoked"
    )
    worker = await start_command_without_settings("run", "--config", "pool.toml")
    failed = await worker.wait_for_log("environment failed: ")
    assert f"environment_id={OTHER}" in failed
    assert "the token is wrong or has expired" in failed
    assert f"token_file from pool.toml [workpool.environments.{OTHER}]" in failed
    control_plane.enqueue(metadata={"do": "finish"}, environment_id=ENVIRONMENT)
    await worker.wait_for_log("finish runs")
    status, body = await get_status_and_text_from_exporter(worker, "/readyz")
    assert (status, json.loads(body)["reasons"]) == (503, [f"{OTHER}: failed: RefusedError"])
    assert (await get_live_status_of_worker(worker))["slots"]["limit"] == 4
    worker.send_signal(signal.SIGTERM)
    assert await worker.wait_for_exit() == 3
    assert "revoked-Zx9" not in worker.out + worker.err


async def test_process_ends_with_3_if_every_environment_is_refused(
    start_command_without_settings: CommandStarter, two_environments_config_file: Path
) -> None:
    for name in "ab":
        replace_text_in_file(
            two_environments_config_file.parent / f"{name}.token", "key", "revoked"
        )
    worker = await start_command_without_settings("run", "--config", "pool.toml")
    assert await worker.wait_for_exit() == 3
    assert worker.err.count("environment failed: ") == 2


async def test_process_ends_with_2_if_an_environment_cannot_start(
    start_command_without_settings: CommandStarter, two_environments_config_file: Path
) -> None:
    append_line_to_file(two_environments_config_file, 'plugins = ["handlers", "nowhere"]')
    worker = await start_command_without_settings("run", "--config", "pool.toml")
    assert await worker.wait_for_exit() == 2
    assert "no module named 'nowhere'" in worker.err


async def test_run_command_with_invalid_environment_tables_ends_with_status_2(
    start_command_without_settings: CommandStarter, two_environments_config_file: Path
) -> None:
    remove_file(two_environments_config_file.parent / "a.token")
    append_line_to_file(two_environments_config_file, 'log_level = "debug"')
    worker = await start_command_without_settings("run", "--config", "pool.toml")
    assert await worker.wait_for_exit() == 2
    assert (
        "log_level: is for all environments; move it to [workpool] (from pool.toml " in worker.err
    )
    replace_text_in_file(two_environments_config_file, "log_level", "# log_level")
    worker = await start_command_without_settings("run", "--config", "pool.toml")
    assert await worker.wait_for_exit() == 2
    assert f"(from pool.toml [workpool.environments.{ENVIRONMENT}])" in worker.err


async def test_run_command_with_drain_flag_ends_when_queues_of_both_environments_are_empty(
    start_command_without_settings: CommandStarter,
    control_plane: ControlPlane,
    two_environments_config_file: Path,
) -> None:
    del two_environments_config_file
    items = [
        item
        for each in (ENVIRONMENT, OTHER)
        for item in control_plane.enqueue(5, metadata={"do": "finish"}, environment_id=each)
    ]
    worker = await start_command_without_settings("run", "--config", "pool.toml", "--drain")
    assert await worker.wait_for_exit() == 0
    found = [
        control_plane.operations.get_item(each.environment_id, each.id).state for each in items
    ]
    assert found == ["stopped"] * 10


async def test_environment_id_flag_runs_only_that_environment_of_the_file(
    start_command_without_settings: CommandStarter,
    control_plane: ControlPlane,
    two_environments_config_file: Path,
) -> None:
    del two_environments_config_file
    [item] = control_plane.enqueue(metadata={"do": "finish"}, environment_id=OTHER)
    worker = await start_command_without_settings(
        "run", "--config", "pool.toml", "--environment-id", OTHER, "--drain"
    )
    assert await worker.wait_for_exit() == 0
    assert control_plane.operations.get_item(OTHER, item.id).state == "stopped"
    assert ENVIRONMENT not in worker.err


async def test_run_command_with_exit_after_sessions_flag_counts_sessions_of_all_environments(
    start_command_without_settings: CommandStarter,
    control_plane: ControlPlane,
    two_environments_config_file: Path,
) -> None:
    del two_environments_config_file
    for each in (ENVIRONMENT, OTHER):
        control_plane.enqueue(3, metadata={"do": "finish"}, environment_id=each)
    worker = await start_command_without_settings(
        "run", "--config", "pool.toml", "--exit-after-sessions", "4"
    )
    assert await worker.wait_for_exit() == 0
    assert worker.err.count("session ended") == 4


async def test_many_items_in_one_environment_do_not_delay_items_of_other_environment(
    start_command_without_settings: CommandStarter,
    control_plane: ControlPlane,
    two_environments_config_file: Path,
) -> None:
    del two_environments_config_file
    items = control_plane.enqueue(10, metadata={"do": "linger"}, environment_id=ENVIRONMENT)
    worker = await start_command_without_settings(
        "run", "--config", "pool.toml", WORKPOOL_DRAIN_TIMEOUT="0"
    )
    for item in items[:3]:
        assert "linger runs" in await worker.wait_for_log(item.id)
    control_plane.enqueue(metadata={"do": "finish"}, environment_id=OTHER)
    assert f"environment_id={OTHER}" in await worker.wait_for_log("session ended")
    # `ENVIRONMENT` has queued items, but uses three slots only: the fourth is reserved for `OTHER`.
    assert (await get_live_status_of_worker(worker))["slots"]["busy"] == 3
    worker.send_signal(signal.SIGTERM)
    assert await worker.wait_for_exit() == 0


async def test_check_command_reports_each_environment(
    start_command_without_settings: CommandStarter,
    control_plane: ControlPlane,
    two_environments_config_file: Path,
) -> None:
    del control_plane
    replace_text_in_file(
        two_environments_config_file.parent / "b.token", "key-of-the-other", "revoked"
    )
    check = await start_command_without_settings("check", "--config", "pool.toml", "--json")
    assert await check.wait_for_exit() == 3
    found = {
        (each["environment_id"], each["check"]): each["status"]
        for each in json.loads(check.out)["checks"]
    }
    for each, status in ((ENVIRONMENT, "ok"), (OTHER, "FAIL")):
        assert found[each, "credentials"] == "ok"
        assert found[each, "plugins"] == "ok"
        assert found[each, "control plane"] == status
    text = await start_command_without_settings("check", "--config", "pool.toml")
    assert await text.wait_for_exit() == 3
    assert f"FAIL  {OTHER}: control plane: " in text.out
    assert f"ok    {ENVIRONMENT}: control plane: " in text.out


async def test_pause_and_drain_commands_for_one_environment_leave_other_environment_running(
    start_command_without_settings: CommandStarter,
    control_plane: ControlPlane,
    two_environments_config_file: Path,
) -> None:
    socket = two_environments_config_file.parent / "s"
    worker = await start_command_without_settings(
        "run", "--config", "pool.toml", WORKPOOL_CONTROL_SOCKET=str(socket)
    )
    for each in (ENVIRONMENT, OTHER):
        await worker.wait_for_log(f"idle; waiting for work environment_id={each}")

    async def run_command_until_end(*arguments: str) -> str:
        command = await start_command_without_settings(*arguments, "--socket", str(socket))
        assert await command.wait_for_exit() == 0
        return command.out

    asked = await run_command_until_end("pause", "moved", "--environment-id", OTHER)
    assert asked.startswith(f"paused pid={worker.pid} environment_id={OTHER} running=0")
    _, body = await get_status_and_text_from_exporter(worker, "/readyz")
    assert json.loads(body)["reasons"] == [f"{OTHER}: paused: moved"]
    assert f"environment_id={ENVIRONMENT},{OTHER} running=0" in await run_command_until_end(
        "resume"
    )
    unknown = await start_command_without_settings(
        "pause", "--environment-id", "env_none", "--socket", str(socket)
    )
    assert await unknown.wait_for_exit() == 1
    await run_command_until_end("drain", "--environment-id", OTHER)
    assert f"environment_id={OTHER}" in await worker.wait_for_log("drained")
    control_plane.enqueue(metadata={"do": "finish"}, environment_id=ENVIRONMENT)
    await worker.wait_for_log("finish runs")
    assert (await get_status_and_text_from_exporter(worker, "/readyz"))[0] == 200
    await run_command_until_end("drain")
    assert await worker.wait_for_exit() == 0


async def test_service_manager_receives_ready_only_after_every_environment_started(
    start_command_without_settings: CommandStarter, two_environments_config_file: Path
) -> None:
    append_line_to_file(two_environments_config_file.parent / "handlers.py", f"import sys\n{SLOW}")
    with ServiceManagerSocket() as manager:
        worker = await start_command_without_settings(
            "run", "--config", "pool.toml", NOTIFY_SOCKET=manager.address
        )
        await worker.wait_for_log("metrics served url=")
        await worker.wait_for_log("opens slowly")
        assert manager.receive_new_datagrams() == ""
        (two_environments_config_file.parent / "open").touch()
        received = ""
        async with asyncio.timeout(SECONDS):
            while "READY=1" not in received:
                await asyncio.sleep(0.05)
                received += manager.receive_new_datagrams()
        assert "STOPPING=1" not in received
        worker.send_signal(signal.SIGTERM)
        assert await worker.wait_for_exit() == 0
        assert "STOPPING=1" in manager.receive_new_datagrams()
