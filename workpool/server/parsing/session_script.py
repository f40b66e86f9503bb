"""Parser of session scripts, each of which lists the tool uses that the session's agent makes.

See workpool/docs/protocol.md, "Scripted sessions".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import orjson

from workpool.server.api_errors import APIError

Script: TypeAlias = Sequence[Mapping[str, Any]]
"""Tool uses in their order: `name`, `input`, `custom` and `permission`, all of them set."""

ENTRIES_MAX: Final = 1000
SCRIPTS_BYTES_MAX: Final = 16 * 1024 * 1024
"""Largest size of all copies together: every session of one enqueue has its own."""
NAME_LENGTH: Final = 128
PERMISSIONS: Final = ("allow", "ask", "deny")


def parse_script(value: object, copies: int = 1) -> Script:
    """Parse the script of new sessions.

    Args:
        value: The script as the request has it.
        copies: The number of new sessions, each of which stores a copy of the script.

    Raises:
        APIError: 400: the script is malformed, or all copies together are too large.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _make_script_error("must be a list of tool uses")
    if len(value) > ENTRIES_MAX:
        raise _make_script_error(f"must have at most {ENTRIES_MAX} entries")
    script = tuple(
        _parse_tool_use(entry, f"entry {number}") for number, entry in enumerate(value, 1)
    )
    try:
        # orjson limits the depth of nesting, and answers contain the script two levels deeper. If
        # the depth were not checked here, the session could not be shown.
        content = orjson.dumps([[script]], default=dict)
    except orjson.JSONEncodeError:
        raise _make_script_error("cannot be written as JSON") from None
    if len(content) * copies > SCRIPTS_BYTES_MAX:
        raise _make_script_error(f"must stay below {SCRIPTS_BYTES_MAX} bytes, times count")
    # A deep copy: the caller of `enqueue` may change its own object later.
    copy: Script = orjson.loads(content)[0][0]
    return copy


def _parse_tool_use(entry: object, where: str) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise _make_script_error(f"{where} must be an object")
    name, given, custom, permission = (
        entry.get(key, default)
        for key, default in (
            ("name", ""),
            ("input", {}),
            ("custom", False),
            ("permission", "allow"),
        )
    )
    if not isinstance(name, str) or not 1 <= len(name) <= NAME_LENGTH:
        raise _make_script_error(f"{where}: name must be 1 to {NAME_LENGTH} characters")
    if not isinstance(given, Mapping):
        raise _make_script_error(f"{where}: input must be an object")
    if not isinstance(custom, bool):
        raise _make_script_error(f"{where}: custom must be a boolean")
    if permission not in PERMISSIONS:
        raise _make_script_error(f"{where}: permission must be one of {', '.join(PERMISSIONS)}")
    return {"name": name, "input": given, "custom": custom, "permission": permission}


def _make_script_error(problem: str) -> APIError:
    return APIError(400, f"script {problem}", "script")
