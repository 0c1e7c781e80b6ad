"""Peak memory of a form of the one pass on a CPU, measured in a process of its own.

`python -m benchmarks.peak_memory tiue --latents 64` prints bytes: by how much the resident memory
of a fresh process grows over the weights until its first pass is done, compiling included. Earlier
passes would leave memory behind that a later one takes up again unseen.

`in_a_process`, which the benchmarks call, has glibc take blocks of a megabyte or more straight from
the system (`MALLOC_MMAP_THRESHOLD_`). Out of its heap, whose gaps fall by chance, the same form
took 0.39 to 0.62 GiB from one process to the next.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.forms.rivals import FORMS, Setting
from benchmarks.measure.race import Case
from testing.configs import CONFIGS

MEANING = (
    "growth of a fresh process's resident memory over the weights until its first pass is done, "
    "without the gaps of glibc's heap"
)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_processes(forms: list[str], case: Case, dtype: torch.dtype) -> dict[str, int | None]:
    """Measure several forms, two at a time: most of it is drawing weights, on one core.

    Args:
        forms: Keys of `benchmarks.forms.rivals.FORMS`.
        case: What is run.
        dtype: Of the weights.

    Returns:
        As `in_a_process`, by form.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        peaks = pool.map(lambda form: in_a_process(form, case, dtype), forms)
        return dict(zip(forms, peaks, strict=True))


def in_a_process(form: str, case: Case, dtype: torch.dtype) -> int | None:
    """Measure one form.

    Args:
        form: A key of `benchmarks.forms.rivals.FORMS`.
        case: What is run.
        dtype: Of the weights.

    Returns:
        Bytes, or None where the form cannot run or the system keeps no such count.
    """
    sizes = (case.latent_size, case.batch, case.num_decoder_steps)
    options = zip(("--latents", "--batch", "--steps"), map(str, sizes), strict=True)
    command = [sys.executable, "-m", "benchmarks.peak_memory", form, f"--model={case.model}"]
    command += [f"--dtype={str(dtype).removeprefix('torch.')}"]
    command += [word for option in options for word in option]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def measure(form: str, case: Case, dtype: torch.dtype) -> int:
    """Measure one form in this process, which should have done nothing else.

    Args:
        form: A key of `benchmarks.forms.rivals.FORMS`.
        case: What is run.
        dtype: Of the weights.

    Returns:
        Bytes.

    Raises:
        OSError: The system is no Linux.
        NotRunError: The form cannot run here.
    """
    setting = Setting.build(case, torch.device("cpu"), dtype)
    CLEAR.write_text("5")  # sets the high-water mark back to what is resident (proc(5))
    before = resident("VmHWM")
    FORMS[form].build(setting)()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, as VmHWM, the most that was resident."""
    lines = STATUS.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main(arguments: list[str] | None = None) -> None:
    """Print the bytes of one form.

    Args:
        arguments: Of the command line; by default this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--latents", type=int, default=64, help="height and width")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="K")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    case = Case(options.model, options.latents, options.batch, options.steps)
    print(measure(options.form, case, getattr(torch, options.dtype)))


if __name__ == "__main__":
    main()
