"""Plugins: they are found (`finding`), checked (`loading`), and called (`asking`)."""

from workpool.plugins.asking import Plugins
from workpool.plugins.finding import Available, available
from workpool.plugins.loading import Plugin, Route

__all__ = ["Available", "Plugin", "Plugins", "Route", "available"]
