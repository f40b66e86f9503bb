"""The error line and the exit status of commands with wrong settings or arguments.

The first line of the error names the setting, where its value came from, and the file or path.
See workpool/docs/cli.md, "Exit statuses".
"""

from __future__ import annotations

import asyncio
import re
import shlex
import signal
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.conftest import CLOUD, FORBIDDEN, LIMITED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.acceptance.conftest import CommandRunner, CommandStarter
    from workpool.server import ControlPlane

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

HANDLER = "from workpool import Session, handler\n\n\n"
FILES = {
    "good.toml": "[workpool]\n",
    "broken.toml": "[workpool]\nconcurrency = many\n",
    "empty.toml": "",
    "typo.toml": "[workpool]\nconcurency = 8\n",
    "value.toml": "[workpool]\nlease_ttl = 5\n",
    "table.toml": "[workpool.plugins.echo]\ngreeting = 'hi'\n",
    "plugin.toml": "[workpool.plugin.ecko]\ngreeting = 'hi'\n",
    "option.toml": "[workpool.plugin.Named]\ngreting = 'hi'\n",
    "empty.token": "\n",
    "text.pem": "no certificate\n",
    "missing_import.py": "import nothing_of_that_name\n",
    "broken.py": "def broken(:\n",
    "failing.py": "def connect():\n    raise ConnectionError('no database')\n\n\nconnect()\n",
    "nothing.py": "x = 1\n",
    "two.py": HANDLER
    + "@handler\nasync def work(session: Session, more: int) -> None:\n    pass\n",
    "same.py": HANDLER
    + "@handler\nasync def one(session: Session) -> None:\n    pass\n\n\n"
    + "@handler\nasync def two(session: Session) -> None:\n    pass\n",
    "hook.py": "from workpool import hookimpl\n\n@hookimpl\ndef workpool_evnt(event):\n    pass\n",
    "unmarked.py": "def workpool_event(event):\n    pass\n",
    "named.py": HANDLER
    + "class Named:\n    def __init__(self, greeting: str) -> None:\n        pass\n\n"
    + "    @handler\n    async def work(self, session: Session) -> None:\n        pass\n",
}
"""The files in the current directory of each command."""


@dataclass(frozen=True)
class FailingCommandCase:
    """A command that fails at its start because of a user's mistake, and the expected error.

    Attributes:
        name: What is wrong.
        command: The words after `workpool`.
        line: The problem, without `workpool: ` or the time of a log line; `…` is any text.
        variables: Environment variables besides those of a good start.
        status: The exit status.
        trace: Whether a traceback of the user's own code follows.
    """

    name: str
    command: str
    line: str
    variables: Mapping[str, str] = field(default_factory=dict)
    status: int = 2
    trace: bool = False

    def is_expected_error_line_in(self, text: str) -> bool:
        pattern = ".*".join(map(re.escape, self.line.split("…")))
        return (
            re.search(rf"^(workpool: |Error: |.* ended: ){pattern}", text, re.MULTILINE) is not None
        )


