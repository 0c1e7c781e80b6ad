import numpy as np
import pytest
import torch

from tiue.openmoji.config import TEN_PROMPTS
from tiue.openmoji.data import (
    clean_name,
    name_pictures,
    render_picture,
    sampling_weights,
    write_prompts,
)

pytest.importorskip("emoji", reason="naming pictures needs the train extra")


def test_the_ten_prompts_are_the_names_of_their_pictures(pictures):
    assert tuple(pictures.prompts) == TEN_PROMPTS


@pytest.mark.parametrize(
    ("code", "prompt", "alias"),
    [
        ("1F355", "pizza", "slice of pizza"),
        ("2764", "red heart", "red heart"),  # "heavy black heart" in Unicode: black is filled
        ("2600", "sun", "sun"),
        ("1F1EE-1F1F8", "iceland", "iceland"),
        ("1F469-200D-1F680", "woman astronaut", "woman astronaut"),
    ],
)
def test_prompts_are_the_cldr_name_and_the_unicode_name(code, prompt, alias):
    assert name_pictures([code]) == {code: (prompt, alias)}


def test_skin_tones_and_unnamed_pictures_are_left_out():
    assert name_pictures(["1F44D-1F3FD", "E000", "1F1E6", "1F44D"]).keys() == {"1F44D"}


def test_names_are_lower_case_ascii():
    assert clean_name(":woman\u2019s_hat:") == "woman's hat"
    assert clean_name(":S\u00e3o_Tom\u00e9_&_Pr\u00edncipe:") == "sao tome & principe"


def test_flags_are_drawn_less_often():
    weights = sampling_weights(["1F34E", "1F1EE-1F1F8"])
    assert weights.tolist() == [1.0, 0.2]


def test_drawing_follows_the_weights(pictures):
    pictures.weights[1:] = 0
    drawn = pictures.sample(50, torch.Generator().manual_seed(0))
    assert drawn.tolist() == [0] * 50


def test_a_picture_is_rendered_on_white():
    pytest.importorskip("resvg_py", reason="rendering needs the train extra")
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        '<rect x="36" width="36" height="72" fill="#ff0000"/></svg>'
    )
    picture = render_picture(svg, size=8)
    assert picture.shape == (3, 8, 8)
    assert np.array_equal(picture[:, 0, 0], [255, 255, 255])
    assert np.array_equal(picture[:, 0, 7], [255, 0, 0])


def test_the_prompt_file_holds_every_prompt_and_alias_once(pictures, tmp_path):
    write_prompts(pictures, tmp_path / "prompts.txt")
    lines = (tmp_path / "prompts.txt").read_text().splitlines()
    assert sorted({*pictures.prompts, *pictures.aliases}) == lines
    assert "slice of pizza" in lines
