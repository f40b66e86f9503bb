"""The work calls over HTTP, in one dialect.

Every handler checks in the same order, which is the precedence of errors: token, environment, item,
the request's own values, the call. An answer is sent once its change is durable. See
workpool/docs/protocol.md, "Calls".
"""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from workpool.pages import add_page
from workpool.server.api_errors import APIError, StoreError
from workpool.server.http.disconnected_clients import has_gone
from workpool.server.http.server_dialects import DIALECTS
from workpool.server.pagination import listing
from workpool.server.parsing import request_values as requests
from workpool.server.state_machine import heartbeat_answer
from workpool.server.stored_item import WORK_PREFIX
from workpool.server.timestamps import to_seconds_text
from workpool.wire.protocol import (
    BODY_LIMIT_BYTES,
    STOPPED,
    WORK_HEARTBEAT,
    WORK_QUEUE_STATS,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.server.http.server_dialects import Dialect
    from workpool.server.http.tokens import Tokens
    from workpool.server.operations import Operations
    from workpool.server.stored_item import Item

_ENVIRONMENT: Final = "/environments/{environment_id}/work"
_ITEM: Final = _ENVIRONMENT + "/{work_id:(?!(?:poll|stats)$)[^{}/]+}"
_REQUEST_ID_PREFIXES: Final = tuple(
    dialect.prefix + "/" for dialect in DIALECTS.values() if dialect.request_ids
)
_JSON: Final = {"Content-Type": "application/json"}


def answer(value: object, status: int = 200) -> web.Response:
    """Return a JSON answer."""
    return web.Response(body=orjson.dumps(value), status=status, headers=_JSON)


class Routes:
    """The endpoints of work items in one dialect."""

    def __init__(self, operations: Operations, tokens: Tokens, dialect: Dialect) -> None:
        self._operations = operations
        self._tokens = tokens
        self._dialect = dialect

    def table(self) -> list[web.RouteDef]:
        """Return the routes under the dialect's prefix. No HEAD, since a poll has an effect."""
        environment, item = self._dialect.prefix + _ENVIRONMENT, self._dialect.prefix + _ITEM
        return [  # matched in this order, with a worker's most frequent calls first
            web.get(environment + "/poll", self.poll, allow_head=False),
            web.post(item + "/ack", self.ack),
            web.post(item + "/heartbeat", self.heartbeat),
            web.post(item + "/stop", self.stop),
            web.get(environment + "/stats", self.stats, allow_head=False),
            web.get(environment, self.list, allow_head=False),
            web.post(environment, self.enqueue),
            web.get(item, self.get, allow_head=False),
            web.post(item, self.update),
        ]

    async def poll(self, request: web.Request) -> web.Response:
        """Answer a poll. A client that has gone gets no item, whenever it went."""
        environment_id = self._environment(request, worker=True)
        await requests.body(request)
        poll = requests.poll(request, self._worker_id(request))
        item = await self._operations.long_poll(environment_id, poll, partial(has_gone, request))
        if item is None:
            await self._operations.durable()
            return answer(None)
        delivered = False
        try:
            await self._operations.durable()
            delivered = not has_gone(request)
        finally:  # the client has gone while the delivery became durable
            if not delivered:
                self._operations.withdraw(item)
        return answer(self._delivery(item) if delivered else None)

    def _delivery(self, item: Item) -> dict[str, Any]:
        shown = self._dialect.item(item)
        if self._dialect.item_secrets:
            shown["secret"] = self._tokens.secret(item)
        return shown

    async def stats(self, request: web.Request) -> web.Response:
        """Answer with the statistics of the queue."""
        environment_id = self._environment(request)
        await requests.body(request)
        stats = self._operations.stats(environment_id)
        oldest = stats.oldest_queued_at
        return await self._durable(
            {
                "type": WORK_QUEUE_STATS,
                **stats._asdict(),
                "oldest_queued_at": None if oldest is None else to_seconds_text(oldest),
            }
        )

    async def list(self, request: web.Request) -> web.Response:
        """Answer with a page of the list of items."""
        environment_id = self._environment(request, worker=True)
        await requests.body(request)
        place = requests.place(request, WORK_PREFIX)
        wanted = requests.item_filter(request)
        if wanted is None:
            page = self._operations.page(
                environment_id, place.limit, after=place.after, before=place.before
            )
            return await self._durable(listing(page, self._dialect.item))
        page = self._operations.search(
            environment_id, wanted, place.limit, after=place.after, before=place.before
        )
        # Tells a client that nothing is left for it to select or to order.
        return await self._durable({**listing(page, self._dialect.item), "selected": True})

    async def enqueue(self, request: web.Request) -> web.Response:
        """Create work."""
        environment_id = self._environment(request)
        wanted = requests.enqueue(await requests.body(request))
        items = self._operations.enqueue(
            environment_id,
            count=wanted.count,
            metadata=wanted.metadata,
            work_type=wanted.work_type,
            script=wanted.script,
        )
        return await self._durable({"data": [self._dialect.item(item) for item in items]})

    async def get(self, request: web.Request) -> web.Response:
        """Answer with one item."""
        environment_id, work_id = self._item(request)
        await requests.body(request)
        item = self._operations.get(environment_id, work_id)
        return await self._durable(self._dialect.item(item))

    async def update(self, request: web.Request) -> web.Response:
        """Update metadata."""
        environment_id, work_id = self._item(request)
        patch = requests.patch(
            await requests.body(request), required=self._dialect.metadata_required
        )
        worker_id = self._worker_id(request)
        item = self._operations.update(environment_id, work_id, patch, worker_id)
        return await self._durable(self._dialect.item(item))

    async def ack(self, request: web.Request) -> web.Response:
        """Acknowledge an item."""
        environment_id, work_id = self._item(request, own_token=True)
        await requests.body(request)
        item = self._operations.ack(environment_id, work_id, self._worker_id(request))
        return await self._durable(self._dialect.item(item))

    async def heartbeat(self, request: web.Request) -> web.Response:
        """Extend the lease of an item if its state allows it."""
        environment_id, work_id = self._item(request, own_token=True)
        await requests.body(request)
        expected, ttl_seconds = requests.heartbeat(request)
        item = self._operations.heartbeat(
            environment_id,
            work_id,
            expected,
            ttl_seconds,
            self._worker_id(request),
            compare_on_stop=self._dialect.compare_on_stop,
        )
        state = heartbeat_answer(item, extended=item.state != STOPPED)
        # The vendor's type of this answer is a string, empty before the first heartbeat.
        last = state["last_heartbeat"] or ""
        return await self._durable({"type": WORK_HEARTBEAT, **state, "last_heartbeat": last})

    async def stop(self, request: web.Request) -> web.Response:
        """Stop an item; the dialect decides the form of the answer."""
        environment_id, work_id = self._item(request, own_token=True)
        force = requests.force(await requests.body(request))
        item = self._operations.stop(
            environment_id,
            work_id,
            self._worker_id(request),
            force=force,
            refused=self._dialect.stop_refused,
        )
        if self._dialect.stop_answers_item:
            return await self._durable(self._dialect.item(item))
        await self._operations.durable()
        return web.Response(status=204)

    def _environment(
        self, request: web.Request, work_id: str | None = None, *, worker: bool = False
    ) -> str:
        """Admit the caller to the environment of the path: 401, 403, 404, 400, in this order.

        Args:
            request: The request.
            work_id: The item whose own token is accepted for this call.
            worker: Whether a worker's key is accepted for this call.
        """
        caller = self._tokens.admit(request.headers, self._dialect)
        environment_id = request.match_info["environment_id"]
        caller.check_environment(environment_id)
        caller.check_item(work_id)
        if not worker:
            caller.check_application()
        self._operations.queue(environment_id)
        return environment_id

    def _item(self, request: web.Request, *, own_token: bool = False) -> tuple[str, str]:
        """Admit the caller to the item of the path; 404 unknown.

        `own_token`: whether the item's own token, and a worker's key, are accepted for this call.
        """
        work_id = request.match_info["work_id"]
        own = work_id if own_token else None
        environment_id = self._environment(request, own, worker=own_token)
        self._operations.get(environment_id, work_id)
        return environment_id, work_id

    def _worker_id(self, request: web.Request) -> str | None:
        return requests.worker_id(request, self._dialect.worker_id_header)

    async def _durable(self, value: dict[str, Any]) -> web.Response:
        await self._operations.durable()
        return answer(value)


def envelopes(durable: Callable[[], Awaitable[None]]) -> Callable[..., Awaitable[Any]]:
    """Return the middleware that turns every refusal into an error envelope.

    A 409 can show that an earlier call was applied, so it is sent only once that change is
    `durable`.
    """

    @web.middleware
    async def middleware(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            try:
                return await handler(request)
            except APIError as refusal:
                if refusal.status == HTTPStatus.CONFLICT:
                    await durable()
                return answer(refusal.envelope(), refusal.status)
        except StoreError as error:
            return answer(APIError(500, str(error)).envelope(), 500)
        except web.HTTPException as error:
            response = answer(APIError(error.status, error.reason).envelope(), error.status)
            if isinstance(error, web.HTTPMethodNotAllowed):
                response.headers["Allow"] = error.headers["Allow"]
            return response

    return middleware


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Add a header with an id to the answer, in the dialects that do so."""
    if request.path.startswith(_REQUEST_ID_PREFIXES):
        response.headers["request-id"] = "req_" + secrets.token_hex(12)


def application(
    *,
    routes: list[web.RouteDef],
    durable: Callable[[], Awaitable[None]],
    middlewares: tuple[Any, ...] = (),
) -> web.Application:
    """Return the aiohttp application; faults are injected by the outer `middlewares`."""
    app = web.Application(
        middlewares=[*middlewares, envelopes(durable)], client_max_size=BODY_LIMIT_BYTES
    )
    app[requests.LARGE_BODIES] = asyncio.Semaphore(requests.LARGE_BODIES_MAX)
    app.add_routes(routes)
    app.router.add_get("/", add_page(app.router, "queue"))
    app.on_response_prepare.append(add_request_id)
    return app
