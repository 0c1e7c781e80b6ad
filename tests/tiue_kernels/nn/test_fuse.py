"""`fuse` on whole UNets: results, gradients, adapters, checkpoints, and the student over them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from testing.tolerances import EXACT_RELATIVE, relative_error
from tests.tiue.unets import TEXT, make_conditioning, make_inputs, make_unet
from tiue import TiUEUNet
from tiue_kernels.nn import FusedBasicTransformerBlock, FusedResnetBlock2D, fuse, layers


def run(unet: Any, name: str) -> dict[str, torch.Tensor]:
    """The output and every gradient of one ordinary call."""
    inputs = make_inputs()
    unet.zero_grad()
    out = unet(
        inputs["latents"],
        torch.tensor(500),
        inputs["prompt_embeds"],
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        **make_conditioning(name),
    ).sample
    out.pow(2).sum().backward()
    return {"out": out.detach()} | {
        key: parameter.grad for key, parameter in unet.named_parameters() if parameter.requires_grad
    }


def check_equal(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert results.keys() == expected.keys()
    for key, reference in expected.items():
        assert relative_error(results[key], reference) <= EXACT_RELATIVE, key


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "scale_shift", "scaled_output", "mish"])
def test_a_fused_unet_is_the_same_unet(name: str, checkpointing: bool) -> None:
    unet = make_unet(name)
    expected, keys = run(unet, name), list(unet.state_dict())
    parameters = list(unet.parameters())
    kinds = ("ResnetBlock2D", "BasicTransformerBlock", "Upsample2D")
    wanted = [key for key, module in unet.named_modules() if type(module).__name__ in kinds]

    names = fuse(unet)
    assert set(wanted) <= set(names)
    assert fuse(unet) == []
    assert list(unet.state_dict()) == keys
    assert all(a is b for a, b in zip(unet.parameters(), parameters, strict=True))
    if checkpointing:
        unet.train()
        unet.enable_gradient_checkpointing()
    check_equal(run(unet, name), expected)


@pytest.mark.parametrize("fuse_first", [False, True])
def test_a_lora_keeps_its_effect(fuse_first: bool) -> None:
    targets = ["to_q", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj", "ff.net.0.proj"]
    results = []
    for steps in ([], [fuse]):
        unet = make_unet("sd1")
        add = lambda unet: unet.add_adapter(LoraConfig(r=2, target_modules=targets))  # noqa: E731
        for step in (*steps, add) if fuse_first else (add, *steps):
            step(unet)
        generator = torch.Generator().manual_seed(5)
        for key, parameter in unet.named_parameters():
            if "lora_" in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        results.append(run(unet.double(), "sd1"))
    check_equal(results[1], results[0])
    assert any("lora_B" in key for key in results[0])


def test_what_has_no_fused_form_is_left_alone() -> None:
    unet = make_unet("gligen")
    unet.mid_block.resnets[0].register_forward_hook(lambda _m, _a, out: 2 * out)
    before = copy.deepcopy(unet)
    names = fuse(unet)
    assert "mid_block.resnets.0" not in names
    assert not any(isinstance(m, FusedBasicTransformerBlock) for m in unet.modules())
    # Fusers start as gates of zero, with gradients of zero: outputs alone are compared.
    results, expected = run(unet, "gligen")["out"], run(before, "gligen")["out"]
    assert relative_error(results, expected) <= EXACT_RELATIVE


def test_a_checkpoint_of_a_fused_unet_is_an_ordinary_one(tmp_path: Any) -> None:
    unet = make_unet("sd2")
    expected = run(unet, "sd2")
    fuse(unet)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).double()
    # Weights are stored as they are: float64.
    check_equal(run(loaded, "sd2"), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_student_takes_fused_blocks_apart_too(name: str, monkeypatch) -> None:
    unet = TiUEUNet.from_unet(make_unet(name))
    call = (make_inputs()["latents"], [751, 1], make_inputs()["prompt_embeds"])
    expected = unet.predict_noise(*call, **make_conditioning(name))
    fuse(unet)
    told: list[str] = []
    monkeypatch.setattr(layers, "tell_once", lambda module: told.append(type(module).__name__))
    for module in (
        "tiue.decoder",
        "tiue.unet_blocks",
        "tiue_kernels.nn.resnet",
        "tiue_kernels.nn.attention",
    ):
        monkeypatch.setattr(f"{module}.tell_once", layers.tell_once)
    results = unet.predict_noise(*call, **make_conditioning(name))
    assert relative_error(results, expected) <= EXACT_RELATIVE
    assert told == []


@torch.no_grad()
def test_other_models_of_diffusers() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).double()
    latents = make_inputs()["latents"]
    expected = vae.decode(latents).sample
    names = fuse(vae)
    assert any(isinstance(module, FusedResnetBlock2D) for module in vae.modules())
    assert any(name.startswith("decoder.up_blocks.0.upsamplers") for name in names)
    assert relative_error(vae.decode(latents).sample, expected) <= EXACT_RELATIVE


def test_any_module_may_be_asked() -> None:
    assert fuse(nn.Sequential(nn.Linear(TEXT, 2), nn.ReLU())) == []
