"""Times the decoder's last resnet and last transformer block against their published form.

The published form is diffusers' own module over K repeated rows of skip and text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from benchmarks import multiply_adds
from benchmarks.forms.models import draw_parameters
from benchmarks.measure.interleave import Rival
from benchmarks.measure.race import Case, Race, relative_difference, short
from testing.configs import CONFIGS, NUM_TOKENS
from testing.shapes import Attention, Resnet, Transformer, decoder
from tiue_kernels.nn import resnet_block, transformer_block

LATENTS = (64,)
FORMS = ("published", "tiue")
BLOCKS = ("resnet", "transformer block")
# Winograd's convolutions, each right to 1e-4 of its output's deviation, against direct ones.
TOLERANCE = 2e-4


def default_forms(_device: torch.device) -> tuple[str, ...]:
    """Both."""
    return FORMS


def rivals_of(block: str, case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Rival]:
    """Both forms of a block on one set of weights and inputs.

    Args:
        block: One of `BLOCKS`.
        case: Model, size of latents, B, K.
        device: Where they run.
        dtype: Of everything.

    Returns:
        Calls by form.
    """
    batch, steps = case.batch, case.num_decoder_steps
    generator = torch.Generator(device).manual_seed(0)
    sizes = decoder(case.model, 8 * case.latent_size).values()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def repeat(rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat(steps, *[1] * (rows.ndim - 1))

    def ready(module: torch.nn.Module) -> Any:
        return draw_parameters(module.to(device, dtype), generator).eval()

    if block == "resnet":
        size = [own for own in sizes if isinstance(own, Resnet)][-1]
        resnet = ready(
            ResnetBlock2D(
                in_channels=size.hidden + size.skip,
                out_channels=size.out,
                temb_channels=1280,
                groups=size.groups,
            )
        )
        hidden = draw(steps * batch, size.hidden, size.height, size.width)
        skip, embedding = draw(batch, size.skip, size.height, size.width), draw(steps * batch, 1280)
        return {
            "published": lambda: resnet(torch.cat([hidden, repeat(skip)], dim=1), embedding),
            "tiue": partial(resnet_block, resnet, hidden, embedding, skip),
        }
    size = [own for own in sizes if isinstance(own, Transformer)][-1]
    heads = [own for own in sizes if isinstance(own, Attention)][-1].heads
    width = CONFIGS[case.model]["cross_attention_dim"]
    transformer = ready(
        BasicTransformerBlock(
            size.channels, heads, size.channels // heads, cross_attention_dim=width
        )
    )
    tokens = draw(steps * batch, size.height * size.width, size.channels)
    text = draw(batch, NUM_TOKENS, width)
    return {
        "published": lambda: transformer(tokens, encoder_hidden_states=repeat(text)),
        "tiue": partial(transformer_block, transformer, tokens, text),
    }


@pytest.fixture(scope="module", params=BLOCKS)
def race(request, case, device, dtype) -> Race:
    block = request.param
    rivals = {
        form: torch.no_grad()(rival)
        for form, rival in rivals_of(block, case, device, dtype).items()
    }
    race = Race(f"{block}, {case.label}", {"block": block, "dtype": short(dtype)})
    outputs = {}
    for form, rival in rivals.items():
        with multiply_adds.Counter() as counter:
            outputs[form] = rival()
        race.of_form[form] = {"multiply_adds": counter.count.total}
    difference = relative_difference(outputs["tiue"], outputs["published"])
    tolerance = TOLERANCE if dtype == torch.float32 else 10 * torch.finfo(dtype).eps
    assert difference < tolerance, f"the forms differ by {difference:.1e} of the largest value"
    race.of_form["tiue"]["relative_difference"] = difference
    race.run(rivals, request.config.getoption("--bench-rounds"), device)
    return race


def test_block(benchmark, race, form):
    race.enter(benchmark, form)
