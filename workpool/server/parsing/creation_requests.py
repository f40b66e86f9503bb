"""Parsers of requests to create environments and sessions; malformed ones raise a 400."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from workpool.server.api_errors import APIError
from workpool.server.parsing.client_events import parse_client_events
from workpool.server.parsing.request_values import check_string_values, parse_json_object
from workpool.server.parsing.session_script import Script, parse_script
from workpool.wire.protocol import USER_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TEXT_LENGTH: Final = 4096
"""The largest length of a name, a title or a description."""
INITIAL_EVENTS_MAX: Final = 50
METADATA_PAIRS_MAX: Final = 16
METADATA_KEY_LENGTH: Final = 64
METADATA_VALUE_LENGTH: Final = 512
_AGENT_ID_LENGTH: Final = 128
_NOT_SUPPORTED: Final = ("budget", "resources", "vault_ids")


class NewEnvironment(NamedTuple):
    """The body of a request to create an environment."""

    name: str
    description: str | None
    metadata: Mapping[str, str]


class NewSession(NamedTuple):
    """The body of a request to create a session.

    Attributes:
        agent: `id` of the agent, and `version` if the body has one.
        script: The tool uses of the agent that the control plane simulates; None: no such agent.
    """

    environment_id: str
    agent: Mapping[str, Any]
    title: str | None
    metadata: Mapping[str, str]
    initial_events: Sequence[Mapping[str, Any]]
    script: Script | None


def parse_environment(content: bytes) -> NewEnvironment:
    """Parse the body of a request to create an environment."""
    fields = parse_json_object(content)
    config = fields.get("config")
    if not isinstance(config, dict) or config.get("type") != "self_hosted":
        raise APIError(400, 'config must be {"type": "self_hosted"} here', "config")
    name = _parse_optional_text(fields, "name")
    if not name:
        raise APIError(400, "name is missing", "name")
    return NewEnvironment(
        name, _parse_optional_text(fields, "description"), _parse_metadata(fields)
    )


def parse_session(content: bytes) -> NewSession:
    """Parse the body of a request to create a session; an unsupported field raises a 400."""
    fields = parse_json_object(content)
    for name in _NOT_SUPPORTED:
        if fields.get(name):
            raise APIError(400, f"{name} is not supported by this control plane", name)
    environment_id = fields.get("environment_id")
    if not isinstance(environment_id, str):
        raise APIError(400, "environment_id must be a string", "environment_id")
    script = fields.get("script")
    return NewSession(
        environment_id=environment_id,
        agent=_parse_agent(fields.get("agent")),
        title=_parse_optional_text(fields, "title"),
        metadata=_parse_metadata(fields),
        initial_events=_parse_initial_events(fields.get("initial_events")),
        script=None if script is None else parse_script(script),
    )


def _parse_agent(given: object) -> Mapping[str, Any]:
    """Return the `id` and `version` of the field `agent`, which is an id or an object."""
    agent = {"id": given} if isinstance(given, str) else given
    if not isinstance(agent, dict):
        raise APIError(400, "agent must be an id or an object", "agent")
    agent_id, version = agent.get("id"), agent.get("version")
    if not isinstance(agent_id, str) or not 1 <= len(agent_id) <= _AGENT_ID_LENGTH:
        raise APIError(400, "agent has no id", "agent")
    if version is None:
        return {"id": agent_id}
    if not isinstance(version, int) or isinstance(version, bool):
        raise APIError(400, "the version of agent must be an integer", "agent")
    return {"id": agent_id, "version": version}


def _parse_initial_events(given: object) -> Sequence[Mapping[str, Any]]:
    if not given:
        return ()
    events = parse_client_events(given, "initial_events", INITIAL_EVENTS_MAX)
    if any(event["type"] != USER_MESSAGE for event in events):
        raise APIError(400, f"initial_events may be of type {USER_MESSAGE} only", "initial_events")
    return events


def _parse_metadata(fields: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the field `metadata`; raises a 400 beyond the vendor's limits."""
    given = fields.get("metadata")
    metadata = {} if given is None else check_string_values(given)
    if len(metadata) > METADATA_PAIRS_MAX:
        raise APIError(400, f"metadata may have {METADATA_PAIRS_MAX} keys", "metadata")
    if any(
        len(key) > METADATA_KEY_LENGTH or len(value) > METADATA_VALUE_LENGTH
        for key, value in metadata.items()
    ):
        limits = f"{METADATA_KEY_LENGTH} characters, its values {METADATA_VALUE_LENGTH}"
        raise APIError(400, f"a key of metadata may have {limits}", "metadata")
    return metadata


def _parse_optional_text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > TEXT_LENGTH):
        raise APIError(400, f"{name} must be a string of at most {TEXT_LENGTH} characters", name)
    return value
