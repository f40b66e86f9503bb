"""The result of a tool: `Result`, and `ToolError` for an error that the agent sees.

Owns the format that the control plane accepts: content blocks without lone surrogates, never empty.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

Block: TypeAlias = dict[str, Any]

NO_OUTPUT: Final = "(no output)"
ERROR_CHARACTERS: Final = 4_000
BLOCKS: Final = frozenset({"text", "image", "document", "search_result"})

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class ToolError(Exception):
    """An error whose text the agent sees: without host paths, errno and secrets."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one call: content blocks, and whether the call failed."""

    content: list[Block]
    is_error: bool = False

    @classmethod
    def of(cls, value: object, *, is_error: bool = False) -> Result:
        """Return the result for text, a block, a list of these, None, or a JSON value."""
        values = value if isinstance(value, list) and all(map(_is_block, value)) else [value]
        blocks = [_as_block(one) for one in values if one not in (None, "")]
        return cls(blocks or [_as_text(NO_OUTPUT)], is_error)

    @classmethod
    def error(cls, text: str) -> Result:
        """Return a failure with a text for the agent, at most 4,000 characters."""
        cut = text if len(text) <= ERROR_CHARACTERS else text[:ERROR_CHARACTERS] + "…"
        return cls([_as_text(cut)], is_error=True)


def _is_block(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and value.get("type") in BLOCKS)


def _as_block(value: object) -> Block:
    if isinstance(value, str):
        return _as_text(value)
    # Through JSON and back: content that cannot be sent must fail here, as an error of this tool.
    plain = json.dumps(value, ensure_ascii=False, default=str)
    clean = _SURROGATE.sub("\ufffd", plain)
    if isinstance(value, dict) and _is_block(value):
        block: Block = json.loads(clean)
        return block
    return _as_text(clean)


def _as_text(text: str) -> Block:
    return {"type": "text", "text": _SURROGATE.sub("\ufffd", text)}
