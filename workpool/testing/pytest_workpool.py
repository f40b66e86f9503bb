"""pytest's way to `workpool.testing`: the fixture `workpool`, and tests that are `async def`.

Installed at the top level, beside the package: pytest imports every plugin at each start, and what
lies within the package cannot be imported without all of it. So this imports pytest alone, until a
test asks for the fixture.
"""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workpool.testing import Kit


@pytest.fixture
def workpool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kit:
    """A control plane of the test's own, and pools on it; see `workpool.testing.Kit`."""
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


@pytest.fixture
def kit(workpool: Kit) -> Kit:
    """The fixture `workpool` under a name that does not shadow the package in a test."""
    return workpool


@pytest.hookimpl
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test of the fixture's that no other plugin runs: none is needed for `async def`."""
    if "workpool" not in pyfuncitem.funcargs or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    import asyncio  # noqa: PLC0415 - pytest alone does without it

    names = pyfuncitem._fixtureinfo.argnames  # noqa: SLF001 - as every plugin that calls tests
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
