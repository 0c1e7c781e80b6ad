"""Counts what a transformer's one pass costs: `python -m benchmarks.transformer_counts`.

Multiply-adds, kernels and their bytes on a GPU, and what the decoder keeps for backward, of
PixArt-alpha's and Stable Diffusion 3 medium's size: no clock, no GPU, no memory for the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.forms import repeated_transformers
from benchmarks.forms.models import empty_transformer, transformer_inputs
from benchmarks.forms.transformers import FORMS, passes, schedules
from benchmarks.gpu.pretend import DEVICE, Launch, PretendGpu
from benchmarks.launches import by_kind
from benchmarks.measure.counted import read_result, write_result
from benchmarks.measure.markdown import table
from benchmarks.multiply_adds import Count, Counter
from benchmarks.saved_bytes import SavedBytes

COUNTED = ("pixart", "sd3")
PARTS = ("shared", "decoder")


@torch.no_grad()
def multiply_adds(
    form: str,
    model: str = "pixart",
    batch: int = 1,
    num_decoder_steps: int = 4,
    border: int | None = None,
) -> dict[str, Count]:
    """Count one form.

    Args:
        form: One of `forms.transformers.FORMS`.
        model: A key of `testing.configs.TRANSFORMERS`.
        batch: B.
        num_decoder_steps: K.
        border: Blocks that run once; by default half.

    Returns:
        Multiply-adds of each of `PARTS`: patches, text projection and the blocks up to the border,
        and the rest.
    """
    student: Any = empty_transformer(model, border)
    inputs = transformer_inputs(student, model, batch)
    latents, text = inputs.pop("latents"), inputs.pop("prompt_embeds")
    timesteps = schedules(model, num_decoder_steps)[0].timesteps.to("meta")
    with Counter() as shared:
        features = student.encode(latents, timesteps[0], text, **inputs)
    with Counter() as decoder:
        if form == "tiue":
            student.decode(features, timesteps)
        elif form == "repeated":
            repeated_transformers.decode(student, features, timesteps)
        else:
            rows = timesteps[:1].to(latents.dtype).expand(batch)
            student(latents, timestep=rows, encoder_hidden_states=text, **inputs)
    counts = [shared.count, decoder.count]
    if form in ("full-steps", "one-step"):  # the whole of it; what is before the border is known
        times = num_decoder_steps if form == "full-steps" else 1
        counts = [shared.count * times, (decoder.count - shared.count) * times]
    return dict(zip(PARTS, counts, strict=True))


@cache
def launches(
    form: str, model: str = "pixart", batch: int = 1, num_decoder_steps: int = 4
) -> tuple[Launch, ...]:
    """Record one form in float16 at inference.

    Args:
        form: One of `forms.transformers.FORMS`; `full-steps` is `one-step` K times.
        model: A key of `testing.configs.TRANSFORMERS`.
        batch: B.
        num_decoder_steps: K.

    Returns:
        Every kernel of the second pass, in order.
    """
    if form == "full-steps":
        return launches("one-step", model, batch) * num_decoder_steps
    student: Any = empty_transformer(model)
    student.half().requires_grad_(False)
    both = schedules(model, num_decoder_steps)
    with torch.no_grad(), PretendGpu() as gpu:
        student.to_empty(device=DEVICE)
        run = passes(student, model, transformer_inputs(student, model, batch), both)
        run[form]()
        gpu.launches.clear()
        run[form]()
    return tuple(gpu.launches)


def saved_bytes(
    form: str, model: str = "pixart", batch: int = 1, num_decoder_steps: int = 4, **options: bool
) -> int:
    """Count what the decoder of one form keeps for its backward pass, in float32.

    Args:
        form: "repeated" or "tiue".
        model: A key of `testing.configs.TRANSFORMERS`.
        batch: B.
        num_decoder_steps: K.
        **options: Attributes set on the student.

    Returns:
        Bytes.
    """
    timesteps = schedules(model, num_decoder_steps)[0].timesteps
    with FakeTensorMode(allow_non_fake_inputs=True):
        student: Any = empty_transformer(model, device="cpu")
        student.train()
        for name, value in options.items():
            setattr(student, name, value)
        inputs = transformer_inputs(student, model, batch)
        with torch.no_grad():
            latents, text = inputs.pop("latents"), inputs.pop("prompt_embeds")
            features = student.encode(latents, timesteps[0], text, **inputs)
        features = replace(
            features,
            hidden=features.hidden.requires_grad_(),
            text=features.text.requires_grad_(),
        )
        saved = SavedBytes(student)
        with saved:
            if form == "tiue":
                student.decode(features, timesteps)
            else:
                repeated_transformers.decode(student, features, timesteps)
    return saved.total


def measure(models: tuple[str, ...] = COUNTED) -> dict[str, Any]:
    """Count every form of some models, for the report.

    Args:
        models: Keys of `testing.configs.TRANSFORMERS`.

    Returns:
        By model and form: `multiply_adds` by part and kind, `kernels`, `read`, `written`, `kinds`,
        and of the two decoders `saved`.
    """
    found: dict[str, Any] = {}
    for model in models:
        for form in FORMS:
            recorded = launches(form, model)
            entry: dict[str, Any] = {
                "multiply_adds": {k: asdict(v) for k, v in multiply_adds(form, model).items()},
                "kernels": len(recorded),
                "read": sum(launch.read for launch in recorded),
                "written": sum(launch.written for launch in recorded),
                "kinds": by_kind(recorded),
            }
            if form in ("repeated", "tiue"):
                entry["saved"] = saved_bytes(form, model)
            found.setdefault(model, {})[form] = entry
    return found


HEADER = [
    *("form", "shared", "decoder", "multiply-adds", "repeated over this"),
    *("kernels", "bytes", "kept for backward"),
]


def rows(forms: dict[str, Any]) -> list[list[str]]:
    """Lines of a table of every form of one model: G multiply-adds, GB (10^9), MiB kept.

    Args:
        forms: One model's part of `measure`.
    """
    lines = []
    totals = {
        form: sum(sum(part.values()) for part in entry["multiply_adds"].values())
        for form, entry in forms.items()
    }
    for form, entry in forms.items():
        parts = [sum(part.values()) for part in entry["multiply_adds"].values()]
        lines.append(
            [
                form,
                *(f"{part / 1e9:,.1f}" for part in (*parts, totals[form])),
                f"{totals['repeated'] / totals[form]:.2f} x",
                f"{entry['kernels']:,}",
                f"{(entry['read'] + entry['written']) / 1e9:.2f}",
                f"{entry['saved'] / 2**20:,.0f}" if "saved" in entry else "",
            ]
        )
    return lines


def section(folder: Path) -> Iterator[str]:
    """The report's part on what is counted, as paragraphs of Markdown.

    Args:
        folder: Of `measure`'s results.
    """
    meanings = "; ".join(f"`{form}`: {meaning}" for form, meaning in FORMS.items())
    yield (
        "One pass at K = 4, B = 1, half of the blocks shared (`python -m "
        "benchmarks.transformer_counts`): PixArt-alpha at 512 x 512 and Stable Diffusion 3 medium "
        "at 1024 x 1024. Multiply-adds in G (10^9); kernels and GB (10^9) at fp16 on a GPU that "
        "is not there; what the decoder keeps for backward in float32, in MiB. "
        f"{meanings}. What is timed follows; there `over published` is over `repeated`."
    )
    found = read_result("transformers", folder)
    if found is None:
        yield "Not counted."
    else:
        yield f"Commit {found['commit']}, torch {found['torch']}."
        for model, forms in found["models"].items():
            yield f"{model}:"
            yield table(HEADER, rows(forms))


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of both models, or write the results.

    Args:
        arguments: Of the command line; by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(COUNTED))
    parser.add_argument("--write", metavar="FILE", help="write the results into a JSON file")
    parser.add_argument("--commit", help="that this tree is a copy of, where it is no checkout")
    options = parser.parse_args(arguments)
    found = measure(tuple(options.models))
    for model, forms in found.items():
        print(f"{model}:")
        print(table(HEADER, rows(forms)))
    if options.write:
        write_result(options.write, {"models": found}, options.commit)


if __name__ == "__main__":
    main()
