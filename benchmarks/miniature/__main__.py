"""What several timesteps buy over one, on the scenes model.

`python -m benchmarks.miniature COMMAND`.

`train ROW` distils a student a seed, `evaluate ROW` draws and measures it, `rates` takes the rates
from the pilots, `report` writes docs/miniature.md of whatever has been run. Each goes on where it
stopped, and several may run at once on other rows or seeds.
"""

from __future__ import annotations

from typing import Annotated

import typer

from tiue.errors import InputError
from tiue.terminal import command_group

app = command_group(__doc__)
Names = Annotated[list[str], typer.Argument(help="Rows, as docs/miniature.md names them.")]
Seeds = Annotated[str, typer.Option(help="Of training and noise, with commas.")]


def read_seeds(text: str) -> list[int]:
    """Seeds of a command line.

    Raises:
        InputError: One is not of `SEEDS`.
    """
    from benchmarks.miniature.rows import SEEDS

    words = text.split(",")
    if not set(words) <= {str(seed) for seed in SEEDS}:
        raise InputError(f"--seeds takes some of {','.join(map(str, SEEDS))}, not {text!r}")
    return [int(word) for word in words]


@app.command()
def train(rows: Names, seeds: Seeds = "0,1,2") -> None:
    """Distil the students of rows."""
    from benchmarks.miniature.rows import find_rows
    from benchmarks.miniature.training import distil

    chosen = find_rows(rows)
    for seed in read_seeds(seeds):
        for row in chosen:
            done = distil(row, seed)
            typer.echo(f"{row.name} {seed}: " + ("distilled" if done else "stopped"))
            if not done:
                raise typer.Exit(130)


@app.command()
def evaluate(rows: Names, seeds: Seeds = "0,1,2") -> None:
    """Draw and measure rows."""
    from benchmarks.miniature.evaluation import evaluate_row
    from benchmarks.miniature.rows import find_rows

    chosen = find_rows(rows)
    for seed in read_seeds(seeds):
        for row in chosen:
            evaluate_row(row, seed)
            typer.echo(f"{row.name} {seed}: measured")


@app.command()
def rates() -> None:
    """Take each K's learning rate from its pilots, which were trained and evaluated with seed 0."""
    from benchmarks.miniature.training import choose_rates

    found = choose_rates()
    for family, pilots in found["energy"].items():
        for rate, energy in pilots.items():
            told = "not run" if energy is None else f"energy distance {energy:.3f}"
            chosen = "  <- chosen" if rate == found["rates"][family] else ""
            typer.echo(f"{family} {rate}: {told}{chosen}")


@app.command()
def costs() -> None:
    """Count multiply-adds, and take the times of rows whose weights are there."""
    from benchmarks.miniature import costs, parts

    parts.save_part(parts.COSTS, costs.measure())


@app.command()
def similarity() -> None:
    """Compare the teacher's features across timesteps, and the K = 4 student's predictions."""
    from benchmarks.miniature import parts, similarity

    parts.save_part(parts.SIMILARITY, similarity.measure())


@app.command()
def strip() -> None:
    """Draw what each timestep adds to a picture."""
    from benchmarks.miniature import parts, sheets

    parts.save_part(parts.STRIP, sheets.draw_strip())


@app.command()
def contact() -> None:
    """Draw one prompt eight times by teacher, K = 1 and K = 4."""
    from benchmarks.miniature import parts, sheets

    parts.save_part(parts.CONTACT, sheets.draw_contact())


@app.command()
def report() -> None:
    """Write docs/miniature.md and its plots."""
    from benchmarks.miniature.report import write

    write()


if __name__ == "__main__":
    app()
