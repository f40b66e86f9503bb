"""Settings: sources, validation, error texts, and hidden values."""

from __future__ import annotations

import dataclasses
import json
import os
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workpool.errors import SettingsError
from workpool.settings import DESCRIPTIONS, Address, Settings, parse_listen_address

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN = "hunter2-hunter2"
GIVEN = "given"

pytestmark = pytest.mark.usefixtures("environment_without_settings")


def get_error_of_invalid_settings(**values: Any) -> SettingsError:
    with pytest.raises(SettingsError) as raised:
        Settings(**values)
    return raised.value


def test_settings_have_documented_defaults() -> None:
    found = {name: getattr(Settings(), name) for name in DESCRIPTIONS}
    assert found.pop("worker_id")
    assert found == {
        "base_url": "https://api.qoder.com/api/v1/cloud",
        "dialect": "qoder",
        "token": None,
        "token_file": None,
        "api_key": None,
        "api_key_file": None,
        "extra_headers": {},
        "ca_file": None,
        "client_cert_file": None,
        "client_key_file": None,
        "environment_id": None,
        "plugins": (),
        "pollers": 2,
        "concurrency": 8,
        "prefetch": 0,
        "block_ms": 999,
        "reclaim_older_than_ms": None,
        "lease_ttl": 60,
        "stop_grace": 30,
        "session_timeout": None,
        "stall_timeout": None,
        "drain_timeout": 20,
        "exit_after_sessions": None,
        "exit_after_idle": None,
        "exit_after_uptime": None,
        "request_timeout": 10,
        "max_block": 300,
        "max_attempts": 10,
        "report_errors": "type",
        "read_rate": None,
        "write_rate": None,
        "rate_limit_group": None,
        "metrics_listen": None,
        "live_page_ids": "loopback",
        "stats_interval": 15,
        "log_level": "info",
        "log_format": "text",
        "control_socket": None,
    }


def test_every_setting_description_states_the_default() -> None:
    for name, text in DESCRIPTIONS.items():
        assert "Default: " in text, name


@pytest.mark.parametrize("value", ["unlimited", "Unlimited", None])
def test_drain_timeout_given_as_unlimited_or_none_is_parsed_as_none(
    value: str | None, tmp_path: Path
) -> None:
    assert Settings(drain_timeout=value).drain_timeout is None
    if value is not None:
        file = tmp_path / "workpool.toml"
        file.write_text(f'[workpool]\ndrain_timeout = "{value}"\n')
        assert Settings(config=file).drain_timeout is None


def test_unlimited_drain_timeout_gives_no_warning_about_low_write_rate() -> None:
    assert not Settings(
        concurrency=50, lease_ttl=60, write_rate=10, drain_timeout="unlimited"
    ).warnings()


def test_assignment_to_a_setting_raises_frozen_instance_error() -> None:
    settings: Any = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.pollers = 3


