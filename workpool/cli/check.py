"""`workpool check`: a check that `workpool run` would work here, with advice for each problem.

Claims and changes nothing: it reads one item of the list. See workpool/docs/operating.md,
"Connect to a service".
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, Literal

import aiohttp
import typer

from workpool.cli import exits
from workpool.cli.flags import (
    Config,
    Json,
    PluginNames,
    add_setting_flags,
    read_environments,
)
from workpool.cli.help_text import format_examples_section
from workpool.cli.output import print_json
from workpool.cli.plugin_list import load_plugins
from workpool.cli.rate_limit_groups import find_shared_rate_limits
from workpool.errors import ControlPlaneError, PluginError, SettingsError
from workpool.logs import readable
from workpool.settings import Settings
from workpool.wire.client import WorkClient
from workpool.wire.client_dialects import DIALECTS

SKEW_SECONDS: Final = 5.0
"""The accepted error of the wall clock. It affects no lease, only ages and latencies."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check, which is one line of the report of `workpool check`.

    Attributes:
        exit: The exit status of the command if this is the first failed check.
        environment_id: The environment that was checked; None unless the file has several.
    """

    check: str
    status: Literal["ok", "warn", "FAIL"]
    message: str
    advice: str = ""
    exit: int = exits.OK
    environment_id: str | None = None


EXAMPLES: Final = format_examples_section(
    "workpool check reports",
    "workpool check --config workpool.toml --json",
    "workpool check reports --base-url http://127.0.0.1:8484/api/v1/cloud",
)


@add_setting_flags
def check(
    plugins: PluginNames = None,
    config: Config = None,
    json: Json = False,
    *,
    flags: Mapping[str, Any],
) -> None:
    """Check settings, plugins, credentials, connection and clock.

    Says what to do. Exit status: 0 no problem, 2 settings or plugins, 3 refused by the control
    plane, 1 other problems.
    """
    findings: list[CheckResult] = []
    try:
        settings, environments = read_environments(config, plugins=plugins, **flags)
    except SettingsError as error:
        findings += _find_failed_results("settings", error)
    else:
        findings += _run_checks_of_all_environments(settings, environments)
    status = next((each.exit for each in findings if each.exit), exits.OK)
    if json:
        shown = [_result_as_json(each) for each in findings]
        print_json({"ok": status == exits.OK, "checks": shown})
    else:
        for each in findings:
            advice = f"; {each.advice}" if each.advice else ""
            environment = "" if each.environment_id is None else f"{each.environment_id}: "
            typer.echo(
                f"{each.status:<4}  {environment}{each.check}: {readable(each.message)}{advice}"
            )
    raise typer.Exit(status)


def _result_as_json(result: CheckResult) -> dict[str, object]:
    """Return the result of a check as a JSON object, without its field `exit`."""
    hidden = {"exit"} if result.environment_id is not None else {"exit", "environment_id"}
    return {name: value for name, value in asdict(result).items() if name not in hidden}


def _run_checks_of_all_environments(
    settings: Settings, environments: Sequence[Settings]
) -> Iterator[CheckResult]:
    """Check each environment of the TOML file, or `settings` if the file has no environments."""
    if not environments:
        yield from _run_checks_of_environment(settings)
        return
    usable: list[Settings] = []
    for each in environments:
        found = [
            replace(one, environment_id=each.environment_id)
            for one in _run_checks_of_environment(each)
        ]
        yield from found
        if not any(one.check == "credentials" and one.exit for one in found):
            usable.append(each)
    try:
        find_shared_rate_limits(usable)
    except SettingsError as error:
        yield from _find_failed_results("rate limits", error)


def _run_checks_of_environment(settings: Settings) -> Iterator[CheckResult]:
    warnings = settings.warnings()
    yield from (CheckResult("settings", "warn", warning) for warning in warnings)
    if not warnings:
        yield CheckResult("settings", "ok", "can be used")
    yield _check_plugins(settings)
    try:
        settings.require_connection()
    except SettingsError as error:
        yield from _find_failed_results("credentials", error)
        return
    yield CheckResult("credentials", "ok", "there is a token")
    yield from asyncio.run(_check_connection_and_clock(settings))


def _find_failed_results(check: str, error: SettingsError) -> Iterator[CheckResult]:
    return (CheckResult(check, "FAIL", each, exit=exits.USAGE) for each in error.problems)


def _check_plugins(settings: Settings) -> CheckResult:
    try:
        loaded = load_plugins(settings)
    except PluginError as error:
        exits.print_plugin_traceback(error)
        return CheckResult("plugins", "FAIL", str(error), "see workpool plugins", exits.USAGE)
    names = ", ".join(plugin.name for plugin in loaded.active_plugins())
    if not loaded.can_supply_handler:
        problem = f"no plugin supplies a handler: {names or 'no plugin is active'}"
        return CheckResult("plugins", "warn", problem, "name a plugin, or set WORKPOOL_PLUGINS")
    return CheckResult("plugins", "ok", names)


async def _check_connection_and_clock(settings: Settings) -> list[CheckResult]:
    dates: list[str] = []

    async def collect_date_of_response(
        _: object, __: object, end: aiohttp.TraceRequestEndParams
    ) -> None:
        dates.append(end.response.headers.get("Date", ""))

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(collect_date_of_response)
    async with (
        aiohttp.ClientSession(trust_env=True, trace_configs=[trace]) as session,
        WorkClient(settings, session=session) as client,
    ):
        started = time.monotonic()
        error: ControlPlaneError | None = None
        try:
            # Use a list call to test the connection: some credentials cannot read the statistics.
            async for _ in client.list(limit=1):
                pass
        except ControlPlaneError as failure:
            error = failure
        seconds = time.monotonic() - started
    findings = [_make_connection_result(settings, error, seconds)]
    if dates and dates[-1]:
        findings.append(check_clock_difference(dates[-1], datetime.now(UTC), seconds))
    return findings


def _make_connection_result(
    settings: Settings, error: ControlPlaneError | None, seconds: float
) -> CheckResult:
    if error is None:
        return CheckResult("control plane", "ok", f"answered in {seconds * 1000:.0f} ms")
    advice = exits.ADVICE.get(error.status or 0, "check base_url, proxies and the network")
    if error.status is None and settings.base_url == DIALECTS[settings.dialect].base_url:
        advice += "; base_url is the service's own, since it is not set"
    return CheckResult("control plane", "FAIL", str(error), advice, exits.find_exit_status(error))


def check_clock_difference(date: str, now: datetime, seconds: float) -> CheckResult:
    """Compare this machine's clock with a `Date` header that is at most `seconds` old."""
    try:
        skew = (now - parsedate_to_datetime(date)).total_seconds()
    except (TypeError, ValueError):
        return CheckResult("clock", "warn", "the control plane sends no date that can be read")
    # The server rounds `Date` down to a whole second, and the header is up to `seconds` old. So a
    # correct clock is ahead of the header by 0 to 1 + `seconds`. `off` is the number of seconds
    # by which `skew` lies outside of this range.
    off = max(0.0, abs(skew - 0.5 - seconds / 2) - 0.5 - seconds / 2)
    if off <= SKEW_SECONDS:
        return CheckResult("clock", "ok", f"within {SKEW_SECONDS:.0f} s of the control plane's")
    ahead = "ahead of" if skew > 0 else "behind"
    return CheckResult(
        "clock",
        "warn",
        f"{off:.0f} s {ahead} the control plane's",
        "synchronise it: ages and latencies in metrics are wrong",
    )
