"""Context variables: each session runs in its own context and sees no other's variables."""

from __future__ import annotations

from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from workpool import Session, hookimpl
from workpool.events import SessionFinished

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from workpool.events import Event
    from workpool.server import ControlPlane
    from workpool.testing import Recorder

VARIABLES = {
    name: ContextVar[str](f"test_{name}", default="unset")
    for name in ("embedder", "handler", "wrapper", "observer", "chooser", "lifespan")
}


class ContextSettingPlugin:
    """A plugin that sets a context variable in each of its hooks until the first session has ended.

    Attributes:
        seen: The variables that each session sees when its handler starts.
    """

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        self.first_ended = False

    def set_context_variable(self, name: str) -> None:
        if not self.first_ended:
            VARIABLES[name].set("set")

    @asynccontextmanager
    async def context_with_variable(self, name: str) -> AsyncIterator[None]:
        self.set_context_variable(name)
        yield

    @hookimpl
    def workpool_lifespan(self) -> Any:
        return self.context_with_variable("lifespan")

    @hookimpl
    def workpool_wrap_session(self) -> Any:
        return self.context_with_variable("wrapper")

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        self.set_context_variable("observer")
        self.first_ended |= isinstance(event, SessionFinished)

    @hookimpl
    def workpool_session_handler(self) -> Callable[[Session], Any]:
        self.set_context_variable("chooser")
        return self.record_context_variables

    async def record_context_variables(self, _: Session) -> None:
        self.seen.append({name: each.get() for name, each in VARIABLES.items()})
        self.set_context_variable("handler")


async def test_context_variables_set_in_one_session_are_unset_in_the_next(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    VARIABLES["embedder"].set("before start")
    setting = ContextSettingPlugin()
    async with make_pool(setting, concurrency=1):
        VARIABLES["embedder"].set("after start")
        control_plane.enqueue(4)
        await recorder.wait_for(SessionFinished, count=4)
    unset = dict.fromkeys(VARIABLES, "unset")
    own = unset | {"embedder": "before start", "lifespan": "set"}
    # A session sees the context variables that were set before the pool started, by plugins'
    # context managers, and by observers of the session's own events.
    assert setting.seen == [own | {"wrapper": "set", "observer": "set"}, own, own, own]
