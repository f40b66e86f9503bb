"""The settings of a worker, from keywords, environment variables and a TOML file.

The sources are read once, by the constructor; only the source of the token is read again, by
`read_token`. No error, repr or log shows a value: a wrong value may be a secret in the wrong place.
See workpool/docs/settings.md, "Settings".
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import orjson
from yarl import URL

from workpool.config_file import (
    ConfigFile,
    find_environment_id_problems,
    find_environment_table_problems,
    read_config_file,
)
from workpool.errors import SettingsError
from workpool.setting_values import (
    SourcedValue,
    append_setting_sources,
    checked_text_parser,
    choice_parser,
    matching_text_parser,
    number_parser,
    optional_value_parser,
    parse_names,
    parse_path,
    parse_secret,
    parse_secrets_by_name,
    setting,
    unlimited_value_parser,
    whole_number_parser,
)
from workpool.wire import protocol
from workpool.wire.client_dialects import DIALECTS
from workpool.wire.http.credentials import read_credential
from workpool.wire.http.tls import tls_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from typing import Self

    from workpool.secret import Secret
    from workpool.wire.items import WorkItem

    Table = dict[str, Any]

PREFIX: Final = "WORKPOOL_"
CONFIG_VARIABLE: Final = "WORKPOOL_CONFIG"
SERVE_VARIABLE: Final = "WORKPOOL_SERVE_TOKEN"
"""Read by `workpool serve`, whose shell often has the settings of a worker, too."""
PORT_MAX: Final = 65535
OFF: Final = "off"
SOCKET_PATH_BYTES: Final = 100
"""Largest length of the path of a Unix socket; systems allow 104 to 108."""
DEFAULT_READ_RATE: Final = 50.0
DEFAULT_WRITE_RATE: Final = 20.0
"""Limits that the vendor asks clients to keep, in requests per second."""
COMPLETION_WRITES: Final = 2
"""Writes that end one session: its result and its stop."""
CREDENTIALS: Final = (("token", "token_file"), ("api_key", "api_key_file"))
CREDENTIAL_PREFIXES: Final = (
    PREFIX,
    *(f"{rules.credential_variable.partition('_')[0]}_" for rules in DIALECTS.values()),
)
"""The prefixes of all environment variables that may hold credentials of a worker."""
OWN_HEADERS: Final = frozenset(
    {
        *("accept", "accept-encoding", "authorization", "connection", "content-encoding"),
        *("content-length", "content-type", "cookie", "expect", "host", "keep-alive"),
        *("proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding"),
        *("upgrade", "user-agent", protocol.LAST_EVENT_ID_HEADER.lower()),
        *(rules.worker_id_header.lower() for rules in DIALECTS.values()),
        *((rules.api_key_header or "authorization").lower() for rules in DIALECTS.values()),
        *(name.lower() for rules in DIALECTS.values() for name in rules.headers),
    }
)
"""Headers that `extra_headers` may not hold, in lower case."""
_is_header_name = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}").fullmatch
_is_header_value = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,8190}[\x21-\x7e])?").fullmatch
_LOOPBACK = re.compile(r"localhost|.*\.localhost|127\.[0-9.]+|::1").fullmatch


class Address(NamedTuple):
    """An address to listen on.

    `host` is None for all interfaces, and `port` is 0 for any free port.
    """

    host: str | None
    port: int


def parse_listen_address(value: str) -> Address | None:
    """Read `HOST:PORT`, `[V6]:PORT`, `:PORT`, or `off` (None).

    Raises:
        ValueError: The value has none of these forms. The error does not quote it.
    """
    if value == OFF:
        return None
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([A-Za-z0-9._-]*)):([0-9]{1,5})", value)
    if match is None or int(match[3]) > PORT_MAX:
        raise ValueError("not HOST:PORT, [IPV6]:PORT, :PORT or off")
    _check_host(match[2] or "")
    return Address(match[1] or match[2] or None, int(match[3]))


def lease_margin(ttl: float) -> float:
    """Return the seconds between the cancellation of a handler and the end of its lease.

    They leave time for the handler's clean-up before another worker can start the item.
    """
    return max(1.0, ttl / 10)


def _check_host(host: str) -> None:
    """Refuse a host name that no lookup accepts; `getaddrinfo` would raise a UnicodeError."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError("each part of a host name has 1 to 63 characters") from None


