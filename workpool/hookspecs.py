"""The four hooks of workpool, all synchronous, all called on the supervisor's loop (design §4).

A plugin implements any of them, each marked with `@workpool.hookimpl`. A hook that needs I/O
returns something asynchronous, which the pool awaits or enters in one place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from workpool.events import Event
    from workpool.pool.supervisor import Supervisor
    from workpool.session import Session
    from workpool.wire.items import WorkItem

PROJECT = "workpool"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def workpool_session_handler(item: WorkItem) -> Callable[[Session], Awaitable[object]] | None:
    """Return the handler for this item, or None to let the next plugin decide.

    Called once per delivered item, before it is acknowledged: an item that nobody wants stays in
    the queue for other workers. Must be quick; must not do I/O. An error leaves the item undecided:
    it is declined, and counted against the plugin.
    """


@hookspec
def workpool_wrap_session(session: Session) -> AbstractAsyncContextManager[object] | None:
    """Return a context to run this session's handler in, or None.

    Called after the lease is held, in plugin order; entered in that order around the handler and
    left in the reverse. What the context raises is the handler's error.
    """


@hookspec
def workpool_lifespan(supervisor: Supervisor) -> AbstractAsyncContextManager[object] | None:
    """Return a context around the pool's whole life: entered before the first poll, left last.

    The place to open a database client, or to add collectors to `supervisor.registry`. What it
    raises on entering stops the start.
    """


@hookspec
def workpool_event(event: Event) -> None:
    """Observe one event. Must be quick. Errors are logged and counted, and stop nobody.

    The annotation of `event` chooses: `event: SessionFinished | DrainFinished` is called with these
    two types only; `Event`, or no annotation, with every type. A type that nobody observes costs
    nothing.
    """
