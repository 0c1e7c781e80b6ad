"""Prompt files of every kind."""

import json
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from tiue.distill.prompts import read_prompts
from tiue.errors import InputError

JOURNEYDB = [
    {"img_path": "./1.jpg", "prompt": "apple --v 4", "Task2": {"Caption": "A red apple."}},
    {"img_path": "./2.jpg", "prompt": "rocket", "Task2": {"Caption": "  A rocket.\n"}},
    {"img_path": "./3.jpg", "prompt": "rocket", "Task2": {"Caption": "A red apple."}},
    {"img_path": "./4.jpg", "prompt": "none", "Task2": None},
    {"img_path": "./5.jpg", "prompt": "none"},
]
CAPTIONS = ["A red apple.", "A rocket."]
TYPED = ["apple --v 4", "rocket", "none"]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_journeydb_annotations(tmp_path):
    path = write_jsonl(tmp_path / "anno.jsonl", JOURNEYDB)
    assert read_prompts(path) == CAPTIONS
    assert read_prompts(path, "prompt") == TYPED


def test_jsonl_of_strings_and_line_separators_inside_them(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"red\u2028apple"\n\n"rocket"\n', encoding="utf-8")
    assert read_prompts(path) == ["red\u2028apple", "rocket"]


def test_separators_inside_a_line_of_text_do_not_split_it(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("red\u2028apple\x0c!\r\nrocket\x85 two\rsun\n".encode())
    assert read_prompts(path) == ["red\u2028apple\x0c!", "rocket\x85 two", "sun"]


def test_arrays_of_json(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(JOURNEYDB, indent=1))
    assert read_prompts(path) == CAPTIONS
    path.write_text('\n["a", "b"]')
    assert read_prompts(path) == ["a", "b"]


def test_the_best_column_may_first_appear_late(tmp_path):
    rows = [{"text": "1"}, {"prompt": "p", "text": "2"}, *JOURNEYDB[:2], {"caption": "c"}]
    assert read_prompts(write_jsonl(tmp_path / "anno.jsonl", rows)) == CAPTIONS


def test_what_was_left_out_is_told_with_its_reason(tmp_path):
    said = []
    rows = ["a", "b", " a", "", "\ud800 half", None]
    path = write_jsonl(tmp_path / "anno.jsonl", [{"caption": row} for row in rows])
    assert read_prompts(path, report=said.append) == ["a", "b"]
    assert said == [
        f"Prompts: 2 of 6 rows of '{path}'; left out: 1 repeated, 2 empty, "
        "1 not Unicode (half of a surrogate pair)."
    ]


def test_rows_are_streamed(tmp_path):
    """What a row holds beside its prompt is let go of at once."""
    path = tmp_path / "anno.jsonl"
    with path.open("w") as file:
        for number in range(3000):
            file.write(json.dumps({"caption": f"p{number}", "other": "x" * 10_000}) + "\n")
    tracemalloc.start()
    assert len(read_prompts(path)) == 3000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3e6  # the file has 30 MB


def test_parquet(tmp_path):
    path = tmp_path / "prompts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(JOURNEYDB), path)
    assert read_prompts(path) == CAPTIONS
    assert read_prompts(path, "prompt") == TYPED
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="Is the file whole"):
        read_prompts(path)


def test_hugging_face_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "journey"
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(JOURNEYDB), folder / "train.parquet")
    assert read_prompts(folder) == CAPTIONS
    with pytest.raises(InputError, match="Cannot load the data set"):
        read_prompts(f"{folder}:nowhere")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"caption": "a"}\n{"capt', "Line 2 of .* is no JSON .*half written"),
        ("a.jsonl", '{"image": "a"}\n', "no column Task2.Caption or .*one of image"),
        ("a.jsonl", '{"caption": 3}\n', "is 3, not text"),
        ("a.jsonl", "[1]\n", "one JSON object a line"),
        ("a.jsonl", "", "No prompt in"),
        ("a.txt", "red apple\nrock\0\0\0", "NUL bytes: it is damaged or half written"),
        ("a.parquet", "", "Cannot read prompts"),
        ("a", "\n", "No prompt in"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_a_last_line_without_end_is_told(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_text("red apple\nroc")
    assert read_prompts(path) == ["red apple", "roc"]
    assert "cut short" in caplog.text


def test_a_missing_file_asks_no_network(tmp_path):
    with pytest.raises(InputError, match="There is no file 'nowhere'"):
        read_prompts("nowhere")
    with pytest.raises(InputError, match="Cannot read prompts"):
        read_prompts(tmp_path / "nowhere.jsonl")


def test_a_column_of_text_that_is_none_is_named(tmp_path):
    """A byte of the word "smile" that a bad disk flipped."""
    broken = pyarrow.array([b"\xf3mile"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"caption": broken}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"Cannot read prompts from '.*a\.parquet'"):
        read_prompts(tmp_path / "a.parquet")
