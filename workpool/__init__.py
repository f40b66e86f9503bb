"""workpool: an asyncio worker pool, with plugins, for self-hosted cloud-agent environments."""

from importlib.metadata import version

from workpool.errors import LeaseLost, PluginError, SessionEnded, SettingsError, WorkpoolError
from workpool.handler import handler
from workpool.hookspecs import hookimpl
from workpool.pool.status import Status
from workpool.pool.supervisor import Supervisor
from workpool.session import Outcome, Release, Session
from workpool.settings import Settings
from workpool.wire.client import WorkClient
from workpool.wire.items import WorkItem
from workpool.wire.rate_limiter import RateLimits

__version__ = version("workpool")

__all__ = [
    "LeaseLost",
    "Outcome",
    "PluginError",
    "RateLimits",
    "Release",
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
    "handler",
    "hookimpl",
]
