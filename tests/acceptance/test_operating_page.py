"""The page `operating.md`: its commands, metrics, settings and numbers, and its upgrade steps."""

from __future__ import annotations

import dataclasses
import re
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from typer.main import get_command

from workpool import Settings, WorkClient
from workpool.cli.commands import app
from workpool.metrics.definitions import DEFINITIONS
from workpool.scaling import FLEET_NUMBERS

if TYPE_CHECKING:
    from tests.acceptance.conftest import CommandStarter, RunningCommand
    from workpool.server import ControlPlane

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

PAGE = (Path(__file__).parents[2] / "workpool/docs/operating.md").read_text()
NOT_TRADED = {
    *("base_url", "dialect", "environment_id", "worker_id", "plugins", "extra_headers"),
    *("token", "token_file", "api_key", "api_key_file"),
    *("ca_file", "client_cert_file", "client_key_file"),
    *("log_level", "log_format", "control_socket", "rate_limit_group"),
}
"""The settings that every worker needs; the page must show all of them."""


def read_console_lines_of_page() -> list[str]:
    """Return the lines of all console blocks, without comments and with continued lines joined."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    text = re.sub(r"\\\n\s*", " ", "".join(blocks))
    return [re.sub(r"\s+# .*", "", line) for line in text.splitlines()]


def read_workpool_commands_of_page() -> list[list[str]]:
    """Return the arguments of each `workpool` command in the console blocks of the page."""
    calls = []
    for line in read_console_lines_of_page():
        for part in line.split("&&"):
            words = shlex.split(part)
            if words and words[0].rpartition("/")[2] == "workpool":
                calls.append(words[1:])
    return calls


def test_workpool_commands_on_operating_page_exist_with_their_flags() -> None:
    calls = read_workpool_commands_of_page()
    assert len(calls) > 6
    for words in calls:
        command: Any = get_command(app)
        rest = list(words)
        while rest and not rest[0].startswith("-") and hasattr(command, "get_command"):
            command = command.get_command(
                command.make_context("workpool", ["plugins"]), rest.pop(0)
            )
            assert command is not None, words
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words


def test_repository_files_named_in_console_blocks_of_operating_page_exist() -> None:
    paths = re.findall(r"PATH/TO/(workpool[\w./@-]*)", "\n".join(read_console_lines_of_page()))
    assert len(paths) > 3
    root = Path(__file__).parents[2]
    for path in paths:
        assert (root / path.removeprefix("workpool").lstrip("/")).exists() or (root / path).exists()


def test_every_metric_named_on_operating_page_exists() -> None:
    names = {each.name for each in DEFINITIONS}
    found = set(re.findall(r"`workpool_([a-z0-9_]+)[`{]", PAGE))
    # The page also names hooks and metrics of `workpool scale`. DEFINITIONS has neither of them.
    found -= {"session_handler", "admission", "event", "lifespan"}
    found -= {f"fleet_{key}" for key in FLEET_NUMBERS}
    suffixes = re.compile(r"_(total|bucket|count|sum)$")
    missing = {each for each in found if each not in names and suffixes.sub("", each) not in names}
    assert missing == set()


def test_trade_off_table_lists_every_setting_with_a_trade_off() -> None:
    section = PAGE.partition("## What each setting trades")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    fields = [each.name for each in dataclasses.fields(Settings)]
    assert rows == [name for name in fields if name not in NOT_TRADED and name[0] != "_"]


def test_default_lease_ttl_with_four_hundred_concurrent_sessions_causes_a_warning() -> None:
    """The numbers are those of the example in the section "Size" of the operating page."""
    many: dict[str, Any] = {"concurrency": 400, "write_rate": 20, "drain_timeout": 60}
    assert 400 * 3 / Settings().lease_ttl == many["write_rate"]
    assert any("lease_ttl" in warning for warning in Settings(**many).warnings())
    assert Settings(**many, lease_ttl=300).warnings() == ()


async def wait_until_ready(worker: RunningCommand) -> None:
    """Wait until `/readyz` answers 200, as the upgrade steps of the page say."""
    line = await worker.wait_for_log("metrics served")
    [url] = re.findall(r"url=(\S+)/metrics", line)
    async with aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{url}/readyz") as answer:
                if answer.status == 200:
                    return


async def test_documented_upgrade_of_worker_loses_no_session_and_keeps_attempt_count_at_1(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    """The old worker has two sessions: the first ends during the drain, the second is released.

    The new worker runs the released item again.
    """
    [waiting] = control_plane.enqueue(metadata={"do": "wait"})
    [lingering] = control_plane.enqueue(metadata={"do": "linger"})
    # The timeout is long enough for the first session to complete on a loaded machine.
    old = await start_command("run", "handlers", "--drain-timeout", "20")
    await old.wait_for_log("wait runs")
    await old.wait_for_log("linger runs")
    new = await start_command("run", "handlers", "--drain-timeout", "1")
    await wait_until_ready(new)
    old.send_signal(signal.SIGTERM)
    assert await old.wait_for_exit() == 0
    await new.wait_for_log("linger runs")
    settings = Settings(
        base_url=control_plane.base_url,
        token=control_plane.token,
        environment_id=waiting.environment_id,
    )
    async with WorkClient(settings) as client:
        done, again = await client.get(waiting.id), await client.get(lingering.id)
    assert (done.state, done.metadata["done"]) == ("stopped", "when asked")
    assert again.state == "active"
    assert again.metadata.get("workpool.attempt", "1") == "1"
    new.send_signal(signal.SIGTERM)
    assert await new.wait_for_exit() == 0
