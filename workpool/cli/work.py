"""`workpool work …`: reads and changes a queue; each command makes one call of the protocol."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer

from workpool.cli import exits
from workpool.cli.flags import (
    BaseUrl,
    Config,
    EnvironmentId,
    Json,
    Metadata,
    parse_pairs,
    read_settings,
)
from workpool.cli.help_text import PLAIN, examples
from workpool.cli.output import fields_of, pairs_text, print_json, print_pairs, print_rows
from workpool.errors import RefusedError
from workpool.settings import Settings
from workpool.wire import protocol
from workpool.wire.client import WorkClient
from workpool.wire.items import WorkItem

T = TypeVar("T")

app = typer.Typer(
    name="work",
    add_completion=False,
    no_args_is_help=True,
    help="Read and change a queue.",
    epilog=examples("workpool work list", "workpool work get work_1 --json"),
    **PLAIN,
)

WorkId = Annotated[str, typer.Argument(metavar="ID", help="The id of an item.")]


def _settings(config: Path | None, environment_id: str | None, base_url: str | None) -> Settings:
    """Read the settings of the queue; an error ends the command."""
    with exits.reported():
        return read_settings(config, environment_id=environment_id, base_url=base_url)


@app.command("list", epilog=examples("workpool work list", "workpool work list --limit 100 --json"))
def list_items(
    limit: Annotated[int, typer.Option(min=1, help="The number of items at most.")] = 20,
    after: Annotated[
        str | None, typer.Option(metavar="ID", help="Only items after this one. Default: all.")
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only the last items before this one. Default: all."),
    ] = None,
    json: Json = False,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
) -> None:
    """List items, oldest first."""
    settings = _settings(config, environment_id, base_url)

    async def collect(client: WorkClient) -> list[WorkItem]:
        found = client.list(limit=limit, after_id=after, before_id=before)
        return [item async for item in found]

    if after and before:
        raise typer.BadParameter("give --after or --before, not both")
    items = _ask(settings, collect)
    if json:
        print_json([fields_of(item) for item in items])
        return
    print_rows(
        ("id", "type", "state", "created", "session", "metadata"),
        [
            (i.id, i.type, i.state, i.created_at, i.session_id, pairs_text(i.metadata))
            for i in items
        ],
    )


@app.command(epilog=examples("workpool work get work_1", "workpool work get work_1 --json"))
def get(
    work_id: WorkId,
    json: Json = False,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
) -> None:
    """Show one item."""
    settings = _settings(config, environment_id, base_url)
    _show(_ask(settings, lambda client: client.get(work_id)), as_json=json)


@app.command(
    epilog=examples(
        "workpool work enqueue --metadata job=daily-report",
        "workpool work enqueue --count 10 --script session.json",
    )
)
def enqueue(
    count: Annotated[
        int, typer.Option(min=1, max=protocol.ENQUEUE_COUNT_MAX, help="The number of items.")
    ] = 1,
    metadata: Metadata = None,
    work_type: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="The type of the items. Default: session."),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A JSON file with the tool uses of a scripted session. Default: none.",
        ),
    ] = None,
    json: Json = False,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
) -> None:
    """Create items on a `workpool serve`, and print the id of each on a line."""
    settings = _settings(config, environment_id, base_url)
    pairs = parse_pairs(metadata)
    entries = _read_script(script)
    items = _ask(
        settings,
        lambda client: client.enqueue(count, pairs, item_type=work_type, script=entries),
    )
    if json:
        print_json([fields_of(item) for item in items])
        return
    for item in items:
        typer.echo(item.id)


@app.command(
    epilog=examples(
        "workpool work update work_1 priority=high", "workpool work update work_1 --delete priority"
    )
)
def update(
    work_id: WorkId,
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Metadata to set.")
    ] = None,
    delete: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key to delete; repeatable. Default: none."),
    ] = None,
    json: Json = False,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
) -> None:
    """Change an item's metadata."""
    settings = _settings(config, environment_id, base_url)
    patch: dict[str, str | None] = {**parse_pairs(pairs), **dict.fromkeys(delete or ())}
    if not patch:
        raise typer.BadParameter("give KEY=VALUE or --delete KEY")
    _show(_ask(settings, lambda client: client.update_metadata(work_id, patch)), as_json=json)


@app.command(epilog=examples("workpool work stop work_1", "workpool work stop work_1 --force"))
def stop(
    work_id: WorkId,
    force: Annotated[
        bool, typer.Option("--force", help="End the item now, without its worker.")
    ] = False,
    json: Json = False,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
) -> None:
    """Stop an item: ask its worker to end it, or with --force end it now."""
    settings = _settings(config, environment_id, base_url)

    async def ask(client: WorkClient) -> WorkItem:
        stopped = await client.stop(work_id, force)
        return stopped or await _read(client, work_id)  # some control planes answer without a body

    _show(_ask(settings, ask), as_json=json)


@app.command(epilog=examples("workpool work stats", "workpool work stats --json"))
def stats(
    json: Json = False,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
) -> None:
    """Show the statistics of the queue."""
    settings = _settings(config, environment_id, base_url)
    found = fields_of(_ask(settings, lambda client: client.stats()))
    if json:
        print_json(found)
    else:
        print_pairs(found)


def _ask(settings: Settings, call: Callable[[WorkClient], Awaitable[T]]) -> T:
    """Make a call with a client of its own. An error ends the command."""

    async def ask() -> T:
        async with WorkClient(settings) as client:
            return await call(client)

    with exits.reported():
        try:
            return asyncio.run(ask())
        except ValueError as error:  # an id with characters that no id may have
            raise typer.BadParameter(str(error)) from None


async def _read(client: WorkClient, work_id: str) -> WorkItem:
    """Read an item; with a key that may not read it, look it up in the list."""
    try:
        return await client.get(work_id)
    except RefusedError as error:
        if error.status not in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            raise
        async for item in client.list():
            if item.id == work_id:
                return item
        raise


def _show(item: WorkItem, *, as_json: bool) -> None:
    found = fields_of(item)
    if as_json:
        print_json(found)
    else:
        print_pairs(found | {"metadata": pairs_text(item.metadata)})


def _read_script(path: Path | None) -> Sequence[dict[str, Any]] | None:
    if path is None:
        return None
    try:
        entries = orjson.loads(path.read_bytes())
    except OSError as error:
        raise typer.BadParameter(f"--script: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise typer.BadParameter(f"--script: not JSON ({error})") from None
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        return entries
    raise typer.BadParameter("--script: not a list of objects")
