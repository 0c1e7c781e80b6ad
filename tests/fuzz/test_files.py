"""Model folders, settings and prompts whose bytes are not what was written: an error that says so,
or what a right file of those bytes would give; never another exception, never a crash."""

import json
import random
import tempfile
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tests.fuzz.damage import damaged
from tests.tiue.tiny import tiny_pipeline
from tiue import TiUEPipeline
from tiue.distill import DistillConfig
from tiue.distill.prompts import read_prompts
from tiue.distill.settings import RECIPES, load_config
from tiue.errors import TiUEError

PROMPTS = ["red apple", "rocket", "smile ☺", "a\u2028b"]


def prompt_files() -> dict[str, bytes]:
    """A right file of every kind."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "a.parquet"
        parquet.write_table(pyarrow.table({"caption": PROMPTS}), table)
        columns = table.read_bytes()
    rows = [json.dumps({"Task2": {"Caption": text}, "prompt": "x"}) for text in PROMPTS]
    return {
        ".txt": "\n".join(PROMPTS).encode(),
        ".jsonl": "\n".join(rows).encode(),
        ".json": json.dumps(PROMPTS).encode(),
        ".parquet": columns,
    }


FILES = prompt_files()
RECIPE = sorted(RECIPES.glob("*.yaml"))[0].read_bytes()


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


@given(st.data())
def test_prompts(place, data):
    suffix = data.draw(st.sampled_from(sorted(FILES)))
    content = data.draw(st.one_of(damaged(FILES[suffix]), st.binary(max_size=60)))
    path = place / f"prompts{suffix}"
    path.write_bytes(content)
    try:
        prompts = read_prompts(path)
    except TiUEError:
        return
    assert prompts
    assert all(text == text.strip() and text.encode() for text in prompts)
    assert len(set(prompts)) == len(prompts)


@given(st.data())
def test_settings(place, data):
    path = place / "settings.yaml"
    path.write_bytes(data.draw(st.one_of(damaged(RECIPE), st.binary(max_size=60))))
    try:
        config = load_config(path, teacher="openmoji", prompts="p.txt", output="out")
    except TiUEError:
        return
    assert isinstance(config, DistillConfig)


@given(st.data())
def test_model_folders(model, data):
    files = sorted(path for path in model.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged(content)))
    # Weights of a damaged config are random; so are a damaged tokenizer's numbers of words.
    random.seed(0)
    torch.manual_seed(0)
    try:
        pipe = TiUEPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        images = pipe("red apple", output_type="latent").images
        assert images.shape[:2] == (1, 4)
    except TiUEError:
        pass
    finally:
        path.write_bytes(content)
