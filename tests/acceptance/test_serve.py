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
    from tests.acceptance.conftest import Ask, Command, Start

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


async def serve(bare: Start, *arguments: str, **environment: str) -> tuple[Command, dict[str, Any]]:
    command = await bare("serve", "--port", "0", "--json", *arguments, **environment)
    ready: dict[str, Any] = json.loads(await command.prints())
    return command, ready


def variables(ready: dict[str, Any], token: str) -> dict[str, str]:
    return {
        "WORKPOOL_BASE_URL": ready["base_url"],
        "WORKPOOL_TOKEN": token,
        "WORKPOOL_ENVIRONMENT_ID": ready["environments"][0],
    }


async def said(ask: Ask, asked: dict[str, str], *arguments: str, status: int = 0) -> str:
    ended = await ask(*arguments, **asked)
    assert ended.status == status, ended.err
    return ended.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_answers_both_dialects_until_signal(
    bare: Start, ask: Ask, number: signal.Signals
) -> None:
    command, ready = await serve(bare)
    assert set(ready) == {"base_url", "anthropic_base_url", "token", "environments"}
    asked = variables(ready, ready["token"])
    [work_id] = (await said(ask, asked, "work", "enqueue")).split()
    anthropic = asked | {
        "WORKPOOL_BASE_URL": ready["anthropic_base_url"],
        "WORKPOOL_DIALECT": "anthropic",
    }
    assert work_id in await said(ask, anthropic, "work", "get", work_id)
    command.send(number)
    assert await command.ends() == 0
    assert len(command.out.splitlines()) == 1
    assert ready["token"] not in command.err


@pytest.mark.trial
async def test_serve_and_worker_of_anthropic_sdk_complete_a_session(
    bare: Start, ask: Ask, folder: Path
) -> None:
    from anthropic import AsyncAnthropic  # noqa: PLC0415 - installed with the trials only

    (folder / "script.json").write_text(
        json.dumps([{"name": "bash", "input": {"command": "echo hello >note"}}])
    )
    command, ready = await serve(bare)
    asked = variables(ready, ready["token"])
    [work_id] = (await said(ask, asked, "work", "enqueue", "--script", "script.json")).split()
    (workdir := folder / "workdir").mkdir()
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
    command.send(signal.SIGTERM)
    assert await command.ends() == 0


async def test_ready_line_of_serve_has_variables_that_a_worker_needs(bare: Start, ask: Ask) -> None:
    command = await bare("serve", "--port", "0")
    word, *pairs = (await command.prints()).split()
    assert word == "ready"
    asked = dict(pair.split("=", 1) for pair in pairs)
    assert "depth" in await said(ask, asked, "work", "stats")
    command.send(signal.SIGTERM)
    assert await command.ends() == 0


async def test_tokens_given_to_serve_are_limited_and_never_printed(
    bare: Start, ask: Ask, folder: Path
) -> None:
    (folder / "tokens").write_text(f"# a token, its environments\n{LIMITED} {ENVIRONMENT}\n")
    command, ready = await serve(
        bare,
        *("--token", TOKEN, "--token-file", "tokens", "--cloud-environment", "env_cloud"),
        *("--environment", ENVIRONMENT, "--environment", FORBIDDEN),
    )
    assert ready["token"] is None
    assert ready["environments"] == [ENVIRONMENT, FORBIDDEN]
    asked = variables(ready, TOKEN)
    other = {"WORKPOOL_ENVIRONMENT_ID": FORBIDDEN}
    await said(ask, asked, "work", "stats")
    await said(ask, {**asked, **other}, "work", "stats")
    await said(ask, {**asked, "WORKPOOL_TOKEN": LIMITED}, "work", "stats")
    await said(ask, {**asked, **other, "WORKPOOL_TOKEN": LIMITED}, "work", "stats", status=3)
    cloud = {"WORKPOOL_ENVIRONMENT_ID": "env_cloud"}
    await said(ask, {**asked, **cloud}, "work", "stats", status=3)
    command.send(signal.SIGTERM)
    assert await command.ends() == 0


def command_line(pid: int) -> str:
    """Return the command line in the list of processes; empty without /proc."""
    file = Path(f"/proc/{pid}/cmdline")
    return file.read_text() if file.exists() else ""


async def test_token_in_environment_variable_of_serve_is_not_in_process_list(
    bare: Start, ask: Ask
) -> None:
    command, ready = await serve(bare, WORKPOOL_SERVE_TOKEN=f"{TOKEN} {LIMITED}")
    assert ready["token"] is None
    for token in (TOKEN, LIMITED):
        await said(ask, variables(ready, token), "work", "stats")
    assert TOKEN not in command_line(command.pid)
    command.send(signal.SIGTERM)
    assert await command.ends() == 0
    assert TOKEN not in command.err


