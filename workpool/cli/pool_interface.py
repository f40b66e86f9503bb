"""The interface of a pool for `workpool run`.

`Supervisor` (one environment) and `EnvironmentGroup` (several environments) implement it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import EllipsisType

    from workpool.pool.status import Status
    from workpool.settings import Settings


class ControllablePool(Protocol):
    """The methods of a pool that the control socket calls; see `Supervisor`."""

    @property
    def settings(self) -> Settings:
        """The settings of the pool."""

    def pause(self, reason: str) -> None:
        """Stop claiming items until `resume()`."""

    def resume(self) -> None:
        """Claim items again after `pause()`."""

    def request_drain(self, timeout: float | EllipsisType | None = ...) -> None:
        """Begin a drain without waiting for its end."""

    def status(self) -> Status:
        """Return the current status of the pool."""


class RunnablePool(ControllablePool, Protocol):
    """The pool or the pools of one process, as `workpool run` uses them; see `Supervisor`."""

    on_blocked: Callable[[], None] | None
    renewer_services: Sequence[AbstractAsyncContextManager[object]]

    @property
    def abandoned(self) -> int:
        """The number of sessions that the drain could neither end nor release."""

    @property
    def log_ids(self) -> Mapping[str, str]:
        """The ids of the pool, for log records that are written outside of the pool's tasks."""

    async def run(self, *, until_empty: bool = False) -> None:
        """Run the pool until its drain has ended."""
