"""No Triton kernel reads or writes outside of its tensors, for any program: proven, not sampled."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]

# Cases that the sanitizer cannot follow, and why. One that it follows by now must go.
EXEMPT = {
    f"shared_skip_norm-bwd-straddling-{timesteps}": (
        "a false alarm of tilelens 3.1.1: the bound of the loop over timesteps differs between "
        "programs, and a pointer chosen by `if` keeps the side of an earlier program. The same "
        "loads and stores are proven where no group straddles; tests/tiue_kernels/fences.py "
        "guards the rest with data."
    )
    for timesteps in (1, 2)
}


def sanitize(*words: str, root: Path = ROOT) -> dict[str, dict]:
    """What the sanitizer says of each case, by name."""
    command = shutil.which("tile-sanitizer", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("no tile-sanitizer: pip install tilelens")
    script = root / "tests/tiue_kernels/triton/sanitize.py"
    done = subprocess.run(
        [sys.executable, command, str(script), *words],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout + done.stderr
    return {entry["case"]: entry for entry in map(json.loads, lines)}


def test_every_kernel_stays_inside_its_tensors() -> None:
    results = sanitize()
    errors = {name: entry["error"] for name, entry in results.items() if entry["error"]}
    assert {name: error for name, error in errors.items() if name not in EXEMPT} == {}
    assert sorted(set(EXEMPT) - set(errors)) == [], "take these exemptions out"

    proven = {k for name, entry in results.items() if name not in errors for k in entry["kernels"]}
    sources = (ROOT / "tiue_kernels" / "triton").glob("*.py")
    defined = {
        f"{path.stem}.{name}"
        for path in sources
        for name in re.findall(r"^def (\w*kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert len(defined) >= 12
    assert sorted(defined - proven) == []
