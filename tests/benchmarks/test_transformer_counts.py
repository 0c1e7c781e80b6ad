"""The counts of the transformers' one pass, against figures worked out by hand."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import bench_transformer, transformer_counts
from benchmarks.forms import repeated_transformers
from benchmarks.forms.models import random_transformer, transformer_inputs, transformer_scheduler
from benchmarks.forms.transformers import FORMS, passes, schedules
from benchmarks.measure.race import Case
from benchmarks.multiply_adds import Count
from benchmarks.transformer_counts import launches, multiply_adds, saved_bytes
from tests.tiue.dit.models import exact


def whole(parts: dict[str, Count]) -> Count:
    return sum(parts.values(), Count())


def test_pixart_by_hand() -> None:
    """PixArt-alpha at 512 x 512: 28 blocks of 1152 channels, 1024 patches, 120 tokens of text."""
    channels, patches, words, wide = 1152, 1024, 120, 4096
    steps, border, blocks = 4, 7, 28
    square = channels * channels

    def block(timesteps: int, texts: int) -> Count:
        """Queries, keys, values, output; queries and output of text; eight of the feed-forward."""
        tokens = timesteps * patches
        linear = (4 + 2 + 8) * square * tokens + 2 * square * words * texts
        return Count(0, linear, 2 * channels * tokens * (patches + words))

    def embedding(timesteps: int) -> Count:
        return Count(linear=timesteps * (256 * channels + square + 6 * square))

    patch = Count(convolution=channels * 16 * patches)
    caption = Count(linear=(wide * channels + square) * words)
    shared = patch + caption + embedding(1) + block(1, 1) * border
    last = Count(linear=channels * 32 * patches * steps)
    ours, repeated = (
        embedding(steps) + block(steps, texts) * (blocks - border) + last for texts in (1, steps)
    )
    assert multiply_adds("tiue", border=border) == {"shared": shared, "decoder": ours}
    assert multiply_adds("repeated", border=border) == {"shared": shared, "decoder": repeated}
    one = patch + caption + embedding(1) + block(1, 1) * blocks + Count(linear=last.linear // steps)
    assert whole(multiply_adds("one-step", border=border)) == one
    assert whole(multiply_adds("full-steps", border=border)) == one * steps


def test_stable_diffusion_3_saves_the_pooled_text_alone() -> None:
    ours, repeated = (whole(multiply_adds(form, "sd3-tiny")) for form in ("tiue", "repeated"))
    # Two layers of the pooled text's embedding, which the features hold: four times none.
    assert repeated - ours == Count(linear=4 * (12 * 16 + 16 * 16))


@pytest.mark.parametrize("model", ["pixart-tiny", "sd3-tiny"])
def test_the_repeated_form_is_what_the_student_computes(model: str) -> None:
    student = random_transformer(model, torch.device("cpu"), torch.float64)
    inputs = transformer_inputs(student, model, batch=2)
    timesteps = torch.tensor([751.0, 501, 251, 1], dtype=torch.float64)
    latents, text = inputs.pop("latents"), inputs.pop("prompt_embeds")
    with exact(), torch.no_grad():
        features = student.encode(latents, timesteps[0], text, **inputs)
        ours = student.decode(features, timesteps)
        repeated = repeated_transformers.decode(student, features, timesteps)
    torch.testing.assert_close(ours, repeated, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours[0], ours[-1])


@pytest.mark.parametrize("model", ["pixart-tiny", "sd3-tiny"])
def test_every_form_is_a_pass_of_its_own(model: str) -> None:
    student = random_transformer(model, torch.device("cpu"), torch.float32)
    inputs = transformer_inputs(student, model, batch=1)
    out = {form: run() for form, run in passes(student, model, inputs, schedules(model, 4)).items()}
    torch.testing.assert_close(out["tiue"], out["repeated"], rtol=1e-4, atol=1e-5)
    # By hand: the scheduler's steps, each of the student at one timestep.
    scheduler, sample = transformer_scheduler(model), inputs["latents"]
    scheduler.set_timesteps(4)
    given = {k: v for k, v in inputs.items() if k not in ("latents", "prompt_embeds")}
    for t in scheduler.timesteps:
        with torch.no_grad():
            noise = student.predict_noise(sample, t[None], inputs["prompt_embeds"], **given)[0]
        sample = scheduler.step(noise, t, sample).prev_sample
    torch.testing.assert_close(out["full-steps"], sample, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out["one-step"], out["full-steps"])


def test_kernels_of_the_forms() -> None:
    counted = {form: launches(form, "pixart-tiny") for form in FORMS}
    assert len(counted["full-steps"]) == 4 * len(counted["one-step"])
    assert len(counted["tiue"]) < len(counted["repeated"]) < len(counted["full-steps"])
    # Two blocks after the border, each with its text's keys and values read by all timesteps.
    shared = [own for own in counted["tiue"] if own.kind == "cross_timestep_attention"]
    assert len(shared) == 2


@pytest.mark.parametrize("model", transformer_counts.COUNTED)
def test_the_decoder_keeps_about_half_the_bytes(model: str) -> None:
    """PixArt-alpha's and Stable Diffusion 3 medium's size, K = 4.

    By hand, of every token and channel of a PixArt block: its input, q, k, v, the output of
    attention, what comes of it, q of the text, what comes of that, four of the feed-forward's
    product: 12 of the repeated form's 23.
    """
    repeated = saved_bytes("repeated", model)
    assert 0.45 * repeated < saved_bytes("tiue", model) <= 0.55 * repeated
    own = saved_bytes("tiue", model, recompute_feed_forward=True)
    # Below a fifth, the count has missed what backward reads.
    assert 0.2 * repeated < own <= 0.36 * repeated, own / repeated


def test_tables_show_what_was_counted(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    transformer_counts.main(["--models", "pixart-tiny", "--write", str(tmp_path / "counts.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[3:]] == [f"| {form}" for form in FORMS]
    ours = whole(multiply_adds("tiue", "pixart-tiny")).total / 1e9
    assert lines[4].split(" | ")[3] == f"{ours:,.1f}"
    assert (tmp_path / "counts.json").exists()


@pytest.mark.parametrize("what", bench_transformer.WHATS)
def test_forms_are_held_against_one_another_and_timed(what: str, monkeypatch) -> None:
    student = random_transformer("pixart-tiny", torch.device("cpu"), torch.float32)
    case = Case("pixart-tiny", 8, num_decoder_steps=2)
    race = bench_transformer.run_race(what, student, case, list(FORMS), rounds=3)
    pair = {"repeated": 3, "tiue": 3}
    expected = pair if what == "decoder" else pair | {"full-steps": 2, "one-step": 3}
    assert {form: len(times) for form, times in race.seconds.items()} == expected
    counts = multiply_adds("tiue", "pixart-tiny", num_decoder_steps=2)
    total = counts["decoder"] if what == "decoder" else whole(counts)
    assert race.extra_info("tiue")["multiply_adds"] == total.total
    assert race.of_form["tiue"]["relative_difference"] <= bench_transformer.TOLERANCE

    decode = student._decode_tokens
    monkeypatch.setattr(student, "_decode_tokens", lambda *given: 1.01 * decode(*given))
    with pytest.raises(AssertionError, match="the forms differ"):
        bench_transformer.run_race(what, student, case, ["repeated", "tiue"], rounds=1)
