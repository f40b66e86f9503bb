"""The TLS context from the settings for a CA file and a client certificate."""

from __future__ import annotations

import ssl
import stat
from typing import TYPE_CHECKING, NoReturn

from workpool.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path


def tls_context(
    ca_file: Path | None, client_cert_file: Path | None, client_key_file: Path | None
) -> ssl.SSLContext | None:
    """Build the TLS context for the control plane; None = use aiohttp's default.

    Args:
        ca_file: Certificates, in PEM, that are trusted instead of the system's.
        client_cert_file: The worker's certificate, in PEM, with its chain.
        client_key_file: The key of that certificate, in PEM; None = the certificate's file has it.

    Raises:
        SettingsError: A file cannot be read or used. Names all such files and quotes no content.
    """
    files = {
        "ca_file": ca_file,
        "client_cert_file": client_cert_file,
        "client_key_file": client_key_file,
    }
    problems = [
        _describe_unreadable_file(name, path) for name, path in files.items() if path is not None
    ]
    if client_key_file is not None and client_cert_file is None:
        problems.append("client_key_file: set without client_cert_file")
    if found := tuple(problem for problem in problems if problem):
        raise SettingsError(found)
    if ca_file is None and client_cert_file is None:
        return None
    context = _new_context_with_ca(ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if client_cert_file is not None:
        _load_client_certificate(context, client_cert_file, client_key_file)
    return context


def _describe_unreadable_file(name: str, path: Path) -> str:
    try:
        # Opening a named pipe would block until another process writes, so the type is checked
        # first.
        if not stat.S_ISREG(path.stat().st_mode):
            return f"{name}: {path}: not a file"
        with path.open("rb"):
            return ""
    except OSError as error:
        return f"{name}: {path}: {error.strerror or 'cannot be read'}"


def _new_context_with_ca(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        problem = f"ca_file: {ca_file}: holds no certificate in PEM"
    raise SettingsError((problem,))


def _load_client_certificate(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    problem = ""
    try:
        context.load_cert_chain(cert, key, password=_refuse_encrypted_key)
    except ssl.SSLError as error:
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        problem = (
            "the key is another certificate's" if mismatch else "no certificate and key in PEM"
        )
    if problem:
        files = {"client_cert_file": cert} | ({} if key is None else {"client_key_file": key})
        raise SettingsError(
            (f"{', '.join(files)}: {', '.join(map(str, files.values()))}: {problem}",)
        )


def _refuse_encrypted_key() -> NoReturn:
    # OpenSSL calls this function for the password of the key. Without it, OpenSSL would ask for the
    # password on the terminal and block the process.
    raise SettingsError(("client_key_file: encrypted; there is no setting for its password",))
