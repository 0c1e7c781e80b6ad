"""Counts the multiply-adds of the one pass and its rivals: `python -m benchmarks.multiply_adds`.

Tensors on the meta device carry shapes and no data, so the count needs neither memory nor a clock,
and is the same on every machine. A convolution counts as the direct one whatever algorithm runs it;
nearest upsampling before a 3 x 3 convolution counts in the form of four phases where that form is
chosen. Norms, activations and sums are no products and count nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.forms.models import random_inputs, stable_diffusion_scheduler
from benchmarks.measure.markdown import table
from testing import published_form
from testing.configs import CONFIGS
from tiue import OnePassSchedule, TiUEUNet
from tiue_kernels.ops.upsample_conv2d import LEAST_PIXELS

FORMS = ("published", "tiue", "full-steps", "one-step")
PARTS = ("encoder", "mid", "decoder")
aten, tiue = torch.ops.aten, torch.ops.tiue


@dataclass(frozen=True)
class Count:
    """Multiply-adds.

    Attributes:
        convolution: Of kernels larger than 1 x 1.
        linear: Of matrix products with weights, 1 x 1 convolutions among them.
        attention: Of queries with keys, and of probabilities with values.
    """

    convolution: int = 0
    linear: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        return self.convolution + self.linear + self.attention

    def __add__(self, other: Count) -> Count:
        return Count(
            self.convolution + other.convolution,
            self.linear + other.linear,
            self.attention + other.attention,
        )

    def __mul__(self, times: int) -> Count:
        return Count(times * self.convolution, times * self.linear, times * self.attention)

    def __sub__(self, other: Count) -> Count:
        return self + other * -1


def _convolved(out: torch.Tensor, weight: torch.Tensor, channels: int) -> Count:
    """One convolution of a weight with some of its input channels."""
    taps = weight.shape[2:].numel()
    products = out.numel() * channels * taps
    return Count(linear=products) if taps == 1 else Count(convolution=products)


def _convolution(out: Any, _x: Any, weight: torch.Tensor, *_: Any) -> Count:
    return _convolved(out, weight, weight.shape[1])


def _product(out: torch.Tensor, a: torch.Tensor, *_: Any) -> Count:
    return Count(linear=out.numel() * a.shape[-1])


def _biased_product(out: torch.Tensor, _bias: Any, a: torch.Tensor, *_: Any) -> Count:
    return Count(linear=out.numel() * a.shape[-1])


def _batched_product(out: torch.Tensor, a: torch.Tensor, *_: Any) -> Count:
    """Attention written out; nothing else of these UNets multiplies batches of matrices."""
    return Count(attention=out.numel() * a.shape[-1])


def _attention(_out: Any, query: torch.Tensor, key: torch.Tensor, *_: Any) -> Count:
    """[rows, heads, tokens, head size] each, or with heads and sizes in one axis."""
    return Count(attention=2 * query.numel() * key.shape[-2])


def _split_convolution(out: Any, hidden: Any, skip: Any, *args: Any) -> Count:
    num_groups, weight = args[0], args[4]
    channels = hidden.shape[1] + skip.shape[1]
    shared = 0
    if out[1].numel():
        shared = (num_groups - out[2].shape[2]) * (channels // num_groups)
    count = _convolved(out[0], weight, channels - shared)
    return count + (_convolved(out[1], weight, shared) if shared else Count())


def _norm_convolution(out: Any, *args: Any) -> Count:
    return _convolved(out[0], args[8], args[8].shape[1])


def _upsampled_convolution(out: torch.Tensor, x: torch.Tensor, weight: Any, *_: Any) -> Count:
    phases = x.shape[0] * x.shape[2:].numel() >= LEAST_PIXELS
    return Count(convolution=out.numel() * x.shape[1] * (4 if phases else 9))


def _split_linear(_out: Any, hidden: torch.Tensor, skip: torch.Tensor, *args: Any) -> Count:
    return Count(linear=(hidden.numel() + skip.numel()) * args[3].shape[0])


def _norm_linear(out: Any, x: torch.Tensor, *_: Any) -> Count:
    return Count(linear=out[0].numel() * x.shape[1])


def _norm_linears(out: Any, x: torch.Tensor, *_: Any) -> Count:
    return Count(linear=sum(part.numel() for part in out[0]) * x.shape[-1])


def _feed_forward(out: Any, x: torch.Tensor, *args: Any) -> Count:
    projection, weight = args[3], args[5]
    tokens = x.numel() // x.shape[-1]
    return Count(linear=tokens * (projection.numel() + weight.numel()))


def _gated_linear(out: torch.Tensor, _x: Any, _gate: Any, tokens: torch.Tensor, *_: Any) -> Count:
    return Count(linear=out.numel() * tokens.shape[-1])


def _modulated_feed_forward(out: Any, *args: Any) -> Count:
    projection, weight = args[5], args[7]
    tokens = out[0].numel() // out[0].shape[-1]
    return Count(linear=tokens * (projection.numel() + weight.numel()))


FORMULAS: dict[Any, Callable[..., Count]] = {
    aten.convolution: _convolution,
    aten.mm: _product,
    aten.addmm: _biased_product,
    aten.linear: _product,
    aten.bmm: _batched_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    tiue.cross_timestep_attention_fwd: lambda out, *args: _attention(out[0], *args),
    tiue.shared_skip_group_norm_silu_conv2d_fwd: _split_convolution,
    tiue.broadcast_add_group_norm_silu_conv2d_fwd: _norm_convolution,
    tiue.conv2d_fwd: lambda out, x, weight, *_: _convolved(out, weight, x.shape[1]),
    tiue.upsample_conv2d_fwd: _upsampled_convolution,
    tiue.group_norm_linear_fwd: _norm_linear,
    tiue.shared_skip_layer_norm_linear_fwd: _split_linear,
    tiue.layer_norm_linear_fwd: _norm_linears,
    tiue.geglu_feed_forward_fwd: _feed_forward,
    tiue.adaptive_layer_norm_linear_fwd: _norm_linears,
    tiue.linear_gated_residual_fwd: _gated_linear,
    tiue.adaptive_feed_forward_fwd: _modulated_feed_forward,
}
# Operators of this package that multiply no matrices.
FREE = {
    tiue.shared_skip_group_norm_silu_fwd,
    tiue.broadcast_add_group_norm_silu_fwd,
    tiue.timestep_sum_group_norm_silu_fwd,
    tiue.group_norm_tokens_fwd,
    tiue.adaptive_layer_norm_fwd,
    tiue.gated_residual_fwd,
    tiue.geglu_fwd,
    tiue.one_pass_combine_fwd,
    tiue.noise_kl_fwd,
}


class Counter(TorchDispatchMode):
    """Adds up the multiply-adds of what is called inside; forward passes only.

    Raises:
        NotImplementedError: From an operator of this package that has no formula here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in FORMULAS:
            self.count += FORMULAS[operator](out, *args)
        elif func.namespace == "tiue" and operator not in FREE:
            raise NotImplementedError(f"no formula for the multiply-adds of {operator}")
        return out


