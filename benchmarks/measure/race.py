"""Forms that were timed in turn, and what the JSON says of each."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure.interleave import Rival, enter, interleave


@dataclass(frozen=True)
class Case:
    """What is raced.

    Attributes:
        model: A key of `testing.configs.CONFIGS`.
        latent_size: Height and width of the latents.
        batch: B.
        num_decoder_steps: K.
    """

    model: str
    latent_size: int
    batch: int = 1
    num_decoder_steps: int = 4

    @property
    def label(self) -> str:
        size = self.latent_size
        return (
            f"{self.model}, {size} x {size} latents, B = {self.batch}, K = {self.num_decoder_steps}"
        )


@dataclass
class Race:
    """All forms' timings of one case, interleaved.

    Attributes:
        case: What is raced, in words.
        facts: What the JSON says of every form.
        seconds: Rounds by form.
        of_form: What the JSON says of one form.
        not_run: Why a form was not run, by form.
    """

    case: str
    facts: dict[str, Any]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    of_form: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def run(
        self, rivals: dict[str, Rival], rounds: int | dict[str, int], device: torch.device
    ) -> None:
        """Time forms that have been compared and warmed up."""
        exposed: set[str] = set()
        self.seconds = interleave(rivals, rounds, device, exposed)
        for form in rivals if device.type == "cuda" else ():
            launches = "exposed" if form in exposed else "hidden"
            self.of_form.setdefault(form, {})["launches"] = launches

    def extra_info(self, form: str) -> dict[str, Any]:
        """Facts of one form, and the other forms' medians over its own."""
        medians = {name: statistics.median(rounds) for name, rounds in self.seconds.items()}
        info = {"case": self.case, "form": form, "order": "interleaved", "not_run": self.not_run}
        info |= self.facts | self.of_form.get(form, {})
        info["speedup_over"] = {name: median / medians[form] for name, median in medians.items()}
        if "multiply_adds" in info:
            info["gmac_s"] = info["multiply_adds"] / medians[form] / 1e9
        return info

    def enter(self, benchmark: BenchmarkFixture, form: str) -> None:
        """Enter one form in pytest-benchmark's table; skip where it was not run."""
        if form in self.not_run:
            pytest.skip(self.not_run[form])
        benchmark.group = self.case
        benchmark.extra_info.update(self.extra_info(form))
        enter(benchmark, self.seconds[form])


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return difference.item()


def short(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")
