"""`workpool serve`: a process that runs the embedded control plane.

See workpool/docs/cli.md, "`workpool serve`".
"""

import asyncio
import ipaddress
import socket
from pathlib import Path
from typing import Annotated, Final

import orjson
import typer

from workpool.cli import exits, log_config
from workpool.cli.flags import Json
from workpool.cli.help_text import format_examples_section
from workpool.cli.request_log import log_request
from workpool.cli.signals import SignalEvents
from workpool.cli.verbosity import Verbose, is_verbose
from workpool.errors import innermost
from workpool.logs import hide_token
from workpool.pool.lease_renewer import new_event_loop
from workpool.server import (
    DEFAULT_ENVIRONMENT,
    ControlPlane,
    MemoryStore,
    PostgresStore,
    ServeError,
    SqliteStore,
    parse_token_file,
)
from workpool.testing import Clock, Faults
from workpool.testing.fault_plan import FaultPlan, read_fault_plan

Ids = Annotated[
    list[str] | None,
    typer.Option(metavar="ID", help="A self_hosted environment; repeatable. Default: a fixed id."),
]
CloudIds = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID", help="An environment that refuses work calls; repeatable. Default: none."
    ),
]

EXAMPLES: Final = format_examples_section(
    "workpool serve",
    "workpool serve --port 8000 --store queue.db --token-file tokens.txt",
    "workpool serve --host 0.0.0.0 --token-file tokens.txt --environment env_builds",
    "workpool serve --store postgresql://workpool@db.example/queue --token-file tokens.txt",
)
_POSTGRES: Final = ("postgresql://", "postgres://")
RETENTION_MIN: Final = 60
"""Seconds. A worker repeats a stop whose answer was lost, and must still find the item."""


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 = any free one.")] = 8484,
    store: Annotated[
        str,
        typer.Option(
            metavar="memory|FILE|URL",
            envvar="WORKPOOL_SERVE_STORE",
            help="The store of the items: FILE is an SQLite database, a URL `postgresql://…` a "
            "PostgreSQL database that any number of servers share. A URL with a password belongs "
            "into the variable, since the list of processes shows options.",
        ),
    ] = "memory",
    token: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            envvar="WORKPOOL_SERVE_TOKEN",
            help="A token that clients may use; repeatable, and visible in the list of processes. "
            "Default: a random one.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A token on each line, then the environments that it may use. Default: none.",
        ),
    ] = None,
    scale_token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A token for `/scale` only on each line, then the environments that it may read. "
            "Default: none.",
        ),
    ] = None,
    environment: Ids = None,
    cloud_environment: CloudIds = None,
    retention: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=RETENTION_MIN,
            help="The time for which stopped items, sessions and events are kept; at least 60. "
            "Default: 3600 in memory, else 86400.",
        ),
    ] = None,
    migrate: Annotated[
        bool,
        typer.Option(
            "--migrate",
            help="Bring the schema of the PostgreSQL database up to date, and end. Without this "
            "flag, each server does so at its start.",
        ),
    ] = False,
    faults: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The faults to inject, as TOML or JSON. Default: none."),
    ] = None,
    json: Json = False,
    _verbose: Verbose = False,
) -> None:
    """Serve a work queue over HTTP until SIGTERM or SIGINT.

    It speaks both dialects. Without a token, a random one is created and printed in the ready
    line.
    """
    log_config.configure_logging("debug" if is_verbose(context) else "info", "text")
    with exits.exit_on_error():
        if migrate:
            _migrate_database(store)
            return
        grants = dict.fromkeys(token or []) | _read_token_file(token_file, "--token-file")
        scale_grants = _read_token_file(scale_token_file, "--scale-token-file")
        if not grants and not _is_loopback(host):
            raise ServeError(
                f"{host} is not a loopback address: set WORKPOOL_SERVE_TOKEN or give --token-file"
            )
        for each in (*grants, *scale_grants):
            hide_token(each)
        plan = read_fault_plan(faults) if faults is not None else FaultPlan()
        opened = _new_store(store)
        if isinstance(opened, PostgresStore) and plan.needs_in_memory_queue:
            raise ServeError(f"{faults}: no clock_skew and no expired leases with PostgreSQL")
        injected = Faults(plan.seed, remember=False)
        clock = Clock()
        clock.advance(plan.clock_skew)
        middlewares = [injected.middleware] if plan.fault else []
        if is_verbose(context):
            middlewares.insert(0, log_request)
        plane = ControlPlane(
            environments=environment or [DEFAULT_ENVIRONMENT],
            cloud_environments=cloud_environment or [],
            tokens=grants or None,
            scale_tokens=scale_grants,
            store=opened,
            host=host,
            port=port,
            now=None if isinstance(opened, PostgresStore) else clock,
            retention=_retention_seconds(store, retention),
            history_limit=0,  # Keep no history: only tests and the demo read it.
            middlewares=middlewares,
        )
        plan.add_rules_to(injected, plane)
        if faults is not None:
            log_config.log.warning(
                "faults injected", extra={"file": str(faults), "count": len(plan.fault)}
            )
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(
                _serve_until_signal(plane, shown=None if grants else plane.token, as_json=json)
            )


