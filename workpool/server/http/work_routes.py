"""HTTP routes for work items; each `WorkRoutes` object serves one dialect.

Every handler checks in the same order, which is the precedence of errors: token, environment, item,
the request's own values, the call. An answer is sent once its change is durable. See
workpool/docs/protocol.md, "Calls".
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from workpool.pages import add_page
from workpool.server.api_errors import APIError, StoreError
from workpool.server.http.disconnected_clients import has_disconnected
from workpool.server.http.server_dialects import DIALECTS
from workpool.server.pagination import page_json
from workpool.server.parsing import request_values as requests
from workpool.server.state_machine import heartbeat_answer
from workpool.server.stored_item import WORK_PREFIX
from workpool.wire.protocol import (
    BODY_LIMIT_BYTES,
    STOPPED,
    WORK_HEARTBEAT,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from workpool.server.engine import ControlPlaneEngine
    from workpool.server.http.server_dialects import ServerDialect
    from workpool.server.http.tokens import AcceptedTokens
    from workpool.server.stored_item import Item

_ENVIRONMENT: Final = "/environments/{environment_id}/work"
_ITEM: Final = _ENVIRONMENT + "/{work_id:(?!(?:poll|stats)$)[^{}/]+}"
_REQUEST_ID_PREFIXES: Final = tuple(
    dialect.prefix + "/" for dialect in DIALECTS.values() if dialect.request_ids
)
_JSON: Final = {"Content-Type": "application/json"}


def json_response(value: object, status: int = 200) -> web.Response:
    """Return an answer with a JSON body."""
    return web.Response(body=orjson.dumps(value), status=status, headers=_JSON)


class WorkRoutes:
    """The endpoints of work items in one dialect."""

    def __init__(
        self, engine: ControlPlaneEngine, tokens: AcceptedTokens, dialect: ServerDialect
    ) -> None:
        self._engine = engine
        self._tokens = tokens
        self._dialect = dialect

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this class; each path begins with the dialect's prefix.

        HEAD is not allowed, because a HEAD request to the route of polls would deliver an item.
        """
        environment, item = self._dialect.prefix + _ENVIRONMENT, self._dialect.prefix + _ITEM
        return [  # aiohttp tries the routes in this order, so the most frequent calls come first
            web.get(environment + "/poll", self.poll, allow_head=False),
            web.post(item + "/ack", self.ack_item),
            web.post(item + "/heartbeat", self.heartbeat),
            web.post(item + "/stop", self.stop_item),
            web.get(environment + "/stats", self.queue_stats, allow_head=False),
            web.get(environment, self.list_items, allow_head=False),
            web.post(environment, self.enqueue),
            web.get(item, self.get_item, allow_head=False),
            web.post(item, self.update_metadata),
        ]

    async def poll(self, request: web.Request) -> web.Response:
        """Answer with a delivered item or null; a disconnected client gets no item."""
        environment_id = await self._authorize_environment(request, worker=True)
        await requests.read_body(request)
        poll = requests.parse_poll(request, self._worker_id(request))
        item = await self._engine.long_poll(
            environment_id, poll, partial(has_disconnected, request)
        )
        return json_response(None if item is None else self._make_delivery_json(item))

    def _make_delivery_json(self, item: Item) -> dict[str, Any]:
        shown = self._dialect.item_json(item)
        if self._dialect.item_secrets:
            shown["secret"] = self._tokens.make_item_secret(item)
        return shown

    async def queue_stats(self, request: web.Request) -> web.Response:
        """Answer with the statistics of the queue."""
        environment_id = await self._authorize_environment(request)
        await requests.read_body(request)
        stats = await self._engine.queue_stats(environment_id)
        return json_response(stats.to_json())

    async def list_items(self, request: web.Request) -> web.Response:
        """Answer with a page of the items that the query selects."""
        environment_id = await self._authorize_environment(request, worker=True)
        await requests.read_body(request)
        place = requests.parse_page_request(request, WORK_PREFIX)
        wanted = requests.parse_item_filter(request)
        shown = page_json(
            await self._engine.list_items(environment_id, place, wanted), self._dialect.item_json
        )
        # `selected` shows the client that the server has already filtered and ordered the items.
        return json_response(shown if wanted is None else {**shown, "selected": True})

    async def enqueue(self, request: web.Request) -> web.Response:
        """Create items, and answer with them."""
        environment_id = await self._authorize_environment(request)
        wanted = requests.parse_enqueue_request(await requests.read_body(request))
        items = await self._engine.enqueue(
            environment_id,
            count=wanted.count,
            metadata=wanted.metadata,
            work_type=wanted.work_type,
            script=wanted.script,
        )
        return json_response({"data": [self._dialect.item_json(item) for item in items]})

    async def get_item(self, request: web.Request) -> web.Response:
        """Answer with one item."""
        place = await self._authorize_item(request)
        async with self._replace_error_if_item_unknown(place):
            await requests.read_body(request)
        return json_response(self._dialect.item_json(await self._engine.get_item(*place)))

    async def update_metadata(self, request: web.Request) -> web.Response:
        """Merge the metadata patch of the request into an item's metadata."""
        place = await self._authorize_item(request)
        async with self._replace_error_if_item_unknown(place):
            patch = requests.parse_metadata_patch(
                await requests.read_body(request), required=self._dialect.metadata_required
            )
            worker_id = self._worker_id(request)
        return json_response(
            self._dialect.item_json(await self._engine.update_metadata(*place, patch, worker_id))
        )

    async def ack_item(self, request: web.Request) -> web.Response:
        """Acknowledge an item, and answer with it."""
        place = await self._authorize_item(request, own_token=True)
        async with self._replace_error_if_item_unknown(place):
            await requests.read_body(request)
            worker_id = self._worker_id(request)
        return json_response(
            self._dialect.item_json(await self._engine.ack_item(*place, worker_id))
        )

    async def heartbeat(self, request: web.Request) -> web.Response:
        """Extend the lease of an item, and answer with the heartbeat's result."""
        place = await self._authorize_item(request, own_token=True)
        async with self._replace_error_if_item_unknown(place):
            await requests.read_body(request)
            expected, ttl_seconds = requests.parse_heartbeat(request)
            worker_id = self._worker_id(request)
        item = await self._engine.heartbeat(
            *place,
            expected,
            ttl_seconds,
            worker_id,
            compare_on_stop=self._dialect.compare_on_stop,
        )
        state = heartbeat_answer(item, extended=item.state != STOPPED)
        # The vendor's SDK expects `last_heartbeat` to be a string: empty before the first
        # heartbeat.
        last = state["last_heartbeat"] or ""
        return json_response({"type": WORK_HEARTBEAT, **state, "last_heartbeat": last})

    async def stop_item(self, request: web.Request) -> web.Response:
        """Stop an item; the dialect decides whether the answer is the item or a 204."""
        place = await self._authorize_item(request, own_token=True)
        async with self._replace_error_if_item_unknown(place):
            force = requests.parse_force(await requests.read_body(request))
            worker_id = self._worker_id(request)
        item = await self._engine.stop_item(
            *place, worker_id, force=force, refused=self._dialect.stop_refused
        )
        if self._dialect.stop_answers_item:
            return json_response(self._dialect.item_json(item))
        return web.Response(status=204)

    async def _authorize_environment(
        self, request: web.Request, work_id: str | None = None, *, worker: bool = False
    ) -> str:
        """Return the environment id in the path; checks for a 401, 403, 404 and 400 in this order.

        Args:
            request: The request.
            work_id: The item whose own token is accepted for this call.
            worker: Whether a worker's key is accepted for this call.
        """
        caller = self._tokens.authenticate(request.headers, self._dialect)
        environment_id = request.match_info["environment_id"]
        caller.check_environment_access(environment_id)
        caller.check_item_access(work_id)
        if not worker:
            caller.check_not_worker_key()
        await self._engine.require_self_hosted_environment(environment_id)
        return environment_id

    async def _authorize_item(
        self, request: web.Request, *, own_token: bool = False
    ) -> tuple[str, str]:
        """Check the caller's permissions; return the environment id and work id in the path.

        `own_token`: whether the item's own token, and a worker's key, are accepted for this call.
        """
        work_id = request.match_info["work_id"]
        own = work_id if own_token else None
        return await self._authorize_environment(request, own, worker=own_token), work_id

    @asynccontextmanager
    async def _replace_error_if_item_unknown(self, place: tuple[str, str]) -> AsyncIterator[None]:
        """Return a context in which an API error becomes a 404 if the item does not exist.

        In the order of errors, an unknown item comes first. Without an error the item is not read
        here, since the call itself reads it.
        """
        try:
            yield
        except APIError:
            await self._engine.get_item(*place)
            raise

    def _worker_id(self, request: web.Request) -> str | None:
        return requests.parse_worker_id(request, self._dialect.worker_id_header)


