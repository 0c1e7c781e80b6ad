"""A short run that tells its gradients: alone in a test, or one of several under torchrun."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tiue.distill.settings import load_config
from tiue.distill.trainer import Trainer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone().contiguous()


def run(config) -> dict[str, torch.Tensor]:
    """Train, and return the first step's gradients and the last weights, all by name."""
    trainer = Trainer(config)
    told: dict[str, torch.Tensor] = {}
    for part, trained in (("student", trainer.student), ("lora", trainer.lora)):
        names = [n for n, p in trained.network.named_parameters() if p.requires_grad]
        names = [name.removeprefix("module.") for name in names]

        def note(*_, part=part, trained=trained, names=names) -> None:
            for name, parameter in zip(names, trained.parameters, strict=True):
                told.setdefault(f"{part} gradient {name}", whole(parameter.grad))

        trained.optimizer.optimizer.register_step_pre_hook(note)
    trainer.train()
    for part, trained in (("student", trainer.student), ("lora", trainer.lora)):
        for name, parameter in trained.network.named_parameters():
            if parameter.requires_grad:
                told[f"{part} weight {name.removeprefix('module.')}"] = whole(parameter)
    return told


if __name__ == "__main__":
    settings, folder = sys.argv[1:]
    config = load_config(settings)
    torch.set_num_threads(1)
    told = run(config)
    rank = torch.distributed.get_rank()
    save_file(told, Path(folder) / f"rank-{rank}.safetensors")
    torch.distributed.destroy_process_group()
