"""Runs the commands of `make gpu`: each with a log and a time limit, none able to stop the run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

GRACE = 20  # seconds in which an interrupted pytest writes its results
TAIL = 40  # lines of a log that a report quotes


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        name: Of its log.
        status: Its exit status.
        timed_out: Whether it was interrupted.
        log: What it printed.
        budget: Seconds that it had.
    """

    name: str
    status: int
    timed_out: bool
    log: Path
    budget: float

    @property
    def ok(self) -> bool:
        return self.status == 0 and not self.timed_out

    @property
    def tail(self) -> str:
        """The end of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-TAIL:])

    @property
    def said(self) -> str:
        """The last line, and how the command ended where that was not well."""
        lines = [line for line in self.tail.splitlines() if line.strip()]
        last = lines[-1].strip(" =") if lines else "it printed nothing"
        if self.timed_out:
            return f"out of time after {self.budget:.0f} s: {last}"
        return last if self.ok else f"exit status {self.status}: {last}"


class Command:
    """A command that runs.

    Args:
        name: Of its log.
        process: It, the head of a process group of its own.
        log: What it prints into.
        left: Seconds that the whole run has left.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, left: float) -> None:
        self.name, self.process, self.log, self.left = name, process, log, left

    def wait(self, budget: float) -> Outcome:
        """Wait for the end; interrupt, then kill, what takes longer than the budget.

        Args:
            budget: Seconds.

        Returns:
            How it ended.
        """
        budget = max(0.0, min(budget, self.left))
        timed_out = False
        try:
            self.process.wait(budget)
        except subprocess.TimeoutExpired:
            timed_out = True
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        # Also what a command leaves behind: workers hold memory of the GPU.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        return Outcome(self.name, status, timed_out, self.log, budget)


def _take_interrupts() -> None:
    # A shell has its background jobs ignore SIGINT, and what they start inherits that: `wait`
    # could not interrupt it then.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Commands:
    """Starts commands.

    Args:
        root: Where they run.
        work: Folder of their logs, emptied.
        deadline: Of all, on the monotonic clock.
        environment: Their variables.
    """

    def __init__(
        self, root: Path, work: Path, deadline: float, environment: dict[str, str]
    ) -> None:
        self.root, self.work, self.deadline = root, work, deadline
        self.environment = environment
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def start(
        self, name: str, command: list[str], environment: dict[str, str] | None = None
    ) -> Command:
        """Start a command; its log is `<name>.log`, added to where there is one."""
        log = self.work / f"{name}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_take_interrupts,
            )
        return Command(name, process, log, self.left)

    def run(
        self,
        name: str,
        command: list[str],
        budget: float,
        environment: dict[str, str] | None = None,
    ) -> Outcome:
        """Start a command and wait for it."""
        return self.start(name, command, environment).wait(budget)


def commit(root: Path) -> dict[str, object]:
    """The checkout's commit, and whether files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if shutil.which("git") is None or not (found := git("rev-parse", "HEAD")):
        return {"id": "unknown", "dirty": False}
    return {"id": found, "dirty": bool(git("status", "--porcelain"))}


def nvidia_smi() -> dict[str, str]:
    """Driver, power limit and clocks, as the driver's own tool tells them; nothing without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    fields = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = done.stdout.splitlines()[0].split(", ") if done.stdout.strip() else []
    return dict(zip(fields, values, strict=False)) if done.returncode == 0 else {}
