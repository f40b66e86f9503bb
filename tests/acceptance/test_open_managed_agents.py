"""The command line with a control plane of another project, `open-managed-agents` from PyPI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.open_managed_agents import (
    InstallationError,
    install_control_plane,
    running_control_plane,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.acceptance.conftest import CommandStarter
    from tests.acceptance.open_managed_agents import OpenManagedAgentsServer

pytestmark = [pytest.mark.trial, pytest.mark.acceptance, pytest.mark.timeout(400)]

PAGE = Path(__file__).parents[2] / "workpool/docs/protocol.md"
SESSIONS = 110
"""More than one page of the list, which has at most 100 items."""
HANDLER = """
from workpool import Session, handler

@handler
async def run(session: Session) -> dict[str, str]:
    return {"ran": session.id}
"""


@pytest.fixture(scope="session")
def python_with_installed_control_plane(tmp_path_factory: pytest.TempPathFactory) -> str:
    try:
        return install_control_plane(tmp_path_factory.mktemp("open-managed-agents"))
    except InstallationError as error:
        pytest.skip(str(error))


@pytest.fixture
async def control_plane(
    python_with_installed_control_plane: str, tmp_path: Path
) -> AsyncIterator[OpenManagedAgentsServer]:
    async with running_control_plane(
        python_with_installed_control_plane, tmp_path
    ) as control_plane:
        yield control_plane


async def test_open_managed_agents_accepts_the_check_and_work_list_and_run_commands(
    control_plane: OpenManagedAgentsServer,
    start_command_without_settings: CommandStarter,
    command_working_directory: Path,
) -> None:
    variables = {
        "WORKPOOL_DIALECT": "anthropic",
        "WORKPOOL_BASE_URL": control_plane.base_url,
        "WORKPOOL_ENVIRONMENT_ID": control_plane.environment_id,
        "WORKPOOL_TOKEN": "any",
        "WORKPOOL_METRICS_LISTEN": "127.0.0.1:0",
        # With two concurrent polls, this control plane can deliver one item twice. The second
        # delivery then overwrites metadata that a worker has written after the first delivery.
        "WORKPOOL_POLLERS": "1",
    }

    async def list_items_by_session() -> dict[str, dict[str, Any]]:
        command = await start_command_without_settings(
            "work", "list", "--limit", "1000", "--json", **variables
        )
        assert await command.wait_for_exit() == 0
        items = json.loads(command.out)
        assert len({item["id"] for item in items}) == len(items)
        return {item["session_id"]: item for item in items}

    sessions = {await control_plane.create_session() for _ in range(SESSIONS)}
    (command_working_directory / "run_sessions.py").write_text(HANDLER)

    check = await start_command_without_settings("check", "run_sessions", **variables)
    assert await check.wait_for_exit() == 0
    assert "control plane: answered in" in check.out

    before = await list_items_by_session()
    assert before.keys() == sessions
    assert {item["state"] for item in before.values()} == {"queued"}

    run = await start_command_without_settings("run", "run_sessions", "--drain", **variables)
    assert await run.wait_for_exit(180) == 0
    assert "result=clean" in run.err

    after = await list_items_by_session()
    assert {item["state"] for item in after.values()} == {"stopped"}
    ran = {session_id: item["metadata"]["ran"] for session_id, item in after.items()}
    assert ran == {session_id: session_id for session_id in sessions}


def read_documented_verdicts_of_clauses() -> dict[str, str]:
    """Return the documented verdict of each clause that does not hold for this control plane."""
    table = PAGE.read_text().partition("What `open-managed-agents` does instead:")[2]
    rows = re.findall(r"^\| (`.*?`) \| ([a-z ]+) \|", table, re.MULTILINE)
    return {clause: verdict for names, verdict in rows for clause in re.findall("`(.+?)`", names)}


async def test_conform_command_for_open_managed_agents_finds_documented_differences(
    control_plane: OpenManagedAgentsServer, start_command_without_settings: CommandStarter
) -> None:
    variables = {"WORKPOOL_TOKEN": "any"}
    command = await start_command_without_settings(
        *("conform", control_plane.base_url, "--dialect", "anthropic", "--json"),
        *("--environment-id", control_plane.environment_id, "--agent", control_plane.agent_id),
        **variables,
    )
    assert await command.wait_for_exit(320) == 1
    clauses = json.loads(command.out)["clauses"]
    found = {each["clause"]: each["verdict"] for each in clauses if each["verdict"] != "holds"}
    assert found == read_documented_verdicts_of_clauses()
