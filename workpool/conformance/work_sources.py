"""The sources of the suite's items: the enqueue call, sessions of an agent, or given ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from workpool.conformance.verdict import ClauseUntriedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workpool.conformance.api import Answer, WorkerApi

Script: TypeAlias = "Sequence[Mapping[str, Any]]"

MARK: Final = "workpool.conform"
"""The metadata key that marks items of the suite, so that a later run recognizes them."""


class ItemSource(Protocol):
    """The interface of a source of items."""

    async def create_item(self, api: WorkerApi, script: Script | None = None) -> str:
        """Create one item; return the id of the item or of the item's session.

        Args:
            api: The control plane.
            script: The tool uses of the agent in the item's session.

        Raises:
            ClauseUntriedError: The source cannot create items, or no items with a script.
        """


class EnqueuedItemSource:
    """A source that uses the enqueue call, which only the embedded control plane has."""

    async def create_item(self, api: WorkerApi, script: Script | None = None) -> str:
        """Create one item and return its id."""
        wanted: dict[str, Any] = {"metadata": {MARK: "1"}}
        answer = await api(
            "POST", api.work_url(), json=wanted | ({"script": script} if script else {})
        )
        rows = answer.get("data")
        if not answer.ok or not isinstance(rows, list) or not rows:
            raise ClauseUntriedError(f"no item can be created: {answer}; give --agent or --work-id")
        return str(rows[0]["id"])


class SessionSource:
    """A source that creates sessions of an agent, each with one message of a user.

    Args:
        agent: The agent's id.
    """

    def __init__(self, agent: str) -> None:
        self._agent = agent

    async def create_item(self, api: WorkerApi, script: Script | None = None) -> str:
        """Create a session, send it a message and return the session's id."""
        _require_no_script(script)
        body = {
            "agent": self._agent,
            "environment_id": api.environment,
            "metadata": {MARK: "1"},
        }
        created = await api("POST", f"{api.base_url}/sessions", json=body)
        session_id = created.get("id")
        if not created.ok or not isinstance(session_id, str):
            raise ClauseUntriedError(f"no session can be created: {created}")
        sent = await self._send_user_message(api, session_id)
        if not sent.ok:
            raise ClauseUntriedError(f"the session takes no message: {sent}")
        return session_id

    async def _send_user_message(self, api: WorkerApi, session_id: str) -> Answer:
        message: dict[str, Any] = {
            "type": "user.message",
            "content": [{"type": "text", "text": "workpool conform"}],
        }
        url = f"{api.base_url}/sessions/{session_id}/events"
        return await api("POST", url, json={"events": [message]})


class ExistingItemSource:
    """A source that returns the ids of existing items, each id once.

    Args:
        work_ids: The ids of the items, which must be queued.
    """

    def __init__(self, work_ids: Sequence[str]) -> None:
        self._left = list(work_ids)

    async def create_item(self, api: WorkerApi, script: Script | None = None) -> str:
        """Create nothing; return the id of an existing item that was not returned before."""
        del api
        _require_no_script(script)
        if not self._left:
            raise ClauseUntriedError("all given items are used")
        return self._left.pop(0)


def _require_no_script(script: Script | None) -> None:
    if script is not None:
        raise ClauseUntriedError("only the call of `workpool serve` can script a session")
