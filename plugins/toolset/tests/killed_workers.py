"""A program that runs scripted sessions of 30 tool calls and kills their workers.

    python plugins/toolset/tests/killed_workers.py --kills 20 --seed 1
    python plugins/toolset/tests/killed_workers.py --sleeps 5 --seed 1

With `--sleeps`, workers are not killed: SIGSTOP suspends them until their leases have expired, and
they continue after the session. Each request that they then send for the session counts as wrong.

The program judges side effects and the control plane's events, and ignores the worker's log: each
call is answered exactly once; each command has left at most one line, and exactly one if its own
result was the answer. It prints the event log, the final state of the workspace and a summary. The
exit status is 1 if a rule was violated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workpool import Settings, WorkClient
from workpool.server import ControlPlane
from workpool.testing import Faults, expire_lease

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

TOKEN = "the-worker's-token-Zx9"  # noqa: S105 - a token of the test only
BOUND_SECONDS = 300.0
WRITES = {"send", "stop", "update", "heartbeat"}
UNKNOWN_OUTCOME = "its outcome is unknown"
TOOLS = """
import os
from pathlib import Path

async def shout(call):
    with Path(os.environ["SHOUTS"]).open("a") as log:
        log.write(call.input["line"] + "\\n")
    return call.input["line"].upper()
