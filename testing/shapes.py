"""The shapes that the decoders of Stable Diffusion 1.5, 2.1 and XL ask the operators for, by name.

Tests and benchmarks share them. A name is model, pixels and place: `sd15_512_up3_res0` is the first
resnet of the last up block of Stable Diffusion 1.5 for a picture of 512 x 512. Everything follows
from the UNets' configurations; nothing here imports torch or diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from testing.configs import CONFIGS, NUM_TOKENS

PIXELS = (256, 512, 768, 1024)
# diffusers' own defaults, where a configuration says nothing.
DEFAULTS: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "in_channels": 4,
}


class Resnet(NamedTuple):
    """A resnet of an up block; `shared`, the decoder's first, whose hidden rows are one for all."""

    hidden: int
    skip: int
    out: int
    height: int
    width: int
    groups: int
    shared: bool = False


class Attention(NamedTuple):
    """Attention of a transformer: to its `own` rows, or to the tokens of the text."""

    tokens: int
    keys: int
    heads: int
    head_dim: int
    own: bool


class Transformer(NamedTuple):
    """The map that a transformer works on; its feed-forward is four times as wide."""

    channels: int
    height: int
    width: int
    groups: int


class Upsampler(NamedTuple):
    """The map that is doubled behind an up block."""

    channels: int
    height: int
    width: int


class Output(NamedTuple):
    """The map that the decoder's last norm reads."""

    channels: int
    height: int
    width: int
    groups: int


class Latents(NamedTuple):
    """What the decoder predicts."""

    channels: int
    height: int
    width: int


Sizes = Resnet | Attention | Transformer | Upsampler | Output | Latents


def decoder(model: str, pixels: int) -> dict[str, Sizes]:
    """The shapes of one decoder at one size of picture.

    Args:
        model: A key of `testing.configs.CONFIGS`.
        pixels: Height and width of the picture, eight times those of the latents.

    Returns:
        Sizes by name, in the order in which the decoder runs. Layers of a block that do the same
        share a name: `up1_self` stands for all self attentions of the second up block.
    """
    config = DEFAULTS | CONFIGS[model]
    widths = config["block_out_channels"][::-1]
    groups, latents = config["norm_num_groups"], config["in_channels"]
    # What diffusers calls attention_head_dim is the number of heads.
    heads = config["attention_head_dim"]
    heads = heads[::-1] if isinstance(heads, tuple) else (heads,) * len(widths)
    layers = config["layers_per_block"] + 1

    found: dict[str, Sizes] = {}
    hidden, size = widths[0], pixels // 8 // 2 ** (len(widths) - 1)
    for block, width in enumerate(widths):
        place = f"{model}_{pixels}_up{block}"
        # The last resnet meets the skip of the next wider map.
        below = widths[min(block + 1, len(widths) - 1)]
        for layer in range(layers):
            skip = below if layer == layers - 1 else width
            first = block == layer == 0
            resnet = Resnet(hidden, skip, width, size, size, groups, shared=first)
            found[f"{place}_res{layer}"] = resnet
            hidden = width
        if "CrossAttn" in config["up_block_types"][block]:
            tokens, head_dim = size * size, width // heads[block]
            found[f"{place}_transformer"] = Transformer(width, size, size, groups)
            found[f"{place}_self"] = Attention(tokens, tokens, heads[block], head_dim, own=True)
            found[f"{place}_text"] = Attention(
                tokens, NUM_TOKENS, heads[block], head_dim, own=False
            )
        if block < len(widths) - 1:
            found[f"{place}_upsampler"] = Upsampler(width, size, size)
            size *= 2
    found[f"{model}_{pixels}_out"] = Output(widths[-1], size, size, groups)
    found[f"{model}_{pixels}_latents"] = Latents(latents, size, size)
    return found


SHAPES: dict[str, Sizes] = {
    name: sizes
    for model in CONFIGS
    for pixels in ((64,) if model == "tiny" else PIXELS)
    for name, sizes in decoder(model, pixels).items()
}


def select(key: Callable[[Sizes], Hashable | None], *pixels: int) -> dict[str, Sizes]:
    """The distinct shapes of the published models.

    Args:
        key: What makes two shapes differ, or None for a shape that is not asked for.
        *pixels: Sizes of picture; by default all of `PIXELS`.

    Returns:
        Sizes by the first name that has them.
    """
    chosen: dict[Hashable, tuple[str, Sizes]] = {}
    for name, sizes in SHAPES.items():
        model, size = name.split("_")[:2]
        if model == "tiny" or (pixels and int(size) not in pixels):
            continue
        if (own := key(sizes)) is not None:
            chosen.setdefault(own, (name, sizes))
    return dict(chosen.values())
