"""Every backend against the reference, on inputs that nobody thought of."""

import pytest
import torch
from hypothesis import given

from tests.fuzz.operators import Call, calls, faults
from tiue_kernels import functional, use_backend


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's of infinities, in the interpreter
@given(calls("triton"))
def test_triton(call):
    assert faults(call, "triton") == []


@pytest.mark.usefixtures("host_library")
@given(calls("cuda"))
def test_cuda_on_the_host(call):
    assert faults(call, "cuda") == []


def shared_skip(skip: torch.Tensor, answer: float) -> Call:
    """A norm whose answer is moved on every backend but the reference."""
    hidden = torch.randn(1, 1, 4, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"hidden": hidden, "skip": skip}

    def run(hidden: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        moved = answer if hidden.dtype == torch.float32 and moves.pop() else 0.0
        ones = torch.ones(3)
        with use_backend("reference"):
            outs = functional.shared_skip_group_norm_silu(hidden, skip, 3, ones, 0 * ones)
        return outs[1] + moved

    moves = [False, True]  # the other backend is asked first
    return Call("moved", tensors, run, (torch.cat([hidden, skip], 1), 3, 1e-5))


def test_gradients_of_scores_may_keep_what_the_rounded_output_leaves_and_no_more():
    """Values around 5e11 in bfloat16: a query's sum of them is off by 1e9, and slopes cancel."""
    generator = torch.Generator().manual_seed(0)
    query, key, noise = (torch.randn(2, 9, 8, generator=generator) for _ in range(3))
    tensors = {"query": query, "key": key, "value": (noise + 30) * 2.0**34}
    tensors = {name: x.to(torch.bfloat16) for name, x in tensors.items()}

    def call(slope: float) -> Call:
        moves = [False, True]  # the other backend is asked first

        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            moved = slope if query.dtype == torch.bfloat16 and moves.pop() else 0.0
            with use_backend("reference"):
                return functional.cross_timestep_attention(query, key, value, 1) + moved * key

        return Call("moved", tensors, run, heads=1)

    assert faults(call(0.0), "reference") == []
    assert faults(call(1e9), "reference") == []
    assert faults(call(1e12), "reference") != []


def test_a_gradient_that_cancels_may_keep_the_rounding_of_its_terms():
    """Two values of a group: what leaves the norm is -1 and 1 whatever they are."""
    far = torch.tensor([2.5e11, 2.6e11]).view(1, 2, 1, 1)
    weight = torch.tensor([-0.7, -0.9])

    def call(moved: float) -> Call:
        moves = [False, True]  # the other backend is asked first

        def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            slope = moved if x.dtype == torch.float32 and moves.pop() else 0.0
            with use_backend("reference"):
                return functional.group_norm_tokens(x, 1, weight, weight) + slope * x[..., 0]

        return Call("moved", {"x": far, "weight": weight}, run, (far, 1, 1e-6))

    assert faults(call(2e-18), "reference") == []
    assert faults(call(1e-12), "reference") != []


def test_a_constant_may_lose_its_means_last_place_and_noise_may_not():
    """4.4 / sqrt(1e-5) is 1391: the last place of its mean, 2.4e-7, is seen as 3e-4."""
    noise = torch.randn(1, 2, 4, 3, generator=torch.Generator().manual_seed(1))
    constant = torch.full((1, 2, 4, 3), 4.4)
    assert faults(shared_skip(constant, 3e-4), "reference") == []
    assert faults(shared_skip(constant, 3e-2), "reference") != []
    assert faults(shared_skip(noise, 3e-4), "reference") != []
    assert faults(shared_skip(noise, 0.0), "reference") == []
