"""HTTP for applications: create, read and list environments and sessions, and archive sessions.

An application that uses the vendor's SDK begins with these calls. A new session creates a work item
for the workers of its environment.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from workpool.server.api_errors import APIError
from workpool.server.http.work_routes import answer
from workpool.server.pagination import listing, page_of
from workpool.server.parsing import creation_requests
from workpool.server.parsing import request_values as requests
from workpool.server.stored_item import SESSION_PREFIX
from workpool.server.stored_session import AGENT
from workpool.server.timestamps import to_heartbeat_text
from workpool.wire.protocol import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.server.environments import Environment
    from workpool.server.http.server_dialects import Dialect
    from workpool.server.http.tokens import Caller, Tokens
    from workpool.server.operations import Operations
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import StoredSession

SCAN_ROWS: Final = 500
"""After this many rows of a filtered list, other calls run."""


class ApplicationRoutes:
    """The endpoints of environments and sessions that only applications call, in one dialect."""

    def __init__(self, operations: Operations, tokens: Tokens, dialect: Dialect) -> None:
        self._operations = operations
        self._tokens = tokens
        self._dialect = dialect

    def table(self) -> list[web.RouteDef]:
        """Return the routes under the dialect's prefix."""
        environments = self._dialect.prefix + "/environments"
        sessions = self._dialect.prefix + "/sessions"
        return [
            web.post(environments, self.create_environment),
            web.get(environments, self.environments, allow_head=False),
            web.get(environments + "/{environment_id}", self.environment, allow_head=False),
            web.post(sessions, self.create_session),
            web.get(sessions, self.sessions, allow_head=False),
            web.post(sessions + "/{session_id}/archive", self.archive),
        ]

    async def create_environment(self, request: web.Request) -> web.Response:
        """Create a `self_hosted` environment."""
        if self._admit(request).environments is not None:
            raise APIError(403, "this token is limited to environments that exist")
        wanted = creation_requests.parse_environment(await requests.body(request))
        environment = self._operations.create_environment(*wanted)
        return await self._durable(environment.answer(cloud=False))

    async def environment(self, request: web.Request) -> web.Response:
        """Read one environment."""
        environment_id = request.match_info["environment_id"]
        self._admit(request).check_environment(environment_id)
        await requests.body(request)
        environment, cloud = self._operations.environment(environment_id)
        return await self._durable(environment.answer(cloud=cloud))

    async def environments(self, request: web.Request) -> web.Response:
        """List the environments that the token may use, in ascending order of their ids."""
        limits = self._admit(request).environments
        await requests.body(request)
        place = requests.place(request, "", ID_PATTERN)
        if place.before is not None:
            raise APIError(400, "before_id is not known here", "before_id")
        found = [
            self._operations.environment(environment_id)[0]
            for environment_id in self._operations.environment_ids()
            if environment_id > place.after and (limits is None or environment_id in limits)
        ]
        page = page_of(found[: place.limit + 1], place.limit, backwards=False)
        return await self._durable(listing(page, self._environment_answer))

    def _environment_answer(self, environment: Environment) -> dict[str, Any]:
        _, cloud = self._operations.environment(environment.id)
        return environment.answer(cloud=cloud)

    async def create_session(self, request: web.Request) -> web.Response:
        """Create a session, and the work item that brings it to a worker."""
        caller = self._admit(request)
        wanted = creation_requests.parse_session(await requests.body(request))
        caller.check_environment(wanted.environment_id)
        return await self._durable(self._session(*self._operations.create_session(wanted)))

    async def sessions(self, request: web.Request) -> web.Response:
        """List the sessions that the query selects, by default the newest first."""
        limits = self._admit(request).environments
        await requests.body(request)
        place = requests.place(request, SESSION_PREFIX)
        newest_first = requests.newest_first(request, default=True)
        if newest_first and place.after:
            raise APIError(400, "after_id goes with order=asc only", "after_id")
        wanted = self._session_filter(request, limits)
        found: dict[str, tuple[StoredSession, dict[str, Any]]] = {}
        after, before = place.after, place.before
        last: str | None = ""
        while last is not None and len(found) <= place.limit:
            last = None
            walk = self._operations.walk_sessions(
                after=after, before=before, newest_first=newest_first
            )
            for session, item in islice(walk, SCAN_ROWS):
                last = session.id
                if wanted(session, item):
                    # Rendered at once, since a session may be deleted while other calls run.
                    found[last] = session, self._session(session, item)
                if len(found) > place.limit:
                    break
            if newest_first or before is not None:
                before = last
            else:
                after = last or ""
            await asyncio.sleep(0)
        sessions = [session for session, _ in found.values()]
        backwards = place.before is not None
        if backwards and not newest_first:
            sessions.reverse()
        page = page_of(sessions, place.limit, backwards=backwards, newest_first=newest_first)
        return await self._durable(listing(page, lambda session: found[session.id][1]))

    def _session_filter(
        self, request: web.Request, limits: frozenset[str] | None
    ) -> Callable[[StoredSession, Item], bool]:
        """Return whether the query selects a session, given with its latest item."""
        times = requests.times(request)
        statuses = requests.several(request, "statuses")
        archived = requests.flag(request, "include_archived")
        agent_id = requests.one(request, "agent_id")
        version = requests.one(request, "agent_version")
        # No session of this control plane has a deployment or a memory store.
        nothing = any(requests.one(request, name) for name in ("deployment_id", "memory_store_id"))

        def wanted(session: StoredSession, item: Item) -> bool:
            agent = session.agent or AGENT
            return (
                not nothing
                and (limits is None or session.environment_id in limits)
                and (archived or session.archived_at is None)
                and times.holds(to_heartbeat_text(session.created_at))
                and (agent_id is None or agent["id"] == agent_id)
                and (None in {agent_id, version} or str(agent.get("version", 1)) == version)
                and (statuses is None or self._session(session, item)["status"] in statuses)
            )

        return wanted

    async def archive(self, request: web.Request) -> web.Response:
        """Archive a session, which terminates it."""
        caller = self._admit(request)
        own = self._dialect.own_session_id(request.match_info["session_id"])
        session, _ = self._operations.session(own)
        caller.check_environment(session.environment_id)
        await requests.body(request)
        return await self._durable(self._session(*self._operations.archive_session(own)))

    def _admit(self, request: web.Request) -> Caller:
        caller = self._tokens.admit(request.headers, self._dialect)
        caller.check_item(None)
        caller.check_application()
        return caller

    def _session(self, session: StoredSession, item: Item) -> dict[str, Any]:
        return self._dialect.session(self._operations.sessions.answer(session, item))

    async def _durable(self, value: dict[str, Any]) -> web.Response:
        await self._operations.durable()
        return answer(value)
