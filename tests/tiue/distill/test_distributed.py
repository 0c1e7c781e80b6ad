"""Two processes on the CPU (gloo), as torchrun starts them, against one."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiue.distill.worker import run
from tiue.distill.embeddings import StoredPrompts, embed_text
from tiue.distill.output import list_checkpoints
from tiue.distill.processes import require_shared_work
from tiue.distill.settings import write_config
from tiue.distill.trainer import Trainer
from tiue.errors import InputError

ROOT = Path(__file__).parents[3]


def launch(folder, *configs) -> list[list[dict[str, torch.Tensor]]]:
    """What each of two processes tells of each run."""
    paths = [str(folder / f"settings-{number}.yaml") for number in range(len(configs))]
    for path, config in zip(paths, configs, strict=True):
        write_config(config, Path(path))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.tiue.distill.worker", str(folder), *paths,
    ]  # fmt: skip
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr[-6000:]
    return [
        [load_file(folder / f"run-{number}-rank-{rank}.safetensors") for rank in (0, 1)]
        for number in range(len(configs))
    ]


def assert_same_on_both(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_gradients_near(actual, expected, bound=2e-6):
    """To a share of the largest gradient of the network.

    Batches of other sizes round otherwise: 1.004e-6 seen on a CPU with AVX2, 8 times float32's
    epsilon.
    """
    for part in ("student", "lora"):
        names = [name for name in expected if name.startswith(f"{part} gradient ")]
        assert len(names) > 10
        largest = max(expected[name].abs().max() for name in names)
        for name in names:
            error = (actual[name] - expected[name]).abs().max() / largest
            assert error <= bound, (name, error)


# No clipping, or a wrong scale would not show.
SETTINGS = {"steps": 2, "max_grad_norm": 1e6, "kl_weight": 0.1, "lora_updates": 2, "log_every": 1,
            "learning_rate": 1e-5}  # fmt: skip


@pytest.fixture(scope="module")
def alone(make_config):
    return run(make_config(batch_size=4, **SETTINGS | {"steps": 4}))


@pytest.fixture(scope="module")
def together(make_config, tmp_path_factory):
    """Every run that two processes make here, of one start: imports take most of its time.

    A folder with the text that they embedded, settings by name, and what each rank tells by name.
    """
    own = {"sharding": "full", "sample_every": 2, "validation_prompts": ("sun",)}
    half = {
        "batch_size": 1, "gradient_accumulation_steps": 2, "mixed_precision": "bf16",
        "gradient_checkpointing": "encoder", "recompute_feed_forward": True, "steps": 1,
    }  # fmt: skip
    plain = make_config(batch_size=2, **SETTINGS)
    sharded = make_config(batch_size=2, **SETTINGS | own)
    # What two processes wrote, two go on from.
    runs = {
        "plain": plain,
        "plain, resumed": dataclasses.replace(plain, steps=3, resume=True),
        "sharded": sharded,
        "sharded, resumed": dataclasses.replace(sharded, steps=4, resume=True),
        "sharded, bf16": make_config(**SETTINGS | own | half),
    }
    folder = tmp_path_factory.mktemp("together")
    return folder, runs, dict(zip(runs, launch(folder, *runs.values()), strict=True))


def test_two_processes_of_half_the_batch_are_one_process(alone, together, tmp_path):
    folder, runs, told = together
    config, (first, second), again = runs["plain"], told["plain"], told["plain, resumed"]
    assert_gradients_near(first, alone)
    assert_same_on_both(first, second)
    assert_same_on_both(*again)
    newest = list_checkpoints(config.output / "checkpoints")[-1]
    states = sorted(path.name for path in newest.glob("random_states_*.pkl"))
    assert states == ["random_states_0.pkl", "random_states_1.pkl"]
    assert len((config.output / "log.jsonl").read_text().splitlines()) == 3
    # The embeddings that both wrote together are those of one.
    both = StoredPrompts(folder / "text", torch.device("cpu"))
    apart = embed_text(config.teacher, config.prompts, tmp_path / "own", shard_size=2, cpu=True)
    assert both.prompts == StoredPrompts(apart, torch.device("cpu")).prompts
    for name in ("embeddings-00000", "embeddings-00001", "embeddings-00002", "empty"):
        files = [load_file(place / f"{name}.safetensors") for place in (folder / "text", apart)]
        assert torch.equal(files[0]["prompt_embeds"], files[1]["prompt_embeds"]), name


@pytest.mark.parametrize("kl_reduction", ["sum", "mean"])
def test_two_micro_batches_are_one_batch(make_config, kl_reduction):
    settings = SETTINGS | {"kl_reduction": kl_reduction}
    expected = run(make_config(batch_size=4, **settings))
    actual = run(make_config(batch_size=2, gradient_accumulation_steps=2, **settings))
    assert_gradients_near(actual, expected)


def test_sharded_processes_are_one_process(alone, together):
    """FSDP2: every parameter a DTensor; saved, looked at and gone on from like any other run."""
    _, runs, told = together
    config, begun = runs["sharded"], told["sharded"]
    (first, second), (bf16, _) = told["sharded, resumed"], told["sharded, bf16"]
    for part in ("student", "lora"):
        assert first[f"{part} sharded"].min() == bf16[f"{part} sharded"].min() == 1
    assert_gradients_near(begun[0], alone)
    assert_same_on_both(first, second)
    # Two steps, a checkpoint, and two more.
    weights = [name for name in alone if " weight " in name]
    assert max((first[n] - alone[n]).abs().max() for n in weights) <= 1e-6
    # What it saved is what it held, whole, under diffusers' and PEFT's names.
    newest = list_checkpoints(config.output / "checkpoints")[-1]
    saved = load_file(newest / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[n], first[f"student weight unet.{n}"]) for n in saved)
    average = load_file(config.output / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(average[n], saved[n]) for n in saved)
    assert len(list((config.output / "samples").glob("*.png"))) == 2
    for part in ("student", "lora"):
        names = [n for n in alone if n.startswith(f"{part} gradient ")]
        norms = [torch.stack([g[n].norm() for n in names]).norm().item() for g in (bf16, alone)]
        assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_processes_that_do_not_know_of_one_another_are_refused(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes were started.*--cpu"):
        require_shared_work(1)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(InputError, match="sharding 'full' needs several processes"):
        Trainer(make_config(sharding="full"))
    # FSDP in accelerate's environment asks for the same, once.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="sharding 'full' needs several processes"):
        Trainer(make_config())
