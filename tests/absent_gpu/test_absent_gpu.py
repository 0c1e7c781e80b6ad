"""The whole GPU path without a GPU: devices, dtypes, layouts and fakes of every call in a pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.absent_gpu.device import compile_library

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the device cannot be compiled")
def test_whole_passes_keep_cudas_rules(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.absent_gpu", str(compile_library(tmp_path))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]

    faults = {entry["planted"]: entry["error"] for entry in results if "planted" in entry}
    assert len(faults) >= 10
    assert [name for name, error in faults.items() if error is None] == []

    refused = [entry for entry in results if entry.get("attention") and entry["error"]]
    assert refused == []

    passes = {entry["pass"]: entry for entry in results if "pass" in entry}
    errors = {name: entry["error"] for name, entry in passes.items() if "error" in entry}
    assert errors == {}, done.stderr
    assert len(passes) == 12
    for name, entry in passes.items():  # and each met what it is there for
        rules = {rule.split(".")[1] for rule in entry["checked"]}
        assert {"native_layer_norm", "convolution"} <= rules, name
        if name.endswith("table"):  # which leaves rows that share no keys to torch
            assert "_scaled_dot_product_flash_attention" in rules, name
            backward = "_scaled_dot_product_flash_attention_backward" in rules
            assert backward == ("train" in name), name
        if name.endswith("reference"):  # triton's own kernels normalise every map
            assert "native_group_norm" in rules, name
            assert ("native_group_norm_backward" in rules) == ("train" in name), name
        assert (entry["launches"] > 20) == (not name.endswith("reference")), name
        assert any(operator.endswith("_bwd") for operator in entry["operators"]) == (
            "train" in name
        ), name
