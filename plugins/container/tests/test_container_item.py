"""Tests of a container's variables, and of sessions for which the worker lacks resources."""

from __future__ import annotations

import errno
import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from workpool import Release, Settings, WorkItem
from workpool.errors import exhausted
from workpool_container import Container
from workpool_container.container_run import ContainerRun
from workpool_container.options import container_specification, encode_item_as_json

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def make_item(**changes: Any) -> WorkItem:
    fields: dict[str, Any] = {
        "id": "work_1",
        "type": "session",
        "session_id": "sess_1",
        "environment_id": "env_1",
        "state": "starting",
        "metadata": {},
        "created_at": None,
        "acknowledged_at": None,
        "started_at": None,
        "latest_heartbeat_at": None,
        "last_heartbeat": None,
        "stop_requested_at": None,
        "stopped_at": None,
    }
    return WorkItem(**fields | changes)


@pytest.mark.parametrize(
    ("time", "text"),
    [(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05Z"), (None, None)],
)
def test_item_passed_to_container_has_creation_time_or_null(
    time: datetime | None, text: str | None
) -> None:
    item = make_item(created_at=time)
    assert json.loads(encode_item_as_json(item))["created_at"] == text


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "x"), MemoryError()], ids=repr)
async def test_container_session_is_released_if_worker_lacks_memory_or_descriptors(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def raise_memory_or_descriptor_error(_run: ContainerRun) -> None:
        raise error

    monkeypatch.setattr(ContainerRun, "run_container", raise_memory_or_descriptor_error)
    monkeypatch.setattr(Container, "_engine", None, raising=False)
    monkeypatch.setattr(Container, "_settings", Settings(), raising=False)
    session: Any = SimpleNamespace(item=SimpleNamespace(id="work_1"))
    with pytest.raises(Release) as raised:
        await Container(image="agent")._run_session(session)
    assert exhausted(raised.value)


@pytest.mark.parametrize("item_token", [True, False])
async def test_container_gets_token_of_item_only_if_item_token_setting_is_true(
    monkeypatch: pytest.MonkeyPatch, *, item_token: bool
) -> None:
    specifications: list[dict[str, Any]] = []

    async def record_container_specification(run: ContainerRun) -> dict[str, str]:
        specifications.append(
            container_specification(run._options, run._session, run._extra_variables)
        )
        return {}

    monkeypatch.setattr(ContainerRun, "run_container", record_container_specification)
    monkeypatch.setattr(Container, "_engine", None, raising=False)
    monkeypatch.setenv("ANTHROPIC_ENVIRONMENT_KEY", "key-of-the-worker")
    worker = Settings(
        token="key-of-the-worker",  # noqa: S106 - a token of the test only
        api_key="key-of-the-worker-2",
        extra_headers={"x-worker-token": "key-of-the-worker-3"},
        dialect="anthropic",
    )
    monkeypatch.setattr(Container, "_settings", worker, raising=False)
    item = make_item(sessions_token=SecretStr("token-of-the-item"))
    session: Any = SimpleNamespace(item=item, redelivered=False, traceparent=None)
    await Container(image="agent", item_token=item_token)._run_session(session)
    [specification] = specifications
    assert not any(variable.startswith("TRACEPARENT=") for variable in specification["Env"])
    assert ("WORKPOOL_TOKEN=token-of-the-item" in specification["Env"]) is item_token
    assert "key-of-the-worker" not in json.dumps(specification)


def test_container_gets_trace_context_of_session() -> None:
    session: Any = SimpleNamespace(item=make_item(), redelivered=False, traceparent=TRACEPARENT)
    options = Container(image="agent")._options
    assert f"TRACEPARENT={TRACEPARENT}" in container_specification(options, session)["Env"]