# These commands fail before they create a pool, so they can run in pytest's process.
SETTINGS = [
    FailingCommandCase(
        "no environment",
        "run handlers",
        "environment_id: not set (set WORKPOOL_ENVIRONMENT_ID)",
        {"WORKPOOL_ENVIRONMENT_ID": ""},
    ),
    FailingCommandCase(
        "no token",
        "run handlers",
        "token: not set (set WORKPOOL_TOKEN, WORKPOOL_TOKEN_FILE or QODER_PAT)",
        {"WORKPOOL_TOKEN": ""},
    ),
    FailingCommandCase(
        "no key",
        "run handlers --dialect anthropic",
        "token: not set (set WORKPOOL_TOKEN, WORKPOOL_TOKEN_FILE or ANTHROPIC_ENVIRONMENT_KEY)",
        {"WORKPOOL_TOKEN": ""},
    ),
    FailingCommandCase(
        "empty address",
        "run handlers",
        "base_url: empty; give an address, or remove it (from WORKPOOL_BASE_URL)",
        {"WORKPOOL_BASE_URL": ""},
    ),
    FailingCommandCase(
        "empty address flag",
        "run handlers --base-url ''",
        "base_url: empty; give an address, or remove it (from --base-url)",
    ),
    FailingCommandCase(
        "address without scheme",
        "run handlers",
        "base_url: not an http:// or https:// URL (from WORKPOOL_BASE_URL)",
        {"WORKPOOL_BASE_URL": "localhost:8484"},
    ),
    FailingCommandCase(
        "address with a user",
        "run handlers --base-url http://me@h/api",
        "base_url: must have no user, password, query or fragment (from --base-url)",
    ),
    FailingCommandCase(
        "address with a query",
        "run handlers --base-url http://h/api?x=1",
        "base_url: must have no user, password, query or fragment (from --base-url)",
    ),
    FailingCommandCase(
        "environment with a space",
        "run handlers --environment-id 'env 1'",
        "environment_id: must be 1 to 128 letters, digits, _ or - (from --environment-id)",
    ),
    FailingCommandCase(
        "number as a word",
        "run handlers",
        "concurrency: must be a whole number, 1 or more (from WORKPOOL_CONCURRENCY)",
        {"WORKPOOL_CONCURRENCY": "many"},
    ),
    FailingCommandCase(
        "number too small",
        "run handlers --concurrency 0",
        "concurrency: must be a whole number, 1 or more (from --concurrency)",
    ),
    FailingCommandCase(
        "number with a fraction",
        "run handlers --pollers 1.5",
        "pollers: must be a whole number, 1 or more (from --pollers)",
    ),
    FailingCommandCase(
        "number too large",
        "run handlers --block-ms 2000",
        "block_ms: must be a whole number from 1 to 999 (from --block-ms)",
    ),
    FailingCommandCase(
        "lease too short",
        "run handlers --lease-ttl 5",
        "lease_ttl: must be a whole number from 10 to 600 (from --lease-ttl)",
    ),
    FailingCommandCase(
        "negative time",
        "run handlers --stop-grace -1",
        "stop_grace: must be a number, 0 or more (from --stop-grace)",
    ),
    FailingCommandCase(
        "time as a word",
        "run handlers --drain-timeout forever",
        "drain_timeout: must be a number, 0 or more, or unlimited (from --drain-timeout)",
    ),
    FailingCommandCase(
        "limit of no sessions",
        "run handlers --exit-after-sessions 0",
        "exit_after_sessions: must be a whole number, 1 or more (from --exit-after-sessions)",
    ),
    FailingCommandCase(
        "unknown dialect",
        "run handlers",
        "dialect: must be qoder or anthropic (from WORKPOOL_DIALECT)",
        {"WORKPOOL_DIALECT": "openai"},
    ),
    FailingCommandCase(
        "unknown level",
        "run handlers --log-level loud",
        "log_level: must be debug, info, warning, error or critical (from --log-level)",
    ),
    FailingCommandCase(
        "unknown format",
        "run handlers",
        "log_format: must be text or json (from WORKPOOL_LOG_FORMAT)",
        {"WORKPOOL_LOG_FORMAT": "xml"},
    ),
    FailingCommandCase(
        "port alone",
        "run handlers --metrics-listen 9464",
        "metrics_listen: not HOST:PORT, [IPV6]:PORT, :PORT or off (from --metrics-listen)",
    ),
    FailingCommandCase(
        "two tokens",
        "run handlers",
        "token, token_file: set one of the two (from WORKPOOL_TOKEN, WORKPOOL_TOKEN_FILE)",
        {"WORKPOOL_TOKEN_FILE": "empty.token"},
    ),
    FailingCommandCase(
        "no token file",
        "run handlers --token-file nowhere.token",
        "token_file: nowhere.token: No such file or directory (from --token-file)",
        {"WORKPOOL_TOKEN": ""},
    ),
    FailingCommandCase(
        "folder as token file",
        "run handlers",
        "token_file: .: not a file (from WORKPOOL_TOKEN_FILE)",
        {"WORKPOOL_TOKEN": "", "WORKPOOL_TOKEN_FILE": "."},
    ),
    FailingCommandCase(
        "empty token file",
        "run handlers --token-file empty.token",
        "token_file: empty.token: empty (from --token-file)",
        {"WORKPOOL_TOKEN": ""},
    ),
    FailingCommandCase(
        "token with a space",
        "run handlers",
        "token: holds characters that no token has (from WORKPOOL_TOKEN)",
        {"WORKPOOL_TOKEN": "Bearer x"},
    ),
    FailingCommandCase(
        "no CA file",
        "run handlers",
        "ca_file: nowhere.pem: No such file or directory (from WORKPOOL_CA_FILE)",
        {"WORKPOOL_CA_FILE": "nowhere.pem"},
    ),
    FailingCommandCase(
        "CA file of text",
        "run handlers --ca-file text.pem",
        "ca_file: text.pem: holds no certificate in PEM (from --ca-file)",
    ),
    FailingCommandCase(
        "key without certificate",
        "run handlers --client-key-file text.pem",
        "client_key_file: set without client_cert_file (from --client-key-file)",
    ),
    FailingCommandCase(
        "certificate of text",
        "run handlers --client-cert-file text.pem",
        "client_cert_file: text.pem: no certificate and key in PEM (from --client-cert-file)",
    ),
    FailingCommandCase(
        "headers that are no JSON",
        "run handlers",
        'extra_headers: not a JSON object, as in {"x-worker-token": "..."} (from '
        "WORKPOOL_EXTRA_HEADERS)",
        {"WORKPOOL_EXTRA_HEADERS": "x-a: b"},
    ),
    FailingCommandCase(
        "header of the client",
        "run handlers",
        "extra_headers: authorization: cannot be set (from WORKPOOL_EXTRA_HEADERS)",
        {"WORKPOOL_EXTRA_HEADERS": '{"Authorization": "x"}'},
    ),
    FailingCommandCase(
        "no configuration",
        "run handlers --config nowhere.toml",
        "config: nowhere.toml: No such file or directory (from --config)",
    ),
    FailingCommandCase(
        "no configuration of a variable",
        "run handlers",
        "config: nowhere.toml: No such file or directory (from WORKPOOL_CONFIG)",
        {"WORKPOOL_CONFIG": "nowhere.toml"},
    ),
    FailingCommandCase(
        "configuration that is no TOML",
        "run handlers --config broken.toml",
        "config: broken.toml: not TOML (at line 2, column 15) (from --config)",
    ),
    FailingCommandCase(
        "configuration without its table",
        "run handlers --config empty.toml",
        "config: empty.toml: has no table [workpool] (from --config)",
    ),
    FailingCommandCase(
        "mistyped setting",
        "run handlers --config typo.toml",
        "concurency: no such setting, did you mean concurrency? (from typo.toml)",
    ),
    FailingCommandCase(
        "wrong value in a file",
        "run handlers --config value.toml",
        "lease_ttl: must be a whole number from 10 to 600 (from value.toml)",
    ),
    FailingCommandCase(
        "mistyped table of plugins",
        "run handlers --config table.toml",
        "config: table.toml: the tables of plugins are [workpool.plugin.NAME], without "
        "an s (from --config)",
    ),
    FailingCommandCase(
        "mistyped flag", "run handlers --concurency 8", "No such option: --concurency …"
    ),
    FailingCommandCase("flag of the token", "run handlers --token x", "No such option: --token…"),
    FailingCommandCase(
        "flag without its value",
        "run handlers --concurrency",
        "Option '--concurrency' requires an argument.",
    ),
    FailingCommandCase("mistyped command", "rnu handlers", "No such command 'rnu'."),
    FailingCommandCase(
        "program of hold",
        "hold --work-id w --last-heartbeat t -- no-such-program",
        "Invalid value for COMMAND: no-such-program: no such program",
    ),
    FailingCommandCase(
        "hold without its item",
        "hold true",
        "Missing option '--work-id' (env var: 'WORKPOOL_HOLD_WORK_ID').",
    ),
    FailingCommandCase(
        "name of a project",
        "new 'My Plugin'",
        "Invalid value: 'My Plugin' cannot be a plugin's name: at most 64 small letters "
        "and digits, with single dashes between them, and a letter first",
    ),
    FailingCommandCase(
        "wrong metadata", "work enqueue --metadata job", "Invalid value: 'job' is not KEY=VALUE"
    ),
]