def _check_listen_address(value: str) -> str:
    parse_listen_address(value)
    return value


def _check_control_socket(value: str) -> str:
    if not value or "\0" in value or len(os.fsencode(value)) > SOCKET_PATH_BYTES:
        raise ValueError(f"must be a path of at most {SOCKET_PATH_BYTES} bytes, or off")
    return value


def _check_base_url(value: str) -> str:
    if not value:
        raise ValueError("empty; give an address, or remove it")
    try:
        url = URL(value)
        host = url.host
        _ = url.port
    except ValueError:
        raise ValueError("not a URL") from None
    if url.scheme not in {"http", "https"} or not host or not re.fullmatch(r"[!-~]+", value):
        raise ValueError("not an http:// or https:// URL")
    if url.raw_user is not None or url.raw_password is not None or "?" in value or "#" in value:
        raise ValueError("must have no user, password, query or fragment")
    _check_host(host)
    return str(url).rstrip("/")


def _parse_headers(value: object) -> dict[str, Secret]:
    """Parse headers, given as a mapping or as the text of a JSON object.

    Refuses headers that cannot be sent, or would replace a header of the client.
    """
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise ValueError('not a JSON object, as in {"x-worker-token": "..."}') from None
    headers = parse_secrets_by_name(value)
    if len({name.lower() for name in headers}) != len(headers):
        raise ValueError("a name is given twice")
    for name, value in headers.items():
        if not _is_header_name(name):
            raise ValueError("a name is not the name of a header")
        if name.lower() in OWN_HEADERS:
            raise ValueError(f"{name.lower()}: cannot be set")
        if not _is_header_value(value.get_secret_value()):
            raise ValueError("a value is not 1 to 8192 printable ASCII characters")
    return headers


def _default_worker_name() -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname())[:64].strip("-") or "worker"


@dataclass(frozen=True, slots=True)
class _Sources:
    """The sources of the settings, and the environments and plugin tables of the TOML file.

    Attributes:
        file: The path of the TOML file; None without one.
        origins: The variable, file or flag that gave each setting its value.
        plugin_options: The tables `[workpool.plugin.NAME]`, by name.
        environment_ids: The environments of the file; empty if `environment_id` chooses one.
    """

    file: Path | None = None
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    plugin_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict, repr=False
    )
    environment_ids: tuple[str, ...] = ()


Level = Literal["debug", "info", "warning", "error", "critical"]
_ID: Final = "1 to 128 letters, digits, _ or -"
_SECONDS: Final = number_parser(zero=True)
_SOME_SECONDS: Final = number_parser(zero=False)


def _join_with_or(names: Iterable[str]) -> str:
    """Return names in a text: "`one` or `two`"."""
    return " or ".join(f"`{name}`" for name in names)


