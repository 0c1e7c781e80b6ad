"""The choice of a backend: automatic, forced, refused with every reason."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.tiue_kernels.calls import noise
from tiue_kernels import BackendError, dispatch, explain, functional, use_backend


@pytest.fixture(autouse=True)
def _choices_of_its_own() -> Iterator[None]:
    """What the environment says is read once, and again after `reset`."""
    yield
    dispatch.reset()


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return noise(2, 3, 8).to(dtype)


def test_tensors_on_a_cpu_take_the_reference() -> None:
    assert dispatch.select("geglu", "fwd", (x(),)) == "reference"
    lines = explain("geglu", x()).splitlines()
    assert lines[0] == "  reference: runs"
    assert any(line.startswith("  cuda: not implemented") for line in lines)


def test_every_backend_is_a_known_one() -> None:
    for backends in dispatch.TABLE.values():
        assert set(backends) <= set(dispatch.PREFERENCE)
        assert "reference" in backends


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="no backend 'tritn': choose one of cuda, triton"):
        use_backend("tritn").__enter__()
    with pytest.raises(ValueError, match="no backend 'gpu': choose one of"):
        use_backend("cuda", "gpu").__enter__()
    with pytest.raises(ValueError, match="name a backend at least: cuda, triton, cpu, reference"):
        use_backend().__enter__()
    with pytest.raises(ValueError, match="no operator 'gelu': choose one of"):
        explain("gelu", x())


def test_a_forced_backend_that_cannot_run_lists_every_reason(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.reset()
    with use_backend("triton"), pytest.raises(BackendError) as error:
        functional.geglu(x(torch.float64))
    message = str(error.value)
    assert "geglu cannot run on the forced backend triton" in message
    assert "torch.float64 is not one of bfloat16, float16, float32" in message
    assert "TRITON_INTERPRET=1" in message or "triton is not installed" in message
    with use_backend("cuda"), pytest.raises(BackendError, match="cuda: not implemented"):
        functional.geglu(x())


def test_the_variable_forces_and_the_context_overrides_it(monkeypatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    dispatch.reset()
    with pytest.raises(BackendError, match="forced backend cuda"):
        functional.geglu(x())
    with use_backend("reference"):
        functional.geglu(x())
    monkeypatch.setenv(dispatch.VARIABLE, "opencl")
    dispatch.reset()
    with pytest.raises(ValueError, match="no backend 'opencl'"):
        functional.geglu(x())


def test_contexts_nest_and_end() -> None:
    with use_backend("reference"):
        with use_backend("triton"):
            assert dispatch.forced_backends() == ("triton",)
        assert dispatch.forced_backends() == ("reference",)
    assert dispatch.forced_backends() == ()


def test_contexts_that_overlap_each_end_their_own() -> None:
    """As of two threads: the one that was entered first is left first."""
    first, second = use_backend("triton"), use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced_backends() == ("reference",)
    second.__exit__(None, None, None)
    assert dispatch.forced_backends() == ()


def test_of_several_the_first_that_can_serves(monkeypatch, caplog) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.reset()
    pytest.importorskip("triton")
    dispatch._tell_once.cache_clear()
    with use_backend("triton", "reference"), caplog.at_level("INFO", dispatch.logger.name):
        assert dispatch.select("geglu", "fwd", (x(),)) == "triton"
        for _ in range(2):
            assert dispatch.select("geglu", "fwd", (x(torch.float64),)) == "reference"
        assert dispatch.select("conv2d", "fwd", (x(),)) == "reference"
        lines = explain("geglu", x()).splitlines()
    assert lines[:2] == ["  triton: runs", "  reference: may run"]
    assert "geglu does not run on triton: torch.float64 is not one of" in caplog.text
    assert "conv2d does not run on triton: not implemented" in caplog.text
    assert len(caplog.records) == 2
    with (
        use_backend("cuda", "triton"),
        pytest.raises(BackendError, match="the forced backend cuda or triton"),
    ):
        dispatch.select("geglu", "fwd", (x(torch.float64),))
    with use_backend("cuda"):  # convolutions are torch's own on a GPU
        assert dispatch.select("conv2d", "fwd", (x(),)) == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "cuda, reference")
    dispatch.reset()
    assert dispatch.select("geglu", "fwd", (x(),)) == "reference"


def test_head_sizes_that_no_kernel_takes_are_named() -> None:
    query = noise(2, 3, 20).float()
    args = (query, query, query, 2, 1.0, None)
    with use_backend("triton"), pytest.raises(BackendError, match="head size 10 is no multiple"):
        dispatch.select("cross_timestep_attention", "fwd", args)
    backward = (query, query, query, query, 2, 1.0, None, query, query)
    with use_backend("triton"), pytest.raises(BackendError, match="head size 10 is no multiple"):
        dispatch.select("cross_timestep_attention", "bwd", backward)


@pytest.mark.parametrize(("backend", "half", "single"), [("cuda", 160, 160), ("triton", 192, 256)])
def test_wide_heads_need_shared_memory_in_backward(backend: str, half: int, single: int) -> None:
    limit = dispatch.TABLE["cross_timestep_attention"][backend].limit
    for dtype, most in ((torch.float16, half), (torch.bfloat16, half), (torch.float32, single)):
        for size in range(8, 257, 8):
            query = torch.empty(1, 1, size, dtype=dtype)
            call = {"query": query, "num_heads": 1}
            for capability in ((0, 0), (8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0)):
                assert limit("bwd", call, capability) is None
            for capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
                assert limit("fwd", call, capability) is None
                reason = limit("bwd", call, capability)
                assert (reason is None) == (size <= most), (dtype, size, capability)
                assert reason is None or f"head size {size} needs more than the 99 KiB" in reason


def test_importing_the_package_imports_no_triton_and_info_names_every_operator() -> None:
    code = "import runpy, sys, tiue_kernels\nassert 'triton' not in sys.modules\n"
    code += "runpy.run_module('tiue_kernels.info', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for operator in functional.__all__:
        assert f"\n {operator}\n" in done.stdout
        assert explain(operator, x())
    assert f"torch {torch.__version__}" in done.stdout
