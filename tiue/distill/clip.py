"""CLIP's view of the student's latents, for the optional CLIP loss."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase

# What CLIP's image processor subtracts and divides by (arXiv 2103.00020).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScorer(nn.Module):
    """Embeds latents, through a small decoder, and prompts with one CLIP model.

    Args:
        model: The CLIP model; frozen.
        tokenizer: Its tokenizer.
        vae: Decodes the teacher's latents to pictures; frozen.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, vae: AutoencoderTiny
    ) -> None:
        super().__init__()
        self._mean: Tensor
        self._std: Tensor
        self.model, self.vae, self._tokenizer = model, vae, tokenizer
        self.register_buffer("_mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(_STD).view(3, 1, 1), persistent=False)
        self.to(model.device).eval().requires_grad_(False)

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] and embed the pictures: [B, D], differentiable."""
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        pictures = (pictures / 2 + 0.5).clamp(0, 1)
        size = self.model.config.vision_config.image_size
        pictures = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True)
        vision = self.model.vision_model((pictures - self._mean) / self._std)
        return self.model.visual_projection(vision.pooler_output)

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Embed prompts: [B, D], cut to CLIP's length."""
        tokens = self._tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        text = self.model.text_model(**tokens.to(self.model.device))
        return self.model.text_projection(text.pooler_output)
