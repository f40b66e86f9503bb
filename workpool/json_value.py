"""`JSON`: the type of the values that a handler may return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

T_co = TypeVar("T_co", covariant=True)


class JSONArray(Protocol[T_co]):
    """A list, a tuple or another sequence of values.

    Not a `Sequence`: for type checkers, `bytes` are a sequence of numbers. They differ from lists
    in the type of `__contains__`.
    """

    def __iter__(self) -> Iterator[T_co]: ...

    def __len__(self) -> int: ...

    def __contains__(self, value: object, /) -> bool: ...

    def index(self, value: Any, /) -> int:
        """Return the position of the first element that equals the value."""


class JSONTypedDict(Protocol):
    """The type of a `TypedDict`, which type checkers do not accept as a mapping of JSON values."""

    __required_keys__: ClassVar[frozenset[str]]
    __optional_keys__: ClassVar[frozenset[str]]


JSON: TypeAlias = (
    bool | int | float | str | JSONArray["JSON"] | Mapping[str, "JSON"] | JSONTypedDict | None
)
"""A value that JSON can express. The types of the values of a `TypedDict` are not checked."""
