"""Every Triton kernel under the sanitizer, which proves each load and store to lie in its tensor.

`TRITON_INTERPRET=1 tile-sanitizer tests/tiue_kernels/triton/sanitize.py [words of a case's name]`:
one JSON object a case, with the error if there is one and the kernels that ran. No GPU is needed,
and no kernel computes anything: addresses and masks are symbols, solved for all programs at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from tilelens.core.trace import TritonTrace

from tiue_kernels.triton import (
    adaptive_layer_norm,
    gated_residual,
    geglu,
    group_norm,
    group_norm_tokens,
    noise_kl,
    one_pass_combine,
)
from tiue_kernels.triton import broadcast_add_group_norm_silu as broadcast_add
from tiue_kernels.triton import cross_timestep_attention as attention
from tiue_kernels.triton import shared_skip_group_norm_silu as shared_skip
from tiue_kernels.triton import shared_skip_layer_norm_linear as long_skip
from tiue_kernels.triton import timestep_sum_group_norm_silu as timestep_sum

K, B, GROUPS = 2, 2, 4
HEIGHT, WIDTH = 3, 5
Tensor = torch.Tensor


def maps(rows: int, channels: int, channels_last: bool) -> Tensor:
    laid = torch.channels_last if channels_last else torch.contiguous_format
    return torch.ones(rows, channels, HEIGHT, WIDTH).to(memory_format=laid)


def shared_skip_norm(
    backward: bool, channels_last: bool, hidden: int = 18, timesteps: int = K
) -> None:
    """36 channels in groups of 9, so many of them hidden; 20: the third group straddles."""
    rows, groups = timesteps * B, -(-hidden // 9)
    maps_in = maps(rows, hidden, channels_last), maps(B, 36 - hidden, channels_last)
    call = (*maps_in, GROUPS, torch.ones(36), torch.ones(36))
    if not backward:
        shared_skip.shared_skip_group_norm_silu_fwd(*call, 1e-5)
        return
    stats = torch.ones(2, rows, groups), torch.ones(2, B, GROUPS - groups)
    outs = maps(rows, 9 * groups, channels_last), maps(B, 36 - 9 * groups, channels_last)
    shared_skip.shared_skip_group_norm_silu_bwd(*outs, *call, *stats)


def broadcast_add_norm(backward: bool, channels_last: bool) -> None:
    hidden, shared = maps(K * B, 12, channels_last), maps(B, 12, channels_last)
    call = (hidden, shared, torch.ones(K * B, 12), GROUPS, torch.ones(12), torch.ones(12))
    if not backward:
        broadcast_add.broadcast_add_group_norm_silu_fwd(*call, 1e-5, False)
        return
    stats = torch.ones(2, K * B, GROUPS)
    broadcast_add.broadcast_add_group_norm_silu_bwd(hidden, *call, False, stats)


def timestep_sum_norm(backward: bool, channels_last: bool) -> None:
    hidden = maps(K * B, 12, channels_last)
    call = (hidden, torch.ones(K), GROUPS, torch.ones(12), torch.ones(12))
    if not backward:
        timestep_sum.timestep_sum_group_norm_silu_fwd(*call, 1e-5)
        return
    stats = torch.ones(2, K * B, GROUPS)
    timestep_sum.timestep_sum_group_norm_silu_bwd(maps(B, 12, channels_last), *call, stats)


def tokens_norm(backward: bool, channels_last: bool) -> None:
    x = maps(B, 12, channels_last)
    norm = (GROUPS, torch.ones(12), torch.ones(12))
    if not backward:
        group_norm_tokens.group_norm_tokens_fwd(x, *norm, 1e-5)
        return
    grad, stats = torch.ones(B, x[0, 0].numel(), 12), torch.ones(2, B, GROUPS)
    group_norm_tokens.group_norm_tokens_bwd(grad, x, *norm, stats)


def cross_attention(backward: bool, keys: int) -> None:
    """Heads of 40 features, held as 32 and a tail of 16; few keys of a half type stay on chip."""
    dtype = torch.float16 if keys < 128 else torch.float32
    query, key = torch.ones(K * B, 7, 80, dtype=dtype), torch.ones(B, keys, 80, dtype=dtype)
    call = (query, key, key.clone(), 2, 0.2, torch.ones(B, 1, keys))
    if not backward:
        attention.cross_timestep_attention_fwd(*call)
        return
    out, logsumexp = torch.ones_like(query), torch.ones(K * B, 2, 7)
    attention.cross_timestep_attention_bwd(out, *call, out, logsumexp, True)


def split(call: Callable[[], None]) -> None:
    """Several tiles a group even for these maps."""
    sizes = group_norm.WHOLE_TILE, group_norm.SPLIT_TILE
    group_norm.WHOLE_TILE, group_norm.SPLIT_TILE = 0, 64
    try:
        call()
    finally:
        group_norm.WHOLE_TILE, group_norm.SPLIT_TILE = sizes


def cases() -> dict[str, Callable[[], None]]:
    x, latents, noise, e = (
        torch.ones(5, 12),
        torch.ones(B, 4, 3, 5),
        torch.ones(K, B, 4, 3, 5),
        torch.ones(K),
    )
    tokens, rows = torch.ones(B, 5, 12), torch.ones(K * B, 12)
    projected = (
        torch.ones(K * B, 5, 12), tokens, torch.ones(24), torch.ones(24), 1e-5,
        torch.ones(8, 24), torch.ones(8),
    )  # fmt: skip
    found: dict[str, Callable[[], None]] = {
        "adaptive_layer_norm-fwd": lambda: adaptive_layer_norm.adaptive_layer_norm_fwd(
            tokens, rows, rows, 1e-5
        ),
        "adaptive_layer_norm-bwd": lambda: adaptive_layer_norm.adaptive_layer_norm_bwd(
            torch.ones(K * B, 5, 12), tokens, rows, rows, torch.ones(2, B, 5)
        ),
        "gated_residual-fwd": lambda: gated_residual.gated_residual_fwd(
            tokens, rows, torch.ones(K * B, 5, 12)
        ),
        "gated_residual-bwd": lambda: gated_residual.gated_residual_bwd(
            torch.ones(K * B, 5, 12), tokens, rows, torch.ones(K * B, 5, 12)
        ),
        "shared_skip_layer_norm_linear-fwd": lambda: long_skip.shared_skip_layer_norm_linear_fwd(
            *projected
        ),
        "shared_skip_layer_norm_linear-bwd": lambda: long_skip.shared_skip_layer_norm_linear_bwd(
            torch.ones(K * B, 5, 8), *projected
        ),
        "geglu-fwd": lambda: geglu.geglu_fwd(x),
        "geglu-bwd": lambda: geglu.geglu_bwd(x[:, :6].clone(), x),
        "one_pass_combine-fwd": lambda: one_pass_combine.one_pass_combine_fwd(
            latents, noise, 4.2, e
        ),
        "one_pass_combine-bwd": lambda: one_pass_combine.one_pass_combine_bwd(
            latents, noise, 4.2, e
        ),
        "noise_kl-fwd": lambda: noise_kl.noise_kl_fwd(noise),
        "noise_kl-bwd": lambda: noise_kl.noise_kl_bwd(torch.ones(K, B), noise, torch.ones(2, K, B)),
    }
    for direction, backward in (("fwd", False), ("bwd", True)):
        for keys, label in ((7, "few_keys"), (150, "many_keys")):
            found[f"cross_timestep_attention-{direction}-{label}"] = lambda b=backward, n=keys: (
                cross_attention(b, n)
            )
        for norm in (shared_skip_norm, broadcast_add_norm, timestep_sum_norm, tokens_norm):
            for layout, last in (("nchw", False), ("nhwc", True)):
                name = f"{norm.__name__}-{direction}-{layout}"
                call = lambda n=norm, b=backward, c=last: n(b, c)  # noqa: E731
                # Each layout with one of the two kinds of tiles.
                found[name] = call if last else lambda c=call: split(c)
        for timesteps in (1, K):
            found[f"shared_skip_norm-{direction}-straddling-{timesteps}"] = (
                lambda b=backward, k=timesteps: shared_skip_norm(b, False, 20, k)
            )
    return found


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """The kernels that are launched inside, as module.name."""
    found: list[str] = []
    plain = TritonTrace.run

    def run(self, *args, **options):
        found.append(f"{self.base_fn.__module__.rpartition('.')[2]}.{self.base_fn.__name__}")
        return plain(self, *args, **options)

    TritonTrace.run = run
    try:
        yield found
    finally:
        TritonTrace.run = plain


def verdict(call: Callable[[], None]) -> str | None:
    """None, or what the sanitizer says of a case."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            call()
    except SystemExit:
        return "out of bounds: " + re.sub(r"\x1b\[\d+m", "", said.getvalue())
    except Exception as error:  # what the sanitizer cannot follow; the test knows which
        return f"{type(error).__name__}: {error}"
    return "out of bounds: " + said.getvalue() if "DETECTED" in said.getvalue().upper() else None


def main(words: list[str]) -> None:
    # The sanitizer has no erf; no address depends on it.
    tl.erf = tl.abs
    for name, call in cases().items():
        if all(word in name for word in words):
            with noted() as kernels:
                error = verdict(call)
            print(json.dumps({"case": name, "error": error, "kernels": kernels}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