@pytest.mark.parametrize(
    ("host", "worker_id"),
    [
        ("node-7", "node-7"),
        ("a b\n", "a-b"),
        ("büro", "b-ro"),
        ("", "worker"),
        ("x" * 99, "x" * 64),
    ],
)
def test_worker_id_defaults_to_cleaned_host_name(
    monkeypatch: pytest.MonkeyPatch, host: str, worker_id: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert Settings().worker_id == worker_id


def test_keyword_overrides_variable_and_variable_overrides_file(
    monkeypatch: pytest.MonkeyPatch, write_config: Callable[[str], Path]
) -> None:
    path = write_config("[workpool]\npollers = 3\nconcurrency = 3\nprefetch = 3\n")
    monkeypatch.setenv("WORKPOOL_POLLERS", "4")
    monkeypatch.setenv("WORKPOOL_CONCURRENCY", "4")
    found = Settings(config=path, pollers=5)
    assert (found.pollers, found.concurrency, found.prefetch) == (5, 4, 3)


def test_config_file_is_read_only_if_named_by_variable(
    monkeypatch: pytest.MonkeyPatch, write_config: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write_config("[workpool]\npollers = 3\n")
    monkeypatch.chdir(tmp_path)
    assert Settings().pollers == 2
    monkeypatch.setenv("WORKPOOL_CONFIG", str(path))
    assert Settings().pollers == 3


def test_every_setting_has_an_environment_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = {
        "base_url": "http://localhost:8484/api/v1/cloud",
        "dialect": "anthropic",
        "token_file": str(tmp_path / "token"),
        "api_key_file": str(tmp_path / "key"),
        "extra_headers": '{"x-worker-token": "secret"}',
        "ca_file": str(tmp_path / "ca.pem"),
        "client_cert_file": str(tmp_path / "cert.pem"),
        "client_key_file": str(tmp_path / "key.pem"),
        "environment_id": "env_1",
        "worker_id": "me",
        "plugins": "a, b.c:D,",
        "pollers": "3",
        "concurrency": "4",
        "prefetch": "1",
        "block_ms": "500",
        "reclaim_older_than_ms": "0",
        "lease_ttl": "30",
        "stop_grace": "0",
        "session_timeout": "1.5",
        "stall_timeout": "60",
        "drain_timeout": "2",
        "exit_after_sessions": "1",
        "exit_after_idle": "0.5",
        "exit_after_uptime": "3600",
        "request_timeout": "5",
        "max_block": "9",
        "max_attempts": "1",
        "report_errors": "message",
        "read_rate": "0",
        "write_rate": "7.5",
        "rate_limit_group": "acme",
        "metrics_listen": ":0",
        "live_page_ids": "always",
        "stats_interval": "0",
        "log_level": "DEBUG",
        "log_format": "json",
        "control_socket": "worker.sock",
    }
    assert {*values, "token", "api_key"} == set(DESCRIPTIONS)
    for name, value in values.items():
        monkeypatch.setenv(f"WORKPOOL_{name.upper()}", value)
    found = Settings()
    assert found.plugins == ("a", "b.c:D")
    assert (found.lease_ttl, found.session_timeout, found.write_rate) == (30, 1.5, 7.5)
    assert (found.log_level, found.dialect, found.metrics_listen) == ("debug", "anthropic", ":0")
    assert found.token_file == tmp_path / "token"
    assert found.warnings() == ()


def test_empty_environment_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKPOOL_POLLERS", "")
    assert Settings().pollers == 2


def test_plugin_tables_of_config_file_become_plugin_options(
    write_config: Callable[[str], Path],
) -> None:
    path = write_config(
        f'[workpool]\nplugins = ["sql"]\n[workpool.plugin.sql]\ndsn = "{HIDDEN}"\n[other]\nx = 1\n'
    )
    found = Settings(config=path)
    assert found.plugins == ("sql",)
    assert found.plugin_options == {"sql": {"dsn": HIDDEN}}
    assert HIDDEN not in repr(found)
    assert Settings().plugin_options == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("pollers = 3\n", "config: {file}: has no table [workpool]"),
        ("workpool = 3\n", "config: {file}: has no table [workpool]"),
        (f"[workpool]\ntoken = {HIDDEN}\n", "config: {file}: not TOML (at line 2, column 9)"),
        (
            "[workpool]\nplugin = 3\n",
            "config: {file}: [workpool.plugin] holds something else than tables",
        ),
        ("[workpool.plugin]\nsql = 3\n", "config: {file}: [workpool.plugin] holds something else"),
        (
            "[workpool]\nConcurrency = 3\n",
            "Concurrency: no such setting, did you mean concurrency?",
        ),
        ('[workpool]\n_env_file = "x"\n', "_env_file: no such setting"),
        ('[workpool]\ndialect = ["qoder"]\n', "dialect: "),
    ],
)
def test_invalid_config_file_is_refused(
    write_config: Callable[[str], Path], text: str, problem: str
) -> None:
    file = write_config(text)
    error = get_error_of_invalid_settings(config=file)
    assert error.problems[0].startswith(problem.format(file=file))
    assert HIDDEN not in str(error)


