"""Plugins: finding them (`discovery`), checking them (`loading`), calling them (`registry`)."""

from workpool.plugins.discovery import Available, available
from workpool.plugins.loading import Plugin
from workpool.plugins.registry import Plugins
from workpool.plugins.routing import Route

__all__ = ["Available", "Plugin", "Plugins", "Route", "available"]
