"""Students made of diffusers UNets, in a folder, on the hub or in memory, and saved as such."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel

from tiue.errors import CheckpointError
from tiue.loading.checks import (
    check_architecture,
    check_is_unet,
    check_unet_config,
    check_unet_folder,
    hub_arguments,
)
from tiue.loading.single_file import load_single_file
from tiue.loading.weights import load_whole
from tiue_kernels.nn.layers import runs_own_forward

T = TypeVar("T", bound="LoadableUNet")


class LoadableUNet(UNet2DConditionModel):
    """The part of `TiUEUNet` that loads and saves: weights and configuration are diffusers' own.

    Attributes:
        channels_last_on: types of devices on which convolutions' weights are laid out in
            channels_last, in place, as tensor cores read them; maps follow their weights. Set it to
            () to leave them as they are.
    """

    channels_last_on: tuple[str, ...] = ("cuda",)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """What `to`, `half` and the like do."""
        module = super()._apply(fn, recurse)
        self._lay_out_weights()
        return module

    def _lay_out_weights(self) -> None:
        for weight in self.parameters():
            if weight.ndim == 4 and weight.device.type in self.channels_last_on:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(
        cls: type[T], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> T:
        """Load the weights of any Stable Diffusion UNet; only safetensors are read.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            **kwargs: as diffusers' `from_pretrained` (`subfolder`, `dtype` or `torch_dtype`, ...).

        Returns:
            The student, in eval mode.

        Raises:
            CheckpointError: nothing there, a pickle, or another architecture.
            ArchitectureError: a UNet without cross-attention.
        """
        name, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder")
        check_unet_folder(name, subfolder)
        hub = hub_arguments(kwargs)
        kwargs["use_safetensors"] = True
        try:
            check_unet_config(name, cls.load_config(name, **hub))
        except CheckpointError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"no UNet could be loaded from {name}: {error}") from error
        unet = load_whole(super().from_pretrained, name, "unet", **kwargs)
        check_architecture(unet)
        return unet

    @classmethod
    def from_single_file(
        cls: type[T], pretrained_model_link_or_path_or_dict: Any, **kwargs: Any
    ) -> T:
        """Load the UNet of a Stable Diffusion checkpoint that is one .safetensors file.

        Args:
            pretrained_model_link_or_path_or_dict: The file or its link, or its weights.
            **kwargs: As in diffusers (`config`, `subfolder`, `torch_dtype`, ...).

        Returns:
            The student, in eval mode.

        Raises:
            CheckpointError: No such file, a pickle, damaged, or of another architecture.
            ArchitectureError: A UNet without cross-attention.
        """
        source = pretrained_model_link_or_path_or_dict
        if isinstance(source, dict):
            unet = super().from_single_file(source, **kwargs)
        else:
            unet = load_single_file(super().from_single_file, source, **kwargs)
        check_architecture(unet)
        return unet

    @classmethod
    def from_unet(cls: type[T], unet: UNet2DConditionModel) -> T:
        """Make a student of a UNet: it shares every module and parameter, nothing is copied.

        On a GPU the weights of convolutions, the UNet's own, are laid out in channels_last.

        Args:
            unet: any Stable Diffusion UNet, adapters and all.

        Returns:
            The student, on the same device and in the same mode.

        Raises:
            ArchitectureError: a UNet without cross-attention, one that something is wrapped around,
                or no `UNet2DConditionModel`.
        """
        check_is_unet(unet)
        check_architecture(unet)
        student = _shared(unet, cls)
        student._lay_out_weights()
        return student

    def to_unet(self) -> UNet2DConditionModel:
        """A plain UNet of the student: it shares every module and parameter, nothing is copied."""
        return _shared(self, UNet2DConditionModel)

    def to_json_string(self) -> str:
        """The configuration as plain diffusers loads it, and without the folder it came from."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = UNet2DConditionModel.__name__
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _shared(unet: UNet2DConditionModel, cls: Any) -> Any:
    """A model of another class with the same modules and parameters."""
    shared = cls.__new__(cls)
    # The registries are copied so that a module set on one is not set on the other.
    for name, value in vars(unet).items():
        if name == "forward" and runs_own_forward(unet):
            continue  # bound to the other model
        registry = type(value) in (dict, OrderedDict, set)
        shared.__dict__[name] = value.copy() if registry else value
    return shared
