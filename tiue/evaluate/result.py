"""What an evaluation leaves: one JSON, a table of it, and the comparison of two."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from tiue.errors import InputError, OutputError
from tiue.evaluate.protocol import METRICS
from tiue.files import write_json

FORMAT = 1
PACKAGES = ("tiue", "torch", "diffusers", "transformers", "torchmetrics", "prdc", "pillow")
LABELS = {
    "fid": "FID",
    "kid": "KID x 1000",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "clip_score": "CLIP score",
    "lpips_diversity": "LPIPS diversity",
}
# Of the scenes preset, over all of its prompts.
SCENE_LABELS = {
    "scene_right": "all right",
    "scene_objects": "objects right",
    "scene_count": "count right",
    "scene_relation": "relation right",
    "scene_ground": "ground right",
    "scene_size": "sizes right",
    "scene_coverage": "open: coverage",
    "scene_entropy": "open: entropy",
    "scene_energy": "energy distance",
}
LOWER_IS_BETTER = ("fid", "kid", "scene_energy")
# Of the inputs, what must be equal for two figures to be comparable.
COMPARABLE = ("protocol", "extractors", "counts", "prompts_sha256", "reference")

Result = dict[str, Any]


def versions() -> dict[str, str]:
    """The versions that figures may depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save_result(result: Result, path: Path) -> None:
    """Write a result, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def load_result(path: Path) -> Result:
    """Read a result.

    Args:
        path: What `tiue evaluate` wrote.

    Returns:
        It.

    Raises:
        InputError: It is missing, or no result of this format.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["format"] == FORMAT and isinstance(result["figures"], dict):
            return result
        reason = f"format {result['format']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error)
    raise InputError(f"{path} is no result of `tiue evaluate` ({reason}): evaluate again")


def format_figure(metric: str, figures: dict[str, float], suffix: str = "") -> str:
    """A figure for a table, in the unit of its label."""
    value = figures[metric + suffix] * (1000 if metric == "kid" else 1)
    return f"{value:.3f}" if metric != "clip_score" else f"{value:.4f}"


def table(result: Result) -> str:
    """Lay a result out for a reader.

    Args:
        result: Of `tiue evaluate`.

    Returns:
        Lines: protocol, model, counts, and every metric with its value or why there is none.
    """
    protocol, counts = result["protocol"], result["counts"]
    lines = [
        f"protocol   {protocol['name']}: {protocol['summary']}",
        f"model      {_words(result['model'])}",
        f"pictures   {counts['generated']} against {counts['reference']}"
        + (f", {counts['skipped']} files skipped" if counts["skipped"] else ""),
        "",
    ]
    for metric in METRICS:
        label = f"{LABELS[metric]:16}"
        if metric in result["figures"]:
            value = format_figure(metric, result["figures"])
            if f"{metric}_deviation" in result["figures"]:
                deviation = format_figure(metric, result["figures"], "_deviation")
                value += f"  (deviation {deviation}, {_DEVIATIONS[metric]})"
            lines.append(f"{label} {value}")
        else:
            reason = result["not_computed"].get(metric, "not asked for")
            lines.append(f"{label} not computed: {reason}")
    if "scenes" in result:
        from tiue.evaluate.scenes_preset import scene_table

        lines += ["", scene_table(result["scenes"])]
    return "\n".join(lines)


_DEVIATIONS = {
    "kid": "over subsets",
    "clip_score": "over pictures",
    "lpips_diversity": "over prompts",
}


def _words(facts: dict[str, Any]) -> str:
    shown = {n: v for n, v in facts.items() if not n.endswith("sha256")}
    name = shown.pop("model", None) or shown.pop("folder", "")
    return ", ".join([str(name), *(f"{n} {v}" for n, v in shown.items())])


def differences(first: Result, second: Result) -> list[str]:
    """Name what keeps two results' figures from being compared, with both values."""
    found = []
    for part in COMPARABLE:
        one, other = first.get(part), second.get(part)
        if not isinstance(one, dict) or not isinstance(other, dict):
            one, other = {part: one}, {part: other}
        for name in sorted({*one, *other}):
            if one.get(name) != other.get(name):
                found.append(f"{name} ({one.get(name)}, {other.get(name)})")
    return found


def compare(first: Result, second: Result, anyway: bool = False) -> str:
    """Lay two results side by side.

    Args:
        first: Of `tiue evaluate`.
        second: Likewise.
        anyway: Also where their protocols or inputs differ; the table then says so.

    Returns:
        Lines: both models, every metric that both have, the difference, and which is better.

    Raises:
        InputError: The figures are not comparable; the message names what differs.
    """
    differing = differences(first, second)
    if differing and not anyway:
        raise InputError(
            f"these figures cannot be compared: they differ in {'; '.join(differing)}. Evaluate"
            " both under one protocol, or print them side by side with --anyway."
        )
    lines = [
        f"a          {_words(first['model'])}",
        f"b          {_words(second['model'])}",
        f"protocol   {first['protocol']['name']}: {first['protocol']['summary']}",
        *(f"DIFFERENT  {line}" for line in differing),
        "",
        f"{'':16} {'a':>10} {'b':>10} {'b - a':>10}",
    ]
    pair = [result["figures"] for result in (first, second)]
    shown = {metric for figures in pair for metric in figures}
    labels = LABELS | {n: label for n, label in SCENE_LABELS.items() if n in shown}
    for metric, label in labels.items():
        if not all(metric in figures for figures in pair):
            lines.append(f"{label:16} not in both")
            continue
        scale = 1000 if metric == "kid" else 1
        gap = scale * (pair[1][metric] - pair[0][metric])
        a, b = (format_figure(metric, figures) for figures in pair)
        better = "" if gap == 0 else "b" if (gap < 0) == (metric in LOWER_IS_BETTER) else "a"
        verdict = f"  {better} is better" if better and metric != "lpips_diversity" else ""
        lines.append(f"{label:16} {a:>10} {b:>10} {gap:>+10.3f}{verdict}")
    return "\n".join(lines)