async def test_serve_with_unreadable_store_row_names_row_and_ends_with_1(
    bare: Start, folder: Path
) -> None:
    command, _ = await serve(bare, "--store", "work.db")
    command.send(signal.SIGTERM)
    assert await command.ends() == 0
    with closing(sqlite3.connect(folder / "work.db")) as connection:
        connection.execute(
            "INSERT INTO session (id, environment_id, metadata, created_at) VALUES "
            "('sess_1', 'env_1', 'no JSON', 0)"
        )
        connection.commit()
    command = await bare("serve", "--port", "0", "--store", "work.db")
    assert await command.ends() == 1
    assert "work.db: the row 'sess_1' cannot be read: metadata is malformed" in command.err


async def test_items_in_store_on_disk_survive_restart_of_serve(bare: Start, ask: Ask) -> None:
    command, ready = await serve(bare, "--store", "work.db")
    asked = variables(ready, ready["token"])
    ids = (await said(ask, asked, "work", "enqueue", "--count", "3")).split()
    command.send(signal.SIGTERM)
    assert await command.ends() == 0
    command, ready = await serve(bare, "--store", "work.db")
    listed = await said(ask, variables(ready, ready["token"]), "work", "list")
    assert [line.split()[0] for line in listed.splitlines()] == ids
    command.send(signal.SIGTERM)
    assert await command.ends() == 0


async def test_serve_that_cannot_start_prints_reason(bare: Start, folder: Path) -> None:
    (folder / "tokens").write_text("two words are a token and no-environment!\n")
    (folder / "notes.txt").write_text("this is no database" * 100)
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
        ]
        for arguments, status, words in cases:
            command = await bare("serve", "--port", "0", *arguments)
            assert await command.ends() == status, arguments
            assert words in command.err
            assert "Traceback" not in command.err
            assert command.out == ""


async def test_serve_with_fault_file_injects_its_faults(
    bare: Start, ask: Ask, folder: Path
) -> None:
    (folder / "faults.toml").write_text(
        "clock_skew = 90\n"
        '[[fault]]\nkind = "status"\ncode = 503\nops = ["enqueue"]\ntimes = 1\n'
        '[[fault]]\nkind = "expired"\nops = ["heartbeat"]\ntimes = 1\n'
    )
    command, ready = await serve(bare, "--faults", "faults.toml")
    asked = variables(ready, ready["token"])
    failed = await ask("work", "enqueue", **asked)
    assert failed.status == 1
    assert "503" in failed.err
    [work_id] = (await said(ask, asked, "work", "enqueue", "--metadata", "do=finish")).split()
    worker = await bare(
        *("run", "handlers", "--drain"), **asked, WORKPOOL_METRICS_LISTEN="127.0.0.1:0"
    )
    assert await worker.ends() == 0
    assert "item reclaimed" in worker.err
    # The lease had expired at the first heartbeat, so the item was delivered and run again.
    item = json.loads(await said(ask, asked, "work", "get", work_id, "--json"))
    assert (item["state"], item["metadata"]["done"]) == ("stopped", "yes")
    assert datetime.fromisoformat(item["created_at"]) > datetime.now(UTC) + timedelta(seconds=30)
    command.send(signal.SIGTERM)
    assert await command.ends() == 0
    assert "faults injected file=faults.toml count=2" in command.err


async def test_serve_with_unwritable_store_ends_with_1(bare: Start, ask: Ask, folder: Path) -> None:
    """A restarted server continues from its stored answers; a running one could store no more."""
    # otherwise the coverage file could not be written either
    unmeasured = {"COVERAGE_PROCESS_CONFIG": ""}
    command, ready = await serve(bare, "--store", str(folder / "work.db"), **unmeasured)
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    asked = variables(ready, ready["token"])
    await said(ask, asked, "work", "enqueue", "--count", "100", status=1)
    assert await command.ends() == 1
    assert "work.db" in command.err
    assert "Traceback" not in command.err


async def test_verbose_serve_logs_requests_without_tokens_queries_and_bodies(
    bare: Start, ask: Ask
) -> None:
    command, ready = await serve(bare, "-v")
    asked = variables(ready, ready["token"])
    work_id = (await said(ask, asked, "work", "enqueue", "--metadata", "key=hunter2")).strip()
    await said(ask, asked, "work", "list")
    wrong = asked | {"WORKPOOL_TOKEN": "hunter2-" * 3}
    await said(ask, wrong, "work", "get", work_id, status=3)
    command.send(signal.SIGTERM)
    assert await command.ends() == 0
    lines = [line for line in command.err.splitlines() if " request method=" in line]
    words = [dict(word.split("=") for word in line.split()[4:]) for line in lines]
    assert all(set(each) == {"method", "path", "status", "seconds"} for each in words)
    [created, listed, refused] = [(each["method"], each["status"]) for each in words]
    assert (created, listed, refused) == (("POST", "200"), ("GET", "200"), ("GET", "401"))
    assert words[2]["path"].endswith(work_id)
    assert "limit=" not in command.err
    assert "hunter2" not in command.err
    assert ready["token"] not in command.err
