"""The page's plots, drawn from results alone."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.miniature.evaluation import Results
from benchmarks.miniature.parts import IMAGES
from benchmarks.miniature.verdicts import values

QUALITY_IMAGE, SIMILARITY_IMAGE = "miniature-quality.png", "miniature-similarity.png"
# Kinds of rows that the plot tells apart, and a row's name in it.
KINDS = {
    "teacher, steps": {f"teacher-{n}": str(n) for n in (25, 10, 4)},
    "teacher in one pass, not distilled": {"one-pass-4": "K=4", "one-pass-1": "K=1"},
    "students": {f"k{k}": f"K={k}" for k in (1, 2, 4, 8)},
    "students, other settings": {
        name: name
        for name in ("k1-compute", "k1-kl", "k4-kl", "k4-trailing", "k4-lora-guided")
    },
}  # fmt: skip
# Square points of a marker, of a picture of one multiply-add: the area is the cost.
_AREA = 0.6e-6


def draw_quality(results: Results, costs: dict[str, Any]) -> bool:
    """Plot coverage against accuracy, a point's area its multiply-adds a picture.

    Args:
        results: By row.
        costs: `rows` of the part `costs`.

    Returns:
        Whether there was anything to plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for label, names in KINDS.items():
        known = {n: text for n, text in names.items() if results.get(n) and n in costs}
        if not known:
            continue
        drawn = True
        sides = {
            figure_: [[100 * v for v in values(results[n], figure_)] for n in known]
            for figure_ in ("right", "coverage")
        }
        means = [[statistics.fmean(own) for own in side] for side in sides.values()]
        spreads = [
            [statistics.stdev(own) if len(own) > 1 else 0 for own in side]
            for side in sides.values()
        ]
        bars = axes.errorbar(*means, yerr=spreads[1], xerr=spreads[0], fmt="none", capsize=2, lw=1)
        colour = bars.lines[2][0].get_color()[0]
        areas = [_AREA * costs[n]["multiply_adds"] for n in known]
        axes.scatter(*means, s=areas, alpha=0.4, color=[colour], label=label)
        for x, y, text in zip(*means, known.values(), strict=True):
            axes.annotate(text, (x, y), xytext=(5, 6), textcoords="offset points", fontsize=8)
    if not drawn:
        return False
    axes.set_xlabel("pictures that are all right, %")
    axes.set_ylabel("coverage of what the prompt leaves open, % of the truth's")
    axes.grid(alpha=0.3)
    for handle in axes.legend(fontsize=8).legend_handles:
        handle.set_sizes([40])
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / QUALITY_IMAGE, dpi=110, metadata={"Software": None})
    return True


def draw_similarity(similarity: dict[str, Any]) -> None:
    """Plot the change from step to step, and the cosine with the first and the middle step."""
    from matplotlib.figure import Figure

    timesteps = similarity["timesteps"]
    middle = len(timesteps) // 2
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, colour in (("encoder", "tab:blue"), ("decoder", "tab:orange")):
        left.plot(timesteps[1:], similarity[part]["changes"], marker="o", ms=3, color=colour,
                  label=part)  # fmt: skip
        matrix = similarity[part]["cosines"]
        right.plot(timesteps, matrix[0], marker="o", ms=3, color=colour,
                   label=f"{part}, with t = {timesteps[0]}")  # fmt: skip
        right.plot(timesteps, matrix[middle], ls="--", color=colour,
                   label=f"{part}, with t = {timesteps[middle]}")  # fmt: skip
    left.set_ylabel("relative change to this step, |f' - f|² / |f|²")
    left.set_yscale("log")
    right.set_ylabel("cosine of features")
    for axes in (left, right):
        axes.set_xlabel("timestep (sampling goes to the right)")
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / SIMILARITY_IMAGE, dpi=110, metadata={"Software": None})
