"""Checks that the plugins in the table of alert causes exist.

Only `python -m tests.alerts`, which takes 20 minutes, runs them.
"""

from __future__ import annotations

import importlib

import pytest

from tests.alerts.alert_causes import CAUSES

PLUGINS = sorted({name for cause in CAUSES.values() for name in cause.plugins})


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_of_each_alert_cause_is_an_importable_callable(name: str) -> None:
    module, _, attribute = name.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
