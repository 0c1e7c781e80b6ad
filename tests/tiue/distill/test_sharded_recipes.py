"""Every shipped recipe on two sharded processes: trained, shown, saved and gone on from."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiue.distill.test_clip import tiny_clip
from tests.tiue.distill.test_distributed import (
    assert_gradients_near,
    assert_same_on_both,
    launch,
)
from tests.tiue.distill.test_xl import tiny_xl_pipeline
from tests.tiue.distill.worker import run
from tests.tiue.tiny import tiny_autoencoder_tiny, tiny_tokenizer
from tiue.distill.output import list_checkpoints
from tiue.distill.settings import list_recipes, load_config
from tiue.errors import InputError

# What sharding refuses, on its own process count or for want of a GPU, gives way to its like.
REFUSED = {"adamw8bit": "adamw"}
# Recipes that switch on nothing that the other does not, and what they differ in on tiny models.
COVERED = {
    "sd15": ("sd21-base-lora5", {"lora_updates"}),
    "sd21-base": ("sd21-base-lora5", {"lora_updates"}),
    "scenes": ("openmoji", {"guidance_scale", "lora_guidance_scale", "min_timestep", "kl_weight"}),
    "sdxl": ("sdxl-one-gpu-80gb", {"ema_on_cpu", "optimizer"}),
}

# Not sharded yet; `test_transformers.py` runs these recipes.
TRANSFORMERS = ("pixart", "sd3")


def settings_of(recipe, make_config, xl_folder, clip_folder):
    """A recipe's own settings, on tiny models and for one update of one or two micro-batches."""
    config, tiny = load_config(recipe, output="run", prompts="p.txt"), make_config()
    return dataclasses.replace(
        config,
        teacher=str(xl_folder) if "xl" in recipe else tiny.teacher,
        prompts=tiny.prompts,
        output=tiny.output,
        steps=1,
        batch_size=1,
        gradient_accumulation_steps=min(2, config.gradient_accumulation_steps),
        optimizer=REFUSED.get(config.optimizer, config.optimizer),
        lora_rank=4,
        sharding="none" if config.student_lora_rank else "full",
        student_lora_rank=min(4, config.student_lora_rank),
        clip_model=str(clip_folder / "clip"),
        clip_vae=str(clip_folder / "vae"),
        cpu=True,
        save_pipeline=False,
        trackers=(),
        sample_every=2,
        validation_prompts=("sun",),
        log_every=1,
    )


def differing(one, other):
    """Settings that two recipes do not share, but for where they write."""
    names = {field.name for field in dataclasses.fields(one)} - {"output"}
    return {name for name in names if getattr(one, name) != getattr(other, name)}


def test_every_recipe_runs_sharded(make_config, tmp_path):
    tiny_xl_pipeline().save_pretrained(tmp_path / "xl")
    tiny_clip(tiny_tokenizer()).save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    tiny_autoencoder_tiny().save_pretrained(tmp_path / "vae")
    real = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    save_file({"latents": real}, tmp_path / "real.safetensors")
    unets = [name for name in list_recipes() if name not in TRANSFORMERS]
    found = {r: settings_of(r, make_config, tmp_path / "xl", tmp_path) for r in unets}
    assert [r for r, c in found.items() if c.sharding == "none"] == ["one-gpu-24gb-lora"]
    for recipe, (other, names) in COVERED.items():
        assert differing(found.pop(recipe), found[other]) <= names, recipe
    gan = {"gan_weight": 0.1, "gan_critic_weight": 1.0, "max_grad_norm": 1e6, "batch_size": 2,
           "gan_pictures": tmp_path / "real.safetensors", "steps": 1}  # fmt: skip
    found["gan, sharded"] = make_config(sharding="full", **gan)
    found["gan, whole"] = make_config(**gan)

    begun = list(found.values())
    resumed = [dataclasses.replace(config, steps=2, resume=True) for config in begun]
    told = launch(tmp_path, *(c for pair in zip(begun, resumed, strict=True) for c in pair))
    for index, (recipe, config) in enumerate(found.items()):
        first, second = told[2 * index], told[2 * index + 1]
        assert_same_on_both(*first)
        assert_same_on_both(*second)
        share = float(config.sharding == "full")
        for part in ("student", "lora"):
            assert first[0][f"{part} sharded"].eq(share).all(), recipe
        lines = (config.output / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2], recipe
        steps = [place.name for place in list_checkpoints(config.output / "checkpoints")]
        assert steps == ["step-00000001", "step-00000002"], recipe
        sheets = sorted(path.name for path in (config.output / "samples").glob("*.png"))
        assert sheets == ["step-00000002.png"] * bool(config.sample_every), recipe
        written = load_file(config.output / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(weight.isfinite().all() for weight in written.values()), recipe
    alone = run(make_config(**gan | {"batch_size": 4}))
    for name in ("gan, sharded", "gan, whole"):
        assert_gradients_near(told[2 * list(found).index(name)][0], alone, 5e-6)


def test_what_sharding_does_not_take_is_refused(make_config):
    """The settings of recipes for one GPU that the test above replaces or runs unsharded."""
    from types import SimpleNamespace

    from tiue.distill.sharding import check_sharding

    two = SimpleNamespace(num_processes=2)
    for settings, said in (
        ({"optimizer": "adamw8bit"}, "needs optimizer adam or adamw"),
        ({"student_lora_rank": 4}, "needs student_lora_rank 0"),
        ({"mixed_precision": "fp16"}, "needs mixed_precision bf16 or no"),
    ):
        with pytest.raises(InputError, match=said):
            check_sharding(make_config(sharding="full", **settings), two)
