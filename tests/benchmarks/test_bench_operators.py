"""Every operator's benchmark runs, on a tiny shape; forms that are wrong or break are not timed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import interleave
from benchmarks.measure.interleave import CudaClock
from benchmarks.operators.race import Case, run_race, tiny_cases
from testing import operators
from testing.criterion import outputs_and_gradients
from testing.operators import OPERATORS
from testing.problem import Draw
from testing.shapes import SHAPES
from tiue_kernels import dispatch, functional

ROOT = Path(__file__).parents[2]
CEILINGS = {"copy_gb_s": 10.0, "matmul_tflop_s": {"float32": 0.1}}
GEGLU = Case("geglu", "tiny_64_up1_transformer")


def rows_of(path: Path, operators: list[str], *forms: str) -> list[dict]:
    files = [f"benchmarks/operators/bench_{operator}.py" for operator in operators]
    options = ["--bench-rounds=2", f"--benchmark-json={path}", "--bench-forms", *forms]
    environment = {name: os.environ[name] for name in os.environ if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return [row["extra_info"] for row in json.loads(path.read_text())["benchmarks"]]


def test_every_benchmark_times_both_directions(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "all.json", list(OPERATORS), "tiue", "eager")
    found = {(row["operator"], row["direction"], row["form"]) for row in rows}
    assert found == {
        (operator, direction, form)
        for operator in OPERATORS
        for direction in ("forward", "backward")
        for form in ("tiue", "eager")
    }
    assert all(row["gb_s"] > 0 and row["speedup_over_eager"] > 0 for row in rows)
    products = {row["operator"] for row in rows if "percent_of_matmul" in row}
    assert "cross_timestep_attention" in products
    assert "geglu" not in products


def test_compiled_rivals(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++: torch.compile generates C++ for a CPU")
    rows = rows_of(tmp_path / "compiled.json", ["geglu"], "tiue", "compile")
    assert {row["form"] for row in rows} == {"tiue", "compile"}
    assert all("speedup_over_compile" in row for row in rows)


def race(forms: tuple[str, ...] = ("tiue", "tiue-cuda", "eager")):
    return run_race(GEGLU, torch.device("cpu"), torch.float32, 2, forms, CEILINGS)


def test_a_form_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.geglu
    monkeypatch.setattr(functional, "geglu", lambda x: right(x) * 1.01)
    result = race()
    assert result.wrong["tiue"].startswith("geglu tiny_64_up1_transformer-nchw tiue: AssertionErr")
    assert "output 0" in result.wrong["tiue"]
    assert set(result.seconds["forward"]) == {"eager"}


def test_a_form_that_breaks_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.geglu

    def broken(x):
        if dispatch.forced_backends() == ("reference",):
            return right(x)
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(functional, "geglu", broken)
    result = race(("tiue", "tiue-reference", "eager"))
    assert "RuntimeError: no such kernel image" in result.wrong["tiue"]
    assert set(result.seconds["forward"]) == {"tiue-reference", "eager"}


def test_forms_that_cannot_run_say_why() -> None:
    result = race()
    assert "not implemented" in result.refused["tiue-cuda"]
    assert set(result.seconds["backward"]) == {"tiue", "eager"}
    assert result.facts["backend"] == ["reference"]


def test_exact_attention_is_attention_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "MOST_SCORES", 4 * 4 * 77 * 5)  # five queries at a time
    draw = Draw(torch.device("cpu"), torch.float64)
    problem = OPERATORS["cross_timestep_attention"].build(SHAPES["tiny_64_up1_text"], draw)
    tensors = tuple(problem.tensors.values())
    grads = (torch.randn_like(tensors[0]),)
    for value, expected in zip(
        outputs_and_gradients(problem.exact, tensors, grads),
        outputs_and_gradients(problem.eager, tensors, grads),
        strict=True,
    ):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)


def test_work_of_attention() -> None:
    sizes = SHAPES["sd15_512_up3_text"]
    draw = Draw(torch.device("cpu"), torch.bfloat16)
    problem = OPERATORS["cross_timestep_attention"].build(sizes, draw)
    query, text = 4 * 4096 * 320 * 2, 77 * 320 * 2
    outputs = (problem.tensors["query"],)
    assert problem.bytes(outputs) == {
        "forward": 2 * query + 2 * text,
        "backward": 3 * query + 4 * text,
    }
    product = 2 * 4 * 4096 * 77 * 320
    assert problem.products() == {"forward": 2 * product, "backward": 5 * product}


def test_work_of_a_split_convolution() -> None:
    sizes = SHAPES["tiny_64_up0_res2"]  # 64 and 32 channels to 64, 8 groups of 12, 4 x 4 pixels
    draw = Draw(torch.device("cpu"), torch.float32)
    problem = OPERATORS["shared_skip_group_norm_silu_conv2d"].build(sizes, draw)
    # The sixth group holds channels 60 to 71, so 72 go with the rows and 24 with the skip.
    assert problem.flops == 18 * 16 * 64 * (4 * 72 + 1 * 24)


def test_tiny_cases_exist_for_every_operator() -> None:
    assert all(tiny_cases(operator) for operator in OPERATORS)


class FakeGpu:
    """Events and sleeps on a clock that only calls advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def Event(self, enable_timing: bool):  # noqa: N802 (torch's name)
        gpu = self

        class Event:
            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end) -> float:
                return 1e3 * (end.at - self.at)

        return Event()

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles / 1e9)
        self.now += cycles / 1e9

    def get_device_properties(self, device):
        return object()


def test_a_call_is_timed_once_it_is_queued_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, queued = FakeGpu(), [0.01, 0.003]
    monkeypatch.setattr(torch, "cuda", gpu)
    clock = CudaClock(torch.device("cpu"))

    def rival() -> None:
        gpu.now += 5e-4

    def wall_clock(call) -> float:
        call()
        return queued.pop(0)

    monkeypatch.setattr(interleave, "wall_clock", wall_clock)
    gpu.slept.clear()
    assert clock(rival) == pytest.approx(5e-4)
    # The first call took 10 ms to queue behind a wait of 2 ms: again, behind 20 ms.
    assert gpu.slept == pytest.approx([2e-3, 2e-2])
    assert queued == []
    assert not clock.exposed
    # However long the host takes: 130 ms, and it still is the GPU's time that counts.
    queued[:] = [0.13, 0.13]
    assert clock(rival) == pytest.approx(5e-4)
    assert gpu.slept[-1] == pytest.approx(0.26)
    assert not clock.exposed
    # A queue that is full blocks the host until the GPU goes on: nothing hides that call whole.
    queued[:] = [0.01, 0.02, 0.04]
    clock(rival)
    assert clock.exposed
    assert queued == []
