"""Every forward operator as torch's own: the same numbers, and nothing of ours in a program."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.tiue_kernels.calls import CALLS, Call
from tiue_kernels import decompositions
from tiue_kernels.ops._library import OPERATORS


def test_no_forward_operator_is_left_out() -> None:
    forward = {operator.forward for operator in OPERATORS.values()}
    assert forward == set(decompositions.table())
    assert all(str(operator).startswith("tiue.") for operator in forward)


@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
def test_decomposed_equals_the_operator(name: str) -> None:
    call: Call = CALLS[name]
    tensors = tuple(call.tensors.values())
    traced = make_fx(call.run, decompositions.table())(*tensors)
    targets = [str(node.target) for node in traced.graph.nodes]
    assert not [target for target in targets if "tiue" in target or "_." in target]  # add_.Tensor
    for got, want in zip(traced(*tensors), call.run(*tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
