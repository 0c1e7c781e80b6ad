"""Planted bugs: `python -m benchmarks.mutants` plants one after the other and runs the tests.

Works on a copy of the checkout, in one process that has imported torch, diffusers and the rest
once: every bug gets a fork of it, so that it costs seconds and not the imports. The copy's own code
is imported in the fork alone. docs/mutants.md says who survived.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure.markdown import table
from benchmarks.mutants.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
PAGE = ROOT / "docs" / "mutants.md"
SURVIVORS_ALLOWED = 0.05  # of all, and those are named as equal
# What tests import and what takes seconds; nothing of the checkout.
MODULES = (
    *("torch", "torch._dynamo", "diffusers", "transformers", "peft", "accelerate", "numpy"),
    *("safetensors.torch", "pytest", "triton", "triton.language", "typer.testing", "yaml"),
    *("pydantic", "PIL.Image", "hypothesis"),
)
NAMES = {
    "diffusers": "StableDiffusionPipeline AutoencoderKL AutoencoderTiny DDIMScheduler"
    " UNet2DConditionModel",
    "transformers": "CLIPTextModel CLIPTokenizer CLIPVisionModelWithProjection",
}


def plant(folder: Path, mutation: Mutation) -> str:
    """Write a bug into a copy of the checkout.

    Args:
        folder: The copy.
        mutation: The bug.

    Returns:
        The file's text before.

    Raises:
        ValueError: The text that it replaces is not there once.
    """
    path = folder / mutation.file
    text = path.read_text("utf-8")
    if text.count(mutation.before) != 1:
        raise ValueError(f"{mutation.file} holds {mutation.before!r} not once")
    path.write_text(text.replace(mutation.before, mutation.after), "utf-8")
    return text


def run_tests(folder: Path, tests: tuple[str, ...], seconds: float) -> str:
    """Run tests in a fork that imports the copy's code.

    Returns:
        "passed", "failed", "timeout" or "none" (no test ran).
    """
    child = os.fork()
    if not child:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        code = 3
        try:
            os.chdir(folder)
            sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(ROOT)))]
            for name in [n for n in sys.modules if n.split(".")[0] in ("tiue", "benchmarks")]:
                del sys.modules[name]
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "--timeout=0"]
            code = int(pytest.main([*options, *tests]))
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "passed", 5: "none"}.get(code, "failed")
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as docs/mutants.md."""
    killed = [row for row in rows if row["tests"] in ("failed", "timeout")]
    equal = [row for row in rows if row not in killed and row["equal"]]
    others = [row for row in rows if row not in killed and not row["equal"]]
    cells = [
        [
            f"`{row['file']}`",
            _code(row["before"]),
            _code(row["after"]),
            "killed" if row in killed else f"equal: {row['equal']}" if row["equal"] else "SURVIVED",
        ]
        for row in rows
    ]
    return f"""# Planted bugs

`python -m benchmarks.mutants` plants each of these, one at a time, in a copy of the checkout and
runs the tests that name the file (benchmarks/mutants). {len(killed)} of {len(rows)} are
killed, {len(equal)} are equal to the original, {len(others)} survived.

{table(["file", "text", "planted", "tests"], cells)}
"""


def _code(text: str) -> str:
    line = " ".join(text.split()) or "(nothing)"
    return f"`{line[:70]}`".replace("|", "\\|")


def main() -> None:
    """Plant all, and write the page; exit status 1 where one survives that is not equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="Bugs in files whose name holds this.")
    parser.add_argument("--seconds", type=float, default=600, help="The longest time of one bug.")
    parser.add_argument("--keep", action="store_true", help="Keep results of an earlier run.")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in MODULES:
        importlib.import_module(module)
    for module, names in NAMES.items():
        for name in names.split():
            getattr(sys.modules[module], name)
    kept = json.loads(RESULTS.read_text("utf-8")) if arguments.keep and RESULTS.is_file() else []
    rows = []
    with tempfile.TemporaryDirectory(prefix="tiue-mutants-") as place:
        folder = Path(place) / "checkout"
        _copy(folder)
        passes: dict[tuple[str, ...], str] = {}
        for mutation in MUTATIONS:
            key = {name: getattr(mutation, name) for name in ("file", "before", "after", "equal")}
            old = [row for row in kept if key.items() <= row.items()]
            if old or (arguments.only and arguments.only not in mutation.file):
                rows += old
                continue
            if mutation.tests not in passes:
                passes[mutation.tests] = run_tests(folder, mutation.tests, arguments.seconds)
            start = time.monotonic()
            text = plant(folder, mutation)
            told = passes[mutation.tests]
            if told == "passed":
                told = run_tests(folder, mutation.tests, arguments.seconds)
            else:
                told = f"{told} without the bug"  # which proves nothing
            (folder / mutation.file).write_text(text, "utf-8")
            rows.append(key | {"tests": told})
            seconds = time.monotonic() - start
            print(f"{told:8} {seconds:6.1f} s  {mutation.file}: {mutation.before!r}", flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(rows), "utf-8")
    survivors = [row for row in rows if row["tests"] not in ("failed", "timeout")]
    unexplained = [row for row in survivors if not row["equal"]]
    if unexplained or len(survivors) > SURVIVORS_ALLOWED * len(rows):
        sys.exit(f"{len(survivors)} of {len(rows)} survived, {len(unexplained)} without a reason")


def _copy(folder: Path) -> None:
    """What git knows of the checkout, and the golden cases beside it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if (ROOT.parent / "shared").is_dir():
        (folder.parent / "shared").symlink_to(ROOT.parent / "shared")
