"""The conversion of a handler's result to metadata.

A mapping of strings is written key by key. Any other value is written as one JSON text. A result
that cannot be written raises `ResultError`; it is never cut. See workpool/docs/handlers.md,
"Results".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import orjson

from workpool.errors import ResultError

if TYPE_CHECKING:
    from workpool.wire.client_dialects import MetadataLimits

RESULT: Final = "workpool.result"
"""The metadata key of a result that is not a mapping of strings."""


def make_metadata_from_result(returned: object, limits: MetadataLimits | None) -> Mapping[str, str]:
    """Return the metadata for the result of a handler; empty for None.

    A mapping is copied, because other code may change it later.

    Args:
        returned: The value that the handler returned.
        limits: The limits of the dialect; None: no limits are documented.

    Raises:
        ResultError: The result cannot be written.
        BaseException: An error of the handler's mapping when it is read.
    """
    if returned is None:
        return {}
    if isinstance(returned, Mapping):
        returned = dict(returned.items())
        if all(isinstance(text, str) for pair in returned.items() for text in pair):
            for key in returned:
                _check_text_is_encodable(key, returned[key])
            return _check_result_size(returned, limits)
    return _check_result_size({RESULT: _encode_result_as_json(returned)}, limits)


def _encode_result_as_json(value: object) -> str:
    try:
        return orjson.dumps(value, default=_to_dict_or_list).decode()
    except TypeError as error:
        # The text of orjson's error may be shown: it names a type and contains no value.
        raise ResultError(RESULT, f"cannot be written as JSON: {error}") from error


def _to_dict_or_list(value: Any) -> Any:
    """Convert a mapping to a dict, or a sequence to a list; orjson calls this for unknown types.

    Raises:
        TypeError: The value is neither.
    """
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _check_text_is_encodable(key: str, value: str) -> None:
    """Raise `ResultError` if UTF-8 cannot encode the key or the value, as with lone surrogates."""
    try:
        key.encode()
        value.encode()
    except UnicodeEncodeError as error:
        raise ResultError(key, "has a character that UTF-8 cannot encode") from error


def _check_result_size(
    result: Mapping[str, str], limits: MetadataLimits | None
) -> Mapping[str, str]:
    """Raise `ResultError` if the result exceeds one of the `limits`; else return the result.

    The limits are those of the dialect, the variant of the protocol; None: no limits.
    """
    if limits is None:
        return result
    for number, (key, value) in enumerate(result.items(), 1):
        if number > limits.pairs:
            _raise_result_over_limit(key, "is pair", number, limits.pairs)
        if len(key) > limits.key_characters:
            _raise_result_over_limit(
                key, "is a key whose length is", len(key), limits.key_characters
            )
        if len(value) > limits.value_characters:
            _raise_result_over_limit(
                key, "has a value whose length is", len(value), limits.value_characters
            )
    return result


def _raise_result_over_limit(key: str, problem: str, size: int, limit: int) -> None:
    text = f"{problem} {size}; the dialect allows {limit}"
    raise ResultError(key, text, size=size, limit=limit)
