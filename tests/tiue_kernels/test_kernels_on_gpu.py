"""What `make gpu` tests: every operator on every backend, at the decoders' shapes and small ones.

Without a CUDA device the small shapes run on the CPU, Triton in its interpreter, and the rest is
skipped. Held against eager torch, in the same dtype and in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from testing.criterion import check, outputs_and_gradients
from testing.operators import OPERATORS, kernel_backends
from testing.problem import Draw, Function, Problem, Tensors, default_device
from testing.shapes import (
    Attention,
    Latents,
    Output,
    Resnet,
    Sizes,
    Transformer,
    Upsampler,
    decoder,
)
from testing.tolerances import PRODUCT_FLOORS, ROUNDING_FLOORS
from tiue_kernels import BackendError, dispatch, use_backend

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
AUTOMATIC = "automatic"  # compositions, whose parts choose for themselves, and what yields to torch
PIXELS = (512, 1024, 256, 768)  # the usual sizes of picture first, should time run out
SMALL: dict[str, Sizes] = {
    "odd-channels": Resnet(20, 10, 15, 3, 5, groups=3),
    "odd-first": Resnet(8, 7, 10, 3, 5, groups=5, shared=True),
    "odd-out": Output(15, 3, 5, groups=3),
    "head-40-text": Attention(9, 77, 2, 40, own=False),
    "head-80-self": Attention(20, 20, 2, 80, own=True),
    "odd-tokens": Transformer(33, 1, 3, groups=11),
    "odd-upsampler": Upsampler(5, 9, 16),
    "odd-latents": Latents(3, 5, 3),
}
# The interpreter takes seconds a case: on a CPU those above are enough to run every line.
if ON_GPU:
    SMALL |= {
        **decoder("tiny", 64),
        "one-pixel": Resnet(9, 7, 12, 1, 1, groups=4),
        "one-group": Resnet(5, 6, 6, 4, 4, groups=1),
        "group-a-channel": Resnet(5, 3, 8, 3, 5, groups=8),
        "border-between-groups": Resnet(24, 8, 16, 2, 3, groups=4),
        "one-pixel-out": Output(12, 1, 1, groups=4),
        "one-group-out": Output(6, 4, 4, groups=1),
        "three-keys": Attention(5, 3, 2, 8, own=False),
        "head-64-many-keys": Attention(9, 150, 2, 64, own=False),
        "head-160-self": Attention(17, 17, 1, 160, own=True),
    }


def small_shapes(operator: str) -> dict[str, Sizes]:
    key = OPERATORS[operator].key
    return {name: sizes for name, sizes in SMALL.items() if key(sizes) is not None}


def typical_shape(operator: str) -> Sizes:
    """One shape, for what does not depend on it: of a picture of 512 pixels where a GPU runs it."""
    shapes = OPERATORS[operator].shapes(512) if ON_GPU else small_shapes(operator)
    return list(shapes.values())[-1 if ON_GPU else 0]


TOKENS = (
    *("layer_norm_linear", "shared_skip_layer_norm_linear"),
    *("adaptive_layer_norm", "gated_residual"),
    *("adaptive_layer_norm_linear", "linear_gated_residual", "adaptive_feed_forward"),
)


def layouts(operator: str, sizes: Sizes) -> tuple[str, ...]:
    has_maps = not isinstance(sizes, Attention | Latents) and "geglu" not in operator
    return ("nchw", "nhwc") if has_maps and operator not in TOKENS else ("nchw",)


def backends(operator: str) -> tuple[str, ...]:
    """The kernels', and where those yield to torch's the table's own choice too."""
    own = kernel_backends(operator)
    yields = any(row.yields is not None for row in dispatch.TABLE.get(operator, {}).values())
    return own if own and not yields else (*own, AUTOMATIC)


def cases(pixels: int | None) -> Iterator[object]:
    """(operator, backend, dtype, layout, sizes) of the decoders at one size, or of small shapes."""
    for operator in OPERATORS:
        chosen = OPERATORS[operator].shapes(pixels) if pixels else small_shapes(operator)
        for backend in backends(operator):
            if backend == AUTOMATIC and pixels not in (None, 512):
                continue  # made of what runs at every size, or torch's
            for name, sizes in chosen.items():
                for dtype, layout in forms(operator, sizes):
                    label = f"{operator}-{backend}-{dtype}-{layout}-{name}"
                    yield pytest.param(operator, backend, dtype, layout, sizes, id=label)


def forms(operator: str, sizes: Sizes) -> list[tuple[str, str]]:
    """Dtypes and layouts: their product on a GPU, one in the interpreter."""
    product = [(dtype, layout) for layout in layouts(operator, sizes) for dtype in DTYPES]
    return product if ON_GPU else [("bf16", layouts(operator, sizes)[-1])]


kernels = pytest.mark.parametrize(
    ("operator", "backend"),
    [
        pytest.param(operator, backend, id=f"{operator}-{backend}")
        for operator in OPERATORS
        for backend in kernel_backends(operator)
    ],
)
case_names = ("operator", "backend", "dtype", "layout", "sizes")


