"""Discovery and loading of plugins, with real modules on disk and real entry points."""

import functools
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.unit.plugin_helpers import get_chosen_handler_name, load_plugins, make_work_item
from workpool.errors import PluginError
from workpool.events import Event
from workpool.handlers import handler
from workpool.hookspecs import hookimpl
from workpool.plugins import InstalledPlugin, installed_plugins
from workpool.session import Session

HEAD = "from workpool.handlers import handler\nfrom workpool.hookspecs import hookimpl\n"


class FolderOnImportPath:
    """A folder of the import path to which tests write modules and distributions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = itertools.count()

    def write_module(self, source: str, name: str | None = None) -> str:
        name = name or f"disk_{next(self.count)}"
        path = self.path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEAD + source)
        return name

    def write_dist_info_folder(self, name: str, **points: str) -> None:
        folder = self.path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{point} = {value}" for point, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[workpool]", *lines, ""]))


@pytest.fixture
def folder_on_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FolderOnImportPath]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield FolderOnImportPath(tmp_path)
    roots = {path.stem for path in tmp_path.iterdir()}
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in roots:
            del sys.modules[name]


async def handle_daily_report(session: Session) -> None: ...


def make_decorated_handler(name: str = "daily", **rule: Any) -> Any:
    @handler(**rule)
    async def handler_function(session: Session) -> None: ...

    handler_function.__name__ = name
    return handler_function


def test_decorated_function_is_loaded_as_handler_with_its_limits() -> None:
    function = make_decorated_handler(timeout=5.0, max_sessions=2)
    answer = load_plugins(function).find_handler_for_item(make_work_item())
    assert answer is not None
    assert answer.call is function
    assert (answer.name, answer.plugin) == ("daily.daily", "daily")
    assert (answer.timeout, answer.max_sessions) == (5.0, 2)


def test_plugin_made_from_decorated_function_returns_same_handler_for_every_item() -> None:
    plugins = load_plugins(make_decorated_handler(max_sessions=2))
    assert plugins.find_handler_for_item(make_work_item()) is plugins.find_handler_for_item(
        make_work_item(job="other")
    )


def test_partial_of_decorated_function_is_loaded_as_handler() -> None:
    @handler(max_sessions=1)
    async def handler_with_database_argument(database: str, session: Session) -> None: ...

    answer = load_plugins(
        functools.partial(handler_with_database_argument, "db")
    ).find_handler_for_item(make_work_item())
    assert answer is not None
    assert (answer.name, answer.max_sessions) == (
        "handler_with_database_argument.handler_with_database_argument",
        1,
    )


class ReportPlugin:
    def __init__(self, folder: str = "here", *, pages: int = 1) -> None:
        self.folder = folder
        self.pages = pages

    @property
    def property_that_raises_error(self) -> object:
        raise RuntimeError("not open yet")

    @handler(metadata={"job": "daily"})
    async def handle_daily_report(self, _session: Session) -> tuple[str, int]:
        return self.folder, self.pages

    @staticmethod
    @handler(metadata={"job": "weekly"})
    async def handle_weekly_report(session: Session) -> None: ...

    @classmethod
    @handler(metadata={"job": "yearly"})
    async def handle_yearly_report(cls, session: Session) -> None: ...


@pytest.mark.parametrize("plugin", [ReportPlugin, ReportPlugin("there")])
def test_plugin_class_or_object_supplies_all_its_decorated_methods(plugin: object) -> None:
    plugins = load_plugins(plugin)
    for job in ("daily", "weekly", "yearly"):
        assert (
            get_chosen_handler_name(plugins, make_work_item(job=job))
            == f"ReportPlugin.handle_{job}_report"
        )
    assert get_chosen_handler_name(plugins, make_work_item(job="hourly")) is None


async def test_plugin_class_gets_its_settings_as_keyword_arguments() -> None:
    answer = load_plugins(
        ReportPlugin, ReportPlugin={"folder": "/srv", "pages": 3}
    ).find_handler_for_item(make_work_item(job="daily"))
    assert answer is not None
    session: Any = None
    call: Any = answer.call
    assert await call(session) == ("/srv", 3)


def test_unhashable_dataclass_is_loaded_as_plugin() -> None:
    @dataclass
    class DataclassPlugin:
        level: int = 1

        @hookimpl
        def workpool_event(self, event: Event) -> None: ...

    assert load_plugins(DataclassPlugin, DataclassPlugin={"level": 2}).wanted


def test_plugin_module_supplies_all_its_decorated_functions_including_imported_ones(
    folder_on_import_path: FolderOnImportPath,
) -> None:
    folder_on_import_path.write_module(
        "@handler(metadata={'job': 'a'})\nasync def a(session): ...\n", "jobs_a.inner"
    )
    source = "from jobs_a.inner import a\nalias = a\n@handler\nasync def b(session): ...\n"
    name = folder_on_import_path.write_module(source, "jobs_b")
    for plugins in (load_plugins(names=(name,)), load_plugins(__import__(name))):
        [plugin] = plugins.active_plugins()
        assert [route.handler.name for route in plugin.routes] == ["jobs_b.a", "jobs_b.b"]


def test_loading_of_plugin_module_does_not_access_its_lazy_attributes(
    folder_on_import_path: FolderOnImportPath,
) -> None:
    name = folder_on_import_path.write_module(
        "@handler\nasync def a(session): ...\n"
        "def __dir__(): return ['a', 'lazy']\n"
        "def __getattr__(name): raise RuntimeError(name)\n"
    )
    assert load_plugins(names=(name,)).can_supply_handler


@pytest.mark.parametrize(
    ("asked", "plugin"),
    [
        ("shop.reports", "reports"),
        ("shop.reports:Yearly", "Yearly"),
        ("shop.reports:monthly", "monthly"),
        ("acme", "acme"),
    ],
)
def test_plugin_is_loaded_by_module_name_object_name_or_installed_name(
    folder_on_import_path: FolderOnImportPath, asked: str, plugin: str
) -> None:
    folder_on_import_path.write_module(
        "@handler(metadata={'job': 'monthly'})\nasync def monthly(session): ...\n"
        "class Yearly:\n    @handler\n    async def run(self, session): ...\n",
        "shop.reports",
    )
    folder_on_import_path.write_dist_info_folder("acme-plugin", acme="shop.reports:Yearly")
    [described] = load_plugins(names=(asked,)).active_plugins()
    assert described.name == plugin
    assert "shop.reports" in described.source or asked in described.source


def test_installed_plugin_is_listed_without_being_imported_or_activated(
    folder_on_import_path: FolderOnImportPath,
) -> None:
    name = folder_on_import_path.write_module("raise SystemExit('imported')\n")
    folder_on_import_path.write_dist_info_folder("acme-plugin", acme=name)
    assert InstalledPlugin("acme", name, "acme-plugin 1.0") in installed_plugins()
    assert not load_plugins().can_supply_handler
    assert load_plugins().active_plugins() == ()


def test_plugin_description_lists_its_hooks_and_rules() -> None:
    class PluginWithHookAndHandlerRules:
        @hookimpl
        def workpool_session_handler(self) -> None: ...

        @handler(type="build", metadata={"job": "a"})
        async def build_project(self, session: Session) -> None: ...

    [plugin] = load_plugins(PluginWithHookAndHandlerRules).active_plugins()
    assert list(plugin.hooks) == ["workpool_session_handler"]
    assert [(str(route.rule), route.handler.name) for route in plugin.routes] == [
        ("type=build job=a", "PluginWithHookAndHandlerRules.build_project")
    ]


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
    "an annotation that is no event": (
        "from workpool import Session\n@hookimpl\ndef workpool_event(event: Session): ...\n",
        "Session'> is no type of event of workpool.events",
    ),
    "an annotation that is no event beside one that is": (
        "@hookimpl\ndef workpool_event(event: 'SessionFinished | None'): ...\n",
        "SessionFinished | None is no type of event of workpool.events",
    ),
    "an annotation that cannot be read": (
        "@hookimpl\ndef workpool_event(event: 'ev.SessionFinished'): ...\n",
        "workpool_event: its annotation cannot be read: name 'ev' is not defined",
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
    "an async def around a plain handler": (
        "import functools\n@handler\ndef inner(session): ...\n"
        "@functools.wraps(inner)\nasync def outer(session): return inner(session)\ndel inner\n",
        "outer is an `async def` around a handler of the other kind",
    ),
    "a generator marked": (
        "@handler\ndef run(session): yield\n",
        "raised TypeError: @handler: run is a generator",
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
def test_error_about_mistake_in_plugin_module_names_that_module(
    folder_on_import_path: FolderOnImportPath, mistake: str
) -> None:
    source, sentence = MISTAKES[mistake]
    name = folder_on_import_path.write_module(source)
    with pytest.raises(PluginError) as caught:
        load_plugins(names=(name,))
    assert caught.value.plugin == name
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_about_module_without_handler_function_suggests_class_with_handler_method(
    folder_on_import_path: FolderOnImportPath,
) -> None:
    name = folder_on_import_path.write_module(
        "class Other: ...\nclass Prices:\n    @handler\n    async def run(self, session): ...\n"
    )
    with pytest.raises(
        PluginError, match=f"no function with @handler; did you mean '{name}:Prices'"
    ):
        load_plugins(names=(name,))


def test_error_about_equal_rules_in_one_module_names_both_handlers(
    folder_on_import_path: FolderOnImportPath,
) -> None:
    name = folder_on_import_path.write_module(MISTAKES["two equal rules"][0])
    with pytest.raises(PluginError, match=f"{name}.two and {name}.one have the same rule"):
        load_plugins(names=(name,))


def test_error_about_equal_rules_of_two_plugins_names_both() -> None:
    with pytest.raises(PluginError, match=r"two.two and one.one have the same rule") as caught:
        load_plugins(
            make_decorated_handler("one", metadata={"job": "a"}),
            make_decorated_handler("two", metadata={"job": "a"}),
        )
    assert caught.value.plugin == "two"


def test_handler_function_supplied_by_two_plugins_is_refused(
    folder_on_import_path: FolderOnImportPath,
) -> None:
    name = folder_on_import_path.write_module(MARKED)
    module = __import__(name)
    with pytest.raises(PluginError, match=rf"{name}.run and run.run have the same rule"):
        load_plugins(module.run, module)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("acmee", "no module named 'acmee'; did you mean 'acme'?"),
        ("quite.different", "no module named 'quite'; installed plugins: "),
        ("json.nothing", "no module named 'json.nothing'"),
        ("json.decoder.deeper", "no module named 'json.decoder.deeper'"),
        ("shop:RepotPlugin", "module shop has no 'RepotPlugin'; did you mean 'ReportPlugin'?"),
        ("not a name", "is not installed, nor a module or module:Name"),
        ("", "is not installed"),
        (".relative", "is not installed"),
        ("shop:", "is not installed"),
        ("lost", "no module named 'gone'; installed plugins: "),
    ],
)
def test_unknown_plugin_name_is_refused_with_hint(
    folder_on_import_path: FolderOnImportPath, asked: str, sentence: str
) -> None:
    folder_on_import_path.write_module("class ReportPlugin: ...\n", "shop")
    folder_on_import_path.write_dist_info_folder("acme-plugin", acme="shop", lost="gone")
    with pytest.raises(PluginError) as caught:
        load_plugins(names=(asked,))
    assert caught.value.plugin == asked
    assert sentence in str(caught.value)


def test_plugin_name_offered_by_two_distributions_is_refused(
    folder_on_import_path: FolderOnImportPath,
) -> None:
    folder_on_import_path.write_dist_info_folder("acme-one", acme="shop")
    folder_on_import_path.write_dist_info_folder("acme-two", acme="shop")
    with pytest.raises(PluginError, match=r"offered by acme-one 1\.0 and acme-two 1\.0"):
        load_plugins(names=("acme",))


def test_plugin_given_twice_raises_plugin_error(folder_on_import_path: FolderOnImportPath) -> None:
    name = folder_on_import_path.write_module(MARKED)
    folder_on_import_path.write_dist_info_folder("acme-plugin", acme=name)
    reports = ReportPlugin()
    for given in ([name, name], [name, __import__(name)], ["acme", name], [reports, reports]):
        with pytest.raises(PluginError, match="is given twice"):
            load_plugins(*given)


def test_two_plugins_with_equal_names_raise_plugin_error() -> None:
    with pytest.raises(PluginError, match="'ReportPlugin': is the name of two plugins"):
        load_plugins(ReportPlugin(), ReportPlugin())


@pytest.mark.parametrize(
    ("plugin", "options", "sentence"),
    [
        (
            ReportPlugin,
            {"folders": "x"},
            "[workpool.plugin.ReportPlugin]: folders: no such option; did you mean 'folder'?",
        ),
        (type("ReportPlugin", (), {"__init__": lambda _self, *, _dsn: None}), {}, "'_dsn'"),
        (ReportPlugin(), {"folder": "x"}, "takes no settings"),
        (make_decorated_handler("ReportPlugin"), {"folder": "x"}, "takes no settings"),
    ],
)
def test_error_about_unsuitable_plugin_settings_names_them(
    plugin: object, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PluginError, match=re.escape(sentence)) as caught:
        load_plugins(plugin, ReportPlugin=options)
    assert caught.value.plugin == "ReportPlugin"


def test_error_about_plugin_class_that_fails_to_start_contains_the_reason() -> None:
    class FailingPlugin:
        def __init__(self) -> None:
            raise OSError("disk\nis full")

    with pytest.raises(PluginError, match=r"creating it .* raised OSError: disk$") as caught:
        load_plugins(FailingPlugin)
    assert isinstance(caught.value.__cause__, OSError)


def test_settings_for_plugin_that_is_neither_active_nor_installed_are_refused(
    folder_on_import_path: FolderOnImportPath,
) -> None:
    folder_on_import_path.write_dist_info_folder("acme-plugin", acme="shop")
    with pytest.raises(
        PluginError, match=r"RepotPlugin\] is for no active .* 'ReportPlugin'\?"
    ) as caught:
        load_plugins(ReportPlugin, RepotPlugin={})
    assert caught.value.plugin == "RepotPlugin"
    assert load_plugins(ReportPlugin, acme={"folder": "x"}).can_supply_handler


@pytest.mark.parametrize("plugin", [7, None, object(), handle_daily_report, dict, type])
def test_object_that_is_no_plugin_is_refused(plugin: object) -> None:
    with pytest.raises(PluginError, match=r"@handler|type\(\) takes"):
        load_plugins(plugin)


def test_keyboard_interrupt_while_loading_plugin_is_not_caught(
    folder_on_import_path: FolderOnImportPath,
) -> None:
    name = folder_on_import_path.write_module("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_plugins(names=(name,))