@dataclass(frozen=True, init=False)
class Settings:
    """All settings of a worker.

    A keyword wins over a variable, which wins over the TOML file. The variable of a setting is
    `WORKPOOL_` and its name in upper case. Durations are in seconds unless the name says otherwise.

    Args:
        config: A TOML file; None = the one that `WORKPOOL_CONFIG` names, if any. Its table
            `[workpool]` holds settings, its tables `[workpool.plugin.NAME]` plugins' options. Its
            tables `[workpool.environments.ID]` hold settings of one environment each, and win over
            variables: `environment_id` chooses one.
        values: Settings by name.

    Raises:
        SettingsError: Some values are wrong. Names all settings and quotes no value.
    """

    base_url: str = setting(
        checked_text_parser(_check_base_url),
        protocol.QODER_BASE_URL,
        "The control plane's address, with the dialect's prefix. Default: the dialect's own.",
    )
    dialect: protocol.Dialect = setting(
        choice_parser(*get_args(protocol.Dialect)),
        protocol.QODER,
        f"The variant of the protocol: {_join_with_or(DIALECTS)}. Default: `{protocol.QODER}`.",
    )
    token: Secret | None = setting(
        optional_value_parser(parse_secret),
        None,
        "The credential. Default: the variable "
        f"{_join_with_or(rules.credential_variable for rules in DIALECTS.values())}.",
    )
    token_file: Path | None = setting(
        optional_value_parser(parse_path),
        None,
        "A file with the credential, read again after a refusal. Default: none.",
    )
    api_key: Secret | None = setting(
        optional_value_parser(parse_secret),
        None,
        "A second credential, for calls that some control planes refuse a worker's: those "
        "that read an item, write its metadata or query statistics. Default: none, so they "
        "use `token`.",
    )
    api_key_file: Path | None = setting(
        optional_value_parser(parse_path),
        None,
        "A file with the second credential, read again after a refusal. Default: none.",
    )
    extra_headers: Mapping[str, Secret] = setting(
        _parse_headers,
        dict,
        "More headers for every request, by name; the values are secrets and never shown. In "
        "a variable a JSON object, in the TOML file a table. Default: none.",
    )
    ca_file: Path | None = setting(
        optional_value_parser(parse_path),
        None,
        "Certificates (PEM) to trust instead of the system's. Default: none.",
    )
    client_cert_file: Path | None = setting(
        optional_value_parser(parse_path),
        None,
        "The worker's certificate (PEM), if the control plane asks for one. Default: none.",
    )
    client_key_file: Path | None = setting(
        optional_value_parser(parse_path),
        None,
        "The private key (PEM) of the certificate, not encrypted. Default: in `client_cert_file`.",
    )
    environment_id: str | None = setting(
        optional_value_parser(matching_text_parser(protocol.ID_PATTERN, _ID)),
        None,
        "The environment whose queue is polled; needed to connect. Default: none.",
    )
    worker_id: str = setting(
        matching_text_parser(r"[\x21-\x7e]{1,128}", "1 to 128 printable ASCII characters"),
        _default_worker_name,
        "The name of this worker in its requests; each start adds 8 random digits. Default: "
        "the host name.",
    )
    plugins: tuple[str, ...] = setting(
        parse_names,
        (),
        "The plugins to run, in order of preference; in a variable, separated by commas. "
        "Default: nothing.",
    )
    pollers: int = setting(
        whole_number_parser(1),
        2,
        "The number of polls in flight at most; an idle pool has one. Default: 2.",
    )
    concurrency: int = setting(
        whole_number_parser(1),
        8,
        "The number of sessions that run at once. Default: 8.",
    )
    prefetch: int = setting(
        whole_number_parser(0),
        0,
        "The number of items that wait for a slot; only for handlers that end within the "
        "reclaim window. Default: 0.",
    )
    block_ms: int = setting(
        whole_number_parser(protocol.BLOCK_MS_MIN, protocol.BLOCK_MS_MAX),
        999,
        "The time for which a poll waits for an item, in milliseconds, 1 to 999. Default: 999.",
    )
    reclaim_older_than_ms: int | None = setting(
        optional_value_parser(whole_number_parser(0)),
        None,
        "Receive items again that were delivered this many milliseconds ago and not "
        "acknowledged; the lowest value of all workers decides. Some control planes also end "
        "leases whose last heartbeat is older. Default: not sent, so that of the control "
        "plane (5000).",
    )
    lease_ttl: int = setting(
        whole_number_parser(protocol.TTL_MIN_SECONDS, protocol.TTL_MAX_SECONDS),
        protocol.TTL_DEFAULT_SECONDS,
        "The duration of a lease, in seconds, 10 to 600. Default: 60.",
    )
    stop_grace: float = setting(
        _SECONDS,
        30.0,
        "The time between a stop request and the cancellation of the handler. Default: 30.",
    )
    session_timeout: float | None = setting(
        optional_value_parser(_SOME_SECONDS),
        None,
        "The limit of the duration of a session; a handler's own `timeout` replaces it. "
        "Default: no limit.",
    )
    stall_timeout: float | None = setting(
        optional_value_parser(_SOME_SECONDS),
        None,
        "The time without progress after which a session is ended; a handler's own "
        "`stall_timeout` replaces it. Default: no limit.",
    )
    drain_timeout: float | None = setting(
        unlimited_value_parser(_SECONDS),
        20.0,
        "The time that running sessions have in a drain; `unlimited` = until they end. "
        "Default: 20.",
    )
    exit_after_sessions: int | None = setting(
        optional_value_parser(whole_number_parser(1)),
        None,
        "End after this many sessions; 1 = a process for each session. Default: no limit.",
        of_process=True,
    )
    exit_after_idle: float | None = setting(
        optional_value_parser(_SOME_SECONDS),
        None,
        "End once polls have brought nothing for this long while no session ran. Default: no "
        "limit.",
        of_process=True,
    )
    exit_after_uptime: float | None = setting(
        optional_value_parser(_SOME_SECONDS),
        None,
        "Claim nothing more after this time, and end after the running sessions. Default: no "
        "limit.",
        of_process=True,
    )
    request_timeout: float = setting(
        _SOME_SECONDS,
        10.0,
        "The limit of one request; a poll has `block_ms` in addition. Default: 10.",
    )
    max_block: float = setting(
        _SOME_SECONDS,
        300.0,
        "The time for which a handler may block its event loop and keep its leases. Default: 300.",
        of_process=True,
    )
    max_attempts: int = setting(
        whole_number_parser(0),
        10,
        "The number of attempts of an item; a further one fails without a run; 0 = no limit. "
        "It is a limit of each process if the credential may not write metadata. Default: 10.",
    )
    report_errors: Literal["type", "message"] = setting(
        choice_parser("type", "message"),
        "type",
        "The part of a handler's error or `Release` that is written to the metadata: its "
        "`type`, or also its `message` or reason, which may contain secrets. Default: `type`.",
    )
    read_rate: float | None = setting(
        optional_value_parser(_SECONDS),
        None,
        "Read requests per second; 0 = no limit. Default: 50 at the dialect's own `base_url`, "
        "else 0.",
    )
    write_rate: float | None = setting(
        optional_value_parser(_SECONDS),
        None,
        "Write requests per second; 0 = no limit. Default: 20 at the dialect's own "
        "`base_url`, else 0.",
    )
    rate_limit_group: str | None = setting(
        optional_value_parser(
            matching_text_parser(r"[\x21-\x7e]{1,128}", "1 to 128 printable ASCII characters")
        ),
        None,
        "Environments of one process with the same group share their rate limits, as those "
        "of one account should. Default: those with the same `base_url` and credential.",
    )
    metrics_listen: str | None = setting(
        optional_value_parser(checked_text_parser(_check_listen_address)),
        None,
        "The address of metrics and health: `HOST:PORT`, `:PORT`, port 0 for any free one, or "
        "`off`. Default: `127.0.0.1:9464` under `workpool run`, `off` when embedded.",
        of_process=True,
    )
    live_page_ids: Literal["loopback", "always"] = setting(
        choice_parser("loopback", "always"),
        "loopback",
        "When the live page shows ids of items and sessions: if `metrics_listen` is on the "
        "`loopback` interface, or `always`. Default: `loopback`.",
        of_process=True,
    )
    stats_interval: float = setting(
        _SECONDS,
        15.0,
        "The interval of reading the queue's statistics; 0 = never. Default: 15.",
    )
    log_level: Level = setting(
        choice_parser(*get_args(Level)),
        "info",
        "The least level that the command line logs: `debug` to `critical`. Default: `info`.",
        of_process=True,
    )
    log_format: Literal["text", "json"] = setting(
        choice_parser("text", "json"),
        "text",
        "The format of the command line's logs: `text` or `json`. Default: `text`.",
        of_process=True,
    )
    control_socket: str | None = setting(
        optional_value_parser(checked_text_parser(_check_control_socket)),
        None,
        "The path of the Unix socket for `workpool pause`, `resume` and `drain`, or `off`. "
        "Default: a new one in a directory of the user under `workpool run`, `off` when embedded.",
        of_process=True,
    )

    _sources: _Sources = dataclasses.field(default_factory=_Sources, repr=False, compare=False)

    def __init__(self, *, config: str | os.PathLike[str] | None = None, **values: Any) -> None:
        file = self._read_file(config)
        variables, keywords = _read_settings_from_variables(), self._add_sources_to_keywords(values)
        given = {**variables, **keywords}.get("environment_id", SourcedValue(None, ""))
        layer: dict[str, SourcedValue] = {}
        problems = find_environment_id_problems(file, given)
        if isinstance(given.value, str) and given.value in file.environments:
            layer = file.settings_of_environment_table(given.value)
            problems = find_environment_table_problems(file, given.value, PROCESS_SETTINGS)
        self._load_layers(file, (variables, layer, keywords), problems, chosen=bool(given.value))

    @classmethod
    def of_environments(
        cls, *, config: str | os.PathLike[str] | None = None, **values: Any
    ) -> tuple[Self, tuple[Self, ...]]:
        """Return the settings of the process, and the settings of each environment.

        There are no environments if the file has no tables of them, or if `environment_id` chooses
        one. The `concurrency` of the process is the limit of all its environments together.

        Raises:
            SettingsError: Some values of the process, or else of its environments, are wrong.
        """
        process = cls(config=config, **values)
        file = cls._read_file(config)
        found: list[Self] = []
        problems: list[str] = []
        for environment_id in process.environment_ids:
            layers = (
                _read_settings_from_variables(),
                file.settings_of_environment_table(environment_id),
                cls._add_sources_to_keywords(values),
            )
            one = cls.__new__(cls)
            try:
                one._load_layers(  # noqa: SLF001 - of this class
                    file,
                    layers,
                    find_environment_table_problems(file, environment_id, PROCESS_SETTINGS),
                    chosen=True,
                )
            except SettingsError as error:
                problems += error.problems
            else:
                found.append(one.replace(concurrency=min(one.concurrency, process.concurrency)))
        if len(process.environment_ids) > process.concurrency:
            needed = len(process.environment_ids)
            problem = f"concurrency: must be {needed} or more, one for each environment"
            origin = {"concurrency": process.origin_of("concurrency")}
            problems.append(append_setting_sources(problem, origin))
        if problems:
            raise SettingsError(tuple(dict.fromkeys(problems)))
        return process, tuple(found)

    def _load_layers(
        self,
        file: ConfigFile,
        layers: Iterable[Mapping[str, SourcedValue]],
        problems: Iterable[str],
        *,
        chosen: bool,
    ) -> None:
        """Merge the settings of the file and of `layers`, and set the attributes of this object.

        Args:
            file: The TOML file.
            layers: Settings from other sources; each layer overrides the ones before it.
            problems: Problems that were found before, with the sources of their values.
            chosen: Whether `environment_id` chooses one environment of the file.

        Raises:
            SettingsError: There are problems, or some settings are wrong.
        """
        given, more = _merge_setting_layers(file.settings_of_workpool_table(), *layers)
        parsed, wrong = _parse_setting_values(given)
        origins = {name: each.origin for name, each in given.items()}
        problems = [
            *problems,
            *(append_setting_sources(each, origins) for each in (*more, *wrong)),
        ]
        self._raise_error_for_problems(problems, {})
        for name, value in parsed.items():
            object.__setattr__(self, name, value)
        sources = _Sources(
            file.path,
            origins,
            file.plugin_tables(parsed["plugins"]),
            () if chosen else tuple(file.environments),
        )
        object.__setattr__(self, "_sources", sources)

    @classmethod
    def _read_file(cls, config: str | os.PathLike[str] | None) -> ConfigFile:
        if config:
            return read_config_file(config, cls._keyword_source_name("config"))
        return read_config_file(os.environ.get(CONFIG_VARIABLE), CONFIG_VARIABLE)

    @classmethod
    def _add_sources_to_keywords(cls, values: Mapping[str, Any]) -> dict[str, SourcedValue]:
        return {
            name: SourcedValue(value, cls._keyword_source_name(name))
            for name, value in values.items()
        }

    @staticmethod
    def _keyword_source_name(name: str) -> str:
        """Return the text that names, in error messages, the source of a keyword argument's value.

        A subclass may return a command-line flag; this class names no source.
        """
        del name
        return ""

    @staticmethod
    def _raise_error_for_problems(problems: Iterable[str], origins: Mapping[str, str]) -> None:
        """Raise `SettingsError` if there are problems, and name the source of each."""
        found = tuple(append_setting_sources(problem, origins) for problem in problems)
        if found:
            raise SettingsError(found)

    def origin_of(self, name: str) -> str:
        """Return the variable, file or flag that gave a setting its value; empty if none did."""
        if name == "token" and self.token is None and self.token_file is None:
            return DIALECTS[self.dialect].credential_variable
        return self._sources.origins.get(name, "")

    def replace(self, **values: Any) -> Self:
        """Return a copy with some values replaced; the new values are not checked."""
        changed = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(changed, name, value)
        return changed

    @property
    def plugin_options(self) -> Mapping[str, Mapping[str, Any]]:
        """The tables `[workpool.plugin.NAME]`, by name. May contain secrets of plugins."""
        return self._sources.plugin_options

    @property
    def config_file(self) -> Path | None:
        """The TOML file that was read; None if there is none."""
        return self._sources.file

    @property
    def environment_ids(self) -> tuple[str, ...]:
        """The ids of the environments in the TOML file; empty if `environment_id` chooses one."""
        return self._sources.environment_ids

    @property
    def metrics_address(self) -> Address | None:
        """The parsed address of the setting `metrics_listen`; None if that is `off` or not set."""
        return None if self.metrics_listen is None else parse_listen_address(self.metrics_listen)

    @property
    def read_limit(self) -> float:
        """The effective limit of reads per second; 0 = no limit."""
        return self._find_effective_rate_limit(self.read_rate, DEFAULT_READ_RATE)

    @property
    def write_limit(self) -> float:
        """The effective limit of writes per second; 0 = no limit."""
        return self._find_effective_rate_limit(self.write_rate, DEFAULT_WRITE_RATE)

    def read_token(self) -> str:
        """Read the credential from its source. Each call reads it again.

        Raises:
            SettingsError: There is no credential, or it cannot be read or used.
        """
        given = None if self.token is None else self.token.get_secret_value()
        variable = DIALECTS[self.dialect].credential_variable
        return read_credential(given, self.token_file, variable)

    def read_api_key(self) -> str | None:
        """Read the API key; return None if no API key is set.

        The API key is a credential in addition to the one that `read_token` returns. Each call
        reads the API key again.

        Raises:
            SettingsError: The API key cannot be read, or is malformed.
        """
        if self.api_key is None and self.api_key_file is None:
            return None
        given = None if self.api_key is None else self.api_key.get_secret_value()
        return read_credential(given, self.api_key_file, "", name="api_key")

    def item_token_variables(self, item: WorkItem) -> dict[str, str]:
        """Return the variables that let a child process call the API for an item's session.

        They hold the item's own token, never the worker's; empty if the item came without one.
        """
        if item.sessions_token is None:
            return {}
        return {
            "WORKPOOL_BASE_URL": self.base_url,
            "WORKPOOL_DIALECT": self.dialect,
            "WORKPOOL_TOKEN": item.sessions_token.get_secret_value(),
        }

    def tls_context(self) -> ssl.SSLContext | None:
        """Read the CA file and the client certificate; return None if neither is set.

        Raises:
            SettingsError: A file cannot be read or used.
        """
        return tls_context(self.ca_file, self.client_cert_file, self.client_key_file)

    def require_connection(self) -> None:
        """Check that the settings for a connection to the control plane are complete.

        Raises:
            SettingsError: Names everything that is missing, with the variables to set.
        """
        problems: list[str] = []
        if self.environment_id is None:
            known = f" to one of {', '.join(self.environment_ids)}" if self.environment_ids else ""
            problems.append(f"environment_id: not set (set {PREFIX}ENVIRONMENT_ID{known})")
        for read in (self.read_token, self.read_api_key, self.tls_context):
            try:
                read()
            except SettingsError as error:
                problems += error.problems
        self._raise_error_for_problems(problems, self._sources.origins)

    def warnings(self) -> tuple[str, ...]:
        """Return a sentence for each setting that is allowed but probably a mistake."""
        found = list(_find_unknown_variables())
        url = URL(self.base_url)
        if url.scheme == "http" and not _LOOPBACK(url.host or ""):
            found.append("base_url: plain http, so the token can be read on the way")
        heartbeats = self.concurrency * 3 / self.lease_ttl
        if 0 < self.write_limit < 2 * heartbeats:
            found.append(
                f"write_rate: {self.concurrency} sessions send {heartbeats:.1f} heartbeats a"
                f" second, more than half of {self.write_limit:g}; raise lease_ttl or write_rate"
            )
        return (*found, *self._find_write_rate_warnings())

    def _find_write_rate_warnings(self) -> Iterator[str]:
        """Warn if the write rate is too low to complete all sessions when they end together."""
        if not self.write_limit:
            return
        seconds = COMPLETION_WRITES * self.concurrency / self.write_limit
        held = self.lease_ttl - lease_margin(self.lease_ttl)
        bounds = [(held, f"their leases are held for {held:g} s", "lease_ttl")]
        if self.drain_timeout is not None:
            drain = f"a drain waits {self.drain_timeout:g} s"
            bounds.append((self.drain_timeout, drain, "drain_timeout"))
        for bound, meaning, name in bounds:
            if seconds > bound:
                yield (
                    f"write_rate: {self.concurrency} sessions that end together need"
                    f" {COMPLETION_WRITES} writes each, {seconds:.1f} s at {self.write_limit:g} a"
                    f" second, but {meaning}; raise write_rate or {name}, or lower concurrency"
                )

    def _find_effective_rate_limit(self, rate: float | None, default: float) -> float:
        if rate is not None:
            return rate
        return default if self.base_url == DIALECTS[self.dialect].base_url else 0.0


