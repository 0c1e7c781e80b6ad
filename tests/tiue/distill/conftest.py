from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.tiue.tiny import tiny_pipeline
from tiue.distill import DistillConfig


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Let every test choose its own precision: accelerate keeps one for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_config(teacher_folder, tmp_path_factory):
    """Settings of a short run in a folder of its own; keywords replace some of them."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("red apple\nrocket\ncat face\nsun\nhouse\n")

    def make(**settings) -> DistillConfig:
        defaults = {
            "teacher": str(teacher_folder),
            "prompts": str(prompts),
            "steps": 2,
            "batch_size": 3,
            "learning_rate": 1e-3,
            "lora_rank": 4,
            "save_pipeline": False,
            "cpu": True,
            "trackers": (),
        }
        if "output" not in settings:
            defaults["output"] = tmp_path_factory.mktemp("run")
        return DistillConfig(**defaults | settings)

    return make
