"""Plugins: they are found (`discovery`), checked (`loading`), and called (`registry`)."""

from workpool.plugins.discovery import Available, available
from workpool.plugins.loading import Plugin, Route
from workpool.plugins.registry import Plugins

__all__ = ["Available", "Plugin", "Plugins", "Route", "available"]
