"""Tuned launch configurations: which file serves a device, and that launches take what it says."""

import json
import logging

import pytest
import torch

from tiue_kernels import configs
from tiue_kernels.triton import group_norm

pytest.importorskip("triton")

GPU = torch.device("cuda", 0)
HEURISTIC, TUNED, OTHER = {"rows": 1}, {"rows": 2}, {"rows": 4}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The user's folder and the package's, empty, on a machine with a made-up GPU."""
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "user"))
    monkeypatch.setattr(configs, "PACKAGE", package)
    monkeypatch.setattr(configs, "_tables", {})
    monkeypatch.setattr(configs, "_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(configs, "_multiprocessors", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return tmp_path / "user", package


def add(folder, name, config, capability=(9, 0), multiprocessors=100, operator="geglu"):
    content = {"device": name, "capability": capability, "multiprocessors": multiprocessors}
    folder.mkdir(exist_ok=True)
    path = folder / configs.file_name(operator, name)
    path.write_text(json.dumps(content | {"configs": {"bucket": config}}))
    configs.reset()


def choose(bucket="bucket"):
    return configs.choose("geglu", bucket, HEURISTIC, GPU)


def test_without_files_the_heuristic_stands(folders):
    assert choose() is HEURISTIC


def test_the_users_file_comes_before_the_packages(folders):
    user, package = folders
    add(package, "Some GPU", OTHER)
    assert choose() == OTHER
    add(user, "Some GPU", TUNED)
    assert choose() == TUNED
    assert choose("another bucket") is HEURISTIC


def test_a_file_is_read_once(folders):
    user, _ = folders
    add(user, "Some GPU", TUNED)
    assert choose() == TUNED
    (user / configs.file_name("geglu", "Some GPU")).unlink()
    assert choose() == TUNED


def test_the_nearest_device_of_the_capability_serves_and_is_said_once(folders, caplog):
    user, package = folders
    add(package, "Large GPU", OTHER, multiprocessors=132)
    add(package, "Near GPU", TUNED, multiprocessors=96)
    add(user, "Old GPU", {"rows": 8}, capability=(8, 0))
    with caplog.at_level(logging.INFO, "tiue_kernels"):
        assert choose() == TUNED
        assert choose() == TUNED
    assert len(caplog.messages) == 1
    assert "Some GPU" in caplog.text
    # The device's own file is better than any other's, wherever they lie.
    add(user, "Near GPU", OTHER, multiprocessors=100)
    add(package, "Some GPU", {"rows": 16})
    assert choose() == {"rows": 16}


@pytest.mark.parametrize("config", [{"rows": 0}, {"rows": "2"}, None])
def test_a_damaged_file_is_left_out_and_named(folders, caplog, config):
    user, _ = folders
    add(user, "Some GPU", config)
    assert choose() is HEURISTIC
    assert "Some_GPU.json is left out" in caplog.text


def test_what_is_written_is_found_and_adds_to_what_is_there(folders):
    user, _ = folders
    assert configs.write(user, "geglu", GPU, {"bucket": OTHER, "second": OTHER}).parent == user
    configs.write(user, "geglu", GPU, {"bucket": TUNED})
    configs.reset()
    assert (choose(), choose("second")) == (TUNED, OTHER)
    assert not list(user.glob("*.tmp"))


def test_a_checkpoints_configurations_replace_the_files(folders):
    user, _ = folders
    add(user, "Some GPU", TUNED)
    choose()
    saved = json.loads(json.dumps(configs.in_use()))
    add(user, "Some GPU", OTHER)
    assert choose() == OTHER
    assert configs.use(saved) == ["Some GPU"]
    assert choose() == TUNED
    assert configs.use(saved) == []


def test_a_forced_configuration_holds_inside_alone(folders):
    with configs.forced("geglu", "bucket", TUNED):
        assert choose() == TUNED
        assert choose("another") is HEURISTIC
    assert choose() is HEURISTIC


def test_small_gpus_get_fewer_wider_tiles():
    few, many = (group_norm.plan(4, 32, 10, 64, False, multiprocessors=count) for count in (4, 132))
    assert few.programs(4, 32) < many.programs(4, 32)
    assert many == group_norm.plan(4, 32, 10, 64, False)
