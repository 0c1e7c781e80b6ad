"""`python -m tiue.distill` and `accelerate launch -m tiue.distill`."""

import typer

from tiue.distill.command import distill_command
from tiue.errors import InputError, TiUEError


def main() -> None:
    """Run the command line; a mistake of the user's is one line and exit code 2."""
    try:
        typer.run(distill_command)
    except TiUEError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from error


if __name__ == "__main__":
    main()
