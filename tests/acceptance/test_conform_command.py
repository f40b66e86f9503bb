"""`workpool conform`: reports, exit statuses, and environments that the command refuses to use."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.conftest import ENVIRONMENT, TOKEN
from workpool.conformance import CLAUSES
from workpool.server import ControlPlane
from workpool.testing import Faults, delay

if TYPE_CHECKING:
    from tests.acceptance.conftest import CommandRunner, CommandStarter

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


async def test_conform_command_for_conforming_control_plane_ends_with_status_0(
    run_in_process: CommandRunner, control_plane: ControlPlane
) -> None:
    ended = await run_in_process(
        "conform", control_plane.base_url, "--clause", "ack-starts", "--clause", "stop-force"
    )
    assert ended.out.splitlines() == [
        "holds               ack-starts",
        "holds               stop-force",
        "2 holds",
    ]
    assert ended.status == 0


async def test_conform_command_with_dialect_flag_uses_that_dialect(
    run_in_process: CommandRunner, control_plane: ControlPlane
) -> None:
    ended = await run_in_process(
        *("conform", control_plane.anthropic_base_url, "--dialect", "anthropic"),
        *("--clause", "stop-force", "--json"),
    )
    report = json.loads(ended.out)
    assert (report["dialect"], report["verdict"], ended.status) == ("anthropic", "holds", 0)
    assert report["clauses"] == [
        {
            "clause": "stop-force",
            "rule": "`force` ends an item at once.",
            "verdict": "holds",
            "seen": "",
        }
    ]


async def test_conform_command_with_dialect_that_differs_from_address_ends_with_status_4(
    run_in_process: CommandRunner, control_plane: ControlPlane
) -> None:
    ended = await run_in_process(
        "conform", control_plane.base_url, "--dialect", "anthropic", "--clause", "stop-force"
    )
    assert "differs harmlessly  stop-force: HTTP 200 with a body" in ended.out
    assert ended.status == 4


async def test_conform_command_with_fewer_items_than_clauses_ends_with_status_5(
    run_in_process: CommandRunner, control_plane: ControlPlane
) -> None:
    (item,) = control_plane.enqueue()
    ended = await run_in_process(
        *("conform", control_plane.base_url, "--work-id", item.id),
        *("--clause", "ack-starts", "--clause", "stop-force"),
    )
    assert "could not be tried  stop-force: all given items are used" in ended.out
    assert ended.status == 5


async def test_conform_command_refuses_environment_that_has_items_of_other_clients(
    run_in_process: CommandRunner, control_plane: ControlPlane
) -> None:
    (item,) = control_plane.enqueue()
    ended = await run_in_process("conform", control_plane.base_url)
    assert f"item {item.id} was not created by the suite; --test-environment" in ended.err
    assert (ended.status, ended.out) == (2, "")
    assert control_plane.operations.get_item(ENVIRONMENT, item.id).state == "queued"


async def test_conform_command_with_test_environment_flag_accepts_items_of_other_clients(
    run_in_process: CommandRunner, control_plane: ControlPlane
) -> None:
    control_plane.enqueue()
    ended = await run_in_process(
        "conform", control_plane.base_url, "--test-environment", "--clause", "ack-starts"
    )
    assert ended.status == 0


async def test_conform_command_without_permission_to_list_items_ends_with_status_3(
    run_in_process: CommandRunner, control_plane: ControlPlane
) -> None:
    variables = {"WORKPOOL_TOKEN": "wrong"}
    ended = await run_in_process("conform", control_plane.base_url, **variables)
    assert "the items cannot be listed: HTTP 401" in ended.err
    assert ended.status == 3


@pytest.mark.parametrize(
    ("arguments", "expected_text"),
    [
        (["--clause", "no-such-clause"], "is no clause of the protocol"),
        (["--agent", "agent_1", "--work-id", "work_1"], "not both"),
        (["--dialect", "klingon"], "dialect"),
    ],
)
async def test_conform_command_with_invalid_arguments_ends_with_status_2(
    run_in_process: CommandRunner,
    control_plane: ControlPlane,
    arguments: list[str],
    expected_text: str,
) -> None:
    ended = await run_in_process("conform", control_plane.base_url, *arguments)
    assert expected_text in ended.err
    assert ended.status == 2


async def test_conform_command_without_answer_of_control_plane_ends_with_status_1(
    run_in_process: CommandRunner,
) -> None:
    ended = await run_in_process("conform", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9: no answer: ClientConnectorError" in ended.err
    assert ended.status == 1


@pytest.mark.trial
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dialect", ["qoder", "anthropic"])
async def test_conform_command_for_embedded_control_plane_reports_that_every_clause_holds(
    start_command: CommandStarter, control_plane: ControlPlane, dialect: str
) -> None:
    """The suite waits 80 s of real time, since the command cannot advance a control plane's clock.

    The tests in `tests/protocol` run the same suite with a clock that they advance.
    """
    address = control_plane.base_url if dialect == "qoder" else control_plane.anthropic_base_url
    command = await start_command("conform", address, "--dialect", dialect)
    assert await command.wait_for_exit(seconds=290) == 0
    assert command.out.splitlines()[-1] == f"{len(CLAUSES)} holds"


@pytest.mark.trial
@pytest.mark.timeout(300)
async def test_conform_command_for_slow_control_plane_reports_that_every_clause_holds(
    start_command_without_settings: CommandStarter,
) -> None:
    """Each answer takes 0.2 s. The suite must not take this delay for a lost lease."""
    faults = Faults()
    faults.add(delay(0.2))
    async with ControlPlane(
        environments=(ENVIRONMENT,), tokens={TOKEN: None}, middlewares=[faults.middleware]
    ) as plane:
        command = await start_command_without_settings(
            *("conform", plane.base_url, "--environment-id", ENVIRONMENT), WORKPOOL_TOKEN=TOKEN
        )
        assert await command.wait_for_exit(seconds=290) == 0
