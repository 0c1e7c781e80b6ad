"""Small networks that ship with the package beside the models: float16, with what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tiue.errors import CheckpointError
from tiue.files import write_file


def load_network(network: nn.Module, path: Path, name: str, command: str) -> dict[str, Any]:
    """Loads a network that `save_network` wrote, and freezes it.

    Args:
        network: of any weights; float32, in evaluation mode afterwards.
        path: the file.
        name: what the network is called in an error.
        command: that makes the file.

    Returns:
        What is known of it: training, accuracies.

    Raises:
        CheckpointError: the file is missing or of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        missing, unknown = network.load_state_dict(state, strict=False)
        # A batch norm's count of its updates is no weight.
        if unknown or any("num_batches_tracked" not in name for name in missing):
            raise KeyError("weights of another network")
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"cannot load {name} {path} ({error}): install the whole package, or make it with"
            f" `{command}`"
        ) from error
    network.eval().requires_grad_(False)
    return facts


def save_network(network: nn.Module, facts: dict[str, Any], path: Path) -> None:
    """Writes a network in float16, whole or not at all, with what is known of it."""
    tensors = {
        name: value.half().contiguous()
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }
    write_file(path, lambda beside: save_file(tensors, beside, {"facts": json.dumps(facts)}))
