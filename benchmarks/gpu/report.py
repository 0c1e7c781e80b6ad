"""Writes the readable report of `make gpu` from its JSON: failures first, then every figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.results import GREEN, goals
from benchmarks.measure.markdown import table

MARKS = {"passed": "passed", "failed": "**failed**", "not run": "not run"}
HEADER = [
    *("case", "form", "median", "range", "GB/s", "of copy", "TFLOP/s", "of product"),
    *("over eager", "over compile", "peak MiB", "tests"),
]


def markdown(result: dict[str, Any]) -> str:
    """Return the report.

    Args:
        result: What `benchmarks.gpu` writes as JSON.

    Returns:
        Markdown.
    """
    return "\n\n".join(_sections(result)) + "\n"


def _sections(result: dict[str, Any]) -> Iterator[str]:
    machine, commit = result["machine"], result["commit"]
    title = "Smoke run, no measurement" if result["smoke"] else "GPU run"
    yield f"# {title}: {machine['device']}"
    facts = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "device")
    changes = " with uncommitted changes" if commit["dirty"] else ""
    yield f"Commit {commit['id'][:12]}{changes}, {result['datetime']}; {facts}."

    parts = sorted(result["parts"], key=lambda part: part["status"] != "failed")
    rows = [
        [part["name"], MARKS[part["status"]], f"{part['seconds']:.0f} s", _cell(part["detail"])]
        for part in parts
    ]
    yield table(["part", "result", "time", "what it says"], rows)
    for part in result["parts"]:
        if part["status"] == "failed" and part.get("log_tail"):
            yield f"## Failed: {part['name']}\n\n```\n{part['log_tail'].strip()}\n```"

    if parity := result.get("parity"):
        yield from _parity(parity)
    if wrong := result.get("wrong"):
        lines = "\n".join(f"- {line}" for line in wrong)
        yield f"## Not timed, because wrong\n\n{lines}"
    if ceilings := result.get("ceilings"):
        products = ", ".join(
            f"{name} {value:.0f} TFLOP/s" for name, value in ceilings["matmul_tflop_s"].items()
        )
        yield (
            "## Ceilings\n\nMeasured in this run: a copy moves "
            f"{ceilings['copy_gb_s']:.0f} GB/s (read and written); a product reaches {products}."
        )
    operators = result.get("operators", [])
    if aims := goals(operators):
        yield "## Goals\n\n" + table(
            ["case", "goal", "measured", "met"],
            [[g["case"], g["goal"], f"{g['measured']:.2f}", _met(g["met"])] for g in aims],
        )
    if operators:
        yield (
            "## Operators\n\nK = 4, B = 1. Medians of rounds timed in turn, launches hidden, "
            "inputs out of L2. `tiue` is what is chosen by itself. Bytes and FLOPs are those that "
            "cannot be avoided (`testing/operators.py`), the same for every form. Where the "
            "tests are not green no speedup is given."
        )
    for operator in dict.fromkeys(row["operator"] for row in operators):
        for direction in ("forward", "backward"):
            chosen = [
                row
                for row in operators
                if row["operator"] == operator and row["direction"] == direction
            ]
            if chosen:
                yield f"### {operator}, {direction}\n\n{table(HEADER, [_row(r) for r in chosen])}"


def _parity(parity: dict[str, Any]) -> Iterator[str]:
    counts = ", ".join(f"{parity[name]} {name}" for name in ("passed", "failed", "skipped"))
    state = "" if parity["complete"] else " The time was up before all had run."
    yield f"## Tests\n\n{counts}.{state}"
    if parity["failures"]:
        yield "\n".join(f"- `{f['test']}`: {f['message']}" for f in parity["failures"])
    if parity["skips"]:
        rows = [[str(count), _cell(reason)] for reason, count in parity["skips"].items()]
        yield table(["skipped", "why"], rows)


def _row(row: dict[str, Any]) -> list[str]:
    def figure(name: str, pattern: str) -> str:
        return pattern.format(row[name]) if name in row else ""

    def speedup(rival: str) -> str:
        believed = row["gate"] in (GREEN, None)
        return figure(f"speedup_over_{rival}", "{:.2f} x") if believed else "not green"

    form = f"{row['form']} ({', '.join(row['backend'])})" if row["form"] == "tiue" else row["form"]
    return [
        f"{row['case']}, {row['dtype']}",
        form,
        _time(row["median_s"]),
        f"{_time(row['min_s'])} to {_time(row['max_s'])}",
        figure("gb_s", "{:.0f}"),
        figure("percent_of_copy", "{:.0f} %"),
        figure("tflop_s", "{:.1f}"),
        figure("percent_of_matmul", "{:.0f} %"),
        speedup("eager"),
        speedup("compile"),
        figure("peak_mib", "{:.0f}"),
        row["gate"] or "",
    ]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"


def _met(met: bool | None) -> str:
    return "tests not green" if met is None else "yes" if met else "**no**"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")
