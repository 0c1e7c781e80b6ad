"""The options of the commands that make an embedded model, `python -m tiue.MODEL.train STAGE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Work = Annotated[Path, typer.Option(help="Where pictures, checkpoints and results go.")]
Steps = Annotated[int, typer.Option(min=1, help="Updates.")]
RecipeSteps = Annotated[int | None, typer.Option(min=1, help="Updates; by default the recipe's.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
DecoderSteps = Annotated[
    int, typer.Option("--num-decoder-steps", "-k", min=1, help="Decoder timesteps K.")
]
Weights = Annotated[
    Path | None, typer.Option(help="By default the weights folder of this package.")
]
