"""Counts the kernels of a pass on a GPU, and the bytes that they move: no GPU, no clock.

`python -m benchmarks.launches` prints a table of every form. Each kernel reads its inputs once and
writes its outputs once: what caches save, and what a library's kernel reads again or converts
inside (cuDNN's own layouts), is not counted. The second pass is counted: what is kept of the first
is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from benchmarks.forms.models import random_inputs, stable_diffusion_scheduler
from benchmarks.gpu.pretend import DEVICE, CudaError, Launch, PretendGpu
from benchmarks.measure.counted import write_result
from benchmarks.measure.markdown import table
from testing import published_form
from testing.configs import CONFIGS, COUNTED
from tiue import OnePassSchedule, TiUEUNet

FORMS = ("published", "tiue", "one-step")
LAYOUTS = ("nchw", "nhwc")


@cache
def count(
    form: str,
    model: str = "sd15",
    layout: str = "nchw",
    latent_size: int = 64,
    batch: int = 1,
    num_decoder_steps: int = 4,
) -> tuple[Launch, ...]:
    """Record one form, from noise and text to denoised latents, in float16 at inference.

    Args:
        form: One of `FORMS`; `one-step` is the whole UNet once.
        model: A key of `testing.configs.CONFIGS`.
        layout: Of the UNet's weights: "nchw" or "nhwc".
        latent_size: Height and width of the latents.
        batch: B.
        num_decoder_steps: K.

    Returns:
        Every kernel of one pass, in order.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[model]).eval().requires_grad_(False).half()
    if layout == "nhwc":
        unet = unet.to(memory_format=torch.channels_last)
    scheduler = stable_diffusion_scheduler()
    schedule = OnePassSchedule.from_scheduler(scheduler, num_decoder_steps)
    scheduler.set_timesteps(1 if form == "one-step" else num_decoder_steps)
    # Numbers, made before: in the count there is no data to read them from.
    scheduler.timesteps = scheduler.timesteps.tolist()
    with torch.no_grad(), PretendGpu() as gpu:
        unet.to_empty(device=DEVICE)
        inputs = random_inputs(unet, batch, latent_size)
        run = _tiue(unet, schedule, inputs)
        if form != "tiue":
            run = _repeated(form, unet, scheduler, schedule.timesteps.to(DEVICE), inputs)
        run()
        gpu.launches.clear()
        run()
    return tuple(gpu.launches)


def _tiue(
    unet: UNet2DConditionModel, schedule: OnePassSchedule, inputs: dict[str, Any]
) -> Callable[[], Any]:
    student = TiUEUNet.from_unet(unet)
    return lambda: student.one_pass(schedule=schedule, **inputs)


def _repeated(
    form: str,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    timesteps: torch.Tensor,
    inputs: dict[str, Any],
) -> Callable[[], Any]:
    """The published form, or the UNet at the first timestep alone."""
    latents, text = inputs.pop("latents"), inputs.pop("prompt_embeds")

    def run() -> torch.Tensor:
        if form == "published":
            noise = published_form.predict_noise(unet, latents, timesteps, text, **inputs)
        else:
            noise = unet(latents, timesteps[0], text, **inputs).sample[None]
        denoised = latents
        for timestep, output in zip(scheduler.timesteps, noise, strict=True):
            denoised = scheduler.step(output, timestep, denoised).prev_sample
        return denoised

    return run


def by_kind(launches: tuple[Launch, ...]) -> dict[str, tuple[int, int]]:
    """Sort kernels by kind.

    Args:
        launches: Of `count`.

    Returns:
        Kernels and bytes of each kind, the most bytes first.
    """
    kernels, moved = Counter[str](), Counter[str]()
    for launch in launches:
        kernels[launch.kind] += 1
        moved[launch.kind] += launch.read + launch.written
    return {kind: (kernels[kind], total) for kind, total in moved.most_common()}


def measure(models: Mapping[str, int] = COUNTED, forms: Sequence[str] = FORMS) -> dict[str, Any]:
    """Count every form and layout, for the report.

    Args:
        models: Names of `testing.configs.CONFIGS`, to the latents' height and width.
        forms: Of `FORMS`.

    Returns:
        By model, form and layout: `kernels`, `read`, `written`, and `kinds`; where a form does not
        run in a layout, `reason`.
    """
    found: dict[str, Any] = {}
    for model, latent_size in models.items():
        for form, layout in itertools.product(forms, LAYOUTS):
            try:
                launches = count(form, model, layout, latent_size)
            except CudaError as error:
                entry: dict[str, Any] = {"reason": str(error)}
            else:
                entry = {
                    "kernels": len(launches),
                    "read": sum(launch.read for launch in launches),
                    "written": sum(launch.written for launch in launches),
                    "kinds": by_kind(launches),
                }
            found.setdefault(model, {}).setdefault(form, {})[layout] = entry
    return found


