"""The fixture `workpool` with other projects' pytest settings, and pytest without the fixture."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

pytest_plugins = ["pytester"]

TESTS = """
import asyncio
import os

import pytest
from workpool import handler
from workpool.testing import in_virtual_time

MARKS

loops = []

@pytest.fixture
def text():
    return "from a fixture"

@handler
async def work(session):
    loops.append(asyncio.get_running_loop())
    await asyncio.sleep(0)
    return {"text": session.item.metadata["text"]}

async def check(workpool, text):
    result = await workpool.run_session(work, metadata={"text": text})
    assert (result.outcome, result.metadata["text"]) == ("completed", text)

async def test_function(workpool, text):
    assert not [name for name in os.environ if name.startswith("WORKPOOL_")]
    await check(workpool, text)
    assert loops[-1] is asyncio.get_running_loop()

class TestClass:
    @pytest.mark.parametrize("text", ["one", "two"])
    async def test_method(self, workpool, text):
        await check(workpool, text)
"""
VIRTUAL = """
@in_virtual_time
async def test_virtual(workpool, text):
    await asyncio.sleep(3600)
    await check(workpool, text)
"""
ANYIO = "pytestmark = pytest.mark.anyio\n\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'\n"
# pytest-asyncio warns if the loop scope is not set, and the tests treat warnings as errors.
ASYNCIO = ["-p", "pytest_asyncio.plugin", "-o", "asyncio_default_fixture_loop_scope=function"]


@pytest.fixture(autouse=True)
def disable_other_pytest_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable other pytest plugins, which are slow or import modules that must not be imported."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.mark.parametrize(
    ("marks", "options"),
    [
        ("", [*ASYNCIO, "-o", "asyncio_mode=auto"]),
        ("pytestmark = pytest.mark.asyncio", [*ASYNCIO, "-o", "asyncio_mode=strict"]),
        ("", [*ASYNCIO, "-o", "asyncio_mode=strict"]),
        ("", []),
        ("", ["-p", "no:logging"]),
        (ANYIO, [*ASYNCIO, "-p", "anyio.pytest_plugin", "-o", "asyncio_mode=strict"]),
        (ANYIO, ["-p", "anyio.pytest_plugin"]),
    ],
    ids=[
        "auto",
        "strict",
        "strict, unmarked",
        "no plugin",
        "no log",
        "anyio beside asyncio",
        "anyio",
    ],
)
def test_async_tests_with_workpool_fixture_pass_with_any_or_no_async_plugin(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, marks: str, options: Sequence[str]
) -> None:
    monkeypatch.setenv("WORKPOOL_CONCURRENCY", "a mistake of this machine's")
    # pytest-asyncio and anyio reject the marks `asyncio` and `anyio` on plain functions, and
    # `in_virtual_time` returns a plain function. So a test module with one of these marks does not
    # contain the test `VIRTUAL`.
    virtual = "" if "anyio" in marks or "asyncio" in marks else VIRTUAL
    pytester.makepyfile(TESTS.replace("MARKS", marks) + virtual)
    result = pytester.runpytest_inprocess("-p", "pytest_workpool", "-W", "error", *options)
    result.assert_outcomes(passed=3 + bool(virtual))


def test_pytest_prints_failing_line_and_pool_log_of_test_with_workpool_fixture(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        from workpool import handler

        @handler(metadata={"job": "ours"})
        async def work(session): ...

        async def test_it(workpool):
            await workpool.run_session(work, metadata={"job": "theirs"})
        """
    )
    result = pytester.runpytest_inprocess("-p", "pytest_workpool", *ASYNCIO)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       await workpool.run_session(work, metadata={*",
            "E       AssertionError: the item was declined as unwanted; it has: job=theirs",
            "E       work takes type=session job=ours",
            "*INFO*pool started*",
            "*INFO*item declined*",
        ],
        consecutive=False,
    )
    assert "kit.py" not in str(result.stdout)


def test_pytest_run_without_fixture_imports_no_module_of_workpool(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("pytest_workpool")
            assert not {"workpool", "aiohttp", "asyncio", "pydantic"} & set(sys.modules)
        """
    )
    result = pytester.run(sys.executable, "-m", "pytest", "-p", "pytest_workpool")
    result.assert_outcomes(passed=1)


OWN = """
import pytest

@pytest.fixture(scope="session", params=["their own"])
def workpool(request): return request.param

@pytest.fixture
def kit(): return "their own"
"""
USES = """
def test_value(workpool, kit):
    assert (workpool, kit) == ("their own", "their own")

async def test_coroutine(workpool): ...
"""


@pytest.mark.parametrize("place", ["conftest", "plugin", "module"])
def test_users_own_fixture_named_workpool_overrides_fixture_of_package(
    pytester: pytest.Pytester, place: str
) -> None:
    """The `async def` test fails: workpool runs such tests only if they use its own fixture.

    No other plugin that runs `async def` tests is active.
    """
    options = ["-p", "pytest_workpool"]
    # pytest loads a plugin named with `-p` before installed plugins, such as workpool's.
    if place == "plugin":
        pytester.makepyfile(their_plugin=OWN)
        options = ["-p", "their_plugin", *options]
    elif place == "conftest":
        pytester.makeconftest(OWN)
    pytester.makepyfile(test_theirs=(OWN if place == "module" else "") + USES)
    pytester.syspathinsert()
    result = pytester.runpytest_inprocess(*options)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines("*async def functions are not natively supported*")


def test_async_test_runs_with_project_fixture_that_overrides_workpool_fixture(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import pytest
        from workpool.testing import Kit

        @pytest.fixture
        def workpool(workpool): return [workpool]

        async def test_extended(workpool, kit):
            assert isinstance(kit, Kit)
            assert workpool == [kit]
        """
    )
    result = pytester.runpytest_inprocess("-p", "pytest_workpool")
    result.assert_outcomes(passed=1)
