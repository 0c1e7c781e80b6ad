"""What the trainer has to know of a network: UNets, and the transformers that can be distilled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from tiue.distill.text import Text
from tiue.dit import TiUEPixArtTransformer2DModel, TiUESD3Transformer2DModel
from tiue.errors import ArchitectureError
from tiue.unet import TiUEUNet


@dataclass(frozen=True)
class Family:
    """How networks of one class are told apart, called and kept.

    Attributes:
        plain: diffusers' class, whose folders the trainer writes.
        student: The one-pass class, of teacher and student alike.
        component: What a pipeline calls it: the name of its folder.
        sample: What its `forward` calls the noisy latents.
        lora_targets: The attention's projections that the LoRA teacher trains.
        alike: Settings of the configuration that student and teacher must share.
        conditions: (network, text) to what it takes besides the text's tokens.
        blocks: Parts that are called one after the other, for sharding.
    """

    plain: type[Any]
    student: type[Any]
    component: str
    sample: str
    lora_targets: tuple[str, ...]
    alike: tuple[str, ...]
    conditions: Callable[[Any, Text], dict[str, Any]]
    blocks: Callable[[Any], list[nn.Module]]


def _of_pixart(network: Any, text: Text) -> dict[str, Any]:
    given: dict[str, Any] = {"encoder_attention_mask": text.mask}
    if network.use_additional_conditions:
        height, width = text.size[:2]
        sizes = text.tokens.new_tensor([height, width, height / width])
        sizes = sizes.expand(len(text.tokens), 3)
        given["added_cond_kwargs"] = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
    return given


UNET = Family(
    plain=UNet2DConditionModel,
    student=TiUEUNet,
    component="unet",
    sample="sample",
    lora_targets=("to_q", "to_v"),
    alike=(
        "in_channels", "out_channels", "cross_attention_dim", "addition_embed_type",
        "projection_class_embeddings_input_dim",
    ),
    conditions=lambda _network, text: text.conditions(),
    blocks=lambda unet: [*unet.down_blocks, unet.mid_block, *unet.up_blocks],
)  # fmt: skip
PIXART = Family(
    plain=PixArtTransformer2DModel,
    student=TiUEPixArtTransformer2DModel,
    component="transformer",
    sample="hidden_states",
    lora_targets=("to_q", "to_v"),
    alike=("in_channels", "out_channels", "caption_channels", "use_additional_conditions"),
    conditions=_of_pixart,
    blocks=lambda transformer: list(transformer.blocks_list),
)
SD3 = Family(
    plain=SD3Transformer2DModel,
    student=TiUESD3Transformer2DModel,
    component="transformer",
    sample="hidden_states",
    # Text has projections of its own in joint attention.
    lora_targets=("to_q", "to_v", "add_q_proj", "add_v_proj"),
    alike=("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"),
    conditions=lambda _network, text: {"pooled_projections": text.pooled},
    blocks=lambda transformer: list(transformer.blocks_list),
)
FAMILIES = (UNET, PIXART, SD3)


def family_of(network: nn.Module) -> Family:
    """The family of a teacher's or a student's network."""
    return next(family for family in FAMILIES if isinstance(network, family.plain))


def family_named(name: str) -> Family:
    """The family of a class of diffusers by its name.

    Raises:
        ArchitectureError: If it cannot be distilled.
    """
    known = {family.plain.__name__: family for family in FAMILIES}
    if name not in known:
        raise ArchitectureError(
            f"A {name} cannot be distilled; these can: {', '.join(sorted(known))}."
        )
    return known[name]


def call(
    network: nn.Module, own: nn.Module, noisy: Tensor, timesteps: Tensor, text: Text
) -> Tensor:
    """What a network gives for noisy latents at timesteps, [B, C, H, W].

    Args:
        network: Whose call it is; accelerate's wrapper, where it trains.
        own: The network itself.
        noisy: x_t, [B, C, H, W].
        timesteps: As the network takes them, [B].
        text: B rows.
    """
    family = family_of(own)
    out = network(
        **{family.sample: noisy},
        timestep=timesteps,
        encoder_hidden_states=text.tokens,
        return_dict=False,
        **family.conditions(own, text),
    )[0]
    return out[:, : noisy.shape[1]]  # PixArt predicts a variance too
