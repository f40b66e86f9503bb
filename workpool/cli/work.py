"""`workpool work …`: commands that read and change a queue."""

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import orjson
import typer

from workpool.cli import exits
from workpool.cli.flags import (
    BaseUrl,
    Config,
    EnvironmentId,
    Json,
    Metadata,
    parse_key_value_pairs,
    read_command_settings,
)
from workpool.cli.help_text import PLAIN, format_examples_section
from workpool.cli.output import (
    convert_to_protocol_fields,
    format_key_value_pairs,
    print_json,
    print_names_and_values,
    print_rows,
)
from workpool.errors import RefusedError
from workpool.logs import escape_text
from workpool.settings import Settings
from workpool.wire import protocol
from workpool.wire.client import WorkClient
from workpool.wire.item_search import FoundItems, ItemSearch
from workpool.wire.items import WorkItem

T = TypeVar("T")

WATCH_SECONDS: Final = 2.0
CLEAR: Final = "\x1b[2J\x1b[H"
"""Clears a terminal."""
NO_SUCH_CALL: Final = {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}
"""The answers of a control plane that does not know a call; it knows the environment."""

app = typer.Typer(
    name="work",
    add_completion=False,
    no_args_is_help=True,
    help="Read and change a queue.",
    epilog=format_examples_section("workpool work list", "workpool work get work_1 --json"),
    **PLAIN,
)

WorkId = Annotated[str, typer.Argument(metavar="ID", help="The id of an item.")]


def _read_queue_settings(
    config: Path | None, environment_id: str | None, base_url: str | None
) -> Settings:
    """Read the settings of the queue; an error ends the command."""
    with exits.exit_on_error():
        return read_command_settings(config, environment_id=environment_id, base_url=base_url)


