"""`workpool work …`: reads and changes a queue; each command makes one call of the protocol."""

import asyncio
import functools
import inspect
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
from workpool.cli.output import fields_of, pairs_text, print_json, print_pairs, print_rows
from workpool.errors import RefusedError
from workpool.settings import Settings
from workpool.wire import protocol
from workpool.wire.client import WorkClient
from workpool.wire.items import WorkItem

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="Read and change a queue.")

WorkId = Annotated[str, typer.Argument(metavar="ID", help="The id of an item.")]


def _connected(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select a queue to a command, which gets the settings first."""

    def connect(
        config: Config = None,
        environment_id: EnvironmentId = None,
        base_url: BaseUrl = None,
        **options: Any,
    ) -> None:
        with exits.reported():
            settings = read_settings(config, environment_id=environment_id, base_url=base_url)
        command(settings, **options)

    functools.update_wrapper(connect, command, assigned=("__name__", "__doc__"))
    shared = list(inspect.signature(connect, follow_wrapped=False).parameters.values())[:-1]
    own = list(inspect.signature(command).parameters.values())[1:]
    both = [each.replace(kind=each.KEYWORD_ONLY) for each in (*own, *shared)]
    connect.__annotations__ = {each.name: each.annotation for each in both}
    vars(connect)["__signature__"] = inspect.Signature(both)
    return connect


@app.command("list")
@_connected
def list_items(
    settings: Settings,
    limit: Annotated[int, typer.Option(min=1, help="The number of items at most.")] = 20,
    after: Annotated[
        str | None, typer.Option(metavar="ID", help="Only items after this one.")
    ] = None,
    before: Annotated[
        str | None, typer.Option(metavar="ID", help="Only the last items before this one.")
    ] = None,
    json: Json = False,
) -> None:
    """List items, oldest first."""

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


@app.command()
@_connected
def get(settings: Settings, work_id: WorkId, json: Json = False) -> None:
    """Show one item."""
    _show(_ask(settings, lambda client: client.get(work_id)), as_json=json)


@app.command()
@_connected
def enqueue(
    settings: Settings,
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
        typer.Option(metavar="FILE", help="A JSON file with the tool uses of a scripted session."),
    ] = None,
    json: Json = False,
) -> None:
    """Create items on a `workpool serve`, and print the id of each on a line."""
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


@app.command()
@_connected
def update(
    settings: Settings,
    work_id: WorkId,
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Metadata to set.")
    ] = None,
    delete: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="A key to delete; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Change an item's metadata."""
    patch: dict[str, str | None] = {**parse_pairs(pairs), **dict.fromkeys(delete or ())}
    if not patch:
        raise typer.BadParameter("give KEY=VALUE or --delete KEY")
    _show(_ask(settings, lambda client: client.update_metadata(work_id, patch)), as_json=json)


@app.command()
@_connected
def stop(
    settings: Settings,
    work_id: WorkId,
    force: Annotated[
        bool, typer.Option("--force", help="End the item now, without its worker.")
    ] = False,
    json: Json = False,
) -> None:
    """Stop an item: ask its worker to end it, or with --force end it now."""

    async def ask(client: WorkClient) -> WorkItem:
        stopped = await client.stop(work_id, force)
        return stopped or await _read(client, work_id)  # some control planes answer without it

    _show(_ask(settings, ask), as_json=json)


@app.command()
@_connected
def stats(settings: Settings, json: Json = False) -> None:
    """Show the statistics of the queue."""
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
        except ValueError as error:  # an id with characters that no id has
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