def test_unreadable_config_file_is_refused(tmp_path: Path) -> None:
    absent, latin = tmp_path / "none", tmp_path / "latin"
    latin.write_bytes(b"\xff\xfe")
    for file, problem in ((absent, "No such file or directory"), (latin, "not TOML")):
        assert get_error_of_invalid_settings(config=file).problems == (
            f"config: {file}: {problem}",
        )


FORBIDDEN_NAMES = (
    *("", "x a", "x:a", "x\r\na", "ä", "x" * 129, "Authorization", "HOST", "content-length"),
    *("Content-Type", "transfer-encoding", "connection", "Cookie", "user-agent", "Worker-ID"),
    *("anthropic-worker-id", "anthropic-version", "anthropic-beta", "Last-Event-ID", "accept"),
)

BAD: list[tuple[str, tuple[object, ...]]] = [
    (
        "base_url",
        (
            "api.qoder.com",
            "ftp://h",
            "http://",
            "http://u@h",
            "http://u:p@h",
            "http://h?",
            "http://h/?a=1",
            "http://h/#",
            "http://h:99999",
            "http://a b",
            "http://h\n/x",
            "",
            7,
        ),
    ),
    ("dialect", ("other", "", None, 7)),
    ("environment_id", ("", "a b", "../x", "ä", "x" * 129, "a\nb", 7)),
    ("worker_id", ("", "a b", "ä", "a\r\nX: y", "x" * 129, None)),
    ("plugins", (7, {"a": 1}, [7])),
    ("pollers", (0, -1, 1.5, "x", None)),
    ("concurrency", (0, "x")),
    ("prefetch", (-1, "x")),
    ("block_ms", (0, 1000, "x")),
    ("reclaim_older_than_ms", (-1, "x")),
    ("lease_ttl", (9, 601, 10.5, "x", None)),
    ("stop_grace", (-1, "x", float("inf"), float("nan"))),
    ("session_timeout", (0, -1, "x", float("inf"))),
    ("stall_timeout", (0, -1, "x", float("inf"))),
    ("drain_timeout", (-1, "nan", "inf", "none", "")),
    ("exit_after_sessions", (0, -1, 1.5, "x")),
    ("exit_after_idle", (0, -1, "x", "inf")),
    ("exit_after_uptime", (0, -1, "x", "nan")),
    ("request_timeout", (0, -1, "inf", None)),
    ("max_block", (0, "x")),
    ("max_attempts", (-1, "x", None)),
    ("report_errors", ("all", "")),
    ("read_rate", (-1, "x", "inf")),
    ("write_rate", (-1, "x", "inf")),
    ("rate_limit_group", ("", "two words", "x" * 129, 3)),
    ("metrics_listen", ("9464", "h:", "h:x", "h:65536", "a:b:1", "[::1]", "http://h:1", "h:-1")),
    ("live_page_ids", ("never", 7)),
    ("stats_interval", (-1, "x")),
    ("log_level", ("loud", 7)),
    ("log_format", ("xml", 7)),
    ("control_socket", (7, "", "a\0b", "x" * 101)),
    ("token", (7, [HIDDEN])),
    ("token_file", (7,)),
    ("api_key", (7, [HIDDEN])),
    ("api_key_file", (7,)),
    (
        "extra_headers",
        (
            *(7, None, [], "x", "[]", '{"x-a": 7}', {"x-a": None}, '{"x-a": "b", "x-a"'),
            *({name: HIDDEN} for name in FORBIDDEN_NAMES),
            *({"x-a": value} for value in ("", " ", "a\r\nb: c", "a\nb", "a\0b", "ä", "x" * 8193)),
            {"x-a": HIDDEN, "X-A": HIDDEN},
        ),
    ),
    ("ca_file", (7,)),
    ("client_cert_file", (7,)),
    ("client_key_file", (7,)),
]


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, bads in BAD for bad in bads])
def test_error_about_invalid_value_names_its_setting(name: str, bad: object) -> None:
    error = get_error_of_invalid_settings(**{name: bad})
    assert len(error.problems) == 1
    assert error.problems[0].startswith(f"{name}: ")


