"""Attention of K*B query rows over B shared (or K*B own) rows of keys and values, in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from tiue_kernels import configs
from tiue_kernels.triton.attention_backward import grad_key_value_kernel, grad_query_kernel
from tiue_kernels.triton.attention_forward import few_keys_forward_kernel, forward_kernel
from tiue_kernels.triton.launch import on_device_of, power_of_two

OPERATOR = "cross_timestep_attention"
# Programs for each multiprocessor that a launch aims at where it can choose.
PROGRAMS = 4


class Blocks(NamedTuple):
    """How one kernel is launched."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def split_head(head_dim: int) -> tuple[int, int]:
    """A power of two and a tail (or 0) that hold a head: 80 = 64 + 16, where 128 would waste 48."""
    block = max(16, power_of_two(head_dim + 1) // 2)
    if block == head_dim:
        return block, 0
    tail = max(16, power_of_two(head_dim - block)) if head_dim > block else 0
    return (2 * block, 0) if tail == block else (block, tail)


def has_few_keys(keys: int, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the forward pass keeps all keys and values of a head on chip."""
    # 128 keys and values of 160 features are 80 kB of the 99 kB that sm_86 has.
    return keys <= 128 and head_dim <= 160 and dtype != torch.float32


def blocks(kernel: str, head_dim: int, keys: int, dtype: torch.dtype) -> Blocks:
    """The largest that spill nothing on sm_80, the tightest, at Stable Diffusion's head sizes."""
    wide = head_dim > 80
    if dtype == torch.float32:
        tailed = 64 < head_dim <= 80
        if kernel == "grad_key_value":
            return Blocks(64 if head_dim <= 40 else 16 if wide else 32, 32, 8, 1)
        if kernel == "grad_query":
            return Blocks(32, 32, 8, 1) if tailed else Blocks(32 if wide else 64, 16, 8, 1)
        return Blocks(64, 16 if tailed else 32, 8, 1)
    if kernel == "few_keys_forward":
        # 77 keys take 128, not 80: Triton's blocks are powers of two, and a tail of 16 behind 64
        # would split the softmax. The 51 are masked, so no byte is read for them.
        rows = max(16, power_of_two(keys))
        return Blocks(64, rows, 8, 1) if wide else Blocks(64, rows, 4, 2)
    if kernel == "forward":
        return Blocks(64, 32, 4, 2) if wide else Blocks(128, 64, 8, 2)
    if kernel == "grad_query":
        return Blocks(64, 32, 8, 2) if head_dim > 64 else Blocks(128, 64, 8, 2)
    return Blocks(16 if wide else 32, 64, 8, 2)


def cross_timestep_attention_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens, channels = query.shape
    out = torch.empty((rows, tokens, channels), dtype=query.dtype, device=query.device)
    logsumexp = torch.empty((rows, num_heads, tokens), dtype=torch.float32, device=query.device)
    if not query.numel():
        return out, logsumexp
    call = _Call(query, key, value, num_heads, attention_bias)
    name = "few_keys_forward" if has_few_keys(call.keys, query.dtype, call.head_dim) else "forward"
    block = call.blocks(name)
    n_blocks = triton.cdiv(call.queries, block.queries)
    programs = n_blocks
    meta = call.meta(block)
    kernel = forward_kernel
    if name == "few_keys_forward":
        kernel = few_keys_forward_kernel
        programs = min(n_blocks, triton.cdiv(call.programs, call.pairs))
    else:
        meta["EVEN_K"] = call.keys % block.keys == 0
    with on_device_of(query):
        kernel[(call.pairs * programs,)](
            *(call.query, call.key, call.value, call.bias, out, logsumexp),
            *(scale, programs, *call.sizes),
            *(*_strides(call.query, call.key, call.value, out),),
            **meta,
        )
    return out, logsumexp


def cross_timestep_attention_bwd(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    needs_bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not query.numel():
        grad_bias = query.new_empty(0)
        if attention_bias is not None and needs_bias_grad:
            grad_bias = torch.zeros_like(attention_bias)
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), grad_bias
    call = _Call(query, key, value, num_heads, attention_bias)
    grad_out, out, logsumexp = _rows(grad_out), _rows(out), logsumexp.contiguous()
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    delta = torch.empty(logsumexp.shape, dtype=torch.float32, device=query.device)
    operands = (call.query, call.key, call.value, call.bias)

    block = call.blocks("grad_query")
    programs = triton.cdiv(call.queries, block.queries)
    with on_device_of(query):
        grad_query_kernel[(call.pairs * programs,)](
            *(grad_out, *operands, out, logsumexp, delta, grad_query, scale, programs),
            *(*call.sizes, *_strides(grad_out, call.query, call.key, call.value, out)),
            **call.meta(block),
            EVEN_K=call.keys % block.keys == 0,
        )

    block = call.blocks("grad_key_value")
    programs = call.pairs * triton.cdiv(call.keys, block.keys)
    query_blocks = triton.cdiv(call.queries, block.queries)
    runs, blocks_per_run = query_runs(programs, query_blocks, call.programs)
    dtype = torch.float32 if runs > 1 else query.dtype
    grad_key = torch.empty((runs, *key.shape), dtype=dtype, device=query.device)
    grad_value = torch.empty((runs, *key.shape), dtype=dtype, device=query.device)
    needs_bias_grad = needs_bias_grad and call.has_bias
    shape = (runs, num_heads, key.shape[0], call.keys) if needs_bias_grad else (0,)
    grad_bias = torch.empty(shape, dtype=torch.float32, device=query.device)
    with on_device_of(query):
        grad_key_value_kernel[(programs * runs,)](
            *(grad_out, *operands, logsumexp, delta, grad_key, grad_value, grad_bias),
            *(scale, runs, blocks_per_run, *call.sizes),
            *_strides(grad_out, call.query, call.key, call.value),
            **call.meta(block),
            NEEDS_BIAS_GRAD=needs_bias_grad,
        )
    if runs > 1:
        grad_key, grad_value = (x.sum(0).to(query.dtype) for x in (grad_key, grad_value))
    if attention_bias is not None and needs_bias_grad:
        grad_bias = grad_bias.sum((0, 1))[:, None].to(attention_bias.dtype)
    else:
        grad_bias = query.new_empty(0)
    return grad_query, grad_key.view(key.shape), grad_value.view(key.shape), grad_bias


def query_runs(programs: int, query_blocks: int, wanted: int) -> tuple[int, int]:
    """How many runs the query blocks are cut into, and blocks a run; no run is empty.

    Args:
        programs: of one run.
        query_blocks: of all runs.
        wanted: programs that fill the device.
    """
    runs = min(query_blocks, triton.cdiv(wanted, programs))
    blocks_per_run = triton.cdiv(query_blocks, runs)
    return triton.cdiv(query_blocks, blocks_per_run), blocks_per_run


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_heads: int,
        bias: torch.Tensor | None,
    ) -> None:
        self.query, self.key, self.value = _rows(query), _rows(key), _rows(value)
        # Never read where there is no bias.
        self.bias = self.query if bias is None else bias.contiguous()
        self.has_bias = bias is not None
        rows, tokens, channels = query.shape
        key_rows, self.keys, _ = key.shape
        self.head_dim = channels // num_heads
        self.pairs = key_rows * num_heads
        self.queries = rows // key_rows * tokens
        self.sizes = (key_rows, num_heads, self.queries, tokens, self.keys)
        self.programs = PROGRAMS * configs.multiprocessors(query.device)

    def blocks(self, kernel: str) -> Blocks:
        """Those that were tuned for the device, or the heuristics'."""
        dtype = self.query.dtype
        own = blocks(kernel, self.head_dim, self.keys, dtype)
        bucket = (
            f"{kernel}-{str(dtype).removeprefix('torch.')}-head{self.head_dim}"
            f"-keys{power_of_two(self.keys)}-queries{power_of_two(self.queries)}"
        )
        heuristic = own._asdict()
        return Blocks(**configs.choose(OPERATOR, bucket, heuristic, self.query.device))

    def meta(self, block: Blocks) -> dict[str, int | bool]:
        block_d, tail_d = split_head(self.head_dim)
        return {
            "HAS_BIAS": self.has_bias,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": block_d,
            "TAIL_D": tail_d,
            "BLOCK_Q": block.queries,
            "BLOCK_K": block.keys,
            "num_warps": block.num_warps,
            "num_stages": block.num_stages,
        }


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any stride of rows and tokens, but dense channels."""
    return x if x.stride(2) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]
