"""The five hooks of workpool. All are plain functions, called on the supervisor's loop.

A plugin implements any of them and marks each with `@workpool.hookimpl`. A hook that needs I/O
returns an async callable or context manager. See workpool/docs/plugins.md, "Hooks" and
workpool/docs/decisions.md, "Hooks are synchronous".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from workpool.blocking_session import BlockingSession
    from workpool.events import Event
    from workpool.handlers import Handler
    from workpool.json_value import JSON
    from workpool.session import Session
    from workpool.wire.items import WorkItem

PROJECT = "workpool"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def workpool_session_handler(
    item: WorkItem,
) -> Handler | Callable[[Session], Awaitable[JSON]] | Callable[[BlockingSession], JSON] | None:
    """Return the handler for this item, or None to let the next plugin decide.

    A `Handler` has limits and a label of its own. A plain `def` function needs the mark `@handler`.

    Called once for each delivered item, before the acknowledgement: an item without a handler stays
    in the queue for other workers. Must be quick and must not do I/O. An item whose hook raises is
    declined, and the error is counted for the plugin.
    """


@hookspec
def workpool_wrap_session(session: Session) -> AbstractAsyncContextManager[object] | None:
    """Return a context manager inside which the handler of this session runs, or None.

    Called once the lease is held. The contexts are entered in the order of the plugins and left in
    reverse order. An exception of a context counts as an exception of the handler. A context that
    ends sees the handler's exception, if any, and `session.outcome`.
    """


@hookspec
def workpool_lifespan(supervisor: object) -> AbstractAsyncContextManager[object] | None:
    """Return a context manager that is open as long as the pool runs, or None.

    `supervisor` is the running `workpool.Supervisor`. The context is entered before the first poll
    and left last. Open database clients here, and add collectors to `supervisor.registry`. If
    entering the context raises an exception, the pool does not start.
    """


@hookspec
def workpool_admission(supervisor: object) -> str | None:
    """Return a reason why the pool may claim no item now, such as a full disk, or None.

    `supervisor` is the running `workpool.Supervisor`.
    Called before each poll, and again a second after a refusal; never while it would interrupt a
    session. Must be quick and must not do I/O. A hook that raises refuses.
    """


@hookspec
def workpool_event(event: Event) -> None:
    """Observe one event, quickly. An exception is logged and counted, with no other effect.

    The annotation of `event` selects the types: `event: SessionFinished | DrainFinished` is called
    with these two only, `Event` or no annotation with every type. A type without an observer costs
    nothing.
    """
