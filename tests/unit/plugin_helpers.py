"""Helpers that make items and load plugins, for tests of plugins and hooks."""

from __future__ import annotations

from typing import Any

from workpool.plugins import Plugins
from workpool.wire.items import WorkItem, parse_item


def make_work_item(type_: str = "session", **metadata: str) -> WorkItem:
    return parse_item(
        {
            "id": "work_1",
            "type": "work",
            "environment_id": "env_1",
            "data": {"type": type_, "id": "sess_1"},
            "state": "queued",
            "created_at": "2026-01-01T00:00:00Z",
            "metadata": metadata,
        }
    )


def load_plugins(
    *objects: object, names: tuple[str, ...] = (), **options: dict[str, Any]
) -> Plugins:
    return Plugins.load(objects, names, options)


def get_chosen_handler_name(plugins: Plugins, item: WorkItem) -> str | None:
    answer = plugins.find_handler_for_item(item)
    return answer.name if answer else None
