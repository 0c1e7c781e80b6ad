import math
from pathlib import Path

import pytest

from tiue.distill.output import claim_output, clear_leftovers, list_checkpoints
from tiue.distill.trainer import Trainer
from tiue.errors import InputError, OutputError
from tiue.files import whole_folder


def test_a_folder_appears_only_once_it_is_complete(tmp_path):
    place = tmp_path / "deep" / "unet"
    with whole_folder(place) as written:
        (written / "config.json").write_text("{}")
        assert not place.exists()
    assert [p.name for p in place.iterdir()] == ["config.json"]
    assert [p.name for p in place.parent.iterdir()] == ["unet"]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("failed writing file")])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    place = tmp_path / "unet"
    place.mkdir()
    (place / "old").touch()

    def write():
        with whole_folder(place) as written:
            (written / "new").touch()
            raise error

    with pytest.raises(OutputError, match=str(error)):
        write()
    assert [p.name for p in tmp_path.rglob("*")] == ["unet", "old"]


def test_a_folder_that_cannot_take_its_place_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "old").touch()
    rename = Path.rename

    def fail_for_the_new_one(path, target):
        if path.name == "written":
            raise OSError("no such place")
        return rename(path, target)

    def write():
        with whole_folder(tmp_path / "unet") as written:
            (written / "new").touch()

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OutputError, match="no such place"):
        write()
    assert [p.name for p in tmp_path.rglob("*")] == ["unet", "old"]


def test_a_complete_write_replaces_what_was_there(tmp_path):
    place = tmp_path / "unet"
    place.mkdir()
    (place / "old").touch()
    with whole_folder(place) as written:
        (written / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["unet", "new"]


def test_unfinished_checkpoints_are_not_listed(tmp_path):
    for name in ("step-00000020", "step-00000003", ".step-00000030-abc", "notes"):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000020"]


def test_old_checkpoints_make_room(make_config):
    from tiue.distill import distill

    output = distill(make_config(steps=3, checkpoint_every=1, keep_checkpoints=2))
    kept = [p.name for p in list_checkpoints(output / "checkpoints")]
    assert kept == ["step-00000002", "step-00000003"]


def test_an_output_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(OutputError, match="Choose another folder"):
        claim_output(path)


def test_a_folder_that_is_no_runs_is_refused_and_stays_as_it_is(make_config, teacher_folder):
    files = {p: p.stat().st_mtime_ns for p in teacher_folder.rglob("*")}
    with pytest.raises(OutputError, match=r"files that are no run's.*an empty or a new folder"):
        Trainer(make_config(output=teacher_folder))
    assert {p: p.stat().st_mtime_ns for p in teacher_folder.rglob("*")} == files


def test_one_run_at_a_time_writes_a_folder(tmp_path):
    lock = claim_output(tmp_path)
    with pytest.raises(OutputError, match="Another process is writing to"):
        claim_output(tmp_path)
    lock.release()
    claim_output(tmp_path).release()


def test_leftovers_of_killed_writes_are_cleared_and_nothing_else(tmp_path):
    kept = ("config.yaml", "unet/x", "logs/x", "checkpoints/step-00000001/x", ".lock", ".mine")
    left = (".unet-a1b2c3d4/written/x", ".pipeline-a1b2c3d4/x", ".123.summary.json",
            "checkpoints/.step-00000002.partial/x")  # fmt: skip
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == set(kept)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_decoder_steps", 0), ("learning_rate", 0.0), ("ema_decay", 1.0), ("prompt_drop", 1.1),
        ("min_timestep", 981), ("max_timestep", 5), ("weighting", "sigma"), ("kl_reduction", "max"),
        ("mixed_precision", "fp8"), ("timestep_spacing", "even"), ("height", 0),
        ("seed", -1), ("seed", 2**64), ("kl_weight", math.inf), ("guidance_scale", math.nan),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_named(make_config, name, value):
    with pytest.raises(InputError, match=name):
        make_config(**{name: value})
