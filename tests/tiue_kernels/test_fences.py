"""The fences stand where kernels allocate, and notice what they are there for."""

from pathlib import Path

import pytest
import torch

from tests.tiue_kernels.fences import Fences, fenced


def attention() -> torch.Tensor:
    """An output that csrc allocates."""
    query = torch.ones(2, 3, 8)
    return torch.ops.tiue_cuda.cross_timestep_attention_fwd(query, query, query, 1, 1.0, None)[0]


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2, 3, 8), attention])
@pytest.mark.parametrize("beside", [-1, 48])
def test_a_store_beside_a_tensor_is_noticed(allocate, beside: int, host_library: Path) -> None:
    with Fences() as mode:
        out = allocate()
    mode.check()
    assert out.isnan().all() == (allocate is not attention)
    out.as_strided((1,), (1,), out.storage_offset() + beside).fill_(0.0)
    with pytest.raises(AssertionError):
        mode.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_beside_an_input_is_no_number(dtype: torch.dtype) -> None:
    wide = torch.ones(2, 3, 8, dtype=dtype)
    for given in (wide, wide[:, :, 1:6], wide.flatten()[1:], wide[..., ::2], wide[:0]):
        (copy,) = fenced([given])
        assert torch.equal(copy, given)
        assert (copy.stride(), copy.data_ptr() % 16) == (given.stride(), given.data_ptr() % 16)
        if given.numel():
            around = copy.as_strided((3,), (1,), copy.storage_offset() - 1)
            assert around[0].isnan()
        if given is not wide:
            storage = torch.empty(0, dtype=dtype).set_(copy.untyped_storage())
            assert storage.isnan().sum() == storage.numel() - given.numel()
