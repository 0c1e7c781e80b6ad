"""Times the whole one pass, noise to latents, against its rivals in the same run."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import multiply_adds, peak_memory
from benchmarks.forms.models import random_unet
from benchmarks.forms.rivals import FORMS, NotRunError, Setting
from benchmarks.measure.ceilings import matmul_tflop_s
from benchmarks.measure.interleave import Rival, peak_bytes
from benchmarks.measure.machine import without_paths
from benchmarks.measure.race import Case, Race, relative_difference, short
from benchmarks.measure.shares import time_shares
from tiue_kernels import cpu

__all__ = ["FORMS", "LATENTS", "default_forms"]

LATENTS = (32, 64)
# Seconds that the rounds of these two may take, three rounds at least, and of any other, two at
# least (plain sampling, the slowest, one): `make bench` is to take less than 15 minutes.
MAIN, MAIN_BUDGET, RIVAL_BUDGET = ("published", "tiue"), 20.0, 15.0
# On a CPU a minute or more at each size, so by default at the largest latents only.
ONCE = ("published-openvino", "full-steps", "full-steps-fused")
MEASURED_MEMORY = ("published", "tiue", "tiue-direct")
# Of the largest output. Direct convolutions in another order: 2e-6 seen. Winograd's, in tiue and in
# OpenVINO, are right to 1e-4 of an output's deviation each.
TOLERANCE, WINOGRAD_TOLERANCE = 2e-5, 1e-4
PEAK_OF = {"cpu": peak_memory.MEANING, "cuda": "what one call allocates at most over the weights"}


def default_forms(device: torch.device) -> list[str]:
    """What is raced on a device unless `--bench-forms` says otherwise.

    Ours in OpenVINO, which takes minutes to convert, is left out where ours has Winograd's
    convolutions: it is slower (18.2 s against 16.6 s at 64 x 64 latents on two cores).
    """
    left_out = {"tiue-openvino"} if cpu.loaded() else set()
    return [
        name
        for name, form in FORMS.items()
        if device.type in form.by_default and name not in left_out
    ]


def run_race(
    case: Case, unet: UNet2DConditionModel, forms: list[str], rounds: int, memory: list[str]
) -> Race:
    """Compare every form with the published one, then time them in turn.

    Args:
        case: What is raced.
        unet: The weights of all.
        forms: Keys of `FORMS`.
        rounds: The most timings of a form.
        memory: Forms whose peak memory is measured on a CPU.

    Returns:
        The race.

    Raises:
        AssertionError: A form that should equal the published one does not.
    """
    device = unet.device
    setting = Setting.build(case, device, unet.dtype, unet)
    race = Race(case.label, facts(setting))
    rivals: dict[str, Rival] = {}
    outputs: dict[str, torch.Tensor] = {}
    first: dict[str, float] = {}
    # What the others are held against is computed, raced or not.
    references = [reference for name in forms if (reference := FORMS[name].equal_to)]
    for name in dict.fromkeys(("published", *references, *forms)):
        begin = time.perf_counter()
        try:
            rival = FORMS[name].build(setting)
            built = time.perf_counter()
            # The call that is compared is also the warm-up. Graphs overwrite what they gave.
            outputs[name] = rival().clone()
        except Exception as error:  # a rival that breaks must not cost the others' times
            if name in MAIN:
                raise
            race.not_run[name] = _reason(error)
            continue
        first[name] = time.perf_counter() - built
        race.of_form[name] = {"build_s": round(built - begin, 3)}
        if name in forms:
            rivals[name] = rival

    check(outputs, setting, race)
    counts = {name: min(rounds, rounds_of(name, first[name])) for name in rivals}
    race.run(rivals, counts, device)
    for name in rivals:
        base = name.partition("-")[0] if FORMS[name].equal_to == "published" else name
        if base in multiply_adds.FORMS:
            parts = multiply_adds.count(
                base, case.model, case.latent_size, case.batch, case.num_decoder_steps
            )
            race.of_form[name]["multiply_adds"] = sum(part.total for part in parts.values())
    if device.type == "cpu":
        if "tiue" in rivals:
            race.of_form["tiue"]["time_shares"] = time_shares(rivals["tiue"])
        peaks = peak_memory.in_processes(memory, case, unet.dtype)
    else:
        peaks = {name: peak_bytes(rival, device) for name, rival in rivals.items()}
    figures = {name: round(peak / 2**20, 1) for name, peak in peaks.items() if peak is not None}
    race.facts |= {"peaks_mib": figures, "peak_of": PEAK_OF[device.type]}
    return race


def rounds_of(form: str, seconds: float) -> int:
    """How often a form is timed of which a call takes so long."""
    if form in MAIN:
        return max(3, int(MAIN_BUDGET / seconds))
    return max(1 if form.startswith("full-steps") else 2, int(RIVAL_BUDGET / seconds))


def facts(setting: Setting) -> dict[str, Any]:
    """What the JSON says of every form of a case."""
    case, unet = setting.case, setting.unet
    return {
        "model": case.model,
        "latent_size": case.latent_size,
        "batch": case.batch,
        "num_decoder_steps": case.num_decoder_steps,
        "dtype": short(unet.dtype),
        "winograd": unet.device.type == "cpu" and cpu.loaded(),
        "matmul_tflop_s": matmul_tflop_s(unet.device, unet.dtype),
    }


def check(outputs: dict[str, torch.Tensor], setting: Setting, race: Race) -> None:
    """Refuse to time a form that computes something else; note how far each is off."""
    published, dtype = outputs["published"], setting.unet.dtype
    reference = published if dtype == torch.float32 else _in_float32(setting)
    own = relative_difference(published, reference)
    for name, output in outputs.items():
        assert output.shape == published.shape, f"{name}: {tuple(output.shape)}"
        assert torch.isfinite(output).all(), f"{name} is not finite"
        equal_to = "published" if name == "published" else FORMS[name].equal_to
        if equal_to is None:
            race.of_form[name]["compared"] = "shape and finite values alone: not equal by nature"
            continue
        if equal_to not in outputs:  # it could not run, and the reason is told
            race.of_form[name]["compared"] = f"shape and finite values alone: no {equal_to} here"
            continue
        if dtype == torch.float32:
            winograd = name != "published" and (race.facts["winograd"] or "openvino" in name)
            limit = WINOGRAD_TOLERANCE if winograd else TOLERANCE
        else:
            # No further from float32 than the published form itself, up to a factor of two.
            limit = 2 * own + torch.finfo(dtype).eps
        against = outputs[equal_to]
        if equal_to == "published":
            error = relative_difference(output, reference)
        else:
            # Both are off, and there is no float32 of these.
            error, limit = relative_difference(output, against), 2 * limit
        assert error <= limit, f"{name} differs by {error:.1e} of the largest value"
        race.of_form[name]["relative_difference"] = relative_difference(output, against)


def _in_float32(setting: Setting) -> torch.Tensor:
    unet = copy.deepcopy(setting.unet).float()
    wide = Setting.build(setting.case, unet.device, torch.float32, unet)
    # The inputs are those that the narrow type holds.
    inputs = {name: _widened(value) for name, value in setting.inputs.items()}
    return FORMS["published"].build(Setting(wide.case, unet, inputs, wide.scheduler))()


def _widened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _widened(entry) for name, entry in value.items()}
    return value.float()


def _reason(error: Exception) -> str:
    if isinstance(error, NotRunError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return without_paths(f"{type(error).__name__}: {lines[0]}")


@pytest.fixture(scope="module")
def unet(request, device, dtype) -> UNet2DConditionModel:
    return random_unet(request.config.getoption("--bench-model"), device, dtype)


@pytest.fixture(scope="module")
def race(request, unet, case) -> Race:
    option = request.config.getoption
    forms = option("--bench-forms") or default_forms(unet.device)
    memory = option("--bench-memory")
    largest = case.latent_size == max(option("--bench-latents") or LATENTS)
    if memory is None:
        asked = option("--bench-forms") or MEASURED_MEMORY
        memory = [form for form in MEASURED_MEMORY if form in asked] if largest else []
    left_out = []
    if unet.device.type == "cpu" and not largest and not option("--bench-forms"):
        left_out = [form for form in ONCE if form in forms]
    forms = [form for form in forms if form not in left_out]
    race = run_race(case, unet, forms, option("--bench-rounds"), memory)
    race.not_run |= dict.fromkeys(left_out, "by default at the largest latents only")
    return race


def test_one_pass(benchmark, race, form):
    race.enter(benchmark, form)
