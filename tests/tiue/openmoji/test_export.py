"""From the work folder of the training commands to the loaders, at tiny size."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tests.tiue.openmoji.configs import AUTOENCODER, DECODER, TEACHER
from tiue.distill import load_config
from tiue.embedded.autoencoder import train_autoencoder, train_decoder
from tiue.embedded.export import export_weights, student_folder
from tiue.embedded.student import train_student
from tiue.errors import CheckpointError
from tiue.openmoji import load_openmoji, load_openmoji_teacher
from tiue.openmoji.data import write_prompts
from tiue.openmoji.teacher import TeacherTraining, train_teacher


@pytest.fixture
def work(pictures, tmp_path):
    """A work folder after every stage; the student is a UNet with weights of its own."""
    folder = tmp_path / "work"
    train_autoencoder(pictures, folder / "autoencoder", replace(AUTOENCODER, steps=1))
    train_decoder(pictures, folder / "autoencoder", folder / "decoder", replace(DECODER, steps=1))
    teacher = replace(TEACHER, steps=1)
    train_teacher(pictures, folder / "autoencoder", folder / "teacher", teacher)
    torch.manual_seed(1)
    TeacherTraining.build_unet(TEACHER).save_pretrained(student_folder(folder, 4) / "unet")
    TeacherTraining.build_scheduler().save_pretrained(student_folder(folder, 4) / "scheduler")
    return folder


def test_exported_folders_hold_float16_and_load_in_float32(work, tmp_path):
    weights = tmp_path / "weights"
    export_weights(work, weights)
    files = sorted(str(f.relative_to(weights)) for f in weights.rglob("*.safetensors"))
    assert files == [
        "student/unet/diffusion_pytorch_model.safetensors",
        "teacher/text_encoder/model.safetensors",
        "teacher/unet/diffusion_pytorch_model.safetensors",
        "teacher/vae/diffusion_pytorch_model.safetensors",
    ]
    for file in files:
        assert {t.dtype for t in load_file(weights / file).values()} <= {torch.float16}
    assert not list(weights.glob(".*"))

    teacher = load_openmoji_teacher(weights=weights)
    assert teacher.unet.dtype == teacher.vae.dtype == teacher.text_encoder.dtype == torch.float32
    trained = UNet2DConditionModel.from_pretrained(work / "teacher" / "pipeline" / "unet")
    for name, value in teacher.unet.state_dict().items():
        torch.testing.assert_close(value, trained.state_dict()[name].half().float(), msg=name)


def test_no_configuration_names_the_folder_it_was_trained_in(work, tmp_path):
    weights = tmp_path / "weights"
    export_weights(work, weights)
    configurations = list(weights.rglob("*.json"))
    assert configurations
    for path in configurations:
        assert "_name_or_path" not in path.read_text(encoding="utf-8")
        assert str(work) not in path.read_text(encoding="utf-8")


def test_the_exported_decoder_is_the_further_trained_one(work, tmp_path):
    export_weights(work, tmp_path)
    exported = load_file(tmp_path / "teacher/vae/diffusion_pytorch_model.safetensors")
    trained = load_file(work / "decoder/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], trained[name].half()) for name in trained)


def test_student_and_teacher_draw_from_the_exported_folders(work, tmp_path):
    export_weights(work, tmp_path)
    student, teacher = load_openmoji(weights=tmp_path), load_openmoji_teacher(weights=tmp_path)
    student.set_progress_bar_config(disable=True)
    teacher.set_progress_bar_config(disable=True)
    arguments = {"prompt": ["red apple", "rocket"], "output_type": "np"}
    drawn = student(**arguments, generator=torch.Generator().manual_seed(0)).images
    again = student(**arguments, generator=torch.Generator().manual_seed(0)).images
    other = teacher(
        **arguments, generator=torch.Generator().manual_seed(0), num_inference_steps=2
    ).images
    assert drawn.shape == other.shape == (2, 64, 64, 3)
    assert (drawn == again).all()
    assert not (drawn == other).all()


def test_missing_weights_name_the_command(tmp_path):
    with pytest.raises(CheckpointError, match=r"tiue\.openmoji\.train"):
        load_openmoji(weights=tmp_path)


def test_a_student_alone_is_exported_and_the_teacher_stays(tmp_path):
    work, weights = tmp_path / "work", tmp_path / "weights"
    TeacherTraining.build_unet(TEACHER).save_pretrained(student_folder(work, 4) / "unet")
    TeacherTraining.build_scheduler().save_pretrained(student_folder(work, 4) / "scheduler")
    (weights / "teacher").mkdir(parents=True)
    (weights / "teacher" / "stays").touch()
    export_weights(work, weights)
    assert (weights / "student/unet/diffusion_pytorch_model.safetensors").exists()
    assert [path.name for path in (weights / "teacher").iterdir()] == ["stays"]


def test_a_student_is_distilled_from_the_shipped_teacher_where_there_is_no_other(
    pictures, tmp_path
):
    write_prompts(pictures, tmp_path / "prompts.txt")
    folder = train_student("openmoji", tmp_path, 1, steps=1, batch_size=1, trackers=())
    assert load_config(folder / "config.yaml").teacher == "openmoji"
    assert (folder / "unet").is_dir()


def test_an_export_without_teacher_and_student_writes_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="train teacher"):
        export_weights(tmp_path / "work", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
