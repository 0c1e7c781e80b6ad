"""Plots of the performance page, as PNG files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What a plot's axis shows, and what the other two are held at.
AXES = {
    "num_decoder_steps": ("K", "decoder steps K"),
    "batch": ("B", "batch B"),
    "latent_size": ("latents", "height and width of the latents"),
}
STEMS = ("time-against-", "roofline-")

Row = dict[str, Any]


def clear(folder: Path) -> None:
    """Remove the plots of an earlier report; what is no longer measured must not stay."""
    for stem in STEMS:
        for path in folder.glob(f"{stem}*.png"):
            path.unlink()


def series(rows: Iterable[Row], axis: str) -> dict[tuple[Any, ...], dict[str, dict[int, float]]]:
    """Medians along one axis, everything else held.

    Args:
        rows: `device`, `median` and the facts of one form of the one pass each.
        axis: A key of `AXES`.

    Returns:
        Medians by what is held (device, model, dtype, then the other axes), form and place on the
        axis; only where a form has two places at least.
    """
    others = [name for name in AXES if name != axis]
    found: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        held = (row["device"], row["model"], row["dtype"], *(row[name] for name in others))
        found.setdefault(held, {}).setdefault(row["form"], {})[row[axis]] = row["median"]
    kept = {
        held: {form: points for form, points in forms.items() if len(points) > 1}
        for held, forms in found.items()
    }
    return {held: forms for held, forms in kept.items() if forms}


def draw_times(rows: list[Row], folder: Path) -> list[tuple[str, str]]:
    """Draw time against K, batch and resolution, as far as there are data.

    Args:
        rows: As `series` takes them.
        folder: Of the images.

    Returns:
        Caption and file name of each plot.
    """
    drawn = []
    for axis, (short, label) in AXES.items():
        others = [AXES[name][0] for name in AXES if name != axis]
        for held, forms in sorted(series(rows, axis).items()):
            device, model, dtype, *places = held
            fixed = ", ".join(
                f"{name} = {place}" for name, place in zip(others, places, strict=True)
            )
            caption = f"{model}, {dtype}, {fixed}, on {device}"
            name = f"{STEMS[0]}{short}-{_slug(caption)}.png"
            figure, axes = _figure(caption, label, "seconds, median")
            for form, points in forms.items():
                xs, times = zip(*sorted(points.items()), strict=True)
                axes.plot(xs, times, marker="o", label=form)
            axes.set_ylim(bottom=0)
            axes.set_xticks(sorted({place for points in forms.values() for place in points}))
            _save(figure, axes, folder / name)
            drawn.append((f"Time against {label}: {caption}", name))
    return drawn


def draw_roofline(gpu: dict[str, Any], folder: Path) -> tuple[str, str] | None:
    """Draw what the operators reach under the ceilings of one GPU.

    Args:
        gpu: What `make gpu` writes.
        folder: Of the images.

    Returns:
        Caption and file name, or None where nothing of it was measured.
    """
    ceilings = gpu.get("ceilings")
    rows = [row for row in gpu.get("operators", []) if row.get("flops") and row["form"] == "tiue"]
    if not ceilings or not rows:
        return None
    device = gpu["machine"]["device"]
    caption = f"Roofline of {device}: FLOPs and bytes that cannot be avoided"
    name = f"{STEMS[1]}{_slug(device)}.png"
    figure, axes = _figure(caption, "FLOP a byte", "TFLOP/s")
    intensity = sorted(row["flops"] / row["bytes"] for row in rows)
    ends = [intensity[0] / 4, intensity[-1] * 4]
    for dtype in sorted({row["dtype"] for row in rows}):
        peak, copy = ceilings["matmul_tflop_s"][dtype], ceilings["copy_gb_s"] / 1e3
        knee = sorted([*ends, peak / copy])
        axes.plot(knee, [min(peak, copy * x) for x in knee], label=f"ceiling, {dtype}")
    for direction in ("forward", "backward"):
        chosen = [row for row in rows if row["direction"] == direction]
        xs = [row["flops"] / row["bytes"] for row in chosen]
        axes.plot(xs, [row["tflop_s"] for row in chosen], "o", label=direction)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _save(figure, axes, folder / name)
    return caption, name


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no state of pyplot's, no display

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib, the same data give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
