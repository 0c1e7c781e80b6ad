"""What an adapter, a hook or an option wraps is called through it: right, and said in the log."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

from tests.tiue.test_unet import check_one_pass
from tests.tiue.unets import make_conditioning, make_unet
from tiue import TiUEUNet
from tiue_kernels.nn.layers import is_plain


def add_lora(unet: Any, targets: list[str]) -> None:
    """A LoRA with random weights of a size that shows."""
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    unet.double()


class ScaledProcessor(AttnProcessor):
    """A custom attention processor with an argument of its own."""

    def __call__(self, *args: Any, strength: float = 1.0, **kwargs: Any) -> torch.Tensor:
        return strength * super().__call__(*args, **kwargs)


def hook_all(unet: Any, kinds: tuple[str, ...]) -> None:
    """A forward hook that halves the output of every module of these classes."""
    for module in unet.up_blocks.modules():
        if type(module).__name__ in kinds:
            module.register_forward_hook(lambda _module, _args, output: output * 0.5)


CHANGES: dict[str, Callable[[Any], None]] = {
    "lora_on_attention": lambda unet: add_lora(unet, ["to_q", "to_k", "to_v", "to_out.0"]),
    "lora_on_resnets": lambda unet: add_lora(
        unet, ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"]
    ),
    "lora_on_feed_forward": lambda unet: add_lora(unet, ["ff.net.0.proj", "ff.net.2", "proj_in"]),
    "lora_on_conv_out": lambda unet: add_lora(unet, ["conv_out", "conv_in"]),
    "legacy_processor": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "sliced_attention": lambda unet: unet.set_attention_slice(1),
    "fused_projections": lambda unet: unet.fuse_qkv_projections(),
    "chunked_feed_forward": lambda unet: [
        block.set_chunk_feed_forward(4, dim=1)
        for block in unet.modules()
        if isinstance(block, BasicTransformerBlock)
    ],
    "freeu": lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "hook_on_conv": lambda unet: hook_all(unet, ("Conv2d", "GroupNorm")),
    "hook_on_resnet": lambda unet: hook_all(unet, ("ResnetBlock2D",)),
    "hook_on_block": lambda unet: hook_all(unet, ("UpBlock2D", "CrossAttnUpBlock2D")),
    "hook_on_attention": lambda unet: hook_all(unet, ("Attention", "FeedForward")),
    "hook_on_conv_out": lambda unet: unet.conv_out.register_forward_hook(
        lambda _module, _args, output: output + 1
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_layers_are_called_whole(change: str) -> None:
    unet = make_unet("sd1")
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    plain = make_unet("sd1")
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in before.items())
    CHANGES[change](unet)
    check_one_pass(unet, {})


@torch.no_grad()
def test_the_changes_do_change_the_output() -> None:
    """Guards the test above: a change that does nothing would prove nothing."""
    neutral = {"legacy_processor", "sliced_attention", "fused_projections", "chunked_feed_forward"}
    sample, text = torch.ones(1, 4, 8, 8).double(), torch.ones(1, 5, 24).double()
    reference = make_unet("sd1")(sample, 501, text).sample
    for name, change in CHANGES.items():
        unet = make_unet("sd1")
        change(unet)
        same = torch.allclose(unet(sample, 501, text).sample, reference, rtol=0, atol=1e-9)
        assert same == (name in neutral), name


@torch.no_grad()
def test_lora_scale_reaches_encoder_and_decoder() -> None:
    unet = make_unet("sd1")
    add_lora(unet, ["to_q", "to_v", "conv1"])
    check_one_pass(unet, {"cross_attention_kwargs": {"scale": 0.3}})


@torch.no_grad()
def test_custom_processor_is_given_its_arguments() -> None:
    unet = make_unet("sd1")
    unet.set_attn_processor(ScaledProcessor())
    check_one_pass(unet, {"cross_attention_kwargs": {"strength": 0.25}})


@torch.no_grad()
def test_ip_adapter() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    unet = make_unet("sd1")
    torch.manual_seed(6)
    processors: dict[str, Any] = {}
    for name, processor in unet.attn_processors.items():
        processors[name] = processor
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            processors[name] = IPAdapterAttnProcessor2_0(width, 24, num_tokens=(4,)).double()
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(
        [ImageProjection(image_embed_dim=10, cross_attention_dim=24, num_image_text_embeds=4)]
    ).double()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    image_embeds = torch.randn(2, 1, 10, dtype=torch.float64)
    check_one_pass(unet, {"added_cond_kwargs": {"image_embeds": [image_embeds]}})


@torch.no_grad()
def test_text_projections_run_on_the_batch_not_on_every_timestep() -> None:
    """Saving 3, seen from outside: a LoRA on to_k is called once, with B rows."""
    unet = make_unet("sd1")
    add_lora(unet, ["to_k", "to_v"])
    rows = []
    for name, module in unet.up_blocks.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[0]))
    student = TiUEUNet.from_unet(unet)
    text = torch.ones(2, 5, 24).double()
    student.predict_noise(torch.ones(2, 4, 8, 8).double(), [751, 501, 251], text)
    assert rows == [2] * len(rows)
    assert len(rows) == 2 * 2  # one call of each, in each of the two transformers


@torch.no_grad()
def test_plain_decoder_sees_every_skip_once_and_never_repeated() -> None:
    """Savings 1 and 2, seen from outside: nothing of K*B rows meets a skip's channels."""
    unet = make_unet("sd1")
    widest = []
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert is_plain(module, torch.nn.Conv2d)
    original = torch.cat

    def watched(tensors: Any, dim: int = 0) -> torch.Tensor:
        out = original(tensors, dim)
        if out.ndim == 4:
            widest.append((out.shape[0], out.shape[1]))
        return out

    student = TiUEUNet.from_unet(unet)
    features = student.encode(torch.ones(2, 4, 8, 8).double(), 1, torch.ones(2, 5, 24).double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", watched)
        student.decode(features, [751, 501, 251])
    # The first resnet joins B rows; after it only a straddling group's few channels are joined.
    assert [rows for rows, _ in widest].count(2) == 1
    for rows, channels in widest:
        assert rows == 2 or channels < 32 + 16, (rows, channels)


def test_adapters_on_sdxl() -> None:
    unet = make_unet("sdxl")
    add_lora(unet, ["to_k", "conv2"])
    with torch.no_grad():
        check_one_pass(unet, make_conditioning("sdxl"))