HEADER = ["form", "layout", "kernels", "read", "written", "both"]


def rows(forms: dict[str, Any]) -> list[list[str]]:
    """Lines of a table of every form and layout of one model: kernels, and bytes in GB (10^9).

    Args:
        forms: One model's part of `measure`.

    Returns:
        Form, layout, kernels, bytes read, written, and both; or why not.
    """
    lines = []
    for form, layouts in forms.items():
        for layout, entry in layouts.items():
            figures = [entry["reason"], "", "", ""] if "reason" in entry else _figures(entry)
            lines.append([form, layout, *figures])
    return lines


def _figures(entry: dict[str, Any]) -> list[str]:
    sizes = (entry["read"], entry["written"], entry["read"] + entry["written"])
    return [f"{entry['kernels']:,}", *(f"{size / 1e9:.2f}" for size in sizes)]


# Kernels and GB of one pass, channels_last, that the design was to reach.
GOALS = {"sd15": (550, 6.5), "sdxl": (1150, 33.0)}
WHY_NOT = (
    "What is left of them: the residual sums of transformer blocks are kernels of their own "
    "(torch's product takes a bias or a second summand into its epilogue, not both) and are not "
    "joined to the layer norm behind them; q, k and v are three products, since stacked weights "
    "would have to be copied at every pass or kept; the halves of a convolution's "
    "weight that is split at the skip's border are copied at every pass, because what is kept "
    "needs a key that sees every write, and torch's version counter misses those to `.data`, such "
    "as a moving average's; and GEGLU is a kernel behind its product, not its epilogue."
)


def against_goals(models: dict[str, Any]) -> list[str]:
    """Lines that hold the counts of this package against `GOALS`.

    Args:
        models: Of `measure`.

    Returns:
        One line a model that was counted, and why where a goal is missed.
    """
    lines, missed = [], False
    for model, (kernels, gigabytes) in GOALS.items():
        entry = models.get(model, {}).get("tiue", {}).get("nhwc", {})
        if "kernels" not in entry:
            continue
        moved = (entry["read"] + entry["written"]) / 1e9
        over = entry["kernels"] - kernels, moved - gigabytes
        missed |= max(over) > 0
        lines.append(
            f"- Goal for {model}: {kernels:,} kernels and {gigabytes:g} GB; now"
            f" {entry['kernels']:,} ({over[0]:+,}) and {moved:.2f} ({over[1]:+.2f})."
        )
    return [*lines, f"- {WHY_NOT}"] if missed else lines


KIND_HEADER = ["kind", "kernels", "GB"]


def kind_rows(entry: dict[str, Any]) -> list[list[str]]:
    """Lines of a table of the kinds of kernels of one form in one layout.

    Args:
        entry: Its part of `measure`.

    Returns:
        Kind, kernels, and bytes in GB.
    """
    return [
        [kind, f"{kernels:,}", f"{total / 1e9:.2f}"]
        for kind, (kernels, total) in entry.get("kinds", {}).items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the table of every form, and of every kind of one of them; or write the results.

    Args:
        arguments: Of the command line; by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--form", choices=FORMS, default="tiue", help="whose kinds are printed")
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw", help="likewise")
    parser.add_argument("--write", metavar="FILE", help="count all models into a JSON file")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="to be written")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="the other forms' figures, as they were counted"
    )
    parser.add_argument("--commit", help="that this tree is a copy of, where it is no checkout")
    options = parser.parse_args(arguments)
    if options.write:
        known = json.loads(options.keep.read_text())["models"] if options.keep else {}
        for model, forms in measure(forms=options.forms).items():
            known[model] = {**known.get(model, {}), **forms}
        write_result(options.write, {"models": known}, options.commit)
        return
    forms = measure({options.model: CONFIGS[options.model]["sample_size"]})[options.model]
    print(table(HEADER, rows(forms)))
    print()
    print(table(KIND_HEADER, kind_rows(forms[options.form][options.layout])))


if __name__ == "__main__":
    main()