@app.command(
    "list",
    epilog=format_examples_section(
        "workpool work list",
        "workpool work list --failed --newest --limit 5",
        "workpool work list --state active --watch",
    ),
)
def list_items(
    limit: Annotated[int, typer.Option(min=1, help="The number of items at most.")] = 20,
    state: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(protocol.STATES), help="Only items in this state. Default: any."
        ),
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only items that were stopped with an error.")
    ] = False,
    newest: Annotated[bool, typer.Option("--newest", help="The newest items first.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="List again every two seconds, until a signal.")
    ] = False,
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
    """List items, oldest first, and print to stderr how many were read.

    One call reads 10,000 items at most. `workpool serve` selects and orders items itself; from
    another control plane, the selection is made from the items that were read.
    """
    if state is not None and state not in protocol.STATES:
        raise typer.BadParameter(f"--state: one of {', '.join(protocol.STATES)}")
    if after and before:
        raise typer.BadParameter("give --after or --before, not both")
    settings = _read_queue_settings(config, environment_id, base_url)
    search = ItemSearch(limit, state, failed, newest)

    async def find_items(client: WorkClient) -> FoundItems:
        return await client.find(search, after_id=after, before_id=before)

    if not watch:
        _print_items(_call_control_plane(settings, find_items), as_json=json)
        return
    try:
        while True:
            found = _call_control_plane(settings, find_items)
            if sys.stdout.isatty():
                typer.echo(CLEAR, nl=False)
            _print_items(found, as_json=json)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        raise typer.Exit(exits.SIGNALLED + signal.SIGINT) from None


def _print_items(found: FoundItems, *, as_json: bool) -> None:
    if as_json:
        print_json([convert_to_protocol_fields(item) for item in found.items])
    else:
        print_rows(
            ("id", "type", "state", "created", "session", "metadata"),
            [
                (
                    i.id,
                    i.type,
                    i.state,
                    i.created_at,
                    i.session_id,
                    format_key_value_pairs(i.metadata),
                )
                for i in found.items
            ],
        )
    rest = "" if found.complete else f"; there are more, next to {found.last_id}"
    typer.echo(f"workpool: {len(found.items)} shown of {found.read} items read{rest}", err=True)


@app.command(
    "get",
    epilog=format_examples_section("workpool work get work_1", "workpool work get work_1 --json"),
)
def show_item(
    work_id: WorkId,
    json: Json = False,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
) -> None:
    """Show one item."""
    settings = _read_queue_settings(config, environment_id, base_url)
    _print_item(_call_control_plane(settings, lambda client: client.get(work_id)), as_json=json)


@app.command(
    "enqueue",
    epilog=format_examples_section(
        "workpool work enqueue --metadata job=daily-report",
        "workpool work enqueue --count 10 --script session.json",
    ),
)
def enqueue_items(
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
    """Create items in a queue of `workpool serve`, and print their ids, one a line."""
    settings = _read_queue_settings(config, environment_id, base_url)
    pairs = parse_key_value_pairs(metadata)
    entries = _read_tool_use_script(script)
    items = _call_control_plane(
        settings,
        lambda client: client.enqueue(count, pairs, item_type=work_type, script=entries),
    )
    if json:
        print_json([convert_to_protocol_fields(item) for item in items])
        return
    for item in items:
        typer.echo(item.id)


@app.command(
    "update",
    epilog=format_examples_section(
        "workpool work update work_1 priority=high", "workpool work update work_1 --delete priority"
    ),
)
def update_item(
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
    settings = _read_queue_settings(config, environment_id, base_url)
    patch: dict[str, str | None] = {**parse_key_value_pairs(pairs), **dict.fromkeys(delete or ())}
    if not patch:
        raise typer.BadParameter("give KEY=VALUE or --delete KEY")
    _print_item(
        _call_control_plane(settings, lambda client: client.update_metadata(work_id, patch)),
        as_json=json,
    )


@app.command("retry", epilog=format_examples_section("workpool work retry work_1"))
def retry_item(
    work_id: WorkId,
    json: Json = False,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
) -> None:
    """Create a copy of a stopped item, and print its id.

    The copy has the type and the metadata of the item, without those of workpool, and
    `workpool.retry_of`. It belongs to a new session. Only `workpool serve` has a call for this.
    """
    settings = _read_queue_settings(config, environment_id, base_url)
    item = _call_control_plane(settings, lambda client: _read_or_find_item(client, work_id))
    if item.state != protocol.STOPPED:
        typer.echo(f"workpool: {item.id} is {item.state}; only a stopped item is retried", err=True)
        raise typer.Exit(exits.FAILED)
    metadata = {
        key: value
        for key, value in item.metadata.items()
        if not key.startswith(protocol.OUR_METADATA)
    }

    async def create_copy_of_item(client: WorkClient) -> WorkItem | None:
        try:
            [copy] = await client.enqueue(
                metadata={**metadata, protocol.OUR_RETRY: item.id}, item_type=item.type
            )
        except RefusedError as error:
            if error.status not in NO_SUCH_CALL:
                raise
            return None
        return copy

    copy = _call_control_plane(settings, create_copy_of_item)
    if copy is None:
        typer.echo(
            "workpool: this control plane has no call that creates items. Create a session for the "
            "same work in your application or with the service's API; it had the metadata: "
            f"{escape_text(format_key_value_pairs(metadata)) or 'none'}",
            err=True,
        )
        raise typer.Exit(exits.REFUSED)
    if json:
        print_json(convert_to_protocol_fields(copy))
    else:
        typer.echo(copy.id)


@app.command(
    "stop",
    epilog=format_examples_section(
        "workpool work stop work_1", "workpool work stop work_1 --force"
    ),
)
def stop_item(
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
    settings = _read_queue_settings(config, environment_id, base_url)

    async def stop_then_read_item(client: WorkClient) -> WorkItem:
        stopped = await client.stop(work_id, force)
        # Some control planes answer a stop without a body. Then read the item with another call.
        return stopped or await _read_or_find_item(client, work_id)

    _print_item(_call_control_plane(settings, stop_then_read_item), as_json=json)


@app.command(
    "stats", epilog=format_examples_section("workpool work stats", "workpool work stats --json")
)
def show_stats(
    json: Json = False,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
) -> None:
    """Show the statistics of the queue."""
    settings = _read_queue_settings(config, environment_id, base_url)
    found = convert_to_protocol_fields(_call_control_plane(settings, lambda client: client.stats()))
    if json:
        print_json(found)
    else:
        print_names_and_values(found)


def _call_control_plane(settings: Settings, call: Callable[[WorkClient], Awaitable[T]]) -> T:
    """Make one call with a new client, and return its result; an error ends the command."""

    async def call_with_new_client() -> T:
        async with WorkClient(settings) as client:
            return await call(client)

    with exits.exit_on_error():
        try:
            return asyncio.run(call_with_new_client())
        # The client raises ValueError if the id from the command line is malformed.
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None


async def _read_or_find_item(client: WorkClient, work_id: str) -> WorkItem:
    """Read an item; if the credential cannot read single items, find the item in the list."""
    try:
        return await client.get(work_id)
    except RefusedError as error:
        if error.status not in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            raise
        async for item in client.list():
            if item.id == work_id:
                return item
        raise


def _print_item(item: WorkItem, *, as_json: bool) -> None:
    found = convert_to_protocol_fields(item)
    if as_json:
        print_json(found)
    else:
        print_names_and_values(found | {"metadata": format_key_value_pairs(item.metadata)})


def _read_tool_use_script(path: Path | None) -> Sequence[dict[str, Any]] | None:
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
