"""Connections to a TLS server that has a private CA and requires a client certificate."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from workpool import Settings, WorkClient
from workpool.errors import ControlPlaneError, RefusedError, SettingsError
from workpool.wire.http.call_options import CallOptions, Priority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="the openssl command is not installed")
WORK, TOKEN = "work_1", "token"
KEY = "-newkey ec -pkeyopt ec_paramgen_curve:P-256"


def run_openssl(command: str, where: Path) -> None:
    subprocess.run(  # noqa: S603 - a command of our own
        [str(OPENSSL), *command.split()], cwd=where, check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def certificate_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a CA, certificates of server and client, and invalid files."""
    path = tmp_path_factory.mktemp("pki")
    # Since version 3.13, Python refuses certificates without these extensions.
    usage = "-addext keyUsage=critical,keyCertSign"
    run_openssl(
        f"req -x509 {KEY} {usage} -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.pem", path
    )
    issuer = "authorityKeyIdentifier=keyid\n"
    (path / "server.ext").write_text(f"{issuer}subjectAltName=IP:127.0.0.1")
    (path / "client.ext").write_text(f"{issuer}extendedKeyUsage=clientAuth")
    for name in ("server", "client"):
        run_openssl(f"req {KEY} -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr", path)
        run_openssl(
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
            f" -extfile {name}.ext -out {name}.pem",
            path,
        )
    both = (path / "client.pem").read_text() + (path / "client.key").read_text()
    (path / "both.pem").write_text(both)
    run_openssl("pkey -in client.key -aes256 -passout pass:secret -out encrypted.key", path)
    (path / "text.pem").write_text("no certificate")
    return path


@dataclass
class TLSServerWithClientCertificates:
    """A TLS server that requests a client certificate.

    Attributes:
        names: The common name of each client, by connection.
        received: The decrypted bytes.
    """

    port: int = 0
    names: list[str] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)

    async def answer_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        subject = writer.get_extra_info("peercert")["subject"]
        self.names.append(dict(pair for each in subject for pair in each)["commonName"])
        with suppress(ConnectionError):
            while piece := await reader.read(65536):
                self.received += piece
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    def client_settings(self, pki: Path, **names: str | None) -> Settings:
        files: dict[str, Any] = {
            name: None if file is None else pki / file for name, file in (FILES | names).items()
        }
        url = f"https://127.0.0.1:{self.port}"
        return Settings(base_url=url, environment_id="env_1", token=TOKEN, **files)


FILES: dict[str, str | None] = {
    "ca_file": "ca.pem",
    "client_cert_file": "client.pem",
    "client_key_file": "client.key",
}


