"""The student as a LoRA: a frozen network, the adapter that is trained, and both as one."""

from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from tiue.distill.config import DistillConfig

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def add_student_lora(unet: Any, config: DistillConfig) -> None:
    """Freeze a student and put a LoRA on its attention and feed-forward, in float32.

    Args:
        unet: The student.
        config: Gives rank and alpha.
    """
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=config.student_lora_rank,
            lora_alpha=config.student_lora_alpha,
            target_modules=_TARGETS,
            init_lora_weights="gaussian",
        )
    )
    cast_training_params(unet, torch.float32)


@torch.no_grad()
def merged_state(unet: Any) -> dict[str, Tensor]:
    """A network's state with its LoRA in the weights, named as one without, in float32."""
    state = {
        name.replace(".base_layer.", "."): tensor.float()
        for name, tensor in unet.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in unet.named_modules():
        if isinstance(module, BaseTunerLayer):
            # PEFT's own merging writes to the weights, and half precision would not undo it.
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.get_delta_weight("default")
    return state
