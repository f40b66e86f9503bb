"""The values of settings: how each kind is read, and which values are refused.

A parser takes the value of a keyword, a variable or a file, and returns the value of the setting.
It raises ValueError with the end of a sentence that never quotes the given value: a wrong value may
be a secret in the wrong place. See workpool/docs/decisions.md, "Settings without pydantic".
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from workpool.secret import Secret

Parser = Callable[[Any], Any]

UNLIMITED: Final = "unlimited"
"""The text for None in a variable, file or flag of a setting that has no limit by default."""


def setting(parse: Parser, default: object, text: str) -> Any:
    """Return the dataclass field of a setting.

    Args:
        parse: Reads a value that was given.
        default: The default value, or a function without arguments that returns it.
        text: The documentation, which ends with `Default: ….`
    """
    metadata = {"parse": parse, "text": " ".join(text.split())}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def optional(parse: Parser) -> Parser:
    """Return a parser that also accepts None."""
    return lambda value: None if value is None else parse(value)


def unlimited(parse: Parser) -> Parser:
    """Return a parser that also accepts None, and `unlimited` as None."""

    def read(value: object) -> object:
        if value is None or (isinstance(value, str) and value.strip().lower() == UNLIMITED):
            return None
        try:
            return parse(value)
        except ValueError as error:
            problem = f"{error}, or {UNLIMITED}"
        raise ValueError(problem)

    return read


def whole(least: int, most: int | None = None) -> Parser:
    """Return a parser of whole numbers from `least` to `most`."""
    limits = f", {least} or more" if most is None else f" from {least} to {most}"

    def read(value: object) -> int:
        number = _parse_number(value, int)
        if number is None or number != int(number) or not least <= number <= (most or number):
            raise ValueError(f"must be a whole number{limits}")
        return int(number)

    return read


def decimal(*, zero: bool) -> Parser:
    """Return a parser of finite numbers above 0, or with `zero` from 0 on."""

    def read(value: object) -> float:
        number = _parse_number(value, float)
        if number is None or number < 0 or (number == 0 and not zero):
            raise ValueError("must be a number, 0 or more" if zero else "must be a number above 0")
        return float(number)

    return read


def choice(*words: str) -> Parser:
    """Return a parser of one of these words, in lower or upper case."""

    def read(value: object) -> str:
        word = value.strip().lower() if isinstance(value, str) else ""
        if word not in words:
            raise ValueError(f"must be {', '.join(words[:-1])} or {words[-1]}")
        return word

    return read


def matching(pattern: str, description: str) -> Parser:
    """Return a parser of texts that match `pattern`, which `description` puts into words."""
    match = re.compile(pattern).fullmatch

    def read(value: object) -> str:
        word = text(value)
        if match(word) is None:
            raise ValueError(f"must be {description}")
        return word

    return read


def checked(check: Callable[[str], str]) -> Parser:
    """Return a parser of texts that `check` accepts; it returns the value."""
    return lambda value: check(text(value))


def text(value: object) -> str:
    """Read a text without the spaces around it."""
    if not isinstance(value, str):
        raise ValueError("must be a text")  # noqa: TRY004 - parsers raise nothing else
    return value.strip()


def secret(value: object) -> Secret:
    """Read a text that is never shown. A secret of pydantic is accepted, too."""
    reveal = getattr(value, "get_secret_value", None)
    given = reveal() if callable(reveal) else value
    if not isinstance(given, str):
        raise ValueError("must be a text")  # noqa: TRY004 - parsers raise nothing else
    return Secret(given)


def path(value: object) -> Path:
    """Read the path of a file."""
    if not isinstance(value, str | os.PathLike) or "\0" in str(value):
        raise ValueError("must be the path of a file")
    return Path(value.strip() if isinstance(value, str) else value)


def names(value: object) -> tuple[str, ...]:
    """Read names: a list, or one text in which commas separate them."""
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise ValueError("must be a list of names")
    return tuple(each.strip() for each in given if each.strip())


def secrets_by_name(value: object) -> dict[str, Secret]:
    """Read a mapping of names to texts that are never shown."""
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for each in value):
        raise ValueError("must be texts by name")
    return {name: secret(each) for name, each in value.items()}


def _parse_number(value: object, read: Callable[[Any], float]) -> float | None:
    """Return the finite number of a number or a text; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = read(value) if isinstance(value, str) else value
        return number if math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None