def test_table_of_invalid_values_covers_every_setting() -> None:
    assert {name for name, _ in BAD} == set(DESCRIPTIONS)


def test_all_invalid_values_are_reported_at_once(
    monkeypatch: pytest.MonkeyPatch, write_config: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("WORKPOOL_LEASE_TTL", HIDDEN)
    path = write_config(f'[workpool]\npolers = 1\nmetrics_listen = "{HIDDEN}"\n')
    error = get_error_of_invalid_settings(
        config=path, token=HIDDEN, token_file=GIVEN, block_ms=0, tokn=HIDDEN
    )
    names = sorted(problem.split(":")[0] for problem in error.problems)
    assert names == [
        "block_ms",
        "lease_ttl",
        "metrics_listen",
        "polers",
        "token, token_file",
        "tokn",
    ]
    assert HIDDEN not in str(error)


@given(st.sampled_from(sorted(DESCRIPTIONS)), st.text() | st.integers() | st.floats())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_setting_value_raises_settings_error_or_is_accepted(
    name: str, value: object
) -> None:
    try:
        Settings(config=None, **{name: value})
    except SettingsError as error:
        found = error
    else:
        return
    assert found.__context__ is None
    assert found.__cause__ is None
    assert all(problem.startswith(f"{name}: ") for problem in found.problems)


def test_settings_error_names_the_variable_or_file_of_the_value(
    monkeypatch: pytest.MonkeyPatch, write_config: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("WORKPOOL_LEASE_TTL", "9")
    monkeypatch.setenv("workpool_prefetch", "x")
    file = write_config("[workpool]\npollers = 0\npolers = 1\n")
    monkeypatch.setenv("WORKPOOL_CONFIG", str(file))
    assert set(get_error_of_invalid_settings(block_ms=0).problems) == {
        "block_ms: must be a whole number from 1 to 999",
        "lease_ttl: must be a whole number from 10 to 600 (from WORKPOOL_LEASE_TTL)",
        "prefetch: must be a whole number, 0 or more (from workpool_prefetch)",
        f"pollers: must be a whole number, 1 or more (from {file})",
        f"polers: no such setting, did you mean pollers? (from {file})",
    }


def test_error_about_missing_file_names_file_and_variable_that_contains_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    absent = tmp_path / "absent"
    monkeypatch.setenv("WORKPOOL_CONFIG", str(absent))
    assert get_error_of_invalid_settings().problems == (
        f"config: {absent}: No such file or directory (from WORKPOOL_CONFIG)",
    )
    monkeypatch.delenv("WORKPOOL_CONFIG")
    monkeypatch.setenv("WORKPOOL_TOKEN_FILE", str(absent))
    with pytest.raises(SettingsError) as raised:
        Settings(environment_id="env_1").require_connection()
    assert raised.value.problems == (
        f"token_file: {absent}: No such file or directory (from WORKPOOL_TOKEN_FILE)",
    )


def test_error_hides_credential_that_was_set_by_mistake_as_token_file() -> None:
    with pytest.raises(SettingsError) as raised:
        Settings(token_file=HIDDEN + HIDDEN).read_token()
    assert HIDDEN not in str(raised.value)


def test_empty_address_in_a_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKPOOL_BASE_URL", "")
    assert get_error_of_invalid_settings().problems == (
        "base_url: empty; give an address, or remove it (from WORKPOOL_BASE_URL)",
    )


def test_plugin_table_with_misspelled_name_in_config_file_is_refused(
    write_config: Callable[[str], Path],
) -> None:
    file = write_config('[workpool.plugins.sql]\ndsn = "x"\n')
    assert get_error_of_invalid_settings(config=file, plugins="sql").problems == (
        f"config: {file}: the tables of plugins are [workpool.plugin.NAME], without an s",
    )


def test_copy_of_settings_with_replaced_values_keeps_all_other_values(tmp_path: Path) -> None:
    given = Settings(pollers=3, token_file=tmp_path)
    copied = given.replace(pollers=4, concurrency=1)
    assert (copied.pollers, copied.concurrency, copied.token_file) == (4, 1, tmp_path)
    assert given.pollers == 3


def test_token_is_never_shown_by_settings(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(HIDDEN)
    for found in (Settings(token=HIDDEN), Settings(token_file=path)):
        assert found.read_token() == HIDDEN
        for text in (repr(found), str(found), json.dumps(dataclasses.asdict(found), default=str)):
            assert HIDDEN not in text


def test_values_of_extra_headers_are_never_shown(write_config: Callable[[str], Path]) -> None:
    path = write_config(f'[workpool]\n[workpool.extra_headers]\nx-worker-token = "{HIDDEN}"\n')
    found = Settings(config=path)
    assert found.extra_headers["x-worker-token"].get_secret_value() == HIDDEN
    for text in (repr(found), str(found), json.dumps(dataclasses.asdict(found), default=str)):
        assert HIDDEN not in text
        assert "x-worker-token" in text
    for bad in ({"x-a": f"{HIDDEN}\n"}, {f"{HIDDEN} ": "x"}, f'{{"x-a": "{HIDDEN}"'):
        error = get_error_of_invalid_settings(
            extra_headers=bad if isinstance(bad, str) else {**bad, "x b": HIDDEN}
        )
        assert HIDDEN not in "".join(traceback.format_exception(error))


def test_settings_error_and_its_traceback_do_not_show_value() -> None:
    error = get_error_of_invalid_settings(metrics_listen=HIDDEN, token=[HIDDEN], lease_ttl=HIDDEN)
    chain = [error, error.__context__, error.__cause__]
    assert chain == [error, None, None]
    assert HIDDEN not in "".join(traceback.format_exception(error))


def test_token_comes_from_setting_or_file_or_environment_variable_of_dialect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QODER_PAT", "from-qoder")
    monkeypatch.setenv("ANTHROPIC_ENVIRONMENT_KEY", "from-anthropic")
    path = tmp_path / "token"
    path.write_text(" from-file\n")
    assert Settings().read_token() == "from-qoder"
    assert Settings(dialect="anthropic").read_token() == "from-anthropic"
    assert Settings(token_file=path).read_token() == "from-file"
    assert Settings(token=GIVEN).read_token() == GIVEN


def test_source_with_higher_precedence_decides_between_token_and_token_file(
    monkeypatch: pytest.MonkeyPatch, write_config: Callable[[str], Path], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORKPOOL_TOKEN_FILE", str(tmp_path / "none"))
    assert Settings(token=GIVEN).read_token() == GIVEN
    path = write_config('[workpool]\ntoken = "in-toml"\n')
    assert Settings(config=path).token is None


def test_settings_return_new_token_after_its_file_or_variable_has_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text("first")
    in_file, in_variable = Settings(token_file=path), Settings()
    monkeypatch.setenv("QODER_PAT", "first")
    assert (in_file.read_token(), in_variable.read_token()) == ("first", "first")
    path.write_text("second")
    monkeypatch.setenv("QODER_PAT", "second")
    assert (in_file.read_token(), in_variable.read_token()) == ("second", "second")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"a\nb", "holds characters that no token has"),
        (b"a b", "holds characters that no token has"),
        ("ä".encode(), "holds characters that no token has"),
        (b"\xff\xfe", "holds characters that no token has"),
    ],
)
def test_token_file_without_valid_token_is_refused(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as raised:
        Settings(token_file=path).read_token()
    assert raised.value.problems == (f"token_file: {path}: {problem}",)
    assert raised.value.__context__ is None


def test_unreadable_token_file_is_refused(tmp_path: Path) -> None:
    for path, problem in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "not a file"),
    ):
        with pytest.raises(SettingsError) as raised:
            Settings(token_file=path).read_token()
        assert raised.value.problems == (f"token_file: {path}: {problem}",)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
