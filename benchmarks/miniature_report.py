"""Writes docs/miniature.md from benchmarks/results/miniature; no number is typed by hand."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.miniature import (
    PROTOCOL,
    RECIPE,
    RESULTS,
    ROOT,
    ROWS,
    SEEDS,
    SHEETS,
    load_results,
)
from tiue.evaluate.result import LABELS
from tiue.evaluate.result import table as lay_out

PAGE = ROOT / "docs" / "miniature.md"
IMAGES = ROOT / "docs" / "images"
QUALITY, SIMILARITY = "miniature-quality.png", "miniature-similarity.png"
FIGURES = (*LABELS, "chroma")
NOT_RUN = "not run"
COMMAND = "command.json"

Results = dict[str, list[dict[str, Any]]]


def spread(results: list[dict[str, Any]], figure: str) -> tuple[float, float] | None:
    """Mean and standard deviation of one figure over seeds; None where no seed has it.

    Args:
        results: One of each seed.
        figure: Its name.

    Returns:
        The two; the deviation is NaN for one seed.
    """
    values = [r["figures"][figure] for r in results if figure in r["figures"]]
    if not values:
        return None
    scale = 1000 if figure == "kid" else 1
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return scale * statistics.fmean(values), scale * deviation


def cell(results: list[dict[str, Any]], figure: str) -> str:
    """A figure as mean and spread, to a fitting number of digits."""
    found = spread(results, figure)
    if found is None:
        return ""
    digits = 2 if figure == "kid" else 3
    mean, deviation = found
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def table_rows(results: Results, costs: dict[str, Any]) -> list[list[str]]:
    """Lines of the table: every row, `not run` where there is no result."""
    lines = []
    for name, row in ROWS.items():
        own = results.get(name, [])
        cost = costs.get(name, {})
        figures = [cell(own, figure) for figure in FIGURES] if own else [NOT_RUN] * len(FIGURES)
        training = "" if row.training is None else str((RECIPE | row.training)["steps"])
        if own and row.training is not None:
            training = str(own[0]["model"]["training"]["steps"])
        lines.append(
            [
                f"{row.label} (`{name}`)",
                str(len(own)) if own else "0",
                training,
                *figures,
                f"{cost['multiply_adds'] / 1e6:.0f} M" if "multiply_adds" in cost else "",
                f"{1e3 * cost['seconds']:.0f} ms" if "seconds" in cost else "",
            ]
        )
    return lines


HEADER = [
    *("row", "seeds", "training steps"),
    *(LABELS.get(figure, figure) for figure in FIGURES),
    *("multiply-adds", "time"),
]


def judge(results: Results, better: str, worse: str, figure: str) -> tuple[str, str]:
    """Whether one row's figure is better than another's by more than chance of the seeds.

    Args:
        results: By row.
        better: The row that the claim has ahead.
        worse: The other.
        figure: Its name.

    Returns:
        `agrees`, `does not agree`, `undecided` (closer than two standard errors of the difference)
        or `not run`, and the figures.
    """
    sides = [results.get(name, []) for name in (better, worse)]
    found = [spread(side, figure) for side in sides]
    if found[0] is None or found[1] is None or min(map(len, sides)) < 2:
        return NOT_RUN, ""
    (mean, deviation), (other, other_deviation) = found
    gap = (other - mean) if figure in ("fid", "kid") else (mean - other)
    error = math.sqrt(deviation**2 / len(sides[0]) + other_deviation**2 / len(sides[1]))
    evidence = (
        f"{LABELS.get(figure, figure)} {cell(sides[0], figure)} (`{better}`) against"
        f" {cell(sides[1], figure)} (`{worse}`)"
    )
    if abs(gap) <= 2 * error:
        return "undecided", evidence
    return ("agrees" if gap > 0 else "does not agree"), evidence


def keeps(results: Results, name: str, of: str, figure: str) -> tuple[str, str]:
    """Whether one row reaches nine tenths of another's figure: verdict and figures."""
    own, whole = spread(results.get(name, []), figure), spread(results.get(of, []), figure)
    if own is None or whole is None:
        return NOT_RUN, ""
    verdict = "agrees" if own[0] >= 0.9 * whole[0] else "does not agree"
    return verdict, f"{own[0]:.3f} of {whole[0]:.3f}, {own[0] / whole[0]:.0%}"


