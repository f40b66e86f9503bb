"""The ready line, the end and the errors of `workpool serve`."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.conftest import ENVIRONMENT, FORBIDDEN, LIMITED, TOKEN

if TYPE_CHECKING:
    from tests.acceptance.conftest import CommandRunner, CommandStarter, RunningCommand
    from tests.postgres.cluster import Cluster

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


async def start_serve_command(
    bare: CommandStarter, *arguments: str, **environment: str
) -> tuple[RunningCommand, dict[str, Any]]:
    command = await bare("serve", "--port", "0", "--json", *arguments, **environment)
    ready: dict[str, Any] = json.loads(await command.wait_for_output())
    return command, ready


def make_environment_variables_of_client(ready: dict[str, Any], token: str) -> dict[str, str]:
    return {
        "WORKPOOL_BASE_URL": ready["base_url"],
        "WORKPOOL_TOKEN": token,
        "WORKPOOL_ENVIRONMENT_ID": ready["environments"][0],
    }


async def run_and_read_output(
    ask: CommandRunner, asked: dict[str, str], *arguments: str, status: int = 0
) -> str:
    ended = await ask(*arguments, **asked)
    assert ended.status == status, ended.err
    return ended.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_command_answers_qoder_and_anthropic_dialects_until_signal(
    start_command_without_settings: CommandStarter,
    run_in_process: CommandRunner,
    number: signal.Signals,
) -> None:
    command, ready = await start_serve_command(start_command_without_settings)
    assert set(ready) == {"base_url", "anthropic_base_url", "token", "environments"}
    asked = make_environment_variables_of_client(ready, ready["token"])
    [work_id] = (await run_and_read_output(run_in_process, asked, "work", "enqueue")).split()
    anthropic = asked | {
        "WORKPOOL_BASE_URL": ready["anthropic_base_url"],
        "WORKPOOL_DIALECT": "anthropic",
    }
    assert work_id in await run_and_read_output(run_in_process, anthropic, "work", "get", work_id)
    command.send_signal(number)
    assert await command.wait_for_exit() == 0
    assert len(command.out.splitlines()) == 1
    assert ready["token"] not in command.err


@pytest.mark.trial
async def test_worker_of_anthropic_sdk_completes_session_from_serve_command(
    start_command_without_settings: CommandStarter,
    run_in_process: CommandRunner,
    command_working_directory: Path,
) -> None:
    from anthropic import AsyncAnthropic  # noqa: PLC0415 - installed with the trials only

    (command_working_directory / "script.json").write_text(
        json.dumps([{"name": "bash", "input": {"command": "echo hello >note"}}])
    )
    command, ready = await start_serve_command(start_command_without_settings)
    asked = make_environment_variables_of_client(ready, ready["token"])
    [work_id] = (
        await run_and_read_output(
            run_in_process, asked, "work", "enqueue", "--script", "script.json"
        )
    ).split()
    (workdir := command_working_directory / "workdir").mkdir()
    environment = asked["WORKPOOL_ENVIRONMENT_ID"]
    base_url = ready["anthropic_base_url"].removesuffix("/v1")
    sdk = AsyncAnthropic(auth_token=ready["token"], base_url=base_url)
    async with sdk, asyncio.timeout(60):
        work = sdk.beta.environments.work
        item = await work.poll(environment)
        assert item is not None
        await work.ack(work_id, environment_id=environment)
        await work.worker(workdir=workdir, max_idle=0.05).handle_item(
            work_id=work_id,
            environment_id=environment,
            session_id=item.data.id,
            environment_key=ready["token"],
        )
        assert (await work.retrieve(work_id, environment_id=environment)).state == "stopped"
    assert (workdir / "note").read_text() == "hello\n"
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0


async def test_first_output_line_of_serve_command_contains_settings_for_a_worker(
    start_command_without_settings: CommandStarter, run_in_process: CommandRunner
) -> None:
    command = await start_command_without_settings("serve", "--port", "0")
    word, *pairs = (await command.wait_for_output()).split()
    assert word == "ready"
    asked = dict(pair.split("=", 1) for pair in pairs)
    assert "depth" in await run_and_read_output(run_in_process, asked, "work", "stats")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0


async def test_serve_command_limits_tokens_to_environments_and_never_prints_them(
    start_command_without_settings: CommandStarter,
    run_in_process: CommandRunner,
    command_working_directory: Path,
) -> None:
    (command_working_directory / "tokens").write_text(
        f"# a token, its environments\n{LIMITED} {ENVIRONMENT}\n"
    )
    command, ready = await start_serve_command(
        start_command_without_settings,
        *("--token", TOKEN, "--token-file", "tokens", "--cloud-environment", "env_cloud"),
        *("--environment", ENVIRONMENT, "--environment", FORBIDDEN),
    )
    assert ready["token"] is None
    assert ready["environments"] == [ENVIRONMENT, FORBIDDEN]
    asked = make_environment_variables_of_client(ready, TOKEN)
    other = {"WORKPOOL_ENVIRONMENT_ID": FORBIDDEN}
    await run_and_read_output(run_in_process, asked, "work", "stats")
    await run_and_read_output(run_in_process, {**asked, **other}, "work", "stats")
    await run_and_read_output(run_in_process, {**asked, "WORKPOOL_TOKEN": LIMITED}, "work", "stats")
    await run_and_read_output(
        run_in_process, {**asked, **other, "WORKPOOL_TOKEN": LIMITED}, "work", "stats", status=3
    )
    cloud = {"WORKPOOL_ENVIRONMENT_ID": "env_cloud"}
    await run_and_read_output(run_in_process, {**asked, **cloud}, "work", "stats", status=3)
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0


def read_command_line_of_process(pid: int) -> str:
    """Return the command line of a process from /proc, which `ps` shows; empty without /proc."""
    file = Path(f"/proc/{pid}/cmdline")
    return file.read_text() if file.exists() else ""


async def test_process_list_shows_no_token_from_environment_variable_of_serve_command(
    start_command_without_settings: CommandStarter, run_in_process: CommandRunner
) -> None:
    command, ready = await start_serve_command(
        start_command_without_settings, WORKPOOL_SERVE_TOKEN=f"{TOKEN} {LIMITED}"
    )
    assert ready["token"] is None
    for token in (TOKEN, LIMITED):
        await run_and_read_output(
            run_in_process, make_environment_variables_of_client(ready, token), "work", "stats"
        )
    assert TOKEN not in read_command_line_of_process(command.pid)
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert TOKEN not in command.err


async def test_serve_command_with_unreadable_store_row_names_row_and_ends_with_1(
    start_command_without_settings: CommandStarter, command_working_directory: Path
) -> None:
    command, _ = await start_serve_command(start_command_without_settings, "--store", "work.db")
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    with closing(sqlite3.connect(command_working_directory / "work.db")) as connection:
        connection.execute(
            "INSERT INTO session (id, environment_id, metadata, created_at) VALUES "
            "('sess_1', 'env_1', 'no JSON', 0)"
        )
        connection.commit()
    command = await start_command_without_settings("serve", "--port", "0", "--store", "work.db")
    assert await command.wait_for_exit() == 1
    assert "work.db: the row 'sess_1' cannot be read: metadata is malformed" in command.err


async def test_items_in_store_on_disk_survive_restart_of_serve_command(
    start_command_without_settings: CommandStarter, run_in_process: CommandRunner
) -> None:
    command, ready = await start_serve_command(start_command_without_settings, "--store", "work.db")
    asked = make_environment_variables_of_client(ready, ready["token"])
    ids = (
        await run_and_read_output(run_in_process, asked, "work", "enqueue", "--count", "3")
    ).split()
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    command, ready = await start_serve_command(start_command_without_settings, "--store", "work.db")
    listed = await run_and_read_output(
        run_in_process, make_environment_variables_of_client(ready, ready["token"]), "work", "list"
    )
    assert [line.split()[0] for line in listed.splitlines()] == ids
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0


async def test_serve_command_that_cannot_start_prints_reason(
    start_command_without_settings: CommandStarter, command_working_directory: Path
) -> None:
    (command_working_directory / "tokens").write_text("two words are a token and no-environment!\n")
    (command_working_directory / "notes.txt").write_text("this is no database" * 100)
    (command_working_directory / "skew.toml").write_text("clock_skew = 5\n")
    database = "postgresql://nobody@127.0.0.1:1/queue"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            (["--port", port], 2, port),
            (["--host", "0.0.0.0"], 2, "WORKPOOL_SERVE_TOKEN"),  # noqa: S104 - refused
            (["--token-file", "nowhere"], 2, "token file: nowhere: No such file"),
            (["--token-file", "tokens"], 2, "line 1"),
            (["--environment", "not an id"], 2, "environment"),
            (["--port", "70000"], 2, "--port"),
            (["--retention", "59"], 2, "--retention"),
            (["--store", "notes.txt"], 1, "notes.txt"),
            (["--faults", "nowhere"], 2, "faults file: nowhere: No such file"),
            (["--faults", "notes.txt"], 2, "faults file: "),
            (["--store", database, "--faults", "skew.toml"], 2, "skew.toml: no clock_skew"),
            (["--store", database], 1, "store postgresql://127.0.0.1:1/queue"),
        ]
        for arguments, status, words in cases:
            command = await start_command_without_settings("serve", "--port", "0", *arguments)
            assert await command.wait_for_exit() == status, arguments
            assert words in command.err
            assert "Traceback" not in command.err
            assert command.out == ""


async def test_serve_command_with_fault_file_injects_the_faults_of_the_file(
    start_command_without_settings: CommandStarter,
    run_in_process: CommandRunner,
    command_working_directory: Path,
) -> None:
    (command_working_directory / "faults.toml").write_text(
        "clock_skew = 90\n"
        '[[fault]]\nkind = "status"\ncode = 503\nops = ["enqueue"]\ntimes = 1\n'
        '[[fault]]\nkind = "expired"\nops = ["heartbeat"]\ntimes = 1\n'
    )
    command, ready = await start_serve_command(
        start_command_without_settings, "--faults", "faults.toml"
    )
    asked = make_environment_variables_of_client(ready, ready["token"])
    failed = await run_in_process("work", "enqueue", **asked)
    assert failed.status == 1
    assert "503" in failed.err
    [work_id] = (
        await run_and_read_output(
            run_in_process, asked, "work", "enqueue", "--metadata", "do=finish"
        )
    ).split()
    worker = await start_command_without_settings(
        *("run", "handlers", "--drain"), **asked, WORKPOOL_METRICS_LISTEN="127.0.0.1:0"
    )
    assert await worker.wait_for_exit() == 0
    # A fault ended the lease at the first heartbeat, so the worker received the item again.
    assert "item reclaimed" in worker.err
    item = json.loads(
        await run_and_read_output(run_in_process, asked, "work", "get", work_id, "--json")
    )
    assert (item["state"], item["metadata"]["done"]) == ("stopped", "yes")
    assert datetime.fromisoformat(item["created_at"]) > datetime.now(UTC) + timedelta(seconds=30)
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    assert "faults injected file=faults.toml count=2" in command.err


async def test_serve_command_with_unwritable_store_ends_with_1(
    start_command_without_settings: CommandStarter,
    run_in_process: CommandRunner,
    command_working_directory: Path,
) -> None:
    """The server ends, because changes that it accepted later would be lost at a restart."""
    # Coverage is off, because the test limits the size of the files that the process writes.
    unmeasured = {"COVERAGE_PROCESS_CONFIG": ""}
    command, ready = await start_serve_command(
        start_command_without_settings,
        "--store",
        str(command_working_directory / "work.db"),
        **unmeasured,
    )
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    asked = make_environment_variables_of_client(ready, ready["token"])
    await run_and_read_output(run_in_process, asked, "work", "enqueue", "--count", "100", status=1)
    assert await command.wait_for_exit() == 1
    assert "work.db" in command.err
    assert "Traceback" not in command.err


async def test_serve_command_with_verbose_flag_logs_requests_without_tokens_queries_and_bodies(
    start_command_without_settings: CommandStarter, run_in_process: CommandRunner
) -> None:
    command, ready = await start_serve_command(start_command_without_settings, "-v")
    asked = make_environment_variables_of_client(ready, ready["token"])
    work_id = (
        await run_and_read_output(
            run_in_process, asked, "work", "enqueue", "--metadata", "key=hunter2"
        )
    ).strip()
    await run_and_read_output(run_in_process, asked, "work", "list")
    wrong = asked | {"WORKPOOL_TOKEN": "hunter2-" * 3}
    await run_and_read_output(run_in_process, wrong, "work", "get", work_id, status=3)
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    lines = [line for line in command.err.splitlines() if " request method=" in line]
    words = [dict(word.split("=") for word in line.split()[4:]) for line in lines]
    assert all(set(each) == {"method", "path", "status", "seconds"} for each in words)
    [created, listed, refused] = [(each["method"], each["status"]) for each in words]
    assert (created, listed, refused) == (("POST", "200"), ("GET", "200"), ("GET", "401"))
    assert words[2]["path"].endswith(work_id)
    assert "limit=" not in command.err
    assert "hunter2" not in command.err
    assert ready["token"] not in command.err


async def start_two_servers(start: CommandStarter, url: str) -> list[dict[str, str]]:
    """Start two servers on one database. Return the variables for each server's clients."""
    given = {"WORKPOOL_SERVE_STORE": url, "WORKPOOL_SERVE_TOKEN": TOKEN}
    return [
        make_environment_variables_of_client((await start_serve_command(start, **given))[1], TOKEN)
        for _ in range(2)
    ]


