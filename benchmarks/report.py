"""Writes docs/performance.md and the README's table from the results; no number is typed by hand.

Run as `python -m benchmarks.report`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.markdown import seconds, table

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- performance: python -m benchmarks.report -->", "<!-- /performance -->"
NOTHING = "No results are committed yet: `make bench` makes them."


def load(results: Path) -> Iterator[dict[str, Any]]:
    """Yield every result file, ordered by device, then by benchmark.

    Args:
        results: The folder of `<device>/<benchmark>.json`.

    Yields:
        pytest-benchmark's JSON, with the benchmark's name added under `title`.
    """
    for path in sorted(results.glob("*/bench_*.json")):
        yield json.loads(path.read_text(encoding="utf-8")) | {"title": path.stem}


def cases(result: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Sort one file's benchmarks by case and form."""
    sorted_cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["benchmarks"]:
        info = row["extra_info"]
        sorted_cases.setdefault(info["case"], {})[info["form"]] = row
    return sorted_cases


def full_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for case, forms in cases(result).items():
        for form, row in forms.items():
            stats, info = row["stats"], row["extra_info"]
            peak = f"{info['peak_mib']:.0f} MiB" if "peak_mib" in info else "not measured"
            rows.append(
                [
                    f"{case}, {info['dtype']}",
                    form,
                    seconds(stats["median"]),
                    f"{seconds(stats['min'])} to {seconds(stats['max'])}",
                    str(stats["rounds"]),
                    f"{info['speedup_over_published']:.2f} x",
                    f"{info['relative_difference']:.1e}",
                    peak,
                ]
            )
    return rows


def performance_page(results: list[dict[str, Any]]) -> str:
    """Return docs/performance.md.

    Args:
        results: What `load` yields.

    Returns:
        The page as Markdown.
    """
    parts = [
        "# Performance",
        "Written by `python -m benchmarks.report` from `benchmarks/results/`; do not edit. "
        "`make bench` measures this machine and writes this page anew.",
        "`published` repeats every skip, hidden state and text embedding K times; `tiue` computes "
        "the same numbers with what does not depend on the timestep computed once. Rounds of the "
        "two are timed in turn in one process, after their outputs have been compared; "
        "the difference is the largest one, relative to the largest output.",
    ]
    for result in results:
        machine = ", ".join(f"{key} {value}" for key, value in result["machine_info"].items())
        commit = result["commit_info"]["id"][:12]
        changes = " with uncommitted changes" if result["commit_info"]["dirty"] else ""
        header = ["case", "form", "median", "range", "rounds", "speedup", "difference", "peak"]
        parts += [
            f"## {result['title']} on {result['machine_info']['device']}",
            f"Commit {commit}{changes}, {result['datetime'][:10]}; {machine}.",
            table(header, full_rows(result)),
        ]
    return "\n\n".join(parts if results else [*parts, NOTHING]) + "\n"


def readme_block(results: list[dict[str, Any]]) -> str:
    """Return the README's table: both forms' medians, and their ratio, for every case.

    Args:
        results: What `load` yields.

    Returns:
        Markdown, or a sentence that says that there are no results.
    """
    rows = []
    for result in results:
        for case, forms in cases(result).items():
            if {"published", "tiue"} <= forms.keys():
                published, ours = forms["published"], forms["tiue"]
                rows.append(
                    [
                        f"{case}, {ours['extra_info']['dtype']}",
                        result["machine_info"]["device"],
                        seconds(published["stats"]["median"]),
                        seconds(ours["stats"]["median"]),
                        f"{ours['extra_info']['speedup_over_published']:.2f} x",
                    ]
                )
    header = ["one pass, K = 4, batch 1", "device", "published form", "TiUE", "speedup"]
    return table(header, rows) if rows else NOTHING


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
    """Rewrite docs/performance.md and the README's table.

    Args:
        root: The checkout.
    """
    results = list(load(root / "benchmarks" / "results"))
    readme = root / "README.md"
    new_readme = replace_block(readme.read_text(encoding="utf-8"), readme_block(results))
    (root / "docs" / "performance.md").write_text(performance_page(results), encoding="utf-8")
    readme.write_text(new_readme, encoding="utf-8")


if __name__ == "__main__":
    main()