@web.middleware
async def error_envelope_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Middleware that turns each API error into an answer with an error envelope."""
    try:
        return await handler(request)
    except APIError as refusal:
        response = json_response(refusal.to_envelope(), refusal.status)
        if refusal.retry_after is not None:
            response.headers["Retry-After"] = str(refusal.retry_after)
        return response
    except StoreError as error:
        return json_response(APIError(500, str(error)).to_envelope(), 500)
    except web.HTTPException as error:
        response = json_response(APIError(error.status, error.reason).to_envelope(), error.status)
        if isinstance(error, web.HTTPMethodNotAllowed):
            response.headers["Allow"] = error.headers["Allow"]
        return response


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Add the header `request-id` to an answer, if the dialect has this header."""
    if request.path.startswith(_REQUEST_ID_PREFIXES):
        response.headers["request-id"] = "req_" + secrets.token_hex(12)


def make_application(
    *,
    routes: list[web.RouteDef],
    middlewares: tuple[Any, ...] = (),
) -> web.Application:
    """Return the aiohttp application. `middlewares` wrap all calls, to inject faults."""
    app = web.Application(
        middlewares=[*middlewares, error_envelope_middleware], client_max_size=BODY_LIMIT_BYTES
    )
    app[requests.LARGE_BODIES] = asyncio.Semaphore(requests.LARGE_BODIES_MAX)
    app.add_routes(routes)
    app.router.add_get("/", add_page(app.router, "queue"))
    app.on_response_prepare.append(add_request_id)
    return app
