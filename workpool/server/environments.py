"""The environments of a control plane and their JSON.

An environment is either named at the start of the control plane or created by a client.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from workpool.server.timestamps import format_time_with_whole_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

ENVIRONMENT_PREFIX: Final = "env_"
ENVIRONMENTS_MAX: Final = 1000
"""The largest number of environments of clients: each has a queue in memory."""

_SELF_HOSTED: Final[Mapping[str, Any]] = {"type": "self_hosted"}
_CLOUD: Final[Mapping[str, Any]] = {
    "type": "cloud",
    "networking": {"type": "unrestricted"},
    "packages": {name: [] for name in ("apt", "cargo", "gem", "go", "npm", "pip")},
}


@dataclass(frozen=True, slots=True)
class Environment:
    """One queue. `name` is the name that its creator gave, or the `id` if settings define it."""

    id: str
    name: str
    description: str | None
    metadata: Mapping[str, str] = field(default_factory=dict)
    created_at: int = 0

    def to_json(self, *, cloud: bool) -> dict[str, Any]:
        """Return the environment's JSON, with all fields that the vendor's SDKs require."""
        created = format_time_with_whole_seconds(self.created_at)
        return {
            "id": self.id,
            "type": "environment",
            "name": self.name,
            "description": self.description,
            "config": _CLOUD if cloud else _SELF_HOSTED,
            "metadata": self.metadata,
            "created_at": created,
            "updated_at": created,
            "archived_at": None,
        }