def claims(results: Results, similarity: dict[str, Any] | None) -> list[list[str]]:
    """The paper's claims, each with the verdict of this page's figures."""
    lines = []
    encoder_claim = "the encoder's features change less between timesteps than the decoder's"
    if similarity is None:
        lines.append([encoder_claim, NOT_RUN, ""])
    else:
        parts = {p: statistics.fmean(similarity[p]["changes"]) for p in ("encoder", "decoder")}
        lines.append(
            [
                encoder_claim,
                "agrees" if parts["encoder"] < parts["decoder"] else "does not agree",
                f"mean relative change {parts['encoder']:.4f} (encoder) and"
                f" {parts['decoder']:.4f} (decoder) a step",
            ]
        )
    pairs = [
        ("25 steps stay ahead of one pass (COCO: 9.6, 13.5)", "teacher-25", "student-k4", "fid"),
        ("one pass beats the teacher's own 4 steps", "student-k4", "teacher-4", "fid"),
        ("one pass needs distillation", "student-k4", "teacher-one-pass", "fid"),
        ("one pass needs distillation, K = 1", "student-k1", "teacher-one-pass-1", "fid"),
        ("K = 4 beats K = 1 (SwiftBrush)", "student-k4", "student-k1", "fid"),
        ("K = 4 beats K = 1 in precision", "student-k4", "student-k1", "precision"),
        ("K = 4 beats K = 1 in recall", "student-k4", "student-k1", "recall"),
        ("K = 4 beats K = 1, both distilled here", "k4", "k1", "fid"),
        ("K = 4 beats K = 2", "k4", "k2", "fid"),
        ("K = 8 beats K = 4", "k8", "k4", "fid"),
        ("the KL term at the published 0.1 helps", "k4-kl-0.1", "k4", "fid"),
        ("0.1 beats 0.01", "k4-kl-0.1", "k4-kl-0.01", "fid"),
        ("0.1 beats 1", "k4-kl-0.1", "k4-kl-1", "fid"),
    ]
    lines.append(
        [
            "one pass keeps nearly all of the teacher's recall (COCO: 0.48 of 0.50)",
            *keeps(results, "student-k4", "teacher-25", "recall"),
        ]
    )
    lines += [[text, *judge(results, *names)] for text, *names in pairs]
    return lines


def reading(results: Results) -> list[str]:
    """What the figures mean, as far as they hold: every sentence stands on a comparison."""

    def mean(name: str, figure: str) -> float | None:
        found = spread(results.get(name, []), figure)
        return found[0] if found else None

    lines = []
    own, student = mean("teacher-one-pass", "fid"), mean("student-k4", "fid")
    if own is not None and student is not None:
        headline, gain = (
            ("**The embedded teacher needs no distillation.**", "nothing")
            if own < student
            else ("**The embedded teacher hardly needs distillation.**", "little")
        )
        lines.append(
            f"{headline} One pass of its own weights has FID {own:.3f}, the shipped student's"
            f" {student:.3f}. A name decides an OpenMoji picture almost wholly, and the teacher has"
            " learnt all of them: its prediction at pure noise, asked for v, is already the"
            f" picture, where Stable Diffusion's is a blur. So {gain} is left for the student to"
            " gain. The embedded model shows that the method's path works; it cannot show that the"
            " method is needed."
        )
    chroma = {n: mean(n, "chroma") for n in ("autoencoder", "teacher-25", "student-k4")}
    if None not in chroma.values() and chroma["student-k4"] > 1.1 * chroma["teacher-25"]:
        lines.append(
            f"**The shipped student is oversaturated**, as the eye says: chroma"
            f" {chroma['student-k4']:.3f} against {chroma['teacher-25']:.3f} of the teacher and"
            f" {chroma['autoencoder']:.3f} of the pictures."
        )
    return lines + _rate_and_guidance(mean)


