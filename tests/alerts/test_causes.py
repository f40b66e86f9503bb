"""A quick check that the plugins in the table of causes exist; the full run takes 20 minutes."""

from __future__ import annotations

import importlib

import pytest

from tests.alerts.causes import CAUSES

PLUGINS = sorted({name for cause in CAUSES.values() for name in cause.plugins})


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_that_a_cause_of_an_alert_names_exists(name: str) -> None:
    module, _, attribute = name.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
