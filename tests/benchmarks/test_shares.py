"""Where the time of a call goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure.shares import KINDS, time_shares
from tiue_kernels import functional

X, KERNEL = torch.randn(4, 64, 32, 32), torch.randn(64, 64, 3, 3)
SMALL, WIDE = torch.randn(1, 256, 4, 4), torch.randn(256, 256, 3, 3)
MATRIX, ROWS = torch.randn(768, 768), torch.randn(1, 8, 1024, 64)
SCALE, SHIFT = torch.ones(256), torch.zeros(256)

CALLS: dict[str, tuple[str, Callable[[], object]]] = {
    "direct": ("convolution", lambda: F.conv2d(X, KERNEL, padding=1)),
    # 16 pixels are convolved as a matrix product.
    "small": (
        "convolution",
        lambda: functional.group_norm_silu_conv2d(SMALL, 32, SCALE, SHIFT, WIDE, padding=1),
    ),
    "linear": ("linear", lambda: F.linear(MATRIX, MATRIX)),
    "attention": ("attention", lambda: F.scaled_dot_product_attention(ROWS, ROWS, ROWS)),
    "elementwise": ("rest", lambda: F.silu(X)),
}


@pytest.mark.parametrize("name", CALLS)
def test_time_is_that_of_what_was_called(name: str) -> None:
    kind, call = CALLS[name]
    with torch.no_grad():
        call()
        shares = time_shares(call)
    assert tuple(shares) == KINDS
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    # 0.44 seen for the small convolution, whose windows are copied.
    assert shares[kind] > 0.2, shares
    assert all(shares[other] < 0.1 for other in KINDS if other not in (kind, "rest"))
