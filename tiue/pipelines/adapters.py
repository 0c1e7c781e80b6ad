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

    # Diffusers' own.
    get_list_adapters: Any
    delete_adapters: Any
    unload_lora_weights: Any

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As in diffusers; nothing of a LoRA that does not fit stays behind.

        Raises:
            CheckpointError: A pickle, no such file, or made for a model of other sizes.
        """
        source = pretrained_model_name_or_path_or_dict
        check_adapter("LoRA", source, kwargs.get("weight_name"), kwargs.get("subfolder"))
        kwargs, before = only_safetensors(kwargs), self._adapter_names()
        try:
            with _reading("LoRA", source):
                super().load_lora_weights(source, *args, **kwargs)  # type: ignore[misc]
        except Exception:
            # The UNet has its part already where a text encoder refuses its own.
            if left := self._adapter_names() - before:
                if before:
                    self.delete_adapters(sorted(left))
                else:
                    self.unload_lora_weights()  # the layers themselves too
            raise

    def _adapter_names(self) -> set[str]:
        return {name for names in self.get_list_adapters().values() for name in names}

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
        if not mismatches and "ignore_mismatched_sizes" not in str(error):
            raise
        which = mismatches[0] if mismatches else "its weights for the text encoder do not fit"
        raise CheckpointError(
            f"this {kind} was made for a model of other sizes (SD 1.x, SD 2.x and SDXL differ):"
            f" {which}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {name} as a {kind}: {error}") from error
