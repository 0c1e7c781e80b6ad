"""Text embeddings of the prompts: from the text encoder, kept in memory, or read from shards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
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
        pooled: [B, P], of SDXL and Stable Diffusion 3.
        size: SDXL's six numbers: height, width, crop above and left, height, width, in pixels.
        mask: [B, L], 1 where there is a token and 0 where there is padding, of PixArt.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    size: tuple[int, ...] = ()
    mask: Tensor | None = None

    def map(self, change: Callable[[Any], Any]) -> Text:
        """All tensors, changed alike."""
        return self.of({name: change(own) for name, own in self.tensors().items()})

    def of(self, tensors: dict[str, Tensor]) -> Text:
        """The same with other tensors, by name."""
        return Text(tensors["tokens"], tensors.get("pooled"), self.size, tensors.get("mask"))

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {"tokens": self.tokens, "pooled": self.pooled, "mask": self.mask}
        return {name: own for name, own in named.items() if own is not None}

    def pair(self, other: Text, join: Callable[[Tensor, Tensor], Tensor]) -> Text:
        """The tensors of this and of another, joined."""
        others = other.tensors()
        return self.of({name: join(own, others[name]) for name, own in self.tensors().items()})

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


class PixArtTextEncoder:
    """PixArt's T5, through the pipeline's own `encode_prompt`.

    Args:
        pipeline: A pipeline of tokenizer and text encoder, which may have no others.
        length: Tokens that prompts are padded to: 120 of PixArt-alpha, 300 of PixArt-sigma.
    """

    def __init__(self, pipeline: Any, length: int) -> None:
        self._pipeline, self._length = pipeline, length
        self.device = pipeline.text_encoder.device

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Text:
        """Encode prompts: [B, L, D] and their mask [B, L]; one that is too long is cut."""
        tokens, mask, _, _ = self._pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device,
            max_sequence_length=self._length,
        )  # fmt: skip
        return Text(tokens.float(), mask=mask.float())

    def empty(self) -> Text:
        """The embedding of "", which the pipeline takes for no prompt."""
        return self([""])

    def lengths(self, prompts: list[str]) -> list[int]:
        """Tokens of prompts."""
        return _lengths(self._pipeline.tokenizer, prompts, self._length)


class SD3TextEncoder:
    """Stable Diffusion 3's two CLIPs and T5, through the pipeline's own `encode_prompt`.

    Args:
        pipeline: A pipeline of these parts, of which T5 may be missing.
        width: Channels of the tokens, which zeros in the place of T5's have.
    """

    def __init__(self, pipeline: Any, width: int) -> None:
        self._pipeline = pipeline
        self.device = pipeline.text_encoder.device
        # Without T5 the pipeline asks its transformer, which is not there, for the width.
        vars(pipeline)["transformer"] = SimpleNamespace(
            config=SimpleNamespace(joint_attention_dim=width)
        )

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Text:
        """Encode prompts: [B, L, D] and pooled [B, P]; one that is too long is cut."""
        tokens, _, pooled, _ = self._pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
        )
        return Text(tokens.float(), pooled.float())

    def empty(self) -> Text:
        """The embedding of "", which the pipeline takes for no prompt."""
        return self([""])

    def lengths(self, prompts: list[str]) -> list[int]:
        """All places: T5's tokens stand behind CLIP's, whose padding is read."""
        return [self.empty().tokens.shape[1]] * len(prompts)


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


def _lengths(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int | None = None
) -> list[int]:
    length = length or tokenizer.model_max_length
    ids = tokenizer(prompts, truncation=True, max_length=length).input_ids
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
        row = sum(tensor.nbytes for tensor in self.empty.tensors().values())
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
    parts = [text.tensors() for text in texts]
    return texts[0].of({name: torch.cat([p[name] for p in parts]) for name in parts[0]})
