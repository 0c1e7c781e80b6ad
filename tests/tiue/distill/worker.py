"""Short runs that tell their gradients: alone in a test, or in each of several processes.

`python -m torch.distributed.run ... -m tests.tiue.distill.worker FOLDER SETTINGS...` makes one run
after the other, so that what starts and joins the processes is paid once.
"""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tiue.distill.embeddings import embed_text
from tiue.distill.settings import load_config
from tiue.distill.sharding import whole
from tiue.distill.trainer import Trainer


def run(config) -> dict[str, torch.Tensor]:
    """Train, and return the first step's gradients and the last weights, all by name.

    `sharded` is the share of each network's parameters that are DTensors.
    """
    trainer = Trainer(config)
    told: dict[str, torch.Tensor] = {}
    networks = {"student": trainer.student, "lora": trainer.lora}
    for part, trained in networks.items():
        every = list(trained.network.parameters())
        told[f"{part} sharded"] = torch.tensor([isinstance(p, DTensor) for p in every]).float()
        names = [n for n, p in trained.network.named_parameters() if p.requires_grad]
        names = [name.removeprefix("module.") for name in names]

        def note(*_, part=part, trained=trained, names=names) -> None:
            for name, parameter in zip(names, trained.parameters, strict=True):
                told.setdefault(f"{part} gradient {name}", whole(parameter.grad).clone())

        optimizer = getattr(trained.optimizer, "optimizer", trained.optimizer)
        optimizer.register_step_pre_hook(note)
    trainer.train()
    for part, trained in networks.items():
        for name, parameter in trained.network.named_parameters():
            if parameter.requires_grad:
                told[f"{part} weight {name.removeprefix('module.')}"] = whole(parameter).clone()
    return {name: tensor.contiguous() for name, tensor in told.items()}


if __name__ == "__main__":
    folder, *every = sys.argv[1:]
    torch.set_num_threads(1)
    for number, settings in enumerate(every):
        config = load_config(settings)
        if number == 0 and config.sharding == "none":
            embed_text(config.teacher, config.prompts, Path(folder, "text"), shard_size=2, cpu=True)
        AcceleratorState._reset_state()
        told = run(config)
        rank = torch.distributed.get_rank()
        save_file(told, Path(folder) / f"run-{number}-rank-{rank}.safetensors")
    torch.distributed.destroy_process_group()
