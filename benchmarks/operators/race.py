"""Races an operator against eager torch and `torch.compile`: checked, then timed in turn.

A form that is wrong is not timed. Forward runs without a graph, backward over a graph that is kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch._functorch import config as functorch_config

from benchmarks.measure.interleave import Rival, enter, interleave, peak_bytes
from testing.criterion import check, outputs_and_gradients
from testing.operators import OPERATORS, kernel_backends
from testing.problem import Draw, Problem, Tensors
from testing.shapes import SHAPES, decoder
from testing.tolerances import PRODUCT_FLOORS, ROUNDING_FLOORS
from tiue_kernels import BackendError, dispatch, use_backend

OURS = ("tiue", "tiue-cuda", "tiue-triton", "tiue-reference")
FORMS = (*OURS, "eager", "compile")
DIRECTIONS = ("forward", "backward")
WARM_UPS = 3


@dataclass(frozen=True)
class Case:
    """What is raced.

    Attributes:
        operator: A key of `testing.operators.OPERATORS`.
        shape: A key of `testing.shapes.SHAPES`.
        layout: Of the maps: "nchw" or "nhwc".
    """

    operator: str
    shape: str
    layout: str = "nchw"

    @classmethod
    def parse(cls, operator: str, text: str) -> Case:
        """`sd15_512_up3_res1`, or `sd15_512_up3_res1-nhwc`."""
        shape, _, layout = text.partition("-")
        return cls(operator, shape, layout or "nchw")

    @property
    def label(self) -> str:
        return f"{self.shape}-{self.layout}"


def tiny_cases(operator: str) -> list[str]:
    """Shapes of the smallest decoder that an operator meets: all that a CPU times by default."""
    key = OPERATORS[operator].key
    return [name for name, sizes in decoder("tiny", 64).items() if key(sizes) is not None][:1]


@dataclass
class Race:
    """One case, timed.

    Attributes:
        case: What is raced.
        facts: What the JSON says of every form.
        work: Bytes and FLOPs by direction.
        seconds: Rounds by direction and form.
        peaks: Bytes allocated by direction and form.
        refused: Why a form was not run, by form.
        wrong: Why a form was not timed, by form.
    """

    case: Case
    facts: dict[str, Any]
    work: dict[str, dict[str, int]]
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    peaks: dict[str, dict[str, int | None]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def enter(self, benchmark: BenchmarkFixture, direction: str, form: str) -> None:
        """Enter one form in pytest-benchmark's table; fail or skip where it was not timed."""
        if form in self.wrong:
            pytest.fail(self.wrong[form], pytrace=False)
        if form in self.refused:
            pytest.skip(self.refused[form])
        benchmark.group = f"{self.case.operator} {self.case.label} {direction}"
        benchmark.extra_info.update(self.extra_info(direction, form))
        enter(benchmark, self.seconds[direction][form])

    def extra_info(self, direction: str, form: str) -> dict[str, Any]:
        """Rates of one form, and how it compares with the rivals."""
        medians = {name: statistics.median(s) for name, s in self.seconds[direction].items()}
        median, work, ceilings = medians[form], self.work[direction], self.facts["ceilings"]
        info = {name: value for name, value in self.facts.items() if name != "ceilings"}
        info |= {"direction": direction, "form": form, **work}
        info["gb_s"] = work["bytes"] / median / 1e9
        info["percent_of_copy"] = 100 * info["gb_s"] / ceilings["copy_gb_s"]
        if work["flops"]:
            info["tflop_s"] = work["flops"] / median / 1e12
            peak = ceilings["matmul_tflop_s"][self.facts["dtype"]]
            info["percent_of_matmul"] = 100 * info["tflop_s"] / peak
        for rival in ("eager", "compile"):
            if rival in medians:
                info[f"speedup_over_{rival}"] = medians[rival] / median
        if (peak_memory := self.peaks[direction][form]) is not None:
            info["peak_mib"] = round(peak_memory / 2**20, 1)
        return info


