"""Attention of K*B query rows over B shared (or K*B own) rows of keys and values."""

from typing import Any

import torch

# torch's own kernels return the logsumexp too. That of the CPU takes every dtype.
_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_forward = torch.ops.aten._scaled_dot_product_flash_attention
_cuda_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward

# Scores that the explicit form holds at once: 16 MB in float32.
MOST_SCORES = 2**22


def cross_timestep_attention_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not query.numel():
        rows, tokens, _ = query.shape
        shape = (rows, num_heads, tokens)
        return torch.empty_like(query), query.new_empty(shape, dtype=_accumulator(query))
    copies = _copies(query, key)
    key, value, bias = (_repeat(x, copies) for x in (key, value, _bias(query, attention_bias)))
    queries, key, value = (_split(x, num_heads) for x in (_fold(query, key.shape[0]), key, value))
    if query.device.type == "cpu":
        out, logsumexp = _cpu_forward(queries, key, value, attn_mask=bias, scale=scale)
    elif _has_flash(queries, bias):
        out, logsumexp = _cuda_forward(queries, key, value, scale=scale)[:2]
    else:
        out, logsumexp = _explicit_fwd(queries, key, value, scale, bias)
    return _unfold(_join(out), query.shape), _unfold_logsumexp(logsumexp, query.shape)


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
    grad_bias = query.new_empty(0)
    if not query.numel():
        if attention_bias is not None and needs_bias_grad:
            grad_bias = torch.zeros_like(attention_bias)
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), grad_bias
    copies = _copies(query, key)
    key, value, bias = (_repeat(x, copies) for x in (key, value, _bias(query, attention_bias)))
    batch = key.shape[0]
    folded = [_fold(x, batch) for x in (grad_out, query, out)]
    grad_out, queries, out, key, value = (_split(x, num_heads) for x in (*folded, key, value))
    logsumexp = _fold_logsumexp(logsumexp, batch)
    tensors = (grad_out, queries, key, value, out, logsumexp)
    if attention_bias is not None and needs_bias_grad:  # torch's kernels give it no gradient
        *grads, grad_bias = _explicit_bwd(*tensors, scale, bias)
        grad_bias = _sum_copies(grad_bias, copies).to(attention_bias.dtype)
    elif query.device.type == "cpu":
        grads = _cpu_backward(*tensors, 0.0, False, attn_mask=bias, scale=scale)
    elif _has_flash(queries, bias, backward=True):
        lengths = (None, None, queries.shape[2], key.shape[2])
        seed = torch.empty(0, dtype=torch.int64, device=query.device)  # of a dropout of 0
        grads = _cuda_backward(*tensors, *lengths, 0.0, False, seed, seed, scale=scale)
    else:
        *grads, _ = _explicit_bwd(*tensors, scale, bias)
    grad_query, grad_key, grad_value = (_join(x) for x in grads)
    grad_key, grad_value = (_sum_copies(x, copies) for x in (grad_key, grad_value))
    return _unfold(grad_query, query.shape), grad_key, grad_value, grad_bias


def _explicit_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, wide = query.dtype, _accumulator(query)
    key, value = key.to(wide), value.to(wide)
    outs, logsumexps = [], []
    for chunk in query.split(_chunk(query, key), 2):
        scores = _scores(chunk.to(wide), key, scale, bias)
        logsumexp = scores.logsumexp(-1)
        # A query whose keys are all masked: weights of 0, in the backward pass too.
        logsumexp = logsumexp.masked_fill_(logsumexp == -torch.inf, 0.0)
        outs.append((scores.sub_(logsumexp[..., None]).exp_() @ value).to(dtype))
        logsumexps.append(logsumexp)
    return torch.cat(outs, 2), torch.cat(logsumexps, 2)


