"""Two processes on the CPU (gloo), as torchrun starts them, against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiue.distill.worker import run
from tiue.distill.output import list_checkpoints
from tiue.distill.settings import write_config

ROOT = Path(__file__).parents[3]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def launch(config, folder, **environment) -> list[dict[str, torch.Tensor]]:
    """What each of two processes tells."""
    write_config(config, folder / "settings.yaml")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.tiue.distill.worker", str(folder / "settings.yaml"), str(folder),
    ]  # fmt: skip
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]


def assert_gradients_near(actual, expected):
    """To 1e-6 of the largest gradient of the network."""
    for part in ("student", "lora"):
        names = [name for name in expected if name.startswith(f"{part} gradient ")]
        assert len(names) > 10
        largest = max(expected[name].abs().max() for name in names)
        for name in names:
            error = (actual[name] - expected[name]).abs().max() / largest
            assert error <= 1e-6, (name, error)


# No clipping, or a wrong scale would not show.
SETTINGS = {"steps": 2, "max_grad_norm": 1e6, "kl_weight": 0.1, "lora_updates": 2, "log_every": 1}


@pytest.fixture(scope="module")
def alone(make_config):
    return run(make_config(batch_size=4, **SETTINGS))


def test_two_processes_of_half_the_batch_are_one_process(make_config, alone, tmp_path):
    config = make_config(batch_size=2, **SETTINGS)
    first, second = launch(config, tmp_path)
    assert_gradients_near(first, alone)
    assert first.keys() == second.keys() == alone.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    newest = list_checkpoints(config.output / "checkpoints")[-1]
    states = sorted(path.name for path in newest.glob("random_states_*.pkl"))
    assert states == ["random_states_0.pkl", "random_states_1.pkl"]
    # What two processes wrote, two go on from.
    resumed = make_config(
        batch_size=2, **SETTINGS | {"steps": 3}, output=config.output, resume=True
    )
    again = launch(resumed, tmp_path)
    assert torch.equal(again[0]["student weight unet.conv_in.weight"],
                       again[1]["student weight unet.conv_in.weight"])  # fmt: skip
    assert len((config.output / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("kl_reduction", ["sum", "mean"])
def test_two_micro_batches_are_one_batch(make_config, kl_reduction):
    settings = SETTINGS | {"kl_reduction": kl_reduction}
    expected = run(make_config(batch_size=4, **settings))
    actual = run(make_config(batch_size=2, gradient_accumulation_steps=2, **settings))
    assert_gradients_near(actual, expected)


def test_sharded_processes_are_one_process(make_config, alone, tmp_path):
    """FSDP2, chosen as `accelerate launch` does: by its environment."""
    config = make_config(batch_size=2, **SETTINGS)
    first, second = launch(config, tmp_path, **FSDP2)
    assert_gradients_near(first, alone)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    resumed = make_config(
        batch_size=2, **SETTINGS | {"steps": 3}, output=config.output, resume=True
    )
    launch(resumed, tmp_path, **FSDP2)
    assert len((config.output / "log.jsonl").read_text().splitlines()) == 3
