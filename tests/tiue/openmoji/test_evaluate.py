import json

import pytest
import torch

from tiue.errors import InputError
from tiue.openmoji.evaluate import BEGIN, END, card, figures_table, ranks, retrieval_figures


def perfect(pictures):
    """Draws the prompted picture itself."""
    return lambda prompts, seeds: pictures.images[[pictures.prompts.index(p) for p in prompts]]


def shifted(pictures):
    """Draws the picture after the prompted one."""
    return lambda prompts, seeds: pictures.images.roll(-1, 0)[
        [pictures.prompts.index(p) for p in prompts]
    ]


def test_rank_counts_the_nearer_pictures(pictures):
    everything = torch.arange(len(pictures))
    assert ranks(pictures.images, everything, pictures).tolist() == [0] * len(pictures)
    assert (ranks(pictures.images.roll(1, 0), everything, pictures) > 0).all()


def test_equal_pictures_count_as_one(pictures):
    pictures.images[3] = pictures.images[0]
    assert ranks(pictures.images[:1], torch.tensor([3]), pictures).tolist() == [0]


def test_figures_of_a_perfect_and_of_a_wrong_model(pictures):
    figures = retrieval_figures(perfect(pictures), shifted(pictures), pictures, count=8, seed=0)
    assert figures["top1"] == figures["top5"] == 1.0
    assert figures["autoencoder"]["top1"] == 0.0
    assert set(figures["ten"].values()) == {0}


@pytest.mark.parametrize("count", [0, 11])
def test_more_prompts_than_pictures_are_refused(pictures, count):
    with pytest.raises(InputError, match="from 1 to 10"):
        retrieval_figures(perfect(pictures), perfect(pictures), pictures, count=count, seed=0)


def test_the_card_holds_the_figures_and_says_what_was_not_measured(tmp_path):
    figures = {
        "top1": 0.5, "top5": 0.75, "autoencoder": {"top1": 0.9, "top5": 1.0},
        "ten": {"rocket": 0, "sun": 3},
    }  # fmt: skip
    (tmp_path / "teacher.json").write_text(json.dumps(figures))
    path = tmp_path / "card.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    card(path, tmp_path)
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert any("| 50.0% | 75.0% | 1 |" in line for line in lines)
    assert sum("not measured" in line for line in lines) == 2
    assert figures_table(tmp_path) in path.read_text()
