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

from tiue.distill.checkpoint import list_checkpoints
from tiue.distill.settings import load_config
from tiue.distill.trainer import Trainer


def fill(trainer: Trainer, value: float) -> None:
    """Give every weight one value, so that a mixture of two checkpoints would show."""
    with torch.no_grad():
        for parameter in (*trainer.student.parameters, *trainer.lora.parameters):
            parameter.fill_(value)
        for parameter in trainer.ema.shadow_params:
            parameter.fill_(value)


def is_whole(trainer: Trainer, step: int) -> bool:
    tensors = [*trainer.student.parameters, *trainer.lora.parameters, *trainer.ema.shadow_params]
    return trainer.step == step and all(bool((t == step).all()) for t in tensors)


def write_for_ever(trainer: Trainer, told: int) -> None:
    while True:
        trainer.state.step += 1
        fill(trainer, trainer.state.step)
        os.write(told, b"s")
        trainer._save()
        os.write(told, b"d")


def main() -> None:
    settings, kills = sys.argv[1:]
    trainer = Trainer(load_config(settings))
    folder = trainer.checkpoints.folder
    draw = random.Random(0)
    acknowledged = 0
    for _ in range(int(kills)):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            write_for_ever(trainer, writer)
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
            fill(trainer, -1.0)
            trainer._resume(found[-1])
            whole = is_whole(trainer, newest)
        line = {
            "acknowledged": acknowledged, "found": newest, "whole": whole,
            "in_a_write": told.endswith(b"s"),
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        acknowledged = newest  # one that was complete, though its save() had not returned


if __name__ == "__main__":
    main()
