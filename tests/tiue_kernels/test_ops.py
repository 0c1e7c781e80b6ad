"""Every public operator on every backend that runs here: accuracy, registration, compilation."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from testing.tolerances import ROUNDING_FLOORS
from tests.tiue_kernels.calls import CALLS, B, K, Tensors, noise
from tiue_kernels import dispatch, functional, use_backend
from tiue_kernels.ops._library import OPERATORS
from tiue_kernels.reference import cross_timestep_attention as reference_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("reference", "triton")
# opcheck: what a dtype changes, and what it is enough to check in one.
OF_EVERY_DTYPE = ("test_schema", "test_faketensor")
OF_ONE_DTYPE = ("test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def outputs_and_gradients(function, tensors: Tensors) -> Tensors:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*inputs)
    grads = [noise(*output.shape, seed=9).to(output.dtype) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, inputs, grads))


def supports(name: str, backend: str) -> bool:
    return all(backend in dispatch.TABLE[operator] for operator in CALLS[name].operators)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_error_is_at_most_twice_that_of_torch(name: str, dtype: torch.dtype, backend: str) -> None:
    call = CALLS[name]
    if not supports(name, backend):
        pytest.skip(f"no {backend} kernel")
    rounded = [tensor.to(dtype) for tensor in call.tensors.values()]
    with use_backend(backend):
        results = outputs_and_gradients(call.run, rounded)
    plain = outputs_and_gradients(call.textbook, rounded)
    exact = outputs_and_gradients(call.textbook, [tensor.double() for tensor in rounded])

    outputs = len(results) - len(rounded)
    names = [f"output {i}" for i in range(outputs)] + [f"gradient of {n}" for n in call.tensors]
    for label, value, naive, reference in zip(names, results, plain, exact, strict=True):
        assert value.shape == reference.shape, label
        assert value.dtype == naive.dtype, label
        floor = ROUNDING_FLOORS[dtype] * reference.abs().max().item()
        error = (value.double() - reference).abs().max().item()
        allowed = 2 * (naive.double() - reference).abs().max().item() + floor
        assert error <= allowed, f"{label}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", CALLS)
def test_float64_is_exact(name: str) -> None:
    call = CALLS[name]
    tensors = list(call.tensors.values())
    results = outputs_and_gradients(call.run, tensors)
    for value, reference in zip(
        results, outputs_and_gradients(call.textbook, tensors), strict=True
    ):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph_and_once(name: str) -> None:
    call = CALLS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call.run, fullgraph=True, backend=counter)
    tensors = [tensor.float() for tensor in call.tensors.values()]
    first = outputs_and_gradients(compiled, tensors)
    again = outputs_and_gradients(compiled, [tensor + 1 for tensor in tensors])
    assert counter.frame_count == 1
    assert not torch.equal(first[0], again[0])
    for value, reference in zip(first, outputs_and_gradients(call.run, tensors), strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schemas, fakes and autograd of the operators that a call reaches, in both layouts."""
    call = CALLS[name]
    tensors = [tensor.to(dtype) for tensor in call.tensors.values()]
    checks = OF_EVERY_DTYPE + OF_ONE_DTYPE * (dtype == torch.float32)
    layouts = [tensors]
    if any(tensor.ndim == 4 for tensor in tensors):
        last = torch.channels_last
        layouts.append([t.to(memory_format=last) if t.ndim == 4 else t for t in tensors])
    for laid in layouts:
        recorded = _operators_called(call.run, laid)
        assert recorded
        for operator, args in recorded:
            torch.library.opcheck(operator, args, test_utils=checks)


