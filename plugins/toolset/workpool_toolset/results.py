"""What a tool gives back: `Result`, and `ToolError` for what the agent is told went wrong.

Owns the shape that the control plane accepts: content blocks without lone surrogates, never empty.
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
    """Said to the agent as it stands: it holds no host path, no errno, no secret."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one call: content blocks, and whether they tell of a failure."""

    content: list[Block]
    is_error: bool = False

    @classmethod
    def of(cls, value: object, *, is_error: bool = False) -> Result:
        """What a tool returned: text, a block, a list of these, nothing, or any JSON value."""
        values = value if isinstance(value, list) and all(map(_is_block, value)) else [value]
        blocks = [_block(one) for one in values if one not in (None, "")]
        return cls(blocks or [_text(NO_OUTPUT)], is_error)

    @classmethod
    def error(cls, text: str) -> Result:
        """A failure, in words for the agent; cut after 4,000 characters."""
        cut = text if len(text) <= ERROR_CHARACTERS else text[:ERROR_CHARACTERS] + "…"
        return cls([_text(cut)], is_error=True)


def _is_block(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and value.get("type") in BLOCKS)


def _block(value: object) -> Block:
    if isinstance(value, str):
        return _text(value)
    # Through JSON and back: what cannot be sent must fail here, as this tool's error.
    plain = json.dumps(value, ensure_ascii=False, default=str)
    clean = _SURROGATE.sub("\ufffd", plain)
    if isinstance(value, dict) and _is_block(value):
        block: Block = json.loads(clean)
        return block
    return _text(clean)


def _text(text: str) -> Block:
    return {"type": "text", "text": _SURROGATE.sub("\ufffd", text)}
