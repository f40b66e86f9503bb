"""`workpool scale`: the numbers of one environment for autoscalers, in a process of its own.

Holds the credential, so that autoscalers need none. See workpool/docs/operating.md,
"`workpool scale`".
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Final

import typer
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workpool.cli import exits, log_config
from workpool.cli.flags import METAVARS, BaseUrl, Config, EnvironmentId, read_settings
from workpool.cli.fleet_reader import FleetReader
from workpool.cli.help_text import examples
from workpool.cli.signals import Signals
from workpool.cli.verbosity import Verbose, is_verbose
from workpool.errors import SettingsError, innermost
from workpool.exporter import Exporter
from workpool.pool.lease_renewer import new_event_loop
from workpool.scaling import FLEET_NUMBERS, REPLICAS_MAX, ReplicaRule, fleet_numbers
from workpool.settings import Settings
from workpool.wire.client import WorkClient

SCALE_LISTEN: Final = "127.0.0.1:9465"
METRIC_PREFIX: Final = "workpool_fleet_"
"""The beginning of the names of the metrics; the key in the JSON of `/scale` follows."""
EXAMPLES: Final = examples(
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
            min=1, help="The sessions of one worker at once. Default: the setting `concurrency`."
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
    """Serve numbers for autoscalers until SIGTERM or SIGINT.

    Reads the statistics of one environment, and answers at `/scale` with the items that wait and
    run and the recommended number of workers, without a credential and without ids. While the
    control plane does not answer, the last numbers are given with their age.
    """
    with exits.reported():
        settings = read_settings(
            config,
            environment_id=environment_id,
            base_url=base_url,
            metrics_listen=metrics_listen,
        )
        settings.require_connection()
        if settings.metrics_listen is None:
            settings = settings.replace(metrics_listen=SCALE_LISTEN)
        if settings.metrics_address is None:
            raise SettingsError(("metrics_listen: off, so nothing could be served",))
        log_config.configure(
            "debug" if is_verbose(context) else settings.log_level, settings.log_format
        )
        slots = settings.concurrency if slots_per_worker is None else slots_per_worker
        if min_replicas > max_replicas:
            raise typer.BadParameter("--min-replicas is larger than --max-replicas")
        if max_age < interval:
            raise typer.BadParameter("--max-age is shorter than --interval")
        rule = ReplicaRule(slots, min_replicas, max_replicas)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_until_signal(settings, rule, interval=interval, max_age=max_age))


async def _until_signal(
    settings: Settings, rule: ReplicaRule, *, interval: float, max_age: float
) -> None:
    with Signals() as signals:
        try:
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(
                    _serve(settings, rule, interval=interval, max_age=max_age)
                )
                await signals.first.wait()
                serving.cancel()
        except BaseExceptionGroup as group_error:
            raise innermost(group_error) from None
        ending = signals.last
        log_config.log.info("scale ends", extra={"signal": ending.name if ending else None})


async def _serve(settings: Settings, rule: ReplicaRule, *, interval: float, max_age: float) -> None:
    async with WorkClient(settings) as client:
        reader = FleetReader(client, interval=interval, max_age=max_age)

        def numbers() -> dict[str, float] | None:
            load, age = reader.load, reader.age_seconds
            return None if load is None else fleet_numbers(load, rule, age_seconds=age or 0.0)

        registry = CollectorRegistry()
        registry.register(FleetMetrics(settings.environment_id or "", numbers))
        address = settings.metrics_address
        assert address is not None  # noqa: S101 - checked before
        exporter = Exporter(
            address.host or "", address.port, registry, health=list, readiness=reader.unready
        )
        exporter.scale = numbers
        async with exporter:
            typer.echo(f"ready {exporter.url}/scale")
            await reader.run()


class FleetMetrics(Collector):
    """The numbers of `/scale` as gauges, without samples while there are none.

    Args:
        environment_id: The only label.
        numbers: Returns the numbers; called on the thread of a scrape.
    """

    def __init__(
        self, environment_id: str, numbers: Callable[[], Mapping[str, float] | None]
    ) -> None:
        self._environment_id = environment_id
        self._numbers = numbers

    def collect(self) -> Iterable[Metric]:
        """Return the current values."""
        numbers = self._numbers() or {}
        for key, text in FLEET_NUMBERS.items():
            family = GaugeMetricFamily(METRIC_PREFIX + key, text, labels=("environment_id",))
            if key in numbers:
                family.add_metric((self._environment_id,), float(numbers[key]))
            yield family
