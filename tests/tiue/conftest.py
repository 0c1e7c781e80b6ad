"""Runs of whole networks on the kernels."""

import pytest
import torch

from tiue_kernels import dispatch


@pytest.fixture
def served(monkeypatch) -> set[tuple[str, str]]:
    """Every operator that ran, and on which backend."""
    pairs: set[tuple[str, str]] = set()
    select = dispatch.select

    def noted(operator: str, direction: str, args: tuple) -> str:
        backend = select(operator, direction, args)
        pairs.add((operator, backend))
        return backend

    monkeypatch.setattr(dispatch, "select", noted)
    return pairs


@pytest.fixture
def wide_tiles(monkeypatch) -> None:
    """A row a program: with a group a program, the interpreter takes four times as long."""
    from tiue_kernels.layout import memory_format
    from tiue_kernels.triton.group_norm import Plan, power_of_two

    def a_row(operator, kernel, maps, rows, num_groups, group_size, held) -> tuple[bool, Plan]:
        blocks = map(power_of_two, (num_groups, num_groups * group_size, maps.shape[2:].numel()))
        return memory_format(maps) == torch.channels_last, Plan(num_groups, *blocks, 1, 4)

    for name in ("shared_skip", "broadcast_add"):
        monkeypatch.setattr(f"tiue_kernels.triton.{name}_group_norm_silu.tuned_plan", a_row)
