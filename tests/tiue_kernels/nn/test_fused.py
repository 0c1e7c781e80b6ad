"""Fused modules against the diffusers modules that they stand for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from testing.tolerances import EXACT_RELATIVE, ROUNDING_FLOORS, relative_error
from tiue_kernels.nn import (
    FusedBasicTransformerBlock,
    FusedGEGLU,
    FusedResnetBlock2D,
    FusedUpsample2D,
    GroupNormSiLUConv2d,
    convolutions,
    resnet_block,
)
from tiue_kernels.nn import resnet as resnet_module
from tiue_kernels.nn.layers import is_plain

Tensors = dict[str, torch.Tensor]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
K, B = 3, 2


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class Case:
    """A module, its fused form, and what both are called with.

    Attributes:
        make: the original.
        fused: its fused class.
        inputs: keyword arguments, float64.
        arguments: keyword arguments that are no tensors.
    """

    make: Callable[[], nn.Module]
    fused: Any
    inputs: Tensors
    arguments: dict[str, Any]


def resnet(**options: Any) -> Case:
    options = {"in_channels": 16, "out_channels": 8, "temb_channels": 6, "groups": 4, **options}
    inputs = {"input_tensor": noise(B, options["in_channels"], 5, 4)}
    if options["temb_channels"]:
        inputs["temb"] = noise(B, options["temb_channels"])
    else:
        inputs["temb"] = None
    return Case(lambda: ResnetBlock2D(**options), FusedResnetBlock2D, inputs, {})


def transformer(inputs: tuple[str, ...] = (), **options: Any) -> Case:
    tensors = {
        "hidden_states": noise(B, 6, 16),
        "encoder_hidden_states": noise(B, 5, 12),
        "attention_mask": noise(B, 1, 6),
        "encoder_attention_mask": noise(B, 1, 5),
    }
    given = ("hidden_states", "encoder_hidden_states", *inputs)
    options = {"cross_attention_dim": 12, **options}
    return Case(
        lambda: BasicTransformerBlock(16, 2, 8, **options),
        FusedBasicTransformerBlock,
        {name: tensors[name] for name in given},
        {},
    )


CASES = {
    "resnet": resnet(),
    "resnet_identity": resnet(out_channels=16),
    "resnet_scale_shift": resnet(time_embedding_norm="scale_shift"),
    "resnet_scaled": resnet(output_scale_factor=1.5, skip_time_act=True),
    "resnet_without_time": resnet(temb_channels=None),
    "resnet_mish": resnet(non_linearity="mish"),
    "resnet_mish_scale_shift": resnet(non_linearity="mish", time_embedding_norm="scale_shift"),
    "transformer": transformer(),
    "transformer_masks": transformer(("attention_mask", "encoder_attention_mask")),
    "transformer_gelu": transformer(activation_fn="gelu"),
    "transformer_not_affine": transformer(norm_elementwise_affine=False),
    "transformer_biased": transformer(attention_bias=True),
    "upsample": Case(
        lambda: Upsample2D(4, use_conv=True, out_channels=6),
        FusedUpsample2D,
        {"hidden_states": noise(B, 4, 5, 3)},
        {},
    ),
    "upsample_to_size": Case(
        lambda: Upsample2D(4, use_conv=True),
        FusedUpsample2D,
        {"hidden_states": noise(B, 4, 5, 3)},
        {"output_size": (9, 5)},
    ),
    "geglu": Case(lambda: GEGLU(4, 6), FusedGEGLU, {"hidden_states": noise(B, 5, 4)}, {}),
    "norm_silu_conv": Case(
        lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 6, 3, padding=1)),
        GroupNormSiLUConv2d,
        {"x": noise(B, 8, 5, 3)},
        {},
    ),
    "norm_silu_strided_conv": Case(
        lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 6, 3, stride=2)),
        GroupNormSiLUConv2d,
        {"x": noise(B, 8, 5, 3)},
        {},
    ),
}


def make(case: Case) -> nn.Module:
    """The original with random weights, norms included."""
    torch.manual_seed(0)
    module = case.make().double()
    for index, parameter in enumerate(module.parameters()):
        if parameter.ndim == 1:
            parameter.data += 0.3 * noise(*parameter.shape, seed=index)
    return module


def run(module: nn.Module, case: Case, dtype: torch.dtype) -> Tensors:
    """The output and every gradient, by name."""
    inputs = {
        name: None if value is None else value.detach().to(dtype, copy=True).requires_grad_()
        for name, value in case.inputs.items()
    }
    if isinstance(module, nn.Sequential):
        out = module(*inputs.values())
    else:
        out = module(**inputs, **case.arguments)
    tensors = {name: value for name, value in inputs.items() if value is not None}
    tensors |= dict(module.named_parameters())
    (out * noise(*out.shape, seed=9).to(dtype)).sum().backward()
    grads = {f"grad {name}": tensor.grad for name, tensor in tensors.items()}
    module.zero_grad()
    assert not [name for name, grad in grads.items() if grad is None]
    return {"out": out.detach(), **grads}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_are_the_original_ones(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    original = make(case)
    exact = run(original, case, torch.float64)
    original.to(dtype)
    fused = case.fused.from_module(original)
    plain, own = run(original, case, dtype), run(fused, case, dtype)
    assert own.keys() == exact.keys()
    for key, reference in exact.items():
        assert own[key].dtype == dtype, key
        if key.endswith("to_k.bias"):  # shifts all scores of a query alike: no gradient
            continue
        if dtype is torch.float64:
            assert relative_error(own[key], reference) <= EXACT_RELATIVE, key
            continue
        # Weights are rounded to the dtype: the original's own error says what that costs.
        allowed = 2 * relative_error(plain[key], reference) + ROUNDING_FLOORS[dtype]
        assert relative_error(own[key], reference) <= allowed, key


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_shared_under_the_same_keys(name: str) -> None:
    original = make(CASES[name])
    fused = CASES[name].fused.from_module(original)
    own, shared = fused.state_dict(keep_vars=True), original.state_dict(keep_vars=True)
    assert list(own) == list(shared)
    assert all(own[key] is shared[key] for key in shared)
    assert fused.training == original.training
    assert CASES[name].fused.from_module(original.eval()).training is False


@pytest.mark.parametrize("name", ["resnet", "transformer", "geglu", "norm_silu_conv", "upsample"])
def test_a_copy_and_a_pickle_work(name: str) -> None:
    case = CASES[name]
    fused = case.fused.from_module(make(case))
    expected = run(fused, case, torch.float64)["out"]
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(clone) is case.fused
        assert torch.equal(run(clone, case, torch.float64)["out"], expected)


@torch.no_grad()
def test_timesteps_share_a_skip() -> None:
    case = resnet(in_channels=20)
    original = make(case)
    fused = FusedResnetBlock2D.from_module(original)
    skip, temb = noise(B, 8, 5, 4), noise(K * B, 6)
    repeated = skip.repeat(K, 1, 1, 1)
    for rows in (K * B, B):  # B: the timesteps part inside the block
        hidden = noise(rows, 12, 5, 4)
        joined = torch.cat([hidden.repeat(K * B // rows, 1, 1, 1), repeated], 1)
        out = fused(hidden, temb, skip)
        assert relative_error(out, original(joined, temb)) <= EXACT_RELATIVE


@torch.no_grad()
def test_timesteps_share_a_text() -> None:
    original = make(transformer())
    fused = FusedBasicTransformerBlock.from_module(original)
    tokens, text, mask = noise(K * B, 6, 16), noise(B, 5, 12), noise(B, 1, 5)
    out = fused(tokens, encoder_hidden_states=text, encoder_attention_mask=mask)
    expected = original(
        tokens,
        encoder_hidden_states=text.repeat(K, 1, 1),
        encoder_attention_mask=mask.repeat(K, 1, 1),
    )
    assert relative_error(out, expected) <= EXACT_RELATIVE


def double_output(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{
        f"hook_on_{layer}": (
            "resnet",
            lambda block, layer=layer: getattr(block, layer).register_forward_hook(double_output),
        )
        for layer in ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "nonlinearity")
    },
    "processor": ("transformer", lambda block: block.attn2.set_processor(AttnProcessor())),
    "hook_on_norm": ("transformer", lambda block: block.norm1.register_forward_hook(double_output)),
    "hook_on_to_q": (
        "transformer",
        lambda block: block.attn1.to_q.register_forward_hook(double_output),
    ),
    "hook_on_attention": (
        "transformer",
        lambda block: block.attn2.register_forward_hook(double_output),
    ),
    "hook_on_gate": (
        "transformer",
        lambda block: block.ff.net[0].proj.register_forward_hook(double_output),
    ),
    "hook_on_upsampling": ("upsample", lambda b: b.conv.register_forward_hook(double_output)),
}


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("name", ["resnet", "resnet_without_time", "resnet_mish"])
def test_a_resnet_asks_for_its_activation_once(name: str, with_skip: bool, monkeypatch) -> None:
    block = make(CASES[name])
    hidden, temb = CASES[name].inputs["input_tensor"], CASES[name].inputs["temb"]
    halves = hidden.split(8, dim=1) if with_skip else (hidden, None)
    asked = []

    def note(module, *classes):
        asked.append(module)
        return is_plain(module, *classes)

    for place in (resnet_module, convolutions):
        monkeypatch.setattr(place, "is_plain", note)
    resnet_block(block, halves[0], temb, halves[1])
    assert asked.count(block.nonlinearity) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_layer_later_keeps_its_effect(change: str) -> None:
    name, apply = CHANGES[change]
    case = CASES[name]
    original = make(case)
    fused = case.fused.from_module(original)
    before = run(fused, case, torch.float64)["out"]
    apply(original)
    expected, results = run(original, case, torch.float64), run(fused, case, torch.float64)
    assert change == "processor" or relative_error(before, expected["out"]) > 1e-3
    for key, reference in expected.items():
        assert relative_error(results[key], reference) <= EXACT_RELATIVE, key


def test_dropout_in_training_draws_as_the_original() -> None:
    case = resnet(dropout=0.5)
    original = make(case)
    fused = case.fused.from_module(original)
    results = []
    for module in (original, fused):
        torch.manual_seed(3)
        results.append(run(module, case, torch.float64))
    for key, reference in results[0].items():
        assert relative_error(results[1][key], reference) <= EXACT_RELATIVE, key
    assert relative_error(fused.eval()(**case.inputs), results[0]["out"]) > 1e-3


@pytest.mark.parametrize("name", ["resnet", "transformer", "geglu", "norm_silu_conv"])
def test_compiles_without_a_graph_break(name: str) -> None:
    case = CASES[name]
    fused = case.fused.from_module(make(case))
    inputs = list(case.inputs.values())
    arguments = () if name != "transformer" else (None,)
    inputs[1:1] = arguments
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = fused(*inputs)
    assert relative_error(compiled(*inputs), expected) <= EXACT_RELATIVE
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*inputs)


@pytest.mark.parametrize(
    ("fused", "module", "error", "words"),
    [
        (FusedResnetBlock2D, lambda: nn.Conv2d(2, 2, 1), TypeError, "ResnetBlock2D, got Conv2d"),
        (
            FusedResnetBlock2D,
            lambda: ResnetBlock2D(in_channels=4, temb_channels=None, groups=2, up=True),
            ValueError,
            "resamples",
        ),
        (
            FusedBasicTransformerBlock,
            lambda: BasicTransformerBlock(16, 2, 8),
            ValueError,
            "cross-attention",
        ),
        (
            FusedBasicTransformerBlock,
            lambda: BasicTransformerBlock(
                16,
                2,
                8,
                cross_attention_dim=12,
                positional_embeddings="sinusoidal",
                num_positional_embeddings=6,
            ),
            ValueError,
            "position embeddings",
        ),
        (FusedUpsample2D, lambda: Upsample2D(4), ValueError, "before a convolution"),
        (FusedGEGLU, lambda: nn.GELU(), TypeError, "GEGLU"),
        (GroupNormSiLUConv2d, lambda: nn.Sequential(nn.SiLU()), TypeError, "three layers"),
        (
            GroupNormSiLUConv2d,
            lambda: nn.Sequential(nn.GroupNorm(1, 2), nn.GELU(), nn.Conv2d(2, 2, 1)),
            TypeError,
            "GELU for the SiLU",
        ),
    ],
)
def test_what_has_no_fused_form_is_refused(fused, module, error, words) -> None:
    with pytest.raises(error, match=words):
        fused.from_module(module())


def test_a_hooked_module_is_refused() -> None:
    module = make(CASES["resnet"])
    module.register_forward_hook(double_output)
    with pytest.raises(TypeError, match="hooks"):
        FusedResnetBlock2D.from_module(module)


def test_a_fused_module_is_made_from_a_module() -> None:
    with pytest.raises(TypeError, match="from_module"):
        FusedResnetBlock2D()
