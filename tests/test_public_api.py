"""The names that users import: changing them needs a changelog entry."""

import subprocess
import sys

import workpool


def test_public_names() -> None:
    assert sorted(workpool.__all__) == [
        "LeaseLost",
        "Outcome",
        "PluginError",
        "RateLimits",
        "Release",
        "Session",
        "SessionEnded",
        "Settings",
        "SettingsError",
        "Status",
        "Supervisor",
        "WorkClient",
        "WorkItem",
        "WorkpoolError",
        "__version__",
        "handler",
        "hookimpl",
    ]
    assert all(hasattr(workpool, name) for name in workpool.__all__)


def test_importing_workpool_leaves_the_command_line_out() -> None:
    code = "import sys, workpool; print({'typer', 'rich', 'pytest'} & set(sys.modules))"
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
