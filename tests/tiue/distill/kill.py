"""Writes checkpoints without pause in a child that is killed, again and again.

A child is forked, so that it starts at once: `python -m tests.tiue.distill.kill SETTINGS KILLS`.
"""

import json
import os
import random
import signal
import sys
import time

import torch

from tiue.distill.output import list_checkpoints
from tiue.distill.settings import load_config
from tiue.distill.trainer import Trainer


class Marks:
    """Weights that tell the step: the first ones, a thousandth larger with every step.

    A mixture of two checkpoints would show, and a run can go on from them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.first = [tensor.detach().clone() for tensor in self.tensors]

    @property
    def tensors(self) -> list[torch.Tensor]:
        trainer = self.trainer
        return [*trainer.student.parameters, *trainer.lora.parameters, *trainer.ema.shadow_params]

    @torch.no_grad()
    def write(self, step: int) -> None:
        for tensor, first in zip(self.tensors, self.first, strict=True):
            tensor.copy_(first * (1 + step / 1000))

    def are_of(self, step: int) -> bool:
        return self.trainer.step == step and all(
            torch.equal(tensor, first * (1 + step / 1000))
            for tensor, first in zip(self.tensors, self.first, strict=True)
        )


def write_for_ever(marks: Marks, told: int) -> None:
    trainer = marks.trainer
    while True:
        trainer.state.step += 1
        marks.write(trainer.state.step)
        os.write(told, b"s")
        trainer._save()
        os.write(told, b"d")


def main() -> None:
    settings, kills = sys.argv[1:]
    trainer = Trainer(load_config(settings))
    marks, folder = Marks(trainer), trainer.checkpoints.folder
    draw = random.Random(0)
    acknowledged = 0
    for _ in range(int(kills)):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            write_for_ever(marks, writer)
        os.close(writer)
        os.read(reader, 1)  # the first write has begun
        time.sleep(draw.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = b"s"
        while part := os.read(reader, 4096):
            told += part
        os.close(reader)
        acknowledged += told.count(b"d")
        found = list_checkpoints(folder)
        newest = int(found[-1].name.split("-")[1]) if found else 0
        whole = True
        if found:
            marks.write(-1)
            trainer._resume(found[-1])
            whole = marks.are_of(newest)
        line = {
            "acknowledged": acknowledged, "found": newest, "whole": whole,
            "in_a_write": told.endswith(b"s"),
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        acknowledged = newest  # one that was complete, though its save() had not returned


if __name__ == "__main__":
    main()
