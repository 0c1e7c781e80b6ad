"""What the one-pass transformers share: the border, loading, and the pass itself."""

from __future__ import annotations

import inspect
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from tiue.errors import ArchitectureError, CheckpointError, InputError
from tiue.features import as_timesteps
from tiue.loading.checks import hub_arguments
from tiue.loading.weights import load_whole
from tiue.model import OnePassModel
from tiue.schedule import OnePassSchedule

T = TypeVar("T", bound="OnePassTransformer")

_BORDER = "num_shared_blocks"


@dataclass(frozen=True)
class TransformerFeatures:
    """What the shared blocks hand to the others, all of B rows, shared by every timestep.

    Attributes:
        hidden: [B, N, C] tokens after the last shared block.
        text: [B, L, D], as the blocks read it; of joint attention [B, L, C], after the last
            shared block.
        skips: [B, N, C] each, of blocks whose output a later block reads (Hunyuan), in their order.
        grid: tokens along height and width.
        conditioning: what the blocks read beside, of B rows: masks, sizes, pooled text, ...
    """

    hidden: torch.Tensor
    text: torch.Tensor
    grid: tuple[int, int]
    skips: tuple[torch.Tensor, ...] = ()
    conditioning: dict[str, Any] = field(default_factory=dict)


class OnePassTransformer(OnePassModel):
    """A diffusers transformer whose first blocks run once and whose last run for K timesteps.

    Same configuration and state dict as its diffusers parent, and the same `forward` where no
    `schedule` is given. The configuration carries the border as well: plain diffusers ignores it.
    """

    PARENT: ClassVar[type[Any]]
    BLOCKS = "transformer_blocks"  # name of the list of blocks

    config: Any
    patch_size: int
    gradient_checkpointing: bool
    # What `encode` takes by name beside sample, timestep and text.
    CONDITIONS: ClassVar[frozenset[str]] = frozenset()
    # Whether backward runs the first product of the decoder's feed-forwards again.
    recompute_feed_forward = False
    # Whether gradient checkpointing is of the decoder's blocks too.
    checkpoint_decoder = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `self`, sample, timestep and text come first.
        cls.CONDITIONS = frozenset(list(inspect.signature(cls.encode).parameters)[4:])

    @property
    def num_shared_blocks(self) -> int:
        """How many blocks run once: at least one, and at least one is left for the timesteps."""
        return int(self.config[_BORDER]) if _BORDER in self.config else len(self.blocks_list) // 2

    @num_shared_blocks.setter
    def num_shared_blocks(self, value: int) -> None:
        count = len(self.blocks_list)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < count:
            raise InputError(
                f"num_shared_blocks must be an integer from 1 to {count - 1} for the {count} blocks"
                f" of this {self.PARENT.__name__}, so that some run once and some for every"
                f" timestep; it is {value!r}"
            )
        self.register_to_config(**{_BORDER: value})  # type: ignore[attr-defined]

    @property
    def blocks_list(self) -> nn.ModuleList:
        """All blocks, in their order."""
        return getattr(self, self.BLOCKS)

    @property
    def shared_blocks(self) -> Sequence[nn.Module]:
        """The blocks that run once."""
        return list(self.blocks_list)[: self.num_shared_blocks]

    @property
    def decoder_blocks(self) -> Sequence[nn.Module]:
        """The blocks that run for every timestep."""
        return list(self.blocks_list)[self.num_shared_blocks :]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in diffusers; the border is no argument of the parent's constructor."""
        config = {name: value for name, value in config_dict.items() if name != _BORDER}
        return super().extract_init_dict(config, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | os.PathLike[str],
        num_shared_blocks: int | None = None,
        **kwargs: Any,
    ) -> T:
        """Load the weights of a transformer of this family; only safetensors are read.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            num_shared_blocks: the border; by default that of the saved configuration, else half.
            **kwargs: as diffusers' `from_pretrained` (`subfolder`, `torch_dtype`, ...).

        Returns:
            The student, in eval mode.

        Raises:
            CheckpointError: nothing there, a pickle, or another architecture.
            InputError: a border outside of the blocks.
        """
        name = pretrained_model_name_or_path
        kwargs["use_safetensors"] = True
        hub = hub_arguments(kwargs)
        try:
            saved = cls.load_config(name, **hub)  # type: ignore[attr-defined]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no transformer could be loaded from {name}: {error}") from error
        if saved.get("_class_name") not in (None, cls.PARENT.__name__, cls.__name__):
            raise CheckpointError(
                f"{name} holds a {saved['_class_name']}; {cls.__name__} takes a"
                f" {cls.PARENT.__name__}"
            )
        student = load_whole(super().from_pretrained, name, "transformer", **kwargs)  # type: ignore[misc]
        border = num_shared_blocks if num_shared_blocks is not None else saved.get(_BORDER)
        student.num_shared_blocks = len(student.blocks_list) // 2 if border is None else border
        return student

    @classmethod
    def from_transformer(cls: type[T], transformer: Any, num_shared_blocks: int | None = None) -> T:
        """Make a student of a transformer: it shares every module and parameter, copies nothing.

        Args:
            transformer: of this family, adapters and all.
            num_shared_blocks: the border; by default half of the blocks.

        Returns:
            The student, on the same device and in the same mode.

        Raises:
            ArchitectureError: another family.
            InputError: a border outside of the blocks.
        """
        if not isinstance(transformer, cls.PARENT):
            families = ", ".join(
                kind.PARENT.__name__ for kind in OnePassTransformer.__subclasses__()
            )
            raise ArchitectureError(
                f"{cls.__name__} is made of a {cls.PARENT.__name__}, not"
                f" {type(transformer).__name__}; one-pass students exist for {families}, and"
                " TiUEUNet for UNet2DConditionModel"
            )
        student = cls.__new__(cls)
        # The registries are copied so that a module set on one is not set on the other.
        for name, value in vars(transformer).items():
            registry = type(value) in (dict, OrderedDict, set)
            student.__dict__[name] = value.copy() if registry else value
        if num_shared_blocks is None:
            num_shared_blocks = student.num_shared_blocks
        student.num_shared_blocks = num_shared_blocks
        return student

    def to_json_string(self) -> str:
        """The configuration as plain diffusers loads it, with the border beside."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = self.PARENT.__name__
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _run(self, function: Any, *args: Any, decoder: bool = False) -> Any:
        """Call a block, or what stands for it, checkpointed where that is on."""
        checkpointed = self.gradient_checkpointing and (self.checkpoint_decoder or not decoder)
        if checkpointed and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *args)  # type: ignore[attr-defined]
        return function(*args)

    def encode(self, *args: Any, **kwargs: Any) -> TransformerFeatures:
        """Run the shared blocks once; see the family's own."""
        raise NotImplementedError

    def _decode_tokens(
        self, features: TransformerFeatures, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """[K*B, N, C] after the last norm and its modulation, before `proj_out`."""
        raise NotImplementedError

    def decode(
        self, features: TransformerFeatures, timesteps: torch.Tensor | Sequence[float]
    ) -> torch.Tensor:
        """Run the other blocks for K timesteps in one batch over the same features.

        Args:
            features: from `encode`.
            timesteps: [K].

        Returns:
            [K, B, C_out, H, W], the model output at each timestep; C_out counts the variance too
            where the model predicts one.

        Raises:
            InputError: no timestep.
        """
        timesteps = as_timesteps(timesteps, features.hidden.device)
        tokens = self.proj_out(self._decode_tokens(features, timesteps))  # type: ignore[attr-defined]
        return self._unpatchify(tokens, features).unflatten(0, (len(timesteps), -1))

    def decode_summed(
        self, features: TransformerFeatures, schedule: OnePassSchedule
    ) -> torch.Tensor:
        """sum_k E_k times the model output at t_k, summed before the last projection.

        Equal to the weighted sum of `decode` up to rounding: the projection is linear, its bias is
        scaled by sum_k E_k.

        Args:
            features: from `encode`.
            schedule: timesteps and E.

        Returns:
            [B, C_out, H, W].
        """
        project: Any = self.proj_out  # type: ignore[attr-defined]
        timesteps = as_timesteps(schedule.timesteps, features.hidden.device)
        tokens = self._decode_tokens(features, timesteps)
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        weights = schedule.noise_coefficients.to(tokens.device, dtype)
        parts = tokens.unflatten(0, (len(timesteps), -1))  # [K, B, N, C]
        total = torch.einsum("k,kbnc->bnc", weights, parts.to(dtype)).to(tokens.dtype)
        # What an adapter adds to the projection is linear too; its constant part is not scaled by
        # the weights unless it is called on zero as well.
        if type(project) is nn.Linear:
            bias = None if project.bias is None else (project.bias * weights.sum())
            out = nn.functional.linear(
                total, project.weight, None if bias is None else bias.to(total.dtype)
            )
        else:
            constant = project(torch.zeros_like(total[:1, :1]))
            out = project(total) + (weights.sum() - 1).to(total.dtype) * constant
        return self._unpatchify(out, features)

    def _run_pass(
        self,
        schedule: OnePassSchedule,
        return_dict: bool,
        sample: torch.Tensor,
        text: torch.Tensor,
        **conditioning: Any,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """What `forward` gives where it is called with a schedule: sum_k E_k times the outputs."""
        schedule = schedule if torch.compiler.is_compiling() else schedule.on(sample.device)
        given = {name: value for name, value in conditioning.items() if value is not None}
        self._check_conditions(given)
        features = self.encode(sample, schedule.encoder_timestep, text, **given)
        out = self.decode_summed(features, schedule).to(sample.dtype)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _noise(
        self,
        sample: torch.Tensor,
        schedule: OnePassSchedule,
        prompt_embeds: torch.Tensor,
        **conditioning: Any,
    ) -> torch.Tensor:
        self._check_conditions(conditioning)
        features = self.encode(sample, schedule.encoder_timestep, prompt_embeds, **conditioning)
        return self.decode_summed(features, schedule)[:, : sample.shape[1]]

    def predict_noise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor | Sequence[float],
        prompt_embeds: torch.Tensor,
        **conditioning: Any,
    ) -> torch.Tensor:
        """As `OnePassModel.predict_noise`, without a predicted variance."""
        self._check_conditions(conditioning)
        noise = super().predict_noise(latents, timesteps, prompt_embeds, **conditioning)
        return noise[:, :, : latents.shape[1]]

    def _check_conditions(self, given: dict[str, Any]) -> None:
        unknown = given.keys() - self.CONDITIONS
        if unknown:
            raise InputError(
                f"the one pass of a {self.PARENT.__name__} has no {', '.join(sorted(unknown))}; it"
                f" takes {', '.join(sorted(self.CONDITIONS))}"
            )

    def _check_inputs(self, sample: torch.Tensor, prompt_embeds: torch.Tensor) -> tuple[int, int]:
        """The grid of tokens that a sample is cut into."""
        channels, patch = self.config.in_channels, self.config.patch_size
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise InputError(
                f"latents must be [B, {channels}, H, W] for this transformer, got"
                f" {tuple(sample.shape)}"
            )
        height, width = sample.shape[2:]
        if height % patch or width % patch:
            raise InputError(
                f"height and width of the latents must be multiples of the patch, {patch}; got"
                f" {height} x {width}"
            )
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[0] != sample.shape[0]:
            raise InputError(
                f"prompt_embeds must be [{sample.shape[0]}, L, D], one row for each of the latents,"
                f" got {tuple(prompt_embeds.shape)}"
            )
        return height // patch, width // patch

    def _unpatchify(self, tokens: torch.Tensor, features: TransformerFeatures) -> torch.Tensor:
        """[rows, N, p * p * C_out] -> [rows, C_out, H, W]."""
        (height, width), patch = features.grid, self.config.patch_size
        maps = tokens.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
        return torch.einsum("nhwpqc->nchpwq", maps).flatten(2, 3).flatten(3, 4)


def shared_timestep(timestep: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """The shared blocks' timestep as [B], one for each row of `like`."""
    timestep = torch.as_tensor(timestep, device=like.device)
    if timestep.ndim > 1 or timestep.numel() not in (1, like.shape[0]):
        raise InputError(f"timestep must be a scalar, got shape {tuple(timestep.shape)}")
    return timestep.expand(like.shape[0])
