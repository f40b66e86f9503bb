"""Fixtures that run `workpool` in a process of its own, and a control plane in pytest's process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pytest
from typer.testing import CliRunner

from workpool.cli.commands import app
from workpool.server import ControlPlane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

SECONDS = 45.0
"""Maximum time of every wait; a loaded machine may need most of it for imports."""

ENVIRONMENT = "env_0199bbbbbbbb70008000000000000001"
FORBIDDEN = "env_0199bbbbbbbb70008000000000000002"
CLOUD = "env_0199bbbbbbbb70008000000000000003"
TOKEN, LIMITED = "token-of-everything-Zx9", "token-of-one-environment-Zx9"
WORKER_KEY = "key-of-a-worker"
TOKENS = {TOKEN: None, LIMITED: frozenset({ENVIRONMENT})}

HANDLERS = """
import asyncio, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from workpool import Session, handler

tasks = []

@handler(metadata={"do": "finish"})
async def finish(session: Session) -> dict[str, str]:
    session.log.info("finish runs")
    return {"done": "yes"}

@handler(metadata={"do": "fail"})
async def fail(session: Session) -> None:
    raise RuntimeError("as it was asked to")

@handler(metadata={"do": "wait"})
async def wait(session: Session) -> dict[str, str]:
    session.log.info("wait runs")
    await session.interrupted()
    return {"done": "when asked"}

@handler(metadata={"do": "linger"})
async def linger(session: Session) -> None:
    session.log.info("linger runs")
    await asyncio.sleep(3600)

@handler(metadata={"do": "ask"})
async def ask(session: Session) -> dict[str, str]:
    session.log.info("ask runs")
    with session.waiting():  # for a person, who writes a file
        while not Path("answer").exists():
            await asyncio.sleep(0.05)
    return {"done": "answered"}

@handler(metadata={"do": "ignore"})
async def ignore(session: Session) -> None:
    session.log.info("ignore runs")
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            session.log.info("cancellation ignored")

@handler(metadata={"do": "spawn"})
async def spawn(session: Session) -> None:
    session.log.info("spawn runs")
    tasks.append(asyncio.get_running_loop().create_task(ignore(session), name="orphan"))

@handler(metadata={"do": "block"})
async def block(session: Session) -> None:
    session.log.info("block runs")
    while not Path("free").exists():
        time.sleep(0.05)
    session.log.info("block ends")

@handler(metadata={"do": "thread"})
async def thread(session: Session) -> None:
    def code() -> None:  # says itself that it runs: until then its cancellation prevents it
        session.log.info("thread runs")
        time.sleep(600)
    await asyncio.to_thread(code)

idle = ThreadPoolExecutor(thread_name_prefix="idle-pool")

@handler(metadata={"do": "own thread"})
async def own_thread(session: Session) -> None:
    await asyncio.get_running_loop().run_in_executor(idle, time.time)
    threading.Thread(target=time.sleep, args=(600,), name="own-thread").start()
"""


def was_stopped(plane: ControlPlane, work_id: str) -> bool:
    """Return whether a call has stopped the item or requested its stop.

    Unlike the state of a released item, this does not change when the item's lease lapses before
    the worker's process has ended on a loaded machine.
    """
    kinds = {record.kind for record in plane.history.records_of_item(work_id)}
    return bool({"stop_requested", "stopped"} & kinds)


class RunningCommand:
    """A running `workpool` process, and the output that was read from it so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.pid = process.pid
        self.out = ""
        self.err = ""
        self._process = process
        self._stdout, self._stderr = process.stdout, process.stderr

    async def wait_for_log(self, text: str, times: int = 1) -> str:
        """Wait until `times` lines on stderr contain `text`, and return the last of these lines.

        Lines that arrived before this call count too.
        """
        found = [line for line in self.err.splitlines() if text in line]
        async with asyncio.timeout(SECONDS):
            while len(found) < times:
                line = (await self._stderr.readline()).decode()
                if not line:
                    pytest.fail(f"ended without {times} × {text!r}: {self.out}{self.err}")
                self.err += line
                if text in line:
                    found.append(line)
        return found[times - 1]

    async def wait_for_output(self, text: str = "") -> str:
        """Read stdout up to the next line that contains `text`, and return this line."""
        async with asyncio.timeout(SECONDS):
            while line := (await self._stdout.readline()).decode():
                self.out += line
                if text in line:
                    return line
        pytest.fail(f"ended without {text!r}: {self.out}{self.err}")

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def wait_for_exit(self, seconds: float = SECONDS) -> int:
        """Wait for the end of the process, read its last output, and return its exit status."""
        async with asyncio.timeout(seconds):
            out, err = await self._process.communicate()
        self.out += out.decode()
        self.err += err.decode()
        assert self._process.returncode is not None
        # pytest captures stderr and shows it if the test fails.
        sys.stderr.write(self.err)
        assert TOKEN not in self.out + self.err
        assert LIMITED not in self.out + self.err
        return self._process.returncode

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.communicate()


