"""Pipelines of one family made of a folder, a hub id, a single file, or a pipeline in memory."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from tiue.errors import CheckpointError, InputError, TiUEError
from tiue.loading import families
from tiue.loading.checks import fit_tokenizer, hub_arguments
from tiue.loading.single_file import load_single_file
from tiue.loading.weights import check_classes, load_models
from tiue.pipelines.one_pass import OnePass
from tiue.pipelines.scheduler import with_one_pass
from tiue.unet import TiUEUNet

_log = logging.getLogger(__name__)


class LoadableOnePass(OnePass):
    """The part of `TiUEPipeline` and `TiUEXLPipeline` that loads.

    Attributes:
        family: what their folders hold.
    """

    family: families.Family
    _optional_components: list[str]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Load a pipeline of the same family, distilled or not, from safetensors.

        A scheduler in the folder that has no one pass (PNDM, which Stable Diffusion ships with, or
        one that draws noise) is replaced by DDIM with the same noise levels, with a warning; that
        is the scheduler of the method. One that is handed in as `scheduler=` is left as it is.

        Args:
            pretrained_model_name_or_path: A folder in the diffusers layout, or a hub id.
            **kwargs: As in diffusers (`dtype` or `torch_dtype`, `variant`, `revision`, ...),
                components (`unet=TiUEUNet.from_pretrained(...)`) among them.

        Returns:
            The pipeline, on the CPU.

        Raises:
            CheckpointError: Missing, incomplete, pickled, or of another architecture.
            ArchitectureError: The one pass cannot be formed of the UNet.
        """
        model = os.fspath(pretrained_model_name_or_path)
        if not kwargs.setdefault("use_safetensors", True):
            raise InputError("use_safetensors=False: only safetensors are loaded; leave it out")
        hub = hub_arguments(kwargs)
        try:
            is_local = families.check_local(model, cls.family, kwargs)
            index = cls.load_config(model, **hub)
            if not is_local:
                families.check_index(model, index, cls.family, kwargs)
            check_classes(model, index, kwargs)
            if "safety_checker" in cls._optional_components:
                kwargs.setdefault("safety_checker", None)
            folder = model if is_local else cls.download(model, **kwargs)
            kwargs |= load_models(Path(folder), index, kwargs)
            pipe = super().from_pretrained(model, **kwargs)
            _fit_tokenizers(pipe)
            if "scheduler" not in kwargs:
                pipe.scheduler = with_one_pass(pipe.scheduler)
        except TiUEError:
            raise
        except Exception as error:  # what the files of a folder can make diffusers raise
            raise CheckpointError(
                f"cannot load {model} as a {cls.family.name} pipeline:"
                f" {type(error).__name__}: {error}"
            ) from error
        return pipe

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Load a Stable Diffusion checkpoint that is one .safetensors file.

        Args:
            pretrained_model_link_or_path: The file or its link.
            **kwargs: As in diffusers; `config` names a folder or hub id of the same family, whose
                configuration and tokenizer are taken in the place of the hub's.

        Returns:
            The pipeline, on the CPU.

        Raises:
            CheckpointError: No such file, a pickle, damaged, or of another architecture.
        """
        pipe = load_single_file(super().from_single_file, pretrained_model_link_or_path, **kwargs)
        if "scheduler" not in kwargs:
            pipe.scheduler = with_one_pass(pipe.scheduler)
        return pipe

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        torch_dtype: torch.dtype | None = None,
        **components: Any,
    ) -> Any:
        """Make a pipeline of another one's components; nothing is copied.

        Args:
            pipeline: A pipeline of the same family, in one pass or not.
            torch_dtype: Type to bring the shared components to; by default they stay as they are
                (diffusers' own `from_pipe` makes them float32).
            **components: Components to take in the place of the pipeline's. A scheduler is left as
                it is; the pipeline's own is replaced by DDIM where it has no one pass, here only.

        Returns:
            The pipeline.

        Raises:
            CheckpointError: The pipeline is of another architecture.
            ArchitectureError: The one pass cannot be formed of the UNet.
        """
        name = f"the pipeline {pipeline.name_or_path or ''}".strip()
        index = json.loads(pipeline.to_json_string())
        families.check_index(name, index, cls.family, components)
        pipe = cls(**pipeline.components | components)
        if "scheduler" not in components:
            pipe.scheduler = with_one_pass(pipe.scheduler)
        return pipe if torch_dtype is None else pipe.to(dtype=torch_dtype)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The parent's reading of a model_index.json; a student stands under its diffusers name."""
        result = super().load_config(*args, **kwargs)
        index = result[0] if isinstance(result, tuple) else result
        if index.get("unet", [None])[-1] == TiUEUNet.__name__:
            index["unet"] = ["diffusers", UNet2DConditionModel.__name__]
        return result


def _fit_tokenizers(pipe: Any) -> None:
    """Bring tokenizers to the length of their text encoders; refuse those that do not fit."""
    for end in ("", "_2"):
        tokenizer = getattr(pipe, f"tokenizer{end}", None)
        encoder: Any = getattr(pipe, f"text_encoder{end}", None)
        if tokenizer is not None and hasattr(encoder, "config"):
            fit_tokenizer(tokenizer, encoder.config, f"tokenizer{end}")
