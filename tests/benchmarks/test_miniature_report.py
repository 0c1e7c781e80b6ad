"""The experiment's page: verdicts by hand, what was not run, and what commands leave for it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks.miniature import costs, drawing, parts, report, sheets, similarity, training
from benchmarks.miniature.__main__ import app
from benchmarks.miniature.evaluation import ceilings_path, load_results
from benchmarks.miniature.rows import ROWS, SEEDS
from benchmarks.miniature.verdicts import CLAIMS, Better, Keeps, shown, values
from tests.benchmarks.miniature import plant, plant_rates, plant_student, split
from tests.tiue.tiny import tiny_unet
from tiue import OnePassSchedule
from tiue.errors import InputError


def results(figure, **rows):
    """Results of rows, one a seed: `results("right", k1=[0.5, 0.6, 0.7])`."""
    return {
        name: [{"scenes": {"splits": {"model": {"all": split(**{figure: v})}}}} for v in own]
        for name, own in rows.items()
    }


# Deviations of 0.1 and 0.1, three each: two standard errors are 2 sqrt(0.02 / 3) = 0.1633.
@pytest.mark.parametrize(
    ("figure", "own", "other", "verdict"),
    [
        ("right", [0.6, 0.7, 0.8], [0.43, 0.53, 0.63], "agrees"),  # 0.17 apart
        ("right", [0.6, 0.7, 0.8], [0.44, 0.54, 0.64], "undecided"),  # 0.16 apart
        ("right", [0.43, 0.53, 0.63], [0.6, 0.7, 0.8], "does not agree"),
        ("coverage", [0.44, 0.54, 0.64], [0.6, 0.7, 0.8], "undecided"),
        ("energy", [0.43, 0.53, 0.63], [0.6, 0.7, 0.8], "agrees"),  # less is better
        ("energy", [0.6, 0.7, 0.8], [0.43, 0.53, 0.63], "does not agree"),
        ("right", [0.6, 0.7], [0.1, 0.2, 0.3], "not run"),  # a seed is missing
        ("right", [0.6, 0.7, 0.8], [], "not run"),
        ("right", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "undecided"),
    ],
)
def test_verdicts_by_hand(figure, own, other, verdict):
    claim = Better("one is better", "k4", "k1", figure)
    assert claim.judge(results(figure, k4=own, k1=other))[0] == verdict


def test_a_verdict_names_its_figures():
    found = results("right", k4=[0.6, 0.7, 0.8], k1=[0.1, 0.2, 0.3])
    told = Better("", "k4", "k1", "right").judge(found)[1]
    assert told == "70.0 ± 10.0 % (`k4`) against 20.0 ± 10.0 % (`k1`)"


@pytest.mark.parametrize(
    ("own", "whole", "verdict"),
    [
        ([0.45, 0.45, 0.45], [0.5], "agrees"),  # nine tenths
        ([0.44, 0.45, 0.45], [0.5, 0.5, 0.5], "does not agree"),
        ([0.45, 0.45], [0.5], "not run"),
        ([0.45, 0.45, 0.45], [], "not run"),
    ],
)
def test_a_share_is_kept_or_not(own, whole, verdict):
    found = results("coverage", k4=own, **{"teacher-25": whole})
    claim = Keeps("keeps", "k4", "teacher-25", "coverage", 0.9)
    assert claim.judge(found)[0] == verdict


def test_every_claim_is_of_rows_that_can_be_run():
    for claim in CLAIMS:
        assert not ROWS[claim.row].missing
        assert not ROWS[claim.other].missing
    assert len({claim.claim for claim in CLAIMS}) == len(CLAIMS)


def test_figures_are_mean_and_spread():
    assert shown([0.1, 0.2, 0.3], "right") == "20.0 ± 10.0 %"
    assert shown([0.25], "coverage") == "25.0 %"
    assert shown([1.0, 2.0, 3.0], "energy") == "2.000 ± 1.000"
    assert shown([], "energy") == ""
    assert values(results("right", k1=[0.5])["k1"], "right", "exact") == []


def lines(text, start):
    """Cells of the row of a table that begins so, in every table."""
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith(f"| {start}")]


def test_the_page_says_what_was_not_run(places):
    text = report.page({})
    rows = [row for row in ROWS.values() if not row.is_pilot and not row.missing]
    for row in rows:
        found = lines(text, f"{report.named(row)} |")
        assert len(found) == 1
        assert set(found[0][4:9]) == {"not run"}
    verdicts = text.split("## Verdicts")[1].split("## Quality")[0]
    assert verdicts.count("| not run |") == len(CLAIMS) + 1
    assert lines(text, "K = 1 |") == [["K = 1", *["not run"] * 5]]
    assert text.count("\nNot run.\n") == 3
    assert "`lcm-4`): it needs consistency distillation" in text
    assert "](images/" not in text
    assert list((places / "images").iterdir()) == []


@pytest.fixture
def planted(places):
    """A page with two rows, the ceilings, costs and a chosen rate."""
    plant_rates(places)
    for seed in SEEDS:
        for name, right in (("k4", 0.6), ("k1", 0.2), ("k1-compute", 0.5)):
            figures = {"right": right + seed / 100, "coverage": 0.5, "energy": 1 - right}
            exact = split(right=right - 0.1)
            plant(places, name, seed, {"exact": exact}, **figures)
    known = plant(places, "teacher-25", right=0.9, coverage=0.8, energy=0.01)
    plant(places, "k8", right=0.7)
    ceiling = known.read_text().replace('"model": {"all"', '"true pictures": {"all"')
    ceilings_path().write_text(ceiling.replace("0.9", "0.99"))
    found = {name: {"multiply_adds": 2_000_000, "update": 10**9} for name in ("k4", "k1")}
    found["k4"]["seconds"] = 0.0125
    parts.save_part(parts.COSTS, {"rows": found, "machine": {"device": "a slow one"}})
    return places


def test_the_page_is_what_the_results_say(planted):
    assert CliRunner().invoke(app, ["report"]).exit_code == 0
    text = (planted / "miniature.md").read_text()
    four = lines(text, "student, K = 4 (`k4`)")
    whole, right, coverage, energy = four
    assert whole == ["student, K = 4 (`k4`)", "3", "240", "0.0001", "61.0 ± 1.0 %", "50.0 ± 0.0 %",
                     "", "0.400 ± 0.000", "", "0.2 T", "2 M", "12 ms"]  # fmt: skip
    assert (right[1], right[-1]) == ("50.0 ± 0.0 %", "61.0 ± 1.0 %")
    assert coverage[-1] == "50.0 ± 0.0 %"
    assert energy[-1] == "0.400 ± 0.000"
    assert len(lines(text, "student, K = 2 (`k2`)")) == 1
    assert lines(text, "true pictures")[0][4] == "99.0 %"
    assert lines(text, "student, K = 8 (`k8`)")[0][1:5] == ["1", "240", "0.0001", "70.0 %"]
    verdicts = {cells[0]: cells[2] for cells in lines(text, "") if len(cells) == 4}
    assert verdicts["K = 4 beats K = 1 at equal updates: all right"] == "agrees"
    assert verdicts["K = 4 beats K = 1 at equal updates: coverage"] == "undecided"
    assert verdicts["K = 4 beats K = 1 at equal training compute: energy distance"] == "agrees"
    assert verdicts["K = 4 is as often right as the teacher at 25 steps"] == "does not agree"
    assert verdicts["K = 8 beats K = 4: all right"] == "not run"
    assert lines(text, "K = 4 |") == [["K = 4", "not run", "not run", "0.250", "not run", "1e-4"]]
    assert "on a slow one" in text
    assert "images/miniature-quality.png" in text
    with Image.open(planted / "images" / "miniature-quality.png") as plot:
        assert len(plot.convert("RGB").getcolors(2**16)) > 50


def test_a_part_of_another_teacher_is_refused(planted):
    path = planted / "results" / "costs.json"
    path.write_text(path.read_text().replace(training.teacher_sha256(), "other"))
    refused = CliRunner().invoke(app, ["report"])
    assert refused.exit_code == 2
    assert "miniature costs` makes it anew" in " ".join(refused.stderr.split())


def test_sums_end_with_the_pass():
    schedule = OnePassSchedule.from_scheduler(drawing.undistilled_pipeline(4).scheduler, 4)
    latents, predicted = torch.randn(2, 3, 4, 4), torch.randn(4, 2, 3, 4, 4)
    sums = sheets.partial_sums(latents, predicted, schedule)
    assert len(sums) == 5
    torch.testing.assert_close(sums[0], schedule.latent_coefficient * latents)
    torch.testing.assert_close(sums[2] - sums[1], schedule.noise_coefficients[1] * predicted[1],
                               rtol=1e-4, atol=1e-5, check_dtype=False)  # fmt: skip
    torch.testing.assert_close(sums[-1], schedule.combine(latents, predicted))


def test_rows_of_pictures_stand_where_they_belong():
    reds = [Image.new("RGB", (8, 8), (200 + n, 0, 0)) for n in range(3)]
    blues = [Image.new("RGB", (8, 8), (0, 0, 200 + n)) for n in range(3)]
    sheet = sheets.lay_out([("first", [("a", reds)]), ("second", [("b", blues)])], ["x", "y", "z"])
    pixels = np.asarray(sheet)
    places = {}
    for kind, pictures in (("red", reds), ("blue", blues)):
        for number, picture in enumerate(pictures):
            ys, xs = np.nonzero((pixels == picture.getpixel((0, 0))).all(-1))
            assert len(ys) == 16 * 16
            places[kind, number] = (ys.min(), xs.min())
    assert places["red", 0][0] == places["red", 2][0] < places["blue", 0][0]
    assert places["red", 0][1] < places["red", 1][1] == places["blue", 1][1]


def test_students_leave_the_strip_the_sheet_and_the_costs(places, monkeypatch):
    """A student with the teacher's weights: what the commands draw and write is read again."""
    plant_rates(places)
    assert "train k4 --seeds 0" in CliRunner().invoke(app, ["strip"]).stderr
    for row in ("k1", "k4"):
        plant_student(row)
    monkeypatch.setattr(sheets, "CONTACT_PROMPTS", ("two fruits",))
    monkeypatch.setattr(sheets, "PICTURES", 2)
    monkeypatch.setattr(costs, "TIMED", ("k1", "k4", "k8"))
    monkeypatch.setattr(similarity, "PROMPTS", 2)
    monkeypatch.setattr(similarity, "TEACHER_STEPS", 3)
    for command in ("strip", "contact", "costs", "similarity"):
        done = CliRunner().invoke(app, [command])
        assert done.exit_code == 0, done.exception
    strip, found = parts.load_part(parts.STRIP), parts.load_part(parts.COSTS)["rows"]
    assert strip["timesteps"] == [751, 501, 251, 1]
    # Guided or not, the last step adds next to nothing.
    assert all(own[3] < 0.1 * own[0] for own in strip["rms"].values())
    assert found["k4"]["multiply_adds"] > found["k1"]["multiply_adds"]
    assert found["k4"]["update"] > found["k1"]["update"]
    assert ("seconds" in found["k4"], "seconds" in found["k8"]) == (True, False)
    assert set(found) == {name for name, row in ROWS.items() if not row.missing}
    alike = parts.load_part(parts.SIMILARITY)
    assert alike["timesteps"] == [667, 334, 1]
    assert len(alike["encoder"]["changes"]) == 2
    assert len(alike["student"]["cosines"]) == 4
    text = report.page({})
    for name in (sheets.STRIP_IMAGE, sheets.CONTACT_IMAGE, "miniature-similarity.png"):
        assert f"images/{name}" in text
        with Image.open(places / "images" / name) as image:
            assert len(image.convert("RGB").getcolors(2**20)) > 100
    assert "Not run." not in text
    mean = [math.fsum(alike[part]["changes"]) / 2 for part in ("encoder", "decoder")]
    verdict = "agrees" if mean[0] < mean[1] else "does not agree"
    assert f"| less | {verdict} | mean relative change {mean[0]:.4f} (encoder)" in text


