"""The calls on environments.

Each environment either is named in the arguments of a node or was created by a client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from workpool.server.answer_limits import NEW_METADATA_LIMIT_BYTES, check_metadata_limits
from workpool.server.api_errors import APIError
from workpool.server.environments import ENVIRONMENT_PREFIX, ENVIRONMENTS_MAX, Environment
from workpool.server.pagination import make_page
from workpool.server.postgres.database_calls import DatabaseCalls
from workpool.server.postgres.row_codec import (
    ENVIRONMENT_COLUMNS,
    environment_from_row,
    environment_to_row,
    has_id_format,
)
from workpool.server.stored_item import IdGenerator

if TYPE_CHECKING:
    from workpool.server.pagination import ListPage
    from workpool.server.parsing.creation_requests import NewEnvironment
    from workpool.server.parsing.request_values import ListPageRequest

_READ: Final = f"SELECT {ENVIRONMENT_COLUMNS} FROM environments WHERE id = $1"
_PAGE: Final = f"""
SELECT {ENVIRONMENT_COLUMNS} FROM environments
WHERE id > $1 AND ($2::text[] IS NULL OR id = ANY ($2)) ORDER BY id LIMIT $3
"""
_CREATE: Final = f"""
INSERT INTO environments ({ENVIRONMENT_COLUMNS}) SELECT $1, $2, $3, $4, $5
WHERE (SELECT count(*) FROM environments) < {ENVIRONMENTS_MAX}
"""


class EnvironmentCalls(DatabaseCalls):
    """The calls that create, read and list environments.

    No environment is ever deleted, so a node reads each environment of a client only once.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ids = IdGenerator()
        self._opened_at = 0
        self._created: dict[str, Environment] = {}

    async def require_self_hosted_environment(self, environment_id: str) -> None:
        """Raise a 404 for an unknown environment, and a 400 for one that is not `self_hosted`."""
        if environment_id not in self._self_hosted:
            if environment_id in self._cloud:
                raise APIError(400, "this environment is not self_hosted")
            await self._find_client_created_environment(environment_id)

    async def get_environment(self, environment_id: str) -> Environment:
        """Return an environment; raises a 404 for an unknown id."""
        if environment_id in self._self_hosted | self._cloud:
            return self._make_environment_from_configuration(environment_id)
        return await self._find_client_created_environment(environment_id)

    async def list_environments(
        self, place: ListPageRequest, allowed_ids: frozenset[str] | None
    ) -> ListPage[Environment]:
        """Return a page of environments: those in `allowed_ids`, or all if that is None."""
        given = [
            self._make_environment_from_configuration(name)
            for name in self._self_hosted | self._cloud
            if name > place.after and (allowed_ids is None or name in allowed_ids)
        ]
        wanted = None if allowed_ids is None else list(allowed_ids)
        rows = await self._pool.fetch(_PAGE, place.after, wanted, place.limit + 1)
        found = sorted([*given, *map(environment_from_row, rows)], key=lambda each: each.id)
        return make_page(found[: place.limit + 1], place.limit, backwards=False)

    async def create_environment(self, wanted: NewEnvironment) -> Environment:
        """Create a `self_hosted` environment."""
        check_metadata_limits(wanted.metadata, NEW_METADATA_LIMIT_BYTES)
        now = await self._current_time()
        environment_id = ENVIRONMENT_PREFIX + self._ids.generate_id_digits(now)
        environment = Environment(environment_id, *wanted, now)
        if await self._pool.execute(_CREATE, *environment_to_row(environment)) != "INSERT 0 1":
            raise APIError(400, f"there are {ENVIRONMENTS_MAX} environments already")
        self._created[environment_id] = environment
        return environment

    def _make_environment_from_configuration(self, environment_id: str) -> Environment:
        return Environment(environment_id, environment_id, None, {}, self._opened_at)

    async def _find_client_created_environment(self, environment_id: str) -> Environment:
        """Return an environment that a client created; raises a 404 for an unknown environment."""
        found = self._created.get(environment_id)
        if found is None:
            row = (
                await self._pool.fetchrow(_READ, environment_id)
                if has_id_format(environment_id)
                else None
            )
            if row is None:
                raise APIError(404, "no such environment")
            found = self._created[environment_id] = environment_from_row(row)
        return found