@pytest.fixture(autouse=True)
def _plain_arithmetic() -> Iterator[None]:
    """float32 without TF32; memory given back, for the other workers share the GPU."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value
    if ON_GPU:
        torch.cuda.empty_cache()


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills new memory with NaN: an element that no kernel writes fails the comparison."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names its own operators that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def forced(backend: str) -> AbstractContextManager[None]:
    return nullcontext() if backend == AUTOMATIC else use_backend(backend)


def build(operator: str, sizes: Sizes, dtype: str = "bf16", layout: str = "nchw", **rows: int):
    return OPERATORS[operator].build(sizes, Draw(DEVICE, DTYPES[dtype], layout, **rows))


def gradients_at(function: Function, tensors: Tensors) -> Tensors:
    """Gradients of the outputs, to be handed to backward."""
    torch.manual_seed(0)
    with torch.no_grad():
        return tuple(torch.randn_like(output) for output in function(*tensors))


def run(problem: Problem, backend: str, grads: Tensors | None = None) -> tuple[Tensors, Tensors]:
    """Outputs and gradients of our call, and the gradients that backward was handed."""
    function, _ = problem.comparable
    tensors = tuple(problem.tensors.values())
    with forced(backend):
        try:
            grads = gradients_at(function, tensors) if grads is None else grads
        except BackendError as error:
            pytest.skip(str(error))
        return outputs_and_gradients(function, tensors, grads), grads


def check_problem(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    _, plain = problem.comparable
    with poisoned():
        results, grads = run(problem, backend)
    tensors = tuple(problem.tensors.values())
    names = [*(f"output {i}" for i in range(len(grads))), *problem.tensors]  # gradients by name
    floors = PRODUCT_FLOORS if backend == AUTOMATIC else ROUNDING_FLOORS
    limits = (problem.magnitudes(grads), floors)
    check(names, results, plain, tensors, grads, dtype, problem.exact, *limits)


@needs_gpu
@pytest.mark.parametrize(
    case_names, [case for pixels in PIXELS if ON_GPU for case in cases(pixels)]
)
def test_decoder_shapes(operator, backend, dtype, layout, sizes) -> None:
    check_problem(build(operator, sizes, dtype, layout), backend, DTYPES[dtype])


@pytest.mark.parametrize(case_names, list(cases(None)))
def test_small_shapes(operator, backend, dtype, layout, sizes) -> None:
    problem = build(operator, sizes, dtype, layout, timesteps=3, batch=2)
    check_problem(problem, backend, DTYPES[dtype])


@kernels
def test_slices(operator, backend) -> None:
    """Every second element of the last axis of larger maps and rows, NaN between them."""
    sizes = next(iter(small_shapes(operator).values()))
    problem = build(operator, sizes, timesteps=2, batch=2)
    wide = {
        name: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2) if x.ndim > 1 else x
        for name, x in problem.tensors.items()
    }

    def sliced(function: Function) -> Function:
        return lambda *xs: function(*(x[..., ::2] if x.ndim > 1 else x for x in xs))

    ours, plain = problem.comparable
    check_problem(Problem(wide, sliced(ours), sliced(plain)), backend, torch.bfloat16)


@kernels
def test_empty_batch(operator, backend) -> None:
    problem = build(operator, next(iter(small_shapes(operator).values())), timesteps=3, batch=0)
    with poisoned():
        results, grads = run(problem, backend)
    outputs, gradients = results[: len(grads)], results[len(grads) :]
    assert not any(output.numel() for output in outputs)
    for (name, tensor), gradient in zip(problem.tensors.items(), gradients, strict=True):
        assert gradient.shape == tensor.shape, name
        assert not gradient.count_nonzero(), name


@kernels
def test_same_bits_twice(operator, backend) -> None:
    problem = build(operator, typical_shape(operator))
    first, grads = run(problem, backend)
    second, _ = run(problem, backend, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
@kernels
def test_second_call_compiles_nothing(operator, backend) -> None:
    knobs = pytest.importorskip("triton").knobs.runtime
    problem = build(operator, typical_shape(operator))
    _, grads = run(problem, backend)
    compiled = []
    before = knobs.jit_cache_hook
    knobs.jit_cache_hook = lambda **facts: compiled.append(facts["repr"])
    try:
        others = {name: tensor + 1 for name, tensor in problem.tensors.items()}
        run(Problem(others, *problem.comparable), backend, grads)
    finally:
        knobs.jit_cache_hook = before
    assert compiled == []


@needs_gpu
@kernels
def test_other_stream(operator, backend) -> None:
    """The inputs are written late on another stream: a kernel on the default one reads zeros."""
    problem = build(operator, typical_shape(operator))
    expected, grads = run(problem, backend)
    late = {name: torch.zeros_like(tensor) for name, tensor in problem.tensors.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 25 ms
        for name, tensor in problem.tensors.items():
            late[name].copy_(tensor)
        results, _ = run(Problem(late, *problem.comparable), backend, grads)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@needs_gpu
@kernels
def test_graph_capture(operator, backend) -> None:
    """A captured call, replayed on other values in the same memory, equals an eager one."""
    problem = build(operator, typical_shape(operator))
    expected, grads = run(problem, backend)
    captured = {name: torch.zeros_like(tensor) for name, tensor in problem.tensors.items()}
    again = Problem(captured, *problem.comparable)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # nothing is set up for the first time while it captures
        run(again, backend, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results, _ = run(again, backend, grads)
    for name, tensor in problem.tensors.items():
        captured[name].copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_to_one_graph_and_once(operator, layout) -> None:
    """torch.compile's own code generator takes shapes and strides from the fakes."""
    sizes = typical_shape(operator)
    if layout not in layouts(operator, sizes):
        pytest.skip("no maps")
    problem = build(operator, sizes, layout=layout)
    expected, grads = run(problem, AUTOMATIC)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(problem.comparable[0], fullgraph=True, dynamic=False, backend=counter)
    results = outputs_and_gradients(compiled, tuple(problem.tensors.values()), grads)
    outputs_and_gradients(compiled, tuple(t + 1 for t in problem.tensors.values()), grads)
    assert counter.frame_count == 1
    for value, eager in zip(results, expected, strict=True):
        torch.testing.assert_close(value, eager)