def run_race(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    forms: tuple[str, ...],
    ceilings: dict[str, Any],
) -> Race:
    """Check and time every form of one case.

    Args:
        case: Operator, shape and layout.
        device: Where it runs.
        dtype: Of the tensors.
        rounds: Timings of each form and direction.
        forms: Of `FORMS`.
        ceilings: What `benchmarks.measure.ceilings.measure` returns.

    Returns:
        The race.
    """
    problem = OPERATORS[case.operator].build(SHAPES[case.shape], Draw(device, dtype, case.layout))
    with torch.no_grad(), use_backend("reference"):
        outputs = problem.run(*problem.tensors.values())
    sizes, products = problem.bytes(outputs), problem.products()
    work = {name: {"bytes": sizes[name], "flops": products[name]} for name in DIRECTIONS}
    facts = {
        "operator": case.operator,
        "case": case.label,
        "dtype": str(dtype).removeprefix("torch."),
        "timesteps": 4,
        "batch": 1,
        "backend": [],
        "ceilings": ceilings,
        "order": "interleaved",
    }
    race = Race(case, facts, work)
    usable = []
    for form in forms:
        if form.startswith("tiue-") and not kernel_backends(case.operator):
            race.refused[form] = "a composition: its parts choose their backends"
        elif form in OURS:
            _judge(race, problem, form, dtype)
        if form not in race.refused and form not in race.wrong:
            usable.append(form)

    functions = {form: problem.run if form in OURS else problem.eager for form in usable}
    if "compile" in functions:
        torch._dynamo.reset()
        functions["compile"] = torch.compile(problem.eager, dynamic=False)
    for direction in DIRECTIONS:
        prepare = _forward if direction == "forward" else _backward
        rivals: dict[str, Rival] = {}
        for form in [form for form in functions if form not in race.wrong]:
            try:
                with _forced(form):
                    rivals[form] = _in(form, prepare(problem, functions[form]))
                for _ in range(WARM_UPS):
                    rivals[form]()
            except Exception as error:  # one form that breaks must not cost the others' times
                race.wrong[form] = _describe(race.case, form, error)
                rivals.pop(form, None)
        race.seconds[direction] = interleave(rivals, rounds, device)
        race.peaks[direction] = {form: peak_bytes(rival, device) for form, rival in rivals.items()}
    return race


def _forced(form: str) -> AbstractContextManager[None]:
    backend = form.removeprefix("tiue-")
    return use_backend(backend) if backend in dispatch.PREFERENCE else nullcontext()


def _in(form: str, rival: Rival) -> Rival:
    def call() -> object:
        with _forced(form):
            return rival()

    return call


def _judge(race: Race, problem: Problem, form: str, dtype: torch.dtype) -> None:
    """Hold one of our forms against the criterion of the tests."""
    ours, plain = problem.comparable
    tensors = tuple(problem.tensors.values())
    torch.manual_seed(0)
    chosen: set[str] = set()
    try:
        with _forced(form), _noted_choices(chosen):
            with torch.no_grad():
                grads = tuple(torch.randn_like(output) for output in ours(*tensors))
            results = outputs_and_gradients(ours, tensors, grads)
        names = [*(f"output {i}" for i in range(len(grads))), *problem.tensors]
        floors = ROUNDING_FLOORS if kernel_backends(race.case.operator) else PRODUCT_FLOORS
        limits = (problem.magnitudes(grads), floors)
        check(names, results, plain, tensors, grads, dtype, problem.exact, *limits)
    except BackendError as error:
        race.refused[form] = str(error)
    except Exception as error:  # as above: a wrong result, or a kernel that does not compile
        race.wrong[form] = _describe(race.case, form, error)
    if form == "tiue":
        race.facts["backend"] = sorted(chosen)


def _describe(case: Case, form: str, error: Exception) -> str:
    text = str(error).strip().splitlines()
    cause = text[0] if text else ""
    return f"{case.operator} {case.label} {form}: {type(error).__name__}: {cause}"


def _forward(problem: Problem, function: Any) -> Rival:
    tensors = tuple(problem.tensors.values())

    def forward() -> Tensors:
        with torch.no_grad():
            return function(*tensors)

    return forward


def _backward(problem: Problem, function: Any) -> Rival:
    inputs = {name: tensor.detach().clone() for name, tensor in problem.tensors.items()}
    trained = [inputs[name].requires_grad_() for name in inputs if name not in problem.constants]
    # A compiled graph would else hand its saved tensors on as scratch memory, once.
    with functorch_config.patch(donated_buffer=False):
        outputs = function(*inputs.values())
        grads = tuple(torch.randn_like(output) for output in outputs)
        torch.autograd.grad(outputs, trained, grads, retain_graph=True)
    return partial(torch.autograd.grad, outputs, trained, grads, retain_graph=True)


@contextmanager
def _noted_choices(chosen: set[str]) -> Iterator[None]:
    """Adds the backends that dispatch chooses inside."""
    select = dispatch.select

    def note(operator: str, direction: str, args: tuple[Any, ...]) -> str:
        backend = select(operator, direction, args)
        chosen.add(backend)
        return backend

    dispatch.select = note
    try:
        yield
    finally:
        dispatch.select = select
