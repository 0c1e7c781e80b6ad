"""Everything that needs an NVIDIA GPU, in one run: `make gpu`, or `python -m benchmarks.gpu`.

Builds csrc for this card, tests every kernel and recorded passes, watches the kernels with
compute-sanitizer, measures the ceilings, tunes the launches, times the operators and the one pass,
eager, recorded and compiled, and writes gpu.json and gpu.md. A part that fails or runs out of time
is reported, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report, results
from benchmarks.gpu.commands import Commands, Outcome, commit, nvidia_smi
from benchmarks.measure import ceilings
from benchmarks.measure.machine import describe, slug, without_paths
from testing.operators import OPERATORS, kernel_backends
from testing.problem import default_device
from tiue_kernels import configs
from tiue_kernels.build import LIBRARIES

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/tiue_kernels/test_kernels_on_gpu.py"
GRAPH_TESTS = "tests/tiue/compiled/test_graphs_on_gpu.py"
ROUNDS = 20
# Seconds a part may take at most. Their sum is more than the whole run is given: what one part does
# not use, the later ones may.
BUDGETS = {
    "build": 120,
    "tests": 180,
    "graphs": 45,
    "sanitizer": 60,
    "ceilings": 20,
    "one pass": 90,
    "tune": 60,
    "warm-up": 60,
    "operators": 220,
    "compiled": 120,
}
MINUTES = 9.5
# A smoke run measures nothing: on a busy machine its parts take as long as they take.
SMOKE_BUDGET, SMOKE_MINUTES = 900, 60
GIB_PER_WORKER = 9  # the largest test, in float64
SMOKE_OPERATORS = ("geglu", "one_pass_combine")
# Compiling takes a minute a form, and so is a part of its own.
ONE_PASS_FORMS = (
    *("published", "published-channels-last", "published-graph", "full-steps", "one-step"),
    *("tiue", "tiue-channels-last", "tiue-graph"),
)
COMPILED_FORMS = ("published", "tiue-graph", "tiue-inductor", "published-inductor")


class Run:
    """One run: its commands, and what they gave.

    Args:
        folder: Where gpu.json and gpu.md go.
        work: Where logs and intermediate files go.
        smoke: Tiny shapes on a CPU, to execute every line that a CPU can.
        seconds: What the whole run may take.
    """

    def __init__(self, folder: Path, work: Path, smoke: bool, seconds: float) -> None:
        self.folder, self.work, self.smoke = folder, work, smoke
        # What this run tunes, and nothing that was tuned before, is what it measures.
        self.configs = folder / "configs"
        variables = environment(smoke) | {configs.VARIABLE: str(self.configs)}
        self.commands = Commands(ROOT, work, time.monotonic() + seconds, variables)
        self.device = torch.device("cpu") if smoke else default_device()
        self.ceilings_file = work / "ceilings.json"
        self.result: dict[str, Any] = {
            "smoke": smoke,
            "machine": describe(self.device) | ({} if smoke else nvidia_smi()),
            "commit": commit(ROOT),
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            "parts": [],
        }

    def part(self, name: str, run: Callable[[], str]) -> None:
        """Run one part, note how it went, and write what there is so far.

        Args:
            name: The part.
            run: Returns what the report says; raises `PartError` or `NotRunError`.
        """
        print(f"{name} ...", flush=True)
        begin = time.monotonic()
        entry: dict[str, Any] = {"name": name, "status": "passed", "log_tail": ""}
        try:
            entry["detail"] = run()
        except NotRunError as reason:
            entry |= {"status": "not run", "detail": str(reason)}
        except PartError as error:
            entry |= {"status": "failed", "detail": str(error), "log_tail": error.log_tail}
        except Exception as error:  # a part's own mistake must not cost the parts behind it
            entry |= {"status": "failed", "detail": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(time.monotonic() - begin, 1)
        self.result["parts"].append(entry)
        print(f"{name}: {entry['status']}, {entry['seconds']:.0f} s. {entry['detail']}", flush=True)
        self.write()

    def write(self) -> None:
        """Write both files; the next part writes them again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("gpu.json", json.dumps(self.result, indent=1) + "\n"),
            ("gpu.md", report.markdown(self.result)),
        ):
            temporary = self.folder / f".{name}"
            temporary.write_text(without_paths(text), encoding="utf-8")
            temporary.replace(self.folder / name)

    def python(self, name: str, *arguments: str, **options: Any) -> Outcome:
        """Run this Python on arguments, under a part's budget."""
        options.setdefault("budget", self.budget(name))
        return self.commands.run(name, [sys.executable, *arguments], **options)

    def budget(self, name: str) -> float:
        """Seconds that a part may take."""
        return SMOKE_BUDGET if self.smoke else BUDGETS[name]

    @property
    def failed(self) -> bool:
        return any(part["status"] == "failed" for part in self.result["parts"])

    def build(self) -> str:
        """Compile csrc for this card alone, into the package."""
        if self.smoke:
            raise NotRunError("smoke run: csrc is compiled for GPUs")
        library = ROOT / "tiue_kernels" / "cuda" / LIBRARIES["cuda"]
        library.unlink(missing_ok=True)  # of another card or commit; what fails leaves none
        archs = architecture(*torch.cuda.get_device_capability(self.device))
        built = self.python(
            "build", "-m", "tiue_kernels.compile", "cuda", environment={"TIUE_CUDA_ARCHS": archs}
        )
        if not built.ok:
            library.unlink(missing_ok=True)
            raise PartError(f"{built.said}; the other parts go on with Triton", built)
        code = "import sys; from tiue_kernels import cuda; sys.exit(cuda.why_not())"
        loaded = self.python("build", "-c", code)
        if not loaded.ok:
            raise PartError(loaded.said, loaded)
        return f"compiled for sm_{archs}, loads"

    def tests(self) -> str:
        """The tests marked `gpu`, several processes on the one card."""
        junit = self.work / "tests.xml"
        arguments = ["-m", "pytest", TESTS, "-m", "gpu", "-q", f"--junitxml={junit}"]
        if self.smoke:
            arguments += ["-k", " or ".join(SMOKE_OPERATORS)]
        outcome = self.python("tests", *arguments, *self.parallel())
        if not junit.exists():
            raise PartError(f"pytest left no result: {outcome.said}", outcome)
        parity = results.read_junit(junit) | {"complete": not outcome.timed_out}
        self.result["parity"] = parity
        counts = ", ".join(f"{parity[name]} {name}" for name in ("passed", "failed", "skipped"))
        if not outcome.ok or parity["failed"] or not parity["passed"]:
            raise PartError(f"{counts}; {outcome.said}", outcome)
        return counts

    def parallel(self) -> list[str]:
        """pytest-xdist's arguments; each process needs memory of the GPU for its largest test."""
        if self.smoke or importlib.util.find_spec("xdist") is None:
            return []
        memory = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        workers = min(8, len(os.sched_getaffinity(0)), int(memory / GIB_PER_WORKER))
        return ["-n", str(workers)] if workers > 1 else []

    def graphs(self) -> str:
        """Passes recorded as CUDA graphs, against the same passes as they are."""
        if importlib.util.find_spec("diffusers") is None:
            raise NotRunError("diffusers is not installed")
        options = ["-k", "nchw"] if self.smoke else []
        outcome = self.python("graphs", "-m", "pytest", GRAPH_TESTS, "-m", "gpu", "-q", *options)
        if not outcome.ok:
            raise PartError(outcome.said, outcome)
        return outcome.said

    def tune(self) -> str:
        """Launch configurations for this card; what is measured afterwards runs with them."""
        shutil.rmtree(self.configs, ignore_errors=True)
        budget = self.budget("tune")
        options = ["--models", "sd15", "--minutes", f"{(budget - 15) / 60:.2f}", "--most", "12"]
        options += ["--layouts", "nhwc"]
        if self.smoke:
            options = ["--smoke", "--models", "tiny", "--operators", "geglu", "--most", "2"]
            options += ["--dtypes", "float32", "--rounds", "1"]
        output = f"--output={self.configs}"
        outcome = self.python("tune", "-m", "tiue_kernels.tune", *options, output)
        if not outcome.ok:
            raise PartError(outcome.said, outcome)
        return outcome.said

    def sanitizer(self) -> str:
        """memcheck and racecheck, side by side."""
        call = [sys.executable, "-m", "benchmarks.gpu.sanitize"]
        if self.smoke:  # the calls themselves, which nothing watches
            outcome = self.python("sanitizer", *call[1:], "--operators", "geglu")
            if not outcome.ok:
                raise PartError(outcome.said, outcome)
            return f"smoke run: {outcome.said}, not watched"
        tool = shutil.which("compute-sanitizer") or shutil.which(
            "/usr/local/cuda/bin/compute-sanitizer"
        )
        if tool is None:
            raise NotRunError("compute-sanitizer is not on PATH: it comes with the CUDA toolkit")
        # Memory of torch's cache would hide a store behind the end of a tensor.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        started = {
            name: self.commands.start(
                f"sanitizer-{name}",
                [tool, "--tool", name, "--error-exitcode", "86", "--print-limit", "20", *call],
                environment=uncached,
            )
            for name in ("memcheck", "racecheck")
        }
        deadline = time.monotonic() + self.budget("sanitizer")
        outcomes = {
            name: command.wait(deadline - time.monotonic()) for name, command in started.items()
        }
        said = "; ".join(f"{name}: {outcome.said}" for name, outcome in outcomes.items())
        for outcome in outcomes.values():
            if not outcome.ok:
                raise PartError(said, outcome)
        return said

    def ceilings(self) -> str:
        """A copy and products, measured once for the whole run."""
        output = f"--output={self.ceilings_file}"
        outcome = self.python("ceilings", "-m", "benchmarks.measure.ceilings", output)
        if not outcome.ok:
            raise PartError(outcome.said, outcome)
        measured = self.result["ceilings"] = ceilings.load(self.ceilings_file)
        return f"copy {measured['copy_gb_s']:.0f} GB/s"

    def warm_up(self) -> str:
        """Compile what the races will run, in parallel, into the caches of Triton and torch."""
        if not (parallel := self.parallel()):
            raise NotRunError("needs pytest-xdist and several cores: the races compile themselves")
        files = [str(benchmark_of(operator)) for operator in OPERATORS]
        outcome = self.python(
            *("warm-up", "-m", "pytest", *files, "-q", "--timeout=0", "--bench-rounds=1"),
            *("-k", "compile-forward"),  # one test a case runs the whole race
            *(f"--bench-ceilings={self.ceilings_file}", *parallel),
            environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"},
        )
        # What is wrong here is wrong in the race as well, and reported there.
        return outcome.said

    def operators(self) -> str:
        """A process for each operator with kernels: one that crashes costs its own times alone."""
        rows = self.result["operators"] = []
        wrong = self.result["wrong"] = []
        deadline = time.monotonic() + self.budget("operators")
        broken: list[Outcome] = []
        missed = []
        options = [f"--bench-rounds={2 if self.smoke else ROUNDS}", "--timeout=0", "-q", "-rf"]
        if self.ceilings_file.exists():
            options.append(f"--bench-ceilings={self.ceilings_file}")
        if self.smoke:
            options += ["--bench-forms", "tiue", "tiue-triton", "eager"]
        for name, members in groups(SMOKE_OPERATORS if self.smoke else tuple(OPERATORS)).items():
            left = deadline - time.monotonic()
            if left < 5 or self.commands.left < 5:
                missed += members
                continue
            output, junit = (self.work / f"bench_{name}.{end}" for end in ("json", "xml"))
            arguments = ["-m", "pytest", *(str(benchmark_of(member)) for member in members)]
            arguments += [f"--benchmark-json={output}", f"--junitxml={junit}", *options]
            outcome = self.commands.run(f"bench_{name}", [sys.executable, *arguments], budget=left)
            if not outcome.ok:
                broken.append(outcome)
            if junit.exists():
                failures = results.read_junit(junit)["failures"]
                wrong += sorted({failure["message"] for failure in failures})
            for row in results.read_benchmark(output):
                gate = results.gate(row["operator"], row["form"], self.result.get("parity"))
                rows.append(row | {"gate": gate})
            self.write()
        said = f"{len(rows)} figures of {len({row['operator'] for row in rows})} operators"
        causes = [f"{outcome.name}: {outcome.said}" for outcome in broken]
        if missed:
            causes.append(f"out of time before {', '.join(missed)}")
        if causes:
            raise PartError("; ".join([said, *causes]), *broken[:1])
        return said

    def one_pass(self) -> str:
        """The whole one pass against its published form, eager and recorded."""
        options = ["--bench-rounds", "5", "--bench-memory"]  # of CUDA alone: costs no process
        outcome, said = self._one_pass("one pass", "bench_one_pass", ONE_PASS_FORMS, options)
        if not outcome.ok:
            raise PartError(outcome.said, outcome)
        return said

    def compiled(self) -> str:
        """The one pass under torch.compile, where the time that is left allows it."""
        if self.smoke:
            raise NotRunError("smoke run: compiling takes minutes on a CPU")
        if self.commands.left < 60:
            raise NotRunError(f"{self.commands.left:.0f} s are left, and compiling takes a minute")
        name = "bench_one_pass_compiled"
        outcome, said = self._one_pass("compiled", name, COMPILED_FORMS, ["--bench-rounds", "5"])
        if outcome.timed_out:
            raise NotRunError(outcome.said)
        if not outcome.ok:
            raise PartError(outcome.said, outcome)
        return said

    def _one_pass(
        self, part: str, name: str, forms: tuple[str, ...], options: list[str]
    ) -> tuple[Outcome, str]:
        """Race forms as `make bench` does, and keep the result; with the medians in words."""
        if importlib.util.find_spec("diffusers") is None:
            raise NotRunError("diffusers is not installed")
        size = ["--bench-latents", "64"]
        if self.smoke:
            size = ["--bench-model", "tiny", "--bench-latents", "8"]
        output = self.work / f"{name}.json"
        outcome = self.python(
            *(part, "-m", "pytest", "benchmarks/bench_one_pass.py", "-q", "--timeout=0"),
            *(f"--benchmark-json={output}", *size, *options, "--bench-forms", *forms),
        )
        if not outcome.ok:
            return outcome, ""
        shutil.copy(output, self.folder / output.name)
        rows = results.read_benchmark(output)
        times = ", ".join(f"{row['form']} {row['median_s'] * 1e3:.1f} ms" for row in rows)
        exposed = [row["form"] for row in rows if row.get("launches") == "exposed"]
        if exposed:
            times += f"; bound by the host: {', '.join(exposed)}"
        return outcome, times


