"""Faults planted in the kernels, each of which a check must catch.

`python -m tests.planted [words of a fault]`. Every fault is a change of one place of a copy of the
sources, made as a slip would make it. Triton's are looked for by the sanitizer, or by the
comparison with float64; those of csrc by its execution on the host. The exit status is the number
of faults that nothing noticed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tiue_kernels import build

ROOT = Path(__file__).parents[1]
TRITON = "tiue_kernels/triton"
ATTENTION = "csrc/cross_timestep_attention"


class Fault(NamedTuple):
    """One slip.

    Attributes:
        what: in words.
        file: where, from the root of the sources.
        right: the text there, which occurs once.
        wrong: what takes its place.
        check: words of the sanitizer's case, or `FLOAT64`; nothing for csrc.
        says: what the check must say, a regular expression.
    """

    what: str
    file: str
    right: str
    wrong: str
    check: str = ""
    says: str = "ILLEGAL MEMORY ACCESS"


FLOAT64 = "float64"
FAULTS = [
    Fault(
        "the mask of a load is applied to what was loaded",
        f"{TRITON}/shared_skip_group_norm_silu.py",
        "x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)",
        "x = tl.where(mask, tl.load(x_ptr + offsets), 0.0).to(tl.float32)",
        "shared_skip_norm-fwd-nchw",
    ),
    Fault(
        "a store without the mask of the channels",
        f"{TRITON}/timestep_sum_group_norm_silu.py",
        "tl.store(start + offsets, total, mask=mask)",
        "tl.store(start + offsets, total, mask=(offs_p < pixels)[None, :])",
        "timestep_sum_norm-fwd-nhwc",
    ),
    Fault(
        "one pixel too many",
        f"{TRITON}/group_norm.py",
        "return offs_g, mask_g, offs_c, mask_c, offs_p, offs_p < pixels",
        "return offs_g, mask_g, offs_c, mask_c, offs_p, offs_p <= pixels",
        "broadcast_add_norm-fwd-nchw",
    ),
    Fault(
        "the features behind a head's last are loaded",
        f"{TRITON}/attention.py",
        "        mask = mask & (offs_d < HEAD_DIM)[None, :]\n    return",
        "        mask = mask & (offs_d < START + SIZE)[None, :]\n    return",
        "cross_timestep_attention-fwd-few_keys",
    ),
    Fault(
        "the wrong row of the skip, inside the tensor",
        f"{TRITON}/shared_skip_group_norm_silu.py",
        "start = skip_ptr + (row % batch).to(tl.int64) * skip_channels * pixels",
        "start = skip_ptr + ((row + 1) % batch).to(tl.int64) * skip_channels * pixels",
        FLOAT64,
        "AssertionError",
    ),
    Fault(
        "a missing __syncwarp between writing and reading staged rows",
        f"{ATTENTION}/attention.h",
        "  __syncwarp();\n  for (int i = lane; i < 16 * kChunks; i += 32) {",
        "  for (int i = lane; i < 16 * kChunks; i += 32) {",
        says="a race: it (reads|writes) shared byte",
    ),
    Fault(
        "a missing __syncthreads before keys are overwritten",
        f"{ATTENTION}/fwd.cu",
        "      __syncthreads();  // values are there, and the keys and their bias have been read\n",
        "",
        says="a race: it (reads|writes) shared byte|has waited for its asynchronous copy",
    ),
    Fault(
        "a copy that nobody waits for",
        f"{ATTENTION}/fwd.cu",
        "      wait_for_copies<0>();\n      __syncthreads();  // keys are there",
        "      __syncthreads();  // keys are there",
        says="has waited for its asynchronous copy",
    ),
    Fault(
        "a slice off 16 bytes is read in place",
        f"{ATTENTION}/attention.h",
        "tensor.stride(0) % chunk == 0 && is_aligned(tensor, 16);",
        "tensor.stride(0) % chunk == 0;",
        says="an asynchronous copy of 16 bytes at an address that is no multiple",
    ),
    Fault(
        "two blocks write one row of statistics",
        f"{ATTENTION}/attention.h",
        "  int64_t row = i / g.queries * g.batch + b;\n",
        "  int64_t row = i / g.queries * g.batch;\n",
        says="a race: it writes byte .* of tensor",
    ),
]

# Two tiles of keys, two rows of them, aligned and off by one element.
RUN_ATTENTION = """
import sys, torch
from tiue_kernels import cuda
cuda.load_host_library(sys.argv[1])
for first in (0, 1):
    whole = [torch.ones(rows, tokens, 40) for rows, tokens in ((4, 21), (2, 100), (2, 100))]
    query, key, value = (x[..., first : first + 32].half() if not first
                         else x.half()[..., first : first + 32] for x in whole)
    torch.ops.tiue_cuda.cross_timestep_attention_fwd(query, key, value, 2, 0.25, None)
