"""The long fuzz: `python -m benchmarks.fuzz --minutes 30` runs tests/fuzz on inputs never seen.

Every target of tests/fuzz gets the same share of the time, and a new seed for every hundred inputs;
docs/fuzz.md says how many were tried and what was found. A fault ends its target with the input
that hypothesis prints, and the exit status is 1. The suite itself runs a dozen inputs of each.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure.markdown import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
PAGE = ROOT / "docs" / "fuzz.md"
BATCH = 100


def run(target: Callable[[Any], None], strategy: Any, seconds: float, first: int) -> dict[str, Any]:
    """Try inputs until the time is over or one is a fault.

    Args:
        target: Raises where an input is a fault.
        strategy: Of hypothesis.
        seconds: The time.
        first: The first seed.

    Returns:
        How many inputs were tried, in how many seconds, and the fault's last lines.
    """
    from hypothesis import HealthCheck, Phase, given, seed, settings

    row: dict[str, Any] = {"inputs": 0, "fault": ""}
    start = time.monotonic()

    def counted(drawn: Any) -> None:
        row["inputs"] += 1
        target(drawn)

    number = first
    while time.monotonic() - start < seconds:
        options = settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            phases=(Phase.generate,),  # the seed finds it again; the interpreter shrinks for hours
        )
        try:
            seed(number)(options(given(strategy)(counted)))()
        except Exception:
            row["fault"] = "\n".join(traceback.format_exc().strip().splitlines()[-12:])
            break
        number += 1
    row["seconds"] = round(time.monotonic() - start)
    row["seeds"] = [first, number]
    return row


def targets(place: Path) -> dict[str, tuple[Callable[[Any], None], Any]]:
    """Name to what is tried and on what."""
    from hypothesis import strategies as st

    from tests.fuzz import operators, test_files
    from tests.tiue.tiny import tiny_pipeline
    from tiue_kernels import build, cuda, dispatch

    def agrees(backend: str) -> Callable[[Any], None]:
        def check(call: Any) -> None:
            found = operators.faults(call, backend)
            assert not found, found

        return check

    def inner(test: Any, **fixtures: Any) -> Callable[[Any], None]:
        return lambda data: test.hypothesis.inner_test(data=data, **fixtures)

    tiny_pipeline().save_pretrained(place / "model")
    found = {
        "operators, Triton's interpreter": (agrees("triton"), operators.calls("triton")),
        "prompt files": (inner(test_files.test_prompts, place=place), st.data()),
        "settings files": (inner(test_files.test_settings, place=place), st.data()),
        "model folders": (inner(test_files.test_model_folders, model=place / "model"), st.data()),
    }
    try:
        cuda.load_host_library(build.build("host", build.cache_folder()))
    except build.BuildError as error:
        print(f"the CUDA kernels are left out: {error}")
        return found
    dispatch.reset()
    return found | {"operators, CUDA C++ on the host": (agrees("cuda"), operators.calls("cuda"))}


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as docs/fuzz.md."""
    cells = [
        [row["target"], str(row["inputs"]), str(row["seconds"]), "1" if row["fault"] else "0"]
        for row in rows
    ]
    total, faults = sum(row["inputs"] for row in rows), [row for row in rows if row["fault"]]
    shown = "".join(f"\n## {row['target']}\n\n```\n{row['fault']}\n```\n" for row in faults)
    return f"""# Fuzz

`python -m benchmarks.fuzz --minutes 30` tries inputs that nobody thought of (tests/fuzz, with
hypothesis): operators on drawn shapes, strides, types and values, from zero to infinity, against
the reference; prompt files, settings files and model folders whose bytes are cut, flipped,
overwritten, removed or doubled, which must give an error of this package or what a right file of
those bytes would give. The suite runs a dozen inputs of each. The last long run tried {total}
inputs and found {len(faults)} faults.

{table(["target", "inputs", "seconds", "faults"], cells)}
{shown}"""


def main() -> None:
    """Run all targets, and write the page; exit status 1 where one found a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="For all targets together.")
    parser.add_argument("--seed", type=int, help="The first seed; by default another every time.")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    first = random.randrange(10**6) if arguments.seed is None else arguments.seed
    rows = []
    with tempfile.TemporaryDirectory(prefix="tiue-fuzz-") as place:
        chosen = targets(Path(place))
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        for name, (target, strategy) in chosen.items():
            share = 60 * arguments.minutes / len(chosen)
            row = {"target": name} | run(target, strategy, share, first)
            print(json.dumps(row), flush=True)
            rows.append(row)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(rows), "utf-8")
    if any(row["fault"] for row in rows):
        sys.exit("a fault was found")


if __name__ == "__main__":
    main()
