"""Tiny real transformers of each family, and their one pass with everything repeated K times."""

import torch
from diffusers import HunyuanDiT2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch.overrides import TorchFunctionMode

from tiue.dit import (
    TiUEHunyuanDiT2DModel,
    TiUEPixArtTransformer2DModel,
    TiUESD3Transformer2DModel,
)

STUDENTS = {
    "pixart": TiUEPixArtTransformer2DModel,
    "pixart-sized": TiUEPixArtTransformer2DModel,
    "hunyuan": TiUEHunyuanDiT2DModel,
    "sd3": TiUESD3Transformer2DModel,
    "sd35": TiUESD3Transformer2DModel,
}
FAMILIES = tuple(STUDENTS)


def build(family, dtype=torch.float64):
    """A random model of a family, in eval mode."""
    torch.manual_seed(0)
    if family.startswith("pixart"):
        model = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8,
            num_layers=4, cross_attention_dim=24, sample_size=8, patch_size=2,
            caption_channels=10, use_additional_conditions=family == "pixart-sized",
        )  # fmt: skip
    elif family == "hunyuan":
        model = HunyuanDiT2DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, patch_size=2,
            sample_size=8, hidden_size=24, num_layers=6, mlp_ratio=2.0, cross_attention_dim=16,
            cross_attention_dim_t5=16, pooled_projection_dim=12, text_len=5, text_len_t5=7,
        )  # fmt: skip
    else:
        model = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=12,
            num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=24,
            pooled_projection_dim=12, out_channels=4, pos_embed_max_size=12,
            dual_attention_layers=(0, 1, 2) if family == "sd35" else (),
            qk_norm="rms_norm" if family == "sd35" else None,
        )  # fmt: skip
    # What starts at zero or one would hide what is done with it.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(True)


def conditions(family, batch=2, height=8, width=8, dtype=torch.float64):
    """Latents, prompt embeddings and what else a family reads, of `batch` rows."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    latents = normal(batch, 4, height, width)
    if family.startswith("pixart"):
        mask = torch.ones(batch, 7)
        mask[0, 4:] = 0
        given = {"encoder_attention_mask": mask}
        if family == "pixart-sized":
            given["added_cond_kwargs"] = {
                "resolution": torch.tensor([[64.0, 48.0]]).repeat(batch, 1).to(dtype),
                "aspect_ratio": torch.tensor([[0.75]]).repeat(batch, 1).to(dtype),
            }
        return latents, normal(batch, 7, 10), given
    if family == "hunyuan":
        masks = [torch.ones(batch, n) for n in (5, 7)]
        masks[0][0, 3:] = 0
        grid = ((0, 0), (height // 2, width // 2))
        rotary = get_2d_rotary_pos_embed(12, grid, (height // 2, width // 2), output_type="pt")
        given = {
            "text_embedding_mask": masks[0],
            "encoder_hidden_states_t5": normal(batch, 7, 16),
            "text_embedding_mask_t5": masks[1],
            "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]]).repeat(batch, 1).to(dtype),
            "style": torch.zeros(batch, dtype=torch.long),
            "image_rotary_emb": tuple(table.to(dtype) for table in rotary),
        }
        return latents, normal(batch, 5, 16), given
    return latents, normal(batch, 7, 16), {"pooled_projections": normal(batch, 12)}


def repeat(value, count):
    """B rows to K*B rows; rotary tables have no rows."""
    if isinstance(value, torch.Tensor):
        return value.repeat(count, *[1] * (value.ndim - 1))
    if isinstance(value, dict):
        return {k: v if k == "image_rotary_emb" else repeat(v, count) for k, v in value.items()}
    return value


def repeated_form(model, border, latents, timesteps, text, given):
    """The one pass as one would write it: everything repeated K times, blocks called whole.

    The parent's own forward over K*B rows, in which the first `border` blocks see t_1.
    """
    batch, count = len(latents), len(timesteps)
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    rows = timesteps.repeat_interleave(batch)
    first = timesteps[:1].expand(count * batch)
    seen = {}

    def forward(t, **extra):
        arguments = {
            "hidden_states": repeat(latents, count),
            "timestep": t.to(latents.dtype),
            "encoder_hidden_states": repeat(text, count),
            **repeat(given, count),
        }
        return model(**arguments, return_dict=False)[0]

    def keep(_module, args, kwargs, output):
        seen.setdefault(_module, output)

    # First at t_1, of which the shared blocks' outputs are kept; then at every t, in which they
    # give what they gave.
    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks[:border]]
    forward(first)
    for handle in handles:
        handle.remove()
    handles = [
        block.register_forward_hook(lambda module, _args, _output: seen[module])
        for block in blocks[:border]
    ]
    out = forward(rows)
    for handle in handles:
        handle.remove()
    return out.unflatten(0, (count, batch))[:, :, : latents.shape[1]]


class exact(TorchFunctionMode):  # noqa: N801
    """What diffusers rounds to float32 whatever it is given stays float64.

    Layer and RMS norms, modulations, rotary embeddings: else float64 would be known to 1e-7 only,
    and by how much depends on the processor.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is torch.Tensor.to and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if given is torch.float32 else given for given in args)
        return func(*args, **kwargs)
