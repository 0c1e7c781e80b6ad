"""The named shapes are those that the student's decoder asks the operators for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from testing.configs import CONFIGS, NUM_TOKENS
from testing.operators import OPERATORS, first_skip_channel
from testing.problem import Draw
from testing.shapes import SHAPES, Attention, Output, Resnet, decoder, select
from tiue import TiUEUNet
from tiue_kernels import functional
from tiue_kernels.nn import activations, attention, convolutions, resnet, upsampling

K = 2
BLOCKS = (activations, attention, convolutions, resnet, upsampling)
Call = tuple[str, ...]


def recorded(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> set[Call]:
    """Calls of public operators: name, shapes of tensors of two axes or more, heads."""
    found: set[Call] = set()

    def note(name: str):
        original = getattr(functional, name)

        def wrapper(*args, **kwargs):
            call = [name]
            for arg in args:
                for entry in arg if isinstance(arg, list) else [arg]:
                    if isinstance(entry, torch.Tensor) and entry.ndim > 1:
                        call.append(str(tuple(entry.shape)))
                    elif name == "cross_timestep_attention" and isinstance(entry, int):
                        call.append(f"{entry} heads")
            found.add(tuple(call))
            return original(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for name in OPERATORS:
            wrapper = note(name)
            patch.setattr(functional, name, wrapper)
            for module in BLOCKS:  # the block functions call it under their own name
                patch.setattr(module, name, wrapper, raising=False)
        run()
    return found


def asked_by_the_decoder(model: str, pixels: int, monkeypatch: pytest.MonkeyPatch) -> set[Call]:
    unet = TiUEUNet(**CONFIGS[model])
    text = torch.empty(1, NUM_TOKENS, unet.config.cross_attention_dim)
    conditioning = {}
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        conditioning["added_cond_kwargs"] = added
    latents = torch.empty(1, 4, pixels // 8, pixels // 8)
    timesteps = torch.arange(K, 0, -1)
    features = unet.encode(latents, timesteps[0], text, **conditioning)
    return recorded(lambda: unet.decode(features, timesteps), monkeypatch)


def asked_by_the_problems(model: str, pixels: int, monkeypatch: pytest.MonkeyPatch) -> set[Call]:
    found: set[Call] = set()
    draw = Draw(torch.device("cpu"), torch.float32, timesteps=K)
    for name, operator in OPERATORS.items():
        for sizes in decoder(model, pixels).values():
            if operator.key(sizes) is not None:
                problem = operator.build(sizes, draw)
                calls = recorded(
                    lambda problem=problem: problem.run(*problem.tensors.values()), monkeypatch
                )
                assert {call[0] for call in calls} == {name}
                found |= calls
    return found


@pytest.mark.parametrize(
    ("model", "pixels"),
    [("sd15", 512), ("sd15", 1024), ("sd21", 768), ("sdxl", 1024), ("tiny", 64)],
)
def test_shapes_are_those_of_the_decoder(model: str, pixels: int, monkeypatch) -> None:
    with FakeTensorMode():
        asked = asked_by_the_decoder(model, pixels, monkeypatch)
        named = asked_by_the_problems(model, pixels, monkeypatch)
    # The query's projection before cross-attention, one weight beside the three of self-attention,
    # and the last convolution, which reads what the shape named `out` says.
    single = {call for call in asked if call[0] == "layer_norm_linear" and len(call) == 3}
    (out,) = (sizes for sizes in decoder(model, pixels).values() if isinstance(sizes, Output))
    last = {("group_norm_silu_conv2d", str((K, *out[:3])), str((4, out.channels, 3, 3)))}
    assert last <= asked
    operators = {call[0] for call in asked}
    assert {
        "group_norm_silu_conv2d",
        "shared_skip_group_norm_silu_conv2d",
        "broadcast_add_group_norm_silu_conv2d",
        "cross_timestep_attention",
        "layer_norm_linear",
        "geglu_feed_forward",
        "upsample_conv2d",
    } <= operators
    assert {call for call in named if call[0] in operators} == asked - single - last
    assert {call[1:] for call in single} == {
        call[1:3] for call in named if call[0] == "layer_norm_linear"
    }


def test_the_hard_shapes_are_among_them() -> None:
    resnets = [sizes for sizes in SHAPES.values() if isinstance(sizes, Resnet)]
    straddling = {
        (sizes.hidden, sizes.skip) for sizes in resnets if first_skip_channel(sizes) != sizes.hidden
    }
    assert {(1280, 640), (640, 320)} <= straddling
    attentions = [sizes for sizes in SHAPES.values() if isinstance(sizes, Attention)]
    assert {40, 64, 80, 160} <= {sizes.head_dim for sizes in attentions}
    assert {sizes.keys for sizes in attentions if not sizes.own} == {NUM_TOKENS}
    assert 4096 in {sizes.keys for sizes in attentions if sizes.own}
    sizes = SHAPES["sd15_512_up3_res0"]
    assert sizes == Resnet(hidden=640, skip=320, out=320, height=64, width=64, groups=32)


def test_selections_hold_every_distinct_shape_once() -> None:
    def key(sizes):
        return sizes if isinstance(sizes, Attention) else None

    chosen = select(key, 512, 1024)
    assert len(set(chosen.values())) == len(chosen)
    assert set(chosen.values()) == {
        sizes
        for name, sizes in SHAPES.items()
        if isinstance(sizes, Attention) and name.split("_")[1] in ("512", "1024")
    }
    assert not any(name.startswith("tiny") for name in chosen)