class NotRunError(Exception):
    """A part that this machine cannot run; no failure."""


class PartError(Exception):
    """A part that failed; with the command's log where there is one."""

    def __init__(self, message: str, *outcomes: Outcome) -> None:
        super().__init__(message)
        self.log_tail = "\n".join(outcome.tail for outcome in outcomes)


def architecture(major: int, minor: int) -> str:
    """What TIUE_CUDA_ARCHS calls a card; Hopper's own instructions need the `a`."""
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def groups(operators: tuple[str, ...]) -> dict[str, list[str]]:
    """Operators by the process that times them: compositions share one, which saves its start."""
    found: dict[str, list[str]] = {}
    for operator in operators:
        name = operator if kernel_backends(operator) else "compositions"
        found.setdefault(name, []).append(operator)
    return found


def benchmark_of(operator: str) -> Path:
    return Path("benchmarks/operators") / f"bench_{operator}.py"


def environment(smoke: bool) -> dict[str, str]:
    """This process's variables without those that would change what is measured."""
    ours = {"TIUE_BACKEND", "TIUE_HOST_LIBRARY", "TRITON_INTERPRET", "PYTEST_ADDOPTS"}
    ours.add(configs.VARIABLE)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and "PYTEST_XDIST" not in name
    }
    if smoke:
        kept |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept


