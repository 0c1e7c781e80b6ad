"""Folders of pictures and lists of prompts, good and bad."""

import json

import numpy as np
import pytest
from PIL import Image

from tiue.errors import InputError
from tiue.evaluate.pictures import read_batches, scan_folder, square
from tiue.evaluate.prompts import draw_prompts, prompts_hash, read_prompts


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path):
    """Three pictures of one size."""
    for index in range(3):
        noise(12, 8, index).save(tmp_path / f"{index}.png")
    return tmp_path


def test_pictures_are_read_in_the_order_of_their_names(folder):
    found = scan_folder(folder, one_size=True)
    assert [path.name for path in found.paths] == ["0.png", "1.png", "2.png"]
    assert found.sizes == {(12, 8): 3}
    batches = list(read_batches(found.paths, 8, 2))
    assert [len(batch) for batch in batches] == [2, 1]
    want = np.asarray(noise(12, 8, 2))[:, 2:10].transpose(2, 0, 1)
    np.testing.assert_array_equal(batches[1][0].numpy(), want)


def test_hidden_files_and_folders_are_not_pictures(folder):
    (folder / ".partial.png").write_bytes(b"")
    (folder / "more").mkdir()
    assert len(scan_folder(folder).paths) == 3


def cut_off(folder):
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])


def text(folder):
    (folder / "1.png").write_text("no picture")


def empty(folder):
    (folder / "1.png").write_bytes(b"")


def other(folder):
    (folder / "1.png").rename(folder / "1.txt")
    (folder / "1.txt").write_text("notes")


@pytest.mark.parametrize("spoil", [cut_off, text, empty, other])
def test_what_is_no_whole_picture_is_named_or_counted(folder, spoil):
    spoil(folder)
    with pytest.raises(InputError, match=r"1 files that are no whole pictures: 1\.(png|txt)\."):
        scan_folder(folder)
    found = scan_folder(folder, skip_unreadable=True)
    assert [path.name for path in found.paths] == ["0.png", "2.png"]
    assert len(found.skipped) == 1


def test_many_broken_files_are_named_in_part(folder):
    for index in range(9):
        (folder / f"broken{index}.jpg").write_text("no")
    with pytest.raises(InputError, match=r"9 files .* broken4.jpg and 4 more"):
        scan_folder(folder)


def test_mixed_sizes_are_refused_where_one_is_due(folder):
    noise(9, 8).save(folder / "3.png")
    with pytest.raises(InputError, match=r"2 sizes: 0.png is 12 x 8, 3.png is 9 x 8"):
        scan_folder(folder, one_size=True)
    found = scan_folder(folder)
    assert found.sizes == {(12, 8): 3, (9, 8): 1}
    assert [batch.shape for batch in read_batches(found.paths, 16, 4)] == [(4, 3, 16, 16)]


@pytest.mark.parametrize("name", ["missing", "new", "0.png"])
def test_folders_without_pictures_are_refused(folder, name):
    (folder / "new").mkdir()
    with pytest.raises(InputError, match=r"no folder|holds no pictures"):
        scan_folder(folder / name)


def test_square_is_a_centre_crop_and_lanczos():
    image = noise(30, 20)
    want = image.crop((5, 0, 25, 20)).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(square(image, 8), np.asarray(want).transpose(2, 0, 1))


def test_square_of_other_modes():
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    red.putpixel((0, 0), (255, 0, 0, 255))
    laid = square(red, 4)
    assert laid[:, 0, 0].tolist() == [255, 0, 0]
    assert laid[:, 1, 1].tolist() == [255, 255, 255]
    assert square(Image.new("L", (4, 6), 7), 4).tolist() == np.full((3, 4, 4), 7).tolist()


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red apple\n  rocket \n\n")
    assert read_prompts(path) == ["red apple", "rocket"]


def test_captions_of_coco_are_the_first_of_each_picture(tmp_path):
    path = tmp_path / "captions_val2014.json"
    rows = [(9, 2, "second"), (9, 1, "a  cat\n"), (3, 7, "a dog"), (9, 5, "third")]
    entries = [{"image_id": i, "id": n, "caption": c} for i, n, c in rows]
    path.write_text(json.dumps({"annotations": entries}))
    assert read_prompts(path) == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b"sun\n\nmoon\n", "prompt 2 of .* is empty"),
        ("a.txt", b"\xff\xfe\xfa", "cannot read prompts"),
        ("a.json", b"[1, 2]", "not in the form of COCO's captions"),
        ("a.json", b"{", "not in the form of COCO's captions"),
        ("a.json", b'{"annotations": []}', "holds no prompts"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(InputError, match="cannot read prompts"):
        read_prompts(tmp_path / "missing.txt")


def test_prompts_are_drawn_by_seed_without_replacement():
    names = [str(index) for index in range(50)]
    drawn = draw_prompts(names, 20, 0)
    assert drawn == draw_prompts(names, 20, 0)
    assert drawn != draw_prompts(names, 20, 1)
    assert len(set(drawn)) == 20
    assert draw_prompts(names, None, 0) == names
    assert prompts_hash(drawn) != prompts_hash(names)
    with pytest.raises(InputError, match="draws 51 prompts and the list holds 50"):
        draw_prompts(names, 51, 0)