class CommandStarter(Protocol):
    async def __call__(self, *arguments: str, **variables: str) -> RunningCommand: ...


@pytest.fixture(autouse=True)
def enable_sigint_in_commands() -> Iterator[None]:
    """Enable SIGINT in commands that a test starts.

    A shell that runs pytest in the background sets SIGINT to be ignored, and commands inherit this.
    """
    former = signal.getsignal(signal.SIGINT)
    if former is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
async def control_plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane(
        environments=(ENVIRONMENT, FORBIDDEN),
        cloud_environments=(CLOUD,),
        tokens=TOKENS,
        worker_keys=(WORKER_KEY,),
    ) as plane:
        yield plane


@pytest.fixture
def command_working_directory(tmp_path: Path) -> Path:
    """Create the current directory of all commands, which contains `handlers.py`."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    return tmp_path


@pytest.fixture
def workpool_command_words() -> tuple[str, ...]:
    """Return the command that starts `workpool`, without its arguments."""
    return (sys.executable, "-m", "workpool")


@pytest.fixture
async def start_command_without_settings(
    command_working_directory: Path, workpool_command_words: tuple[str, ...]
) -> AsyncIterator[CommandStarter]:
    """Return a function that starts a command without the settings of the test process.

    The command gets only the settings that are passed to the function.
    """
    commands: list[RunningCommand] = []
    foreign = ("WORKPOOL_", "QODER_PAT", "ANTHROPIC_")

    async def start_process(*arguments: str, **variables: str) -> RunningCommand:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        process = await asyncio.create_subprocess_exec(
            *(*workpool_command_words, *arguments),
            env={**inherited, **variables},
            cwd=command_working_directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        commands.append(RunningCommand(process))
        return commands[-1]

    yield start_process
    for command in commands:
        await command.kill()


@pytest.fixture
def start_command(
    start_command_without_settings: CommandStarter, control_plane: ControlPlane
) -> CommandStarter:
    """Return a function that starts a command with the settings of the test's control plane."""

    async def start_process(*arguments: str, **variables: str) -> RunningCommand:
        defaults = {
            "WORKPOOL_BASE_URL": control_plane.base_url,
            "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
            "WORKPOOL_TOKEN": TOKEN,
            "WORKPOOL_METRICS_LISTEN": "127.0.0.1:0",
        }
        return await start_command_without_settings(*arguments, **{**defaults, **variables})

    return start_process


class CommandResult(NamedTuple):
    """The exit status and the output of a command that has ended."""

    status: int
    out: str
    err: str


class CommandRunner(Protocol):
    async def __call__(self, *arguments: str, **variables: str) -> CommandResult: ...


@pytest.fixture
def run_in_process(
    control_plane: ControlPlane, command_working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> CommandRunner:
    """Return a function that runs a command in pytest's process.

    A new process would take a second to start.
    """
    monkeypatch.chdir(command_working_directory)
    monkeypatch.setattr(sys, "path", [str(command_working_directory), *sys.path])
    monkeypatch.delitem(sys.modules, "handlers", raising=False)

    async def run_command(*arguments: str, **variables: str) -> CommandResult:
        environment = dict.fromkeys((n for n in os.environ if n.startswith("WORKPOOL_")), "")
        environment |= {
            "WORKPOOL_BASE_URL": control_plane.base_url,
            "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
            "WORKPOOL_TOKEN": TOKEN,
        }
        async with asyncio.timeout(SECONDS):
            result = await asyncio.to_thread(
                CliRunner().invoke, app, arguments, env=environment | variables
            )
        assert TOKEN not in result.output
        assert LIMITED not in result.output
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return CommandResult(result.exit_code, result.stdout, result.stderr)

    return run_command
