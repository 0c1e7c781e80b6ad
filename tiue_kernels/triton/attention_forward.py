"""Forward kernels of cross_timestep_attention."""

import triton
import triton.language as tl

from tiue_kernels.triton.attention import (
    LN2,
    LOG2E,
    dot,
    dot_by_slices,
    finite,
    load_bias,
    load_rows,
    query_row,
    store_rows,
)
from tiue_kernels.triton.launch import bound


# One program: query blocks `first`, `first + n_programs`, ... of one head of one key row, whose
# keys and values fit into one block: they are loaded once and stay on chip for all K timesteps.
# Scores are in base 2 and float32; p is rounded to the dtype of value for the second product.
@triton.jit
def few_keys_forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, scale, n_programs,
    n_key_rows, n_heads, n_queries, n_tokens, n_keys,
    stride_qr, stride_qt, stride_kr, stride_kt, stride_vr, stride_vt, stride_or, stride_ot,
    HAS_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) // n_programs
    first = tl.program_id(0) % n_programs
    key_row, head = pair // n_heads, pair % n_heads
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < n_keys
    k_ptr += key_row.to(tl.int64) * stride_kr + head * HEAD_DIM
    v_ptr += key_row.to(tl.int64) * stride_vr + head * HEAD_DIM
    k = load_rows(k_ptr, offs_k * stride_kt, mask_k, 0, BLOCK_D, HEAD_DIM)
    v = load_rows(v_ptr, offs_k * stride_vt, mask_k, 0, BLOCK_D, HEAD_DIM)
    if TAIL_D > 0:
        k_tail = load_rows(k_ptr, offs_k * stride_kt, mask_k, BLOCK_D, TAIL_D, HEAD_DIM)
        v_tail = load_rows(v_ptr, offs_k * stride_vt, mask_k, BLOCK_D, TAIL_D, HEAD_DIM)
    bias = load_bias(bias_ptr, key_row, offs_k, n_keys, HAS_BIAS)
    q_ptr += head * HEAD_DIM
    out_ptr += head * HEAD_DIM

    for block in tl.range(bound(first), bound(tl.cdiv(n_queries, BLOCK_Q)), bound(n_programs)):
        offs_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < n_queries
        row, token = query_row(offs_q, key_row, n_key_rows, n_tokens)
        offs = row * stride_qr + token * stride_qt
        q = load_rows(q_ptr, offs, mask_q, 0, BLOCK_D, HEAD_DIM)
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
        if TAIL_D > 0:
            q_tail = load_rows(q_ptr, offs, mask_q, BLOCK_D, TAIL_D, HEAD_DIM)
            s = dot(q_tail, tl.trans(k_tail), s)
        s = s * (scale * LOG2E) + bias[None, :]
        m = tl.max(s, 1)
        if HAS_BIAS:
            m = finite(m)
        p = tl.exp2(s - m[:, None])
        total = tl.sum(p, 1)
        if HAS_BIAS:
            total = tl.where(total == 0.0, 1.0, total)
        p = p.to(v.dtype)
        offs = row * stride_or + token * stride_ot
        acc = dot(p, v, tl.zeros([BLOCK_Q, BLOCK_D], tl.float32))
        store_rows(out_ptr, offs, mask_q, acc / total[:, None], 0, BLOCK_D, HEAD_DIM)
        if TAIL_D > 0:
            tail = dot(p, v_tail, tl.zeros([BLOCK_Q, TAIL_D], tl.float32))
            store_rows(out_ptr, offs, mask_q, tail / total[:, None], BLOCK_D, TAIL_D, HEAD_DIM)
        lse = (m + tl.log2(total)) * LN2
        tl.store(lse_ptr + (row * n_heads + head) * n_tokens + token, lse, mask=mask_q)


# One program: one block of the K*N queries of one head of one key row, looping over its keys with
# the running maximum and sum of the softmax.
@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, scale, n_programs,
    n_key_rows, n_heads, n_queries, n_tokens, n_keys,
    stride_qr, stride_qt, stride_kr, stride_kt, stride_vr, stride_vt, stride_or, stride_ot,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) // n_programs
    block = tl.program_id(0) % n_programs
    key_row, head = pair // n_heads, pair % n_heads
    k_ptr += key_row.to(tl.int64) * stride_kr + head * HEAD_DIM
    v_ptr += key_row.to(tl.int64) * stride_vr + head * HEAD_DIM
    q_ptr += head * HEAD_DIM
    out_ptr += head * HEAD_DIM
    offs_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < n_queries
    row, token = query_row(offs_q, key_row, n_key_rows, n_tokens)
    offs = row * stride_qr + token * stride_qt
    q = load_rows(q_ptr, offs, mask_q, 0, BLOCK_D, HEAD_DIM)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if TAIL_D > 0:
        q_tail = load_rows(q_ptr, offs, mask_q, BLOCK_D, TAIL_D, HEAD_DIM)
        tail = tl.zeros([BLOCK_Q, TAIL_D], tl.float32)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    for start in tl.range(0, bound(n_keys), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < n_keys
        if k_ptr.dtype.element_ty == tl.float32:
            s = dot_by_slices(
                q_ptr, offs, mask_q, k_ptr, offs_k * stride_kt, mask_k, BLOCK_Q, BLOCK_K, HEAD_DIM
            )
        else:
            k = load_rows(k_ptr, offs_k * stride_kt, mask_k, 0, BLOCK_D, HEAD_DIM)
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32))
            if TAIL_D > 0:
                k_tail = load_rows(k_ptr, offs_k * stride_kt, mask_k, BLOCK_D, TAIL_D, HEAD_DIM)
                s = dot(q_tail, tl.trans(k_tail), s)
        s *= scale * LOG2E
        if HAS_BIAS or not EVEN_K:
            s += load_bias(bias_ptr, key_row, offs_k, n_keys, HAS_BIAS)[None, :]
        m_new = tl.maximum(m, tl.max(s, 1))
        m_used = m_new
        if HAS_BIAS:
            m_used = finite(m_new)
        p = tl.exp2(s - m_used[:, None])
        correction = tl.exp2(m - m_used)
        total = total * correction + tl.sum(p, 1)
        m = m_new
        v = load_rows(v_ptr, offs_k * stride_vt, mask_k, 0, BLOCK_D, HEAD_DIM)
        p = p.to(v.dtype)
        acc = dot(p, v, acc * correction[:, None])
        if TAIL_D > 0:
            v_tail = load_rows(v_ptr, offs_k * stride_vt, mask_k, BLOCK_D, TAIL_D, HEAD_DIM)
            tail = dot(p, v_tail, tail * correction[:, None])

    if HAS_BIAS:
        m = finite(m)
        total = tl.where(total == 0.0, 1.0, total)
    offs = row * stride_or + token * stride_ot
    store_rows(out_ptr, offs, mask_q, acc / total[:, None], 0, BLOCK_D, HEAD_DIM)
    if TAIL_D > 0:
        store_rows(out_ptr, offs, mask_q, tail / total[:, None], BLOCK_D, TAIL_D, HEAD_DIM)
    lse = (m + tl.log2(total)) * LN2
    tl.store(lse_ptr + (row * n_heads + head) * n_tokens + token, lse, mask=mask_q)
