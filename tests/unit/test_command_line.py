"""The conventions of the command line: help texts, flags, examples, completion, colours."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.references import examples_in_help, iterate_cli_commands
from workpool.cli.commands import ENTRIES, app, load_command
from workpool.cli.flags import WITHOUT_FLAG, flag_name
from workpool.cli.hold import LAST_HEARTBEAT, WORK_ID
from workpool.settings import DESCRIPTIONS, PREFIX, Settings

ROOT: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {"workpool": ROOT, **dict(iterate_cli_commands(ROOT, "workpool"))}


def run_python(code: str, **variables: str) -> str:
    """Run `code` in a new Python process and return its standard output."""
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout


def help_text(path: str) -> str:
    result = CliRunner().invoke(app, [*path.split()[1:], "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    return result.stdout


def test_list_of_commands_has_the_first_line_of_each_help_text() -> None:
    for entry in ENTRIES:
        text = load_command(entry).help
        assert text.partition("\n\n")[0].replace("\n", " ") == entry.summary
        assert entry.summary in help_text("workpool")


@pytest.mark.parametrize("path", COMMANDS)
def test_flag_h_prints_help_text_of_each_command(path: str) -> None:
    result = CliRunner().invoke(app, [*path.split()[1:], "-h"], env={"COLUMNS": "300"})
    assert (result.exit_code, result.stdout) == (0, help_text(path))


@pytest.mark.parametrize("command", ["run", "check"])
def test_each_setting_but_the_credentials_has_a_flag(command: str) -> None:
    flags = {opt for each in COMMANDS[f"workpool {command}"].params for opt in each.opts}
    assert {flag_name(name) for name in DESCRIPTIONS if name not in WITHOUT_FLAG} <= flags
    assert "plugins" in flags  # The positional argument PLUGIN sets `plugins`, in place of a flag.
    for name in ("token", "api_key", "extra_headers"):
        assert flag_name(name) not in flags


def test_flag_of_a_setting_shows_its_default_and_its_variable() -> None:
    text = " ".join(help_text("workpool run").split())
    for name in DESCRIPTIONS:
        if name not in WITHOUT_FLAG:
            assert (
                f"{' '.join(DESCRIPTIONS[name].split())} Variable: `{PREFIX}{name.upper()}`" in text
            )


def test_each_flag_whose_help_shows_a_value_in_seconds_accepts_numbers() -> None:
    for option in COMMANDS["workpool run"].params:
        if "SECONDS" in (option.metavar or "").split("|"):
            assert {"int", "float"} & set(Settings.__annotations__[option.name].split(" | "))


@pytest.mark.parametrize("path", COMMANDS)
def test_each_option_with_a_value_shows_its_default(path: str) -> None:
    for option in COMMANDS[path].params:
        if option.param_type_name == "option" and not option.is_flag and not option.required:
            shown = option.default not in {None, ()} or "Default: " in option.help
            assert shown, option.name


@pytest.mark.parametrize("path", COMMANDS)
def test_every_help_text_has_examples_that_can_be_parsed(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The examples of `workpool hold` can be parsed only with these environment variables, which the
    # parent process of `workpool hold` sets.
    for name in (WORK_ID, LAST_HEARTBEAT):
        monkeypatch.setenv(name, "x")
    lines = examples_in_help(COMMANDS[path])
    assert lines
    assert all(line in help_text(path) for line in lines)
    for line in lines:
        words = shlex.split(line)
        assert words.pop(0) == "workpool"
        command, context = ROOT, None
        while hasattr(command, "list_commands"):
            context = command.make_context(command.name, words[:1], parent=context)
            command = command.get_command(context, words.pop(0))
            assert command is not None, line
        command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("workpool ru", "run"),
        ("workpool run --concu", "--concurrency"),
        ("workpool work en", "enqueue"),
    ],
)
def test_shell_completion_offers_commands_and_flags(typed: str, offered: str) -> None:
    code = "import sys; sys.argv = ['workpool']; from workpool.cli import main; main()"
    variables = {
        "_WORKPOOL_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    assert run_python(code, **variables).split() == [offered]


def test_shell_completion_script_can_be_shown() -> None:
    code = "import sys; sys.argv = ['workpool', '--show-completion', 'bash']\n"
    code += "from workpool.cli import main; main()"
    assert "_WORKPOOL_COMPLETE" in run_python(
        code, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )


def test_list_of_commands_is_printed_without_importing_a_command() -> None:
    code = (
        "import sys; sys.argv = ['workpool', '--help']\n"
        "from workpool.cli import main\n"
        "try: main()\n"
        "finally: print('IMPORTED', *sorted(n for n in sys.modules if n.startswith('workpool.')),"
        " *({'aiohttp', 'pydantic'} & sys.modules.keys()))"
    )
    [line] = re.findall(r"^IMPORTED (.*)$", run_python(code), re.MULTILINE)
    assert line.split() == [
        "workpool.cli",
        "workpool.cli.commands",
        "workpool.cli.help_text",
        "workpool.cli.signal_recorder",
        "workpool.cli.verbosity",
    ]


def test_import_of_the_supervisor_imports_no_server_and_no_pydantic() -> None:
    code = "import sys; from workpool import Settings, Supervisor, handler; print(*sys.modules)"
    assert not {"pydantic", "aiohttp.web", "typer", "rich"} & set(run_python(code).split())


def test_environment_variable_no_color_removes_colours_from_tables() -> None:
    code = "from workpool.cli.tables import print_table; print_table(['id'], [['work_1']])"
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]|\x1b\[[0-9;]*38;")
    variables = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    assert not colour.search(run_python(code, NO_COLOR="1", **variables))
    for path in COMMANDS:
        assert "\x1b" not in help_text(path)
