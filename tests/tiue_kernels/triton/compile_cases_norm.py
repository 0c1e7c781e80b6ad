"""Norm and pointwise kernels at Stable Diffusion's shapes, to be compiled for absent GPUs.

What is compiled is what a real call would compile, block sizes and specialisation included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tiue_kernels.triton import (
    adaptive_layer_norm,
    gated_residual,
    geglu,
    group_norm_tokens,
    noise_kl,
    one_pass_combine,
)
from tiue_kernels.triton import (
    broadcast_add_group_norm_silu as broadcast_add,
)
from tiue_kernels.triton import (
    shared_skip_group_norm_silu as shared_skip,
)
from tiue_kernels.triton import (
    shared_skip_layer_norm_linear as long_skip,
)
from tiue_kernels.triton import (
    timestep_sum_group_norm_silu as timestep_sum,
)
from tiue_kernels.triton.compilation import Compilation, launches_of

K, B, GROUPS = 4, 1, 32
Maps = Callable[..., torch.Tensor]


def _shared_skip(maps: Maps, hidden: int, skip: int, size: int) -> None:
    h, s = maps(K * B, hidden, size, size), maps(B, skip, size, size)
    norm = (maps(hidden + skip), maps(hidden + skip))
    *outs, first, second = shared_skip.shared_skip_group_norm_silu_fwd(h, s, GROUPS, *norm, 1e-5)
    shared_skip.shared_skip_group_norm_silu_bwd(*outs, h, s, GROUPS, *norm, first, second)


def _broadcast_add(maps: Maps, channels: int, size: int, scale_shift: bool) -> None:
    h, s = maps(K * B, channels, size, size), maps(B, channels, size, size)
    temb = maps(K * B, channels * (2 if scale_shift else 1))
    norm = (GROUPS, maps(channels), maps(channels))
    out, stats = broadcast_add.broadcast_add_group_norm_silu_fwd(
        h, s, temb, *norm, 1e-5, scale_shift
    )
    broadcast_add.broadcast_add_group_norm_silu_bwd(out, h, s, temb, *norm, scale_shift, stats)


def _timestep_sum(maps: Maps, channels: int, size: int) -> None:
    h, coefficients = maps(K * B, channels, size, size), maps(K)
    norm = (GROUPS, maps(channels), maps(channels))
    out, stats = timestep_sum.timestep_sum_group_norm_silu_fwd(h, coefficients, *norm, 1e-5)
    timestep_sum.timestep_sum_group_norm_silu_bwd(out, h, coefficients, *norm, stats)


def _tokens(maps: Maps, channels: int, size: int) -> None:
    x, norm = maps(K * B, channels, size, size), (GROUPS, maps(channels), maps(channels))
    out, stats = group_norm_tokens.group_norm_tokens_fwd(x, *norm, 1e-6)
    group_norm_tokens.group_norm_tokens_bwd(out, x, *norm, stats)


def _pointwise(maps: Maps) -> None:
    x, latents, noise, coefficients = (
        maps(4096, 2560),
        maps(1, 4, 64, 64),
        maps(4, 1, 4, 64, 64),
        maps(4),
    )
    # PixArt's tokens at 512 pixels.
    tokens, scale, shift = maps(1, 1024, 1152), maps(4, 1152), maps(4, 1152)
    out, stats = adaptive_layer_norm.adaptive_layer_norm_fwd(tokens, scale, shift, 1e-6)
    adaptive_layer_norm.adaptive_layer_norm_bwd(out, tokens, scale, shift, stats)
    branch = maps(4, 1024, 1152)
    joined = gated_residual.gated_residual_fwd(tokens, scale, branch)
    gated_residual.gated_residual_bwd(joined, tokens, scale, branch)
    skip, norm, weight = maps(1, 1024, 1152), maps(2304), maps(1152, 2304)
    projection = (norm, norm, 1e-6, weight, None)
    long_skip.shared_skip_layer_norm_linear_fwd(branch, skip, *projection)
    long_skip.shared_skip_layer_norm_linear_bwd(joined, branch, skip, *projection)
    geglu.geglu_bwd(geglu.geglu_fwd(x), x)
    out = one_pass_combine.one_pass_combine_fwd(latents, noise, 4.2, coefficients)
    one_pass_combine.one_pass_combine_bwd(out, noise, 4.2, coefficients)
    kl, moments = noise_kl.noise_kl_fwd(noise)
    noise_kl.noise_kl_bwd(kl, noise, moments)


# Names as of the decoder of Stable Diffusion 1.5 at 512 pixels, or of SDXL at 1024.
CALLS: dict[str, Callable[[Maps], None]] = {
    "up0": lambda maps: _shared_skip(maps, 1280, 1280, 8),  # a group a tile
    "up2-straddling": lambda maps: _shared_skip(maps, 1280, 640, 32),
    "up3": lambda maps: _shared_skip(maps, 320, 320, 64),
    "xl-up0": lambda maps: _shared_skip(maps, 1280, 1280, 32),  # 80 channels a group
    "up1-add": lambda maps: _broadcast_add(maps, 1280, 16, False),
    "up3-add": lambda maps: _broadcast_add(maps, 320, 64, False),
    "up2-scale-shift": lambda maps: _broadcast_add(maps, 640, 32, True),
    "out": lambda maps: _timestep_sum(maps, 320, 64),
    "out-small": lambda maps: _timestep_sum(maps, 320, 16),
    "up1-tokens": lambda maps: _tokens(maps, 1280, 16),
    "up3-tokens": lambda maps: _tokens(maps, 320, 64),
    "pointwise": _pointwise,
}
FORMS = {
    "f16": (torch.float16, torch.contiguous_format),
    "f16-nhwc": (torch.float16, torch.channels_last),
    "f32": (torch.float32, torch.contiguous_format),
    "f32-nhwc": (torch.float32, torch.channels_last),
}


def compilations() -> dict[str, Compilation]:
    """Every distinct compilation of the calls, named by the first call that needs it."""
    found: dict[str, Compilation] = {}
    for form, (dtype, memory_format) in FORMS.items():
        for name, call in CALLS.items():
            if name == "pointwise" and "nhwc" in form:
                continue

            def maps(*shape: int, dtype=dtype, memory_format=memory_format) -> torch.Tensor:
                laid = memory_format if len(shape) == 4 else torch.contiguous_format
                return torch.empty(shape, dtype=dtype, device="meta", memory_format=laid)

            for launch in launches_of(partial(call, maps)):
                if launch not in found.values():
                    kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
                    number = sum(key.startswith(f"{name}-{form}-{kernel}") for key in found)
                    found[f"{name}-{form}-{kernel}" + (f"-{number}" if number else "")] = launch
    return found
