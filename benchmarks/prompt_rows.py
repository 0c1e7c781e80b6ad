"""What reading prompts takes: `python -m benchmarks.prompt_rows` reads a million rows of .jsonl.

The rows are JourneyDB's in kind: a caption among what nobody asks for. They are read in a process
of their own, whose peak of memory, less what it held before, is that of a training process.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_WORDS = ("red", "apple", "a", "cat", "on", "the", "moon", "oil", "painting", "of", "old", "city")
_READ = """
import json, resource, sys, time
from tiue.distill.prompts import prompts_digest, read_prompts
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
prompts = read_prompts(sys.argv[1])
read, digest = time.perf_counter() - start, prompts_digest(prompts)
print(json.dumps({
    "prompts": len(prompts),
    "text_bytes": sum(len(prompt.encode()) for prompt in prompts),
    "seconds": read,
    "seconds_with_digest": time.perf_counter() - start,
    "peak_bytes": peak() - before,
}))
"""


def write_rows(path: Path, count: int) -> None:
    """Write rows of which no two have the same caption.

    Args:
        path: The .jsonl file.
        count: Rows.
    """
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = " ".join(draw.choices(_WORDS, k=24))
            row = {
                "img_path": f"./{number % 200:03d}/{number}.jpg",
                "prompt": words[::-1],
                "Task1": {"Subject": words.split()[:3], "Style": words.split()[3:9]},
                "Task2": {"Caption": f"{words}, {number}"},
                "Task3": {"Subject": [[word, "yes"] for word in words.split()[:6]]},
            }
            file.write(json.dumps(row) + "\n")


def measure(path: Path) -> dict[str, Any]:
    """Read a file of prompts in a process of its own.

    Args:
        path: The file.

    Returns:
        Prompts, bytes of their text, seconds (with their digest too, as a run takes it), and what
        reading added to the process's peak of memory.
    """
    command = [sys.executable, "-c", _READ, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"file_bytes": path.stat().st_size}


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    with tempfile.TemporaryDirectory(prefix="tiue-prompts-") as place:
        path = Path(place) / "prompts.jsonl"
        write_rows(path, parser.parse_args().rows)
        found = measure(path)
    print(
        f"{found['prompts']:,} prompts of {found['file_bytes'] / 2**20:.0f} MiB of .jsonl: "
        f"{found['seconds']:.1f} s ({found['seconds_with_digest']:.1f} s with their digest), "
        f"peak memory {found['peak_bytes'] / 2**20:.0f} MiB, of which text "
        f"{found['text_bytes'] / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