def test_token_file_that_is_a_pipe_is_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingsError, match="not a file"):
        Settings(token_file=tmp_path / "pipe").read_token()


@pytest.mark.parametrize("token", ["", "a\r\nX-Other: b", "a\x00"])
def test_token_that_is_empty_or_has_control_characters_is_refused(token: str) -> None:
    with pytest.raises(SettingsError, match="token: "):
        Settings(token=token).read_token()


def test_all_missing_connection_settings_are_reported_at_once() -> None:
    with pytest.raises(SettingsError) as raised:
        Settings().require_connection()
    assert raised.value.problems == (
        "environment_id: not set (set WORKPOOL_ENVIRONMENT_ID)",
        "token: not set (set WORKPOOL_TOKEN, WORKPOOL_TOKEN_FILE or QODER_PAT)",
    )
    Settings(environment_id="env_1", token=GIVEN).require_connection()


@pytest.mark.parametrize(
    ("given_url", "base_url"),
    [
        ("http://localhost:8484/api/v1/cloud/", "http://localhost:8484/api/v1/cloud"),
        ("https://h", "https://h"),
        ("https://H.example:443/x//", "https://h.example/x"),
        (" http://[::1]:80/x ", "http://[::1]/x"),
    ],
)
def test_base_url_is_normalised(given_url: str, base_url: str) -> None:
    assert Settings(base_url=given_url).base_url == base_url


