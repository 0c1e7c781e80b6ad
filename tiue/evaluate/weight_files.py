"""Files of weights that nobody may fetch unasked: found, or named with where they belong."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from tiue.errors import CheckpointError


def find_weights(what: str, name: str, url: str, path: Path | None) -> Path:
    """Find a file of weights.

    Args:
        what: For the message.
        name: The file's published name.
        url: Where it is published.
        path: Where the user says it is; None looks in torch.hub's folder of checkpoints.

    Returns:
        The file.

    Raises:
        CheckpointError: It is not there; the message says which file to put where.
    """
    place = path or Path(torch.hub.get_dir()) / "checkpoints" / name
    if not place.is_file():
        raise CheckpointError(
            f"no weights of {what}: there is no file {place}. Fetch {url} and put it there, or"
            " name the file with --features-weights (Inception) or --lpips-weights (AlexNet)."
        )
    return place


def read_weights(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Read a state dict that holds at least a network's parameters; never runs code of the file.

    Args:
        path: A file that torch.save wrote.
        network: Whose parameters must be there, in their shapes.

    Returns:
        The state dict.

    Raises:
        CheckpointError: The file is corrupt or of another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        fits = all(state[n].shape == p.shape for n, p in network.named_parameters())
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise CheckpointError(f"cannot read {path} ({error}); fetch it again") from error
    if not fits:
        raise CheckpointError(f"{path} holds the weights of another network")
    return state