def _operators_called(function, tensors: Tensors) -> list[tuple[object, tuple]]:
    """The operators of this package that a call and its backward pass run, with arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[str, tuple[object, tuple]] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "tiue":
                detached = torch.utils._pytree.tree_map_only(
                    torch.Tensor, lambda t: t.detach().clone(), args
                )
                found.setdefault(func.name(), (func, detached))
            return func(*args, **(kwargs or {}))

    with Record():
        outputs_and_gradients(function, tensors)
    for name, (_, args) in found.items():
        if name.endswith("_fwd"):
            for arg in args:
                for tensor in arg if isinstance(arg, list) else [arg]:
                    if isinstance(tensor, torch.Tensor):
                        tensor.requires_grad_()
    return list(found.values())


def test_autocast_settles_dtypes() -> None:
    hidden, skip = noise(K * B, 9, 4, 5).float(), noise(B, 7, 4, 5).bfloat16()
    norm = (noise(16).float(), noise(16).float())
    conv = (noise(6, 16, 3, 3).float(), noise(6).float())
    for tensor in conv:
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        rows, shared = functional.shared_skip_group_norm_silu_conv2d(
            hidden, skip, 4, *norm, *conv, padding=1
        )
        assert rows.dtype == shared.dtype == torch.bfloat16
        (rows.sum() + shared.sum()).backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in conv)


def test_dtypes_that_differ_are_refused_outside_of_autocast() -> None:
    with pytest.raises(TypeError, match=r"shared_skip_group_norm_silu.*hidden torch\.float32"):
        functional.shared_skip_group_norm_silu(
            noise(6, 9, 4, 5).float(), noise(2, 7, 4, 5), 4, noise(16), noise(16)
        )
    with pytest.raises(TypeError, match="geglu: x must hold floating-point numbers"):
        functional.geglu(torch.ones(2, 4, dtype=torch.int32))


def test_devices_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cross_timestep_attention: all .*key on meta"):
        functional.cross_timestep_attention(
            noise(2, 3, 8), noise(2, 3, 8).to("meta"), noise(2, 3, 8), 2
        )


def test_frozen_weights_get_no_gradient() -> None:
    call = CALLS["broadcast_add_group_norm_silu_conv2d"]
    hidden, *rest = (tensor.float() for tensor in call.tensors.values())
    hidden.requires_grad_()
    (out,) = call.run(hidden, *rest)
    assert torch.autograd.grad(out.sum(), hidden)[0].shape == hidden.shape
    weight = rest[-2].requires_grad_()
    (out,) = call.run(hidden.detach(), *rest)
    assert torch.autograd.grad(out.sum(), weight)[0].shape == weight.shape


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_gradient_of_an_attention_bias_is_computed_where_it_is_needed(
    needs_grad: bool, monkeypatch
) -> None:
    asked = []
    plain = reference_attention.cross_timestep_attention_bwd

    def noted(*args):
        asked.append(args[-1])
        return plain(*args)

    monkeypatch.setattr(dispatch, "_launcher", lambda backend, operator, direction: (
        noted if direction == "bwd" else reference_attention.cross_timestep_attention_fwd
    ))  # fmt: skip
    call = CALLS["cross_timestep_attention"]
    query, key, value = (tensor.float().requires_grad_() for tensor in call.tensors.values())
    bias = noise(B, 1, key.shape[1]).float().requires_grad_(needs_grad)
    out = functional.cross_timestep_attention(query, key, value, 2, attention_bias=bias)
    out.sum().backward()
    assert asked == [needs_grad]
    assert (bias.grad is not None) == needs_grad
    assert query.grad is not None


@pytest.mark.parametrize("name", ["geglu", "layer_norm_linear", "shared_skip_group_norm_silu"])
def test_a_second_derivative_is_an_error_and_no_zero(name: str) -> None:
    call = CALLS[name]
    inputs = [tensor.float().requires_grad_() for tensor in call.tensors.values()]
    total = sum(output.sum() for output in call.run(*inputs))
    plain = torch.autograd.grad(total, inputs, retain_graph=True)
    gradients = torch.autograd.grad(total, inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))
    with pytest.raises(RuntimeError, match=f"tiue::{name} has no second derivative"):
        sum(gradient.square().sum() for gradient in gradients).backward()


def test_backward_operators_are_named_like_their_forward() -> None:
    attention, geglu = OPERATORS["cross_timestep_attention"], OPERATORS["geglu"]
    assert attention.backward is torch.ops.tiue.cross_timestep_attention_bwd.default
    assert geglu.forward is torch.ops.tiue.geglu_fwd.default