def test_dialect_determines_default_base_url() -> None:
    assert Settings(dialect="anthropic").base_url == "https://api.anthropic.com/v1"
    assert Settings(dialect="anthropic", base_url="http://localhost").base_url == "http://localhost"


def test_default_rate_limits_apply_only_to_public_service_address_of_dialect() -> None:
    own, ours = Settings(), Settings(base_url="http://localhost:8484/api/v1/cloud")
    assert (own.read_limit, own.write_limit) == (50, 20)
    assert (ours.read_limit, ours.write_limit) == (0, 0)
    assert Settings(base_url="https://api.qoder.com/api/v1/cloud/").write_limit == 20
    assert Settings(dialect="anthropic").read_limit == 50
    assert Settings(base_url="https://api.anthropic.com/v1").read_limit == 0
    set_ = Settings(read_rate=0, write_rate=3)
    assert (set_.read_limit, set_.write_limit) == (0, 3)


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("off", None),
        ("127.0.0.1:9464", Address("127.0.0.1", 9464)),
        ("node.example:0", Address("node.example", 0)),
        (":9464", Address(None, 9464)),
        ("[::1]:9464", Address("::1", 9464)),
    ],
)
def test_metrics_listen_is_parsed_into_address(value: str, address: Address | None) -> None:
    assert parse_listen_address(value) == address
    assert Settings(metrics_listen=value).metrics_address == address


@pytest.mark.parametrize("host", ["a" * 64, f"{'b' * 64}.example", "two..dots"])
def test_error_about_invalid_host_name_names_the_setting(host: str) -> None:
    for setting, value in {
        "base_url": f"https://{host}/api",
        "metrics_listen": f"{host}:9464",
    }.items():
        assert get_error_of_invalid_settings(**{setting: value}).problems == (
            f"{setting}: each part of a host name has 1 to 63 characters",
        )


def test_host_with_labels_of_63_characters_is_accepted() -> None:
    host = f"{'a' * 63}.{'b' * 63}."
    settings = Settings(base_url=f"https://{host}", metrics_listen=f"{host}:1")
    assert settings.metrics_address == Address(host, 1)


def test_metrics_server_has_no_address_by_default() -> None:
    assert Settings().metrics_address is None


