import dataclasses

import pytest

from tiue.distill import DistillConfig, load_config
from tiue.distill.prompts import read_prompts
from tiue.distill.settings import list_recipes, write_config
from tiue.errors import InputError

GIVEN = {"output": "run", "embeddings": "embeddings"}


def test_every_shipped_recipe_is_a_config():
    assert list_recipes() == [
        "one-gpu-24gb", "one-gpu-24gb-lora", "openmoji", "pixart", "scenes", "sd15", "sd21-base",
        "sd21-base-clip", "sd21-base-lora5", "sd3", "sdxl", "sdxl-one-gpu-80gb",
    ]  # fmt: skip
    configs = {name: load_config(name, **GIVEN) for name in list_recipes()}
    published = configs["sd21-base"]
    assert published == dataclasses.replace(
        configs["sd15"], teacher="stabilityai/stable-diffusion-2-1-base"
    )
    one = configs["one-gpu-24gb"]
    # The same update: 64 samples, and the published strength of the KL term.
    assert one.batch_size * one.gradient_accumulation_steps == 8 * published.batch_size
    for config in (one, published):
        maps = 64 * config.num_decoder_steps
        assert config.kl_weight * maps == pytest.approx(0.1 * 8 * config.num_decoder_steps)
        assert (config.learning_rate, config.lora_learning_rate) == (1e-6, 1e-3)
    assert (one.optimizer, one.gradient_checkpointing) == ("adamw8bit", "encoder")
    for name, processes in (
        ("sdxl", 8), ("sdxl-one-gpu-80gb", 1), ("one-gpu-24gb-lora", 1), ("pixart", 8), ("sd3", 8),
    ):  # fmt: skip
        config = configs[name]
        assert config.batch_size * config.gradient_accumulation_steps * processes == 64
    second = dataclasses.replace(
        published, steps=10_000, clip_weight=0.1, clip_model="openai/clip-vit-base-patch32"
    )
    assert configs["sd21-base-clip"] == second
    assert configs["sd21-base-lora5"] == dataclasses.replace(published, lora_updates=5)


def test_options_take_precedence_over_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("teacher: t\nprompts: p.txt\nbatch_size: 2\nlearning_rate: 1e-6\n"
                    "mixed_precision: no\ntrackers: [wandb]\n")  # fmt: skip
    config = load_config(path, output="run", batch_size=5)
    assert config.batch_size == 5
    # YAML reads 1e-6 as text, and no as False.
    assert config.learning_rate == 1e-6
    assert config.mixed_precision == "no"
    assert config.trackers == ("wandb",)


def test_written_settings_are_read_back(tmp_path):
    config = DistillConfig(
        teacher="t", output=tmp_path / "run", prompts="p.txt", trackers=(), learning_rate=3e-7,
        validation_prompts=("a: b", "no"),
    )  # fmt: skip
    write_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rte: 1.0", "'learning_rte' in .*did you mean 'learning_rate'"),
        ("guidance-scale: 1.0", "did you mean 'guidance_scale'"),
        ("zzz: 1", "no setting 'zzz'"),
        ("batch_size: many", "batch_size cannot be 'many'"),
        ("batch_size: 2.5", "batch_size cannot be 2.5"),
        ("weighting: sigma", "weighting cannot be 'sigma'"),
        ("steps: 3\nsteps: 4", "sets steps twice"),
        ("- steps", "must be a mapping"),
        ("steps: [", "Cannot read the settings"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        load_config(path, teacher="t", **GIVEN)


def test_a_recipe_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'sd21-base'"):
        load_config("sd21_base", **GIVEN)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="No teacher and no output given"):
        load_config(prompts="p.txt")
    with pytest.raises(InputError, match="needs prompts or embeddings"):
        load_config("sd15", output="run")
    with pytest.raises(InputError, match="needs prompts or embeddings"):
        load_config("sd15", output="run", prompts="p.txt", embeddings="folder")


def test_the_embedded_models_recipe_runs_as_it_is():
    config = load_config("openmoji")
    prompts = read_prompts(config.prompts)
    assert {"red apple", "rocket"} <= set(prompts)
    assert len(prompts) > 2000
    # Embeddings take the place of the recipe's prompts.
    assert load_config("openmoji", embeddings="text").prompts is None
