"""What only a GPU takes, in forms that a CPU computes too: as the plain forms, to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tiue_kernels.calls import noise
from tests.tiue_kernels.test_kernels_on_gpu import cases
from tiue_kernels import dispatch
from tiue_kernels.functional.convolutions import product_of_pixels
from tiue_kernels.ops.upsample_conv2d import phases_at_once


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(4, 4), (1, 1), (3, 7)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_phases_as_one_convolution(size, layout, has_bias: bool) -> None:
    x, weight = (t.to(memory_format=layout) for t in (noise(3, 5, *size), noise(6, 5, 3, 3)))
    bias = noise(6) if has_bias else None
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    found = phases_at_once(x, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if min(size) > 1:
        assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("part", [slice(None), slice(2, 7)])
def test_a_convolution_of_pixels_as_a_product(part: slice) -> None:
    weight, bias = noise(6, 8, 1, 1)[:, part], noise(6)
    x = noise(3, weight.shape[1], 4, 5).to(memory_format=torch.channels_last)
    found = product_of_pixels(x, weight, bias)
    torch.testing.assert_close(found, F.conv2d(x, weight, bias), rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_which_attention_is_left_to_torch(monkeypatch) -> None:
    """On a card of compute capability 9.0: own keys and one row of text, in half types."""
    key = dispatch._Key("cuda", torch.float16, "contiguous", (9, 0), False)
    monkeypatch.setattr(dispatch, "_key", lambda args: key)
    monkeypatch.setattr(dispatch, "_missing", lambda *_: [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    dispatch.reset()

    def chosen(query_rows: int, key_rows: int, bias: bool = False) -> str:
        query, keys = (torch.empty(n, 9, 64, dtype=torch.float16) for n in (query_rows, key_rows))
        args = (query, keys, keys, 1, 0.1, torch.empty(key_rows, 1, 9) if bias else None)
        return dispatch.select("cross_timestep_attention", "fwd", args)

    assert chosen(8, 8) == chosen(4, 1) == "reference"
    assert chosen(8, 2) == chosen(8, 8, bias=True) == "cuda"
    with dispatch.use_backend("triton"):
        assert chosen(8, 8) == "triton"
    assert dispatch.select("shared_skip_group_norm_silu", "fwd", (torch.empty(1),)) == "triton"
    dispatch.reset()


def test_what_is_left_to_torch_is_tested_on_a_gpu_too() -> None:
    """`make gpu` gives speedups where tests are green: none had run what self-attention takes."""
    chosen = {case.id.split("-")[1] for case in cases(512) if "attention" in case.id}
    assert chosen == {"cuda", "triton", "automatic"}
    assert {case.id.split("-")[1] for case in cases(512) if case.id.startswith("geglu-")} == {
        "triton"
    }
