"""Loading, order, routing, blame: real modules on disk, real entry points, no supervisor."""

import asyncio
import functools
import itertools
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from workpool.errors import PluginError
from workpool.events import DrainStarted, Event, PluginFailed
from workpool.handler import handler
from workpool.hookspecs import hookimpl
from workpool.plugins import Available, Plugins, available
from workpool.session import Session
from workpool.wire.items import WorkItem, parse_item

FACT = DrainStarted(timeout=20.0)
HEAD = "from workpool.handler import handler\nfrom workpool.hookspecs import hookimpl\n"


def item(type_: str = "session", **metadata: str) -> WorkItem:
    return parse_item(
        {
            "id": "work_1",
            "type": "work",
            "environment_id": "env_1",
            "data": {"type": type_, "id": "sess_1"},
            "state": "queued",
            "created_at": "2026-01-01T00:00:00Z",
            "metadata": metadata,
        }
    )


def load(*objects: object, names: tuple[str, ...] = (), **options: dict[str, Any]) -> Plugins:
    return Plugins.load(objects, names, options)


def chosen(plugins: Plugins, item: WorkItem) -> str | None:
    answer = plugins.handler_for(item)
    return answer.name if answer else None


class Answering:
    """Answers every item with one method; subclasses give it names."""

    async def run(self, session: Session) -> None: ...

    @hookimpl
    def workpool_session_handler(self) -> Callable[[Session], Awaitable[object]]:
        return self.run


class First(Answering): ...


class Second(Answering): ...


