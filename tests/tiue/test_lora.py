"""LoRAs keep the sharing: the layers' own numbers and gradients, nothing repeated or stale."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from peft import LoraConfig

from testing import published_form
from testing.tolerances import EXACT_RELATIVE, relative_error
from tests.tiue.tiny import tiny_scheduler
from tests.tiue.unets import make_conditioning, make_inputs, make_unet
from tiue import OnePassSchedule, TiUEUNet
from tiue_kernels.nn import layers, low_rank
from tiue_kernels.nn.low_rank import Weights, weights_of

SCHEDULE = OnePassSchedule.from_scheduler(tiny_scheduler(), 3)
EVERY_LAYER = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj", "conv_in", "conv_out"),
]


def add_lora(unet: Any, name: str = "style", seed: int = 5, **config: Any) -> None:
    """A LoRA on every kind of layer, with weights of a size that shows."""
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": EVERY_LAYER}
    unet.add_adapter(LoraConfig(**{**settings, **config}), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in unet.named_parameters():
        if "lora_" in key and f".{name}." in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            if "magnitude" in key:
                parameter.data += 1
    unet.double()


def two_adapters(unet: Any) -> None:
    add_lora(unet)
    add_lora(unet, "subject", 6, r=4, use_rslora=True, target_modules=["conv1", "to_q", "to_v"])
    unet.set_adapters(["style", "subject"], [0.7, -0.4])


def fused(unet: Any) -> None:
    add_lora(unet)
    unet.fuse_lora(0.5)


def disabled(unet: Any) -> None:
    add_lora(unet)
    unet.disable_lora()


def in_channels_last(unet: Any) -> None:
    two_adapters(unet)
    unet.to(memory_format=torch.channels_last)


def none_active(unet: Any) -> None:
    add_lora(unet)
    add_lora(unet, "subject", 6, target_modules=["time_emb_proj"])
    unet.set_adapters(["subject"])


SHARED: dict[str, Callable[[Any], Any]] = {
    "one": add_lora,
    "rank_over_channels": lambda unet: add_lora(unet, r=40),
    "two_adapters": two_adapters,
    "fused": fused,
    "disabled": disabled,
    "in_channels_last": in_channels_last,
    "none_active": none_active,
    "dropout_at_rest": lambda unet: [add_lora(unet, lora_dropout=0.5), unet.eval()],
}
CALLED_WHOLE: dict[str, Callable[[Any], Any]] = {
    "dora": lambda unet: add_lora(unet, use_dora=True),
    "bias": lambda unet: add_lora(unet, lora_bias=True),
    "hook_on_a": lambda unet: [
        add_lora(unet),
        *(
            module.register_forward_hook(lambda _module, _args, output: output * 0.5)
            for name, module in unet.named_modules()
            if name.endswith("lora_A.style")
        ),
    ],
}


def published(unet: Any, scale: float = 1.0, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    """Every layer called, over repeated rows."""
    given = make_inputs(size)
    scale_lora_layers(unet, scale)
    try:
        return published_form.predict_noise(
            unet, given["latents"], SCHEDULE.timesteps, given["prompt_embeds"]
        )
    finally:
        unscale_lora_layers(unet, scale)


def predicted(unet: Any, size: tuple[int, int] = (8, 8), **conditioning: Any) -> torch.Tensor:
    given = make_inputs(size)
    return TiUEUNet.from_unet(unet).predict_noise(
        given["latents"], SCHEDULE.timesteps, given["prompt_embeds"], **conditioning
    )


@pytest.fixture(params=["added", "beside"])
def form(request, monkeypatch) -> str:
    """Both forms at every size."""
    chosen = request.param == "beside"

    def runs_beside(self: Weights, _positions: int) -> bool:
        return chosen and self.down is not None

    monkeypatch.setattr(Weights, "runs_beside", runs_beside)
    return request.param


@pytest.mark.parametrize("change", SHARED)
@torch.no_grad()
def test_the_published_numbers(change: str, form: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr(layers, "_told", set())
    unet = make_unet("sd1")
    SHARED[change](unet)
    assert relative_error(predicted(unet), published(unet)) <= EXACT_RELATIVE
    assert not caplog.records  # nothing was called whole


@pytest.mark.parametrize("name", ["sd2", "aligned", "one_group", "scale_shift"])
@torch.no_grad()
def test_other_architectures(name: str, form: str) -> None:
    unet = make_unet(name)
    add_lora(unet)
    assert relative_error(predicted(unet, (7, 10)), published(unet, 1.0, (7, 10))) <= EXACT_RELATIVE


@pytest.mark.parametrize("change", CALLED_WHOLE)
@torch.no_grad()
def test_what_is_more_than_a_weight_is_called_whole_and_said(change, monkeypatch, caplog) -> None:
    monkeypatch.setattr(layers, "_told", set())
    unet = make_unet("sd1")
    CALLED_WHOLE[change](unet)
    with caplog.at_level(logging.WARNING):
        assert relative_error(predicted(unet), published(unet)) <= EXACT_RELATIVE
    assert "ResnetBlock2D" in caplog.text
    assert "LoRA" in caplog.text


@torch.no_grad()
def test_skips_are_never_repeated() -> None:
    unet = make_unet("sd1")
    add_lora(unet)
    rows, original = [], torch.cat

    def watched(tensors: Any, dim: int = 0) -> torch.Tensor:
        out = original(tensors, dim)
        if out.ndim == 4 and out.shape[1] >= 32 + 16 and out.shape[2] > 1:
            rows.append(len(out))
        return out

    given = make_inputs()
    student = TiUEUNet.from_unet(unet)
    features = student.encode(given["latents"], 751, given["prompt_embeds"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", watched)
        student.decode(features, SCHEDULE.timesteps)
    assert rows == [2]  # the first resnet, before the timesteps part


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("target", ["conv_out", "conv_in", "conv1", "ff.net.2"])
@torch.no_grad()
def test_the_scale_reaches_every_layer(target: str, scale: float) -> None:
    unet = make_unet("sd1")
    plain = predicted(unet)
    add_lora(unet, target_modules=[target], lora_alpha=2)
    want = published(unet, scale)
    kwargs = {"cross_attention_kwargs": {"scale": scale}}
    assert relative_error(predicted(unet, **kwargs), want) <= EXACT_RELATIVE
    given = make_inputs()
    combined = TiUEUNet.from_unet(unet).one_pass(
        given["latents"], SCHEDULE, given["prompt_embeds"], **kwargs
    )
    assert relative_error(combined, SCHEDULE.combine(given["latents"], want)) <= EXACT_RELATIVE
    assert (relative_error(want, plain) > 1e-3) == (scale > 0)


@torch.no_grad()
def test_nothing_is_kept_that_could_go_stale() -> None:
    unet = make_unet("sd1")
    add_lora(unet)
    before = predicted(unet)
    for key, parameter in unet.named_parameters():
        if "lora_A" in key:
            parameter.data.mul_(-1)  # no version counts it
    after = predicted(unet)
    assert relative_error(after, published(unet)) <= EXACT_RELATIVE
    assert relative_error(after, before) > 1e-2


def gradients(unet: Any, call: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    output = call(unet)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(8)).double()
    (output * weights).sum().backward()
    return {key: p.grad.clone() for key, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_gradients_are_the_published_forms(name: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr(layers, "_told", set())
    unet = make_unet(name)
    unet.requires_grad_(False)
    two_adapters(unet)
    unet.train()
    for key, parameter in unet.named_parameters():
        assert parameter.requires_grad == ("lora_" in key), key
    want, got = gradients(unet, published), gradients(unet, predicted)
    assert not caplog.records
    assert want.keys() == got.keys()
    for key in want:
        assert relative_error(got[key], want[key]) <= 1e-10, key


def test_a_dropout_in_training_is_the_layers_own() -> None:
    unet = make_unet("sd1")
    unet.requires_grad_(False)
    add_lora(unet, lora_dropout=0.5, target_modules=["conv1"])
    unet.up_blocks.train()
    assert weights_of(unet.up_blocks[0].resnets[0].conv1, torch.nn.Conv2d) is None
    assert not torch.equal(predicted(unet), predicted(unet))


@torch.no_grad()
def test_a_wider_lora_on_narrow_weights_is_added_before_rounding() -> None:
    unet = make_unet("sd1")
    add_lora(unet)
    layer = unet.up_blocks[0].resnets[0].conv1
    layer.base_layer.bfloat16()
    layer.lora_A.float()
    layer.lora_B.float()
    weights = weights_of(layer, torch.nn.Conv2d)
    assert weights is not None
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("style").double()
    assert weights.merged().dtype == torch.bfloat16
    torch.testing.assert_close(weights.merged().double(), exact, rtol=2**-8, atol=0)


@torch.no_grad()
def test_two_slots_hold_two_weights() -> None:
    unet = make_unet("sd1")
    add_lora(unet)
    block = unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1
    first = weights_of(block.to_q, torch.nn.Linear).merged(0)
    kept = first.clone()
    second = weights_of(block.to_k, torch.nn.Linear).merged(1)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    weights_of(block.to_k, torch.nn.Linear).merged(0)
    assert torch.equal(first, second)  # the same memory, written anew


@torch.no_grad()
def test_sdxl() -> None:
    unet = make_unet("sdxl")
    add_lora(unet)
    conditioning = make_conditioning("sdxl")
    given = make_inputs()
    want = published_form.predict_noise(
        unet, given["latents"], SCHEDULE.timesteps, given["prompt_embeds"], **conditioning
    )
    assert relative_error(predicted(unet, **conditioning), want) <= EXACT_RELATIVE


def test_a_weight_of_another_tensor_class_is_left_to_its_layer() -> None:
    class Quantised(torch.Tensor):
        """Of which torch's own operators alone know what it holds."""

    layer = torch.nn.Linear(4, 3)
    assert layers.is_plain(layer, torch.nn.Linear)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    assert not layers.is_plain(layer, torch.nn.Linear)
    assert low_rank.weights_of(layer, torch.nn.Linear) is None
