"""The route `/scale/ENVIRONMENT_ID`, which answers autoscalers with the load of the fleet.

An answer has numbers only. See workpool/docs/operating.md, "`workpool serve`".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from workpool.inbound_connections import host_is_address_or_localhost
from workpool.scaling import (
    REPLICAS_MAX,
    SLOTS_PER_WORKER,
    FleetLoad,
    ReplicaRule,
    calculate_scaling_numbers,
)
from workpool.server.api_errors import APIError
from workpool.server.http.server_dialects import ANTHROPIC
from workpool.server.http.work_routes import json_response
from workpool.server.parsing import request_values as requests
from workpool.server.timestamps import SECOND

if TYPE_CHECKING:
    from workpool.server.engine import ControlPlaneEngine
    from workpool.server.http.tokens import AcceptedTokens
    from workpool.server.queue.work_queue import WorkQueueStats


class ScaleRoutes:
    """The endpoint for autoscalers.

    Args:
        engine: The engine.
        tokens: The accepted tokens: those for all calls, and those for this endpoint only.
        local: Whether the server listens on the loopback interface only. Then no token is needed.
    """

    def __init__(self, engine: ControlPlaneEngine, tokens: AcceptedTokens, *, local: bool) -> None:
        self._engine = engine
        self._tokens = tokens
        self._local = local

    def routes(self) -> list[web.RouteDef]:
        """Return the one route for autoscalers, as a list."""
        return [web.get("/scale/{environment_id}", self.get_scaling_numbers, allow_head=False)]

    async def get_scaling_numbers(self, request: web.Request) -> web.Response:
        """Answer with the load of an environment and the recommended number of workers."""
        environment_id = request.match_info["environment_id"]
        # A request on the loopback interface needs no token if its Host header is an IP address or
        # localhost. Through a proxy, or from a web page of another site, the header is a host name,
        # and the request needs a token.
        if not (self._local and host_is_address_or_localhost(request.host)):
            # Authenticate as in the anthropic dialect, which also accepts a token in X-Api-Key.
            caller = self._tokens.authenticate(request.headers, ANTHROPIC)
            caller.check_environment_access(environment_id)
            caller.check_item_access(None)
        await self._engine.require_self_hosted_environment(environment_id)
        rule = _parse_replica_rule(request)
        return json_response(
            calculate_scaling_numbers(
                _make_fleet_load(await self._engine.queue_stats(environment_id)), rule
            )
        )


def _make_fleet_load(stats: WorkQueueStats) -> FleetLoad:
    oldest = stats.oldest_queued_at
    age = 0.0 if oldest is None else max(0, stats.read_at - oldest) / SECOND
    return FleetLoad(stats.depth, stats.pending, stats.running, age)


def _parse_replica_rule(request: web.Request) -> ReplicaRule:
    """Parse the query parameters that limit the number of workers; a malformed one raises a 400."""
    try:
        return ReplicaRule(
            requests.read_integer_parameter(request, "slots_per_worker", SLOTS_PER_WORKER),
            requests.read_integer_parameter(request, "min_replicas", 0),
            requests.read_integer_parameter(request, "max_replicas", REPLICAS_MAX),
        )
    except ValueError as error:
        raise APIError(400, str(error)) from None