DESCRIPTIONS: Final[Mapping[str, str]] = {
    each.name: each.metadata["text"] for each in dataclasses.fields(Settings) if each.metadata
}
"""The documentation of each setting, by name."""
PROCESS_SETTINGS: Final = frozenset(
    each.name for each in dataclasses.fields(Settings) if each.metadata.get("of_process")
)
"""Settings of the whole process, which the table of an environment may not hold."""


def _read_settings_from_variables() -> dict[str, SourcedValue]:
    """Return the settings from environment variables. An empty variable counts as not set.

    An empty `base_url` is an exception, and becomes an error later: as not set, it would make the
    worker send its credential to the service's own address.
    """
    environment = {name.upper(): name for name in os.environ}
    found = {}
    for name in DESCRIPTIONS:
        variable = environment.get(f"{PREFIX}{name.upper()}")
        if variable is not None and (os.environ[variable] or name == "base_url"):
            found[name] = SourcedValue(os.environ[variable], variable)
    return found


def _merge_setting_layers(
    *layers: Mapping[str, SourcedValue],
) -> tuple[dict[str, SourcedValue], list[str]]:
    """Merge layers of settings; a later layer overrides an earlier one.

    Return the merged settings, and the problems: conflicting or unknown settings.
    """
    merged: dict[str, SourcedValue] = {}
    problems: list[str] = []
    for layer in layers:
        for name, file in CREDENTIALS:
            given = [
                each for each in (name, file) if each in layer and layer[each].value is not None
            ]
            if len(given) > 1:
                problems.append(f"{name}, {file}: set one of the two")
            if given:
                # Drop the values of both settings from earlier layers. For example, a `token`
                # replaces an earlier `token_file`, and a `token_file` an earlier `token`.
                merged.pop(name, None)
                merged.pop(file, None)
        merged |= layer
    dialect = merged.get("dialect")
    for name, rules in DIALECTS.items():
        if dialect is not None and name == dialect.value:
            merged.setdefault("base_url", SourcedValue(rules.base_url, ""))
    problems += [
        _describe_unknown_setting(name, DESCRIPTIONS) for name in merged if name not in DESCRIPTIONS
    ]
    return merged, problems