def test_a_timestep_that_is_left_out_changes_the_picture_by_its_weight(places):
    """Without t = 1 hardly anything changes; without t = 751 nearly everything does."""
    plant_rates(places)
    plant_student("k4")
    whole = drawing.load_row(ROWS["k4"], 0)
    assert whole.facts["training"]["learning_rate"] == 1e-4
    gaps = {}
    pictures = whole.draw(["two fruits"], [3])
    for timestep in (751, 1):
        row = ROWS[f"k4-without-{timestep}"]
        model = drawing.load_row(row, 0)
        assert model.facts["row"] == row.name
        one, other = (np.asarray(p[0], int) for p in (pictures, model.draw(["two fruits"], [3])))
        gaps[timestep] = np.abs(one - other).mean()
    assert 0 < gaps[1] < 5
    assert gaps[751] > 5 * gaps[1]


def test_cosines_and_changes_are_by_hand():
    features = [
        [torch.tensor([[1.0, 0.0]])],
        [torch.tensor([[0.0, 2.0]])],
        [torch.tensor([[1.0, 1.0]])],
    ]
    root = 0.5**0.5
    want = [[1, 0, root], [0, 1, root], [root, root, 1]]
    torch.testing.assert_close(
        torch.tensor(similarity.cosines(features)), torch.tensor(want), atol=1e-5, rtol=0
    )
    assert similarity.changes(features) == [5.0, 0.5]


def test_the_recorder_keeps_the_half_with_the_prompt():
    unet = tiny_unet()
    recorder = similarity.Recorder(unet)
    sample, text = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 32)
    with torch.no_grad():
        for timestep in (9, 5):
            unet(sample, timestep, encoder_hidden_states=text)
        whole = unet.conv_in(sample)
    assert recorder.timesteps == [9, 5]
    assert [len(step) for step in recorder.encoder] == [len(unet.down_blocks) + 1] * 2
    assert [len(step) for step in recorder.decoder] == [len(unet.up_blocks)] * 2
    assert recorder.encoder[0][0].shape[0] == len(whole) // 2
    assert not torch.equal(recorder.decoder[0][0], recorder.decoder[1][0])


def test_results_of_unlike_worlds_make_no_page(planted):
    path = plant(planted, "k2", right=0.5)
    path.write_text(path.read_text().replace('"extractors": {}', '"extractors": {"judge": 1}'))
    with pytest.raises(InputError, match=r"not comparable.*judge"):
        load_results()
