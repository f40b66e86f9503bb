"""The common interface of one supervisor and a group of environments, for `workpool run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import EllipsisType

    from workpool.pool.status import Status
    from workpool.settings import Settings


class Controlled(Protocol):
    """A pool that the control socket controls, with the same methods as `Supervisor`."""

    @property
    def settings(self) -> Settings:
        """The settings."""

    def pause(self, reason: str) -> None:
        """Claim no more items until `resume()`."""

    def resume(self) -> None:
        """End the pause."""

    def request_drain(self, timeout: float | EllipsisType | None = ...) -> None:
        """Begin a drain without waiting for its end."""

    def status(self) -> Status:
        """Return the current state."""


class Pool(Controlled, Protocol):
    """The pool or pools of `workpool run`, with the same attributes as `Supervisor`."""

    on_blocked: Callable[[], None] | None
    renewer_services: Sequence[AbstractAsyncContextManager[object]]

    @property
    def abandoned(self) -> int:
        """The number of sessions that the drain could neither end nor hand back."""

    @property
    def log_ids(self) -> Mapping[str, str]:
        """The ids of log records that are made outside of a pool's tasks."""

    async def run(self, *, until_empty: bool = False) -> None:
        """Run until drained."""