@pytest.fixture
async def tls_server(certificate_files: Path) -> AsyncIterator[TLSServerWithClientCertificates]:
    context = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH, cafile=certificate_files / "ca.pem"
    )
    context.load_cert_chain(certificate_files / "server.pem", certificate_files / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    server = TLSServerWithClientCertificates()
    listener = await asyncio.start_server(server.answer_connection, "127.0.0.1", 0, ssl=context)
    server.port = listener.sockets[0].getsockname()[1]
    async with listener:
        yield server


@pytest.mark.parametrize("key", [{}, {"client_cert_file": "both.pem", "client_key_file": None}])
@pytest.mark.parametrize("session", [None, aiohttp.ClientSession])
async def test_every_connection_trusts_ca_file_and_presents_client_certificate(
    certificate_files: Path,
    tls_server: TLSServerWithClientCertificates,
    key: dict[str, str | None],
    session: Any,
) -> None:
    options = [CallOptions(priority=priority) for priority in Priority]
    own = session() if session else None
    async with WorkClient(
        tls_server.client_settings(certificate_files, **key), session=own
    ) as client:
        for each in (*options, CallOptions(new_connection=True)):
            await client.stop(WORK, options=each)
        # The TLS handshake succeeds, and the call then fails because the answer is no event stream.
        with pytest.raises(ControlPlaneError):
            await client.events("sess_1")._calls.open_stream(None)
        if own is not None:
            await own.close()
    assert set(tls_server.names) == {"client"}
    assert tls_server.received.count(b"HTTP/1.1\r\n") == 5


async def test_server_of_private_ca_is_not_trusted_without_ca_file(
    certificate_files: Path, tls_server: TLSServerWithClientCertificates
) -> None:
    async with WorkClient(tls_server.client_settings(certificate_files, ca_file=None)) as client:
        with pytest.raises(RefusedError, match="certificate is not trusted"):
            await client.stop(WORK)
    assert tls_server.names == []


async def test_server_that_requires_certificate_refuses_client_without_one(
    certificate_files: Path, tls_server: TLSServerWithClientCertificates
) -> None:
    without = {"client_cert_file": None, "client_key_file": None}
    async with WorkClient(tls_server.client_settings(certificate_files, **without)) as client:
        with pytest.raises(ControlPlaneError):
            await client.stop(WORK)
    assert not tls_server.received


class DelayedTunnelProxy:
    """An HTTP proxy that opens its tunnel to `port` once `release` is set."""

    def __init__(self, port: int) -> None:
        self.asked, self.release, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._port = port

    async def answer_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked.set()
        await self.release.wait()
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(
            forward_bytes_until_end(reader, far_writer), forward_bytes_until_end(far_reader, writer)
        )
        self.ended.set()


async def forward_bytes_until_end(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    with suppress(ConnectionError):
        while piece := await reader.read(65536):
            writer.write(piece)
    writer.close()


@asynccontextmanager
async def run_tunnel_proxy(port: int) -> AsyncIterator[tuple[DelayedTunnelProxy, str]]:
    tunnel = DelayedTunnelProxy(port)
    listener = await asyncio.start_server(tunnel.answer_connection, "127.0.0.1", 0)
    async with listener:
        yield tunnel, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


class RefusedByRequestCheckError(Exception):
    """The exception that a check raises so that its request is not sent."""


@pytest.mark.parametrize("held", [True, False])
async def test_check_of_request_runs_after_proxy_tunnel_and_tls_handshake(
    certificate_files: Path,
    tls_server: TLSServerWithClientCertificates,
    monkeypatch: pytest.MonkeyPatch,
    *,
    held: bool,
) -> None:
    states: list[bool] = []

    def refuse_unless_lease_is_held() -> None:
        states.append(tunnel.release.is_set())
        if not held:
            raise RefusedByRequestCheckError

    async with run_tunnel_proxy(tls_server.port) as (tunnel, url):
        monkeypatch.setenv("https_proxy", url)
        monkeypatch.setenv("no_proxy", "")
        async with (
            WorkClient(tls_server.client_settings(certificate_files)) as client,
            asyncio.TaskGroup() as group,
        ):
            stopping = client.stop(
                WORK, options=CallOptions(refuse_unless_lease_is_held), timeout=20
            )
            result = group.create_task(get_type_of_request_check_error(stopping))
            await tunnel.asked.wait()
            assert states == []
            tunnel.release.set()
            assert await result == (None if held else RefusedByRequestCheckError)
        await tunnel.ended.wait()
    assert states == [True]
    assert tls_server.names == ["client"]
    assert bool(tls_server.received) == held


async def get_type_of_request_check_error(call: Any) -> type[BaseException] | None:
    try:
        await call
    except RefusedByRequestCheckError as refusal:
        return type(refusal)
    return None


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"ca_file": "nowhere"}, "ca_file: {pki}/nowhere: No such file or directory"),
        ({"ca_file": "."}, "ca_file: {pki}: not a file"),
        ({"ca_file": "text.pem"}, "ca_file: {pki}/text.pem: holds no certificate in PEM"),
        (
            {"client_cert_file": "nowhere"},
            "client_cert_file: {pki}/nowhere: No such file or directory",
        ),
        ({"client_cert_file": None}, "client_key_file: set without client_cert_file"),
        (
            {"client_key_file": None},
            "client_cert_file: {pki}/client.pem: no certificate and key in PEM",
        ),
        (
            {"client_cert_file": "text.pem"},
            "client_cert_file, client_key_file: {pki}/text.pem, {pki}/client.key: "
            "no certificate and key in PEM",
        ),
        (
            {"client_key_file": "server.key"},
            "client_cert_file, client_key_file: {pki}/client.pem, {pki}/server.key: "
            "the key is another certificate's",
        ),
        (
            {"client_key_file": "encrypted.key"},
            "client_key_file: encrypted; there is no setting for its password",
        ),
    ],
)
async def test_invalid_tls_file_raises_settings_error_on_opening_client(
    certificate_files: Path, names: dict[str, str | None], problem: str
) -> None:
    settings = TLSServerWithClientCertificates(port=1).client_settings(certificate_files, **names)
    with pytest.raises(SettingsError) as raised:
        async with WorkClient(settings):
            pass
    assert raised.value.problems == (problem.format(pki=certificate_files),)


def test_one_error_lists_all_problems_of_connection_settings(certificate_files: Path) -> None:
    settings = Settings(
        ca_file=certificate_files / "nowhere", client_cert_file=certificate_files / "neither"
    )
    with pytest.raises(SettingsError) as raised:
        settings.require_connection()
    text = "\n".join(raised.value.problems)
    assert all(f"{name}: " in text for name in ("environment_id", "ca_file", "client_cert_file"))


def test_settings_without_tls_files_have_no_tls_context() -> None:
    assert Settings().tls_context() is None
