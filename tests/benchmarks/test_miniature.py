"""The miniature's own arithmetic: costs, similarity, verdicts, and what was not run."""

import pytest
import torch

from benchmarks import miniature_report
from benchmarks.miniature import RECIPE, ROWS, load_row
from benchmarks.miniature_costs import multiply_adds
from benchmarks.miniature_report import cell, claims, judge, table_rows
from benchmarks.miniature_similarity import Recorder, changes, cosines
from tests.tiue.tiny import tiny_unet
from tiue.errors import CheckpointError


def results(**figures):
    """Rows with one result a seed: `results(k1=[3.0, 3.1])` is of FID."""
    return {n: [{"figures": {"fid": v}} for v in values] for n, values in figures.items()}


def test_a_guided_step_costs_two_unets_and_a_pass_shares_its_encoder():
    assert multiply_adds(50, None) == 50 * multiply_adds(1, None)
    one, two, four = (multiply_adds(None, k) for k in (1, 2, 4))
    assert one <= multiply_adds(1, None) / 2 * 1.01
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    assert four < 4 * one


def test_cosines_and_changes_are_by_hand():
    features = [
        [torch.tensor([[1.0, 0.0]])],
        [torch.tensor([[0.0, 2.0]])],
        [torch.tensor([[1.0, 1.0]])],
    ]
    root = 0.5**0.5
    want = [[1, 0, root], [0, 1, root], [root, root, 1]]
    torch.testing.assert_close(
        torch.tensor(cosines(features)), torch.tensor(want), atol=1e-5, rtol=0
    )
    assert changes(features) == [5.0, 0.5]


def test_the_recorder_keeps_the_half_with_the_prompt():
    unet = tiny_unet()
    recorder = Recorder(unet)
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


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([3.0, 3.1, 2.9], [4.0, 4.1, 3.9], "agrees"),
        ([4.0, 4.1, 3.9], [3.0, 3.1, 2.9], "does not agree"),
        ([3.0, 4.0, 3.5], [3.2, 4.1, 3.4], "undecided"),
        ([3.0], [4.0], "not run"),
        ([3.0, 3.1], [], "not run"),
    ],
)
def test_verdicts(better, worse, verdict):
    assert judge(results(k4=better, k1=worse), "k4", "k1", "fid")[0] == verdict


def test_a_figure_is_mean_and_spread():
    assert cell(results(k1=[1.0, 2.0, 3.0])["k1"], "fid") == "2.000 ± 1.000"
    assert cell(results(k1=[1.0])["k1"], "fid") == "1.000"
    assert cell(results(k1=[1.0])["k1"], "recall") == ""


def test_what_was_not_run_says_so():
    rows = table_rows({}, {})
    assert len(rows) == len(ROWS)
    assert all(set(row[3 : 3 + len(miniature_report.FIGURES)]) == {"not run"} for row in rows)
    assert {verdict for _, verdict, _ in claims({}, None)} == {"not run"}


def test_a_student_that_was_not_distilled_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.miniature.WORK", tmp_path)
    with pytest.raises(CheckpointError, match=r"benchmarks\.miniature train k2"):
        load_row(ROWS["k2"])


def test_rows_that_differ_in_one_setting():
    """What a claim compares differs in nothing but the claim."""
    settings = {name: RECIPE | row.training for name, row in ROWS.items() if row.training}
    base = settings["k4"]
    for name, changed in (("k4-kl-0.1", "kl_weight"), ("k4-guided", "guidance_scale"),
                          ("k1", "num_decoder_steps"),
                          ("k4-fast", "learning_rate")):  # fmt: skip
        assert {n for n in base if settings[name][n] != base[n]} == {changed}
