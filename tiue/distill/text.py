"""Text embeddings of the prompts: from the text encoder, kept in memory, or read from shards."""

import logging
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ENCODE_BATCH = 64


class TextSource(Protocol):
    """Embeddings of a list of prompts by index, and of the empty prompt."""

    prompts: list[str]
    empty: Tensor  # [1, L, D]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the embeddings of the prompts at `indices` [B]: [B, L, D] on the device."""


class TextEncoder:
    """A teacher's tokenizer and text encoder, as one function of prompts.

    Args:
        tokenizer: The tokenizer.
        text_encoder: The text encoder, on the device that it shall run on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder.eval().requires_grad_(False)
        self.device = text_encoder.device

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Encode prompts.

        Args:
            prompts: The prompts; one that is too long is cut, and named in the log.

        Returns:
            [B, L, D] float32, on the device.
        """
        length = self._tokenizer.model_max_length
        tokens = self._tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        untruncated = self._tokenizer(prompts, verbose=False).input_ids
        for prompt, ids in zip(prompts, untruncated, strict=True):
            if len(ids) > length:
                logger.warning("Only the first %d tokens of this prompt count: %r", length, prompt)
        # As diffusers does: Stable Diffusion's CLIP reads its padding, other encoders mask it.
        masked = getattr(self._text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        return self._text_encoder(tokens.input_ids, attention_mask=mask)[0].float()


class EncodedPrompts:
    """Prompts encoded by a text encoder: all of them beforehand where they fit in memory.

    Args:
        prompts: The prompts.
        encoder: The teacher's text encoder.
        cache_bytes: Encode all prompts now, keep the result in host memory and let go of the text
            encoder, if it takes no more than this; otherwise encode each batch when asked for it.
    """

    def __init__(self, prompts: list[str], encoder: TextEncoder, cache_bytes: int) -> None:
        self.prompts = prompts
        self._encoder: TextEncoder | None = encoder
        self._device = encoder.device
        self.empty = encoder([""])
        self._cached: Tensor | None = None
        if self.empty.nbytes * len(prompts) <= cache_bytes:
            starts = range(0, len(prompts), _ENCODE_BATCH)
            batches = [encoder(prompts[i : i + _ENCODE_BATCH]).cpu() for i in starts]
            self._cached, self._encoder = torch.cat(batches), None

    @property
    def cached(self) -> bool:
        """Whether every embedding is there already and the text encoder is gone."""
        return self._cached is not None

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the embeddings of the prompts at `indices` [B]: [B, L, D] on the device."""
        if self._cached is not None:
            return self._cached[indices].to(self._device, non_blocking=True)
        assert self._encoder is not None
        return self._encoder([self.prompts[i] for i in indices.tolist()])
