"""pytest's way to `workpool.testing`: the fixture `workpool`, and tests that are `async def`.

Installed at the top level, beside the package: pytest imports every plugin at each start, and what
lies within the package cannot be imported without all of it. So this imports pytest alone, until a
test asks for the fixture.
"""

from __future__ import annotations

import inspect
import os
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workpool.testing import Kit


@pytest.fixture
def _workpool_kit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kit:
    from workpool.testing.kit import Kit  # noqa: PLC0415 - half a second, for those who need it

    if request.config.pluginmanager.has_plugin("logging"):  # it shows the log of what fails
        request.getfixturevalue("caplog").set_level("INFO", "workpool")
    for name in os.environ:
        if name.startswith("WORKPOOL_"):
            monkeypatch.delenv(name)  # a test must not depend on the machine that it runs on
    kit = Kit()
    test = request.node.obj
    if inspect.iscoroutinefunction(test):
        monkeypatch.setattr(request.node, "obj", kit.around(test))
    return kit


def workpool(_workpool_kit: Kit) -> Kit:
    """A control plane of the test's own, and pools on it; see `workpool.testing.Kit`."""
    return _workpool_kit


def kit(_workpool_kit: Kit) -> Kit:
    """The fixture `workpool` under a name that does not shadow the package in a test."""
    return _workpool_kit


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    """Register our fixtures, but for those whose names other plugins have taken already.

    Of two plugins with a fixture of one name, pytest uses the one that was registered later: ours,
    where a project loads its own with `-p`. The fixtures of conftest files go before ours anyway.
    """
    manager = config.pluginmanager
    ours = type(_workpool_kit)
    taken = {
        getattr(value, "name", name)
        for label, plugin in manager.list_name_plugin()
        if plugin is not None and not label.endswith("conftest.py")
        for name, value in [*vars(type(plugin)).items(), *getattr(plugin, "__dict__", {}).items()]
        if isinstance(value, ours)
    }
    fixtures = ModuleType("pytest_workpool_fixtures", "The fixtures that were not taken.")
    for fixture in (workpool, kit):
        if fixture.__name__ not in taken:
            setattr(fixtures, fixture.__name__, pytest.fixture(fixture))
    manager.register(fixtures, fixtures.__name__)


@pytest.hookimpl
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test of our fixture that no other plugin runs: none is needed for `async def`."""
    ours = "_workpool_kit" in pyfuncitem.funcargs
    if not ours or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    import asyncio  # noqa: PLC0415 - pytest alone does without it

    names = pyfuncitem._fixtureinfo.argnames  # noqa: SLF001 - as every plugin that calls tests
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
