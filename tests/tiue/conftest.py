"""Runs of whole networks on the kernels."""

import pytest

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
    from tiue_kernels.triton.group_norm import Plan, power_of_two

    def a_row(operator, kernel, device, rows, num_groups, group_size, pixels, *_, held=1) -> Plan:
        channels = power_of_two(num_groups * group_size)
        return Plan(num_groups, power_of_two(num_groups), channels, power_of_two(pixels), 1, 4)

    for name in ("shared_skip", "broadcast_add"):
        monkeypatch.setattr(f"tiue_kernels.triton.{name}_group_norm_silu.tuned_plan", a_row)
