"""Multiply-adds against closed formulas, known totals and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.forms.models import random_inputs
from benchmarks.multiply_adds import FORMULAS, FREE, Count, Counter, count, main
from testing import published_form
from testing.configs import CONFIGS
from tiue_kernels import ops
from tiue_kernels.nn import resnet_block, transformer_block
from tiue_kernels.nn import upsampler as run_upsampler

K, TOKENS, TEXT = 4, 77, 768


def rows(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def whole(parts: dict[str, Count]) -> Count:
    return sum(parts.values(), Count())


def test_resnet() -> None:
    """The first resnet of the last up block of Stable Diffusion 1.5 at 512 x 512."""
    with torch.device("meta"):
        resnet = ResnetBlock2D(in_channels=960, out_channels=320, temb_channels=1280)
    with Counter() as counter, torch.no_grad():
        resnet_block(resnet, rows(K, 640, 64, 64), rows(K, 1280), rows(1, 320, 64, 64))
    # 32 groups of 30 channels: the 22nd holds channels 630 to 659, so 660 go with the K rows.
    pixels = 64 * 64
    first = 9 * 320 * pixels * (K * 660 + 300)
    second = 9 * 320 * 320 * pixels * K
    shortcut = 320 * pixels * (K * 640 + 320)
    assert counter.count == Count(first + second, shortcut + K * 1280 * 320, 0)


def test_transformer_block() -> None:
    with torch.device("meta"):
        block = BasicTransformerBlock(320, 8, 40, cross_attention_dim=TEXT)
    with Counter() as counter, torch.no_grad():
        transformer_block(block, rows(K, 4096, 320), rows(1, TOKENS, TEXT))
    pixels = K * 4096
    own = 4 * 320 * 320 * pixels  # query, key, value, output
    text = 2 * 320 * 320 * pixels + 2 * TEXT * 320 * TOKENS  # keys and values once
    feed_forward = (320 * 2560 + 1280 * 320) * pixels
    scores = 2 * 320 * pixels * (4096 + TOKENS)
    assert counter.count == Count(0, own + text + feed_forward, scores)


@pytest.mark.parametrize(("size", "taps"), [(8, 4), (4, 9)])
def test_upsampler(size: int, taps: int) -> None:
    """Four phases of four taps; nine taps where maps are too small to gain."""
    with torch.device("meta"):
        upsampler = Upsample2D(64, use_conv=True)
    with Counter() as counter, torch.no_grad():
        run_upsampler(upsampler, rows(K, 64, size, size))
    assert counter.count == Count(convolution=taps * 64 * 64 * K * (2 * size) ** 2)


def test_stable_diffusion_21_at_512() -> None:
    one_step, published, full_steps, tiue = (
        count(form, "sd21") for form in ("one-step", "published", "full-steps", "tiue")
    )
    rounded = {part: round(own.total / 1e9) for part, own in one_step.items()}
    assert rounded == {"encoder": 125, "mid": 6, "decoder": 271}
    assert round(whole(published).total / 1e9) == 1216
    assert whole(full_steps) == whole(one_step) * 4
    assert published["decoder"] == one_step["decoder"] * 4
    assert {part: tiue[part] for part in ("encoder", "mid")} == {
        part: published[part] for part in ("encoder", "mid")
    }
    assert whole(tiue).total <= 1040e9


@pytest.mark.parametrize("model", ["tiny", "sdxl"])
def test_torch_counts_the_published_form_alike(model: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[model])
    inputs = random_inputs(unet, 2, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        timesteps = torch.arange(3, 0, -1, device="meta")
        published_form.predict_noise(unet, timesteps=timesteps, **inputs)
    counted = whole(count("published", model, 16, batch=2, num_decoder_steps=3))
    assert 2 * counted.total == flops.get_total_flops()


def test_every_operator_is_counted_or_free() -> None:
    known = {operator.__name__ for operator in {*FORMULAS, *FREE}}
    assert {f"{name}_fwd" for name in ops.__all__} <= known


def test_backward_passes_are_refused() -> None:
    x = rows(2, 8)
    with Counter(), pytest.raises(NotImplementedError, match="geglu_bwd"):
        ops.geglu.backward(rows(2, 4), x)


def test_command_prints_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "tiny", "--latents", "16", "--steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *("| published", "| tiue", "| full-steps", "| one-step")
    ]
