"""The HTTP server of `/metrics`, `/healthz`, `/readyz` and `/scale`.

Runs on the loop of the lease renewer, so that it answers while a handler blocks the handlers' loop.
Metrics are rendered on a thread of their own, so that they do not delay a heartbeat. Answers
contain no ids and no secrets.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import logging
import os
import time
from contextlib import AsyncExitStack
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar

from aiohttp import web
from prometheus_client.exposition import choose_encoder, gzip_accepted

from workpool.errors import ListenError
from workpool.inbound_connections import HttpLog, InboundConnections, host_is_address_or_localhost
from workpool.log_fields import pool_logger
from workpool.pages import CONFINED, add_page
from workpool.wire.http.daemon_threads import DaemonThreads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future
    from types import TracebackType

    from prometheus_client import CollectorRegistry

    Encoder = Callable[[CollectorRegistry], bytes]
    Reasons = Callable[[], Sequence[str]]
    Numbers = Callable[[], Mapping[str, float] | None]

log = pool_logger(__name__)

R = TypeVar("R")

CONNECTIONS_MAX: Final = 64
"""Connections that may be open at once. The handlers need the process's descriptors too."""

SCRAPES_MAX: Final = 8
"""Scrapes that may be under way at once; more are refused, so that they cannot pile up."""

CLOSE_SECONDS: Final = 0.5
"""Seconds by which answers in progress may delay each step of closing."""

BIND_TRIES: Final = 10
"""Attempts to find a port that is free on each address."""

IPV4: Final = 4

INDEX: Final = {
    "/": "a page that shows the worker, in a browser",
    "/live.json": "the data of that page",
    "/metrics": "Prometheus metrics",
    "/healthz": "200 while the process works, else 503 and why not",
    "/readyz": "200 while it does its work, else 503 and why not",
    "/scale": "numbers for autoscalers",
}
"""The paths, as `/` lists them; those that are not served are left out."""


class LivePageSource(NamedTuple):
    """The settings and the data source of the page `/`, which shows the pool in a browser.

    Attributes:
        status: Returns the data; its argument says whether ids are included. Called on the thread
            that renders metrics.
        always_ids: Whether ids of items and sessions are included also if the address is not on
            the loopback interface.
    """

    status: Callable[[bool], Mapping[str, Any]]
    always_ids: bool


