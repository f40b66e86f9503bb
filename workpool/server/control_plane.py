"""The embedded control plane: a work queue that is served over HTTP on one port.

Owns start and end: `__aexit__` closes everything that `__aenter__` opened, and an entry that fails
half-way leaves nothing open.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import secrets
import socket
from contextlib import AsyncExitStack
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from workpool.inbound_connections import HttpLog, InboundConnections
from workpool.server.api_errors import ServeError
from workpool.server.history import summarize
from workpool.server.http.application_routes import ApplicationRoutes
from workpool.server.http.scale_routes import ScaleRoutes
from workpool.server.http.server_dialects import ANTHROPIC, DIALECTS, QODER
from workpool.server.http.session_routes import SessionRoutes
from workpool.server.http.tokens import AcceptedTokens, check_token
from workpool.server.http.work_routes import WorkRoutes, make_application
from workpool.server.index_engine import MemoryIndexEngine
from workpool.server.operations import Operations
from workpool.server.postgres.postgres_store import PostgresStore
from workpool.wire.protocol import ID_PATTERN, SESSION

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]  # on Windows - elsewhere it is a module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from workpool.server.engine import ControlPlaneEngine
    from workpool.server.history import History, Summary
    from workpool.server.http.tokens import Grants
    from workpool.server.stored_item import Item
    from workpool.server.stores.store import Store

DEFAULT_ENVIRONMENT: Final = "env_00000000000070008000000000000001"
HISTORY_LIMIT: Final = 100_000
_SHUTDOWN_SECONDS: Final = 2.0
_CONNECTIONS_MAX: Final = 10_000
_BACKLOG: Final = 1024
_PORT_MAX: Final = 65535


class ControlPlane:
    """A work queue that is served over HTTP, in both dialects of the protocol, on the running loop.

    `async with ControlPlane() as plane:` serves one environment on a free port of the loopback
    interface, in memory. The port is bound from the beginning to the end of the block.

    Attributes:
        engine: The calls of the protocol, as coroutines, on every store.

    Args:
        environments: Ids of `self_hosted` environments.
        cloud_environments: Ids of environments whose work calls are all refused with 400.
        tokens: Token → the environments that the token may use (None: all). None: a random token.
        worker_keys: Further tokens with the limits of vendors' keys for workers: they allow poll,
            ack, heartbeat, stop, list and the calls on sessions, but not to read an item, write its
            metadata, query statistics or create anything.
        scale_tokens: Further tokens, in the form of `tokens`, that give access to the numbers for
            autoscalers only.
        store: The store of the items; None: in memory. On a `PostgresStore`, any number of control
            planes share one database, and `engine` replaces the synchronous calls: `enqueue`,
            `emit`, `events`, `history` and `summary` raise `RuntimeError`.
        host: The address to listen on.
        port: 0: any free port.
        now: Returns epoch seconds, for all times; None: the clock of the database, if there is one,
            or the system's.
        history_limit: The number of records that `history` keeps; None: all.
        retention: Seconds after which a stopped item is deleted with its session; None: never, so
            that tests can read stopped items.
        middlewares: aiohttp middlewares around all calls, for injected faults.

    Raises on entering:
        ServeError: An id or a token is malformed, the store cannot be opened, or the port is in
            use.
    """

    def __init__(  # noqa: PLR0913 - one keyword per option of `workpool serve`
        self,
        *,
        environments: Sequence[str] = (DEFAULT_ENVIRONMENT,),
        cloud_environments: Sequence[str] = (),
        tokens: Grants | None = None,
        worker_keys: Sequence[str] = (),
        scale_tokens: Grants | None = None,
        store: Store | PostgresStore | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        now: Callable[[], float] | None = None,
        history_limit: int | None = HISTORY_LIMIT,
        retention: float | None = None,
        middlewares: Iterable[Any] = (),
    ) -> None:
        self.environments = tuple(environments)
        self.cloud_environments = tuple(cloud_environments)
        self.host = host
        self.port = port
        self._operations: Operations | None = None
        self.engine: ControlPlaneEngine
        if isinstance(store, PostgresStore):
            self.engine = store.make_engine(
                environments=self.environments,
                cloud_environments=self.cloud_environments,
                now=now,
                retention=retention,
            )
        else:
            self._operations = Operations(
                self.environments,
                self.cloud_environments,
                store=store,
                now=now,
                history_limit=history_limit,
                retention=retention,
            )
            self.engine = MemoryIndexEngine(self._operations)
        self._tokens = tokens
        self._worker_keys = tuple(worker_keys)
        self._scale_tokens = dict(scale_tokens or {})
        self._middlewares = tuple(middlewares)
        self._stack = AsyncExitStack()
        self._connections: InboundConnections

    @property
    def operations(self) -> Operations:
        """The calls of the protocol as synchronous methods, which use the state in memory.

        Raises:
            RuntimeError: The store is a `PostgresStore`.
        """
        if self._operations is None:
            raise RuntimeError(
                "a control plane on PostgreSQL has no state in memory; await the calls of `engine`"
            )
        return self._operations

    @property
    def base_url(self) -> str:
        """The base URL of the qoder dialect."""
        return self._origin_url + QODER.prefix

    @property
    def anthropic_base_url(self) -> str:
        """The base URL of the anthropic dialect."""
        return self._origin_url + ANTHROPIC.prefix

    @property
    def token(self) -> str:
        """The first accepted token, or a random token if the caller passed no tokens."""
        if self._tokens is None:
            self._tokens = {secrets.token_urlsafe(24): None}
        return next(iter(self._tokens))

    @property
    def tokens(self) -> tuple[str, ...]:
        """All accepted tokens for work calls: those of the argument `tokens`, or the random one."""
        return (self.token, *tuple(self._tokens or ())[1:])

    @property
    def history(self) -> History:
        """The recorded history of all items, the oldest record first."""
        return self.operations.history

    def summary(self) -> Summary:
        """Compute the counts of `Summary`, such as the number of lost items, from `history`."""
        return summarize(self.history)

    def enqueue(
        self,
        count: int = 1,
        metadata: Mapping[str, str] | None = None,
        *,
        environment_id: str | None = None,
        work_type: str = SESSION,
        session_id: str | None = None,
        script: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[Item, ...]:
        """Create work items, and wake one waiting poll for each.

        The items survive a crash once `operations.wait_until_durable()` has returned.

        Args:
            count: The number of items, each with a session of its own.
            metadata: The metadata of each item.
            environment_id: The environment; None: the first one.
            work_type: The type of each item.
            session_id: The existing session that the items belong to; None: a new one for each.
            script: The tool uses of a scripted session; None: no script.

        Raises:
            APIError: A value is wrong, such as a malformed script.
        """
        return self.operations.enqueue(
            environment_id or self.environments[0],
            count=count,
            metadata=metadata,
            work_type=work_type,
            session_id=session_id,
            script=script,
        )

    def emit(self, session_id: str, *events: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
        """Append events to a session in the name of the agent or the service.

        The events are of types that only a server emits (`agent.tool_use`,
        `session.status_terminated`, …) and have no id. Returns the stored events. Raises
        `APIError`.
        """
        return self.operations.emit_events(session_id, events)

    def events(self, session_id: str) -> tuple[Mapping[str, Any], ...]:
        """Return all events of a session, oldest first."""
        stored = self.operations.sessions.get_conversation(session_id).events
        return tuple(event.value for event in stored)

    async def __aenter__(self) -> Self:
        self._check_arguments()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.engine.close)
            await self.engine.open()
            await self._start_server(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def _check_arguments(self) -> None:
        names = (*self.environments, *self.cloud_environments)
        for name in names:
            if not re.fullmatch(ID_PATTERN, name):
                raise ServeError(f"environment {name!r}: not an id ({ID_PATTERN})")
        if not self.environments or len(set(names)) != len(names):
            raise ServeError("environments: at least one, and none twice")
        if not 0 <= self.port <= _PORT_MAX:
            raise ServeError(f"port {self.port}: not in 0-{_PORT_MAX}")
        for token in (*self.tokens, *self._worker_keys, *self._scale_tokens):
            check_token(token)
        grants = (*(self._tokens or {}).values(), *self._scale_tokens.values())
        limited = {name for limits in grants for name in limits or ()}
        for name in sorted(limited.difference(names)):
            raise ServeError(f"a token is limited to {name!r}, which is not served")

    async def _start_server(self, stack: AsyncExitStack) -> None:
        bound = self._bind_port(stack)
        tokens = AcceptedTokens(self._tokens or {}, self.engine.signing_key, self._worker_keys)
        self._connections = connections = InboundConnections(_compute_max_connections())
        stack.callback(connections.close_all)
        routes = [
            route
            for dialect in DIALECTS.values()
            for paths in (WorkRoutes, SessionRoutes)
            for route in paths(self.engine, tokens, dialect).routes()
        ]
        routes += [
            route
            for dialect in DIALECTS.values()
            if dialect.creation
            for route in ApplicationRoutes(
                self.engine, tokens, dialect, self.cloud_environments
            ).routes()
        ]
        routes += self._make_scale_routes(bound).routes()
        runner = web.AppRunner(
            make_application(
                routes=routes,
                middlewares=(connections.request_tracking_middleware, *self._middlewares),
            ),
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            logger=HttpLog(logging.getLogger("workpool.server.http")),
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        stack.callback(self.engine.end_waiting_calls)
        server = await asyncio.get_running_loop().create_server(
            connections.protocol_factory(runner.server),
            sock=bound,
            backlog=_BACKLOG,
            # Do not serve yet: a cancellation between the start of serving and the registration of
            # `server.close` would leave the socket open.
            start_serving=False,
        )
        stack.callback(server.close)
        await server.start_serving()

    def _make_scale_routes(self, bound: socket.socket) -> ScaleRoutes:
        """Return the route for autoscalers, which also accepts the tokens of `scale_tokens`."""
        grants = {**self._scale_tokens, **(self._tokens or {})}
        tokens = AcceptedTokens(grants, self.engine.signing_key, self._worker_keys)
        local = ip_address(bound.getsockname()[0]).is_loopback
        return ScaleRoutes(self.engine, tokens, local=local)

    def _bind_port(self, stack: AsyncExitStack) -> socket.socket:
        """Return a listening socket. Closing `stack` closes the socket, which frees the port.

        A cancelled `loop.create_server(host, port)` would leave the port bound forever.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            bound = socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            advice = "; choose another port, or 0 for a free one" if in_use else ""
            raise ServeError(
                f"cannot listen on {self.host} port {self.port}: {error}{advice}"
            ) from error
        stack.callback(_unbind_port, asyncio.get_running_loop(), bound)
        self.port = bound.getsockname()[1]
        return bound

    @property
    def _origin_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def _compute_max_connections() -> int:
    """Return the limit of connections: 3/4 of the limit of file descriptors, at most 10,000."""
    if resource is None:
        return _CONNECTIONS_MAX
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS_MAX if soft < 0 else min(_CONNECTIONS_MAX, soft * 3 // 4)


def _unbind_port(loop: asyncio.AbstractEventLoop, bound: socket.socket) -> None:
    if bound.fileno() >= 0:  # a closed socket has the descriptor -1
        loop.remove_reader(bound)
        bound.close()
