"""The plugin: its settings, and the hooks that report when the number of sessions changes."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from workpool import PluginError, Supervisor, hookimpl
from workpool_kubernetes.api_server import APIServer, APIServerError
from workpool_kubernetes.cost_writer import CostWriter, writing
from workpool_kubernetes.own_pod import SERVICE_ACCOUNT, NoPodError, own_pod

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from workpool.events import AckFinished, SessionFinished, StopFinished

NAME: Final = "kubernetes"
DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
"""The annotation by which a ReplicaSet chooses the pods that it deletes: lower costs first."""
_POOLS: Final[dict[Supervisor, Callable[[], object]]] = {}
"""The pools of this process, in the order of their start, each with the function that requests a
look at the cost, on any thread. The plugin of the first one writes the cost for all."""
LEAST_INTERVAL: Final = 1.0
"""The shortest `interval`, in seconds: each write is a change of the pod for all who watch it."""


@dataclass(kw_only=True, eq=False)
class Kubernetes:
    """Keeps the deletion cost of the worker's own pod equal to the number of its sessions.

    The fields are the settings. See plugins/kubernetes/README.md, "Settings".
    """

    interval: float = 5.0
    """The shortest time between two writes, in seconds."""
    pod: str | None = None
    """The name of the pod. None: the variable POD_NAME, or else the host name."""
    service_account: str | os.PathLike[str] = SERVICE_ACCOUNT
    """The directory of the service account's token, CA and namespace."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            TypeError: A setting has the wrong type.
            ValueError: `interval` is too short.
        """
        if isinstance(self.interval, bool) or not isinstance(self.interval, int | float):
            raise TypeError("interval: not a number of seconds")
        if not LEAST_INTERVAL <= self.interval < float("inf"):
            raise ValueError(f"interval: at least {LEAST_INTERVAL:.0f} s")
        if not isinstance(self.pod, str | None):
            raise TypeError("pod: not a string")
        self._writer: CostWriter | None = None

    @hookimpl
    @asynccontextmanager
    async def workpool_lifespan(self, supervisor: Supervisor) -> AsyncIterator[None]:
        """Write the deletion cost in a task of its own while the pool lives."""
        if self._writer is not None:
            raise PluginError(NAME, "one object serves one pool; give each its own")
        try:
            pod = own_pod(os.environ, Path(self.service_account), self.pod)
            async with APIServer(pod) as server:
                write = partial(server.annotate, DELETION_COST)
                self._writer = CostWriter(partial(cost_of, supervisor), write, self.interval)
                async with writing(self._writer) as writer:
                    with _pool_counted(supervisor, writer):
                        yield
        except (NoPodError, APIServerError) as error:
            raise PluginError(NAME, str(error)) from None
        finally:
            self._writer = None

    @hookimpl
    def workpool_event(self, event: AckFinished | SessionFinished | StopFinished) -> None:  # noqa: ARG002 - its annotation selects the events
        """Let the plugin write the number of sessions soon, since it may have changed."""
        if self._writer is not None:
            _prompt_writer()


def cost_of(supervisor: Supervisor) -> int | None:
    """Return the deletion cost; None if the plugin of another pool of this process writes it.

    The cost is the number of sessions in all pools of the process: a worker for several
    environments has several pools in one pod.
    """
    pools = tuple(_POOLS)
    if pools[:1] != (supervisor,):
        return None
    return sum(map(sessions_of, pools))


def sessions_of(supervisor: Supervisor) -> int:
    """Return the number of items in slots, from their ack to their stop."""
    return supervisor.status().running


@contextmanager
def _pool_counted(supervisor: Supervisor, writer: CostWriter) -> Iterator[None]:
    """Count the sessions of a pool during the block; the first pool's plugin writes the cost."""
    loop = asyncio.get_running_loop()
    _POOLS[supervisor] = partial(loop.call_soon_threadsafe, writer.look)
    _prompt_writer()
    try:
        yield
    finally:
        del _POOLS[supervisor]
        _prompt_writer()


def _prompt_writer() -> None:
    """Let the plugin that writes the cost compute and write it soon."""
    for look in tuple(_POOLS.values())[:1]:
        with suppress(RuntimeError):  # the loop of that pool is closed
            look()
