"""The findings and exit statuses of `workpool check` and `workpool plugins`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.conftest import WORKER_KEY

if TYPE_CHECKING:
    from tests.acceptance.conftest import CommandRunner, CommandStarter
    from workpool.server import ControlPlane

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


async def test_check_command_with_valid_setup_reports_every_check_as_ok(
    start_command: CommandStarter,
) -> None:
    command = await start_command("check", "handlers")
    assert await command.wait_for_exit() == 0
    lines = command.out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 5
    for subject in ("settings", "plugins: handlers", "credentials", "control plane", "clock"):
        assert any(subject in line for line in lines)


@pytest.mark.parametrize("dialect", ["qoder", "anthropic"])
async def test_check_command_succeeds_with_key_without_permission_to_read_statistics(
    run_in_process: CommandRunner, control_plane: ControlPlane, dialect: str
) -> None:
    url = {"qoder": control_plane.base_url, "anthropic": control_plane.anthropic_base_url}[dialect]
    variables = {"WORKPOOL_BASE_URL": url, "WORKPOOL_DIALECT": dialect}
    ended = await run_in_process("check", "handlers", WORKPOOL_TOKEN=WORKER_KEY, **variables)
    assert ended.status == 0
    assert "FAIL" not in ended.out


async def test_check_output_does_not_show_values_of_extra_headers(
    run_in_process: CommandRunner,
) -> None:
    headers = '{"x-worker-token": "hunter2-hunter2"}'
    ended = await run_in_process("check", "handlers", "--json", WORKPOOL_EXTRA_HEADERS=headers)
    assert ended.status == 0
    assert "hunter2" not in ended.out + ended.err


@pytest.mark.parametrize(
    ("arguments", "variables", "status", "check", "expected_text"),
    [
        ([], {"WORKPOOL_LEASE_TTL": "5"}, 2, "settings", "lease_ttl"),
        ([], {"WORKPOOL_TOKEN": ""}, 2, "credentials", "WORKPOOL_TOKEN"),
        ([], {"WORKPOOL_CA_FILE": "nowhere.pem"}, 2, "credentials", "nowhere.pem: No such file"),
        (["nowhere"], {}, 2, "plugins", "nowhere"),
        ([], {"WORKPOOL_TOKEN": "wrong"}, 3, "control plane", "the token is wrong"),
        ([], {"WORKPOOL_ENVIRONMENT_ID": "env_x"}, 3, "control plane", "environment_id"),
        ([], {"WORKPOOL_BASE_URL": "http://127.0.0.1:9"}, 1, "control plane", "network"),
    ],
)
async def test_failed_check_exits_with_its_status_and_names_wrong_setting(
    run_in_process: CommandRunner,
    arguments: list[str],
    variables: dict[str, str],
    status: int,
    check: str,
    expected_text: str,
) -> None:
    ended = await run_in_process("check", *arguments, "--json", **variables)
    assert ended.status == status
    found = json.loads(ended.out)
    assert found["ok"] is False
    [failed] = [each for each in found["checks"] if each["status"] == "FAIL"]
    assert failed["check"] == check
    assert expected_text in failed["message"] + failed["advice"]


async def test_check_command_with_valid_but_harmful_settings_succeeds_and_warns(
    run_in_process: CommandRunner,
) -> None:
    ended = await run_in_process("check", WORKPOOL_WRITE_RATE="0.5", WORKPOOL_LAESE_TTL="30")
    assert ended.status == 0
    warnings = [line for line in ended.out.splitlines() if line.startswith("warn")]
    assert len(warnings) == 4
    for expected_text in (
        "heartbeats a second",
        "a drain waits",
        "did you mean WORKPOOL_LEASE_TTL",
        "no plugin is active",
    ):
        assert any(expected_text in line for line in warnings)


async def test_plugins_command_with_json_flag_prints_hooks_and_handlers(
    run_in_process: CommandRunner,
) -> None:
    ended = await run_in_process("plugins", "handlers:finish", "--json")
    assert ended.status == 0
    found: dict[str, Any] = json.loads(ended.out)
    [echo] = [each for each in found["available"] if each["name"] == "echo"]
    assert echo["value"] == "workpool_echo"
    [active] = found["active"]
    assert active["handlers"] == [
        {
            "name": "finish.finish",
            "type": "session",
            "metadata": {"do": "finish"},
            "timeout": None,
            "max_sessions": None,
            "reserved_sessions": 0,
        }
    ]


async def test_plugins_command_without_json_flag_prints_plugins_and_handlers(
    run_in_process: CommandRunner,
) -> None:
    ended = await run_in_process("plugins", "handlers")
    assert ended.status == 0
    rows = [line.split("\t") for line in ended.out.splitlines()]
    assert ["available", "echo", "workpool_echo"] in [row[:3] for row in rows]
    assert ["active", "handlers", "handlers"] in [row[:3] for row in rows]
    assert ["handler", "handlers.finish", "type=session do=finish"] in [row[:3] for row in rows]


async def test_plugins_command_with_unknown_plugin_suggests_similar_name(
    run_in_process: CommandRunner,
) -> None:
    ended = await run_in_process("plugins", "eco")
    assert ended.status == 2
    assert "did you mean 'echo'" in ended.err