"""


@contextmanager
def planted(fault: Fault) -> Iterator[Path]:
    """A copy of the sources with one fault in it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("tiue_kernels", "csrc", "testing", "tests/tiue_kernels"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.sources")
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        for source in (ROOT / "pyproject.toml", *(ROOT / "tests").glob("*.py")):
            shutil.copy(source, root / source.relative_to(ROOT))
        path = root / fault.file
        text = path.read_text()
        assert text.count(fault.right) == 1, f"{fault.what}: its place in {fault.file} is gone"
        path.write_text(text.replace(fault.right, fault.wrong))
        yield root


def run(command: list[str], root: Path, **environment: str) -> str:
    """What a command in the copy says; Python imports from there."""
    variables = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=variables)
    return done.stdout + done.stderr


def check_triton(fault: Fault, root: Path) -> str:
    folder = "tests/tiue_kernels/triton"
    if fault.check == FLOAT64:
        test = f"{folder}/test_launchers_norm.py"
        chosen = "test_error_is_at_most_twice_that_of_torch and skip-straddling-f32-triton"
        command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test, "-k", chosen]
        return run([sys.executable, *command], root, TRITON_INTERPRET="1")
    sanitizer = Path(sys.executable).with_name("tile-sanitizer")
    command = [str(sanitizer), f"{folder}/sanitize.py", fault.check]
    return run([sys.executable, *command], root, TRITON_INTERPRET="1")


def check_csrc(fault: Fault, root: Path) -> str:
    """Forward attention, compiled anew and linked to the rest as it is."""
    build.build("host", build.cache_folder())
    torch, library = build.find_torch(), root / "libtiue_host.so"
    flags = ["-std=c++17", build.TORCH_TARGET, "-isystem", f"{torch}/include", "-fPIC", "-O0"]
    flags += ["-DTIUE_HOST", "-U_FORTIFY_SOURCE", *build.HOST_CHECKS.split(), "-x", "c++"]
    source, own = root / ATTENTION / "fwd.cu", "cross_timestep_attention_fwd.o"
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(root / own)], check=True)
    objects = [path for path in (build.cache_folder() / "host").glob("*.o") if path.name != own]
    command = ["g++", "-shared", str(root / own), *map(str, objects), "-o", str(library)]
    subprocess.run([*command, f"-L{torch}/lib", "-ltorch", "-ltorch_cpu"], check=True)
    return run([sys.executable, "-c", RUN_ATTENTION, str(library)], root)


def main(words: list[str]) -> int:
    missed = 0
    for fault in FAULTS:
        if not all(word in f"{fault.file} {fault.what}" for word in words):
            continue
        with planted(fault) as root:
            said = (check_triton if fault.check else check_csrc)(fault, root)
        found = re.search(fault.says, said)
        missed += found is None
        print(f"{'caught' if found else 'MISSED'}: {fault.what} ({fault.file})", flush=True)
        if found is None:
            print(said[-2000:])
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