class Exporter:
    """The HTTP server of a pool's metrics and health, as an async context manager.

    Args:
        host: The name or address to listen on.
        port: 0 takes any free port, the same on each address.
        registry: The metrics of `/metrics`, rendered on a thread of their own.
        health: Returns the reasons for a 503 of `/healthz`. Called on this loop; must not block.
        readiness: Returns the reasons for a 503 of `/readyz`.
        live_page: None: there is no live page.

    Attributes:
        port: The port, once entered.
        url: The URL for clients on this machine, without a path, once entered.
        scraped_at: When the last scrape that was answered began, on the monotonic clock; None
            before the first.
        scale: Returns the numbers of `/scale`; None makes it a 503. Called on this loop; must not
            block. Set before entering; None: there is no `/scale`.
        on_scraped: Functions that are called after each scrape, before its answer is sent, on the
            exporter's loop; added and removed on any thread.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        *,
        health: Reasons,
        readiness: Reasons,
        live_page: LivePageSource | None = None,
    ) -> None:
        self.port = port
        self.url = ""
        self.scraped_at: float | None = None
        self.scale: Numbers | None = None
        self.on_scraped: set[Callable[[], object]] = set()
        self._host = host
        self._registry = registry
        self._health = health
        self._readiness = readiness
        self._live_page = live_page
        self._exit = AsyncExitStack()
        self._renderer: DaemonThreads
        self._renderings: set[Future[Any]] = set()
        self._connections = InboundConnections(CONNECTIONS_MAX)

    async def __aenter__(self) -> Self:
        """Bind the address and serve the endpoints.

        Raises:
            ListenError: The address cannot be bound.
        """
        async with AsyncExitStack() as stack:
            self._renderer = DaemonThreads("workpool-metrics", 1)
            stack.push_async_callback(self._stop_metrics_rendering)
            runner = web.AppRunner(
                self._new_app(),
                access_log=None,
                logger=HttpLog(logging.getLogger("workpool.exporter.http")),
                shutdown_timeout=CLOSE_SECONDS,
            )
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            server = await self._listen(runner, stack)
            self.url, self.port = _find_server_url_and_port(server)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the server in bounded time, even if this task is cancelled once meanwhile."""
        async with asyncio.TaskGroup() as group:
            closing = group.create_task(self._exit.aclose(), name="exporter-close")
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                await asyncio.wait({closing})
                raise

    async def _listen(self, runner: web.AppRunner, stack: AsyncExitStack) -> asyncio.Server:
        try:
            server = await self._bind_addresses(self._connections.protocol_factory(runner.server))
            stack.push_async_callback(self._close_connections, server, runner)
            await server.start_serving()
        except OSError as error:
            raise self._make_listen_error(error) from error
        return server

    async def _bind_addresses(self, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Server:
        """Bind each address of the host, all to the same port.

        With port 0, the system chooses a different port for each address. One of these ports is
        then bound on every address. If another program has it on some address, the system chooses
        again.
        """
        for _ in range(BIND_TRIES):
            # `_create_server` binds but does not listen: if it listened and were cancelled, nothing
            # would close the listening sockets.
            server = await self._create_server(protocol, self.port)
            ports = {each.getsockname()[1] for each in server.sockets}
            if len(ports) == 1:
                return server
            server.close()
            # If another program uses the port on one of the addresses, try another port.
            with contextlib.suppress(OSError):
                return await self._create_server(protocol, ports.pop())
        raise OSError(errno.EADDRINUSE, "no port is free on every address")

    async def _create_server(
        self, protocol: Callable[[], asyncio.Protocol], port: int
    ) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(protocol, self._host, port, start_serving=False)

    async def _close_connections(self, server: asyncio.Server, runner: web.AppRunner) -> None:
        """Close every connection, even if its client neither reads nor closes it."""
        server.close()
        # Let the loop run once: it adds the sockets that it has accepted to `_connections`. Then
        # `close_all` below closes these sockets, too.
        await asyncio.sleep(0)
        try:
            await runner.cleanup()
        finally:
            self._connections.close_all()
            # Let the loop run once, because the loop closes the sockets in its next iteration.
            await asyncio.sleep(0)

    def _make_listen_error(self, error: OSError) -> ListenError:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        advice = "set metrics_listen to an address of this host, or to off"
        if error.errno == errno.EADDRINUSE:
            advice = (
                "another program or a second pool on this host has it: set metrics_listen to "
                "another port, to port 0 for any free one, or to off"
            )
        return ListenError(f"cannot listen on {self._host}:{self.port} ({reason}); {advice}")

    async def _stop_metrics_rendering(self) -> None:
        under_way = [asyncio.wrap_future(rendering) for rendering in tuple(self._renderings)]
        try:
            if under_way:
                await asyncio.wait(under_way, timeout=CLOSE_SECONDS)
        finally:
            for rendering in under_way:
                # Cancel a rendering of the metrics that has not ended. Otherwise its end would be
                # reported to the event loop, which may be closed by then.
                rendering.cancel()
            if self._renderings:
                log.warning("metrics rendering abandoned: a collector does not return")
            await self._renderer.close()

    def _new_app(self) -> web.Application:
        app = web.Application(middlewares=[self._connections.request_tracking_middleware])
        app.router.add_get("/", self._serve_index)
        app.router.add_get("/metrics", self._serve_metrics)
        app.router.add_get("/healthz", self._serve_healthz)
        app.router.add_get("/readyz", self._serve_readyz)
        if self.scale is not None:
            app.router.add_get("/scale", partial(_serve_scaling_numbers, self.scale))
        if self._live_page is not None:
            self._page = add_page(app.router, "worker")
            app.router.add_get("/live.json", self._serve_live_page_data)
        return app

    async def _serve_index(self, request: web.Request) -> web.StreamResponse:
        if self._live_page is not None and "text/html" in request.headers.get("Accept", ""):
            return await self._page(request)
        served = {resource.canonical for resource in request.app.router.resources()}
        lines = [
            f"{path:<12}{text}"
            for path, text in INDEX.items()
            if path in served and (path != "/" or self._live_page is not None)
        ]
        return web.Response(text="\n".join(["workpool", "", *lines, ""]))

    async def _serve_live_page_data(self, request: web.Request) -> web.Response:
        if self._live_page is None:
            raise web.HTTPNotFound
        # Check the `Host` header, too: otherwise the web page of another site could read the ids of
        # items and sessions, through a host name of that site that resolves to the loopback
        # address.
        local = _is_loopback(self._host) and host_is_address_or_localhost(request.host)
        data = await self._render_on_thread(
            self._live_page.status, local or self._live_page.always_ids
        )
        return web.json_response(data, headers=CONFINED)

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        began_at = time.monotonic()
        encode, content_type = _choose_encoder(request.headers.get("Accept", ""))
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if gzip_accepted(request.headers.get("Accept-Encoding", "")):
            headers["Content-Encoding"] = "gzip"
            body = await self._render_on_thread(_encode_and_compress, encode, self._registry)
        else:
            body = await self._render_on_thread(encode, self._registry)
        self.scraped_at = began_at
        for call in tuple(self.on_scraped):
            call()
        return web.Response(body=body, headers=headers)

    async def _render_on_thread(self, render: Callable[..., R], *arguments: object) -> R:
        """Call `render` on the exporter's own thread, and return its result."""
        if len(self._renderings) >= SCRAPES_MAX:
            raise web.HTTPServiceUnavailable(
                text="too many scrapes\n", headers={"Retry-After": "1"}
            )
        rendering = self._renderer.submit(render, *arguments)
        self._renderings.add(rendering)
        rendering.add_done_callback(self._renderings.discard)
        return await asyncio.wrap_future(rendering)

    async def _serve_healthz(self, _: web.Request) -> web.Response:
        return _make_health_response("healthy", self._health())

    async def _serve_readyz(self, _: web.Request) -> web.Response:
        return _make_health_response("ready", self._readiness())


async def _serve_scaling_numbers(numbers: Numbers, _: web.Request) -> web.Response:
    found = numbers()
    if found is None:
        reason = {"status": "unknown", "reasons": ["the numbers are too old"]}
        return web.json_response(reason, status=HTTPStatus.SERVICE_UNAVAILABLE)
    return web.json_response(dict(found))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _make_health_response(good: str, reasons: Sequence[str]) -> web.Response:
    if not reasons:
        return web.json_response({"status": good})
    body = {"status": f"un{good}", "reasons": list(reasons)}
    return web.json_response(body, status=HTTPStatus.SERVICE_UNAVAILABLE)


def _choose_encoder(accept: str) -> tuple[Encoder, str]:
    try:
        return choose_encoder(accept)
    except (TypeError, ValueError):
        # The `Accept` header has a malformed "version=": use the default format.
        return choose_encoder("")


def _encode_and_compress(encode: Encoder, registry: CollectorRegistry) -> bytes:
    return gzip.compress(encode(registry))


def _find_server_url_and_port(server: asyncio.Server) -> tuple[str, int]:
    """Return the URL and the port of a server.

    The URL of a server that listens on all addresses has the loopback address.
    """
    host, port = server.sockets[0].getsockname()[:2]
    address = ip_address(host)
    if address.is_unspecified:
        address = ip_address("127.0.0.1" if address.version == IPV4 else "::1")
    return f"http://{address if address.version == IPV4 else f'[{address}]'}:{port}", port
