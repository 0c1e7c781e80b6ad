"""Markdown that the reports share."""

from __future__ import annotations


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(value: float) -> str:
    """A time with its unit."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
