"""Times what the host does for one pass and for one operator: `python -m benchmarks.bench_host`.

An eager pass on a GPU is as fast as the host can launch it. Here the channels are so few that
computing takes next to nothing, and what is left is Python, torch's dispatcher and Triton's. The
processor time of one thread is taken, which a busy machine does not lengthen. No GPU is needed:
where an operator's way to Triton's launch is timed, the driver below it does nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel

from benchmarks.forms.models import draw_parameters, random_inputs, stable_diffusion_scheduler
from benchmarks.gpu.pretend import CAPABILITY, MULTIPROCESSORS
from benchmarks.measure.counted import write_result
from benchmarks.measure.interleave import Rival, interleave
from benchmarks.measure.markdown import table
from testing import published_form
from testing.configs import CONFIGS
from testing.operators import OPERATORS, kernel_backends
from testing.problem import Draw
from testing.shapes import decoder
from tiue import OnePassSchedule, TiUEUNet
from tiue_kernels import dispatch, use_backend

# Stable Diffusion 1.5 in everything but its channels: as many layers, two channels a group.
UNET = CONFIGS["sd15"] | {
    "sample_size": 8,
    "block_out_channels": (32, 32, 32, 32),
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "norm_num_groups": 16,
}
LATENT_SIZE = 8
STEPS = 4


def passes() -> dict[str, Rival]:
    """The published form, this package, and a one-step UNet, eager on a CPU.

    Returns:
        Calls by name.
    """
    unet = draw_parameters(UNet2DConditionModel(**UNET).eval(), torch.Generator().manual_seed(0))
    inputs = random_inputs(unet, 1, LATENT_SIZE)
    scheduler = stable_diffusion_scheduler()
    schedule = OnePassSchedule.from_scheduler(scheduler, STEPS)
    student = TiUEUNet.from_unet(unet)
    latents, text = inputs["latents"], inputs["prompt_embeds"]

    @torch.no_grad()
    def one_step() -> torch.Tensor:
        return unet(latents, schedule.encoder_timestep, text, return_dict=False)[0]

    return {
        "published": partial(published_form.one_pass, unet, scheduler, STEPS, **inputs),
        "tiue": partial(student.one_pass, schedule=schedule, **inputs),
        "one-step": one_step,
    }


def operators() -> dict[str, dict[str, Rival]]:
    """Eager torch's form and this package's call of every operator, on a CPU, tiny.

    Returns:
        By operator: `eager` and `tiue`, inference both.
    """
    found = {}
    for name, operator in OPERATORS.items():
        sizes = next(s for s in decoder("tiny", 64).values() if operator.key(s) is not None)
        problem = operator.build(sizes, Draw(torch.device("cpu"), torch.float32))
        tensors = tuple(problem.tensors.values())
        found[name] = {
            "eager": partial(_inference, problem.eager, *tensors),
            "tiue": partial(_inference, problem.run, *tensors),
        }
    return found


def launches() -> dict[str, dict[str, Rival]]:
    """This package's call of every operator with kernels, down to the driver that does nothing.

    Use inside `mocked_driver`.

    Returns:
        By operator: `tiue`, the whole call at a published size in float16; and `triton`, what
        Triton's own launches in it take, made again with the same arguments.
    """
    found = {}
    for name, operator in OPERATORS.items():
        # The product between its kernels would be computed on the CPU, 0.2 s of it.
        if "triton" not in kernel_backends(name) or name == "shared_skip_layer_norm_linear":
            continue
        sizes = next(iter(operator.shapes(512).values()))
        problem = operator.build(sizes, Draw(torch.device("cpu"), torch.float16))
        call = partial(_inference, problem.run, *problem.tensors.values())
        made: list[Rival] = []
        with _recorded(made):
            call()
        found[name] = {"tiue": call, "triton": partial(_all, made)}
    return found


def _inference(function: Callable[..., object], *tensors: torch.Tensor) -> object:
    with torch.no_grad():
        return function(*tensors)


def _all(calls: list[Rival]) -> None:
    for call in calls:
        call()


@contextmanager
def _recorded(made: list[Rival]) -> Iterator[None]:
    """Collects the launches made inside."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def recording(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(partial(run, kernel, *args, **kwargs))
        return run(kernel, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", recording):
        yield


class _Driver:
    """What Triton asks of the driver before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)


def _compiled(kernel: Any, key: Any, _signature: Any, device: int, *_: Any) -> Any:
    """In the place of a compiled kernel: its launch is one Python call, as Triton's is."""
    stub = SimpleNamespace(
        function=0,
        packed_metadata=(),
        launch_metadata=lambda *_: None,
        run=lambda *_: None,
    )
    kernel.device_caches[device][0][key] = stub
    return stub


@contextmanager
def mocked_driver() -> Iterator[None]:
    """Inside, operators on CPU tensors go all the way to Triton's launch, which launches nothing.

    Raises:
        RuntimeError: Triton's kernels were imported for its interpreter before.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Triton's launches are timed without TRITON_INTERPRET")
    for name, backends in dispatch.TABLE.items():
        if "triton" in backends:
            importlib.import_module(f"tiue_kernels.triton.{name}")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", _compiled))
        stack.enter_context(
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties)
        )
        # What lets dispatch take Triton for tensors on a CPU; the kernels are there already.
        stack.enter_context(mock.patch.dict(os.environ, TRITON_INTERPRET="1"))
        dispatch.reset()
        stack.callback(dispatch.reset)
        stack.enter_context(use_backend("triton"))
        yield


def _thread_time(rival: Rival) -> float:
    begin = time.thread_time()
    rival()
    return time.thread_time() - begin


def medians(rivals: dict[str, Rival], rounds: int) -> dict[str, float]:
    """Seconds of one thread that each rival takes, in turn, after two calls that warm it up."""
    for rival in rivals.values():
        rival(), rival()
    with mock.patch("benchmarks.measure.interleave.wall_clock", _thread_time):
        seconds = interleave(rivals, rounds, torch.device("cpu"))
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(rounds: int = 15) -> dict[str, Any]:
    """Time all of it.

    Args:
        rounds: Of the passes; of operators ten times as many.

    Returns:
        `passes`: seconds by form; `launched`: those of `published` and `tiue` where this package's
        operators go down to Triton's launch; `operators`: by operator, seconds of `eager` and
        `tiue` on a CPU and, where it has kernels, of `launch` and of `triton` in it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rivals = passes()
        found: dict[str, Any] = {"passes": medians(rivals, rounds)}
        found["operators"] = {
            name: medians(calls, 10 * rounds) for name, calls in operators().items()
        }
        with mocked_driver():
            pair = {form: rivals[form] for form in ("published", "tiue")}
            found["launched"] = medians(pair, rounds)
            for name, calls in launches().items():
                times = medians(calls, 10 * rounds)
                found["operators"][name] |= {"launch": times["tiue"], "triton": times["triton"]}
    finally:
        torch.set_num_threads(threads)
    return found


PASS_HEADER = ["form", "host time", "of the published form's"]
OPERATOR_HEADER = [
    *("operator", "eager torch, CPU", "this package, CPU"),
    *("to the GPU's launch", "of it Triton's"),
]


def pass_rows(found: dict[str, Any]) -> list[list[str]]:
    """Lines of a table of the passes.

    Args:
        found: What `measure` returns.
    """
    times = dict(found["passes"])
    lines = [[form, seconds, seconds / times["published"]] for form, seconds in times.items()]
    if launched := found.get("launched"):
        ratio = launched["tiue"] / launched["published"]
        lines.append(["tiue, to the GPU's launches", launched["tiue"], ratio])
    return [[form, f"{1e3 * seconds:.1f} ms", f"{ratio:.2f} x"] for form, seconds, ratio in lines]


def against_goal(found: dict[str, Any]) -> str:
    """One line that holds the passes against the goal: no more than the published form's.

    Args:
        found: What `measure` returns.
    """
    ratios = {"on a CPU": found["passes"]}
    if "launched" in found:
        ratios["to the GPU's launches"] = found["launched"]
    shown = [f"{x['tiue'] / x['published']:.2f} x {where}" for where, x in ratios.items()]
    line = f"Goal: at most the published form's; now {' and '.join(shown)}."
    if all(times["tiue"] <= times["published"] for times in ratios.values()):
        return line
    return (
        f"{line} The rest is Python: each operator checks shapes and dtypes, chooses a backend and"
        " makes its launch anew, each layer is asked whether it is plain, and parts that are shared"
        " are sliced and joined by views. A CUDA graph or torch.compile takes none of it."
    )


def operator_rows(found: dict[str, Any]) -> list[list[str]]:
    """Lines of a table of the operators.

    Args:
        found: What `measure` returns.
    """
    columns = ("eager", "tiue", "launch", "triton")
    return [
        [name, *(f"{1e6 * times[key]:.0f} µs" if key in times else "" for key in columns)]
        for name, times in found["operators"].items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print both tables, or write the results.

    Args:
        arguments: Of the command line; by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", metavar="FILE", help="write the results into a JSON file")
    parser.add_argument("--commit", help="that this tree is a copy of, where it is no checkout")
    options = parser.parse_args(arguments)
    found = measure(options.rounds)
    print(table(PASS_HEADER, pass_rows(found)))
    print()
    print(table(OPERATOR_HEADER, operator_rows(found)))
    if options.write:
        write_result(options.write, found, options.commit)


if __name__ == "__main__":
    main()