PROCESSES = [
    FailingCommandCase(
        "public address without a token",
        "serve --host 0.0.0.0",
        "0.0.0.0 is not a loopback address: set WORKPOOL_SERVE_TOKEN or give --token-file",
    ),
    FailingCommandCase(
        "no token file of serve",
        "serve --token-file nowhere.token",
        "token file: nowhere.token: No such file or directory (from --token-file)",
    ),
    FailingCommandCase(
        "no faults file",
        "serve --faults nowhere.toml",
        "faults file: nowhere.toml: No such file or directory",
    ),
    FailingCommandCase(
        "no plugin",
        "run",
        "plugin '(none)': no plugin handles anything; name one in `plugins` or pass a handler",
    ),
    FailingCommandCase(
        "no such module",
        "run report",
        "plugin 'report': no module named 'report'; installed plugins: …",
    ),
    FailingCommandCase(
        "mistyped plugin", "run ecko", "plugin 'ecko': no module named 'ecko'; did you mean 'echo'?"
    ),
    FailingCommandCase(
        "name that is no module",
        "run my-plugin",
        "plugin 'my-plugin': is not installed, nor a module or module:Name; installed plugins: …",
    ),
    FailingCommandCase(
        "plugin without its dependency",
        "run missing_import",
        "plugin 'missing_import': importing missing_import raised ModuleNotFoundError: "
        "No module named 'nothing_of_that_name'",
        trace=True,
    ),
    FailingCommandCase(
        "plugin with a wrong syntax",
        "run broken",
        "plugin 'broken': importing broken raised SyntaxError: …",
        trace=True,
    ),
    FailingCommandCase(
        "plugin that fails",
        "run failing",
        "plugin 'failing': importing failing raised ConnectionError: no database",
        trace=True,
    ),
    FailingCommandCase(
        "mistyped handler",
        "run handlers:finsh",
        "plugin 'handlers:finsh': module handlers has no 'finsh'; did you mean 'finish'?",
    ),
    FailingCommandCase(
        "module without handlers",
        "run nothing",
        "plugin 'nothing': has no hook marked @hookimpl and no function with @handler",
    ),
    FailingCommandCase(
        "handler with two parameters",
        "run two",
        "plugin 'two': work must be callable with one argument, the session: missing a "
        "required argument: 'more'",
    ),
    FailingCommandCase(
        "two handlers of one rule",
        "run same",
        "plugin 'same': same.two and same.one have the same rule (type=session); one of "
        "them would never run",
    ),
    FailingCommandCase(
        "mistyped hook",
        "run hook",
        "plugin 'hook': workpool_evnt is not a hook; did you mean 'workpool_event'?",
    ),
    FailingCommandCase(
        "hook without its mark",
        "run unmarked",
        "plugin 'unmarked': workpool_event is not marked with @hookimpl",
    ),
    FailingCommandCase(
        "plugin twice",
        "run handlers handlers",
        "plugin 'handlers': is given twice: handlers, handlers",
    ),
    FailingCommandCase(
        "mistyped table of a plugin",
        "run handlers --config plugin.toml",
        "plugin 'ecko': plugin.toml: [workpool.plugin.ecko] is for no active plugin; did "
        "you mean 'echo'?",
    ),
    FailingCommandCase(
        "mistyped option of a plugin",
        "run named:Named --config option.toml",
        "plugin 'Named': option.toml: [workpool.plugin.Named]: greting: no such option; "
        "did you mean 'greeting'?",
    ),
    FailingCommandCase(
        "option of a plugin missing",
        "run named:Named",
        "plugin 'Named': [workpool.plugin.Named]: missing a required argument: 'greeting'",
    ),
    FailingCommandCase(
        "socket in no folder",
        "run handlers --control-socket nowhere/x.sock",
        "control_socket: nowhere/x.sock: No such file or directory (from --control-socket)",
    ),
    FailingCommandCase(
        "socket in the place of a file",
        "run handlers --control-socket good.toml",
        "control_socket: good.toml: exists and is no socket (from --control-socket)",
    ),
    FailingCommandCase(
        "host of metrics",
        "run handlers --metrics-listen no-such-host.invalid:0",
        "cannot listen on no-such-host.invalid:0 (…); set metrics_listen to an address "
        "of this host, or to off (metrics_listen from --metrics-listen)",
    ),
]
REFUSALS = [
    FailingCommandCase(
        "wrong token",
        "run handlers",
        "poll: 401 …; the token is wrong or has expired: make a new one (token from "
        "WORKPOOL_TOKEN)",
        {"WORKPOOL_TOKEN": "token-of-nobody-Zx9"},
        3,
    ),
    FailingCommandCase(
        "token of others",
        "run handlers",
        "poll: 403 …",
        {"WORKPOOL_TOKEN": LIMITED, "WORKPOOL_ENVIRONMENT_ID": FORBIDDEN},
        3,
    ),
    FailingCommandCase(
        "unknown environment",
        "run handlers --environment-id env_x",
        "poll: 404 no such environment; check environment_id and base_url "
        "(environment_id from --environment-id, base_url from WORKPOOL_BASE_URL)",
        {},
        3,
    ),
    FailingCommandCase(
        "environment of the cloud", f"run handlers --environment-id {CLOUD}", "poll: 400 …", {}, 3
    ),
]


