"""workpool: an asyncio worker pool, with plugins, for self-hosted cloud-agent environments.

The public names are imported on first use: the command line must install its signal handlers before
the slow imports, and Python runs this module before any other module of the package.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workpool import errors as errors
    from workpool import events as events
    from workpool import settings as settings
    from workpool.blocking_session import BlockingSession
    from workpool.errors import LeaseLost, PluginError, SessionEnded, SettingsError, WorkpoolError
    from workpool.handlers import Handler, Retry, handler
    from workpool.hookspecs import hookimpl
    from workpool.json_value import JSON
    from workpool.pool.status import Status
    from workpool.pool.supervisor import Supervisor
    from workpool.session import (
        Outcome,
        Release,
        Session,
        current_session,
        release_on_exhaustion,
    )
    from workpool.settings import Settings
    from workpool.wire.client import WorkClient
    from workpool.wire.http.daemon_threads import DaemonThreads
    from workpool.wire.http.rate_limiter import RateLimits
    from workpool.wire.items import WorkItem

    __version__: str

__all__ = [
    "JSON",
    "BlockingSession",
    "DaemonThreads",
    "Handler",
    "LeaseLost",
    "Outcome",
    "PluginError",
    "RateLimits",
    "Release",
    "Retry",
    "Session",
    "SessionEnded",
    "Settings",
    "SettingsError",
    "Status",
    "Supervisor",
    "WorkClient",
    "WorkItem",
    "WorkpoolError",
    "__version__",
    "current_session",
    "handler",
    "hookimpl",
    "release_on_exhaustion",
]

_MODULES = {"errors", "events", "settings"}
_MODULE_OF = {
    "JSON": "json_value",
    "BlockingSession": "blocking_session",
    "DaemonThreads": "wire.http.daemon_threads",
    "Handler": "handlers",
    "LeaseLost": "errors",
    "Outcome": "session",
    "PluginError": "errors",
    "RateLimits": "wire.http.rate_limiter",
    "Release": "session",
    "Retry": "handlers",
    "Session": "session",
    "SessionEnded": "errors",
    "Settings": "settings",
    "SettingsError": "errors",
    "Status": "pool.status",
    "Supervisor": "pool.supervisor",
    "WorkClient": "wire.client",
    "WorkItem": "wire.items",
    "WorkpoolError": "errors",
    "current_session": "session",
    "handler": "handlers",
    "hookimpl": "hookspecs",
    "release_on_exhaustion": "session",
}


# Hide `__getattr__` from type checkers: otherwise they would accept any misspelled name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a public name at its first use, and store it as an attribute of the package."""
        if name == "__version__":
            found: object = import_module("importlib.metadata").version("workpool")
        elif name in _MODULES:
            found = import_module(f"workpool.{name}")
        elif name in _MODULE_OF:
            found = getattr(import_module(f"workpool.{_MODULE_OF[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_MODULES})
