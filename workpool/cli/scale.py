"""`workpool scale`: a process that serves the load of a fleet to autoscalers.

Only this process needs the credential of the control plane; autoscalers need none. See
workpool/docs/operating.md, "`workpool scale`".
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Final

import typer
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workpool.cli import exits, log_config
from workpool.cli.flags import (
    METAVARS,
    BaseUrl,
    Config,
    EnvironmentId,
    read_environments,
    require_connection_settings,
)
from workpool.cli.fleet_reader import FleetReader
from workpool.cli.fleet_scaling import FleetScaling
from workpool.cli.help_text import format_examples_section
from workpool.cli.rate_limit_groups import find_shared_rate_limits
from workpool.cli.signals import SignalEvents
from workpool.cli.verbosity import Verbose, is_verbose
from workpool.errors import SettingsError, innermost
from workpool.exporter import Exporter
from workpool.pool.lease_renewer import new_event_loop
from workpool.scaling import FLEET_NUMBERS, REPLICAS_MAX, ReplicaRule
from workpool.settings import Settings
from workpool.wire.client import WorkClient

SCALE_LISTEN: Final = "127.0.0.1:9465"
METRIC_PREFIX: Final = "workpool_fleet_"
"""The beginning of the names of the metrics; the key in the JSON of `/scale` follows."""
EXAMPLES: Final = format_examples_section(
    "workpool scale",
    "workpool scale --config workpool.toml --metrics-listen :9465 --max-replicas 20",
)


def scale(
    context: typer.Context,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            metavar=METAVARS["metrics_listen"],
            help=f"The address of `/scale`, `/metrics`, `/healthz` and `/readyz`. Default: the "
            f"setting, else {SCALE_LISTEN}. Variable: `WORKPOOL_METRICS_LISTEN`.",
        ),
    ] = None,
    slots_per_worker: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The sessions of one worker at once. Default: the setting `concurrency`, less one "
            "for each further environment.",
        ),
    ] = None,
    min_replicas: Annotated[int, typer.Option(min=0, help="The workers without work.")] = 0,
    max_replicas: Annotated[
        int, typer.Option(min=0, help="The workers for any load.")
    ] = REPLICAS_MAX,
    interval: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=1, max=3600, help="The time between two readings."),
    ] = 15.0,
    max_age: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            max=86_400,
            help="The age after which the last numbers are not given anymore.",
        ),
    ] = 120.0,
    _verbose: Verbose = False,
) -> None:
    """Serve the load of a fleet to autoscalers until SIGTERM or SIGINT.

    Reads the statistics of an environment, or of all environments of the TOML file, and answers at
    `/scale` with the items that wait and run and the recommended number of workers, without a
    credential and without ids. While the control plane does not answer, the last numbers are given
    with their age.
    """
    with exits.exit_on_error():
        settings, tables = read_environments(
            config,
            environment_id=environment_id,
            base_url=base_url,
            metrics_listen=metrics_listen,
        )
        require_connection_settings(settings, tables)
        if settings.metrics_listen is None:
            settings = settings.replace(metrics_listen=SCALE_LISTEN)
        if settings.metrics_address is None:
            raise SettingsError(("metrics_listen: off, so nothing could be served",))
        log_config.configure_logging(
            "debug" if is_verbose(context) else settings.log_level, settings.log_format
        )
        environments = tables or (settings,)
        # A worker reserves one slot for each environment, so the items of one environment can use
        # all slots except those reserved for the other environments.
        slots = slots_per_worker or settings.concurrency - len(environments) + 1
        if min_replicas > max_replicas:
            raise typer.BadParameter("--min-replicas is larger than --max-replicas")
        if max_age < interval:
            raise typer.BadParameter("--max-age is shorter than --interval")
        rule = ReplicaRule(slots, min_replicas, max_replicas)
        new_reader = functools.partial(FleetReader, interval=interval, max_age=max_age)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(
                _serve_until_signal(
                    _serve_fleet_scaling_numbers(settings, environments, rule, new_reader)
                )
            )


async def _serve_until_signal(serve: Coroutine[Any, Any, None]) -> None:
    with SignalEvents() as signals:
        try:
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(serve)
                await signals.first.wait()
                serving.cancel()
        except BaseExceptionGroup as group_error:
            raise innermost(group_error) from None
        ending = signals.last
        log_config.log.info("scale ends", extra={"signal": ending.name if ending else None})


async def _serve_fleet_scaling_numbers(
    settings: Settings,
    environments: Sequence[Settings],
    rule: ReplicaRule,
    new_reader: Callable[[WorkClient], FleetReader],
) -> None:
    rate_limits = find_shared_rate_limits(environments)
    readers: dict[str, FleetReader] = {}
    slots: dict[str, int] = {}
    async with AsyncExitStack() as stack:
        for each in environments:
            client = WorkClient(each, rate_limits=rate_limits[each.environment_id])
            environment_id = str(each.environment_id)
            readers[environment_id] = new_reader(await stack.enter_async_context(client))
            slots[environment_id] = each.concurrency
        fleet = FleetScaling(readers, slots, rule)
        registry = CollectorRegistry()
        registry.register(FleetMetrics(fleet))
        address = settings.metrics_address
        assert address is not None  # noqa: S101 - checked before
        exporter = Exporter(
            address.host or "", address.port, registry, health=list, readiness=fleet.unready_reasons
        )
        exporter.scale = fleet.calculate_fleet_scaling_numbers
        async with exporter:
            typer.echo(f"ready {exporter.url}/scale")
            await fleet.read_loads_periodically()


class FleetMetrics(Collector):
    """Prometheus collector of the scaling numbers of each environment.

    An environment whose load is unknown is left out.
    """

    def __init__(self, fleet: FleetScaling) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        """Return one gauge for each key of `FLEET_NUMBERS`, with a sample for each environment."""
        found = {
            each: self._fleet.calculate_environment_scaling_numbers(each)
            for each in self._fleet.readers
        }
        for key, text in FLEET_NUMBERS.items():
            family = GaugeMetricFamily(METRIC_PREFIX + key, text, labels=("environment_id",))
            for environment_id, numbers in found.items():
                if numbers is not None:
                    family.add_metric((environment_id,), float(numbers[key]))
            yield family