@pytest.fixture(autouse=True)
def files_in_working_directory(command_working_directory: Path) -> None:
    for name, text in FILES.items():
        (command_working_directory / name).write_text(text)


@pytest.mark.parametrize("mistake", SETTINGS, ids=lambda mistake: mistake.name)
async def test_wrong_setting_is_reported_with_its_source(
    mistake: FailingCommandCase, run_in_process: CommandRunner
) -> None:
    ended = await run_in_process(*shlex.split(mistake.command), **mistake.variables)
    assert mistake.is_expected_error_line_in(ended.err), ended.err
    assert ended.status == mistake.status
    assert ended.out == ""


@pytest.mark.parametrize("mistake", [*PROCESSES, *REFUSALS], ids=lambda mistake: mistake.name)
async def test_command_that_cannot_start_reports_the_reason(
    mistake: FailingCommandCase, start_command: CommandStarter
) -> None:
    command = await start_command(*shlex.split(mistake.command), **mistake.variables)
    assert await command.wait_for_exit() == mistake.status
    assert mistake.is_expected_error_line_in(command.err), command.err
    assert ('File "' in command.err) == mistake.trace
    assert "backoff" not in command.err
    # The error ends the command, so no log line may announce a retry.
    assert "wait_seconds" not in command.err
    if mistake.trace:
        # The traceback has only frames of the user's code, and no frames of workpool.
        assert "workpool/plugins" not in command.err