def main(arguments: list[str] | None = None) -> int:
    """Run every part.

    Args:
        arguments: Of the command line; by default this process's.

    Returns:
        The exit status: 1 when a part failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument(
        "--minutes", type=float, help=f"for the whole run: {MINUTES}, {SMOKE_MINUTES} with --smoke"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU; needs --output")
    options = parser.parse_args(arguments)
    if options.smoke and options.output is None:
        parser.error("--smoke measures nothing: give it a folder with --output")
    if not options.smoke and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --smoke --output FOLDER runs on a CPU")

    default = ROOT / "benchmarks" / "results" / slug(default_device())
    folder = options.output.resolve() if options.output else default
    work = folder / "work" if options.smoke else ROOT / "out" / "gpu"
    minutes = options.minutes or (SMOKE_MINUTES if options.smoke else MINUTES)
    run = Run(folder, work, options.smoke, 60 * minutes)
    run.part("build", run.build)
    run.part("tests", run.tests)
    run.part("graphs", run.graphs)
    run.part("sanitizer", run.sanitizer)
    run.part("ceilings", run.ceilings)
    run.part("tune", run.tune)
    run.part("one pass", run.one_pass)
    run.part("warm-up", run.warm_up)
    run.part("operators", run.operators)
    run.part("compiled", run.compiled)
    print(f"{folder / 'gpu.md'}; logs in {work}")
    return int(run.failed)
