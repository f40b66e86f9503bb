"""The result of a tool call, in the format that the control plane accepts.

A result has at least one content block, and no lone surrogates.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

Block: TypeAlias = dict[str, Any]

NO_OUTPUT: Final = "(no output)"
MAX_ERROR_CHARACTERS: Final = 4_000
BLOCK_TYPES: Final = frozenset({"text", "image", "document", "search_result"})

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class ToolError(Exception):
    """An error whose text is sent to the agent, so it contains no secrets and no host paths."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of one call: content blocks, and whether the call failed."""

    content: list[Block]
    is_error: bool = False

    @classmethod
    def from_value(cls, value: object, *, is_error: bool = False) -> ToolResult:
        """Convert the return value of a tool to a result with content blocks.

        The value is a text, a block, a list of texts and blocks, None, or another JSON value.
        """
        values = (
            value if isinstance(value, list) and all(map(_is_content_block, value)) else [value]
        )
        blocks = [_to_content_block(one) for one in values if one not in (None, "")]
        return cls(blocks or [_to_text_block(NO_OUTPUT)], is_error)

    @classmethod
    def from_error(cls, text: str) -> ToolResult:
        """Return the result of a failed call, with at most 4,000 characters of the text."""
        cut = text if len(text) <= MAX_ERROR_CHARACTERS else text[:MAX_ERROR_CHARACTERS] + "…"
        return cls([_to_text_block(cut)], is_error=True)


def _is_content_block(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and value.get("type") in BLOCK_TYPES)


def _to_content_block(value: object) -> Block:
    if isinstance(value, str):
        return _to_text_block(value)
    # Convert to JSON here. Content that JSON cannot represent is then an error of the tool, and not
    # of sending the result.
    plain = json.dumps(value, ensure_ascii=False, default=str)
    clean = _SURROGATE.sub("\ufffd", plain)
    if isinstance(value, dict) and _is_content_block(value):
        block: Block = json.loads(clean)
        return block
    return _to_text_block(clean)


def _to_text_block(text: str) -> Block:
    return {"type": "text", "text": _SURROGATE.sub("\ufffd", text)}