class Disk:
    """Modules and distributions written to disk and importable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = itertools.count()

    def module(self, source: str, name: str | None = None) -> str:
        name = name or f"disk_{next(self.count)}"
        path = self.path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEAD + source)
        return name

    def distribution(self, name: str, **points: str) -> None:
        folder = self.path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{point} = {value}" for point, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[workpool]", *lines, ""]))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Disk(tmp_path)
    roots = {path.stem for path in tmp_path.iterdir()}
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in roots:
            del sys.modules[name]


# -- what a plugin can be --------------------------------------------------------------------------


async def daily(session: Session) -> None: ...


def marked(name: str = "daily", **rule: Any) -> Any:
    @handler(**rule)
    async def function(session: Session) -> None: ...

    function.__name__ = name
    return function


def test_a_marked_function() -> None:
    function = marked(timeout=5.0, max_sessions=2)
    answer = load(function).handler_for(item())
    assert answer is not None
    assert answer.call is function
    assert (answer.name, answer.plugin) == ("daily.daily", "daily")
    assert (answer.timeout, answer.max_sessions) == (5.0, 2)


def test_the_same_marked_function_always_gives_the_same_handler() -> None:
    plugins = load(marked(max_sessions=2))
    assert plugins.handler_for(item()) is plugins.handler_for(item(job="other"))


def test_a_partial_of_a_marked_function_carries_what_an_embedder_has() -> None:
    @handler(max_sessions=1)
    async def report(database: str, session: Session) -> None: ...

    answer = load(functools.partial(report, "db")).handler_for(item())
    assert answer is not None
    assert (answer.name, answer.max_sessions) == ("report.report", 1)


class Reports:
    def __init__(self, folder: str = "here", *, pages: int = 1) -> None:
        self.folder = folder
        self.pages = pages

    @property
    def connection(self) -> object:
        raise RuntimeError("not open yet")

    @handler(metadata={"job": "daily"})
    async def daily(self, _session: Session) -> tuple[str, int]:
        return self.folder, self.pages

    @staticmethod
    @handler(metadata={"job": "weekly"})
    async def weekly(session: Session) -> None: ...

    @classmethod
    @handler(metadata={"job": "yearly"})
    async def yearly(cls, session: Session) -> None: ...


@pytest.mark.parametrize("plugin", [Reports, Reports("there")])
def test_a_class_or_an_object_gives_all_its_marked_methods(plugin: object) -> None:
    plugins = load(plugin)
    for job in ("daily", "weekly", "yearly"):
        assert chosen(plugins, item(job=job)) == f"Reports.{job}"
    assert chosen(plugins, item(job="hourly")) is None


async def test_a_class_gets_its_settings_as_keyword_arguments() -> None:
    answer = load(Reports, Reports={"folder": "/srv", "pages": 3}).handler_for(item(job="daily"))
    assert answer is not None
    session: Any = None
    assert await answer.call(session) == ("/srv", 3)


def test_a_dataclass_is_a_plugin_although_it_cannot_be_hashed() -> None:
    @dataclass
    class Configured:
        level: int = 1

        @hookimpl
        def workpool_event(self, event: Event) -> None: ...

    assert load(Configured, Configured={"level": 2}).observers


def test_a_module_gives_all_its_marked_functions_once_imported_ones_too(disk: Disk) -> None:
    disk.module("@handler(metadata={'job': 'a'})\nasync def a(session): ...\n", "jobs_a.inner")
    source = "from jobs_a.inner import a\nalias = a\n@handler\nasync def b(session): ...\n"
    name = disk.module(source, "jobs_b")
    for plugins in (load(names=(name,)), load(__import__(name))):
        [plugin] = plugins.describe()
        assert [route.handler.name for route in plugin.routes] == ["jobs_b.a", "jobs_b.b"]


def test_lazy_attributes_of_a_module_are_not_imported(disk: Disk) -> None:
    name = disk.module(
        "@handler\nasync def a(session): ...\n"
        "def __dir__(): return ['a', 'lazy']\n"
        "def __getattr__(name): raise RuntimeError(name)\n"
    )
    assert load(names=(name,)).can_handle


@pytest.mark.parametrize(
    ("asked", "plugin"),
    [
        ("shop.reports", "reports"),
        ("shop.reports:Yearly", "Yearly"),
        ("shop.reports:monthly", "monthly"),
        ("acme", "acme"),
    ],
)
def test_names_for_a_plugin(disk: Disk, asked: str, plugin: str) -> None:
    disk.module(
        "@handler(metadata={'job': 'monthly'})\nasync def monthly(session): ...\n"
        "class Yearly:\n    @handler\n    async def run(self, session): ...\n",
        "shop.reports",
    )
    disk.distribution("acme-plugin", acme="shop.reports:Yearly")
    [described] = load(names=(asked,)).describe()
    assert described.name == plugin
    assert "shop.reports" in described.source or asked in described.source


def test_installed_is_listed_without_being_imported_and_is_not_active(disk: Disk) -> None:
    name = disk.module("raise SystemExit('imported')\n")
    disk.distribution("acme-plugin", acme=name)
    assert Available("acme", name, "acme-plugin 1.0") in available()
    assert not load().can_handle
    assert load().describe() == ()


def test_describe_names_hooks_and_rules() -> None:
    class Both(Answering):
        @handler(type="build", metadata={"job": "a"})
        async def build(self, session: Session) -> None: ...

    [plugin] = load(Both).describe()
    assert list(plugin.hooks) == ["workpool_session_handler"]
    assert [(str(route.rule), route.handler.name) for route in plugin.routes] == [
        ("type=build job=a", "Both.build")
    ]


# -- who answers -----------------------------------------------------------------------------------


def test_objects_are_asked_before_names_and_the_first_answer_wins(disk: Disk) -> None:
    name = disk.module(
        "async def run(session): ...\n@hookimpl\ndef workpool_session_handler(item): return run\n"
    )
    assert chosen(load(First(), Second(), names=(name,)), item()) == "First.run"
    assert chosen(load(Second(), First(), names=(name,)), item()) == "Second.run"
    assert chosen(load(names=(name,)), item()) == f"{name}.run"
    assert chosen(load(name, First()), item()) == f"{name}.run"


def test_a_plugin_that_answers_none_lets_the_next_one_decide() -> None:
    class Nothing:
        @hookimpl
        def workpool_session_handler(self, item: WorkItem) -> None: ...

    assert chosen(load(Nothing(), Second()), item()) == "Second.run"


def test_tryfirst_and_trylast_are_respected() -> None:
    class Early(Answering):
        @hookimpl(tryfirst=True)
        def workpool_session_handler(self) -> Any:
            return self.run

    class Late(Answering):
        @hookimpl(trylast=True)
        def workpool_session_handler(self) -> Any:
            return self.run

    assert chosen(load(Late(), First(), Early()), item()) == "Early.run"
    assert chosen(load(Late(), First()), item()) == "First.run"


def test_a_plugin_is_asked_by_its_hook_before_its_rules_and_both_before_the_next() -> None:
    class Mixed:
        async def special(self, session: Session) -> None: ...

        @handler
        async def rest(self, session: Session) -> None: ...

        @hookimpl
        def workpool_session_handler(self, item: WorkItem) -> Any:
            return self.special if "special" in item.metadata else None

    plugins = load(Mixed(), Second())
    assert chosen(plugins, item(special="yes")) == "Mixed.special"
    assert chosen(plugins, item()) == "Mixed.rest"


def test_rules_match_equal_type_and_equal_metadata() -> None:
    plugins = load(marked(type="build", metadata={"job": "a", "team": "x"}))
    assert chosen(plugins, item("build", job="a", team="x", more="1")) == "daily.daily"
    assert chosen(plugins, item("session", job="a", team="x")) is None
    assert chosen(plugins, item("build", job="a")) is None
    assert chosen(plugins, item("build", job="a", team="y")) is None
    assert chosen(plugins, item("build")) is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_more_specific_rule_goes_first_wherever_it_stands(order: tuple[int, ...]) -> None:
    functions = [
        marked("anything"),
        marked("reports", metadata={"job": "report"}),
        marked("daily", metadata={"job": "report", "every": "day"}),
    ]

    module = type("Jobs", (), {str(function): staticmethod(function) for function in functions})
    for plugins in (load(*(functions[index] for index in order)), load(module)):

        def function_for(plugins: Plugins, **metadata: str) -> object:
            answer = plugins.handler_for(item(**metadata))
            return answer and answer.call

        assert function_for(plugins) is functions[0]
        assert function_for(plugins, job="report") is functions[1]
        assert function_for(plugins, job="report", every="day") is functions[2]
        assert function_for(plugins, every="day") is functions[0]


def test_a_rule_that_refines_nothing_before_it_waits_for_its_plugins_turn() -> None:
    one, two = marked("one", metadata={"a": "1"}), marked("two", metadata={"b": "1", "c": "1"})
    both = item(a="1", b="1", c="1")
    assert chosen(load(one, two), both) == "one.one"
    assert chosen(load(two, one), both) == "two.two"
    assert chosen(load(First(), two), both) == "First.run"


def test_nothing_to_handle_with_is_visible() -> None:
    class Observer:
        @hookimpl
        def workpool_event(self, event: Event) -> None: ...

    assert not load(Observer()).can_handle
    assert load(Observer()).handler_for(item()) is None
    assert load(First()).can_handle
    assert load(marked()).can_handle
    assert not load(First()).observers


async def top(session: Session) -> None: ...


@handler(timeout=9.0, max_sessions=1)
async def limited(session: Session) -> None: ...


class Call:
    async def __call__(self, session: Session) -> None: ...


@pytest.mark.parametrize(
    ("call", "name", "limits"),
    [
        (top, "Router.top", (None, None)),
        (functools.partial(top), "Router.top", (None, None)),
        (Call(), "Router.Call", (None, None)),
        (limited, "Router.limited", (9.0, 1)),
        (functools.partial(limited), "Router.limited", (9.0, 1)),
    ],
)
def test_what_a_hook_may_answer(call: Any, name: str, limits: tuple[Any, Any]) -> None:
    class Router:
        @hookimpl
        def workpool_session_handler(self) -> Any:
            return functools.partial(call) if isinstance(call, functools.partial) else call

    plugins = load(Router())
    answer = plugins.handler_for(item())
    assert answer is not None
    assert (answer.name, answer.plugin) == (name, "Router")
    assert (answer.timeout, answer.max_sessions) == limits
    assert answer == plugins.handler_for(item(job="other"))


# -- refused at start ------------------------------------------------------------------------------

CLASS = "class P:\n"
MARKED = "@handler\nasync def run(session): ...\n"
MISTAKES = {
    "a hook that does not exist": (
        "@hookimpl\ndef workpool_evnet(event): ...\n",
        "workpool_evnet is not a hook; did you mean 'workpool_event'?",
    ),
    "a name that looks like a hook": ("workpool_timeout = 5\n", "workpool_timeout is not a hook"),
    "a marked function with another name": (
        "@hookimpl\ndef on_event(event): ...\n",
        "on_event is not a hook",
    ),
    "a hook without its marker": (
        "def workpool_event(event): ...\n",
        "workpool_event is not marked with @hookimpl",
    ),
    "another project's marker": (
        "import pluggy\n@pluggy.HookimplMarker('other')\ndef workpool_event(event): ...\n",
        "workpool_event is not marked with @hookimpl",
    ),
    "an async hook": (
        "@hookimpl\nasync def workpool_event(event): ...\n",
        "workpool_event is `async def`",
    ),
    "an async generator as a hook": (
        "@hookimpl\nasync def workpool_lifespan(supervisor): yield\n",
        "workpool_lifespan is `async def`",
    ),
    "a hook wrapper": (
        "@hookimpl(wrapper=True)\ndef workpool_event(event): yield\n",
        "only tryfirst and trylast",
    ),
    "a renamed hook": (
        "@hookimpl(specname='workpool_lifespan')\ndef workpool_event(event): ...\n",
        "only tryfirst and trylast",
    ),
    "an argument of another name": (
        "@hookimpl\ndef workpool_event(fact): ...\n",
        "workpool_event must take exactly (event)",
    ),
    "an argument too many": (
        "@hookimpl\ndef workpool_event(event, session): ...\n",
        "workpool_event must take exactly (event)",
    ),
    "an argument that would never be passed": (
        "@hookimpl\ndef workpool_event(event=None): ...\n",
        "workpool_event must take exactly (event)",
    ),
    "arguments that would never be passed": (
        "@hookimpl\ndef workpool_event(*event): ...\n",
        "workpool_event must take exactly (event)",
    ),
    "a plain def around a handler": (
        "import functools\n@handler\nasync def inner(session): ...\n"
        "@functools.wraps(inner)\ndef outer(session): return inner(session)\ndel inner\n",
        "outer is a plain `def` around a handler",
    ),
    "a handler without the session": (
        "@handler\nasync def run(): ...\n",
        "run must be callable with one argument, the session",
    ),
    "a handler that needs more than the session": (
        "@handler\nasync def run(session, database): ...\n",
        "run must be callable with one argument, the session: missing a required argument",
    ),
    "a plain def marked": (
        "@handler\ndef run(session): ...\n",
        "raised TypeError: @handler: run is a plain `def`",
    ),
    "nothing at all": ("x = 1\n", "has no hook marked @hookimpl and no function with @handler"),
    "two equal rules": (
        "@handler(metadata={'job': 'a'})\nasync def one(session): ...\n"
        "@handler(metadata={'job': 'a'})\nasync def two(session): ...\n",
        "have the same rule (type=session job=a)",
    ),
    "an import that is missing": (
        "import no_such_library\n",
        "raised ModuleNotFoundError: No module named 'no_such_library'",
    ),
    "a syntax error": ("def run(:\n", "raised SyntaxError"),
    "an exit while importing": ("import sys\nsys.exit(3)\n", "raised SystemExit: 3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_a_module_are_refused_with_its_name(disk: Disk, mistake: str) -> None:
    source, sentence = MISTAKES[mistake]
    name = disk.module(source)
    with pytest.raises(PluginError) as caught:
        load(names=(name,))
    assert caught.value.plugin == name
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equal_rules_name_both_handlers_within_a_module(disk: Disk) -> None:
    name = disk.module(MISTAKES["two equal rules"][0])
    with pytest.raises(PluginError, match=f"{name}.two and {name}.one have the same rule"):
        load(names=(name,))


def test_equal_rules_of_two_plugins_are_refused_naming_both() -> None:
    with pytest.raises(PluginError, match=r"two.two and one.one have the same rule") as caught:
        load(marked("one", metadata={"job": "a"}), marked("two", metadata={"job": "a"}))
    assert caught.value.plugin == "two"


def test_one_function_active_through_two_plugins_is_refused(disk: Disk) -> None:
    name = disk.module(MARKED)
    module = __import__(name)
    with pytest.raises(PluginError, match=rf"{name}.run and run.run have the same rule"):
        load(module.run, module)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("acmee", "no module named 'acmee'; did you mean 'acme'?"),
        ("quite.different", "no module named 'quite'; installed plugins: "),
        ("json.nothing", "no module named 'json.nothing'"),
        ("json.decoder.deeper", "no module named 'json.decoder.deeper'"),
        ("shop:Repots", "module shop has no 'Repots'; did you mean 'Reports'?"),
        ("not a name", "is not installed, nor a module or module:Name"),
        ("", "is not installed"),
        (".relative", "is not installed"),
        ("shop:", "is not installed"),
        ("lost", "no module named 'gone'; installed plugins: "),
    ],
)
def test_unknown_names_are_refused_with_a_hint(disk: Disk, asked: str, sentence: str) -> None:
    disk.module("class Reports: ...\n", "shop")
    disk.distribution("acme-plugin", acme="shop", lost="gone")
    with pytest.raises(PluginError) as caught:
        load(names=(asked,))
    assert caught.value.plugin == asked
    assert sentence in str(caught.value)


def test_a_name_that_two_distributions_offer_is_refused(disk: Disk) -> None:
    disk.distribution("acme-one", acme="shop")
    disk.distribution("acme-two", acme="shop")
    with pytest.raises(PluginError, match=r"offered by acme-one 1\.0 and acme-two 1\.0"):
        load(names=("acme",))


def test_the_same_plugin_twice_is_refused(disk: Disk) -> None:
    name = disk.module(MARKED)
    disk.distribution("acme-plugin", acme=name)
    reports = Reports()
    for given in ([name, name], [name, __import__(name)], ["acme", name], [reports, reports]):
        with pytest.raises(PluginError, match="is given twice"):
            load(*given)


def test_two_plugins_of_one_name_are_refused() -> None:
    with pytest.raises(PluginError, match="'Reports': is the name of two plugins"):
        load(Reports(), Reports())


@pytest.mark.parametrize(
    ("plugin", "options", "sentence"),
    [
        (Reports, {"folders": "x"}, "[workpool.plugin.Reports]: .*'folders'"),
        (type("Reports", (), {"__init__": lambda _self, *, _dsn: None}), {}, "'_dsn'"),
        (Reports(), {"folder": "x"}, "takes no settings"),
        (marked("Reports"), {"folder": "x"}, "takes no settings"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    plugin: object, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PluginError, match=sentence.replace("[", r"\[")) as caught:
        load(plugin, Reports=options)
    assert caught.value.plugin == "Reports"


def test_a_class_that_cannot_be_created_is_refused_with_the_reason() -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("disk\nis full")

    with pytest.raises(PluginError, match=r"creating it .* raised OSError: disk$") as caught:
        load(Broken)
    assert isinstance(caught.value.__cause__, OSError)


def test_settings_for_no_plugin_are_refused_unless_it_is_installed(disk: Disk) -> None:
    disk.distribution("acme-plugin", acme="shop")
    with pytest.raises(PluginError, match=r"Repots\] is for no active .* 'Reports'\?") as caught:
        load(Reports, Repots={})
    assert caught.value.plugin == "Repots"
    assert load(Reports, acme={"folder": "x"}).can_handle


@pytest.mark.parametrize("plugin", [7, None, object(), daily, dict, type])
def test_what_is_no_plugin_is_refused(plugin: object) -> None:
    with pytest.raises(PluginError, match=r"@handler|type\(\) takes"):
        load(plugin)


def test_an_interrupt_while_loading_passes(disk: Disk) -> None:
    name = disk.module("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(names=(name,))


# -- errors later on -------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Event] = []

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        self.seen.append(event)


class Failing:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error or ValueError("secret of the plugin")
        self.calls: list[Event] = []

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        self.calls.append(event)
        raise self.error


class AlsoFailing(Failing): ...


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError(), SystemExit(1)])
def test_a_choosing_hook_that_raises_is_blamed_and_the_next_is_not_asked(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @hookimpl
        def workpool_session_handler(self) -> None:
            raise error

    recorder, metrics = Recorder(), Recorder()
    plugins = load(Broken(), First(), recorder)
    plugins.metrics = metrics.workpool_event
    with pytest.raises(PluginError) as caught:
        plugins.handler_for(item())
    assert caught.value.plugin == "Broken"
    assert caught.value.__cause__ is error
    fact = PluginFailed("Broken", "workpool_session_handler", error)
    assert recorder.seen == metrics.seen == [fact]
    assert "workpool_session_handler raised" in caplog.text


def plain_def(session: Session) -> None: ...


def not_async(session: Session) -> Awaitable[None]:
    return top(session)


@pytest.mark.parametrize("answer", [plain_def, 7, Call, not_async, True])
def test_an_answer_that_cannot_be_run_is_blamed_on_the_plugin(answer: object) -> None:
    class Broken:
        @hookimpl
        def workpool_session_handler(self) -> object:
            return answer

    recorder = Recorder()
    plugins = load(Broken(), recorder)
    with pytest.raises(PluginError, match=r"'Broken': .* not an async callable") as caught:
        plugins.handler_for(item())
    assert recorder.seen == [PluginFailed("Broken", "workpool_session_handler", caught.value)]


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError(), SystemExit(1)])
def test_a_failing_observer_stops_nobody_and_the_others_learn_of_it(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = Recorder(), type("After", (Recorder,), {})()
    failing, metrics = Failing(error), Recorder()
    plugins = load(before, failing, after)
    plugins.metrics = metrics.workpool_event
    plugins.notify(FACT)

    failed = PluginFailed("Failing", "workpool_event", error)
    assert before.seen == [FACT, failed]
    assert after.seen == [failed, FACT]
    assert metrics.seen == [FACT, failed]
    assert failing.calls == [FACT]
    assert "'Failing': workpool_event raised" in caplog.text


def test_two_failing_observers_do_not_tell_each_other_for_ever() -> None:
    one, two, metrics = Failing(), AlsoFailing(), Recorder()
    plugins = load(one, two)
    plugins.metrics = metrics.workpool_event
    plugins.notify(FACT)

    assert (len(one.calls), len(two.calls)) == (2, 2)
    blamed = [event.plugin for event in metrics.seen if isinstance(event, PluginFailed)]
    assert blamed == ["Failing", "AlsoFailing", "AlsoFailing", "Failing"]


def test_one_traceback_per_kind_of_failure(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing()
    plugins = load(failing)
    plugins.notify(FACT)
    plugins.notify(FACT)
    failing.error = KeyError("other")
    plugins.notify(FACT)

    assert [bool(record.exc_info) for record in caplog.records] == [True, False, True]


def test_an_interrupt_from_an_observer_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        load(Failing(KeyboardInterrupt())).notify(FACT)


def test_metrics_come_first_and_alone_on_request() -> None:
    order: list[str] = []

    class Observer:
        @hookimpl
        def workpool_event(self) -> None:
            order.append("observer")

    plugins = load(Observer())
    plugins.metrics = lambda _: order.append("metrics")
    plugins.notify(FACT)
    plugins.notify_metrics(FACT)
    plugins.notify_observers(FACT)

    assert order == ["metrics", "observer", "metrics", "observer"]


def test_failing_metrics_stop_nobody(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    plugins = load(recorder)
    plugins.metrics = Failing().workpool_event
    plugins.notify(FACT)

    assert recorder.seen == [FACT]
    assert "metrics failed" in caplog.text


@pytest.mark.parametrize("hook", ["workpool_wrap_session", "workpool_lifespan"])
def test_a_context_hook_that_raises_is_not_caught(hook: str) -> None:
    def implementation() -> None:
        raise LookupError("no database")

    plugins = load(type("Broken", (), {hook: staticmethod(hookimpl(implementation))})())
    argument: Any = None
    ask = plugins.contexts if hook == "workpool_wrap_session" else plugins.lifespans
    with pytest.raises(LookupError, match="no database"):
        ask(argument)


@pytest.mark.parametrize("hook", ["workpool_wrap_session", "workpool_lifespan"])
@pytest.mark.parametrize("answer", [7, MappingProxyType({}), open])
def test_an_answer_that_is_no_context_is_blamed_on_the_plugin(hook: str, answer: object) -> None:
    def implementation() -> object:
        return answer

    plugins = load(type("Broken", (), {hook: staticmethod(hookimpl(implementation))})())
    argument: Any = None
    ask = plugins.contexts if hook == "workpool_wrap_session" else plugins.lifespans
    with pytest.raises(PluginError, match=f"'Broken': {hook} returned .* async context manager"):
        ask(argument)
