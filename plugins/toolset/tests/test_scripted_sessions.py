"""Tests of scripted sessions with `workpool run toolset`, and of the settings in the readme."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path

import pytest

from workpool_toolset import Toolset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


async def run_scripted_session(*flags: str) -> str:
    """Run `killed_workers.py`, check that it found no violation, and return its output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "tests/killed_workers.py"), *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(180):
            shown_text, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, shown_text.decode()
    return shown_text.decode()


@pytest.mark.trial
@pytest.mark.acceptance
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("sandbox")
async def test_scripted_session_of_thirty_tool_calls_gets_expected_results() -> None:
    shown_text = await run_scripted_session()
    assert "killed=0 own_results=28 unknown=0 denied=2 wrong=[]" in shown_text
    assert r"notes/plan.txt: 'first\n2nd\n'" in shown_text


@pytest.mark.trial
@pytest.mark.acceptance
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("sandbox")
async def test_scripted_session_of_thirty_tool_calls_succeeds_despite_two_killed_workers() -> None:
    assert "killed=2 " in await run_scripted_session("--kills", "2", "--seed", "3", "--quiet")


def test_readme_lists_every_toolset_setting_with_default_and_meaning() -> None:
    words = {"isolation": "`bubblewrap`", "state": "`~/.local/state/workpool-toolset`"}
    for field in dataclasses.fields(Toolset):
        if not field.name.startswith("_"):
            default = field.default if isinstance(field.default, int | float) else None
            shown_text = words.get(field.name) or (f"{default:g}" if default else "")
            shown_text = str(default) if isinstance(default, int) else shown_text
            [row] = [line for line in README.splitlines() if line.startswith(f"| `{field.name}`")]
            assert row.split(" | ")[1] in {shown_text, "none", "unset"}, field.name
            assert len(row.split(" | ")) == 3