@cache
def _unet(model: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[model]).eval()


@torch.no_grad()
def count(
    form: str,
    model: str = "sd15",
    latent_size: int = 64,
    batch: int = 1,
    num_decoder_steps: int = 4,
) -> dict[str, Count]:
    """Count one form, from noise and text to denoised latents.

    Args:
        form: One of `FORMS`; `full-steps` is plain sampling, the whole UNet K times, and `one-step`
            the whole UNet once.
        model: A key of `testing.configs.CONFIGS`.
        latent_size: Height and width of the latents.
        batch: B.
        num_decoder_steps: K.

    Returns:
        Multiply-adds of each of `PARTS`.
    """
    unet = _unet(model)
    inputs = random_inputs(unet, batch, latent_size)
    schedule = OnePassSchedule.from_scheduler(stable_diffusion_scheduler(), num_decoder_steps)
    latents, text = inputs.pop("latents"), inputs.pop("prompt_embeds")
    timesteps = schedule.timesteps.to("meta")
    if form in ("full-steps", "one-step"):
        timesteps = timesteps[:1]

    with Counter() as encoder:
        if form == "tiue":
            student = TiUEUNet.from_unet(unet)
            features = student.encode(latents, timesteps[0], text, **inputs)
            hidden = features.hidden
        else:
            hidden, skips = published_form.encode(unet, latents, timesteps[0], text, **inputs)
    with Counter() as mid:
        embedding = hidden.new_empty(batch, unet.time_embedding.linear_2.out_features)
        unet.mid_block(hidden, embedding, encoder_hidden_states=text)
    with Counter() as decoder:
        if form == "tiue":
            student.decode_combined(features, latents, schedule)
        else:
            published_form.decode(unet, hidden, skips, timesteps, text, **inputs)

    counts = (encoder.count - mid.count, mid.count, decoder.count)
    times = num_decoder_steps if form == "full-steps" else 1
    return {part: own * times for part, own in zip(PARTS, counts, strict=True)}


def rows(*case: Any) -> list[list[str]]:
    """Lines of a table of every form, in G.

    Args:
        *case: Of `count`, behind the form.

    Returns:
        Form, its parts, its total, the share of each kind of product, and what the published form
        costs more.
    """
    totals = {form: count(form, *case) for form in FORMS}
    published = sum(totals["published"].values(), Count()).total
    lines = []
    for form, parts in totals.items():
        whole = sum(parts.values(), Count())
        kinds = (whole.convolution, whole.linear, whole.attention)
        lines.append(
            [
                form,
                *(f"{part.total / 1e9:.1f}" for part in parts.values()),
                f"{whole.total / 1e9:.1f}",
                *(f"{kind / whole.total:.0%}" for kind in kinds),
                f"{published / whole.total:.2f} x",
            ]
        )
    return lines


HEADER = [
    *("form", *PARTS, "total", "convolutions", "linear", "attention"),
    "published form over this",
]


def main(arguments: list[str] | None = None) -> None:
    """Print a table of every form by part, in G (10^9).

    Args:
        arguments: Of the command line; by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--latents", type=int, default=64, help="height and width")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="K")
    options = parser.parse_args(arguments)
    print(table(HEADER, rows(options.model, options.latents, options.batch, options.steps)))


if __name__ == "__main__":
    main()
