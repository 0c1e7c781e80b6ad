"""The HTTP API over a tiny model: its form, its errors, what it survives."""

import base64
import io
import re
import struct
import threading
import time
import zlib

import numpy as np
from PIL import Image

from tests.tiue.serve.conftest import PATIENCE, Slow, client, tiny_engine
from tiue.serve.engine import Drawing

URL = "/v1/images/generations"


def pictures(answer) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]
    return [np.asarray(Image.open(io.BytesIO(file)), dtype=int) for file in files]


def in_base64(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def metric(api, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", api.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_draws_what_the_engine_draws(api, engine):
    answer = api.post(URL, json={"prompt": "apple", "n": 3, "seed": 7, "size": "24x16"})
    assert [item["seed"] for item in answer.json()["data"]] == [7, 8, 9]
    for seed, got in zip((7, 8, 9), pictures(answer), strict=True):
        want = engine.draw([engine.check(Drawing("apple", seed, height=16, width=24))])[0].image
        assert got.shape == (16, 24, 3)
        assert np.abs(got - np.asarray(want, dtype=int)).max() <= 1
    assert abs(answer.json()["created"] - time.time()) < 60


def test_every_setting_arrives(api):
    plain = {"prompt": "apple", "seed": 1}
    base = pictures(api.post(URL, json=plain))[0]
    photo = Image.effect_noise((32, 32), 90).convert("RGB")
    guided = {"guidance_scale": 4.0}
    for more in (
        guided,
        {"num_decoder_steps": 1},
        {"image": in_base64(photo)},
        {"image": "data:image/jpeg;base64," + in_base64(photo, "JPEG"), "strength": 0.5},
        {"seed": 2},
    ):
        assert np.abs(pictures(api.post(URL, json=plain | more))[0] - base).max() > 1
    away = pictures(api.post(URL, json=plain | guided | {"negative_prompt": "pear"}))[0]
    assert np.abs(away - pictures(api.post(URL, json=plain | guided))[0]).max() > 1
    same = api.post(URL, json=plain | {"model": "tiny", "response_format": "b64_json", "user": "u"})
    np.testing.assert_array_equal(pictures(same)[0], base)


def test_without_a_seed_each_request_has_its_own(api):
    seeds = {api.post(URL, json={"prompt": "a"}).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_what_a_service_says_of_itself(api):
    assert api.get("/health").json() == {"status": "ok"}
    assert api.get("/ready").status_code == 200
    assert api.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert "/v1/images/generations" in api.get("/openapi.json").json()["paths"]
    page = api.get("/docs").text
    assert "swagger" in page
    assert "http://" not in page
    assert "https://" not in page


def test_metrics_count_requests_passes_and_errors(api):
    ok, bad = (f'tiue_requests_total{{door="api",outcome="{o}"}}' for o in ("ok", "InputError"))
    before = [metric(api, name) for name in (ok, bad, "tiue_batch_size_sum")]
    api.post(URL, json={"prompt": "apple", "n": 3})
    api.post(URL, json={"prompt": " "})
    after = [metric(api, name) for name in (ok, bad, "tiue_batch_size_sum")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 3]
    assert metric(api, "tiue_waiting_pictures") == 0
    assert metric(api, 'tiue_request_seconds_count{door="api"}') == after[0]


def png_bomb(width: int, height: int) -> str:
    """A PNG whose few bytes say that they are a picture of any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9999))
    return base64.b64encode(data + chunk(b"IEND", b"")).decode()


GOOD = in_base64(Image.effect_noise((32, 32), 90).convert("RGB"))
MALFORMED: list[dict] = [
    {},
    {"prompt": None},
    {"prompt": 3},
    {"prompt": ["apple"]},
    {"prompt": {"a": 1}},
    {"prompt": ""},
    {"prompt": " \n"},
    {"prompt": "a" * 100_000},
    *({"prompt": "a", "n": n} for n in (0, -1, 9, 10**9, 1.5, "2", None, True, [1])),
    *(
        {"prompt": "a", "size": size}
        for size in ("", "x", "8", "8x", "nanxnan", "0x0", "-8x8", "8x8x8", "1e9x8", "30x30")
    ),
    *({"prompt": "a", "size": size} for size in ("99999x99999", "٣٢x٣٢", "32X32", 32, None)),
    *({"prompt": "a", "seed": seed} for seed in (-1, 2**64, 1.5, "1", [])),
    {"prompt": "a", "seed": 2**64 - 1, "n": 2},
    {"prompt": "a", "response_format": "url"},
    {"prompt": "a", "model": "other/model"},
    {"prompt": "a", "model": "../../etc/passwd"},
    {"prompt": "a", "lora": "https://example.com/a.safetensors"},
    *({"prompt": "a", "num_decoder_steps": k} for k in (0, 9, -4, "4", 2.5)),
    *({"prompt": "a", "guidance_scale": g} for g in (-1, 31, "3", None)),
    *({"prompt": "a", "image": GOOD, "strength": s} for s in (0, -1, 1.01, "a")),
    {"prompt": "a", "negative_prompt": "b" * 3000},
    {"prompt": "a", "image": "https://example.com/a.png"},
    {"prompt": "a", "image": "/etc/passwd"},
    {"prompt": "a", "image": "file:///etc/passwd"},
    {"prompt": "a", "image": "!!!"},
    {"prompt": "a", "image": ""},
    {"prompt": "a", "image": GOOD[: len(GOOD) // 8 * 4]},
    {"prompt": "a", "image": base64.b64encode(b"GIF89a" + b"\0" * 99).decode()},
    {"prompt": "a", "image": base64.b64encode(b"\x80\x04cos\nsystem\n").decode()},
    {"prompt": "a", "image": png_bomb(50_000, 50_000)},
    {"prompt": "a", "image": png_bomb(2**31 - 1, 2**31 - 1)},
    {"prompt": "a", "image": png_bomb(0, 0)},
    {"prompt": "a", "image": png_bomb(4000, 4000)},
]
BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"apple"',
    b"\xff\xfe\x00",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "guidance_scale": NaN}',
    b'{"prompt": "a", "guidance_scale": Infinity}',
    b"[" * 5000,
]


def assert_refused(answer) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert 3 < len(error["message"]) < 400
    assert "Traceback" not in error["message"]


def test_malformed_requests_are_refused_in_a_sentence(api):
    assert len(MALFORMED) + len(BODIES) >= 50
    passes = metric(api, "tiue_batch_size_count")
    for body in MALFORMED:
        assert_refused(api.post(URL, json=body))
    for raw in BODIES:
        assert_refused(api.post(URL, content=raw, headers={"Content-Type": "application/json"}))
    for answer in (api.get(URL), api.get("/v1/nothing"), api.put("/health")):
        assert_refused(answer)
    assert metric(api, "tiue_batch_size_count") == passes  # nothing was drawn of it
    assert api.post(URL, json={"prompt": "apple"}).status_code == 200


def test_a_body_past_its_limit_is_not_read_to_its_end(api, engine):
    most = 2 * engine.limits.max_upload
    assert_refused(api.post(URL, content=b" " * (most + 1)))
    sent = []

    def stream():  # without a length that could be refused by
        for _ in range(64):
            sent.append(1)
            yield b" " * 2**20

    answer = api.post(URL, content=stream(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_other_names_of_this_machine_are_refused(api):
    """A page elsewhere whose name was made to point here."""
    assert api.get("/health", headers={"Host": "evil.example"}).status_code == 400
    assert api.get("/health", headers={"Host": "localhost:7860"}).status_code == 200


def test_a_form_of_another_page_draws_nothing(api):
    """Such a POST goes without asking first; it has no JSON's content type."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = api.post(URL, content=b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert_refused(answer)


def test_full_queue_is_429():
    engine = tiny_engine(max_waiting=2, max_images=2, max_batch=1)
    slow = Slow(engine)
    answers = []
    with client(engine) as api:

        def ask(n):
            answers.append(api.post(URL, json={"prompt": "a", "n": n}))

        threads = [threading.Thread(target=ask, args=(n,)) for n in (1, 2)]
        threads[0].start()
        assert slow.begun.wait(PATIENCE)
        threads[1].start()
        while metric(api, "tiue_waiting_pictures") < 2:
            time.sleep(0.01)
        full = api.post(URL, json={"prompt": "a"})
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) >= 1
        assert full.json()["error"]["type"] == "rate_limit_error"
        slow.go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


def test_a_late_answer_is_504_and_leaves_its_place():
    engine = tiny_engine(max_waiting=2, max_images=2, max_batch=1, timeout=0.5)
    slow = Slow(engine)
    with client(engine) as api:
        # One in the engine, which waits for a word, and two in the queue: all its places.
        for n in (1, 2):
            assert api.post(URL, json={"prompt": "a", "n": n}).status_code == 504
        assert metric(api, "tiue_waiting_pictures") == 0
        slow.go.set()
        # A busy machine may take longer than half a second for one of these, not for all.
        while (status := api.post(URL, json={"prompt": "a"}).status_code) == 504:
            pass
        assert status == 200


def test_a_fault_of_the_engine_is_500_without_its_words():
    engine = tiny_engine()
    draw = engine.draw

    def faulty(drawings):
        if any(drawing.prompt == "bad" for drawing in drawings):
            raise RuntimeError("/secret/path is broken")
        return draw(drawings)

    engine.draw = faulty
    with client(engine) as api:
        answer = api.post(URL, json={"prompt": "bad"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert api.post(URL, json={"prompt": "good"}).status_code == 200
