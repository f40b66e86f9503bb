"""Reads a credential from a setting, a file, or an environment variable.

Each dialect has an environment variable of its own, in which users of its service keep their token.
Each call reads the source again, so that a rotated token is found. No error text quotes the
credential.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final

from workpool.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

FILE_LIMIT_BYTES: Final = 64 * 1024
SECRET_CHARACTERS: Final = 20
"""A name of this length without a slash or a dot may be a credential in the place of a path."""
_is_token = re.compile(r"[\x21-\x7e]+").fullmatch


def read_credential(
    given: str | None, path: Path | None, variable: str, *, name: str = "token"
) -> str:
    """Return a credential from the first source that is set: a setting, a file or a variable.

    Args:
        given: The value of the setting `name`; None if it is not set.
        path: The file of the setting `NAME_file`; None if it is not set.
        variable: The environment variable that is read if neither setting is set.
        name: The name of the setting.

    Raises:
        SettingsError: There is no credential, or it cannot be read or sent in a header.
    """
    if given is not None:
        source, text = name, given
    elif path is not None:
        source = f"{name}_file: {_format_path_for_error(path)}"
        text = _read_credential_file(source, path)
    else:
        source, text = variable, os.environ.get(variable, "")
        if not text:
            names = f"WORKPOOL_TOKEN, WORKPOOL_TOKEN_FILE or {variable}"
            raise SettingsError((f"token: not set (set {names})",))
    token = text.strip()
    if not token:
        raise SettingsError((f"{source}: empty",))
    if not _is_token(token):
        raise SettingsError((f"{source}: holds characters that no token has",))
    return token


def _format_path_for_error(path: Path) -> str:
    """Return the path for an error's text, hidden if it may be a credential set by mistake."""
    name = str(path)
    looks_secret = len(name) >= SECRET_CHARACTERS and not re.search(r"[/\\.]", name)
    return "(not shown, as it may be the credential)" if looks_secret else name


def _read_credential_file(source: str, path: Path) -> str:
    problem = "not a file"
    try:
        # Opening a named pipe would block until another process writes, so the type is checked
        # first.
        if stat.S_ISREG(path.stat().st_mode):
            with path.open("rb") as file:
                return file.read(FILE_LIMIT_BYTES).decode("ascii", "replace")
    except OSError as error:
        problem = error.strerror or "cannot be read"
    raise SettingsError((f"{source}: {problem}",))
