"""Finds plugins (`discovery`), checks them (`loading`), and calls their hooks (`registry`)."""

from workpool.plugins.discovery import InstalledPlugin, installed_plugins
from workpool.plugins.loading import Plugin
from workpool.plugins.registry import Plugins
from workpool.plugins.routing import Route

__all__ = ["InstalledPlugin", "Plugin", "Plugins", "Route", "installed_plugins"]