"""


def make_bash_call_that_logs_number(
    number: int, before: str = "", permission: str = "allow"
) -> dict[str, Any]:
    """Return a Bash call whose command appends the number of the call to a file."""
    command = f"{before}echo {number} >> log; sleep 0.05; echo said {number}"
    return {"name": "Bash", "input": {"command": command}, "permission": permission}


def make_scripted_call(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "input": fields}


SCRIPT: list[dict[str, Any]] = [
    make_bash_call_that_logs_number(1),
    make_scripted_call("Write", file_path="notes/plan.txt", content="first\nsecond\n"),
    make_scripted_call("Read", file_path="notes/plan.txt"),
    make_scripted_call("Edit", file_path="notes/plan.txt", old_string="second", new_string="2nd"),
    make_scripted_call("Glob", pattern="**/*.txt"),
    make_scripted_call("Grep", pattern="2nd|log"),
    make_bash_call_that_logs_number(7, "cat notes/plan.txt; "),
    make_scripted_call("Read", file_path="missing.txt"),
    make_scripted_call("Bash", command="echo to stderr >&2; (exit 3)"),
    make_scripted_call("Bash", command="echo begun; sleep 60", timeout_ms=300),
    make_scripted_call("Bash", restart=True),
    make_bash_call_that_logs_number(12, permission="ask"),
    make_bash_call_that_logs_number(13, permission="deny"),
    make_bash_call_that_logs_number(14, permission="ask"),
    {"name": "shout", "input": {"line": "15"}, "custom": True},
    make_scripted_call(
        "Bash", command="env; cat /proc/*/environ; cat ../* ../../*; ls -la /", restart=True
    ),
    make_scripted_call("Read", file_path="/proc/self/environ"),
    *(make_bash_call_that_logs_number(number) for number in range(18, 24)),
    {"name": "shout", "input": {"line": "24"}, "custom": True},
    make_scripted_call("Read", file_path="notes/plan.txt", view_range=[2, 2]),
    make_scripted_call("Write", file_path="notes/done.txt", content="done\n"),
    *(make_bash_call_that_logs_number(number) for number in range(27, 31)),
]
VERDICTS = {12: "allow", 14: "deny"}
DENIED = {13, 14}
COUNTED = {
    number
    for number, entry in enumerate(SCRIPT, 1)
    if "echo said" in entry["input"].get("command", "") or entry["name"] == "shout"
}


class ScriptedSession:
    """One session with a scripted agent, and the workers that are started and killed for it."""

    def __init__(
        self, plane: ControlPlane, faults: Faults, folder: Path, seed: int, *, sleeping: bool
    ) -> None:
        self.plane = plane
        self.faults = faults
        self.seed = seed
        self.sleeping = sleeping
        self.asleep: list[asyncio.subprocess.Process] = []
        self.folder = folder
        self.random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        [self.item] = plane.enqueue(script=SCRIPT)
        self.settings = Settings(
            base_url=plane.base_url, token=plane.token, environment_id=plane.environments[0]
        )
        # A suspended worker must lose its lease soon. Without suspensions, no lease may end while
        # its worker runs, even on a loaded machine.
        lease_ttl = 10 if sleeping else 60
        (folder / "show_tools.py").write_text(TOOLS)
        (folder / "workpool.toml").write_text(
            f"""
            [workpool]
            metrics_listen = "off"
            lease_ttl = {lease_ttl}
            [workpool.plugin.toolset]
            state = {json.dumps(str(folder / "state"))}
            isolation = "bubblewrap"
            max_idle = 0.2
            tools = {{ shout = "show_tools:shout" }}
            """
        )

    @property
    def session_events(self) -> Sequence[Mapping[str, Any]]:
        return self.plane.events(self.item.session_id)

    def count_answered_calls(self) -> int:
        return sum(event["type"].endswith("tool_result") for event in self.session_events)

    def session_has_ended(self) -> bool:
        last = self.session_events[-1]
        return bool(last.get("stop_reason", {}).get("type") == "end_turn")

    @contextlib.asynccontextmanager
    async def running_worker(self, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run a `workpool run toolset` process during the `with` block, then kill or suspend it."""
        environment = {
            name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ
        }
        with (self.folder / "worker.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "workpool", "run", "toolset", "--config", "workpool.toml"),
                *flags,
                cwd=self.folder,
                stderr=log,
                env=environment
                | {
                    "WORKPOOL_BASE_URL": self.plane.base_url,
                    "WORKPOOL_ENVIRONMENT_ID": self.plane.environments[0],
                    "QODER_PAT": self.plane.token,
                    "SHOUTS": str(self.folder / "shouts"),
                },
            )
        try:
            yield process
        finally:
            if self.sleeping and not flags:
                process.send_signal(signal.SIGSTOP)
                self.asleep.append(process)
            elif process.returncode is None:
                process.kill()
                await process.wait()

    async def answer_confirmation_requests(self) -> None:
        """Allow or deny each tool call for which the session requests confirmation."""
        waiting = list(VERDICTS.values())
        async with WorkClient(self.settings) as client:
            events = client.events(self.item.session_id)
            async with events.stream() as stream:
                async for event in stream:
                    for name in event.get("stop_reason", {}).get("event_ids", ()):
                        if self._find_tool_name(name) == "Bash":
                            verdict = {"tool_use_id": name, "result": waiting.pop(0)}
                            await events.send({"type": "user.tool_confirmation", **verdict})
                    if not waiting:
                        return

    def _find_tool_name(self, call: str) -> object:
        return next(event["name"] for event in self.session_events if event["id"] == call)

    async def wait_for_answered_calls(self, answers: int) -> None:
        """Wait until this many calls are answered, or the session has ended."""
        async with (
            WorkClient(self.settings) as client,
            client.events(self.item.session_id).stream() as stream,
        ):
            async for _ in stream:
                if self.count_answered_calls() >= answers or self.session_has_ended():
                    return

    @property
    def environment_and_item_id(self) -> tuple[str, str]:
        return self.item.environment_id, self.item.id

    async def resume_suspended_workers(self) -> list[str]:
        """Let the suspended workers continue until they end. Return one text for each problem.

        A worker that was suspended has lost its lease, so it must not send results or heartbeats.
        """
        before = len(self.faults.seen)
        for process in self.asleep:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.asleep:
            status = await process.wait()
            if status:
                return [f"a suspended worker ended with {status}"]
        sent = [request.op for request in self.faults.seen[before:]]
        return [f"a suspended worker made the call {op}" for op in sent if op in WRITES]

    async def run_session(self, kills: int) -> int:
        """Run the session to its end, and return how often workers were killed or suspended."""
        killed = 0
        async with asyncio.timeout(BOUND_SECONDS), asyncio.TaskGroup() as group:
            group.create_task(self.answer_confirmation_requests(), name="person")
            while killed < kills and not self.session_has_ended():
                async with self.running_worker():
                    # The worker is killed during the call that follows this answer.
                    await self.wait_for_answered_calls(self.count_answered_calls() + 1)
                    await asyncio.sleep(self.random.choice((0.0, 0.01, 0.02, 0.05, 0.1, 0.2)))
                if not self.session_has_ended():
                    killed += 1
                expire_lease(self.plane, self.item.id)
            while self.plane.operations.get_item(*self.environment_and_item_id).state != "stopped":
                async with self.running_worker("--drain") as process:
                    status = await process.wait()
                    assert status == 0, f"the worker ended with {status}"
        return killed

    def find_violations(self) -> tuple[list[str], Counter[str]]:
        """Return a text for each violated rule, and the number of answers: own, unknown, denied."""
        wrong: list[str] = []
        calls = [event for event in self.session_events if event["type"].endswith("tool_use")]
        results = [event for event in self.session_events if event["type"].endswith("tool_result")]
        done = Counter((self.session_workspace / "log").read_text().split())
        done += Counter((self.folder / "shouts").read_text().split())
        counts: Counter[str] = Counter()
        if len(calls) != len(SCRIPT):
            wrong.append(f"{len(calls)} of {len(SCRIPT)} calls were made")
        for number, call in enumerate(calls, 1):
            own = [r for r in results if call["id"] in r.values()]
            if len(own) != 1:
                wrong.append(f"call {number} has {len(own)} answers")
                continue
            result_text = json.dumps(own[0]["content"])
            unknown, ours = UNKNOWN_OUTCOME in result_text, own[0]["type"].startswith("user.")
            counts["unknown" if unknown else "own" if ours else "denied"] += 1
            times = done[str(number)]
            least = int(number in COUNTED - DENIED and not unknown)
            most = int(number in COUNTED - DENIED)
            if not least <= times <= most:
                wrong.append(
                    f"call {number} was executed {times} times, answered with {result_text}"
                )
            if (number in DENIED) is ours:
                wrong.append(f"call {number} was answered by {own[0]['type']}")
            if TOKEN in result_text:
                wrong.append(f"call {number} shows the token")
        return wrong, counts

    @property
    def session_workspace(self) -> Path:
        return self.folder / "state" / self.item.session_id / "workspace"


