"""Attention of K*B query rows over B shared (or K*B own) rows of keys and values."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from tiue_kernels import cpu
from tiue_kernels.dispatch import ANYWHERE, Capability, Limit, block_memory
from tiue_kernels.ops._library import declare, statistics_dtype


def _head_sizes(most_in_99_kib: dict[int, int]) -> Limit:
    """The limit of the kernels for GPUs.

    Args:
        most_in_99_kib: bytes of an element to the largest head whose backward pass a block with
            that little memory holds; every forward pass fits.
    """

    def limit(
        direction: str, arguments: Mapping[str, Any], compute_capability: tuple[int, int]
    ) -> str | None:
        query = arguments["query"]
        size = query.shape[2] // arguments["num_heads"]
        if size % 8 or size > 256:
            return f"head size {size} is no multiple of 8 up to 256"
        has_little = compute_capability > (0, 0) and block_memory(compute_capability) <= 99 << 10
        if direction == "bwd" and has_little and size > most_in_99_kib[query.element_size()]:
            return (
                f"the backward pass of head size {size} needs more than the 99 KiB of shared "
                "memory that a block has on this device"
            )
        return None

    return limit


def _torch_is_faster(
    direction: str, arguments: Mapping[str, Any], compute_capability: tuple[int, int]
) -> str | None:
    """Where torch's flash attention reads the same tensors, nothing repeated and nothing copied."""
    query, key = arguments["query"], arguments["key"]
    own = key.shape[0] in (1, query.shape[0])  # one row: the timesteps join the query axis for free
    has_flash = torch.version.cuda is not None and compute_capability >= (8, 0)
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if has_flash and own and is_half and arguments["attention_bias"] is None:
        return "torch's own attention serves rows that share no keys, or all the same"
    return None


def _forward_without_bias(
    direction: str, arguments: Mapping[str, Any], compute_capability: tuple[int, int]
) -> str | None:
    """The limit of the CPU library."""
    if direction == "bwd":
        return "there is no backward pass"
    return None if arguments["attention_bias"] is None else "attention_bias is not supported"


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens, _ = query.shape
    logsumexp = query.new_empty(rows, num_heads, tokens, dtype=statistics_dtype(query.dtype))
    return query.new_empty(query.shape), logsumexp


def _decomposed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens, channels = query.shape
    shared = key.shape[0]
    # (K*B, N, C) -> (B, heads, K*N, head size): the timesteps join the query axis.
    query = query.reshape(-1, shared, tokens, num_heads, channels // num_heads)
    query = query.permute(1, 3, 0, 2, 4).flatten(2, 3)
    key, value = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (key, value))
    bias = None if attention_bias is None else attention_bias[:, None].to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    out = out.unflatten(2, (-1, tokens)).permute(2, 0, 3, 1, 4).reshape(rows, tokens, channels)

    # An exported program drops what nothing reads.
    scores = query @ key.mT * scale
    scores = scores if bias is None else scores + bias
    logsumexp = scores.to(statistics_dtype(scores.dtype)).logsumexp(-1)
    logsumexp = logsumexp.unflatten(2, (-1, tokens)).permute(2, 0, 1, 3)  # (K, B, heads, N)
    return out, logsumexp.reshape(rows, num_heads, tokens)


forward, backward = declare(
    "cross_timestep_attention",
    "(Tensor query, Tensor key, Tensor value, int num_heads, float scale, Tensor? attention_bias)"
    " -> (Tensor out, Tensor logsumexp)",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, int num_heads, float scale,"
    " Tensor? attention_bias, Tensor out, Tensor logsumexp, bool needs_bias_grad)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attention_bias)",
    fake=_fake,
    wanted=[("attention_bias",)],
    kernels={
        "cuda": Capability(limit=_head_sizes({2: 160, 4: 160}), yields=_torch_is_faster),
        # 100 KiB from head size 200 on.
        "triton": Capability(limit=_head_sizes({2: 192, 4: 256}), yields=_torch_is_faster),
        "cpu": Capability(
            dtypes=frozenset({torch.float32}),
            compute_capability=(0, 0),
            limit=_forward_without_bias,
            missing=cpu.why_no_products,
        ),
        "reference": ANYWHERE,
    },
    decomposition=_decomposed,
)
