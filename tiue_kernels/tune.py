"""Tunes the launches for the GPU that is here: `python -m tiue_kernels.tune`.

For every launch of the published decoders it takes configurations around the heuristics', leaves
out those that spill registers or do not fit, checks the rest against the reference and times them
in turn. What is faster goes into a file in the user's folder (TIUE_CONFIGS, by default
~/.cache/tiue/configs), which later processes read at their first launch. Nothing is tuned while a
model runs.

    python -m tiue_kernels.tune --models sd15 --minutes 5
    python -m tiue_kernels.tune --compile-only 9.0 --models sd15    # what fits; needs no GPU
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tiue_kernels import configs
from tiue_kernels.configs import Config
from tiue_kernels.dispatch import block_memory
from tiue_kernels.triton.tuning import MODELS, Problem, candidates, problems

# Less is noise.
LEAST_GAIN = 0.02
ROUNDS = 20


@dataclass
class Tuned:
    """What came of one launch.

    Attributes:
        problem: the call that it is part of.
        bucket: of its shape.
        config: the fastest, the heuristic's unless another gained enough.
        seconds: of the call under the heuristic, and under `config`.
        left_out: configurations and why they were not timed.
    """

    problem: Problem
    bucket: str
    config: Config
    seconds: tuple[float, float] = (0.0, 0.0)
    left_out: list[tuple[Config, str]] = field(default_factory=list)

    @property
    def gain(self) -> float:
        before, after = self.seconds
        return before / after if after else 1.0


def why_not(
    problem: Problem, bucket: str, config: Config, capability: tuple[int, int]
) -> str | None:
    """Why a configuration is not worth timing on a GPU, which need not be here.

    Use in a process without TRITON_INTERPRET.

    Args:
        problem: the call.
        bucket: of the launch.
        config: in the heuristic's place.
        capability: compute capability of the GPU.

    Returns:
        A reason, or None where the call compiles, spills no register and fits into shared memory.
    """
    from tiue_kernels.triton.compilation import compiled, launches_of, ptxas_logs

    arguments = problem.arguments(torch.device("meta"))
    try:
        with configs.forced(problem.operator, bucket, config), ptxas_logs():
            launches = launches_of(lambda: problem.run("triton", arguments))
            figures = [compiled(launch, 10 * capability[0] + capability[1]) for launch in launches]
    except Exception as error:  # whatever the compiler raises
        return f"does not compile: {type(error).__name__}"
    if any(figure["spills"] for figure in figures):
        return f"spills {max(figure['spills'] for figure in figures)} bytes"
    most = block_memory(capability)
    if any(figure["shared"] > most for figure in figures):
        return f"needs {max(figure['shared'] for figure in figures)} bytes of shared memory"
    return None


class Checker:
    """Tells whether results are as near to the reference in wider arithmetic as the heuristic's.

    Args:
        problem: the call.
        arguments: of its launcher.
    """

    def __init__(self, problem: Problem, arguments: tuple[Any, ...]) -> None:
        wide = torch.float64 if problem.dtype == "float32" else torch.float32
        self._wide = wide
        self._exact = problem.run("reference", tuple(_cast(entry, wide) for entry in arguments))
        own = problem.run("triton", arguments)
        self._limits = [
            2 * self._error(x, exact) + 2 * torch.finfo(x.dtype).eps * exact.abs().max().item()
            if exact.numel()
            else 0.0
            for x, exact in zip(own, self._exact, strict=True)
        ]

    def _error(self, x: torch.Tensor, exact: torch.Tensor) -> float:
        return (x.to(self._wide) - exact).abs().max().item()

    def __call__(self, results: tuple[torch.Tensor, ...]) -> str | None:
        """What speaks against results; None: nothing."""
        for x, exact, limit in zip(results, self._exact, self._limits, strict=True):
            if exact.numel() and not self._error(x, exact) <= limit:  # NaN is wrong too
                return f"is off by {self._error(x, exact):.1e}, {limit:.1e} is allowed"
        return None


def _cast(entry: Any, dtype: torch.dtype) -> Any:
    return entry.to(dtype) if isinstance(entry, torch.Tensor) else entry


class Clock:
    """Times calls: on a GPU by events, inputs out of L2, launches hidden."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        if self._is_gpu:
            self._flush = torch.empty(1 << 26, dtype=torch.float32, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        if not self._is_gpu:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        self._flush.zero_()
        torch.cuda._sleep(2_000_000)  # a millisecond, in which the host queues the call
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def tune(
    problem: Problem,
    bucket: str,
    tried: list[Config],
    device: torch.device,
    clock: Callable[[Callable[[], object]], float],
    rounds: int = ROUNDS,
) -> Tuned:
    """Check and time the configurations of one launch, in turn.

    Args:
        problem: the call that it is part of.
        bucket: of the launch.
        tried: configurations, the heuristic first.
        device: where.
        clock: seconds of a call.
        rounds: timings of each.

    Returns:
        The fastest that is right.
    """
    arguments = problem.arguments(device)
    check = Checker(problem, arguments)
    result = Tuned(problem, bucket, tried[0])
    right: list[Config] = []
    for config in tried:
        try:
            with configs.forced(problem.operator, bucket, config):
                reason = check(problem.run("triton", arguments))
        except Exception as error:  # whatever compiler and driver raise
            reason = f"does not run: {type(error).__name__}"
        if reason is None:
            right.append(config)
        else:
            result.left_out.append((config, reason))
    if tried[0] not in right:
        return result

    seconds: list[list[float]] = [[] for _ in right]
    for index in range(rounds):
        order = range(len(right))
        for place in reversed(order) if index % 2 else order:
            with configs.forced(problem.operator, bucket, right[place]):
                seconds[place].append(clock(lambda: problem.run("triton", arguments)))
    medians = [statistics.median(times) for times in seconds]
    best = min(range(len(right)), key=medians.__getitem__)
    if medians[best] > (1 - LEAST_GAIN) * medians[0]:
        best = 0
    result.config, result.seconds = right[best], (medians[0], medians[best])
    return result


@contextmanager
def _compilers(workers: int) -> Iterator[Executor]:
    """Processes to compile in, for a whole run: starting them takes as long as a launch."""
    environment = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


def _pruned(
    pool: Executor, problem: Problem, bucket: str, tried: list[Config], capability: tuple[int, int]
) -> list[str | None]:
    """`why_not` of every candidate of a launch."""
    same = ([value] * len(tried) for value in (problem, bucket))
    return list(pool.map(why_not, *same, tried, [capability] * len(tried)))


def main(arguments: list[str] | None = None) -> None:
    """Tune, or with `--compile-only` say what compiles.

    Args:
        arguments: of the command line; by default this process's.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["sd15"])
    parser.add_argument("--layouts", nargs="+", choices=["nchw", "nhwc"], default=["nchw", "nhwc"])
    parser.add_argument("--dtypes", nargs="+", default=["float16"])
    parser.add_argument("--operators", nargs="+", help="by default all that have choices")
    parser.add_argument("--steps", type=int, default=4, help="K")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--most", type=int, default=24, help="candidates of a launch")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--output", type=Path, help="folder; by default the user's")
    parser.add_argument(
        "--compile-only", metavar="CAPABILITY", help="such as 9.0: print what compiles; no GPU"
    )
    parser.add_argument("--smoke", action="store_true", help="on a CPU, interpreted; for tests")
    options = parser.parse_args(arguments)
    if not (options.compile_only or options.smoke or torch.cuda.is_available()):
        parser.error(
            "there is no NVIDIA GPU to tune for; --compile-only 9.0 says what compiles for one"
        )

    deadline = time.monotonic() + 60 * options.minutes
    found = problems(options.models, options.layouts, options.dtypes, options.steps, options.batch)
    work = {
        (problem.operator, bucket): (
            problem, bucket, candidates(problem.operator, bucket, heuristic)[: options.most]
        )
        for problem in found
        if not options.operators or problem.operator in options.operators
        for bucket, heuristic in problem.choices()
    }  # fmt: skip
    if options.compile_only:
        major, _, minor = options.compile_only.partition(".")
        capability = (int(major), int(minor or 0))
        with _compilers(options.workers) as pool:
            for key, (problem, bucket, tried) in work.items():
                reasons = _pruned(pool, problem, bucket, tried, capability)
                for config, reason in zip(tried, reasons, strict=True):
                    entry = {"launch": key, "config": config, "why_not": reason}
                    print(json.dumps(entry), flush=True)
        return

    device = torch.device("cpu" if options.smoke else "cuda")
    folder = options.output or configs.user_folder()
    clock = Clock(device)
    done = 0
    with nullcontext() if options.smoke else _compilers(options.workers) as pool:
        for problem, bucket, tried in work.values():
            if time.monotonic() > deadline:
                break
            known = len(tried)
            if pool is not None:
                capability = torch.cuda.get_device_capability(device)
                reasons = _pruned(pool, problem, bucket, tried, capability)
                # The heuristic stays, spilling or not: it is what the others are held against.
                tried = [
                    config
                    for config, reason in zip(tried, reasons, strict=True)
                    if not reason or config is tried[0]
                ]
            result = tune(problem, bucket, tried, device, clock, options.rounds)
            done += 1
            right = len(tried) - len(result.left_out)
            print(
                f"{problem.operator} {bucket}: {result.gain:.2f} x, {result.config}, "
                f"{right} timed, {known - right} left out",
                flush=True,
            )
            if result.gain > 1:
                configs.write(folder, problem.operator, device, {bucket: result.config})
    print(f"{done} of {len(work)} launches tuned; results are in {folder}")


if __name__ == "__main__":
    main()
