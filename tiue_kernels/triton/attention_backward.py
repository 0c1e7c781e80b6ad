"""Backward kernels of cross_timestep_attention."""

import triton
import triton.language as tl

from tiue_kernels.triton.attention import (
    LOG2E,
    dot,
    dot_by_slices,
    load_bias,
    load_rows,
    query_row,
    store_rows,
)
from tiue_kernels.triton.launch import bound


# One program: the gradient of one block of queries, looping over the keys; p is recomputed from
# the logsumexp. Leaves delta = sum(grad_out * out) of each query for the next kernel.
@triton.jit
def grad_query_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, delta_ptr, grad_q_ptr, scale,
    n_programs, n_key_rows, n_heads, n_queries, n_tokens, n_keys, stride_gr, stride_gt, stride_qr,
    stride_qt, stride_kr, stride_kt, stride_vr, stride_vt, stride_or, stride_ot,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    pair = tl.program_id(0) // n_programs
    block = tl.program_id(0) % n_programs
    key_row, head = pair // n_heads, pair % n_heads
    k_ptr += key_row.to(tl.int64) * stride_kr + head * HEAD_DIM
    v_ptr += key_row.to(tl.int64) * stride_vr + head * HEAD_DIM
    offs_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < n_queries
    row, token = query_row(offs_q, key_row, n_key_rows, n_tokens)
    offs = row * stride_qr + token * stride_qt + head * HEAD_DIM
    offs_g = row * stride_gr + token * stride_gt + head * HEAD_DIM
    offs_o = row * stride_or + token * stride_ot + head * HEAD_DIM
    q = load_rows(q_ptr, offs, mask_q, 0, BLOCK_D, HEAD_DIM)
    grad = load_rows(grad_ptr, offs_g, mask_q, 0, BLOCK_D, HEAD_DIM)
    out = load_rows(out_ptr, offs_o, mask_q, 0, BLOCK_D, HEAD_DIM)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if TAIL_D > 0:
        q_tail = load_rows(q_ptr, offs, mask_q, BLOCK_D, TAIL_D, HEAD_DIM)
        grad_tail = load_rows(grad_ptr, offs_g, mask_q, BLOCK_D, TAIL_D, HEAD_DIM)
        out_tail = load_rows(out_ptr, offs_o, mask_q, BLOCK_D, TAIL_D, HEAD_DIM)
        delta += tl.sum(grad_tail.to(tl.float32) * out_tail.to(tl.float32), 1)
        tail = tl.zeros([BLOCK_Q, TAIL_D], tl.float32)
    offs_lse = (row * n_heads + head) * n_tokens + token
    tl.store(delta_ptr + offs_lse, delta, mask=mask_q)
    # Queries past the last one get p = 0, whatever the bias.
    lse = tl.load(lse_ptr + offs_lse, mask=mask_q, other=float("inf")) * LOG2E

    for start in tl.range(0, bound(n_keys), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < n_keys
        if k_ptr.dtype.element_ty == tl.float32:
            s = dot_by_slices(
                q_ptr, offs, mask_q, k_ptr, offs_k * stride_kt, mask_k, BLOCK_Q, BLOCK_K, HEAD_DIM
            )
            grad_p = dot_by_slices(
                grad_ptr, offs_g, mask_q, v_ptr, offs_k * stride_vt, mask_k,
                BLOCK_Q, BLOCK_K, HEAD_DIM,
            )  # fmt: skip
        k = load_rows(k_ptr, offs_k * stride_kt, mask_k, 0, BLOCK_D, HEAD_DIM)
        if TAIL_D > 0:
            k_tail = load_rows(k_ptr, offs_k * stride_kt, mask_k, BLOCK_D, TAIL_D, HEAD_DIM)
        if k_ptr.dtype.element_ty != tl.float32:
            v = load_rows(v_ptr, offs_k * stride_vt, mask_k, 0, BLOCK_D, HEAD_DIM)
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
            grad_p = dot(grad, tl.trans(v), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
            if TAIL_D > 0:
                v_tail = load_rows(v_ptr, offs_k * stride_vt, mask_k, BLOCK_D, TAIL_D, HEAD_DIM)
                s = dot(q_tail, tl.trans(k_tail), s)
                grad_p = dot(grad_tail, tl.trans(v_tail), grad_p)
        s *= scale * LOG2E
        if HAS_BIAS or not EVEN_K:
            s += load_bias(bias_ptr, key_row, offs_k, n_keys, HAS_BIAS)[None, :]
        grad_s = tl.exp2(s - lse[:, None]) * (grad_p - delta[:, None])
        grad_s = grad_s.to(k.dtype)
        acc = dot(grad_s, k, acc)
        if TAIL_D > 0:
            tail = dot(grad_s, k_tail, tail)

    offs = row * n_tokens * n_heads * HEAD_DIM + token * n_heads * HEAD_DIM + head * HEAD_DIM
    store_rows(grad_q_ptr, offs, mask_q, acc * scale, 0, BLOCK_D, HEAD_DIM)
    if TAIL_D > 0:
        store_rows(grad_q_ptr, offs, mask_q, tail * scale, BLOCK_D, TAIL_D, HEAD_DIM)


# One program: the gradients of one block of keys of one head, summed over a run of blocks of the
# K*N queries that read them. With several runs (few keys make few programs) each leaves a float32
# partial [runs, key rows, keys, channels], which the launcher sums.
@triton.jit
def grad_key_value_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    grad_bias_ptr, scale, n_runs, blocks_per_run, n_key_rows, n_heads, n_queries, n_tokens, n_keys,
    stride_gr, stride_gt, stride_qr, stride_qt, stride_kr, stride_kt, stride_vr, stride_vt,
    HAS_BIAS: tl.constexpr, NEEDS_BIAS_GRAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TAIL_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0)
    run = pid % n_runs
    n_key_blocks = tl.cdiv(n_keys, BLOCK_K)
    key_block = pid // n_runs % n_key_blocks
    pair = pid // n_runs // n_key_blocks
    key_row, head = pair // n_heads, pair % n_heads
    offs_k = key_block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < n_keys
    k_ptr += key_row.to(tl.int64) * stride_kr + head * HEAD_DIM
    v_ptr += key_row.to(tl.int64) * stride_vr + head * HEAD_DIM
    k = load_rows(k_ptr, offs_k * stride_kt, mask_k, 0, BLOCK_D, HEAD_DIM)
    v = load_rows(v_ptr, offs_k * stride_vt, mask_k, 0, BLOCK_D, HEAD_DIM)
    acc_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if TAIL_D > 0:
        k_tail = load_rows(k_ptr, offs_k * stride_kt, mask_k, BLOCK_D, TAIL_D, HEAD_DIM)
        v_tail = load_rows(v_ptr, offs_k * stride_vt, mask_k, BLOCK_D, TAIL_D, HEAD_DIM)
        tail_k = tl.zeros([BLOCK_K, TAIL_D], tl.float32)
        tail_v = tl.zeros([BLOCK_K, TAIL_D], tl.float32)
    if HAS_BIAS:
        bias = load_bias(bias_ptr, key_row, offs_k, n_keys, HAS_BIAS)
    if NEEDS_BIAS_GRAD:
        acc_bias = tl.zeros([BLOCK_K], tl.float32)
    q_ptr += head * HEAD_DIM
    grad_ptr += head * HEAD_DIM

    first = run * blocks_per_run
    last = tl.minimum(first + blocks_per_run, tl.cdiv(n_queries, BLOCK_Q))
    for block in tl.range(bound(first), bound(last)):
        offs_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < n_queries
        row, token = query_row(offs_q, key_row, n_key_rows, n_tokens)
        offs = row * stride_qr + token * stride_qt
        offs_g = row * stride_gr + token * stride_gt
        offs_lse = (row * n_heads + head) * n_tokens + token
        # Queries past the last one get p = 0, whatever the bias; keys past the last one keep
        # their finite p to themselves.
        lse = tl.load(lse_ptr + offs_lse, mask=mask_q, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + offs_lse, mask=mask_q, other=0.0)
        if k_ptr.dtype.element_ty == tl.float32:
            s = dot_by_slices(
                k_ptr, offs_k * stride_kt, mask_k, q_ptr, offs, mask_q, BLOCK_K, BLOCK_Q, HEAD_DIM
            )
            grad_p = dot_by_slices(
                v_ptr, offs_k * stride_vt, mask_k, grad_ptr, offs_g, mask_q,
                BLOCK_K, BLOCK_Q, HEAD_DIM,
            )  # fmt: skip
        q = load_rows(q_ptr, offs, mask_q, 0, BLOCK_D, HEAD_DIM)
        grad = load_rows(grad_ptr, offs_g, mask_q, 0, BLOCK_D, HEAD_DIM)
        if TAIL_D > 0:
            q_tail = load_rows(q_ptr, offs, mask_q, BLOCK_D, TAIL_D, HEAD_DIM)
            grad_tail = load_rows(grad_ptr, offs_g, mask_q, BLOCK_D, TAIL_D, HEAD_DIM)
        if k_ptr.dtype.element_ty != tl.float32:
            s = dot(k, tl.trans(q), tl.zeros([BLOCK_K, BLOCK_Q], tl.float32))
            grad_p = dot(v, tl.trans(grad), tl.zeros([BLOCK_K, BLOCK_Q], tl.float32))
            if TAIL_D > 0:
                s = dot(k_tail, tl.trans(q_tail), s)
                grad_p = dot(v_tail, tl.trans(grad_tail), grad_p)
        s *= scale * LOG2E
        if HAS_BIAS:
            s += bias[:, None]
        p = tl.exp2(s - lse[None, :])
        grad_s = p * (grad_p - delta[None, :])
        if NEEDS_BIAS_GRAD:
            acc_bias += tl.sum(grad_s, 1)
        p = p.to(grad.dtype)
        grad_s = grad_s.to(q.dtype)
        acc_v = dot(p, grad, acc_v)
        acc_k = dot(grad_s, q, acc_k)
        if TAIL_D > 0:
            tail_v = dot(p, grad_tail, tail_v)
            tail_k = dot(grad_s, q_tail, tail_k)

    row = (run * n_key_rows + key_row).to(tl.int64)
    offs = (row * n_keys + offs_k) * (n_heads * HEAD_DIM) + head * HEAD_DIM
    store_rows(grad_k_ptr, offs, mask_k, acc_k * scale, 0, BLOCK_D, HEAD_DIM)
    store_rows(grad_v_ptr, offs, mask_k, acc_v, 0, BLOCK_D, HEAD_DIM)
    if TAIL_D > 0:
        store_rows(grad_k_ptr, offs, mask_k, tail_k * scale, BLOCK_D, TAIL_D, HEAD_DIM)
        store_rows(grad_v_ptr, offs, mask_k, tail_v, BLOCK_D, TAIL_D, HEAD_DIM)
    if NEEDS_BIAS_GRAD:  # (runs, heads, key rows, keys)
        row = ((run * n_heads + head) * n_key_rows + key_row).to(tl.int64)
        tl.store(grad_bias_ptr + row * n_keys + offs_k, acc_bias, mask=mask_k)
