"""The fences stand where kernels allocate, and notice what they are there for."""

from pathlib import Path

import pytest
import torch

from tests.tiue_kernels.fences import Fences


def attention() -> torch.Tensor:
    """An output that csrc allocates."""
    query = torch.ones(2, 3, 8)
    return torch.ops.tiue_cuda.cross_timestep_attention_fwd(query, query, query, 1, 1.0, None)[0]


@pytest.mark.timeout(900)  # the first test of a session that needs csrc compiles it
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
