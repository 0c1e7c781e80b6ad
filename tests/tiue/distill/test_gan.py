"""The GAN loss against the same written by hand, its pictures, and what it leaves on disk."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from tests.tiue.tiny import tiny_vae
from tiue.distill import losses
from tiue.distill.adversary import CriticHead
from tiue.distill.data import SampleDraws
from tiue.distill.output import list_checkpoints
from tiue.distill.pictures import load_pictures
from tiue.distill.teacher import drop_prompts
from tiue.distill.trainer import Trainer
from tiue.errors import CheckpointError, InputError

CPU, SHAPE, SIZE = torch.device("cpu"), (4, 8, 8), (32, 32)
SETTINGS = {"steps": 1, "batch_size": 2, "max_grad_norm": 1e6, "lora_updates": 2, "seed": 3,
            "learning_rate": 1e-5, "prompt_drop": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def latents_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    real = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(7)) + 1
    save_file({"latents": real.half()}, path)
    return path


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    """Three pictures, one of them transparent and one wide, in folders."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    (folder / "about.txt").write_text("no picture")
    numbers = np.random.default_rng(0)
    for name, size in (("a.png", (32, 32, 3)), ("more/b.png", (40, 80, 3))):
        Image.fromarray(numbers.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(folder / "c.png")
    return folder


def told(trained):
    gradients = []
    trained.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in trained.parameters])
    )
    return gradients


