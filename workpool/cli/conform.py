"""`workpool conform`: check a control plane against the protocol, clause by clause.

See workpool/docs/protocol.md, "Conformance".
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final

import aiohttp
import typer
from yarl import URL

from workpool.cli import exits
from workpool.cli.flags import (
    Config,
    Dialect,
    EnvironmentId,
    FlagSettings,
    Json,
    read_command_settings,
)
from workpool.cli.help_text import format_examples_section
from workpool.cli.output import print_json
from workpool.conformance import (
    CLAUSES,
    Clause,
    EnqueuedItemSource,
    ExistingItemSource,
    Finding,
    ForeignItemsError,
    ItemListRefusedError,
    ItemSource,
    SessionSource,
    Suite,
    Verdict,
    WorkerApi,
)
from workpool.conformance.api import NoAnswerError
from workpool.logs import readable
from workpool.settings import Settings
from workpool.wire.http.environment_proxy import find_proxy_for_url
from workpool.wire.http.rate_limiter import RateLimits

WORKER: Final = "workpool-conform"
DIFFERS: Final = 4
"""Exit status: every clause holds or differs harmlessly."""
UNTRIED: Final = 5
"""Exit status: no clause breaks workers, but some could not be tried."""

_STATUSES: Final = {
    Verdict.HOLDS: exits.OK,
    Verdict.DIFFERS: DIFFERS,
    Verdict.UNTRIED: UNTRIED,
    Verdict.BREAKS: exits.FAILED,
}
_ORDER: Final = list(Verdict)


SEEN_CHARACTERS: Final = 2_000
"""Largest number of characters of an answer that are shown for one clause."""

EXAMPLES: Final = format_examples_section(
    "workpool conform http://127.0.0.1:8484/api/v1/cloud",
    "workpool conform https://queue.example/v1 --dialect anthropic --agent agent_1 --json",
)


class _ConformSettings(FlagSettings):
    """The settings of `workpool conform`; `base_url` is a positional argument of the command."""

    names: ClassVar = {"base_url": "BASE_URL"}


def conform(
    base_url: Annotated[
        str,
        typer.Argument(
            metavar="BASE_URL",
            help="The address of the control plane, with the prefix of the dialect.",
        ),
    ],
    dialect: Dialect = None,
    environment_id: EnvironmentId = None,
    config: Config = None,
    agent: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Create work through sessions of this agent. Default: none."
        ),
    ] = None,
    work_id: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Use this queued item, once; repeatable. Default: none."),
    ] = None,
    test_environment: Annotated[
        bool,
        typer.Option(
            "--test-environment", help="Claim and stop any item that the environment holds."
        ),
    ] = False,
    clause: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Check this clause only; repeatable. Default: all."),
    ] = None,
    json: Json = False,
) -> None:
    """Check a control plane against the protocol, clause by clause.

    It takes at most five minutes, and claims and stops real sessions. An environment with items
    that it did not create is refused. Work is created with the call of `workpool serve`, unless
    --agent or --work-id is given.

    Exit status: 0 all clauses hold, 4 some differ harmlessly, 5 some could not be tried, 1 some
    break workers.
    """
    clauses = _select_clauses(clause)
    with exits.exit_on_error():
        settings = read_command_settings(
            config,
            of=_ConformSettings,
            base_url=base_url,
            dialect=dialect,
            environment_id=environment_id,
        )
        settings.require_connection()
        source = _choose_item_source(agent, work_id)
        findings = asyncio.run(
            _run_suite(settings, clauses, source, work_id or (), test_environment)
        )
    worst = max((each.verdict for each in findings), key=_ORDER.index)
    if json:
        print_json(_make_json_report(settings, findings, worst))
    else:
        _print_findings(findings)
    raise typer.Exit(_STATUSES[worst])


def _select_clauses(names: Sequence[str] | None) -> Sequence[Clause]:
    if not names:
        return CLAUSES
    by_name = {each.name: each for each in CLAUSES}
    for name in names:
        if name not in by_name:
            raise typer.BadParameter(f"{name!r} is no clause of the protocol")
    return [by_name[name] for name in dict.fromkeys(names)]


def _choose_item_source(agent: str | None, work_ids: Sequence[str] | None) -> ItemSource:
    if agent and work_ids:
        raise typer.BadParameter("give --agent or --work-id, not both")
    if work_ids:
        return ExistingItemSource(work_ids)
    return SessionSource(agent) if agent else EnqueuedItemSource()


async def _run_suite(
    settings: Settings,
    clauses: Sequence[Clause],
    source: ItemSource,
    given: Sequence[str],
    test_environment: bool,
) -> list[Finding]:
    context = settings.tls_context()
    connector = aiohttp.TCPConnector() if context is None else aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=find_proxy_for_url(URL(settings.base_url)),
    ) as http:
        api = WorkerApi(
            http,
            settings.base_url,
            settings.dialect,
            settings.environment_id or "",
            token=settings.read_token(),
            worker=settings.worker_id or WORKER,
            headers={
                name: value.get_secret_value() for name, value in settings.extra_headers.items()
            },
            limits=RateLimits(settings.read_limit, settings.write_limit),
        )
        api_key = settings.read_api_key()
        suite = Suite(
            api,
            source,
            creator=None if api_key is None else api.copy_as_application(api_key),
            given=given,
            test_environment=test_environment,
        )
        try:
            return await suite.run(clauses)
        except ForeignItemsError as error:
            typer.echo(
                f"workpool: {readable(str(error))};"
                " --test-environment lets all of them be claimed and stopped",
                err=True,
            )
            refused = isinstance(error, ItemListRefusedError)
            raise typer.Exit(exits.REFUSED if refused else exits.USAGE) from None
        except NoAnswerError as error:
            typer.echo(f"workpool: {settings.base_url}: {readable(str(error))}", err=True)
            raise typer.Exit(exits.FAILED) from None


def _make_json_report(
    settings: Settings, findings: Sequence[Finding], worst: Verdict
) -> dict[str, Any]:
    return {
        "base_url": settings.base_url,
        "dialect": settings.dialect,
        "verdict": worst.value,
        "clauses": [
            {
                "clause": each.clause.name,
                "rule": each.clause.rule,
                "verdict": each.verdict.value,
                "seen": readable(each.seen, SEEN_CHARACTERS),
            }
            for each in findings
        ],
    }


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each clause, ordered by verdict, and the number of clauses per verdict."""
    width = max(len(verdict.value) for verdict in Verdict)
    for verdict in _ORDER:
        for each in findings:
            if each.verdict is verdict:
                seen = f": {readable(each.seen, SEEN_CHARACTERS)}" if each.seen else ""
                typer.echo(f"{verdict.value:<{width}}  {each.clause.name}{seen}")
                if verdict is not Verdict.HOLDS:
                    typer.echo(f"{'':<{width}}  {each.clause.rule}")
    counts = Counter(each.verdict for each in findings)
    typer.echo(", ".join(f"{counts[each]} {each.value}" for each in _ORDER if counts[each]))
