"""Signals, exit statuses and health of `workpool run`.

See workpool/docs/cli.md, "Exit statuses" and "Signals".
"""

from __future__ import annotations

import json
import signal
import socket
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.acceptance.conftest import CLOUD, ENVIRONMENT, FORBIDDEN, LIMITED, was_stopped

if TYPE_CHECKING:
    from pathlib import Path

    from tests.acceptance.conftest import CommandRunner, CommandStarter
    from workpool.server import ControlPlane, Item, Operations

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


def enqueue_items(plane: ControlPlane, do: str, **metadata: str) -> Item:
    [item] = plane.enqueue(metadata={"do": do, **metadata})
    return item


def read_stored_item(plane: ControlPlane, item: Item) -> Item:
    operations: Operations = plane.operations
    return operations.get_queue(ENVIRONMENT).get_item(item.id)


async def test_run_command_with_drain_flag_ends_with_0_when_queue_is_empty(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    items = [enqueue_items(control_plane, "finish") for _ in range(20)]
    command = await start_command("run", "handlers", "--drain")
    assert await command.wait_for_exit() == 0
    assert [read_stored_item(control_plane, item).state for item in items] == ["stopped"] * 20
    assert {read_stored_item(control_plane, item).metadata["done"] for item in items} == {"yes"}
    assert command.out == "", "logs belong on stderr"


async def test_run_command_with_module_and_function_name_uses_only_that_handler(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    item, other = enqueue_items(control_plane, "finish"), enqueue_items(control_plane, "fail")
    command = await start_command("run", "handlers:finish")
    await command.wait_for_log("finish runs")
    await command.wait_for_log("item declined")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert read_stored_item(control_plane, item).state == "stopped"
    assert read_stored_item(control_plane, other).state == "queued"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_run_command_after_first_signal_waits_for_running_sessions(
    start_command: CommandStarter, control_plane: ControlPlane, number: signal.Signals
) -> None:
    item = enqueue_items(control_plane, "wait")
    command = await start_command("run", "handlers")
    await command.wait_for_log("wait runs")
    command.send_signal(number)
    assert await command.wait_for_exit() == 0
    assert read_stored_item(control_plane, item).state == "stopped"
    assert read_stored_item(control_plane, item).metadata["done"] == "when asked"
    assert "result=clean" in command.err


async def test_drain_releases_running_session_but_does_not_stop_its_item(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    item = enqueue_items(control_plane, "linger")
    command = await start_command("run", "handlers", WORKPOOL_DRAIN_TIMEOUT="0.2")
    await command.wait_for_log("linger runs")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    stored = read_stored_item(control_plane, item)
    assert stored.metadata["workpool.released"] == "the pool is draining"
    assert not was_stopped(control_plane, item.id)
    assert "result=deadline" in command.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_run_command_after_second_signal_ends_with_128_plus_signal_number(
    start_command: CommandStarter, control_plane: ControlPlane, number: signal.Signals
) -> None:
    item = enqueue_items(control_plane, "linger")
    command = await start_command("run", "handlers", WORKPOOL_DRAIN_TIMEOUT="3600")
    await command.wait_for_log("linger runs")
    command.send_signal(signal.SIGTERM)
    await command.wait_for_log("draining")
    command.send_signal(number)
    assert await command.wait_for_exit() == 128 + number
    assert not was_stopped(control_plane, item.id)


async def test_stall_timeout_ends_silent_session_but_not_session_that_waits_for_human(
    start_command: CommandStarter, control_plane: ControlPlane, command_working_directory: Path
) -> None:
    silent, asking = enqueue_items(control_plane, "linger"), enqueue_items(control_plane, "ask")
    command = await start_command("run", "handlers", WORKPOOL_STALL_TIMEOUT="1")
    url = (await command.wait_for_log("metrics served url=")).partition("url=")[2].split()[0]
    stalled = await command.wait_for_log("session stalled")
    assert silent.id in stalled
    assert "handlers.linger" in stalled
    await command.wait_for_log("outcome=stalled")
    assert read_stored_item(control_plane, silent).state == "stopped"
    assert read_stored_item(control_plane, silent).metadata["workpool.error"] == "SessionStalled"
    assert read_stored_item(control_plane, asking).state == "active"
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        samples = (await answer.text()).splitlines()
    gauge = f'workpool_session_silence_seconds_max{{environment_id="{ENVIRONMENT}",handler='
    assert f'{gauge}"handlers.ask"}} 0.0' in samples
    (command_working_directory / "answer").write_text("yes")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert read_stored_item(control_plane, asking).metadata["done"] == "answered"


async def test_run_command_that_abandons_a_session_ends_with_status_1(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    enqueue_items(control_plane, "ignore")
    command = await start_command("run", "handlers", WORKPOOL_DRAIN_TIMEOUT="0")
    await command.wait_for_log("ignore runs")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 1
    assert "abandoned=1" in command.err


async def test_task_left_running_by_handler_does_not_keep_process_running(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    enqueue_items(control_plane, "spawn")
    command = await start_command("run", "handlers", "--drain")
    assert await command.wait_for_exit() == 0
    assert "abandoned task=orphan" in command.err


async def test_blocking_code_in_thread_does_not_keep_process_running(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    enqueue_items(control_plane, "thread")
    command = await start_command("run", "handlers", WORKPOOL_DRAIN_TIMEOUT="0")
    await command.wait_for_log("thread runs")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert "thread still runs; abandoned thread_name=workpool-blocking" in command.err


async def test_thread_started_by_handler_is_logged_and_does_not_keep_process_running(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    enqueue_items(control_plane, "own thread")
    command = await start_command("run", "handlers", "--drain")
    assert await command.wait_for_exit() == 0
    assert "thread still runs; abandoned thread_name=own-thread" in command.err
    assert "idle-pool" not in command.err


async def test_process_ends_with_status_1_if_handler_blocks_event_loop_beyond_time_limit(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    enqueue_items(control_plane, "block")
    command = await start_command("run", "handlers", WORKPOOL_MAX_BLOCK="1.5")
    assert await command.wait_for_exit() == 1
    assert "event loop blocked" in command.err
    assert "in block" in command.err, "the stack of the handler is printed"


async def test_health_and_metrics_are_answered_while_handler_blocks_loop(
    start_command: CommandStarter, control_plane: ControlPlane, command_working_directory: Path
) -> None:
    item = enqueue_items(control_plane, "block")
    command = await start_command("run", "handlers", "--drain")
    url = (await command.wait_for_log("metrics served url=")).partition("url=")[2].split()[0]
    await command.wait_for_log("block runs")
    async with aiohttp.ClientSession(url.removesuffix("metrics")) as http:
        for path in ("healthz", "readyz", "metrics"):
            async with http.get(path) as answer:
                # `/readyz` may answer 503, because a worker with a blocked loop is not ready.
                assert answer.status == 200 or path == "readyz", path
                text = await answer.text()
        assert 'workpool_slots{environment_id="' in text
        assert "process_cpu_seconds_total" in text
        assert read_stored_item(control_plane, item).state == "active"
        (command_working_directory / "free").touch()
        await command.wait_for_log("drained result=clean")
        async with http.get("metrics") as answer:
            assert answer.status == 200
    assert await command.wait_for_exit() == 0
    assert "block ends" in command.err


async def test_process_with_scraped_metrics_waits_for_last_scrape_after_drain(
    start_command: CommandStarter,
) -> None:
    command = await start_command("run", "handlers")
    url = (await command.wait_for_log("metrics served url=")).partition("url=")[2].split()[0]
    async with aiohttp.ClientSession() as http:
        async with http.get(url) as answer:
            assert (
                'workpool_drain_duration_seconds_count{result="clean"} 0.0' in await answer.text()
            )
        command.send_signal(signal.SIGTERM)
        await command.wait_for_log("waiting for the last scrape")
        async with http.get(url) as answer:
            assert (
                'workpool_drain_duration_seconds_count{result="clean"} 1.0' in await answer.text()
            )
    assert await command.wait_for_exit() == 0


async def test_second_signal_ends_the_wait_for_the_last_scrape(
    start_command: CommandStarter,
) -> None:
    command = await start_command("run", "handlers")
    url = (await command.wait_for_log("metrics served url=")).partition("url=")[2].split()[0]
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        assert answer.status == 200
    command.send_signal(signal.SIGTERM)
    await command.wait_for_log("drained result=clean")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("variables", "expected_text"),
    [
        ({"WORKPOOL_TOKEN": "wrong"}, "401"),
        ({"WORKPOOL_TOKEN": LIMITED, "WORKPOOL_ENVIRONMENT_ID": FORBIDDEN}, "403"),
        ({"WORKPOOL_ENVIRONMENT_ID": "env_of_nobody"}, "404"),
        ({"WORKPOOL_ENVIRONMENT_ID": CLOUD}, "400"),
    ],
)
async def test_run_command_ends_with_status_3_if_control_plane_refuses_its_polls(
    start_command: CommandStarter, variables: dict[str, str], expected_text: str
) -> None:
    command = await start_command("run", "handlers", **variables)
    assert await command.wait_for_exit() == 3
    assert f"poll: {expected_text}" in command.err


@pytest.mark.parametrize(
    ("arguments", "variables", "expected_text"),
    [
        (["run", "--nonsense"], {}, "--nonsense"),
        (["run", "handlers", "--concurrency", "none"], {}, "concurrency"),
        (["run", "handlers"], {"WORKPOOL_LEASE_TTL": "5"}, "lease_ttl"),
        (["run", "handlers"], {"WORKPOOL_TOKEN": ""}, "WORKPOOL_TOKEN_FILE"),
        (["run", "handlers", "--config", "nowhere.toml"], {}, "config"),
    ],
)
async def test_run_command_with_invalid_arguments_or_settings_ends_with_2(
    run_in_process: CommandRunner,
    arguments: list[str],
    variables: dict[str, str],
    expected_text: str,
) -> None:
    ended = await run_in_process(*arguments, **variables)
    assert ended.status == 2
    assert expected_text in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("arguments", "expected_text"),
    [
        ([], "no plugin handles anything"),
        (["handlres"], "no module named 'handlres'"),
        (["handlers:nothing"], "has no 'nothing'"),
    ],
)
async def test_run_command_with_unknown_plugins_ends_with_2(
    start_command: CommandStarter, arguments: list[str], expected_text: str
) -> None:
    command = await start_command("run", *arguments)
    assert await command.wait_for_exit() == 2
    assert expected_text in command.err


async def test_run_command_names_address_and_ends_with_2_if_port_is_in_use(
    start_command: CommandStarter,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = await start_command("run", "handlers", "--metrics-listen", address)
        assert await command.wait_for_exit() == 2
    assert address in command.err
    assert "metrics_listen" in command.err


async def test_run_command_with_plugin_that_fails_to_start_ends_with_1(
    start_command: CommandStarter, command_working_directory: Path
) -> None:
    (command_working_directory / "broken.py").write_text(
        "from contextlib import asynccontextmanager\n"
        "from workpool import handler, hookimpl\n"
        "@handler\n"
        "async def nothing(session): ...\n"
        "@asynccontextmanager\n"
        "async def database():\n"
        "    raise OSError('the database is away')\n"
        "    yield\n"
        "@hookimpl\n"
        "def workpool_lifespan(supervisor): return database()\n"
    )
    command = await start_command("run", "broken", "--log-format", "json")
    assert await command.wait_for_exit() == 1
    last = json.loads(command.err.splitlines()[-1])
    assert "the database is away" in last["stack"]


async def test_run_command_ends_after_two_signals_although_start_of_plugin_never_ends(
    start_command: CommandStarter, command_working_directory: Path
) -> None:
    (command_working_directory / "slow.py").write_text(
        "import asyncio, logging\n"
        "from contextlib import asynccontextmanager\n"
        "from workpool import handler, hookimpl\n"
        "@handler\n"
        "async def nothing(session): ...\n"
        "@asynccontextmanager\n"
        "async def database():\n"
        "    logging.getLogger('slow').info('connecting')\n"
        "    await asyncio.sleep(3600)\n"
        "    yield\n"
        "@hookimpl\n"
        "def workpool_lifespan(supervisor): return database()\n"
    )
    command = await start_command("run", "slow")
    await command.wait_for_log("connecting")
    command.send_signal(signal.SIGINT)
    command.send_signal(signal.SIGTERM)
    # Two pending signals are delivered in either order, so either signal can decide the exit
    # status.
    assert await command.wait_for_exit() in {130, 143}


async def test_json_log_lines_have_ids_and_errors(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    item, bad = enqueue_items(control_plane, "finish"), enqueue_items(control_plane, "fail")
    command = await start_command("run", "handlers", "--drain", "--log-format", "json", "-v")
    assert await command.wait_for_exit() == 0
    records = [json.loads(line) for line in command.err.splitlines()]
    [ran] = [record for record in records if record["message"] == "finish runs"]
    assert (ran["work_id"], ran["session_id"]) == (item.id, item.session_id)
    assert (ran["level"], ran["logger"]) == ("info", "workpool.session")
    assert ran["time"].endswith("Z")
    [failed] = [record for record in records if "error" in record]
    assert failed["work_id"] == bad.id
    assert failed["error_type"] == "RuntimeError"
    assert "as it was asked to" in failed["stack"]


async def test_flags_of_run_command_override_variables_and_variables_override_file(
    start_command: CommandStarter, control_plane: ControlPlane, command_working_directory: Path
) -> None:
    (command_working_directory / "greeter.py").write_text(
        "from workpool import handler\n"
        "class Greeter:\n"
        "    def __init__(self, greeting): self.greeting = greeting\n"
        "    @handler\n"
        "    async def greet(self, session): return {'said': self.greeting}\n"
    )
    (command_working_directory / "pool.toml").write_text(
        "[workpool]\nplugins = ['greeter:Greeter']\nlog_level = 'error'\n"
        "base_url = 'http://127.0.0.1:9'\n"
        "[workpool.plugin.Greeter]\ngreeting = 'hello from the file'\n"
    )
    [item] = control_plane.enqueue()
    command = await start_command(
        "run", "--drain", "--config", "pool.toml", "--log-level", "info", WORKPOOL_LOG_LEVEL="error"
    )
    assert await command.wait_for_exit() == 0
    assert read_stored_item(control_plane, item).metadata["said"] == "hello from the file"
    assert "drained result=clean" in command.err


async def test_run_command_with_exit_after_sessions_flag_ends_with_0(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    items = [enqueue_items(control_plane, "finish") for _ in range(3)]
    flags = ("--exit-after-sessions", "2", "--drain-timeout", "unlimited")
    command = await start_command("run", "handlers", *flags)
    assert await command.wait_for_exit() == 0
    assert sorted(read_stored_item(control_plane, item).state for item in items) == [
        "queued",
        "stopped",
        "stopped",
    ]
    assert "limit=exit_after_sessions" in command.err
    assert "result=clean" in command.err


async def test_run_command_with_idle_limit_and_empty_queue_ends_with_0(
    start_command: CommandStarter,
) -> None:
    flags = ("--exit-after-sessions", "1", "--exit-after-idle", "0.1")
    command = await start_command("run", "handlers", *flags)
    assert await command.wait_for_exit() == 0
    assert "limit=exit_after_idle" in command.err


async def test_sigusr1_pauses_pool_and_sigusr2_resumes_it(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    running = enqueue_items(control_plane, "wait")
    command = await start_command("run", "handlers")
    await command.wait_for_log("wait runs")
    url = (
        (await command.wait_for_log("metrics served"))
        .partition("url=")[2]
        .split()[0]
        .removesuffix("/metrics")
    )
    command.send_signal(signal.SIGUSR1)
    await command.wait_for_log("paused reason=SIGUSR1")
    item = enqueue_items(control_plane, "finish")
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/readyz") as answer:
            assert answer.status == 503
            assert "paused: SIGUSR1" in await answer.text()
        async with session.get(f"{url}/metrics") as answer:
            assert f'workpool_paused{{environment_id="{ENVIRONMENT}",reason="pause"}} 1' in (
                await answer.text()
            )
    assert (
        read_stored_item(control_plane, running).state,
        read_stored_item(control_plane, item).state,
    ) == (
        "active",
        "queued",
    )
    command.send_signal(signal.SIGUSR2)
    await command.wait_for_log("resumed")
    await command.wait_for_log("finish runs")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
