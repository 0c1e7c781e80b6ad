"""Reads what the parts of `make gpu` leave behind, and says which timings may be believed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from testing.operators import OPERATORS, kernel_backends
from tiue_kernels import dispatch

GREEN, RED, UNTESTED = "green", "red", "not tested"
STATISTICS = ("median", "min", "max", "rounds")


def read_junit(path: Path) -> dict[str, Any]:
    """Sum up pytest's JUnit file.

    Args:
        path: The file; pytest writes it at its end, also where it was interrupted.

    Returns:
        `tests`, `passed`, `failed` and `skipped` as counts, `failures` (test and first line of the
        message) and `skips` (count by reason).
    """
    failures: list[dict[str, str]] = []
    skips: Counter[str] = Counter()
    tests = 0
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        tests += 1
        broken = [child for child in case if child.tag in ("failure", "error")]
        if broken:
            message = (broken[0].get("message") or broken[0].text or "").strip()
            first = message.splitlines()[0] if message else "no message"
            failures.append({"test": case.get("name", ""), "message": first})
        else:
            for child in case:
                if child.tag == "skipped":
                    reason = (child.get("message") or "").strip().splitlines()
                    skips[reason[0] if reason else "no reason"] += 1
    skipped = sum(skips.values())
    return {
        "tests": tests,
        "passed": tests - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
        "skips": dict(skips),
    }


def subject(test: str) -> tuple[str | None, str | None]:
    """Operator and backend that a test's id names, None where it names none."""
    words = test.partition("[")[2].rstrip("]").split("-")
    operator = next((word for word in words if word in OPERATORS), None)
    backend = next((word for word in words if word in dispatch.PREFERENCE), None)
    return operator, backend


def gate(operator: str, form: str, parity: dict[str, Any] | None) -> str | None:
    """Whether the tests stand behind one form of an operator.

    Args:
        operator: A key of `testing.operators.OPERATORS`.
        form: Of `benchmarks.operators.race.FORMS`.
        parity: What `read_junit` returns, with `complete`; None where no test ran.

    Returns:
        `GREEN`, `RED`, `UNTESTED`, or None for a rival that is not ours.
    """
    if not form.startswith("tiue"):
        return None
    backend = form.removeprefix("tiue").removeprefix("-")
    failures = parity["failures"] if parity else []
    for failure in failures:
        failed_operator, failed_backend = subject(failure["test"])
        if failed_operator in (operator, None) and (
            not backend or failed_backend in (backend, None)
        ):
            return RED
    complete = parity is not None and parity["complete"] and parity["passed"]
    return GREEN if complete else UNTESTED


def read_benchmark(path: Path) -> list[dict[str, Any]]:
    """The rows of a pytest-benchmark JSON: what the race recorded, and times in seconds."""
    if not path.exists() or not path.stat().st_size:
        return []
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        times = {f"{name}_s": row["stats"][name] for name in STATISTICS if name != "rounds"}
        rows.append({**row["extra_info"], **times, "rounds": row["stats"]["rounds"]})
    return rows


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the automatic form against what is aimed at on an H100.

    Args:
        rows: Of `read_benchmark`, with `gate`.

    Returns:
        `goal`, `case`, `measured` and `met`, which is None where the gate is not green.
    """
    found = []
    for row in rows:
        if row["form"] != "tiue" or row["direction"] != "forward":
            continue
        wanted: dict[str, tuple[str, float]] = {}
        if row["operator"].endswith("group_norm_silu") and kernel_backends(row["operator"]):
            wanted = {
                "75 % of the copy": ("percent_of_copy", 75),
                "3 x over eager": ("speedup_over_eager", 3),
            }
        elif row["operator"] == "cross_timestep_attention":
            least = 1.5 if "_text" in row["case"] else 1.0
            wanted = {f"{least} x over SDPA": ("speedup_over_eager", least)}
        for goal, (figure, least) in wanted.items():
            if figure in row:
                met = row[figure] >= least if row["gate"] == GREEN else None
                case = f"{row['operator']} {row['case']}"
                found.append({"goal": goal, "case": case, "measured": row[figure], "met": met})
    return found
