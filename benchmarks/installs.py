"""Fresh environments: `python -m benchmarks.installs` makes docs/installs.md.

For every interpreter that is named, once with the oldest versions that pyproject.toml allows and
once with the newest that pip finds: a new virtual environment, the package built as a wheel, a
picture drawn by its command, and the golden cases and operators' tests run on what was installed.
Each environment takes gigabytes and minutes (torch for Linux brings its CUDA libraries), so it is
removed when its row is written; a row that is there is not made again unless --again asks for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure.markdown import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "installs.json"
PAGE = ROOT / "docs" / "installs.md"
VERSIONS = ("oldest", "newest")
# Whose least version is written in pyproject.toml.
PINNED = ("torch", "diffusers", "transformers", "triton")
SHOWN = (*PINNED, "accelerate", "numpy")
TOOLS = ("pytest", "pytest-timeout", "peft", "setuptools>=77")
# What a wheel can run: it holds no C++ sources.
TESTS = (
    "tests/tiue/test_golden.py",
    "tests/tiue/test_schedule.py",
    "-k",
    "not kernels_give or triton",
)
SECONDS = 3600


def oldest(requirements: str) -> list[str]:
    """The least version of each pinned package, as requirements that name exactly it.

    Args:
        requirements: The text of pyproject.toml.

    Returns:
        `torch==2.11.0` and its like; a bound of one or two numbers names its first release.

    Raises:
        ValueError: A package has no lower bound.
    """
    pins = []
    for name in PINNED:
        match = re.search(rf'"{name}>=([0-9.]+)', requirements)
        if match is None:
            raise ValueError(f"pyproject.toml gives {name} no least version")
        numbers = [*match.group(1).split("."), "0", "0"][:3]
        pins.append(f"{name}=={'.'.join(numbers)}")
    return pins


def try_install(python: str, versions: str, wheel: Path, folder: Path) -> dict[str, Any]:
    """Install into a fresh environment, draw, and run the tests there.

    Args:
        python: An interpreter.
        versions: "oldest" or "newest".
        wheel: The package.
        folder: An empty folder for the environment and what it works on.

    Returns:
        The row: versions, what passed, seconds, and the first line of what went wrong.
    """
    row: dict[str, Any] = {"versions": versions, "python": _output([python, "-V"]).split()[-1]}
    start = time.monotonic()
    own = str(folder / "env" / "bin" / "python")
    pins = oldest((ROOT / "pyproject.toml").read_text("utf-8")) if versions == "oldest" else []
    install = [own, "-m", "pip", "install", "--quiet", "--no-compile"]
    packages = [str(wheel), *TOOLS, *(pins or ("triton",))]
    work = _workplace(folder)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    } | {"OMP_NUM_THREADS": "1", "CI": ""}
    steps = {
        "venv": [python, "-m", "venv", str(folder / "env")],
        "install": [*install, *packages],
        "check": [own, "-m", "pip", "check"],
        "import": [own, "-W", "error::FutureWarning", "-c", "import tiue, tiue_kernels"],
        "draw": [str(folder / "env" / "bin" / "tiue"), "generate", "red apple", "-o", "pictures"],
        "tests": [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
    }
    for step, command in steps.items():
        try:
            done = subprocess.run(
                command,
                cwd=work,
                env=environment,
                timeout=SECONDS,
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            failed, text = done.returncode, done.stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            failed, text = 1, str(error)
        if step == "install" and not failed:
            row["installed"] = _installed(own)
        if step == "draw" and not failed:
            row["warnings"] = len(re.findall(r"(?i)warning|deprecat", text))
        if step == "tests":
            row["tests"] = next(iter(re.findall(r"=*\s*(\d+ .* in [\d.]+)s", text)[-1:]), "none")
        if failed:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            errors = [line for line in lines if re.match(r"(ERROR|E  |error|\w+Error)", line)]
            row |= {"failed": step, "why": (errors or lines or ["no output"])[0][:200]}
            break
    row["minutes"] = round((time.monotonic() - start) / 60, 1)
    return row


def _workplace(folder: Path) -> Path:
    """The tests and nothing of the packages, so that only what was installed can be imported."""
    work = folder / "checkout"
    work.mkdir()
    for name in ("tests", "testing", "benchmarks"):
        ignore = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, work / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", work)
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        (folder / "shared").symlink_to(shared)
    return work


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _installed(python: str) -> dict[str, str]:
    packages = json.loads(_output([python, "-m", "pip", "list", "--format", "json"]))
    found = {package["name"].lower(): package["version"] for package in packages}
    return {name: found[name] for name in SHOWN if name in found}


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as docs/installs.md."""
    cells = []
    for row in sorted(rows, key=lambda row: (VERSIONS.index(row["versions"]), _order(row))):
        installed = row.get("installed", {})
        result = f"fails at {row['failed']}: {row['why']}" if "failed" in row else "yes"
        cells.append(
            [
                row["python"],
                row["versions"],
                *(installed.get(name, "") for name in SHOWN),
                result.replace("|", "/"),
                str(row.get("warnings", "")),
                row.get("tests", ""),
            ]
        )
    header = ["Python", "versions", *SHOWN, "installs and draws", "warnings", "tests"]
    return f"""# Installs

Written by `python -m benchmarks.installs --python python3.10 --python python3.11 ...`: each row is
a fresh environment with the package as a wheel. `oldest` are the least versions that pyproject.toml
allows, `newest` what pip found on the day. Warnings are those that drawing prints; the tests are
the golden cases and the schedule's. An interpreter that is not listed was not at hand.

{table(header, cells)}
"""


def _order(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", row["python"]))


def main() -> None:
    """Make the missing rows, and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", default=[], help="An interpreter; several.")
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    parser.add_argument("--again", action="store_true", help="Make rows that are there anew.")
    arguments = parser.parse_args()
    rows = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else []
    with tempfile.TemporaryDirectory(prefix="tiue-installs-") as place:
        build = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            place,
            str(ROOT),
        ]
        subprocess.run(build, check=True)
        wheel = next(Path(place).glob("tiue-*.whl"))
        for python in arguments.python or [sys.executable]:
            for versions in arguments.versions:
                key = (_output([python, "-V"]).split()[-1], versions)
                there = [row for row in rows if (row["python"], row["versions"]) == key]
                if there and not arguments.again:
                    continue
                folder = Path(place) / "-".join(key)
                folder.mkdir()
                row = try_install(python, versions, wheel, folder)
                shutil.rmtree(folder, ignore_errors=True)
                print(json.dumps(row), flush=True)
                rows = [other for other in rows if other not in there] + [row]
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(rows), "utf-8")


if __name__ == "__main__":
    main()
