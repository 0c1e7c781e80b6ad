"""LoRAs, IP-Adapters and textual inversions: loaded by diffusers, from safetensors alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from tiue.errors import CheckpointError, TiUEError
from tiue.loading.single_file import check_adapter, only_safetensors


class SafeAdapters:
    """The part of a pipeline of one pass that loads what people attach to a model."""

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers; nothing of a LoRA that does not fit stays behind.

        Raises:
            CheckpointError: A pickle, no such file, or made for a model of other sizes.
        """
        source = pretrained_model_name_or_path_or_dict
        check_adapter("LoRA", source, kwargs.get("weight_name"), kwargs.get("subfolder"))
        with _reading("LoRA", source):
            super().load_lora_weights(  # type: ignore[misc]
                source, *args, **only_safetensors(kwargs)
            )

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: Any,
        weight_name: Any,
        image_encoder_folder: str | None = "image_encoder",
        **kwargs: Any,
    ) -> None:
        """As in diffusers.

        Raises:
            CheckpointError: A pickle, or no such file.
        """
        source = pretrained_model_name_or_path_or_dict
        check_adapter("IP-Adapter", source, weight_name, subfolder)
        with _reading("IP-Adapter", source):
            super().load_ip_adapter(  # type: ignore[misc]
                source, subfolder, weight_name, image_encoder_folder, **kwargs
            )

    def load_textual_inversion(
        self, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers.

        Raises:
            CheckpointError: A pickle, or no such file.
        """
        source = pretrained_model_name_or_path
        check_adapter(
            "textual inversion", source, kwargs.get("weight_name"), kwargs.get("subfolder")
        )
        with _reading("textual inversion", source):
            super().load_textual_inversion(  # type: ignore[misc]
                source, *args, **only_safetensors(kwargs)
            )


@contextmanager
def _reading(kind: str, source: Any) -> Iterator[None]:
    """Gives errors of diffusers the package's own class."""
    name = source if isinstance(source, str) else "this"
    try:
        yield
    except TiUEError:
        raise
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        mismatches = [line for line in lines if line.startswith("size mismatch")]
        if not mismatches:
            raise
        raise CheckpointError(
            f"this {kind} was made for a model of other sizes (SD 1.x, SD 2.x and SDXL differ):"
            f" {mismatches[0]}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {name} as a {kind}: {error}") from error
