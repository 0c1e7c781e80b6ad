"""What a call spends its time on, on a CPU: convolutions, attention, linear layers, the rest."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.measure.interleave import Rival

KINDS = ("convolution", "attention", "linear", "rest")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def time_shares(rival: Rival) -> dict[str, float]:
    """Profile one call that is warm.

    Args:
        rival: What is called.

    Returns:
        Share of the time of the operators by kind, 1 in all. Winograd's transforms and products
        count as convolution, 1 x 1 convolutions too; norms, activations, sums and copies are the
        rest.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        rival()
    times = dict.fromkeys(KINDS, 0.0)
    for event in profiler.events():
        times[_kind(event)] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: round(time / total, 4) for kind, time in times.items()}


def _kind(event: Any) -> str:
    name = event.name
    if "attention" in name:
        return "attention"
    if "convolution" in name or "conv2d" in name:
        return "convolution"
    if name not in _PRODUCTS:
        return "rest"
    # Products of a convolution as a matrix product, of Winograd's, or of attention written out.
    while (event := event.cpu_parent) is not None:
        if "conv2d" in event.name:
            return "convolution"
        if "attention" in event.name:
            return "attention"
    return "linear"
