"""The public names of `workpool`. A changed public name needs an entry in the changelog."""

import ast
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import get_args, get_type_hints

import pytest

import workpool
from workpool import Handler, hookspecs


def test_public_names_of_workpool_equal_the_documented_names() -> None:
    assert sorted(workpool.__all__) == [
        "BlockingSession",
        "DaemonThreads",
        "Handler",
        "JSON",
        "LeaseLost",
        "Outcome",
        "PluginError",
        "RateLimits",
        "Release",
        "Retry",
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
        "current_session",
        "handler",
        "hookimpl",
        "release_on_exhaustion",
    ]
    assert all(hasattr(workpool, name) for name in workpool.__all__)


def test_types_that_hooks_take_and_return_are_exported() -> None:
    """Types inside type aliases must be exported too, such as each member of the union `Event`."""
    namespace = {
        **{name: getattr(workpool, name) for name in workpool.__all__},
        "Event": workpool.events.Event,
        "Callable": Callable,
        "Awaitable": Awaitable,
        "AbstractAsyncContextManager": AbstractAsyncContextManager,
    }
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("workpool_")}
    hints = {name: get_type_hints(hook, localns=namespace) for name, hook in hooks.items()}
    assert Handler in get_args(hints["workpool_session_handler"]["return"])
    assert all("return" in each for each in hints.values())


def test_import_of_workpool_does_not_import_command_line() -> None:
    code = "import sys, workpool; print({'typer', 'rich', 'pytest'} & set(sys.modules))"
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def run_code_in_new_process(code: str) -> str:
    """Run code in a new Python process and return its output."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own words
    return done.stdout.strip()


def test_import_of_workpool_imports_none_of_its_modules() -> None:
    """The command line must be able to install its signal handlers before the slow imports."""
    code = "import sys, workpool; print([n for n in sys.modules if n.startswith('workpool.')])"
    assert run_code_in_new_process(code) == "[]"


def test_import_of_workpool_keeps_signal_handlers_unchanged() -> None:
    code = (
        "import signal\n"
        "handlers = lambda: [signal.getsignal(each) for each in signal.valid_signals()]\n"
        "before = handlers()\n"
        "from workpool import *\n"
        "from workpool.cli.commands import app\n"
        "print(handlers() == before)"
    )
    assert run_code_in_new_process(code) == "True"


def test_workpool_exports_public_names_even_if_submodule_was_imported_first() -> None:
    code = "import workpool.testing, workpool\nprint(callable(workpool.handler), dir(workpool))"
    callable_, _, names = run_code_in_new_process(code).partition(" ")
    assert callable_ == "True"
    assert set(workpool.__all__) <= set(ast.literal_eval(names))


def test_public_modules_of_workpool_are_attributes_of_the_package() -> None:
    code = "import workpool as w; print(w.errors, w.events, w.settings)"
    assert run_code_in_new_process(code).count("<module") == 3


def test_unknown_name_of_workpool_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'workpool' has no attribute 'nothing'"):
        _ = workpool.nothing  # type: ignore[attr-defined]  # the case under test
