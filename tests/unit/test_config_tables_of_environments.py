"""The tables `[workpool.environments.ID]`: their values, precedence, and error messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from workpool.errors import SettingsError
from workpool.settings import PROCESS_SETTINGS, Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("environment_without_settings")

HIDDEN = "hunter2-hunter2"
TWO = """
[workpool]
plugins = ["reports"]
concurrency = 10
lease_ttl = 30

[workpool.environments.env_a]
token_file = "a.token"

[workpool.environments.env_b]
token_file = "b.token"
concurrency = 4
lease_ttl = 90
plugins = ["chat"]
"""


def collect_settings_problems(read: Callable[..., object], **values: Any) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as raised:
        read(**values)
    assert HIDDEN not in str(raised.value)
    return raised.value.problems


def test_each_environment_gets_settings_of_its_own_table(
    write_config: Callable[[str], Path],
) -> None:
    process, (first, second) = Settings.of_environments(config=write_config(TWO))
    assert (process.environment_id, process.concurrency) == (None, 10)
    assert (first.environment_id, second.environment_id) == ("env_a", "env_b")
    assert (str(first.token_file), str(second.token_file)) == ("a.token", "b.token")
    assert (first.lease_ttl, second.lease_ttl) == (30, 90)
    assert (first.concurrency, second.concurrency) == (10, 4)
    assert (first.plugins, second.plugins) == (("reports",), ("chat",))


def test_config_file_without_environment_tables_has_no_environments(
    write_config: Callable[[str], Path],
) -> None:
    process, environments = Settings.of_environments(
        config=write_config("[workpool]\nconcurrency = 3")
    )
    assert (process.concurrency, environments) == (3, ())


@pytest.mark.parametrize("by_variable", [False, True])
def test_environment_id_selects_table_of_that_environment(
    write_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, *, by_variable: bool
) -> None:
    values = {} if by_variable else {"environment_id": "env_b"}
    if by_variable:
        monkeypatch.setenv("WORKPOOL_ENVIRONMENT_ID", "env_b")
    chosen, none = Settings.of_environments(config=write_config(TWO), **values)
    assert none == ()
    assert chosen.environment_ids == ()
    assert (chosen.environment_id, chosen.lease_ttl) == ("env_b", 90)
    assert chosen == Settings(config=write_config(TWO), **values)


def test_environment_table_overrides_environment_variable_but_not_keyword_argument(
    write_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKPOOL_LEASE_TTL", "40")
    monkeypatch.setenv("WORKPOOL_TOKEN", HIDDEN)
    _, (first, second) = Settings.of_environments(config=write_config(TWO))
    assert (first.lease_ttl, second.lease_ttl) == (40, 90)
    assert (first.token, str(first.token_file)) == (None, "a.token")
    _, given = Settings.of_environments(config=write_config(TWO), lease_ttl=50)
    assert [each.lease_ttl for each in given] == [50, 50]


def test_concurrency_of_environment_never_exceeds_concurrency_of_whole_process(
    write_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKPOOL_CONCURRENCY", "3")
    process, environments = Settings.of_environments(config=write_config(TWO))
    assert (process.concurrency, [each.concurrency for each in environments]) == (3, [3, 3])


def test_concurrency_below_number_of_environments_is_refused(
    write_config: Callable[[str], Path],
) -> None:
    problems = collect_settings_problems(
        Settings.of_environments, config=write_config(TWO), concurrency=1
    )
    assert problems == ("concurrency: must be 2 or more, one for each environment",)


def test_error_in_environment_table_names_file_table_and_key(
    write_config: Callable[[str], Path],
) -> None:
    path = write_config(f"""
        [workpool]
        block_ms = 5000
        [workpool.environments.env_a]
        concurrency = "{HIDDEN}"
        [workpool.environments.env_b]
        consurrency = 3
        token = "x"
        token_file = "y"
        """)
    assert collect_settings_problems(Settings.of_environments, config=path, block_ms=10) == (
        "concurrency: must be a whole number, 1 or more "
        f"(from {path} [workpool.environments.env_a])",
        f"token, token_file: set one of the two (from {path} [workpool.environments.env_b])",
        "consurrency: no such setting, did you mean concurrency? "
        f"(from {path} [workpool.environments.env_b])",
    )


@pytest.mark.parametrize("name", [*sorted(PROCESS_SETTINGS), "environment_id", "plugin"])
def test_setting_of_whole_process_in_environment_table_is_refused(
    write_config: Callable[[str], Path], name: str
) -> None:
    path = write_config(f"[workpool.environments.env_a]\n{name} = 1\n")
    for read in (
        Settings.of_environments,
        lambda **given: Settings(environment_id="env_a", **given),
    ):
        problems = collect_settings_problems(read, config=path)
        assert problems[0].startswith(f"{name}: ")
        assert problems[0].endswith(f"(from {path} [workpool.environments.env_a])")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("environments = 3", "[workpool.environments] holds something else than tables"),
        ("[workpool.environments]\na = 3", "[workpool.environments] holds something else than"),
        ("[[workpool.environments]]\na = 3", "[workpool.environments] holds something else than"),
        ("[workpool.environments]", "[workpool.environments] has no table of an environment"),
        ("[workpool.environment.a]", "are [workpool.environments.ID], with an s"),
        (
            "[workpool.environments.a]\n[workpool.environments.a]",
            "a table or key is given twice (at line 3, column 25)",
        ),
    ],
)
def test_malformed_environment_tables_are_refused_with_file_name(
    write_config: Callable[[str], Path], text: str, problem: str
) -> None:
    path = write_config(f"[workpool]\n{text}")
    [found] = collect_settings_problems(Settings, config=path)
    assert str(path) in found
    assert problem in found


def test_environment_table_named_by_invalid_id_is_refused(
    write_config: Callable[[str], Path],
) -> None:
    path = write_config('[workpool.environments."a b"]')
    [problem] = collect_settings_problems(Settings.of_environments, config=path)
    assert problem.startswith("environment_id: must be 1 to 128 letters, digits, _ or - (from ")


def test_config_file_with_environment_id_and_environment_tables_is_refused(
    write_config: Callable[[str], Path],
) -> None:
    path = write_config(TWO.replace("[workpool]", '[workpool]\nenvironment_id = "env_a"'))
    [problem] = collect_settings_problems(Settings.of_environments, config=path)
    assert "the tables [workpool.environments.ID] name the environments" in problem
    assert str(path) in problem


def test_environment_id_without_table_in_file_is_refused(
    write_config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKPOOL_ENVIRONMENT_ID", HIDDEN)
    path = write_config(TWO)
    assert collect_settings_problems(Settings, config=path) == (
        f"environment_id: {path} has tables of env_a, env_b, and none of this one "
        "(from WORKPOOL_ENVIRONMENT_ID)",
    )


def test_error_about_missing_environment_id_lists_environments_of_config_file(
    write_config: Callable[[str], Path],
) -> None:
    settings = Settings(config=write_config(TWO))
    assert settings.environment_ids == ("env_a", "env_b")
    assert collect_settings_problems(settings.require_connection)[0] == (
        "environment_id: not set (set WORKPOOL_ENVIRONMENT_ID to one of env_a, env_b)"
    )


def test_environment_gets_no_options_of_plugin_that_only_another_environment_uses(
    write_config: Callable[[str], Path],
) -> None:
    tables = "[workpool.plugin.reports]\n[workpool.plugin.chat]\n[workpool.plugin.nobody]\n"
    _, (first, second) = Settings.of_environments(config=write_config(TWO + tables))
    assert set(first.plugin_options) == {"reports", "nobody"}
    assert set(second.plugin_options) == {"chat", "nobody"}
    alone = Settings(config=write_config(f'[workpool]\nplugins = ["a"]\n{tables}'))
    assert set(alone.plugin_options) == {"reports", "chat", "nobody"}
