"""Runs that end before their last step: killed, told to stop, out of room, gone wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from tiue.cli import app
from tiue.distill.guards import Guard
from tiue.distill.output import list_checkpoints
from tiue.distill.settings import load_config, write_config
from tiue.distill.trainer import Trainer
from tiue.errors import DivergenceError, NonFiniteError, OutputError

ROOT = Path(__file__).parents[3]


def weights_of(folder):
    return UNet2DConditionModel.from_pretrained(folder, use_safetensors=True).state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_kill_at_20_random_moments_of_writing_loses_nothing(make_config, tmp_path):
    config = make_config(steps=10**6, keep_checkpoints=2)
    write_config(config, tmp_path / "settings.yaml")
    command = [
        sys.executable,
        "-m",
        "tests.tiue.distill.kill",
        str(tmp_path / "settings.yaml"),
        "20",
    ]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr[-4000:]
    kills = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(kills) == 20
    for kill in kills:
        # What save() had returned for is there, whole, and at most one more that it had not.
        assert kill["acknowledged"] <= kill["found"] <= kill["acknowledged"] + 1, kill
        assert kill["whole"], kill
    assert sum(kill["in_a_write"] for kill in kills) >= 10, "the kills missed the writes"

    newest = kills[-1]["found"]
    going_on = Trainer(make_config(steps=newest + 1, output=config.output, resume=True))
    assert going_on.step == newest
    going_on.train()
    assert not list((config.output / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(make_config, number):
    said = []

    def on_sample(_unet, _schedule, step):
        if step == 2:
            os.kill(os.getpid(), number)

    config = make_config(steps=4, sample_every=1, validation_prompts=("sun",))
    before = signal.getsignal(number)
    output = Trainer(config, on_sample, said.append).train()
    assert signal.getsignal(number) is before
    assert [p.name for p in list_checkpoints(output / "checkpoints")] == ["step-00000002"]
    assert not (output / "unet").exists()
    assert "KL: 0.1 x the sum over the 12 noise maps" in said[-3]
    assert f"stopped by {number.name}" in said[-2]
    assert said[-1] == "Go on from step 2 with --resume."

    whole = Trainer(make_config(steps=4))
    whole.train()
    resumed = Trainer(make_config(steps=4, output=output, resume=True))
    resumed.train()
    assert same(resumed.unet.state_dict(), whole.unet.state_dict())


def test_the_command_ends_as_a_signal_ends_a_program(make_config, tmp_path):
    config = make_config(steps=10**6, log_every=1)
    write_config(config, tmp_path / "settings.yaml")

    def stop_after_a_step():
        while not (config.output / "log.jsonl").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_after_a_step)
    thread.start()
    result = CliRunner().invoke(app, ["distill", "--config", str(tmp_path / "settings.yaml")])
    thread.join()
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    assert "stopped by SIGTERM" in result.output
    assert "--resume" in result.output
    assert json.loads((config.output / "summary.json").read_text())["ended"] == "stopped by SIGTERM"


def test_sigusr1_makes_a_checkpoint_and_the_run_goes_on(make_config):
    def on_sample(_unet, _schedule, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    config = make_config(steps=3, sample_every=1, validation_prompts=("sun",))
    trainer = Trainer(config, on_sample)
    trainer.train()
    found = [p.name for p in list_checkpoints(config.output / "checkpoints")]
    assert found == ["step-00000001", "step-00000003"]
    assert trainer.stopped_by == 0


def test_a_full_disk_keeps_what_was_there(make_config):
    output = Trainer(make_config(steps=1)).train()
    place = list_checkpoints(output / "checkpoints")[0]
    before = weights_of(place / "unet")
    trainer = Trainer(make_config(steps=2, output=output, resume=True))
    # Files of more than this cannot be written: what a full disk is to a write.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OutputError, match=r"Cannot write .*step-00000002.*has room"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in (output / "checkpoints").iterdir()] == [place.name]
    assert same(weights_of(place / "unet"), before)
    resumed = Trainer(make_config(steps=2, output=output, resume=True))
    assert resumed.step == 1
    resumed.train()


def test_nan_stops_before_it_reaches_a_weight(make_config):
    kept = {}

    def on_sample(unet, _schedule, step):
        if step == 1:
            kept.update({n: p.detach().clone() for n, p in trainer.unet.state_dict().items()})
            trainer.teacher.unet.conv_out.bias.data[0] = torch.nan

    config = make_config(
        steps=3, sample_every=1, checkpoint_every=1, ema_decay=0, validation_prompts=("sun",)
    )
    trainer = Trainer(config, on_sample)
    with pytest.raises(NonFiniteError, match=r"vsd is nan at step 2\..*--resume"):
        trainer.train()
    assert same(trainer.unet.state_dict(), kept)
    checkpoints = list_checkpoints(config.output / "checkpoints")
    assert [p.name for p in checkpoints] == ["step-00000001"]
    assert same(weights_of(checkpoints[0] / "unet"), kept)


def test_a_run_that_diverges_stops_and_keeps_the_checkpoint_before(make_config, monkeypatch):
    monkeypatch.setattr(Guard, "WARMUP", 3)
    config = make_config(
        steps=30, batch_size=1, sample_every=5, checkpoint_every=5, divergence_factor=50,
        validation_prompts=("sun",), keep_checkpoints=1, num_decoder_steps=2,
    )  # fmt: skip

    def on_sample(_unet, _schedule, step):
        if step == 5:
            trainer.teacher.unet.conv_out.bias.data += 1e4  # losses grow, and stay finite

    trainer = Trainer(config, on_sample)
    with pytest.raises(DivergenceError, match="diverges"):
        trainer.train()
    kept = [p.name for p in list_checkpoints(config.output / "checkpoints")]
    assert kept == ["step-00000005"]


def test_guard_forgives_a_short_peak_and_goes_on_from_a_checkpoint():
    guard = Guard(factor=10)
    for step in range(60):
        guard.check({"lora": 1.0}, step)
    for step in range(Guard.PATIENCE - 1):
        guard.check({"lora": 50.0}, step)
        assert guard.suspicious
    restored = Guard(factor=10)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    with pytest.raises(DivergenceError, match="lora is 50 at step 7"):
        restored.check({"lora": 50.0}, 7)
    guard.check({"lora": 2.0}, 61)
    assert not guard.suspicious


def test_float16_may_meet_infinite_norms_but_no_infinite_loss():
    guard = Guard(factor=0, scaled=True)
    guard.check({"vsd": 1.0, "grad_norm": float("inf")}, 1)
    with pytest.raises(NonFiniteError, match="vsd is inf at step 2"):
        guard.check({"vsd": float("inf"), "grad_norm": 1.0}, 2)


def test_settings_of_a_run_start_it_again(make_config):
    config = make_config(steps=1)
    output = Trainer(config).train()
    assert load_config(output / "config.yaml") == config
