"""The format of help texts. This module imports nothing slow."""

from typing import Any, Final

# Disable Rich: its import takes as long as the import of aiohttp, and its tracebacks show local
# variables, which may contain tokens.
PLAIN: Final[dict[str, Any]] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}
"""The keyword arguments of each `typer.Typer`."""


def format_examples_section(*lines: str) -> str:
    """Return the last section of a help text, which lists examples of commands."""
    return "\b\n" + "\n".join(("Examples:", *(f"  {line}" for line in lines)))
