"""The claims, each with its rule, and what the results say of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.miniature.evaluation import Results
from benchmarks.miniature.rows import SEEDS, TIMESTEPS
from tiue.evaluate.scenes_preset import EVERYTHING

AGREES, DISAGREES, UNDECIDED, NOT_RUN = "agrees", "does not agree", "undecided", "not run"
# What every comparison of two students is judged by.
FIGURES = {"right": "all right", "coverage": "coverage", "energy": "energy distance"}
SHARES = ("right", "coverage", "entropy")  # shown in percent
LOWER_IS_BETTER = ("energy",)


def values(results: list[dict[str, Any]], figure: str, split: str = EVERYTHING) -> list[float]:
    """One figure of a split, a seed each, of the results that have it."""
    found = (r["scenes"]["splits"]["model"].get(split, {}).get("figures", {}) for r in results)
    return [figures[figure][0] for figures in found if figure in figures]


def shown(numbers: list[float], figure: str) -> str:
    """Mean, and standard deviation over seeds where there are several; empty of none."""
    if not numbers:
        return ""
    scale, digits = (100, 1) if figure in SHARES else (1, 3)
    text = f"{scale * statistics.fmean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {scale * statistics.stdev(numbers):.{digits}f}"
    return text + (" %" if figure in SHARES else "")


@dataclass(frozen=True)
class Better:
    """That one row is better than another in a figure, over all prompts.

    Attributes:
        claim: For the reader.
        row: The one that the claim has ahead.
        other: The other.
        figure: A key of `FIGURES`.
    """

    claim: str
    row: str
    other: str
    figure: str

    @property
    def needs(self) -> str:
        """The rule, in words."""
        return "two standard errors"

    def judge(self, results: Results) -> tuple[str, str]:
        """The verdict, and the figures that it stands on.

        Undecided within two standard errors of the difference of means over training seeds; not run
        where a row lacks one of them.
        """
        sides = [values(results.get(name, []), self.figure) for name in (self.row, self.other)]
        if any(len(side) < len(SEEDS) for side in sides):
            return NOT_RUN, ""
        own, other = sides
        gap = statistics.fmean(own) - statistics.fmean(other)
        if self.figure in LOWER_IS_BETTER:
            gap = -gap
        error = math.sqrt(sum(statistics.variance(side) / len(side) for side in sides))
        evidence = (
            f"{shown(own, self.figure)} (`{self.row}`) against {shown(other, self.figure)}"
            f" (`{self.other}`)"
        )
        if abs(gap) <= 2 * error:
            return UNDECIDED, evidence
        return (AGREES if gap > 0 else DISAGREES), evidence


@dataclass(frozen=True)
class Keeps:
    """That a row reaches a share of another's figure, over all prompts.

    Attributes:
        claim: For the reader.
        row: The one that is to reach it.
        other: The other.
        figure: Of the scenes preset.
        share: To be reached.
    """

    claim: str
    row: str
    other: str
    figure: str
    share: float

    @property
    def needs(self) -> str:
        """The rule, in words."""
        return f"at least {self.share:.0%} of it"

    def judge(self, results: Results) -> tuple[str, str]:
        """The verdict of the means, and the figures; not run where the row lacks a seed."""
        own, whole = (values(results.get(n, []), self.figure) for n in (self.row, self.other))
        if len(own) < len(SEEDS) or not whole:
            return NOT_RUN, ""
        reached = statistics.fmean(own) / statistics.fmean(whole)
        evidence = (
            f"{shown(own, self.figure)} (`{self.row}`) of {shown(whole, self.figure)}"
            f" (`{self.other}`): {reached:.0%}"
        )
        return (AGREES if reached >= self.share else DISAGREES), evidence


def _better(claim: str, row: str, other: str) -> list[Better]:
    return [Better(f"{claim}: {label}", row, other, name) for name, label in FIGURES.items()]


CLAIMS: tuple[Better | Keeps, ...] = (
    *_better("K = 4 beats K = 1 at equal updates", "k4", "k1"),
    *_better("K = 4 beats K = 1 at equal training compute", "k4", "k1-compute"),
    Keeps("K = 4 is as often right as the teacher at 25 steps", "k4", "teacher-25", "right", 0.9),
    Keeps("K = 4 covers what the teacher does at 25 steps", "k4", "teacher-25", "coverage", 0.8),
    *_better("one pass needs distillation, K = 4", "k4", "one-pass-4"),
    *_better("one pass needs distillation, K = 1", "k1", "one-pass-1"),
    *_better("K = 4 beats K = 2", "k4", "k2"),
    *_better("K = 8 beats K = 4", "k8", "k4"),
    *_better("the KL term helps, K = 4", "k4-kl", "k4"),
    *_better("the KL term helps, K = 1", "k1-kl", "k1"),
    *_better("leading spacing beats trailing, K = 4", "k4", "k4-trailing"),
    *_better("the LoRA is better not guided", "k4", "k4-lora-guided"),
    *(
        Better(f"the picture needs t = {t}: energy distance", "k4", f"k4-without-{t}", "energy")
        for t in TIMESTEPS
    ),
)
