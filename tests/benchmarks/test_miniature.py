"""The experiment: what its rows differ in, what an update costs, how their rate is chosen."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.miniature import drawing, evaluation, training
from benchmarks.miniature.__main__ import app
from benchmarks.miniature.counts import (
    equal_updates,
    loop_count,
    pass_count,
    picture_count,
    schedule_of,
    update_count,
    update_count_of,
    without,
)
from benchmarks.miniature.rows import (
    FAMILIES,
    PILOT_UPDATES,
    RATES,
    ROWS,
    TIMESTEPS,
    UPDATES,
    pilot_name,
)
from benchmarks.multiply_adds import Counter
from tests.benchmarks.miniature import SHARED, plant, plant_facts, plant_rates
from tests.tiue.tiny import tiny_scheduler, tiny_unet
from tiue import OnePassSchedule, TiUEUNet
from tiue.distill import DistillConfig
from tiue.errors import CheckpointError, InputError
from tiue.evaluate.models import Model
from tiue.scenes.config import MAX_PROMPT_TOKENS


def failed(*words):
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == 2
    return found.stderr


def meta(unet):
    return unet.to("meta")


def counted(call):
    with torch.no_grad(), Counter() as counter:
        call()
    return counter.count


def test_what_a_claim_compares_differs_in_nothing_else(places):
    plant_rates(places)
    found = {
        name: training.settings_of(row, 0) for name, row in ROWS.items() if row.training is not None
    }
    spacing = {"num_decoder_steps", "timestep_spacing"}
    for name, base, changed in (
        ("k1", "k4", spacing | {"learning_rate"}),
        ("k2", "k4", {"num_decoder_steps"}),
        ("k8", "k4", {"num_decoder_steps"}),
        ("k1-compute", "k1", {"steps"}),
        ("k4-kl", "k4", {"kl_weight"}),
        ("k1-kl", "k1", {"kl_weight"}),
        ("k4-trailing", "k4", {"timestep_spacing"}),
        ("k4-lora-guided", "k4", {"lora_guidance_scale"}),
        ("k4-rate-1e-4", "k4", {"steps"}),
        ("k1-rate-3e-4", "k1", {"steps", "learning_rate"}),
    ):
        one, other = found[name], found[base]
        names = {*one, *other}
        assert {n for n in names if one.get(n) != other.get(n)} == changed, name
    assert found["k4"]["kl_weight"] == 0
    assert (found["k1"]["learning_rate"], found["k8"]["learning_rate"]) == (1e-5, 1e-4)
    assert {row.name for row in ROWS.values() if row.is_pilot} == {
        pilot_name(family, rate) for family in FAMILIES for rate in RATES
    }
    assert (found["k4"]["steps"], found["k1-rate-1e-5"]["steps"]) == (UPDATES, PILOT_UPDATES)
    assert training.settings_of(ROWS["k2"], 2) == found["k2"] | {"seed": 2}


def test_the_timesteps_that_are_left_out_are_those_of_the_student():
    schedule = schedule_of(4)
    assert tuple(schedule.timesteps.tolist()) == TIMESTEPS
    assert schedule_of(1, "trailing").timesteps.tolist() == [999]
    for place, timestep in enumerate(TIMESTEPS):
        less = without(schedule, timestep)
        kept = [k for k in range(4) if k != place]
        assert less.timesteps.tolist() == [TIMESTEPS[k] for k in kept]
        assert torch.equal(less.noise_coefficients, schedule.noise_coefficients[kept])
        assert less.encoder_timestep == 751
        assert less.latent_coefficient == schedule.latent_coefficient


def test_a_guided_step_costs_two_unets_and_a_pass_shares_its_encoder():
    unet = meta(tiny_unet())
    assert loop_count(unet, 25) == 25 * loop_count(unet, 1)
    one, two, four = (
        pass_count(unet, OnePassSchedule.from_scheduler(tiny_scheduler(), k)) for k in (1, 2, 4)
    )
    assert one <= loop_count(unet, 1) / 2 * 1.01
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    assert four < 4 * one
    # Guidance runs everything for two rows.
    guided = pass_count(unet, OnePassSchedule.from_scheduler(tiny_scheduler(), 4), guided=True)
    assert guided == 2 * four
    assert picture_count(ROWS["one-pass-4"]) == 2 * picture_count(ROWS["k4"])
    assert picture_count(ROWS["k4-without-251"]) < picture_count(ROWS["k4"])
    assert 2 * picture_count(ROWS["teacher-25"]) == 5 * picture_count(ROWS["teacher-10"])


@pytest.mark.parametrize(("teacher", "lora"), [(2.5, 1.0), (1.0, 2.5)])
def test_an_update_is_counted_by_hand(teacher, lora, tmp_path):
    batch, rank, tokens = 3, 4, MAX_PROMPT_TOKENS
    unet, scheduler = meta(tiny_unet()), tiny_scheduler()
    latents = torch.empty(batch, 4, 8, 8, device="meta")
    text = torch.empty(batch, tokens, 32, device="meta")
    frozen = counted(lambda: unet(latents, torch.zeros(batch, device="meta"), text))
    timesteps = torch.tensor([501, 1], device="meta")
    student = counted(lambda: TiUEUNet.from_unet(unet).predict_noise(latents, timesteps, text))

    # A LoRA of rank r on a layer from n to m channels costs r (n + m) a token. Transformers: at 8 x
    # 8, 16 channels, one block down and two up; in the middle, at 4 x 4, one of 32.
    def adapted(pixels, width):
        own = 3 * rank * 2 * width * pixels  # to_q and to_v of self-attention, to_q across
        return own + rank * (32 + width) * tokens  # to_v across, from the text

    low_rank = batch * (3 * adapted(64, 16) + adapted(16, 32))
    with_lora = frozen.total + low_rank
    want = 3 * student.total  # forward, and backward twice of it
    want += frozen.total * (1 if teacher == 1 else 2)
    want += with_lora * (1 if lora == 1 else 2)
    # The LoRA's own step: forward; backward of frozen weights once, of the adapter twice, and of
    # attention twice.
    want += with_lora + frozen.total + frozen.attention + 2 * low_rank
    config = DistillConfig(
        teacher="none", output=tmp_path, prompts="none", num_decoder_steps=2, batch_size=batch,
        guidance_scale=teacher, lora_guidance_scale=lora, lora_rank=rank,
    )  # fmt: skip
    assert update_count(meta(tiny_unet()), scheduler, config) == want


def test_equal_compute_is_equal_to_half_an_update(places):
    assert equal_updates(300, 8, 5) == 480
    plant_rates(places)
    four, one = (training.settings_of(ROWS[name], 0) for name in ("k4", "k1-compute"))
    costs = [update_count_of(settings) for settings in (four, one)]
    assert one["steps"] > UPDATES
    assert abs(one["steps"] * costs[1] - four["steps"] * costs[0]) <= costs[1] / 2


def test_the_rate_is_that_of_the_least_energy_distance(places):
    for family, energies in (("k1", (3.0, 1.0, 2.0, 4.0)), ("k4", (0.5, 0.4, 0.3))):
        for rate, energy in zip(RATES, energies, strict=False):
            plant(places, pilot_name(family, rate), energy=energy)
    found = CliRunner().invoke(app, ["rates"])
    assert found.exit_code == 0
    assert "k4 3e-4: not run" in found.stdout
    assert "k1 3e-5: energy distance 1.000  <- chosen" in found.stdout
    written = json.loads(training.rates_path().read_text())
    assert written["rates"] == {"k1": "3e-5", "k4": "1e-4"}
    assert written["energy"]["k4"] == {"1e-5": 0.5, "3e-5": 0.4, "1e-4": 0.3, "3e-4": None}
    assert training.settings_of(ROWS["k1"], 0)["learning_rate"] == 3e-5
    assert training.settings_of(ROWS["k8"], 0)["learning_rate"] == 1e-4
    assert training.settings_of(ROWS["k4-rate-3e-4"], 0)["learning_rate"] == 3e-4


def test_no_rate_without_pilots_nor_of_another_teacher(places):
    with pytest.raises(InputError, match=r"k1-rate-1e-5.*benchmarks.miniature rates"):
        training.settings_of(ROWS["k1"], 0)
    plant(places, "k1-rate-1e-5", energy=1.0)
    assert "1 of k1's pilots have a result" in failed("rates")
    plant_rates(places)
    found = json.loads(training.rates_path().read_text()) | {"teacher_sha256": "other"}
    training.rates_path().write_text(json.dumps(found))
    with pytest.raises(InputError, match="no rate of this teacher's k4 students"):
        training.settings_of(ROWS["k2"], 0)
    path = plant(places, "k1-rate-3e-5", energy=1.0)
    path.write_text(path.read_text().replace(training.teacher_sha256(), "other"))
    assert "another teacher" in failed("rates")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "k3"], "no row k3: take some of teacher-25"),
        (["train", "teacher-25"], "teacher-25 needs no training"),
        (["train", "k4-without-1"], "k4-without-1 needs no training"),
        (["train", "lcm-4"], "lcm-4 cannot be run: it needs consistency distillation"),
        (["evaluate", "k1-wide"], "k1-wide cannot be run"),
        (["train", "k4", "--seeds", "3"], "--seeds takes some of 0,1,2, not '3'"),
        (["train", "k4", "--seeds", "0;1"], "--seeds takes some of 0,1,2"),
        (["evaluate", "k4"], "no student in"),
        (["evaluate", "k4-without-751", "--seeds", "1"], "train k4 --seeds 1"),
    ],
)
def test_what_cannot_be_is_one_line(places, words, message):
    error = failed(*words)
    assert message in " ".join(error.split())


def test_a_student_of_other_settings_is_refused_by_what_differs(places):
    plant_rates(places)
    plant_facts("k4", 0)
    assert training.training_facts(ROWS["k4-without-1"], 0)["learning_rate"] == 1e-4
    assert training.distil(ROWS["k4"], 0)  # is there already
    plant_rates(places, k4="3e-4")
    for words in (["train", "k4"], ["evaluate", "k4-without-1"]):
        assert "learning_rate: 0.0001, not 0.0003" in failed(*words, "--seeds", 0)
    plant_facts("k2", 1, teacher_sha256="other", steps=7)
    with pytest.raises(InputError, match=f"steps: 7, not {UPDATES}; teacher_sha256: 'other'"):
        training.training_facts(ROWS["k2"], 1)
    with pytest.raises(CheckpointError, match="train k2 --seeds 0"):
        training.training_facts(ROWS["k2"], 0)


def test_a_training_that_was_stopped_goes_on(places, monkeypatch):
    plant_rates(places)
    monkeypatch.setattr(training, "PROMPTS", 4)
    seen = []

    def distill(config):
        seen.append(config)
        (config.output / "checkpoints").mkdir(parents=True, exist_ok=True)
        if len(seen) == 2:
            (config.output / "unet").mkdir()

    monkeypatch.setattr(training, "distill", distill)
    command = ["train", "k1", "--seeds", "0"]
    stopped = CliRunner().invoke(app, command)
    assert (stopped.exit_code, stopped.stdout) == (130, "k1 0: stopped\n")
    assert not training.is_trained(ROWS["k1"], 0)
    for _ in range(2):  # goes on, and then has nothing to do
        assert CliRunner().invoke(app, command).stdout == "k1 0: distilled\n"
    assert len(seen) == 2
    assert seen[0] == seen[1]
    config = seen[0]
    assert config.resume
    assert (config.num_decoder_steps, config.seed, config.learning_rate) == (1, 0, 1e-5)
    assert config.output == places / "work" / "students" / "k1-0"
    assert len((places / "work" / "students" / "prompts.txt").read_text().splitlines()) == 4
    assert not (config.output / "checkpoints").exists()
    assert training.training_facts(ROWS["k1"], 0)["teacher_sha256"] == training.teacher_sha256()


def test_a_result_is_kept_with_the_ceilings_beside_it(places, monkeypatch):
    model = Model(lambda prompts, seeds: [], {"model": "drawn", "teacher_sha256": "here"})
    asked = []

    def evaluate(settings, given):
        asked.append((settings.output.name, settings.seed, settings.metrics, given))
        split = {"all": {"prompts": 5, "figures": {"right": [0.5, None]}}}
        sides = ("model", "true pictures", "through the autoencoder")
        facts = SHARED | {
            "figures": {"scene_right": 0.5},
            "model": {"teacher_sha256": training.teacher_sha256()},
        }
        detail = {"splits": dict.fromkeys(sides, split), "sets": {side: {} for side in sides[1:]}}
        return facts | {"scenes": detail}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "load_row", lambda row, seed: (model, row.name, seed))
    for _ in range(2):  # the second time it is there
        evaluation.evaluate_row(ROWS["k4"], 2)
    assert [(*one[:2], *one[3][1:]) for one in asked] == [("k4-2", 2, "k4", 2)]
    kept = json.loads(evaluation.result_path(ROWS["k4"], 2).read_text())
    assert list(kept["scenes"]["splits"]) == ["model"]
    assert kept["scenes"]["sets"] == {}
    ceilings = json.loads(evaluation.ceilings_path().read_text())
    assert list(ceilings["scenes"]["splits"]) == ["true pictures", "through the autoencoder"]
    assert {name: len(found) for name, found in evaluation.load_results().items()} == {"k4": 1}


def test_results_that_are_not_comparable_are_refused(places):
    def plant_whole(name, **changes):
        path = plant(places, name)
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path

    plant_whole("teacher-4")
    path = plant_whole("k4")
    assert set(evaluation.load_results()) == {"teacher-4", "k4"}
    plant_whole("k4", extractors={"features": {"sha256": "b"}})
    with pytest.raises(InputError, match=r"teacher-4-0.json and k4-0.json.*features"):
        evaluation.load_results()
    plant_whole("k4", protocol={"name": "scenes (changed)"})
    with pytest.raises(InputError, match=r"of the protocol scenes .changed.: evaluate again"):
        evaluation.load_results()
    plant_whole("k4", model={"teacher_sha256": "other"})
    with pytest.raises(InputError, match="another teacher: remove it and evaluate again"):
        evaluation.evaluate_row(ROWS["k4"], 0)
    assert path.exists()


def test_a_row_without_a_timestep_draws_what_the_pipeline_does_with_all(places, monkeypatch):
    """The pass that is taken apart is the pipeline's own: same noise, text, sum and decoding."""
    pipe = drawing.undistilled_pipeline(4)
    schedule = OnePassSchedule.from_scheduler(pipe.scheduler, 4)
    prompts, seeds = ["two fruits", "an octopus and a clock"], [5, 7]
    begun = drawing.begin(pipe, prompts, seeds)
    for scale in (1.0, 2.5):
        latents = pipe(
            prompts, num_decoder_steps=4, guidance_scale=scale, output_type="latent",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images  # fmt: skip
        predicted = drawing.predictions(pipe, begun, schedule, scale)
        torch.testing.assert_close(
            schedule.combine(begun.noise, predicted), latents, rtol=1e-4, atol=1e-4
        )
    pictures = pipe(
        prompts, num_decoder_steps=4, generator=[torch.Generator().manual_seed(s) for s in seeds]
    ).images
    apart = drawing.to_pictures(pipe, pipe.unet.one_pass(begun.noise, schedule, begun.text))
    for one, other in zip(pictures, apart, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert drawing.undistilled_pipeline(1).scheduler.config.timestep_spacing == "trailing"