def _explicit_bwd(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, wide = query.dtype, _accumulator(query)
    key, value = key.to(wide), value.to(wide)
    grad_queries = []
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    grad_bias = key.new_zeros(key.shape[0], 1, key.shape[2])
    size = _chunk(query, key)
    chunks = (x.split(size, 2) for x in (grad_out, query, out, logsumexp))
    for grad, q, o, lse in zip(*chunks, strict=True):
        grad, q, o = grad.to(wide), q.to(wide), o.to(wide)
        p = _scores(q, key, scale, bias).sub_(lse[..., None]).exp_()  # (B, heads, chunk, M)
        grad_value += p.mT @ grad
        delta = (grad * o).sum(-1, keepdim=True)
        grad_scores = (grad @ value.mT).sub_(delta).mul_(p)
        grad_bias[:, 0] += grad_scores.sum((1, 2))
        grad_queries.append((grad_scores @ key).mul_(scale).to(dtype))
        grad_key += grad_scores.mT @ q
    grad_query = torch.cat(grad_queries, 2)
    return grad_query, grad_key.mul_(scale).to(dtype), grad_value.to(dtype), grad_bias


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> torch.Tensor:
    scores = (query @ key.mT).mul_(scale)
    return scores if bias is None else scores.add_(bias)


def _chunk(query: torch.Tensor, key: torch.Tensor) -> int:
    batch, heads, keys, _ = key.shape
    return max(1, MOST_SCORES // (batch * heads * keys))


def _bias(query: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """(B, 1, 1, M); the CPU kernel misreads a float32 bias beside float64 queries."""
    return None if bias is None else bias[:, None].to(_accumulator(query))


def _has_flash(queries: torch.Tensor, bias: torch.Tensor | None, backward: bool = False) -> bool:
    """Whether torch's flash attention takes queries (B, heads, tokens, head size): it pads none."""
    half = queries.dtype in (torch.float16, torch.bfloat16)
    if not (queries.is_cuda and bias is None and half and torch.version.cuda is not None):
        return False
    size, capability = queries.shape[3], torch.cuda.get_device_capability(queries.device)
    # Cards with 99 KiB of shared memory a block (8.6, 8.9, 12.0) have no gradient of these.
    lacks = backward and 192 < size <= 224 and capability not in ((8, 0), (9, 0), (10, 0))
    return capability >= (8, 0) and size % 8 == 0 and size <= 256 and not lacks


def _copies(query: torch.Tensor, key: torch.Tensor) -> int:
    """How often to repeat the keys, so that their rows are those of the queries.

    For B > 1 the other way is a copy of every query that gathers the timesteps: 1.2 x the time of
    torch's attention at 4 x 2 rows of 1024 queries over 77 keys on a CPU. The fewer are copied;
    at 4 x 2 rows of 64 queries the copy is nothing and the longer query axis is faster.
    """
    if key.shape[0] == 1 or query.shape[1] < max(256, key.shape[1]):
        return 1
    return query.shape[0] // key.shape[0]


def _repeat(x: Any, copies: int) -> Any:
    return x if x is None or copies == 1 else x.repeat(copies, *[1] * (x.ndim - 1))


def _sum_copies(grad: torch.Tensor, copies: int) -> torch.Tensor:
    if copies == 1:
        return grad
    return grad.unflatten(0, (copies, -1)).sum(0, dtype=_accumulator(grad)).to(grad.dtype)


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fold(x: torch.Tensor, batch: int) -> torch.Tensor:
    """(K*B, N, C) -> (B, K*N, C): one row of keys serves all timesteps. A view for B = 1."""
    if len(x) == batch:
        return x
    return x.unflatten(0, (-1, batch)).transpose(0, 1).flatten(1, 2)


def _unfold(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(B, K*N, C) -> (K*B, N, C)."""
    if x.shape == shape:
        return x
    return x.unflatten(1, (-1, shape[1])).transpose(0, 1).reshape(shape)


def _fold_logsumexp(x: torch.Tensor, batch: int) -> torch.Tensor:
    """(K*B, heads, N) -> (B, heads, K*N)."""
    if len(x) == batch:
        return x
    return x.unflatten(0, (-1, batch)).permute(1, 2, 0, 3).flatten(2)


def _unfold_logsumexp(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(B, heads, K*N) -> (K*B, heads, N)."""
    if len(x) == shape[0]:
        return x.contiguous()
    x = x.unflatten(2, (-1, shape[1])).permute(2, 0, 1, 3)
    return x.reshape(shape[0], -1, shape[1]).contiguous()


def _split(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, tokens, C) -> (B, heads, tokens, head size), where torch's kernels read it in place."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _join(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)
