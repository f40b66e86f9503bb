"""HTTP routes that only applications call: manage environments; create, list and archive sessions.

An application that uses the vendor's SDK begins with these calls. A new session creates a work item
for the workers of its environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

from workpool.server.api_errors import APIError
from workpool.server.http.work_routes import json_response
from workpool.server.pagination import page_json
from workpool.server.parsing import creation_requests
from workpool.server.parsing import request_values as requests
from workpool.server.stored_item import SESSION_PREFIX
from workpool.server.stored_session import SessionFilter, SessionView
from workpool.wire.protocol import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Collection

    from workpool.server.engine import ControlPlaneEngine
    from workpool.server.environments import Environment
    from workpool.server.http.server_dialects import ServerDialect
    from workpool.server.http.tokens import AcceptedTokens, Caller


class ApplicationRoutes:
    """The HTTP endpoints, in one dialect of the protocol, that only applications call.

    With these endpoints, applications manage environments and sessions.
    """

    def __init__(
        self,
        engine: ControlPlaneEngine,
        tokens: AcceptedTokens,
        dialect: ServerDialect,
        cloud: Collection[str],
    ) -> None:
        """Create the routes; `cloud` has the ids of environments that are not `self_hosted`."""
        self._engine = engine
        self._tokens = tokens
        self._dialect = dialect
        self._cloud = frozenset(cloud)

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this class; each path begins with the dialect's prefix."""
        environments = self._dialect.prefix + "/environments"
        sessions = self._dialect.prefix + "/sessions"
        return [
            web.post(environments, self.create_environment),
            web.get(environments, self.list_environments, allow_head=False),
            web.get(environments + "/{environment_id}", self.get_environment, allow_head=False),
            web.post(sessions, self.create_session),
            web.get(sessions, self.list_sessions, allow_head=False),
            web.post(sessions + "/{session_id}/archive", self.archive_session),
        ]

    async def create_environment(self, request: web.Request) -> web.Response:
        """Create a `self_hosted` environment."""
        if self._authenticate_application(request).environments is not None:
            raise APIError(403, "this token is limited to environments that exist")
        wanted = creation_requests.parse_environment(await requests.read_body(request))
        environment = await self._engine.create_environment(wanted)
        return json_response(environment.to_json(cloud=False))

    async def get_environment(self, request: web.Request) -> web.Response:
        """Answer with one environment."""
        environment_id = request.match_info["environment_id"]
        self._authenticate_application(request).check_environment_access(environment_id)
        await requests.read_body(request)
        return json_response(
            self._make_environment_json(await self._engine.get_environment(environment_id))
        )

    async def list_environments(self, request: web.Request) -> web.Response:
        """Answer with a page of the environments that the token may use, by ascending id."""
        allowed_ids = self._authenticate_application(request).environments
        await requests.read_body(request)
        place = requests.parse_page_request(request, "", ID_PATTERN)
        if place.before is not None:
            raise APIError(400, "before_id is not known here", "before_id")
        page = await self._engine.list_environments(place, allowed_ids)
        return json_response(page_json(page, self._make_environment_json))

    def _make_environment_json(self, environment: Environment) -> dict[str, Any]:
        return environment.to_json(cloud=environment.id in self._cloud)

    async def create_session(self, request: web.Request) -> web.Response:
        """Create a session, and queue its first work item."""
        caller = self._authenticate_application(request)
        wanted = creation_requests.parse_session(await requests.read_body(request))
        caller.check_environment_access(wanted.environment_id)
        return json_response(self._session_json(await self._engine.create_session(wanted)))

    async def list_sessions(self, request: web.Request) -> web.Response:
        """Answer with a page of the sessions that the query selects, by default newest first."""
        allowed_ids = self._authenticate_application(request).environments
        await requests.read_body(request)
        place = requests.parse_page_request(request, SESSION_PREFIX)
        newest_first = requests.parse_newest_first(request, default=True)
        if newest_first and place.after:
            raise APIError(400, "after_id goes with order=asc only", "after_id")
        wanted = self._parse_session_filter(request, allowed_ids, newest_first=newest_first)
        page = await self._engine.list_sessions(place, wanted)
        return json_response(page_json(page, self._session_json))

    def _parse_session_filter(
        self, request: web.Request, allowed_ids: frozenset[str] | None, *, newest_first: bool
    ) -> SessionFilter:
        """Parse the query parameters that select and order a list of sessions."""
        times = requests.parse_time_range(request)
        statuses = requests.read_repeated_parameter(request, "statuses")
        archived = requests.read_boolean_parameter(request, "include_archived")
        agent_id = requests.read_single_parameter(request, "agent_id")
        version = requests.read_single_parameter(request, "agent_version")
        if any(
            requests.read_single_parameter(request, name)
            for name in ("deployment_id", "memory_store_id")
        ):
            # No session of this control plane has a deployment or a memory store. So return no
            # sessions: an empty set of statuses matches none.
            statuses = frozenset()
        return SessionFilter(
            environments=allowed_ids,
            archived=archived,
            times=times,
            agent_id=agent_id,
            agent_version=version,
            statuses=None if statuses is None else self._dialect.parse_statuses(statuses),
            newest_first=newest_first,
        )

    async def archive_session(self, request: web.Request) -> web.Response:
        """Archive a session, which terminates it."""
        caller = self._authenticate_application(request)
        own = self._dialect.parse_session_id(request.match_info["session_id"])
        view = await self._engine.get_session(own)
        caller.check_environment_access(view.session.environment_id)
        await requests.read_body(request)
        return json_response(self._session_json(await self._engine.archive_session(own)))

    def _authenticate_application(self, request: web.Request) -> Caller:
        caller = self._tokens.authenticate(request.headers, self._dialect)
        caller.check_item_access(None)
        caller.check_not_worker_key()
        return caller

    def _session_json(self, view: SessionView) -> dict[str, Any]:
        return self._dialect.session_json(view.to_json())
