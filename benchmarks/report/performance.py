"""Writes docs/performance.md and the README's table from the results; no number is typed by hand.

Run as `python -m benchmarks.report`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import bench_host, end_to_end, launches, multiply_adds, transformer_counts
from benchmarks import load as serving
from benchmarks.forms.rivals import FORMS
from benchmarks.measure import counted
from benchmarks.measure.markdown import seconds, table
from benchmarks.report import plots
from testing.configs import COUNTED

ROOT = Path(__file__).resolve().parents[2]
START, END = "<!-- performance: python -m benchmarks.report -->", "<!-- /performance -->"
NOTHING = "No results are committed yet: `make bench` makes them."
NOT_MEASURED = "Not measured."
OURS = "tiue"
PROTOCOL = """\
`make bench` times a machine's CPU, `make gpu` its NVIDIA GPU, and `python -m benchmarks.report` \
writes this page from `benchmarks/results/`; do not edit it.

All forms of a case run in one process on one set of random weights of the published size, in one \
dtype. Each is first compared with the published form's output, which is also its warm-up; one \
that is wrong is not timed. Then rounds are timed in turn, A B, B A, A B, so that a busy machine \
slows all alike. Medians are compared. `difference` is the largest one, relative to the largest \
output. `of product` is twice the multiply-adds over the time, in percent of a large matrix \
product of torch's on the same machine, which is no upper bound: convolutions and OpenVINO have \
products of their own, and Winograd's form needs fewer multiplications than the direct one, which \
is counted. CPU times are wall clock; GPU times are CUDA events, \
inputs out of L2. Memory is over the weights: on a GPU what one call allocates at most, on a CPU \
by how much a fresh process grows until its first pass is done."""

TRAINING = (
    "Forward and backward of the student, all weights trained; `tiue-recompute` computes the first "
    "product of the feed-forwards again in backward."
)

Result = dict[str, Any]
Cases = dict[str, dict[str, dict[str, Any]]]


def load(results: Path) -> Iterator[Result]:
    """Yield every result file, ordered by device, then by benchmark.

    Args:
        results: The folder of `<device>/<benchmark>.json`.

    Yields:
        pytest-benchmark's JSON, with the benchmark's name added under `title`.
    """
    for path in sorted(results.glob("*/bench_*.json")):
        yield json.loads(path.read_text(encoding="utf-8")) | {"title": path.stem}


