"""The differences between the answers in the dialects `qoder` and `anthropic`, as one table.

See workpool/docs/protocol.md, "Dialects".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from workpool.server.stored_item import SESSION_PREFIX
from workpool.server.stored_session import STATUS, TERMINATED
from workpool.server.timestamps import format_heartbeat_time, format_time_with_whole_seconds
from workpool.wire import protocol
from workpool.wire.protocol import STOPPED, STOPPING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from workpool.server.stored_item import Item


@dataclass(frozen=True, slots=True)
class ServerDialect:
    """The rules of one dialect for requests and answers.

    Attributes:
        prefix: The path before `/environments`, which distinguishes the dialects on one port.
        api_key_header: A further header in which a token may be sent; None: no further header.
        session_prefixes: The accepted prefixes of session ids; answers use the first prefix.
        session_statuses: The names of a session's states that differ in this dialect.
        stop_refused: The stops, as (force, state), that are answered with 409.
        stop_answers_item: Whether the answer to a stop is the item, or 204 without a body.
        metadata_required: Whether an update without `metadata` is refused with 400.
        compare_on_stop: Whether a heartbeat of a `stopping` item must name the last one, and a
            heartbeat of a `stopped` item is refused with 409. If false, both return the state.
        item_secrets: Whether a poll gives each item a `secret`, and tokens of items are accepted.
        messages_bring_work: Whether a message to a session with a stopped item creates an item.
        request_ids: Whether every answer has a `request-id` header.
        creation: Whether applications create environments and sessions with calls of their own.
        session_fields: The fields of a session that the vendor's workers read, beside those that
            all workers read.
        agent_fields: The fields of a session's agent that the vendor's workers read.
    """

    name: protocol.Dialect
    prefix: str
    worker_id_header: str
    api_key_header: str | None
    session_prefixes: tuple[str, ...]
    session_statuses: Mapping[str, str]
    stop_refused: frozenset[tuple[bool, str]]
    stop_answers_item: bool
    metadata_required: bool
    compare_on_stop: bool
    item_secrets: bool
    messages_bring_work: bool
    request_ids: bool
    creation: bool
    session_fields: tuple[str, ...]
    agent_fields: tuple[str, ...]

    def format_session_id(self, own: str) -> str:
        """Return the id of a session with the prefix of this dialect."""
        return self.session_prefixes[0] + own.removeprefix(SESSION_PREFIX)

    def parse_session_id(self, written: str) -> str:
        """Return the stored form of a session id; "" if the id has another dialect's prefix."""
        for prefix in self.session_prefixes:
            if written.startswith(prefix):
                return SESSION_PREFIX + written.removeprefix(prefix)
        return ""

    def session_json(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return a session's JSON with the id and the status in the form of this dialect."""
        status = self.session_statuses.get(value["status"], value["status"])
        return {**value, "id": self.format_session_id(value["id"]), "status": status}

    def parse_statuses(self, written: Collection[str]) -> frozenset[str]:
        """Convert this dialect's names of session statuses to the stored names."""
        own = {*STATUS.values(), TERMINATED}
        return frozenset(each for each in own if self.session_statuses.get(each, each) in written)

    def item_json(self, item: Item) -> dict[str, Any]:
        """Return the JSON of an item in this dialect."""
        return {
            "id": item.id,
            "type": protocol.WORK,
            "environment_id": item.environment_id,
            "data": {"type": item.type, "id": self.format_session_id(item.session_id)},
            "state": item.state,
            "created_at": format_time_with_whole_seconds(item.created_at),
            "acknowledged_at": _format_optional_time_with_whole_seconds(item.acknowledged_at),
            "started_at": _format_optional_time_with_whole_seconds(item.started_at),
            "latest_heartbeat_at": (
                None if item.heartbeat_at is None else format_heartbeat_time(item.heartbeat_at)
            ),
            "stop_requested_at": _format_optional_time_with_whole_seconds(item.stop_requested_at),
            "stopped_at": _format_optional_time_with_whole_seconds(item.stopped_at),
            "metadata": item.metadata,
        }


def _format_optional_time_with_whole_seconds(instant: int | None) -> str | None:
    return None if instant is None else format_time_with_whole_seconds(instant)


QODER: Final = ServerDialect(
    name=protocol.QODER,
    prefix="/api/v1/cloud",
    worker_id_header=protocol.WORKER_ID_HEADER,
    api_key_header=None,
    session_prefixes=(SESSION_PREFIX,),
    session_statuses={},
    stop_refused=frozenset(),
    stop_answers_item=True,
    metadata_required=False,
    compare_on_stop=True,
    item_secrets=False,
    messages_bring_work=False,
    request_ids=False,
    creation=False,
    session_fields=(),
    agent_fields=(),
)
ANTHROPIC: Final = ServerDialect(
    name=protocol.ANTHROPIC,
    prefix="/v1",
    worker_id_header=protocol.ANTHROPIC_WORKER_ID_HEADER,
    api_key_header="X-Api-Key",
    session_prefixes=("session_", "sesn_", SESSION_PREFIX),
    session_statuses={"canceling": "running"},
    stop_refused=frozenset({(False, STOPPING), (False, STOPPED), (True, STOPPED)}),
    stop_answers_item=False,
    metadata_required=True,
    compare_on_stop=False,
    item_secrets=True,
    messages_bring_work=True,
    request_ids=True,
    creation=True,
    session_fields=(
        "resources",
        "vault_ids",
        "outcome_evaluations",
        "stats",
        "usage",
        "updated_at",
    ),
    agent_fields=("skills", "tools", "mcp_servers", "model"),
)
DIALECTS: Final[Mapping[protocol.Dialect, ServerDialect]] = {
    QODER.name: QODER,
    ANTHROPIC.name: ANTHROPIC,
}
WORKER_ID_HEADERS: Final = tuple(dialect.worker_id_header for dialect in DIALECTS.values())
