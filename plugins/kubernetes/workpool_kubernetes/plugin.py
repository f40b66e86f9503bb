"""The plugin class `Kubernetes`, which counts the sessions of this process.

The number is written to the pod as its deletion cost.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from workpool import PluginError, Supervisor, hookimpl
from workpool_kubernetes.api_server import APIServerError, PodClient
from workpool_kubernetes.cost_writer import CostWriter, running_cost_writer
from workpool_kubernetes.own_pod import SERVICE_ACCOUNT, NoPodError, find_own_pod

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from workpool.events import AckFinished, SessionFinished, StopFinished

NAME: Final = "kubernetes"
DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
"""The annotation by which a ReplicaSet chooses the pods that it deletes: lower costs first."""
_UPDATE_REQUESTS: Final[dict[Supervisor, Callable[[], object]]] = {}
"""The pools of this process, in the order of their start, each with a function that requests an
update of the cost from any thread. The plugin of the first pool writes the cost of all pools."""
MIN_INTERVAL: Final = 1.0
"""The smallest allowed `interval`, in seconds. Each write is sent to all who watch the pod."""


@dataclass(kw_only=True, eq=False)
class Kubernetes:
    """Writes the number of the worker's sessions as the deletion cost of the worker's pod.

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
        if not MIN_INTERVAL <= self.interval < float("inf"):
            raise ValueError(f"interval: at least {MIN_INTERVAL:.0f} s")
        if not isinstance(self.pod, str | None):
            raise TypeError("pod: not a string")
        self._writer: CostWriter | None = None

    @hookimpl
    @asynccontextmanager
    async def workpool_lifespan(self, supervisor: Supervisor) -> AsyncIterator[None]:
        """Write the deletion cost in a task while the pool runs."""
        if self._writer is not None:
            raise PluginError(NAME, "one object serves one pool; give each its own")
        try:
            pod = find_own_pod(os.environ, Path(self.service_account), self.pod)
            async with PodClient(pod) as client:
                write = partial(client.set_annotation, DELETION_COST)
                self._writer = CostWriter(
                    partial(compute_deletion_cost, supervisor), write, self.interval
                )
                async with running_cost_writer(self._writer) as writer:
                    with _count_pool_sessions(supervisor, writer):
                        yield
        except (NoPodError, APIServerError) as error:
            raise PluginError(NAME, str(error)) from None
        finally:
            self._writer = None

    @hookimpl
    def workpool_event(self, event: AckFinished | SessionFinished | StopFinished) -> None:  # noqa: ARG002 - its annotation selects the events
        """Request an update of the pod's deletion cost: the number of sessions may have changed."""
        if self._writer is not None:
            _request_deletion_cost_update()


def compute_deletion_cost(supervisor: Supervisor) -> int | None:
    """Return the number of sessions in this process, or None if another pool writes the number.

    A worker for several environments has several pools in one process. Only the plugin of the first
    pool writes the pod's deletion cost, which is the number of the sessions of all these pools.
    """
    pools = tuple(_UPDATE_REQUESTS)
    if pools[:1] != (supervisor,):
        return None
    return sum(map(running_sessions, pools))


def running_sessions(supervisor: Supervisor) -> int:
    """Return the number of the pool's items between their ack and their stop."""
    return supervisor.status().running


@contextmanager
def _count_pool_sessions(supervisor: Supervisor, writer: CostWriter) -> Iterator[None]:
    """Include the sessions of this pool in the deletion cost during the `with` block."""
    loop = asyncio.get_running_loop()
    _UPDATE_REQUESTS[supervisor] = partial(
        loop.call_soon_threadsafe, writer.request_deletion_cost_update
    )
    _request_deletion_cost_update()
    try:
        yield
    finally:
        del _UPDATE_REQUESTS[supervisor]
        _request_deletion_cost_update()


def _request_deletion_cost_update() -> None:
    """Ask the plugin of the first pool in this process to write the pod's deletion cost."""
    for request in tuple(_UPDATE_REQUESTS.values())[:1]:
        # Each pool may run on an event loop of its own. Ignore the RuntimeError that is raised if
        # the first pool's event loop is already closed.
        with suppress(RuntimeError):
            request()