def test_each_suspicious_setting_gives_a_warning_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Settings().warnings() == ()
    monkeypatch.setenv("WORKPOOL_CONCURENCY", HIDDEN)
    monkeypatch.setenv("WORKPOOL_ZZZ", HIDDEN)
    monkeypatch.setenv("WORKPOOL_CONFIG", "")
    # This variable gets no warning as an unknown setting, because `workpool serve` reads it.
    monkeypatch.setenv("WORKPOOL_SERVE_TOKEN", HIDDEN)
    found = Settings(base_url="http://pool.example", concurrency=100, write_rate=9).warnings()
    assert found == (
        "WORKPOOL_CONCURENCY: no such setting, did you mean WORKPOOL_CONCURRENCY?",
        "WORKPOOL_ZZZ: no such setting",
        "base_url: plain http, so the token can be read on the way",
        "write_rate: 100 sessions send 5.0 heartbeats a second, more than half of 9;"
        " raise lease_ttl or write_rate",
        "write_rate: 100 sessions that end together need 2 writes each, 22.2 s at 9 a second, but"
        " a drain waits 20 s; raise write_rate or drain_timeout, or lower concurrency",
    )


@pytest.mark.parametrize(
    ("lease_ttl", "held", "fitting"), [(10, 9, 90), (60, 54, 540), (600, 540, 5400)]
)
def test_settings_warn_if_write_rate_is_too_low_to_complete_sessions_within_lease(
    lease_ttl: int, held: int, fitting: int
) -> None:
    def list_warnings_except_heartbeats(concurrency: int) -> list[str]:
        settings = Settings(
            lease_ttl=lease_ttl, concurrency=concurrency, write_rate=20, drain_timeout=10_000
        )
        return [each for each in settings.warnings() if "heartbeats" not in each]

    assert list_warnings_except_heartbeats(fitting) == []
    seconds = f"{(fitting + 1) / 10:.1f}"
    assert list_warnings_except_heartbeats(fitting + 1) == [
        f"write_rate: {fitting + 1} sessions that end together need 2 writes each, {seconds} s at"
        f" 20 a second, but their leases are held for {held} s; raise write_rate or lease_ttl, or"
        " lower concurrency"
    ]


def test_settings_warn_if_write_rate_is_too_low_to_complete_sessions_during_drain() -> None:
    assert Settings(write_rate=2, drain_timeout=8).warnings() == ()
    [warning] = Settings(write_rate=2, drain_timeout=7.9).warnings()
    assert "a drain waits 7.9 s; raise write_rate or drain_timeout, or lower conc" in warning


def test_unlimited_write_rate_gives_no_warning() -> None:
    assert Settings(write_rate=0, concurrency=10_000, drain_timeout=0).warnings() == ()


@pytest.mark.parametrize(
    "base_url",
    ["https://h", "http://localhost:1", "http://a.localhost", "http://127.1.2.3", "http://[::1]:1"],
)
def test_plain_http_to_local_host_gives_no_warning(base_url: str) -> None:
    assert Settings(base_url=base_url).warnings() == ()


def test_settings_do_not_warn_if_heartbeats_need_half_of_write_rate_limit() -> None:
    assert Settings(concurrency=100, write_rate=10).warnings() == ()


def test_api_key_is_read_from_setting_or_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("from-file\n")
    assert Settings().read_api_key() is None
    assert Settings(api_key=GIVEN).read_api_key() == GIVEN
    assert Settings(api_key_file=path).read_api_key() == "from-file"
    assert Settings(token=HIDDEN, api_key=GIVEN).read_token() == HIDDEN
    assert get_error_of_invalid_settings(api_key=GIVEN, api_key_file=path).problems == (
        "api_key, api_key_file: set one of the two",
    )


def test_api_key_is_never_shown_by_settings(tmp_path: Path) -> None:
    found = Settings(api_key=HIDDEN)
    for text in (repr(found), str(found), json.dumps(dataclasses.asdict(found), default=str)):
        assert HIDDEN not in text
    wrong = Settings(token=GIVEN, environment_id="env_1", api_key_file=tmp_path / "absent")
    with pytest.raises(SettingsError) as raised:
        wrong.require_connection()
    assert raised.value.problems == (
        f"api_key_file: {tmp_path / 'absent'}: No such file or directory",
    )