async def test_port_in_use_is_reported_with_its_setting(start_command: CommandStarter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        command = await start_command("run", "handlers", WORKPOOL_METRICS_LISTEN=address)
        assert await command.wait_for_exit() == 2
    mistake = FailingCommandCase("", "", f"cannot listen on {address} (Address already in use); …")
    assert mistake.is_expected_error_line_in(command.err)
    assert "(metrics_listen from WORKPOOL_METRICS_LISTEN)" in command.err


async def test_address_without_the_prefix_of_the_dialect_is_refused(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    address = control_plane.base_url.removesuffix("/api/v1/cloud")
    command = await start_command("run", "handlers", WORKPOOL_BASE_URL=address)
    assert await command.wait_for_exit() == 3
    assert FailingCommandCase("", "", "poll: 404 …").is_expected_error_line_in(command.err)


TLS_ALERT = b"\x15\x03\x01\x00\x02\x02\x46"
PLAIN_AT_TLS = {
    "server that sends an alert": (
        TLS_ALERT,
        "the port speaks TLS: base_url must begin with https://",
    ),
    "server that closes": (b"", "if the port speaks TLS, base_url must begin with https://"),
    "server that answers": (
        b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n",
        "the port speaks TLS: base_url must begin with https://",
    ),
}


@pytest.mark.parametrize(("answer", "expected_text"), PLAIN_AT_TLS.values(), ids=PLAIN_AT_TLS)
async def test_http_on_an_https_port_is_reported(
    start_command: CommandStarter, answer: bytes, expected_text: str
) -> None:
    async def send_http_answer_and_close(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.read(1000)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(send_http_answer_and_close, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/api"
        command = await start_command("run", "handlers", WORKPOOL_BASE_URL=url)
        assert expected_text in await command.wait_for_log("base_url must begin")
        command.send_signal(signal.SIGTERM)
        await command.wait_for_exit()


async def test_https_on_an_http_port_is_reported(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    url = control_plane.base_url.replace("http:", "https:")
    command = await start_command("run", "handlers", WORKPOOL_BASE_URL=url)
    assert "the port does not speak TLS: base_url is https" in await command.wait_for_log(
        "poll failed"
    )
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0
