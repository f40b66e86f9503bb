"""The interface of what `workpool run` runs: one supervisor, or a group of environments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import EllipsisType

    from workpool.pool.status import Status
    from workpool.settings import Settings


class Controlled(Protocol):
    """What the control socket acts on. The methods are those of `Supervisor`."""

    @property
    def settings(self) -> Settings: ...  # noqa: D102 - as in `Supervisor`

    def pause(self, reason: str) -> None: ...  # noqa: D102 - as in `Supervisor`

    def resume(self) -> None: ...  # noqa: D102 - as in `Supervisor`

    def request_drain(self, timeout: float | EllipsisType | None = ...) -> None: ...  # noqa: D102 - as in `Supervisor`

    def status(self) -> Status: ...  # noqa: D102 - as in `Supervisor`


class Pool(Controlled, Protocol):
    """What `workpool run` runs. The attributes and methods are those of `Supervisor`."""

    on_blocked: Callable[[], None] | None
    renewer_services: Sequence[AbstractAsyncContextManager[object]]

    @property
    def abandoned(self) -> int: ...  # noqa: D102 - as in `Supervisor`

    @property
    def log_ids(self) -> Mapping[str, str]: ...  # noqa: D102 - as in `Supervisor`

    async def run(self, *, until_empty: bool = False) -> None: ...  # noqa: D102 - as in `Supervisor`
