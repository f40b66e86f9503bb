"""The values of settings with their sources, and a parser for each kind of value.

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
from typing import Any, Final, NamedTuple

from workpool.secret import Secret

Parser = Callable[[Any], Any]

UNLIMITED: Final = "unlimited"
"""The text for None in a variable, file or flag of a setting that has no limit by default."""


class SourcedValue(NamedTuple):
    """The value of a setting, with the place that it comes from.

    Attributes:
        value: The value.
        origin: The variable, file or flag, as errors name it; empty for a keyword argument.
    """

    value: object
    origin: str


def setting(parse: Parser, default: object, text: str, *, of_process: bool = False) -> Any:
    """Return the dataclass field of a setting.

    Args:
        parse: Reads a value that was given.
        default: The default value, or a function without arguments that returns it.
        text: The documentation, which ends with `Default: ….`
        of_process: Whether the setting is for the whole process, so that the table of an
            environment may not hold it.
    """
    metadata = {"parse": parse, "text": " ".join(text.split()), "of_process": of_process}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def append_setting_sources(problem: str, origins: Mapping[str, str]) -> str:
    """Return the text of a problem, with the sources of its settings appended.

    The names of these settings are at the beginning of the text, before a colon.
    """
    names = problem.partition(":")[0].split(", ")
    found = dict.fromkeys(origin for name in names if (origin := origins.get(name)))
    return f"{problem} (from {', '.join(found)})" if found else problem


def optional_value_parser(parse: Parser) -> Parser:
    """Return a parser that also accepts None."""
    return lambda value: None if value is None else parse(value)


def unlimited_value_parser(parse: Parser) -> Parser:
    """Return a parser that also accepts None, and the word `unlimited`, which becomes None."""

    def parse_value(value: object) -> object:
        if value is None or (isinstance(value, str) and value.strip().lower() == UNLIMITED):
            return None
        try:
            return parse(value)
        except ValueError as error:
            problem = f"{error}, or {UNLIMITED}"
        raise ValueError(problem)

    return parse_value


def whole_number_parser(least: int, most: int | None = None) -> Parser:
    """Return a parser of whole numbers from `least` to `most`."""
    limits = f", {least} or more" if most is None else f" from {least} to {most}"

    def parse_value(value: object) -> int:
        number = _parse_number(value, int)
        if number is None or number != int(number) or not least <= number <= (most or number):
            raise ValueError(f"must be a whole number{limits}")
        return int(number)

    return parse_value


def number_parser(*, zero: bool) -> Parser:
    """Return a parser of finite numbers above 0; `zero` allows 0 too."""

    def parse_value(value: object) -> float:
        number = _parse_number(value, float)
        if number is None or number < 0 or (number == 0 and not zero):
            raise ValueError("must be a number, 0 or more" if zero else "must be a number above 0")
        return float(number)

    return parse_value


def choice_parser(*words: str) -> Parser:
    """Return a parser that accepts only these words, in lower or upper case."""

    def parse_value(value: object) -> str:
        word = value.strip().lower() if isinstance(value, str) else ""
        if word not in words:
            raise ValueError(f"must be {', '.join(words[:-1])} or {words[-1]}")
        return word

    return parse_value


def matching_text_parser(pattern: str, description: str) -> Parser:
    """Return a parser for texts that match `pattern`; its error is "must be `description`"."""
    match = re.compile(pattern).fullmatch

    def parse_value(value: object) -> str:
        word = parse_stripped_text(value)
        if match(word) is None:
            raise ValueError(f"must be {description}")
        return word

    return parse_value


def checked_text_parser(check: Callable[[str], str]) -> Parser:
    """Return a parser that returns `check(text)`; `check` raises an error for a wrong text."""
    return lambda value: check(parse_stripped_text(value))


def parse_stripped_text(value: object) -> str:
    """Parse a text, and remove the spaces around it."""
    if not isinstance(value, str):
        raise ValueError("must be a text")  # noqa: TRY004 - parsers raise nothing else
    return value.strip()


def parse_secret(value: object) -> Secret:
    """Parse a credential into a `Secret`. A secret of pydantic is accepted, too."""
    reveal = getattr(value, "get_secret_value", None)
    given = reveal() if callable(reveal) else value
    if not isinstance(given, str):
        raise ValueError("must be a text")  # noqa: TRY004 - parsers raise nothing else
    return Secret(given)


def parse_path(value: object) -> Path:
    """Parse a setting that is a file path."""
    if not isinstance(value, str | os.PathLike) or "\0" in str(value):
        raise ValueError("must be the path of a file")
    return Path(value.strip() if isinstance(value, str) else value)


def parse_names(value: object) -> tuple[str, ...]:
    """Parse a list of names, or a text in which commas separate the names."""
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise ValueError("must be a list of names")
    return tuple(each.strip() for each in given if each.strip())


def parse_secrets_by_name(value: object) -> dict[str, Secret]:
    """Parse a mapping of names to credentials, each of which becomes a `Secret`."""
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for each in value):
        raise ValueError("must be texts by name")
    return {name: parse_secret(each) for name, each in value.items()}


def _parse_number(value: object, read: Callable[[Any], float]) -> float | None:
    """Parse a finite number, given as a number or a text; return None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = read(value) if isinstance(value, str) else value
        return number if math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None