async def test_item_created_on_one_server_is_stopped_on_another_with_same_database(
    start_command_without_settings: CommandStarter, run_in_process: CommandRunner, database_url: str
) -> None:
    one, other = await start_two_servers(start_command_without_settings, database_url)
    [work_id] = (await run_and_read_output(run_in_process, one, "work", "enqueue")).split()
    assert work_id in await run_and_read_output(run_in_process, other, "work", "list")
    await run_and_read_output(run_in_process, other, "work", "stop", "--force", work_id)
    assert "stopped" in await run_and_read_output(run_in_process, one, "work", "get", work_id)


# The test needs more than a minute, because the suite waits until a lease of 60 s lapses.
@pytest.mark.timeout(300)
async def test_server_with_postgresql_fulfils_every_clause_of_conformance_suite(
    start_command_without_settings: CommandStarter, database_url: str
) -> None:
    (_, asked) = await start_two_servers(start_command_without_settings, database_url)
    suite = await start_command_without_settings(
        "conform", asked["WORKPOOL_BASE_URL"], "--test-environment", **asked
    )
    assert await suite.wait_for_exit(200) == 0


async def test_serve_command_never_prints_password_of_its_database(
    start_command_without_settings: CommandStarter, database_url: str
) -> None:
    url = database_url.replace("workpool@", "workpool:pass%2Fword-9137@")
    command, _ = await start_serve_command(
        start_command_without_settings, "--verbose", "--store", url
    )
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
    down = await start_command_without_settings(
        "serve", "--store", "postgresql://me:pass%2Fword-9137@127.0.0.1:1/queue"
    )
    assert await down.wait_for_exit() != 0
    assert "127.0.0.1:1/queue" in down.err
    for text in (command.out, command.err, down.out, down.err):
        assert "word-9137" not in text


async def test_serve_command_with_migrate_flag_creates_schema_and_exits(
    start_command_without_settings: CommandStarter, postgres: Cluster, database_url: str
) -> None:
    for number in ("1", "0"):
        command = await start_command_without_settings(
            "serve", "--migrate", WORKPOOL_SERVE_STORE=database_url
        )
        assert await command.wait_for_exit() == 0
        assert command.out == f"the schema is up to date; migrations: {number}\n"
    assert postgres.execute("SELECT count(*) FROM items", database_url) == "0"


async def test_serve_command_refuses_migrate_flag_without_postgresql_database(
    start_command_without_settings: CommandStarter,
) -> None:
    command = await start_command_without_settings("serve", "--migrate")
    assert await command.wait_for_exit() == 2
    assert command.err == "workpool: --migrate needs a PostgreSQL database as --store\n"