def started(make_config, **settings):
    """A run whose LoRA is not zero, as PEFT starts it."""
    trainer = Trainer(make_config(**SETTINGS | settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.teacher.unet.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return trainer


def test_losses_are_those_of_a_classifier():
    made, real = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    ones, zeros = torch.ones_like(made), torch.zeros_like(made)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(losses.critic_loss(made, real), bce(made, zeros) + bce(real, ones))
    torch.testing.assert_close(losses.gan_loss(made), bce(made, ones))
    latents = torch.zeros(2, 3, requires_grad=True)
    value = losses.with_gradient(latents, torch.tensor([[6.0, 0, 12], [0, 0, -6]]))
    value.backward()
    assert value == 0
    assert latents.grad.tolist() == [[1, 0, 2], [0, 0, -1]]


def logits_by_hand(unet, weights, noisy, timesteps, text):
    """The head on what leaves the mid block of the whole UNet, with its LoRA on."""
    kept = []
    hook = unet.mid_block.register_forward_hook(lambda *arguments: kept.append(arguments[2]))
    functional_call(unet, weights, (noisy, timesteps, text))
    hook.remove()
    head = {n.removeprefix("critic."): w for n, w in weights.items() if n.startswith("critic.")}
    return functional_call(unet.critic, head, (kept[0],))


def test_gradients_of_student_lora_and_critic_equal_those_by_hand(make_config, latents_file):
    gan = {"gan_weight": 0.7, "gan_critic_weight": 0.3, "gan_pictures": latents_file}
    plain, trainer = started(make_config), started(make_config, **gan)
    unet, schedule = trainer.teacher.unet, trainer.teacher.noise_schedule
    names = [n for n, p in unet.named_parameters() if p.requires_grad]
    weights = {n: p.detach().clone().requires_grad_() for n, p in unet.named_parameters()
               if p.requires_grad}  # fmt: skip
    student_was = [p.detach().clone() for p in trainer.student.parameters]
    own, others = told(trainer.student), told(plain.student)
    lora_own = told(trainer.lora)
    text = trainer.text[trainer.order[range(2)]]
    trainer.train()
    plain.train()

    draws = SampleDraws(SETTINGS["seed"], range(2), CPU)
    z = draws.normal(SHAPE)
    draws.integers(20, 980), draws.normal(SHAPE)  # the score's
    timesteps, noise = draws.integers(0, 999), draws.normal(SHAPE)
    with torch.no_grad():
        for parameter, was in zip(trainer.student.parameters, student_was, strict=True):
            parameter.copy_(was)
    x = trainer.schedule.combine(z, trainer.student.network(z, text))
    empty = trainer.text.empty.tokens.expand(4, -1, -1)
    unet.enable_adapters()
    fixed = {name: weight.detach() for name, weight in weights.items()}
    logits = logits_by_hand(
        unet, fixed, schedule.add_noise(x, noise, timesteps), timesteps, empty[:2]
    )
    loss = 0.7 * F.softplus(-logits).mean()
    expected = torch.autograd.grad(loss, trainer.student.parameters)
    assert_near([a - b for a, b in zip(own[0], others[0], strict=True)], expected)

    # The first of the LoRA's updates; the second has other weights already.
    timesteps, noise = draws.integers(0, 999), draws.normal(SHAPE)
    prompts = drop_prompts(text, trainer.text.empty, draws.chances(0.5)).tokens
    noisy = schedule.add_noise(x.detach(), noise, timesteps)
    (predicted,) = functional_call(
        unet, weights, (noisy, timesteps, prompts), {"return_dict": False}
    )
    alpha = schedule.at(timesteps)[0]
    loss = (alpha * (predicted - noise).square()).mean()
    real = load_file(latents_file)["latents"].float()[draws.integers(0, 4)]
    noisy, every = [], []
    for latents in (x.detach(), real):
        every.append(draws.integers(0, 999))
        noisy.append(schedule.add_noise(latents, draws.normal(SHAPE), every[-1]))
    logits = logits_by_hand(unet, weights, torch.cat(noisy), torch.cat(every), empty)
    critic = 0.3 * (F.softplus(logits[:2]).mean() + F.softplus(-logits[2:]).mean())
    parameters = [weights[name] for name in names]
    expected = torch.autograd.grad(loss + critic, parameters, retain_graph=True)
    assert_near(lora_own[0], expected)
    # It trains head and LoRA alike, as far as the features go.
    reached = torch.autograd.grad(critic, parameters, allow_unused=True)
    reached = {n.partition(".")[0] for n, g in zip(names, reached, strict=True) if g is not None}
    assert reached == {"down_blocks", "mid_block", "critic"}
    assert len(lora_own) == 2


def assert_near(actual, expected):
    largest = max(g.abs().max() for g in expected)
    assert largest > 0
    for own, other in zip(actual, expected, strict=True):
        assert (own - other).abs().max() < 1e-4 * largest


def test_a_critic_learns_and_its_gradient_leads_to_the_real(make_config, latents_file):
    trainer = started(make_config, gan_weight=0.1, gan_pictures=latents_file)
    adversary, parameters = trainer.train_step.adversary, trainer.lora.parameters
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    images = torch.randn(8, 4, 1, 1, generator=torch.Generator().manual_seed(0)).expand(8, *SHAPE)

    def critic_loss():
        return adversary.critic_loss(images, SampleDraws(0, range(8), CPU))

    before = critic_loss()
    for _ in range(20):
        optimizer.zero_grad()
        critic_loss().backward()
        optimizer.step()
    assert critic_loss() < before - 0.05

    def score(latents):
        return adversary.score(latents, SampleDraws(1, range(8), CPU))

    loss, gradient = score(images)
    assert score(images - 0.1 * gradient)[0] < loss < score(images + 0.1 * gradient)[0]


def test_a_run_with_a_critic_resumes_bit_for_bit(make_config, latents_file, tmp_path):
    gan = {"gan_weight": 0.1, "gan_pictures": latents_file}
    whole = Trainer(make_config(steps=4, **gan))
    whole.train()
    output = Trainer(make_config(steps=2, **gan)).train()
    # The same pictures elsewhere are the same pictures.
    moved = tmp_path / "moved.safetensors"
    shutil.copy(latents_file, moved)
    resumed = Trainer(make_config(steps=4, output=output, resume=True, gan_weight=0.1,
                                  gan_pictures=moved))  # fmt: skip
    resumed.train()
    for name in ("student", "lora"):
        parameters = [getattr(trainer, name).parameters for trainer in (whole, resumed)]
        assert all(torch.equal(*pair) for pair in zip(*parameters, strict=True))
    newest = list_checkpoints(output / "checkpoints")[-1]
    saved = load_file(newest / "critic.safetensors")
    assert all(torch.equal(saved[n], w) for n, w in whole.teacher.unet.critic.state_dict().items())
    lora = load_file(newest / "lora" / "adapter_model.safetensors")
    assert not any("critic" in name for name in lora)
    save_file({"latents": torch.ones(5, *SHAPE)}, moved)
    with pytest.raises(CheckpointError, match=r"pictures are not those.*--allow-change gan_pic"):
        Trainer(make_config(steps=5, output=output, resume=True, gan_weight=0.1,
                            gan_pictures=moved))  # fmt: skip


def test_pictures_become_latents_as_the_pipeline_scales_them(picture_folder):
    vae = tiny_vae()
    pictures = load_pictures(picture_folder, SHAPE, SIZE, lambda: vae, CPU)
    assert len(pictures) == 3
    # By name: a, the transparent one, which lies on white, and b.
    pixels = np.asarray(Image.open(picture_folder / "a.png"))
    with torch.no_grad():
        for row, array in ((0, pixels), (1, np.full((32, 32, 3), 255, dtype=np.uint8))):
            tensor = torch.from_numpy(array.transpose(2, 0, 1).copy()).float()[None] / 127.5 - 1
            expected = vae.encode(tensor).latent_dist.mean * vae.config.scaling_factor
            actual = pictures[torch.tensor([row])]
            torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)  # float16
    again = load_pictures(picture_folder, SHAPE, SIZE, lambda: vae, CPU)
    assert again.digest == pictures.digest
    assert load_pictures(picture_folder, (4, 4, 8), (16, 32), lambda: vae, CPU)[
        torch.tensor([2])
    ].shape == (1, 4, 4, 8)


def test_a_folder_of_pictures_is_trained_against(make_config, picture_folder):
    said = []
    config = make_config(gan_weight=0.1, gan_pictures=picture_folder, steps=1)
    output = Trainer(config, report=said.append).train()
    assert any("GAN: 3 real pictures" in line for line in said)
    assert json.loads((output / "log.jsonl").read_text())["critic"] > 0


def test_what_cannot_be_used_as_pictures_is_named(make_config, tmp_path):
    with pytest.raises(InputError, match="gan_weight needs gan_pictures"):
        make_config(gan_weight=0.1)
    wrong = tmp_path / "wrong.safetensors"
    cases = [
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "nowhere.safetensors", "Cannot read the latents"),
        (tmp_path / "empty", "holds no picture"),
        (tmp_path / "broken", r"bad\.png' of gan_pictures is no whole picture"),
        (wrong, "no tensor 'latents'.*it has: other"),
    ]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    save_file({"other": torch.zeros(1)}, wrong)
    for source, said in cases:
        with pytest.raises(InputError, match=said):
            load_pictures(source, SHAPE, SIZE, tiny_vae, CPU)
    for latents, said in (
        (torch.zeros(0, *SHAPE), r"are \(0, 4, 8, 8\); this run's are \[N, 4, 8, 8\]"),
        (torch.zeros(2, 4, 4, 4), r"are \(2, 4, 4, 4\)"),
        (torch.full((1, *SHAPE), torch.nan), "finite floating-point"),
        (torch.zeros(1, *SHAPE, dtype=torch.int8), "finite floating-point"),
    ):
        save_file({"latents": latents}, wrong)
        with pytest.raises(InputError, match=said):
            load_pictures(wrong, SHAPE, SIZE, tiny_vae, CPU)
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "one.png")
    with pytest.raises(InputError, match="no VAE to encode them"):
        load_pictures(tmp_path / "empty", SHAPE, SIZE, lambda: None, CPU)


def test_a_head_takes_maps_of_any_size():
    head = CriticHead(12)
    assert head(torch.randn(2, 12, 1, 3)).shape == (2, 1, 1, 3)
