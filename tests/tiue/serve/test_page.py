"""The page in a real headless Chromium, over a tiny model in a process of its own."""

import json
import re
import resource
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import numpy as np
import playwright.sync_api as playwright
import pytest
from PIL import Image

from testing.browser import PHONE, WIDE, find_chromium, open_page
from tests.tiue.serve.conftest import PATIENCE, ROOT, Slow, hosted, tiny_engine
from tiue.serve.engine import Drawing
from tiue.serve.limits import Limits
from tiue.serve.page import _entries, _gallery


@pytest.fixture(scope="module")
def address(engine):
    with hosted(engine) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> None:
    if find_chromium() is None:
        pytest.skip("no Chromium: the page is not opened")


def draw(page) -> None:
    page.get_by_role("button", name="Draw").click()


def see_captions(page, label: str, captions: list[str]) -> None:
    """Wait until a gallery has these captions and no others."""
    gallery = page.locator(".pictures", has=page.get_by_text(label, exact=True))
    texts = [re.compile(rf"^\s*{re.escape(text)}\s*$") for text in captions]
    shown = playwright.expect(gallery.locator(".caption-label"))
    shown.to_have_text(texts, timeout=1000 * PATIENCE)


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["1280", "390"])
def test_a_prompt_is_drawn_an_error_told_and_the_history_kept(chromium, address, size):
    with open_page(address, size) as (page, wrong):
        width = "document.documentElement.scrollWidth"
        page.get_by_label("Prompt", exact=True).fill("apple")
        page.get_by_label("Show what each timestep adds").check()
        page.get_by_label("Compare with the teacher").check()
        draw(page)
        seeds = [f"seed {seed}" for seed in range(4)]
        see_captions(page, "The teacher's, of the same seeds", seeds)
        see_captions(page, "Pictures", seeds)
        see_captions(page, "What each timestep adds", ["t=751", "+ t=501", "+ t=251", "+ t=1"])
        stages = page.locator("#stages").inner_text()
        assert re.search(r"decoder: \d+ ms, \d+%", stages)
        assert page.evaluate(width) <= size["width"]

        page.get_by_label("Prompt", exact=True).fill(" ")
        draw(page)
        page.get_by_text("the prompt is empty; say what to draw").wait_for()

        page.reload()
        page.get_by_text("apple (2)").wait_for()
        page.get_by_label("Seed").fill("77")
        page.get_by_text("apple (2)").click()
        playwright.expect(page.get_by_label("Seed")).to_have_value("2", timeout=1000 * PATIENCE)
        assert page.get_by_label("Prompt", exact=True).input_value() == "apple"
        assert page.evaluate(width) <= size["width"]
        # Nothing left this machine, nothing failed, nothing was said on the console.
        assert wrong == []


@contextmanager
def full_disk():
    """No file of this process can have more than a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_spoils_no_picture(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    gallery = _gallery("Pictures", columns=4)
    drawn = engine.draw([engine.check(Drawing("apple", seed)) for seed in (1, 2)])
    first, second = ([(picture.image, "it")] for picture in drawn)
    shown = Path(gallery.postprocess(first).root[0].image.path)
    whole = shown.read_bytes()
    with full_disk():
        with pytest.raises(gr.Error, match="cannot store the pictures"):
            gallery.postprocess(second)
        again = gallery.postprocess(first)  # there already, and not written over
    assert Path(again.root[0].image.path) == shown
    assert shown.read_bytes() == whole
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [shown]
    stored = gallery.postprocess(second).root[0].image.path
    np.testing.assert_array_equal(np.asarray(Image.open(stored)), np.asarray(drawn[1].image))


def test_an_upload_is_drawn_over_and_a_bomb_is_not(chromium, address, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    with open_page(address) as (page, wrong):
        page.get_by_role("button", name="More").click()
        upload = page.locator("input[type=file]")
        for name, word in (("bomb", "a picture may have"), ("cut", "no whole PNG")):
            upload.set_input_files(tmp_path / f"{name}.png")
            page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.wait_for()
            draw(page)
            page.get_by_text(word).first.wait_for()
            page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        upload.set_input_files(tmp_path / "good.png")
        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.wait_for()
        draw(page)
        page.get_by_text("seed 0", exact=True).wait_for()
        assert wrong == []


def test_cancel_frees_the_place(chromium):
    engine = tiny_engine(max_batch=1)
    slow = Slow(engine)
    with hosted(engine) as url, open_page(url) as (page, wrong):
        draw(page)
        assert slow.begun.wait(PATIENCE)
        assert metric(url, "tiue_waiting_pictures") == 3  # of four
        page.get_by_role("button", name="Cancel").click()
        end = time.monotonic() + PATIENCE
        while metric(url, "tiue_waiting_pictures") and time.monotonic() < end:
            page.wait_for_timeout(50)
        assert metric(url, "tiue_waiting_pictures") == 0
        assert metric(url, 'tiue_requests_total{door="page",outcome="cancelled"}') == 1
        slow.go.set()
        draw(page)
        page.get_by_text("seed 3", exact=True).wait_for()
        assert wrong == []


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE) as answer:
        found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def send_event(address: str, photo: dict | None, session: str) -> tuple[bool, str]:
    """The page's own event, sent past the browser: whether it drew, and all that was said."""
    with urllib.request.urlopen(f"{address}/config", timeout=PATIENCE) as answer:
        event = next(d for d in json.load(answer)["dependencies"] if len(d["inputs"]) > 9)
    data = ["apple", 1, 4, 0, 1, "", photo, 0.8, False, False, []]
    body = {"data": data, "fn_index": event["id"], "session_hash": session}
    request = urllib.request.Request(
        f"{address}/gradio_api/queue/join",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=PATIENCE).close()
    stream = f"{address}/gradio_api/queue/data?session_hash={session}"
    with urllib.request.urlopen(stream, timeout=PATIENCE) as answer:
        said = answer.read().decode()
    done = [json.loads(line[6:]) for line in said.splitlines() if "process_completed" in line]
    return done[0]["success"], said


def test_the_page_follows_no_address_and_no_path(address):
    assert send_event(address, None, "none")[0]
    secret = ROOT / "docs" / "images" / "openmoji-student.png"  # a picture of this machine
    paths = ("http://127.0.0.1:9/a.png", "/etc/passwd", "data:image/png;base64,AA", str(secret))
    for session, path in zip("abcd", paths, strict=True):
        photo = {"path": path, "meta": {"_type": "gradio.FileData"}}
        drawn, said = send_event(address, photo, session)
        assert not drawn
        assert "no address and no path is followed" in said, said


def test_a_history_of_another_make_is_left_out():
    good = {"prompt": "a", "steps": 4, "seed": 1, "guidance": 1, "negative": "", "picture": PIXEL}
    assert _entries([good, {}, None, good | {"picture": "x"}, good | {"seed": "1"}]) == [good]
    assert _entries({"a": 1}) == []
    assert len(_entries([good] * 99)) == 24
    assert Limits().read_base64(PIXEL).size == (1, 1)


PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJg"
    "gg=="
)
