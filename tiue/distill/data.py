"""The order of prompts, and the random numbers that go with each sample."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


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


class SampleDraws:
    """What is drawn at random for a batch, each sample from a generator of its own.

    A sample draws the same whatever batch, micro-batch or process it falls into.

    Args:
        seed: Seed of the run.
        samples: The samples' places in the run's order.
        device: Where the numbers go; they are drawn on the CPU, so that every device gets the same.
    """

    def __init__(self, seed: int, samples: range, device: torch.device) -> None:
        words = [np.random.SeedSequence((seed, s)).generate_state(1, np.uint64)[0] for s in samples]
        self._generators = [torch.Generator().manual_seed(int(word)) for word in words]
        self._device = device

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal numbers of a shape for each sample: [B, *shape]."""
        return self._stack(torch.randn(shape, generator=g) for g in self._generators)

    def integers(self, least: int, greatest: int) -> Tensor:
        """Draw one integer of least..greatest, both included, for each sample: [B] int64."""
        return self._stack(
            torch.randint(least, greatest + 1, (), generator=g) for g in self._generators
        )

    def chances(self, probability: float) -> Tensor:
        """Draw for each sample whether something of a probability happens: [B] bool."""
        return self._stack(torch.rand((), generator=g) < probability for g in self._generators)

    def _stack(self, numbers: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(numbers)).to(self._device)
