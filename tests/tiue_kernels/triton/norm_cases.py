"""Inputs, textbook forms and calls of the norm and pointwise operators, for the launcher tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

Tensors = tuple[torch.Tensor, ...]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        operator: its name.
        maps: float64 tensors in the data dtype of the call, in the order of the launcher.
        parameters: float64 norm weights, embeddings and coefficients, likewise.
        textbook: (*maps, *parameters) to outputs, by autograd.
        launch: (module, *maps, *parameters) to outputs and a function from output gradients to
            the gradients of (*maps, *parameters).
        mean: of the maps. A float32 mean of 100 is off by up to 3.8e-6, which shifts all values of
            a group alike: at most 2^-24 of it is allowed beside the rounding of the results.
    """

    operator: str
    maps: Tensors
    parameters: Tensors
    textbook: Callable[..., Tensors]
    launch: Callable[..., tuple[Tensors, Callable[..., Tensors]]]
    mean: float = 0.0


def noise(*shape: int, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator) + mean


def shared_skip(
    timesteps: int,
    batch: int,
    hidden: int,
    skip: int,
    groups: int,
    size: tuple[int, int],
    mean: float = 0.0,
) -> Case:
    channels = hidden + skip
    group_size = channels // groups
    border = -(-hidden // group_size) * group_size

    def textbook(hidden, skip, weight, bias) -> Tensors:
        joined = torch.cat([hidden, skip.repeat(timesteps, 1, 1, 1)], dim=1)
        out = F.silu(F.group_norm(joined, groups, weight, bias, EPS))
        return out[:, :border], out[:batch, border:]

    def launch(module: ModuleType, hidden, skip, weight, bias):
        *outs, hidden_stats, skip_stats = module.shared_skip_group_norm_silu_fwd(
            hidden, skip, groups, weight, bias, EPS
        )
        assert hidden_stats.shape == (2, timesteps * batch, border // group_size)
        assert skip_stats.shape == (2, batch, groups - border // group_size)
        stats = (hidden_stats, skip_stats)
        return tuple(outs), lambda *grads: module.shared_skip_group_norm_silu_bwd(
            *grads, hidden, skip, groups, weight, bias, *stats
        )

    maps = (
        noise(timesteps * batch, hidden, *size, mean=mean),
        noise(batch, skip, *size, seed=1, mean=mean),
    )
    parameters = (noise(channels), noise(channels, seed=1))
    return Case("shared_skip_group_norm_silu", maps, parameters, textbook, launch, mean)


def broadcast_add(
    timesteps: int,
    batch: int,
    channels: int,
    groups: int,
    size: tuple[int, int],
    with_hidden: bool = True,
    scale_shift: bool = False,
    mean: float = 0.0,
) -> Case:
    def textbook(*tensors) -> Tensors:
        *hidden, shared, temb, weight, bias = tensors
        rows = shared.repeat(timesteps, 1, 1, 1)
        if hidden:
            rows = rows + hidden[0]
        temb = temb[:, :, None, None].to(rows.dtype)
        if not scale_shift:
            rows = rows + temb
        rows = F.group_norm(rows, groups, weight, bias, EPS)
        if scale_shift:
            scale, shift = temb.chunk(2, dim=1)
            rows = rows * (1 + scale) + shift
        return (F.silu(rows),)

    def launch(module: ModuleType, *tensors):
        *hidden, shared, temb, weight, bias = tensors
        first = hidden[0] if hidden else None
        norm = (groups, weight, bias)
        out, stats = module.broadcast_add_group_norm_silu_fwd(
            first, shared, temb, *norm, EPS, scale_shift
        )
        assert stats.shape == (2, len(temb), groups)

        def backward(grad: torch.Tensor) -> Tensors:
            grads = module.broadcast_add_group_norm_silu_bwd(
                grad, first, shared, temb, *norm, scale_shift, stats
            )
            if not hidden:
                assert grads[0].shape == (0,)
            return grads if hidden else grads[1:]

        return (out,), backward

    hidden = (noise(timesteps * batch, channels, *size),) if with_hidden else ()
    maps = (*hidden, noise(batch, channels, *size, seed=1, mean=mean))
    temb = noise(timesteps * batch, channels * (2 if scale_shift else 1), seed=2)
    parameters = (temb, noise(channels), noise(channels, seed=1))
    return Case("broadcast_add_group_norm_silu", maps, parameters, textbook, launch, mean)


def timestep_sum(
    timesteps: int,
    batch: int,
    channels: int,
    groups: int,
    size: tuple[int, int],
    mean: float = 0.0,
) -> Case:
    def textbook(hidden, coefficients, weight, bias) -> Tensors:
        active = F.silu(F.group_norm(hidden, groups, weight, bias, EPS))
        active = active.unflatten(0, (timesteps, batch))
        return (sum(c.to(a.dtype) * a for c, a in zip(coefficients, active, strict=True)),)

    def launch(module: ModuleType, hidden, coefficients, weight, bias):
        norm = (groups, weight, bias)
        out, stats = module.timestep_sum_group_norm_silu_fwd(hidden, coefficients, *norm, EPS)
        assert stats.shape == (2, len(hidden), groups)
        return (out,), lambda grad: module.timestep_sum_group_norm_silu_bwd(
            grad, hidden, coefficients, *norm, stats
        )

    maps = (noise(timesteps * batch, channels, *size, mean=mean),)
    parameters = (noise(timesteps), noise(channels), noise(channels, seed=1))
    return Case("timestep_sum_group_norm_silu", maps, parameters, textbook, launch, mean)


def combine(timesteps: int, *shape: int) -> Case:
    def textbook(latents, noise_pred, coefficients) -> Tensors:
        terms = zip(coefficients, noise_pred, strict=True)
        return (2.5 * latents + sum(c.to(n.dtype) * n for c, n in terms),)

    def launch(module: ModuleType, latents, noise_pred, coefficients):
        out = module.one_pass_combine_fwd(latents, noise_pred, 2.5, coefficients)
        return (out,), lambda grad: module.one_pass_combine_bwd(grad, noise_pred, 2.5, coefficients)

    maps = (noise(*shape), noise(timesteps, *shape, seed=1))
    return Case("one_pass_combine", maps, (noise(timesteps),), textbook, launch)


def kl(*shape: int, mean: float = 0.0) -> Case:
    def textbook(maps) -> Tensors:
        variance, mean = torch.var_mean(maps.flatten(-3), dim=-1)
        return (0.5 * (mean.square() + variance - 1 - variance.log()),)

    def launch(module: ModuleType, maps):
        out, moments = module.noise_kl_fwd(maps)
        assert out.dtype == torch.promote_types(maps.dtype, torch.float32)
        return (out,), lambda grad: (module.noise_kl_bwd(grad, maps, moments),)

    return Case("noise_kl", (1.5 * noise(*shape) + mean,), (), textbook, launch)


def gated(*shape: int) -> Case:
    def textbook(x) -> Tensors:
        hidden, gate = x.chunk(2, dim=-1)
        return (hidden * F.gelu(gate),)

    def launch(module: ModuleType, x):
        return (module.geglu_fwd(x),), lambda grad: (module.geglu_bwd(grad, x),)

    return Case("geglu", (2 * noise(*shape),), (), textbook, launch)


def as_tokens(
    rows: int, channels: int, groups: int, size: tuple[int, int], mean: float = 0.0
) -> Case:
    def textbook(x, weight, bias) -> Tensors:
        return (F.group_norm(x, groups, weight, bias, EPS).flatten(2).transpose(1, 2),)

    def launch(module: ModuleType, x, weight, bias):
        out, stats = module.group_norm_tokens_fwd(x, groups, weight, bias, EPS)
        assert stats.shape == (2, rows, groups)
        return (out,), lambda grad: module.group_norm_tokens_bwd(
            grad, x, groups, weight, bias, stats
        )

    maps, norm = (
        (noise(rows, channels, *size, mean=mean),),
        (noise(channels), noise(channels, seed=1)),
    )
    return Case("group_norm_tokens", maps, norm, textbook, launch, mean)


def modulated(timesteps: int, batch: int, tokens: int, channels: int, mean: float = 0.0) -> Case:
    def textbook(x, scale, shift) -> Tensors:
        x = F.layer_norm(x, x.shape[-1:], eps=EPS).repeat(timesteps, 1, 1)
        return (x * (1 + scale[:, None]) + shift[:, None],)

    def launch(module: ModuleType, x, scale, shift):
        out, stats = module.adaptive_layer_norm_fwd(x, scale, shift, EPS)
        assert stats.shape == (2, batch, tokens)
        return (out,), lambda grad: module.adaptive_layer_norm_bwd(grad, x, scale, shift, stats)

    rows = timesteps * batch
    parameters = (noise(rows, channels, seed=1), noise(rows, channels, seed=2))
    maps = (noise(batch, tokens, channels, mean=mean),)
    return Case("adaptive_layer_norm", maps, parameters, textbook, launch, mean)


def joined(timesteps: int, batch: int, tokens: int, channels: int) -> Case:
    def textbook(x, y, gate) -> Tensors:
        return (x.repeat(timesteps, 1, 1) + gate[:, None].to(x.dtype) * y,)

    def launch(module: ModuleType, x, y, gate):
        out = module.gated_residual_fwd(x, gate, y)

        def backward(grad: torch.Tensor) -> Tensors:
            grad_x, grad_gate, grad_y = module.gated_residual_bwd(grad, x, gate, y)
            return grad_x, grad_y, grad_gate

        return (out,), backward

    rows = timesteps * batch
    maps = (noise(batch, tokens, channels), noise(rows, tokens, channels, seed=1))
    return Case("gated_residual", maps, (noise(rows, channels, seed=2),), textbook, launch)


def long_skip(
    timesteps: int, batch: int, tokens: int, hidden: int, skip: int, mean: float = 0.0
) -> Case:
    width, out = hidden + skip, 9

    def textbook(hidden, skip, weight, bias, norm_weight, norm_bias) -> Tensors:
        joined = torch.cat([hidden, skip.repeat(timesteps, 1, 1)], dim=-1)
        norm = (norm_weight.to(joined.dtype), norm_bias.to(joined.dtype), EPS)
        return (F.linear(F.layer_norm(joined, (width,), *norm), weight, bias),)

    def launch(module: ModuleType, hidden, skip, weight, bias, norm_weight, norm_bias):
        given = (hidden, skip, norm_weight, norm_bias, EPS, weight, bias)

        def backward(grad: torch.Tensor) -> Tensors:
            grads = module.shared_skip_layer_norm_linear_bwd(grad, *given)
            return *grads[:2], *grads[4:], *grads[2:4]

        return (module.shared_skip_layer_norm_linear_fwd(*given),), backward

    maps = (
        noise(timesteps * batch, tokens, hidden, mean=mean),
        noise(batch, tokens, skip, seed=1, mean=mean),
        noise(out, width, seed=2) / width**0.5,
        noise(out, seed=3),
    )
    parameters = (noise(width), noise(width, seed=1))
    return Case("shared_skip_layer_norm_linear", maps, parameters, textbook, launch, mean)


CASES: dict[str, Case] = {
    "skip-aligned": shared_skip(2, 3, 8, 4, 3, (3, 4)),
    "skip-straddling": shared_skip(4, 2, 6, 6, 3, (2, 3)),
    "skip-covered": shared_skip(4, 1, 6, 3, 1, (3, 3)),
    "skip-group-a-channel": shared_skip(1, 2, 3, 5, 8, (3, 5)),
    "skip-one-pixel": shared_skip(4, 1, 7, 8, 5, (1, 1)),
    "skip-only-hidden": shared_skip(1, 1, 6, 0, 2, (4, 4)),
    "skip-mean-100": shared_skip(2, 1, 10, 10, 4, (4, 5), mean=100.0),
    "skip-empty": shared_skip(3, 0, 6, 6, 3, (2, 3)),
    "add": broadcast_add(2, 3, 6, 2, (3, 5)),
    "add-no-hidden": broadcast_add(4, 2, 10, 2, (2, 3), with_hidden=False),
    "add-scale-shift": broadcast_add(4, 1, 6, 1, (3, 4), scale_shift=True),
    "add-scale-shift-no-hidden": broadcast_add(1, 2, 6, 3, (3, 4), False, True),
    "add-group-a-channel": broadcast_add(1, 1, 5, 5, (4, 4)),
    "add-one-pixel": broadcast_add(2, 3, 12, 4, (1, 1)),
    "add-mean-100": broadcast_add(2, 1, 10, 2, (4, 5), mean=100.0),
    "add-empty": broadcast_add(3, 0, 6, 2, (3, 4)),
    "sum": timestep_sum(2, 3, 6, 2, (3, 5)),
    "sum-of-one": timestep_sum(1, 2, 10, 1, (3, 4)),
    "sum-of-four": timestep_sum(4, 1, 12, 4, (1, 1)),
    "sum-mean-100": timestep_sum(2, 1, 10, 2, (4, 5), mean=100.0),
    "sum-empty": timestep_sum(3, 0, 6, 2, (3, 4)),
    "combine": combine(4, 2, 4, 3, 3),
    "combine-one": combine(1, 1, 5),
    "combine-empty": combine(3, 0, 4, 2, 2),
    "kl": kl(4, 2, 4, 5, 3),
    "kl-one-axis": kl(3, 1, 2, mean=100.0),
    "kl-empty": kl(3, 0, 4, 2, 2),
    "tokens": as_tokens(3, 12, 3, (4, 5)),
    "tokens-split": as_tokens(2, 8, 2, (10, 9)),
    "tokens-one-pixel": as_tokens(2, 14, 7, (1, 1)),
    "tokens-mean-100": as_tokens(2, 12, 2, (3, 5), mean=100.0),
    "tokens-empty": as_tokens(0, 12, 3, (4, 5)),
    "modulated": modulated(3, 2, 5, 12),
    "modulated-own-rows": modulated(1, 4, 3, 16),
    "modulated-one-token": modulated(4, 1, 1, 7),
    "modulated-many-tokens": modulated(2, 1, 40, 70),
    "modulated-mean-100": modulated(2, 1, 3, 33, mean=100.0),
    "modulated-empty": modulated(3, 0, 5, 12),
    "long-skip": long_skip(3, 2, 5, 12, 10),
    "long-skip-own-rows": long_skip(1, 4, 3, 16, 16),
    "long-skip-one-token": long_skip(4, 1, 1, 7, 3),
    "long-skip-many-tokens": long_skip(2, 1, 40, 70, 33),
    "long-skip-mean-100": long_skip(2, 1, 3, 33, 12, mean=100.0),
    "long-skip-empty": long_skip(3, 0, 5, 12, 4),
    "joined": joined(3, 2, 5, 12),
    "joined-own-rows": joined(1, 4, 3, 16),
    "joined-one-token": joined(4, 1, 1, 7),
    "joined-many-tokens": joined(2, 1, 40, 70),
    "joined-empty": joined(3, 0, 5, 12),
    "geglu": gated(2, 3, 10),
    "geglu-wide": gated(5, 2 * 130),
    "geglu-empty": gated(0, 3, 10),
}