def _parse_setting_values(given: Mapping[str, SourcedValue]) -> tuple[Table, list[str]]:
    """Return the value of each setting, and the problems of the wrong settings."""
    values: Table = {}
    problems: list[str] = []
    for each in dataclasses.fields(Settings):
        if each.name in given and each.metadata:
            try:
                values[each.name] = each.metadata["parse"](given[each.name].value)
            except ValueError as error:
                problems.append(f"{each.name}: {error}")
        elif each.default is not dataclasses.MISSING:
            values[each.name] = each.default
        elif each.default_factory is not dataclasses.MISSING:
            values[each.name] = each.default_factory()
    return values, problems


def _describe_unknown_setting(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, 1)
    hint = f", did you mean {prefix}{close[0]}?" if close else ""
    return f"{prefix}{name}: no such setting{hint}"


def _find_unknown_variables() -> tuple[str, ...]:
    # Other parts of workpool read these variables, so do not report them as unknown settings.
    others = {name.removeprefix(PREFIX) for name in (CONFIG_VARIABLE, SERVE_VARIABLE)}
    names = {name.upper() for name in DESCRIPTIONS} | others
    given = sorted(name.upper() for name in os.environ if name.upper().startswith(PREFIX))
    bare = [name.removeprefix(PREFIX) for name in given]
    return tuple(
        _describe_unknown_setting(name, names, PREFIX) for name in bare if name not in names
    )