def load_named(results: Path, name: str) -> list[Result]:
    """What `make gpu` (gpu.json) or `python -m benchmarks.load` (load.json) wrote, by device."""
    files = sorted(results.glob(f"*/{name}"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def cases(result: Result) -> Cases:
    """Sort one file's benchmarks by case and form."""
    found: Cases = {}
    for row in result["benchmarks"]:
        info = row["extra_info"]
        found.setdefault(info["case"], {})[info["form"]] = row
    return found


def _median(row: dict[str, Any]) -> float:
    return row["stats"]["median"]


def _best(forms: dict[str, dict[str, Any]], stem: str) -> dict[str, Any] | None:
    """The fastest form of a family: `tiue`, or what a user could have instead."""
    family = [row for name, row in forms.items() if name.partition("-")[0] == stem]
    return min(family, key=_median, default=None)


def race_rows(result: Result) -> list[list[str]]:
    """Lines of one file: case, form, times and what else was noted."""
    rows = []
    for case, forms in cases(result).items():
        published = forms.get("published") or _best(forms, "published") or forms.get("repeated")
        for form, row in forms.items():
            stats, info = row["stats"], row["extra_info"]
            share = ""
            if info.get("matmul_tflop_s") and "gmac_s" in info:
                share = f"{2e-3 * info['gmac_s'] / info['matmul_tflop_s']:.0%}"
            peak = info.get("peaks_mib", {}).get(form)
            rows.append(
                [
                    f"{case}, {info['dtype']}",
                    form,
                    seconds(stats["median"]),
                    f"{seconds(stats['min'])} to {seconds(stats['max'])}",
                    str(stats["rounds"]),
                    f"{_median(published) / stats['median']:.2f} x" if published else "",
                    f"{info['relative_difference']:.1e}" if info.get("relative_difference") else "",
                    f"{info['multiply_adds'] / 1e9:.0f} G" if "multiply_adds" in info else "",
                    share,
                    f"{peak:.0f} MiB" if peak is not None else "",
                ]
            )
    return rows


RACE_HEADER = [
    *("case", "form", "median", "range", "rounds", "over published", "difference"),
    *("multiply-adds", "of product", "memory"),
]


def race_section(results: list[Result], stem: str) -> Iterator[str]:
    """Tables of every file of one benchmark, each with its machine and commit."""
    chosen = [result for result in results if result["title"].startswith(stem)]
    if not chosen:
        yield NOT_MEASURED
    for result in chosen:
        yield f"### {result['title']} on {result['machine_info']['device']}"
        yield provenance(result)
        rows = race_rows(result)
        used = [i for i in range(len(RACE_HEADER)) if any(row[i] for row in rows)]
        yield table([RACE_HEADER[i] for i in used], [[row[i] for i in used] for row in rows])
        notes = (
            *(convolution_lines, allocator_lines, share_lines, memory_lines),
            *(saved_lines, not_run_lines),
        )
        if lines := [line for note in notes for line in note(result)]:
            yield "\n".join(lines)


def provenance(result: Result) -> str:
    """Commit, date and machine of one file."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine_info"].items())
    changes = " with uncommitted changes" if result["commit_info"]["dirty"] else ""
    commit = f"{result['commit_info']['id'][:12]}{changes}"
    return f"Commit {commit}, {result['datetime'][:10]}; {machine}."


def convolution_lines(result: Result) -> Iterator[str]:
    """Whether ours had Winograd's convolutions."""
    found = {row["extra_info"].get("winograd") for row in result["benchmarks"]}
    if True in found:
        yield "- `tiue` runs 3 x 3 convolutions as Winograd's where that is faster."
    elif False in found:
        yield "- `tiue` runs direct convolutions: Winograd's library is not built here."


def allocator_lines(result: Result) -> Iterator[str]:
    """Whether the process kept the memory that it freed."""
    if any(row["extra_info"].get("keeps_freed_memory") for row in result["benchmarks"]):
        yield (
            "- The process kept the memory that it freed, for every form alike, as `tiue distill` "
            "does on a CPU."
        )


def share_lines(result: Result) -> Iterator[str]:
    """What our form spends its time on."""
    for row in result["benchmarks"]:
        info = row["extra_info"]
        if shares := info.get("time_shares"):
            parts = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
            yield f"- Time of {info['form']}, {info['case']} (one call, profiled): {parts}."


def memory_lines(result: Result) -> Iterator[str]:
    """How much less memory ours takes than the published form, timed or not."""
    for case, forms in cases(result).items():
        info = next(iter(forms.values()))["extra_info"]
        peaks = info.get("peaks_mib", {})
        if "published" in peaks:
            others = [
                f"{form} {peak:.0f} MiB ({peak / peaks['published']:.2f} x)"
                for form, peak in peaks.items()
                if form != "published"
            ]
            meaning = info.get("peak_of", "allocated over the weights")
            figures = ", ".join([f"published {peaks['published']:.0f} MiB", *others])
            yield f"- Memory of {case} ({meaning}): {figures}."


def saved_lines(result: Result) -> Iterator[str]:
    """Bytes that the decoder keeps for backward."""
    for case, forms in cases(result).items():
        saved = {
            form: row["extra_info"]["saved_mib"]
            for form, row in forms.items()
            if "saved_mib" in row["extra_info"]
        }
        if saved:
            figures = ", ".join(f"{form} {size:.0f} MiB" for form, size in saved.items())
            yield f"- The decoder of {case} keeps for backward (counted, not timed): {figures}."


def not_run_lines(result: Result) -> Iterator[str]:
    """Why forms were not run."""
    reasons = {
        (form, reason)
        for row in result["benchmarks"]
        for form, reason in row["extra_info"].get("not_run", {}).items()
    }
    for form, reason in sorted(reasons):
        yield f"- Not run: {form}. {reason}."


def pipeline_section(results: list[Result]) -> Iterator[str]:
    """The embedded model: time a picture, and the share of each stage."""
    chosen = [result for result in results if result["title"] == "bench_pipeline"]
    if not chosen:
        yield NOT_MEASURED
    for result in chosen:
        rows, header = [], []
        for row in result["benchmarks"]:
            info, median = row["extra_info"], _median(row)
            header = ["on", "B", "a picture", *info["stages_s"]]
            shares = [f"{part / median:.0%}" for part in info["stages_s"].values()]
            device = result["machine_info"]["device"]
            rows.append([device, str(info["batch"]), seconds(median), *shares])
        yield f"{provenance(result)} The decoder's stage ends with the combined latents."
        yield table(header, rows)


def _compared(name: str, folder: Path) -> Iterator[tuple[str, Result]]:
    """A counted result and the one that it is held against, each with what to call it."""
    for stem, label in ((f"{name}_before", "Before"), (name, "Now")):
        if result := counted.read_result(stem, folder):
            yield f"{label}: commit {result['commit']}, torch {result['torch']}.", result


def launches_section(folder: Path) -> Iterator[str]:
    """Kernels and bytes of every form, before and now."""
    yield (
        "One pass at fp16, B = 1, K = 4, recorded on tensors without data "
        "(`python -m benchmarks.launches`); bytes in GB (10^9), every kernel's inputs read once "
        "and its outputs written once. cuDNN's own conversions of layouts are not counted."
    )
    found = list(_compared("launches", folder))
    if not found:
        yield NOT_MEASURED
    for label, result in found:
        for model, forms in result["models"].items():
            yield f"{label} {model}:"
            yield table(launches.HEADER, launches.rows(forms))
    if found:
        _, result = found[-1]
        for layout in launches.LAYOUTS:
            entry = result["models"].get("sd15", {}).get(OURS, {}).get(layout, {})
            if lines := launches.kind_rows(entry):
                yield f"Kinds of kernels of `{OURS}`, sd15, {layout}:"
                yield table(launches.KIND_HEADER, lines)
        yield "\n".join(launches.against_goals(result["models"]))


def host_section(folder: Path) -> Iterator[str]:
    """What the host takes for a pass and an operator, before and now."""
    yield (
        "Processor time of one thread with channels so few that computing takes next to nothing "
        "(`python -m benchmarks.bench_host`): sd15's layers at 32 channels, eager, on a CPU; and "
        "operators down to Triton's launch with a driver that does nothing, on a published size."
    )
    found = list(_compared("host", folder))
    if not found:
        yield NOT_MEASURED
    for label, result in found:
        yield label
        yield table(bench_host.PASS_HEADER, bench_host.pass_rows(result))
        yield table(bench_host.OPERATOR_HEADER, bench_host.operator_rows(result))
    if found:
        yield bench_host.against_goal(found[-1][1])


def gpu_section(gpus: list[Result], folder: Path) -> Iterator[str]:
    """Rooflines, and where the operators' figures are."""
    if not gpus:
        yield NOT_MEASURED
    for gpu in gpus:
        yield f"`gpu.md` beside the results of {gpu['machine']['device']} has every operator."
        if drawn := plots.draw_roofline(gpu, folder):
            yield _image(drawn)


def losses(results: list[Result], gpus: list[Result]) -> Iterator[str]:
    """Every case in which something else is faster than our best form, or takes less memory."""
    for result in results:
        device = result["machine_info"]["device"]
        for case, forms in cases(result).items():
            ours = _best(forms, OURS)
            peaks = ours["extra_info"].get("peaks_mib", {}) if ours else {}
            published, own = (peaks.get(form, 0.0) for form in ("published", OURS))
            if own > published > 0:
                yield (
                    f"- {result['title']}, {case}, {device}: memory over the weights, published "
                    f"{published:.0f} MiB, {OURS} {own:.0f} MiB, {own / published:.2f} x."
                )
            for form, row in forms.items():
                if ours and form.partition("-")[0] != OURS and _median(row) < _median(ours):
                    yield (
                        f"- {result['title']}, {case}, {device}: {form} takes "
                        f"{seconds(_median(row))}, {ours['extra_info']['form']} "
                        f"{seconds(_median(ours))}, {_median(ours) / _median(row):.2f} x as long."
                    )
    for gpu in gpus:
        for row in gpu.get("operators", []):
            for rival in ("eager", "compile"):
                ratio = row.get(f"speedup_over_{rival}", 1.0)
                if row["form"] == OURS and ratio < 1:
                    yield (
                        f"- {row['operator']} {row['case']} {row['direction']}, "
                        f"{gpu['machine']['device']}: {ratio:.2f} x the speed of {rival}."
                    )


def performance_page(
    results: list[Result],
    gpus: list[Result],
    folder: Path,
    counted_folder: Path = counted.FOLDER,
    loads: list[Result] | None = None,
    ends: list[Result] | None = None,
) -> str:
    """Return docs/performance.md, its plots drawn.

    Args:
        results: What `load` yields.
        gpus: Of `make gpu`.
        folder: Of the images.
        counted_folder: Of the results of `benchmarks.launches` and `benchmarks.bench_host`.
        loads: Of `benchmarks.load`.
        ends: Of `benchmarks.end_to_end`.

    Returns:
        The page as Markdown.
    """
    plots.clear(folder)
    parts = ["# Performance", "## Protocol", PROTOCOL]
    parts += [f"- `{name}`: {form.meaning}" for name, form in FORMS.items()]
    parts[3:] = ["\n".join(parts[3:])]
    parts += [
        "## Multiply-adds, without a clock",
        "In G (10^9), K = 4, B = 1, counted on tensors without data "
        "(`python -m benchmarks.multiply_adds`); convolutions count as direct ones, those of 1 x 1 "
        "as linear.",
    ]
    for model, size in COUNTED.items():
        parts += [
            f"### {model}, {size} x {size} latents",
            table(multiply_adds.HEADER, multiply_adds.rows(model, size)),
        ]
    parts += ["## Kernels and bytes on a GPU, without one", *launches_section(counted_folder)]
    parts += ["## What the host does", *host_section(counted_folder)]
    parts += ["## One pass", *race_section(results, "bench_one_pass")]
    parts += ["## End to end, against what others take", *end_to_end.section(ends or [])]
    drawn = plots.draw_times(one_pass_rows(results), folder)
    parts += [
        "## Against K, batch and resolution",
        *(map(_image, drawn) if drawn else [NOT_MEASURED]),
    ]
    for title, stem in (("Blocks", "bench_block"), ("Training step", "bench_train_step")):
        parts += [f"## {title}", *race_section(results, stem)]
    parts += ["## Transformers", *transformer_counts.section(counted_folder)]
    parts += race_section(results, "bench_transformer")
    parts += ["## The embedded model", *pipeline_section(results)]
    parts += ["## Serving", *serving.section(loads or [])]
    parts += ["## GPU", *gpu_section(gpus, folder)]
    lost = "\n".join(losses(results, gpus))
    nowhere = "Nowhere in what was measured." if results or gpus else NOT_MEASURED
    parts += ["## Where we lose", lost or nowhere]
    return "\n\n".join(parts) + "\n"


def one_pass_rows(results: list[Result]) -> list[dict[str, Any]]:
    """Facts and median of every form of every case of the one pass."""
    return [
        row["extra_info"] | {"device": result["machine_info"]["device"], "median": _median(row)}
        for result in results
        if result["title"].startswith("bench_one_pass")
        for row in result["benchmarks"]
    ]


def _image(drawn: tuple[str, str]) -> str:
    caption, name = drawn
    return f"![{caption}](images/{name})"


def readme_block(results: list[Result]) -> str:
    """Return the README's table: our best form against the published one and what else was raced.

    Args:
        results: What `load` yields.

    Returns:
        Markdown: a table, or a sentence that says that there are no results; and multiply-adds.
    """
    rows = []
    for result in results:
        if result["title"] != "bench_one_pass":
            continue
        for case, forms in cases(result).items():
            published, ours = forms.get("published"), _best(forms, OURS)
            if published is None or ours is None:
                continue
            openvino = forms.get("published-openvino")
            times = [seconds(_median(row)) if row else "" for row in (published, openvino, ours)]
            info = ours["extra_info"]
            install = "`pip install .`" + (" with a C++ compiler" if info.get("winograd") else "")
            peaks = [info.get("peaks_mib", {}).get(form) for form in ("published", info["form"])]
            rows.append(
                [
                    f"{case}, {info['dtype']}",
                    result["machine_info"]["device"],
                    install,
                    *times,
                    f"{_median(published) / _median(ours):.2f} x",
                    *(NOT_MEASURED if peak is None else f"{peak:.0f} MiB" for peak in peaks),
                ]
            )
    header = ["one pass", "device", "install", "published form", "the same in OpenVINO", "TiUE"]
    header += ["speedup", "published form's memory", "TiUE's"]
    return "\n\n".join([table(header, rows) if rows else NOTHING, multiply_adds_sentence()])


@cache
def multiply_adds_sentence() -> str:
    """One sentence on multiply-adds."""
    totals = {
        form: sum(part.total for part in multiply_adds.count(form, "sd21").values())
        for form in multiply_adds.FORMS
    }
    figures = {form: f"{total / 1e9:,.0f} G" for form, total in totals.items()}
    return (
        f"Without a clock, SD 2.1-base at 512 x 512: {figures['tiue']} multiply-adds for one pass "
        f"at K = 4, the published form {figures['published']}, plain sampling "
        f"{figures['full-steps']}, a one-step UNet {figures['one-step']} "
        "(`python -m benchmarks.multiply_adds --model sd21`)."
    )


def replace_block(text: str, block: str) -> str:
    """Put a block between the README's two markers.

    Args:
        text: The README.
        block: What stands between the markers afterwards.

    Returns:
        The new README.

    Raises:
        ValueError: A marker is missing.
    """
    if START not in text or END not in text:
        raise ValueError(f"README.md needs the markers {START} and {END}")
    pattern = re.escape(START) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{START}\n{block}\n{END}", text, flags=re.DOTALL)


def main(root: Path = ROOT) -> None:
    """Rewrite docs/performance.md, its plots and the README's table.

    Args:
        root: The checkout.
    """
    folder = root / "benchmarks" / "results"
    results, gpus = list(load(folder)), load_named(folder, "gpu.json")
    readme = root / "README.md"
    new_readme = replace_block(readme.read_text(encoding="utf-8"), readme_block(results))
    loads = load_named(folder, "load.json")
    ends = load_named(folder, "end_to_end.json")
    images = root / "docs" / "images"
    page = performance_page(results, gpus, images, folder / "counted", loads, ends)
    (root / "docs" / "performance.md").write_text(page, encoding="utf-8")
    readme.write_text(new_readme, encoding="utf-8")
