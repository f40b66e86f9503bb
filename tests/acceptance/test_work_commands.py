"""The commands of `workpool work`, and their exit statuses."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.conftest import (
    CLOUD,
    ENVIRONMENT,
    FORBIDDEN,
    LIMITED,
    TOKENS,
    WORKER_KEY,
)
from workpool.server import ControlPlane
from workpool.testing import Faults, literal

if TYPE_CHECKING:
    from pathlib import Path

    from tests.acceptance.conftest import CommandRunner, CommandStarter

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


async def output_of_work_command(ask: CommandRunner, *arguments: str) -> str:
    ended = await ask("work", *arguments)
    assert ended.status == 0
    # `work list` writes to stderr how many items it has read. Other commands write nothing there.
    assert ended.err.startswith("workpool: ") if "list" in arguments else not ended.err
    return ended.out


async def test_work_command_in_its_own_process_prints_ids_and_errors(
    start_command: CommandStarter,
) -> None:
    command = await start_command("work", "enqueue", "--count", "2")
    assert await command.wait_for_exit() == 0
    assert [line[:5] for line in command.out.splitlines()] == ["work_", "work_"]
    command = await start_command("work", "get", "work_unknown")
    assert await command.wait_for_exit() == 3
    assert command.err == "workpool: get: 404 no such work item in this environment\n"


async def test_work_commands_create_list_and_stop_an_item(
    run_in_process: CommandRunner,
) -> None:
    printed = await output_of_work_command(
        run_in_process, "enqueue", "--count", "3", "--metadata", "job=a", "--metadata", "n="
    )
    first, second, third = printed.splitlines()
    assert all(each.startswith("work_") for each in (first, second, third))

    rows = [
        line.split("\t")
        for line in (
            await output_of_work_command(run_in_process, "list", "--limit", "2")
        ).splitlines()
    ]
    assert [row[0] for row in rows] == [first, second]
    assert rows[0][2] == "queued"
    assert rows[0][-1] == "job=a n="
    after = json.loads(
        await output_of_work_command(run_in_process, "list", "--after", second, "--json")
    )
    assert [item["id"] for item in after] == [third]
    before = json.loads(
        await output_of_work_command(run_in_process, "list", "--before", second, "--json")
    )
    assert [item["id"] for item in before] == [first]

    updated = await output_of_work_command(
        run_in_process, "update", first, "job=b", "more=x=y", "--delete", "n", "--json"
    )
    assert json.loads(updated)["metadata"] == {"job": "b", "more": "x=y"}
    assert (
        json.loads(
            await output_of_work_command(run_in_process, "stop", first, "--force", "--json")
        )["state"]
        == "stopped"
    )
    got = json.loads(await output_of_work_command(run_in_process, "get", first, "--json"))
    assert got["state"] == "stopped"
    assert got["created_at"].endswith("Z")
    assert "state\tstopped" in await output_of_work_command(run_in_process, "stop", second)

    stats = json.loads(await output_of_work_command(run_in_process, "stats", "--json"))
    assert (stats["depth"], stats["pending"]) == (1, 0)
    assert "depth\t1" in await output_of_work_command(run_in_process, "stats")
    created = json.loads(
        await output_of_work_command(run_in_process, "enqueue", "--type", "healthcheck", "--json")
    )
    assert [item["type"] for item in created] == ["healthcheck"]


async def test_work_enqueue_command_with_script_creates_scripted_session(
    run_in_process: CommandRunner, command_working_directory: Path, control_plane: ControlPlane
) -> None:
    (command_working_directory / "script.json").write_text(
        '[{"name": "Bash", "input": {"command": "ls"}}]'
    )
    work_id = (
        await output_of_work_command(run_in_process, "enqueue", "--script", "script.json")
    ).strip()
    session_id = json.loads(await output_of_work_command(run_in_process, "get", work_id, "--json"))[
        "session_id"
    ]
    expected_text = control_plane.events(session_id)
    assert (expected_text[-1]["name"], expected_text[-1]["input"]) == ("Bash", {"command": "ls"})


@pytest.mark.parametrize(
    ("variables", "status", "expected_text"),
    [
        ({"WORKPOOL_TOKEN": "wrong"}, 3, "401"),
        ({"WORKPOOL_TOKEN": LIMITED, "WORKPOOL_ENVIRONMENT_ID": FORBIDDEN}, 3, "403"),
        ({"WORKPOOL_ENVIRONMENT_ID": "env_of_nobody"}, 3, "404"),
        ({"WORKPOOL_ENVIRONMENT_ID": CLOUD}, 3, "400"),
        ({"WORKPOOL_BASE_URL": "http://127.0.0.1:9"}, 1, "no answer"),
        ({"WORKPOOL_ENVIRONMENT_ID": ""}, 2, "WORKPOOL_ENVIRONMENT_ID"),
        ({"WORKPOOL_LEASE_TTL": "1"}, 2, "lease_ttl"),
    ],
)
async def test_failed_work_command_prints_one_line_and_ends_with_documented_status(
    run_in_process: CommandRunner, variables: dict[str, str], status: int, expected_text: str
) -> None:
    ended = await run_in_process("work", "stats", **variables)
    assert ended.status == status
    assert expected_text in ended.err
    assert len(ended.err.splitlines()) == 1
    assert ended.out == ""


async def test_work_command_with_invalid_arguments_ends_with_2(
    run_in_process: CommandRunner, command_working_directory: Path
) -> None:
    (command_working_directory / "bad.json").write_text("{")
    (command_working_directory / "object.json").write_text("{}")
    (command_working_directory / "script.json").write_text('[{"name": 5}]')
    cases = [
        (["get", "not/an-id"], 2),
        (["get", "work_unknown"], 3),
        (["list", "--after", "a", "--before", "b"], 2),
        (["enqueue", "--metadata", "novalue"], 2),
        (["enqueue", "--count", "0"], 2),
        (["enqueue", "--script", "nowhere.json"], 2),
        (["enqueue", "--script", "bad.json"], 2),
        (["enqueue", "--script", "object.json"], 2),
        # The command does not validate the tool uses in `script.json`: the control plane does.
        (["enqueue", "--script", "script.json"], 3),
        (["update", "work_unknown"], 2),
    ]
    for arguments, status in cases:
        ended = await run_in_process("work", *arguments)
        assert ended.status == status, (arguments, ended.err)
        assert ended.err
        assert ended.out == ""


async def test_work_stop_command_prints_stopped_item_if_key_may_not_read_single_items(
    run_in_process: CommandRunner, control_plane: ControlPlane
) -> None:
    """The key may list items, but may not read a single item.

    In the anthropic dialect, a stop returns no item, so the command finds the item in the list.
    """
    (item,) = control_plane.enqueue()
    variables = {
        "WORKPOOL_BASE_URL": control_plane.anthropic_base_url,
        "WORKPOOL_DIALECT": "anthropic",
        "WORKPOOL_TOKEN": WORKER_KEY,
    }
    ended = await run_in_process("work", "stop", item.id, "--force", "--json", **variables)
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out)["state"] == "stopped"


async def test_failed_item_is_listed_and_retried_as_a_copy(
    start_command: CommandStarter, run_in_process: CommandRunner
) -> None:
    [work_id] = (
        await output_of_work_command(run_in_process, "enqueue", "--metadata", "do=fail")
    ).split()
    queued = await run_in_process("work", "retry", work_id)
    assert queued.status == 1
    assert queued.err == f"workpool: {work_id} is queued; only a stopped item is retried\n"
    await output_of_work_command(run_in_process, "enqueue", "--metadata", "do=finish")
    worker = await start_command("run", "handlers", "--drain")
    assert await worker.wait_for_exit() == 0

    listed = await run_in_process("work", "list", "--failed", "--json")
    [failed] = json.loads(listed.out)
    assert (failed["id"], failed["metadata"]["workpool.error"]) == (work_id, "RuntimeError")
    assert listed.err == "workpool: 1 shown of 1 items read\n"

    [copy] = (await output_of_work_command(run_in_process, "retry", work_id)).split()
    got = json.loads(await output_of_work_command(run_in_process, "get", copy, "--json"))
    assert (got["state"], got["type"]) == ("queued", failed["type"])
    assert got["metadata"] == {"do": "fail", "workpool.retry_of": work_id}
    assert got["session_id"] != failed["session_id"]
    [newest] = json.loads(
        await output_of_work_command(run_in_process, "list", "--newest", "--limit", "1", "--json")
    )
    assert newest["id"] == copy
    stats = json.loads(await output_of_work_command(run_in_process, "stats", "--json"))
    assert (stats["running"], stats["stopped"]) == (0, 2)


async def test_work_retry_command_prints_item_metadata_if_control_plane_cannot_create_items(
    run_in_process: CommandRunner,
) -> None:
    faults = Faults()
    faults.add(literal(b"", 405), "enqueue")
    async with ControlPlane(
        environments=(ENVIRONMENT,), tokens=TOKENS, middlewares=[faults.middleware]
    ) as other:
        (item,) = other.enqueue(metadata={"report": "7", "workpool.error": "ValueError"})
        other.operations.stop_item(ENVIRONMENT, item.id, force=True)
        ended = await run_in_process("work", "retry", item.id, WORKPOOL_BASE_URL=other.base_url)
    assert (ended.status, ended.out) == (3, "")
    assert "no call that creates items" in ended.err
    assert ended.err.endswith("it had the metadata: report=7\n")


async def test_work_list_command_with_unknown_state_ends_with_status_2(
    run_in_process: CommandRunner,
) -> None:
    ended = await run_in_process("work", "list", "--state", "lost")
    assert ended.status == 2
    assert "queued, starting, active, stopping, stopped" in ended.err


async def test_work_list_command_with_watch_flag_prints_changes_until_a_signal(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    (first,) = control_plane.enqueue()
    command = await start_command("work", "list", "--watch")
    assert first.id in await command.wait_for_output()
    (second,) = control_plane.enqueue()
    while second.id not in (line := await command.wait_for_output()):
        assert first.id in line
    command.send_signal(signal.SIGINT)
    assert await command.wait_for_exit() == 130
