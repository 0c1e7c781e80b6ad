"""Contact sheets, file names made of prompts, whole-or-absent writes."""

import os

import pytest
from PIL import Image

from tiue.errors import InputError, OutputError
from tiue.images import contact_sheet, safe_file_name, save_image


def red(width: int = 160, height: int = 160) -> Image.Image:
    return Image.new("RGB", (width, height), "red")


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return {value: n for n, value in image.getcolors(image.width * image.height)}.get(colour, 0)


def test_sheet_shows_every_picture_whole_and_its_label():
    sheet = contact_sheet([red()] * 5, ["red apple", "", "", "", ""], columns=3)
    unlabelled = contact_sheet([red()] * 5, [""] * 5, columns=3)
    assert count(sheet, (255, 0, 0)) == 5 * 160 * 160
    assert count(unlabelled, (255, 255, 255)) > count(sheet, (255, 255, 255)) > 0
    # The label stands below the first picture and nowhere else.
    changed = [
        (x, y)
        for x in range(sheet.width)
        for y in range(sheet.height)
        if sheet.getpixel((x, y)) != unlabelled.getpixel((x, y))
    ]
    assert all(12 <= x < 172 and 172 <= y < 212 for x, y in changed)


def test_small_pictures_are_enlarged_pixel_by_pixel():
    small = red(48, 48)
    small.putpixel((0, 0), (0, 0, 255))
    sheet = contact_sheet([small], ["dot"])
    assert count(sheet, (0, 0, 255)) == 9
    assert count(sheet, (255, 0, 0)) == 9 * (48 * 48 - 1)


def test_pictures_of_different_sizes_are_not_cut():
    sheet = contact_sheet([red(200, 100), Image.new("RGB", (90, 140), "blue")], ["a", "b"])
    assert count(sheet, (255, 0, 0)) == 200 * 100
    assert count(sheet, (0, 0, 255)) == 90 * 140


@pytest.mark.parametrize("label", ["word " * 100, "w" * 500, "two\nlines\tand more"])
def test_long_labels_stay_under_their_picture(label):
    one = contact_sheet([red(), red()], [label, ""], columns=2)
    none = contact_sheet([red(), red()], ["", ""], columns=2)
    assert one.size == none.size
    right = (12 + 160, 0, *one.size)
    assert one.crop(right).tobytes() == none.crop(right).tobytes()
    assert one.tobytes() != none.tobytes()


@pytest.mark.parametrize(
    ("images", "labels", "columns"), [(0, 0, None), (2, 1, None), (2, 2, 0), (2, 2, -1)]
)
def test_sheet_refuses(images, labels, columns):
    with pytest.raises(InputError):
        contact_sheet([red()] * images, ["x"] * labels, columns)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Red Apple", "red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("/absolute\\windows:path*?", "absolute-windows-path"),
        ("..", "image"),
        ("", "image"),
        ("\x00\n", "image"),
        ("--output=x", "output-x"),
        ("Größe 12", "größe-12"),
        ("u\u0308ber", "über"),
        ("~root/$HOME/`id`", "root-home-id"),
    ],
)
def test_file_names(prompt, name):
    assert safe_file_name(prompt) == name


def test_long_names_fit_a_file_system(tmp_path):
    for prompt in ["a" * 5000, "漢字" * 500, "é" * 500]:
        name = safe_file_name(prompt)
        assert 0 < len(name.encode()) <= 120
        (tmp_path / f"{name}_seed4294967295-999.png").touch()


def test_save_image_writes_a_readable_picture_and_nothing_else(tmp_path):
    path = tmp_path / "red.png"
    save_image(red(), path)
    save_image(Image.new("RGB", (3, 2), "blue"), path)
    assert Image.open(path).size == (3, 2)
    assert os.listdir(tmp_path) == ["red.png"]


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path):
    path = tmp_path / "red.jpg"
    save_image(red(), path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"red\.jpg"):
        save_image(red().convert("RGBA"), path)  # JPEG has no alpha: PIL raises OSError
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["red.jpg"]


def test_save_image_names_what_is_wrong(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        save_image(red(), tmp_path / "file" / "red.png")
    with pytest.raises(OutputError):
        save_image(red(), tmp_path / "missing" / "red.png")
    with pytest.raises(InputError, match=r"\.png"):
        save_image(red(), tmp_path / "red")
