"""Text embeddings of the prompts: from the text encoder, kept in memory, or read from shards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ENCODE_BATCH = 64


class Text(NamedTuple):
    """What a UNet is told of B prompts.

    Attributes:
        tokens: [B, L, D].
        pooled: [B, P], of SDXL alone.
        size: SDXL's six numbers: height, width, crop above and left, height, width, in pixels.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    size: tuple[int, ...] = ()

    def map(self, change: Callable[[Any], Any]) -> Text:
        """Both tensors, changed alike."""
        return self._replace(
            tokens=change(self.tokens), pooled=None if self.pooled is None else change(self.pooled)
        )

    def pair(self, other: Text, join: Callable[[Tensor, Tensor], Tensor]) -> Text:
        """Both tensors of this and of another, joined."""
        pooled = self.pooled
        if pooled is not None:
            assert other.pooled is not None
            pooled = join(pooled, other.pooled)
        return self._replace(tokens=join(self.tokens, other.tokens), pooled=pooled)

    def conditions(self) -> dict[str, Any]:
        """What diffusers' UNets take besides the tokens."""
        if self.pooled is None:
            return {}
        rows, device = len(self.tokens), self.tokens.device
        time_ids = torch.tensor(self.size, dtype=self.tokens.dtype, device=device)
        return {
            "added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": time_ids.expand(rows, -1)}
        }


class Encoder(Protocol):
    """A teacher's tokenizers and text encoders, as one function of prompts."""

    device: torch.device

    def __call__(self, prompts: list[str]) -> Text:
        """Encode B prompts, in float32, on the device."""

    def empty(self) -> Text:
        """What guidance takes for no prompt, one row."""

    def lengths(self, prompts: list[str]) -> list[int]:
        """Tokens of prompts, those of beginning and end among them, without padding."""


class TextSource(Protocol):
    """Embeddings of a list of prompts by index, and of the empty prompt."""

    prompts: list[str]
    empty: Text  # one row

    def __getitem__(self, indices: Tensor) -> Text:
        """Return the embeddings of the prompts at `indices` [B], on the device."""


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

    def empty(self) -> Text:
        """The embedding of "", which guidance takes for no prompt."""
        return self([""])

    def lengths(self, prompts: list[str]) -> list[int]:
        """Tokens of prompts, cut to the tokenizer's length."""
        return _lengths(self._tokenizer, prompts)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Text:
        """Encode prompts.

        Args:
            prompts: The prompts; one that is too long is cut, and named in the log.

        Returns:
            [B, L, D], on the device.
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
        return Text(self._text_encoder(tokens.input_ids, attention_mask=mask)[0].float())


class XLTextEncoder:
    """SDXL's two tokenizers and text encoders, through the pipeline's own `encode_prompt`.

    Args:
        pipeline: A pipeline of these four parts, which may have no others.
    """

    def __init__(self, pipeline: StableDiffusionXLPipeline) -> None:
        self._pipeline = pipeline
        self.device = pipeline.text_encoder_2.device

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Text:
        """Encode prompts: [B, L, D1 + D2] and pooled [B, D2]; one that is too long is cut."""
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return Text(tokens.float(), pooled.float())

    @torch.no_grad()
    def empty(self) -> Text:
        """What the pipeline takes for no prompt: zeros in SDXL's base model."""
        _, tokens, _, pooled = self._pipeline.encode_prompt(
            [""], device=self.device, do_classifier_free_guidance=True
        )
        return Text(tokens.float(), pooled.float())

    def lengths(self, prompts: list[str]) -> list[int]:
        """Tokens of prompts, the longer of both tokenizers' counts."""
        tokenizers = (self._pipeline.tokenizer, self._pipeline.tokenizer_2)
        counts = [_lengths(tokenizer, prompts) for tokenizer in tokenizers]
        return [max(pair) for pair in zip(*counts, strict=True)]


def _lengths(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[int]:
    ids = tokenizer(prompts, truncation=True, max_length=tokenizer.model_max_length).input_ids
    return [len(row) for row in ids]


class EncodedPrompts:
    """Prompts encoded by a text encoder: all of them beforehand where they fit in memory.

    Args:
        prompts: The prompts.
        encoder: The teacher's text encoder.
        cache_bytes: Encode all prompts now, keep the result in host memory and let go of the text
            encoder, if it takes no more than this; otherwise encode each batch when asked for it.
    """

    def __init__(self, prompts: list[str], encoder: Encoder, cache_bytes: int) -> None:
        self.prompts = prompts
        self._encoder: Encoder | None = encoder
        self._device = encoder.device
        self.empty = encoder.empty()
        self._cached: Text | None = None
        row = sum(t.nbytes for t in self.empty[:2] if t is not None)
        if row * len(prompts) <= cache_bytes:
            starts = range(0, len(prompts), _ENCODE_BATCH)
            batches = [encoder(prompts[i : i + _ENCODE_BATCH]).map(Tensor.cpu) for i in starts]
            self._cached, self._encoder = join(batches), None

    @property
    def cached(self) -> bool:
        """Whether every embedding is there already and the text encoder is gone."""
        return self._cached is not None

    def __getitem__(self, indices: Tensor) -> Text:
        """Return the embeddings of the prompts at `indices` [B], on the device."""
        if self._cached is not None:
            return self._cached.map(lambda t: t[indices].to(self._device, non_blocking=True))
        assert self._encoder is not None
        return self._encoder([self.prompts[i] for i in indices.tolist()])


def join(texts: list[Text]) -> Text:
    """Put the rows of several under one another."""
    pooled = [text.pooled for text in texts if text.pooled is not None]
    tokens = torch.cat([text.tokens for text in texts])
    return texts[0]._replace(tokens=tokens, pooled=torch.cat(pooled) if pooled else None)
