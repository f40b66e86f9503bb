"""Tests that the readme lists every setting, and that its Python example works."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from workpool_command import Command
from workpool_command.command_inputs import DEFAULT_VARIABLES

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_readme_table_lists_every_command_setting() -> None:
    table = README.partition("## Settings")[2]
    for field in fields(Command):
        assert re.search(rf"^\| .*`{field.name}`", table, re.MULTILINE), field.name
    assert (
        "| `environment` | " + ", ".join(f"`{name}`" for name in DEFAULT_VARIABLES) + " |" in table
    )


def test_readme_example_defines_several_commands_in_one_module() -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - the example of the readme
    assert (names["report"].result, names["backup"].max_sessions) == (True, 1)