async def main(kills: int, seed: int, *, sleeping: bool, quiet: bool) -> int:
    """Run sessions until workers were killed `kills` times. Return 1 after a violation, else 0."""
    left, failed = kills, False
    while True:
        with tempfile.TemporaryDirectory(prefix="toolset-show-") as name:
            faults = Faults()
            async with ControlPlane(tokens={TOKEN: None}, middlewares=[faults.middleware]) as plane:
                run = ScriptedSession(plane, faults, Path(name), seed, sleeping=sleeping)
                killed, wrong = await run_session_and_find_violations(run, left, quiet=quiet)
        left, seed, failed = left - killed, seed + 1, failed or bool(wrong)
        if left <= 0 or failed:
            return int(failed)


async def run_session_and_find_violations(
    run: ScriptedSession, kills: int, *, quiet: bool
) -> tuple[int, list[str]]:
    """Run and check one session. Return the number of killed workers, and all violations."""
    say = sys.stdout.write
    try:
        killed = await run.run_session(kills)
        wrong = await run.resume_suspended_workers()
    except BaseException:
        say((run.folder / "worker.log").read_text()[-5000:])
        raise
    found, counts = run.find_violations()
    wrong += found
    for event in () if quiet else run.session_events:
        shown = {key: event[key] for key in event if key not in {"type", "id"}}
        say(f"{event['type']:24} {json.dumps(shown, ensure_ascii=False)[:150]}\n")
    for path in () if quiet else sorted(run.session_workspace.rglob("*")):
        if path.is_file():
            say(f"{path.relative_to(run.session_workspace)}: {path.read_text()!r}\n")
    say(
        f"seed={run.seed} calls={len(SCRIPT)} killed={killed} own_results={counts['own']}"
        f" unknown={counts['unknown']} denied={counts['denied']} wrong={wrong}\n"
    )
    sys.stdout.flush()
    return killed, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--sleeps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    flags = parser.parse_args()
    kills, sleeping = flags.kills or flags.sleeps, bool(flags.sleeps)
    sys.exit(asyncio.run(main(kills, flags.seed, sleeping=sleeping, quiet=flags.quiet)))
