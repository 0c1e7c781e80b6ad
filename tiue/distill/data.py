"""Prompts, the only data that the distillation needs."""

from pathlib import Path

import torch
from torch import Tensor

from tiue.errors import InputError


def read_prompts(path: Path) -> list[str]:
    """Read a text file of prompts, one a line, in the file's order.

    Args:
        path: UTF-8 text file; blank lines and repeated prompts are left out.

    Returns:
        The distinct prompts, stripped of outer blanks.

    Raises:
        InputError: If the file cannot be read as text or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Cannot read prompts from '{path}' ({error}). Give a UTF-8 file, one prompt a line."
        ) from error
    prompts = list(dict.fromkeys(stripped for line in lines if (stripped := line.strip())))
    if not prompts:
        raise InputError(f"No prompt in '{path}'. Write one prompt a line.")
    return prompts


class PromptOrder:
    """An endless order of prompts, every epoch shuffled anew, in which any place can be looked up.

    The order depends on the seed alone and keeps no state, so a resumed run goes on in it and
    processes can each take their own part of it.

    Args:
        count: Number of prompts.
        seed: Seed of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epochs: dict[int, Tensor] = {}

    def __getitem__(self, places: range) -> Tensor:
        """Look up consecutive places.

        Args:
            places: Places in the endless order, counted from 0.

        Returns:
            The prompts' indices, [len(places)] int64.
        """
        epochs = {place // self.count for place in places}
        self._epochs = {epoch: self._permutation(epoch) for epoch in epochs}
        return torch.stack([self._epochs[p // self.count][p % self.count] for p in places])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch in self._epochs:
            return self._epochs[epoch]
        # A prime far from small seeds, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        return torch.randperm(self.count, generator=generator)