def _migrate_database(store: str) -> None:
    opened = _new_store(store)
    if not isinstance(opened, PostgresStore):
        raise ServeError("--migrate needs a PostgreSQL database as --store")
    number = asyncio.run(opened.migrate())
    typer.echo(f"the schema is up to date; migrations: {number}")


async def _serve_until_signal(plane: ControlPlane, *, shown: str | None, as_json: bool) -> None:
    with SignalEvents() as signals:
        try:
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(_serve_until_failed(plane, shown, as_json=as_json))
                await signals.first.wait()
                # Cancel the task, which may still be reading a large store.
                serving.cancel()
        except BaseExceptionGroup as group_error:
            raise innermost(group_error) from None
        ending = signals.last
        log_config.log.info("serve ends", extra={"signal": ending.name if ending else None})


async def _serve_until_failed(plane: ControlPlane, shown: str | None, *, as_json: bool) -> None:
    async with plane:
        hide_token(plane.token)
        typer.echo(_format_startup_line(plane, shown, as_json=as_json))
        # `wait_for_failure` never returns: it raises the error of a store that fails.
        await plane.engine.wait_for_failure()


def _format_startup_line(plane: ControlPlane, token: str | None, *, as_json: bool) -> str:
    """Return the line that is printed at start: the address, and `token` if it is given."""
    if as_json:
        ready = {
            "base_url": plane.base_url,
            "anthropic_base_url": plane.anthropic_base_url,
            "token": token,
            "environments": plane.environments,
        }
        return orjson.dumps(ready).decode()
    words = [
        "ready",
        f"WORKPOOL_BASE_URL={plane.base_url}",
        f"WORKPOOL_ENVIRONMENT_ID={plane.environments[0]}",
    ]
    return " ".join(words if token is None else [*words, f"WORKPOOL_TOKEN={token}"])


def _read_token_file(file: Path | None, flag: str) -> dict[str, frozenset[str] | None]:
    """Read a token file: the environments that each token may use.

    Return an empty mapping if `file` is None.
    """
    if file is None:
        return {}
    try:
        return parse_token_file(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "not text"
        raise ServeError(f"token file: {file}: {problem} (from {flag})") from None


def _new_store(name: str) -> MemoryStore | SqliteStore | PostgresStore:
    """Create the store that the flag `--store` names."""
    if name == "memory":
        return MemoryStore()
    return PostgresStore(name) if name.startswith(_POSTGRES) else SqliteStore(name)


def _retention_seconds(store: str, seconds: float | None) -> float:
    """Return how long stopped items are kept: `seconds`, or the default of the store if None."""
    if seconds is not None:
        return seconds
    return 3600 if store == "memory" else 86_400


def _is_loopback(host: str) -> bool:
    """Return whether all addresses of `host` are loopback addresses."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(info[4][0]).is_loopback for info in found)
