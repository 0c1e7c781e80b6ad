"""The CLIP loss on a tiny CLIP and a tiny decoder."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.tiue.tiny import tiny_autoencoder_tiny, tiny_tokenizer
from tiue.distill.clip import ClipScorer
from tiue.distill.trainer import Trainer


def tiny_clip(tokenizer) -> CLIPModel:
    """A CLIP of two layers of width 32 each, pictures of 30 x 30."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    config = CLIPConfig(
        text_config=sizes | {
            "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "eos_token_id": len(tokenizer) - 1,
        },
        vision_config=sizes | {"image_size": 30, "patch_size": 6},
        projection_dim=16,
    )  # fmt: skip
    return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def parts():
    tokenizer = tiny_tokenizer()
    return tiny_clip(tokenizer), tokenizer, tiny_autoencoder_tiny()


def test_pictures_reach_clip_as_its_own_processor_makes_them(parts):
    clip, tokenizer, vae = parts
    scorer = ClipScorer(*parts)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        pixels = (255 * decoded).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        processor = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=30)
        inputs = processor([Image.fromarray(np.asarray(p)) for p in pixels], return_tensors="pt")
        vision = clip.vision_model(**inputs)
        expected = clip.visual_projection(vision.pooler_output)
        actual = scorer.embed_latents(latents)
        cosines = torch.nn.functional.cosine_similarity(actual, expected)
        text = clip.get_text_features(**tokenizer(["red", "a cat"], padding=True,
                                                  return_tensors="pt"))  # fmt: skip
        text = getattr(text, "pooler_output", text)
    assert cosines.min() > 0.999  # pictures of 8 bits, resized by another library
    torch.testing.assert_close(scorer.embed_prompts(["red", "a cat"]), text)


def test_clip_loss_reaches_the_student_and_its_weight_falls(make_config, parts, tmp_path):
    clip, tokenizer, vae = parts
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    vae.save_pretrained(tmp_path / "vae")
    settings = {
        "clip_model": str(tmp_path / "clip"), "clip_vae": str(tmp_path / "vae"),
        "clip_target": 1.0, "steps": 3, "learning_rate": 1e-9, "log_every": 1,
    }  # fmt: skip
    trainer = Trainer(make_config(clip_weight=0.4, clip_weight_end=0.0, **settings))
    assert [trainer.train_step._clip_weight(step) for step in (1, 2, 3)] == [0.4, 0.2, 0.0]
    told = []
    trainer.student.optimizer.optimizer.register_step_pre_hook(
        lambda *_: told.append(trainer.unet.conv_out.weight.grad.clone())
    )
    trainer.train()
    plain = Trainer(make_config(**{**settings, "clip_target": 0.35}))
    expected = []
    plain.student.optimizer.optimizer.register_step_pre_hook(
        lambda *_: expected.append(plain.unet.conv_out.weight.grad.clone())
    )
    plain.train()
    assert not torch.allclose(told[0], expected[0])
    torch.testing.assert_close(told[2], expected[2], rtol=1e-3, atol=1e-4)