def _rate_and_guidance(mean: Callable[[str, str], float | None]) -> list[str]:
    """What learning rate and guidance do to a student, of the rows that have been run."""
    if mean("k4", "fid") is None:
        return []
    rate, steps = RECIPE["learning_rate"], RECIPE["steps"]
    settings = {
        "k4": f"at the recipe's {rate:g}, without guidance",
        "k4-guided": "the teacher guided by 2",
        "k4-both-guided": "the LoRA too",
        "k4-fast": "at 0.0003, without guidance",
        "k4-fast-guided": "at 0.0003, the teacher guided by 2",
    }
    figures = [
        f"{text}: {fid:.3f}, chroma {mean(name, 'chroma'):.3f} (`{name}`)"
        for name, text in settings.items()
        if (fid := mean(name, "fid")) is not None
    ]
    return [
        f"**Learning rate and guidance decide it.** Every student begins as the teacher; FID after"
        f" {steps} steps, {'; '.join(figures)}. Adam takes steps of the size of the rate however"
        " small the gradient is; the published rate is 1e-06, the published guidance 4.5, of"
        " teacher and LoRA alike."
    ]


def draw_quality(results: Results, costs: dict[str, Any]) -> bool:
    """Plot FID and recall against multiply-adds; False where there is nothing to plot."""
    from matplotlib.figure import Figure

    families = {
        "teacher, steps": [n for n in ROWS if n.startswith("teacher-") and n[8:].isdigit()],
        "shipped student, drawn with another K": [
            "student-drawn-1",
            "student-drawn-2",
            "student-k4",
            "student-drawn-8",
        ],
        "model card's one-step student": ["student-k1"],
        "distilled here": ["k1", "k2", "k4", "k8"],
        "teacher, LCM's sampler": ["teacher-lcm-4"],
        "teacher in one pass": ["teacher-one-pass-1", "teacher-one-pass"],
    }
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    drawn = False
    for axes, name in zip(figure.subplots(1, 2), ("fid", "recall"), strict=True):
        for label, members in families.items():
            points = [
                (costs[m]["multiply_adds"] / 1e6, *found, m)
                for m in members
                if m in costs and (found := spread(results.get(m, []), name)) is not None
            ]
            if not points:
                continue
            drawn = True
            xs, means, deviations, names = zip(*points, strict=True)
            errors = [0 if math.isnan(d) else d for d in deviations]
            axes.errorbar(xs, means, errors, marker="o", capsize=3, label=label)
            for x, y, member in zip(xs, means, names, strict=True):
                row = ROWS[member]
                text = f"K={row.num_decoder_steps}" if row.steps is None else str(row.steps)
                axes.annotate(text, (x, y), xytext=(4, 5), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("multiply-adds of the UNet a picture, M")
        axes.set_ylabel(LABELS[name] + (", lower is better" if name == "fid" else ""))
        axes.grid(alpha=0.3)
        if name == "fid" and drawn:
            axes.legend(fontsize=7)
    if drawn:
        figure.savefig(IMAGES / QUALITY, dpi=110, metadata={"Software": None})
    return drawn


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
    figure.savefig(IMAGES / SIMILARITY, dpi=110, metadata={"Software": None})


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _similarity_text(similarity: dict[str, Any]) -> str:
    student = similarity["student"]
    others = [student["cosines"][a][b] for a in range(len(student["cosines"])) for b in range(a)]
    coefficients = ", ".join(f"{value:.3f}" for value in student["noise_coefficients"])
    worst = min(others)
    verdict = (
        "Asked from one and the same encoder features, the decoder's rows give one and the same"
        " answer: K = 4 adds next to nothing to K = 1 here, and that is why their figures are so"
        " near."
        if worst > 0.99
        else "They are not one prediction K times."
    )
    return (
        f"Teacher, {similarity['steps']} steps, guidance {similarity['guidance_scale']:g},"
        f" {similarity['prompts']} prompts; every down block and the mid block against every up"
        " block, features of the half with the prompt.\n\n"
        f"![Similarity against timestep](images/{SIMILARITY})\n\n"
        f"The shipped student's {len(student['timesteps'])} predictions (timesteps"
        f" {student['timesteps']}, weights {coefficients}) have a mean cosine of"
        f" {statistics.fmean(others):.4f} with one another, {worst:.4f} at least. {verdict}"
    )


def page(results: Results, costs: dict[str, Any] | None, similarity: dict[str, Any] | None) -> str:
    """The page's text."""
    rows = (costs or {}).get("rows", {})
    drawn = bool(results) and draw_quality(results, rows)
    facts = next((r["extractors"]["features"] for own in results.values() for r in own), None)
    parts = [
        "# The paper in miniature",
        "`python -m benchmarks.miniature report` writes this page from"
        " `benchmarks/results/miniature/`; do not edit it. `... train ROW`, `... evaluate ROW`,"
        " `... costs` and `... similarity` make the results; a row without one says `not run`.",
        f"**Protocol.** {PROTOCOL.summary} KID over {PROTOCOL.kid_subsets} subsets of"
        f" {PROTOCOL.kid_subset_size}; k = {PROTOCOL.precision_k} for precision and recall,"
        f" {PROTOCOL.coverage_k} for density and coverage; LPIPS over"
        f" {PROTOCOL.diversity_images} pictures of each of {PROTOCOL.diversity_prompts} names, by"
        " the same network, uncalibrated. Mean and standard deviation over the seeds of the noise"
        f" ({', '.join(map(str, SEEDS))}); one training seed a row. `chroma` is the mean of"
        " max(R, G, B) - min(R, G, B). These figures compare the rows of this page with one"
        " another and nothing else: the features are not Inception's.",
    ]
    if facts:
        parts.append(
            f"**Feature network.** Trained in {facts['steps']} steps from seed {facts['seed']} by"
            " `python -m tiue.evaluate.openmoji_training`; it names"
            f" {facts['accuracy_pictures']:.1%} of the {facts['names']} pictures right among all"
            f" names, {facts['accuracy_disturbed']:.1%} of them turned, scaled, tinted and noisy,"
            f" and {facts['accuracy_autoencoder']:.1%} after the autoencoder, which it was never"
            " shown."
        )
    parts += [
        "## Where the miniature agrees with the paper",
        "`undecided`: the difference is under two standard errors over the noise's seeds; `not"
        " run`: a side has fewer than two of them. Every student is of one training seed, whose"
        " chance no figure here shows; the model card's K = 4 and K = 1 took 600 steps, those"
        f" distilled here {RECIPE['steps']}: they say something of the embedded model, little of"
        " the paper's. COCO figures: WaDi (CVPR 2026), table 1.",
        table(["claim", "verdict", "figures"], claims(results, similarity)),
        *reading(results),
        "## Quality and cost",
        table(HEADER, table_rows(results, rows)),
        "Multiply-adds are of the UNet for one picture, guidance included"
        " (`benchmarks/multiply_adds.py`); time is the median CPU time of one picture on one"
        " thread, text encoder and autoencoder included"
        + (f", on {costs['machine']['device']}" if costs else "")
        + ". Students of one K cost the same; the shipped one is timed."
        " Students distilled here: the shipped student's settings but for the number of steps,"
        f" batch {RECIPE['batch_size']}, and what the row names; from the shipped teacher.",
    ]
    if drawn:
        parts.append(f"![Quality against cost](images/{QUALITY})")
    parts.append("## Features across timesteps")
    if similarity is None:
        parts.append("Not run.")
    else:
        draw_similarity(similarity)
        parts.append(_similarity_text(similarity))
    command = _read(COMMAND)
    if command is not None:
        parts.append(
            "## What `tiue evaluate --model openmoji --preset openmoji` prints\n\n"
            f"```\n{lay_out(command)}\n```\n\n"
            f"{command['seconds']['generation']:.0f} s of drawing"
            f" ({command['drawn_now']} pictures) and {command['seconds']['metrics']:.0f} s of"
            f" features and metrics; the JSON is `benchmarks/results/miniature/{COMMAND}`. It draws"
            " in other batches than the table's row, so the last digits may differ."
        )
    sheets = [name for name in SHEETS if (sheet := _sheet(name)) and sheet.exists()]
    if sheets:
        parts.append("## Contact sheets\n\nThe first 20 names of the protocol, seed 0.")
        parts += [
            f"{ROWS[n].label}:\n\n![{ROWS[n].label}](images/{_sheet(n).name})" for n in sheets
        ]
    return "\n\n".join(parts) + "\n"


def _sheet(name: str) -> Path:
    return IMAGES / f"miniature-{name}.png"


def write() -> None:
    """Write the page and its plots."""
    text = page(load_results(), _read("costs.json"), _read("similarity.json"))
    PAGE.write_text(text, encoding="utf-8")
