"""The host execution of csrc notices each kind of fault, in any order of threads and blocks."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tiue_kernels import build

# Which of two threads runs into a race depends on the order, and so does what it sees: the other's
# access, memory that the other has not written yet, or its copy on the way.
RACE = (
    "a race: it (reads|writes) shared|shared byte .* nobody wrote|has waited for its asynchronous"
)
ALIGNMENT = "of 16 bytes at an address that is no multiple of them"
SAID = {
    "correct": "^nothing$",
    "missing_syncwarp": RACE,
    "missing_syncthreads": RACE,
    "missing_syncthreads_before_reuse": RACE,
    "race_of_blocks": "a race: it writes byte .* of tensor 1, which thread .* wrote",
    "misaligned_load": f"a load {ALIGNMENT}",
    "misaligned_store": f"a store {ALIGNMENT}",
    "copy_not_waited_for": "has waited for its asynchronous copy",
    "copy_into_what_is_read": RACE,
    "shared_memory_that_nobody_wrote": "which nobody wrote",
    "read_outside": "it reads 4 bytes outside of every tensor",
    "write_behind_shared_memory": "it writes behind its 4096 bytes of shared memory",
    "divergent_barrier": "63 threads wait for their block",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("faults")
    common = build.source_folder() / "common"
    flags = ["-std=c++17", "-O1", "-DTIUE_HOST", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    flags += [f"-I{build.source_folder()}", f"-I{build.find_torch() / 'include'}"]
    checked = build.HOST_CHECKS.split()
    objects = []
    for source, extra in (
        (Path(__file__).with_name("faults.cpp"), checked),
        (common / "host.cpp", []),
        (common / "host_memory.cpp", []),
    ):
        objects.append(str(folder / f"{source.stem}.o"))
        command = ["g++", *flags, *extra, "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    subprocess.run(["g++", *objects, "-o", str(folder / "faults")], check=True)
    return folder / "faults"


@pytest.mark.parametrize("seed", ["0", "1", "2", "3"])
def test_every_fault_is_named(program: Path, seed: str) -> None:
    environment = {**os.environ, "TIUE_HOST_SEED": seed}
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said.keys() == SAID.keys()
    assert {name: said[name] for name in SAID if not re.search(SAID[name], said[name])} == {}
