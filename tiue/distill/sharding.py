"""FSDP2 by torch's own `fully_shard`: every parameter of both networks spread over the processes.

accelerate knows one network and its optimiser, and takes its FSDP branch on GPUs alone; here both
networks are sharded on any device, and accelerate keeps what it is for beside that.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tiue.distill.config import DistillConfig
from tiue.distill.step import Trained
from tiue.errors import InputError

OPTIMIZERS = "optimizers"


def accelerate_asks_for_it() -> bool:
    """Whether `accelerate config` says FSDP; asked once, for accelerate's own is not used."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def check_sharding(config: DistillConfig, accelerator: Accelerator) -> None:
    """Refuse what cannot be sharded.

    Raises:
        InputError: For one process, float16 (its scaled gradients), 8-bit optimisers, a student
            that is a LoRA, and torch.compile, which has not been tried with it.
    """
    for refused, cure in (
        (accelerator.num_processes == 1, "several processes: accelerate launch --num_processes N"),
        (config.mixed_precision == "fp16", "mixed_precision bf16 or no"),
        (config.optimizer == "adamw8bit", "optimizer adam or adamw"),
        (config.compile != "no", "compile 'no'"),
        (config.student_lora_rank > 0, "student_lora_rank 0: a LoRA fits without it"),
    ):
        if refused:
            raise InputError(f"sharding 'full' needs {cure}.")


def shard(network: nn.Module, blocks: list[nn.Module], accelerator: Accelerator) -> nn.Module:
    """Shard a network's parameters over all processes.

    Args:
        network: On the device, with its parameters frozen or not as they shall stay.
        blocks: Parts of it whose own call gathers their parameters, so that no more than one of
            them is whole at a time; the rest is gathered by the network's call.
        accelerator: Gives device, processes and autocast.

    Returns:
        The network, whose parameters are DTensors; its call gathers them and lets them go.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for part in (*blocks, network):
        # Let go of after a forward without backward too, or it would not see the next weights.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return accelerator.prepare_model(network, evaluation_mode=True)  # autocast alone


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` made it."""
    return isinstance(network, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; every process must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Write a whole tensor into a parameter, or this process's part of it."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def whole_state(network: nn.Module, sharded: bool) -> dict[str, Any]:
    """A network's whole state: on the main process alone where it is sharded; every one asks."""
    if not sharded:
        return network.state_dict()
    return get_model_state_dict(
        network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def save_optimizers(trained: dict[str, Trained], folder: Path) -> None:
    """Write sharded optimisers' states, each process its own part."""
    dcp.save(_states(_optimizer_dicts(trained)), checkpoint_id=folder / OPTIMIZERS)


def load_optimizers(trained: dict[str, Trained], folder: Path) -> None:
    """Read what `save_optimizers` wrote, on any number of processes."""
    found = _optimizer_dicts(trained)
    dcp.load(_states(found), checkpoint_id=folder / OPTIMIZERS)  # into these tensors
    for name, part in trained.items():
        set_optimizer_state_dict(part.network, part.optimizer, found[name])


def _optimizer_dicts(trained: dict[str, Trained]) -> dict[str, dict[str, Any]]:
    return {n: get_optimizer_state_dict(t.network, t.optimizer) for n, t in trained.items()}


def _states(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The moments alone: rates and betas are settings, and would be a file's entry a parameter."""
    return {name: optimizer["state"] for name, optimizer in found.items()}
