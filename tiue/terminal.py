"""What the commands read and say, and how they end: one line for whatever went wrong."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from tiue.errors import DivergenceError, InputError, NonFiniteError, TiUEError

# The largest that torch.Generator takes.
MAX_SEED = 2**64 - 1


class OneLineErrors(TyperGroup):
    """Ends a command that raised one of the package's errors with one line on stderr.

    So does want of memory, which a smaller picture or batch cures; anything else is a bug of this
    package and shows its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TiUEError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            # Everything but a computation that went wrong is for the caller to put right.
            went_wrong = isinstance(error, NonFiniteError | DivergenceError)
            raise typer.Exit(1 if went_wrong else 2) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split()) or "no more to be had"
            typer.echo(f"error: out of memory ({reason}); ask for less at once", err=True)
            raise typer.Exit(1) from error


def command_group(help: str | None = None) -> typer.Typer:
    """A group of commands that end in one line when they fail.

    Args:
        help: What the group is for, shown where no command is given; None for a single command.
    """
    return typer.Typer(
        cls=OneLineErrors,
        help=help,
        no_args_is_help=help is not None,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or a GPU.

    Args:
        error: Any; torch's are told by their names and words, without importing it.
    """
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, a RuntimeError
    return isinstance(error, MemoryError) or named or "allocate memory" in str(error)


def say(line: object) -> None:
    """Print a line; where nobody reads it or the device is full, the command goes on.

    What a command writes to its files is worth more than what it tells of it.

    Args:
        line: The text.
    """
    try:
        typer.echo(line)
    except OSError as error:
        typer.echo(
            f"warning: nothing more can be printed ({error.strerror or error}); going on", err=True
        )
        # What is left in the buffer goes nowhere: else Python ends with an error of its own.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def read_texts(texts: list[str]) -> list[str]:
    """Take texts of a command line for UTF-8, whatever the locale takes them for.

    Args:
        texts: As Python decoded them.

    Returns:
        The texts.

    Raises:
        InputError: One is no UTF-8.
    """
    try:
        return [os.fsencode(text).decode() for text in texts]
    except UnicodeError as error:
        raise InputError(f"a prompt is no UTF-8 text ({error}); type it in UTF-8") from error


def check_seeds(first: int, count: int) -> None:
    """See that `count` seeds from `first` on are seeds.

    Raises:
        InputError: One is more than 2^64 - 1.
    """
    if first + count - 1 > MAX_SEED:
        raise InputError(f"seeds go to {MAX_SEED}; {first + count - 1} is asked for")
