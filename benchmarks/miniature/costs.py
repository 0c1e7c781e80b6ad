"""What a picture of each row and an update of each student cost: multiply-adds, and time."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.measure.machine import describe
from benchmarks.miniature.counts import picture_count
from benchmarks.miniature.drawing import load_row
from benchmarks.miniature.rows import ROWS, SEEDS
from benchmarks.miniature.training import is_trained, update_cost

ROUNDS = 7
PROMPT = "two fruits"
# Students of one K run the same arithmetic: one stands for all.
TIMED = (
    *(name for name, row in ROWS.items() if row.steps is not None),
    *("one-pass-4", "one-pass-1", "k1", "k2", "k4", "k8"),
)


def measure() -> dict[str, Any]:
    """Count every row that has code, and time those of `TIMED` whose weights are there, in turn.

    Returns:
        By row: `multiply_adds` of the UNet for a picture, `update` for an update of a student, and
        `seconds`, the median CPU time of one picture on one thread, text encoder and autoencoder
        included; and the machine.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, row in ROWS.items():
        if not row.missing:
            found[name] = {"multiply_adds": picture_count(row)}
            if row.training is not None:
                found[name]["update"] = update_cost(row)
    torch.set_num_threads(1)
    seed = SEEDS[0]
    models = {n: load_row(ROWS[n], seed) for n in TIMED if is_trained(ROWS[n], seed)}
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(ROUNDS + 1):
        for name, model in models.items():
            # Of this process alone: other work on the machine slows the clock, not this.
            started = time.process_time()
            model.draw([PROMPT], [0])
            if round_ > 0:  # the first warms up
                times[name].append(time.process_time() - started)
    for name, own in times.items():
        found[name] |= {"seconds": statistics.median(own), "rounds": len(own)}
    return {"rows": found, "machine": describe(torch.device("cpu"))}
