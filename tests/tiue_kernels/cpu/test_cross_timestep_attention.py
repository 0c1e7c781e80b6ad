"""csrc/cpu/attention.cpp: the criterion, odd sizes, and what is left to the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from testing.criterion import noise, outputs_and_gradients, plain_attention
from testing.tolerances import ROUNDING_FLOORS, relative_error
from tiue_kernels import cpu, dispatch, functional, use_backend
from tiue_kernels.cpu.cross_timestep_attention import cross_timestep_attention_fwd


@pytest.fixture(autouse=True)
def products(with_cpu_library) -> None:
    if reason := cpu.why_no_products():
        pytest.skip(reason)


@dataclass(frozen=True)
class Case:
    timesteps: int
    batch: int
    queries: int
    keys: int
    heads: int = 1
    head_dim: int = 40
    own_keys: bool = False  # K*B rows of keys


CASES = {
    "1x1": Case(1, 1, 5, 7),
    "one_query_one_key": Case(2, 1, 1, 1),
    "4x2": Case(4, 2, 21, 7, heads=2),
    "3x0": Case(3, 0, 5, 7),
    "text": Case(3, 2, 100, 77, heads=2),
    "several_blocks": Case(2, 1, 205, 300, heads=2, own_keys=True),
    "exact_blocks": Case(1, 1, 96, 128),
    "head_of_4": Case(2, 1, 20, 30, heads=3, head_dim=4),
    "head_of_8": Case(2, 1, 20, 30, head_dim=8),
    "head_of_24": Case(1, 2, 20, 30, head_dim=24),
    "head_of_37": Case(1, 1, 20, 30, heads=2, head_dim=37),
    "head_of_64": Case(2, 1, 130, 100, head_dim=64),
    "head_of_80": Case(2, 1, 20, 140, head_dim=80, own_keys=True),
    "head_of_160": Case(2, 1, 20, 60, head_dim=160),
}


def make(case: Case, scale: float = 1.0) -> list[torch.Tensor]:
    rows = case.timesteps * case.batch
    shape = (rows if case.own_keys else case.batch, case.keys, case.heads * case.head_dim)
    query = noise(rows, case.queries, shape[2], dtype=torch.float32) * scale
    return [query, *(noise(*shape, dtype=torch.float32, seed=seed) for seed in (1, 2))]


def run(tensors: list[torch.Tensor], heads: int) -> tuple[torch.Tensor, ...]:
    scale = (tensors[0].shape[2] // heads) ** -0.5
    return cross_timestep_attention_fwd(*tensors, heads, scale, None)


def textbook(tensors: list[torch.Tensor], heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and logsumexp [K*B, heads, queries], by torch in the tensors' dtype."""
    scale = (tensors[0].shape[2] // heads) ** -0.5
    (out,) = plain_attention(*tensors, None, heads, scale)
    query, key = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in tensors[:2])
    key = key.repeat(len(query) // max(len(key), 1), 1, 1, 1)
    return out, (query @ key.mT * scale).logsumexp(-1)


@pytest.mark.parametrize("scale", [1.0, 30.0])  # of the queries: even weights, and almost one key
@pytest.mark.parametrize("name", CASES)
def test_output_and_logsumexp(name: str, scale: float, fences) -> None:
    case = CASES[name]
    tensors = make(case, scale)
    plain = textbook(tensors, case.heads)
    exact = textbook([tensor.double() for tensor in tensors], case.heads)
    for own, torchs, reference in zip(run(tensors, case.heads), plain, exact, strict=True):
        assert own.shape == reference.shape
        limit = 2 * relative_error(torchs, reference) + ROUNDING_FLOORS[torch.float32]
        assert relative_error(own, reference) <= limit


def test_slices_are_read_where_they_lie(fences) -> None:
    wide = noise(3, 50, 3 * 80, dtype=torch.float32)
    tensors = list(wide.chunk(3, dim=2))
    expected = run([tensor.contiguous() for tensor in tensors], 2)
    for actual, copied in zip(run(tensors, 2), expected, strict=True):
        torch.testing.assert_close(actual, copied, rtol=0, atol=0)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    for actual, copied in zip(run(turned, 2), expected, strict=True):
        torch.testing.assert_close(actual, copied, rtol=0, atol=0)


def test_nan_and_infinity_stay_where_torch_has_them() -> None:
    query, key, value = make(CASES["text"])
    key[0, 20, :40] = torch.nan
    value[1, 76, 40] = torch.inf
    out, _ = run([query, key, value], 2)
    expected, _ = textbook([query, key, value], 2)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert out.isnan().any()
    assert out.isinf().any()


def test_two_runs_give_the_same_bits() -> None:
    tensors = make(CASES["several_blocks"])
    for first, second in zip(run(tensors, 2), run(tensors, 2), strict=True):
        assert torch.equal(first, second)


def test_the_dispatcher_takes_it_and_backward_is_the_references() -> None:
    tensors = make(CASES["text"])
    assert dispatch.select("cross_timestep_attention", "fwd", (*tensors, 2, 0.1, None)) == "cpu"
    grad = (noise(*tensors[0].shape, dtype=torch.float32, seed=9),)

    def ours(*tensors):
        return (functional.cross_timestep_attention(*tensors, 2),)

    actual = outputs_and_gradients(ours, tensors, grad)
    with use_backend("reference"):
        expected = outputs_and_gradients(ours, tensors, grad)
    for own, torchs in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, torchs, rtol=1e-4, atol=1e-5)


def test_what_it_does_not_serve_goes_to_the_reference() -> None:
    query, key, value = make(CASES["text"])
    bias = torch.zeros(2, 1, 77)
    select = dispatch.select
    assert (
        select("cross_timestep_attention", "fwd", (query, key, value, 2, 0.1, bias)) == "reference"
    )
    doubled = [tensor.double() for tensor in (query, key, value)]
    assert select("cross_timestep_attention", "fwd", (*doubled, 2, 0.1, None)) == "reference"
    assert select("geglu", "fwd", (query,)) == "reference"
