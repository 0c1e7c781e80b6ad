"""What the attention kernels share.

The queries of all K timesteps that read one row of keys are one axis of K*N queries: query i of
key row r is token i % N of row (i // N) * key rows + r. Nothing is copied to make it so. A head is
held as a power of two of features and a tail (80 = 64 + 16), or without a tail (64).
"""

import triton
import triton.language as tl

from tiue_kernels.triton.launch import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    ptr, offs, mask, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """[rows, SIZE], features START.. of the rows at offs; 0 where there are none."""
    offs_d = START + tl.arange(0, SIZE)
    mask = mask[:, None]
    if START + SIZE > HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptr + offs[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr, offs, mask, x, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    offs_d = START + tl.arange(0, SIZE)
    mask = mask[:, None]
    if START + SIZE > HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptr + offs[:, None] + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc):
    if INTERPRETED:  # its dot multiplies the bits of bfloat16 as integers (triton 3.6)
        a, b = a.to(tl.float32), b.to(tl.float32)
    # TF32 would lose 13 of the 24 bits of float32.
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_by_slices(
    a_ptr, a_offs, a_mask, b_ptr, b_offs, b_mask,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """a @ b.T of rows in memory, 32 features at a time: float32, whose dot has no tensor cores.

    With both rows whole in registers, the gradient of 160 features spilled 4.9 kB on sm_80.
    """
    acc = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    for start in tl.range(0, HEAD_DIM, 32, num_stages=1):
        offs_d = start + tl.arange(0, 32)
        mask_d = (offs_d < HEAD_DIM)[None, :]
        a = tl.load(a_ptr + a_offs[:, None] + offs_d[None, :], a_mask[:, None] & mask_d, 0.0)
        b = tl.load(b_ptr + b_offs[:, None] + offs_d[None, :], b_mask[:, None] & mask_d, 0.0)
        acc = dot(a, tl.trans(b), acc)
    return acc


@triton.jit
def finite(m):
    """The largest score, 0 for a query whose keys are all masked so far: -inf less 0 is -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def query_row(offs_q, key_row, n_key_rows, n_tokens):
    """The row and the token of queries by their place on the axis of K*N."""
    timestep = offs_q // n_tokens
    row = (timestep * n_key_rows + key_row).to(tl.int64)
    return row, offs_q - timestep * n_tokens


@triton.jit
def load_bias(bias_ptr, key_row, offs_k, n_keys, HAS_BIAS: tl.constexpr):
    """The bias in base 2; -inf past the last key."""
    mask = offs_k < n_keys
    if HAS_BIAS:
        offs = key_row.to(tl.int64) * n_keys + offs_k
        return tl.load(bias_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32) * LOG2E
    return tl.where(mask, 0.0, float("-inf"))
