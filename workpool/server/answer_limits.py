"""Limits on metadata, enqueues and lists, so that no answer exceeds `ANSWER_LIMIT_BYTES`.

See workpool/docs/protocol.md, "Limits of the embedded control plane".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import orjson

from workpool.server.api_errors import APIError
from workpool.wire.protocol import ANSWER_LIMIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")

METADATA_LIMIT_BYTES: Final = ANSWER_LIMIT_BYTES - 64 * 1024
"""Largest metadata of an item, session or environment as JSON; the rest is for other fields."""

NEW_METADATA_LIMIT_BYTES: Final = METADATA_LIMIT_BYTES - 64 * 1024
"""The limit for new metadata, which is lower: workers add the attempt, a result or an error."""

METADATA_ENTRIES_MAX: Final = 4096
"""The largest number of entries: in memory, even a short entry takes a hundred bytes."""

ITEM_BYTES: Final = 1024
"""An upper bound of an item's JSON without its metadata, in bytes."""


def check_metadata_limits(metadata: Mapping[str, str], limit: int = METADATA_LIMIT_BYTES) -> None:
    """Raise a 400 for metadata with too many entries, or more than `limit` bytes as JSON."""
    if len(metadata) > METADATA_ENTRIES_MAX:
        raise APIError(400, f"metadata has more than {METADATA_ENTRIES_MAX} entries", "metadata")
    if len(orjson.dumps(metadata, default=dict)) > limit:
        raise APIError(400, f"metadata is larger than {limit} bytes as JSON", "metadata")


def check_enqueue_response_size(count: int, metadata: Mapping[str, str]) -> None:
    """Raise a 400 if the answer to an enqueue call would be too large.

    The answer contains the metadata once for each of the `count` items.
    """
    size = count * (len(orjson.dumps(metadata, default=dict)) + ITEM_BYTES)
    if size > ANSWER_LIMIT_BYTES:
        raise APIError(
            400,
            f"the answer would be larger than {ANSWER_LIMIT_BYTES} bytes: it repeats the metadata "
            "for each item; enqueue fewer items in one call",
            "count",
        )


def count_fitting_rows(rows: Sequence[T]) -> int:
    """Return how many of `rows`, which are JSON values, fit into one answer; at least 1."""
    room = ANSWER_LIMIT_BYTES - ITEM_BYTES
    for number, row in enumerate(rows):
        room -= len(orjson.dumps(row, default=dict)) + 1
        if room < 0:
            return max(number, 1)
    return len(rows)
