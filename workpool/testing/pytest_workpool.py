"""The pytest plugin that defines the fixture `workpool` and runs `async def` tests with it.

The wheel installs this module beside the package: pytest imports every plugin at each start, and an
import of a module inside of the package would import the package, too. Until a test uses the
fixture, this module imports only pytest.
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
    from workpool.testing.kit import Kit  # noqa: PLC0415 - takes half a second

    # Capture info messages as well: pytest shows the captured log of a failed test.
    if request.config.pluginmanager.has_plugin("logging"):
        request.getfixturevalue("caplog").set_level("INFO", "workpool")
    # Delete the developer's environment variables, which would change the settings of the pools.
    for name in os.environ:
        if name.startswith("WORKPOOL_"):
            monkeypatch.delenv(name)
    kit = Kit()
    test = request.node.obj
    if inspect.iscoroutinefunction(test):
        monkeypatch.setattr(request.node, "obj", kit.around(test))
    return kit


def workpool(_workpool_kit: Kit) -> Kit:
    """The fixture with a control plane for this test, and pools on it; see `testing.Kit`."""
    return _workpool_kit


def kit(_workpool_kit: Kit) -> Kit:
    """The fixture `workpool` under another name, for tests that also import `workpool`."""
    return _workpool_kit


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    """Register each fixture, unless another plugin already has a fixture with the same name.

    Of two plugins with a fixture of one name, pytest uses the plugin that was registered later.
    Without this check, that would be this plugin if a project loads its own plugin with `-p`. A
    fixture of a conftest file always overrides that of a plugin.
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
    fixtures = ModuleType("pytest_workpool_fixtures", "The fixtures of workpool.")
    for fixture in (workpool, kit):
        if fixture.__name__ not in taken:
            setattr(fixtures, fixture.__name__, pytest.fixture(fixture))
    manager.register(fixtures, fixtures.__name__)


@pytest.hookimpl
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test with the fixture `workpool` or `kit`, if no other plugin runs it."""
    ours = "_workpool_kit" in pyfuncitem.funcargs
    if not ours or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    import asyncio  # noqa: PLC0415 - not needed without such a test

    names = pyfuncitem._fixtureinfo.argnames  # noqa: SLF001 - all plugins that call tests use it
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
