"""The student against diffusers' own forward, and its batch of timesteps against the loop."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel

from testing.tolerances import EXACT_RELATIVE, relative_error
from tests.tiue.unets import BATCH, CONFIGS, TOKENS, make_conditioning, make_inputs, make_unet
from tiue import OnePassSchedule, TiUEUNet
from tiue.errors import ArchitectureError, CheckpointError, InputError

TIMESTEPS = (751, 501, 251)
SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip


def check_one_pass(
    unet: UNet2DConditionModel,
    conditioning: dict[str, Any],
    size: tuple[int, int] = (8, 8),
    batch: int = BATCH,
) -> None:
    """One timestep is the parent's forward, K are a loop of one, combining early is exact."""
    student = TiUEUNet.from_unet(unet)
    inputs = make_inputs(size, batch)
    latents, text = inputs["latents"], inputs["prompt_embeds"]
    forward = unet(latents, TIMESTEPS[0], text, **copied(conditioning)).sample
    single = student.predict_noise(latents, TIMESTEPS[:1], text, **conditioning)
    assert single.shape == (1, *latents.shape)
    assert relative_error(single[0], forward) <= EXACT_RELATIVE

    features = student.encode(latents, TIMESTEPS[0], text, **conditioning)
    looped = torch.cat([student.decode(features, [t]) for t in TIMESTEPS])
    batched = student.predict_noise(latents, TIMESTEPS, text, **conditioning)
    assert relative_error(batched, looped) <= EXACT_RELATIVE
    assert relative_error(batched[0], batched[1]) > 1e-3  # the timestep does reach the output

    schedule = OnePassSchedule.from_scheduler(SCHEDULER, 4)
    noise_pred = student.predict_noise(latents, schedule.timesteps, text, **conditioning)
    combined = schedule.combine(latents, noise_pred)
    one_pass = student.one_pass(latents, schedule, text, **conditioning)
    assert relative_error(one_pass, combined) <= EXACT_RELATIVE
    assert not one_pass.requires_grad


def copied(conditioning: dict[str, Any]) -> dict[str, Any]:
    """diffusers pops adapter residuals off the list that it is given."""
    return {k: list(v) if isinstance(v, list) else v for k, v in conditioning.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name: str) -> None:
    with torch.no_grad():
        check_one_pass(make_unet(name), make_conditioning(name))


@pytest.mark.parametrize("size", [(7, 5), (9, 16), (1, 1)], ids=str)
def test_odd_latent_sizes(size: tuple[int, int]) -> None:
    with torch.no_grad():
        check_one_pass(make_unet("sd1"), {}, size)


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch(batch: int) -> None:
    with torch.no_grad():
        check_one_pass(make_unet("sd2"), {}, batch=batch)


def residuals(unet: UNet2DConditionModel, generator: torch.Generator) -> list[torch.Tensor]:
    """One random tensor for each skip."""
    inputs = make_inputs()
    features = TiUEUNet.from_unet(unet).encode(inputs["latents"], 1, inputs["prompt_embeds"])
    return [
        torch.randn(skip.shape, dtype=skip.dtype, generator=generator) for skip in features.skips
    ]


@torch.no_grad()
def test_controlnet_residuals_enter_once_for_all_timesteps() -> None:
    unet = make_unet("sd1")
    generator = torch.Generator().manual_seed(3)
    mid = torch.randn(BATCH, 32, 4, 4, dtype=torch.float64, generator=generator)
    check_one_pass(
        unet,
        {
            "down_block_additional_residuals": tuple(residuals(unet, generator)),
            "mid_block_additional_residual": mid,
        },
    )


@pytest.mark.parametrize(
    "argument", ["down_intrablock_additional_residuals", "down_block_additional_residuals"]
)
@torch.no_grad()
def test_t2i_adapter_residuals(argument: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(BATCH, 16, 8, 8), (BATCH, 32, 4, 4), (BATCH, 32, 4, 4)]
    adapter = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    check_one_pass(make_unet("sd1"), {argument: adapter})
    assert len(adapter) == 3  # the caller's list is left alone


@torch.no_grad()
def test_encoder_attention_mask_hides_tokens() -> None:
    unet = make_unet("sd1")
    mask = torch.ones(BATCH, TOKENS)
    mask[0, 2:] = 0
    check_one_pass(unet, {"encoder_attention_mask": mask})
    student, inputs = TiUEUNet.from_unet(unet), make_inputs()
    before = student.predict_noise(*inputs_of(inputs), encoder_attention_mask=mask)
    inputs["prompt_embeds"][0, 2:] += 1
    after = student.predict_noise(*inputs_of(inputs), encoder_attention_mask=mask)
    assert torch.equal(before, after)


def inputs_of(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any, torch.Tensor]:
    return inputs["latents"], TIMESTEPS, inputs["prompt_embeds"]


@torch.no_grad()
def test_attention_mask_of_self_attention() -> None:
    # Every self-attention sees the same mask, so all maps must be of one size.
    unet = make_unet(
        "sd1",
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    mask = (torch.arange(64) % 3 > 0).double().expand(BATCH, -1)
    check_one_pass(unet, {"attention_mask": mask})


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_gradients_equal_those_of_the_loop(name: str) -> None:
    unet = make_unet(name)
    student, conditioning = TiUEUNet.from_unet(unet), make_conditioning(name)
    inputs = {k: v.requires_grad_() for k, v in make_inputs().items()}
    tensors = [*inputs.values(), *unet.parameters()]
    weights = torch.randn(3, BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(4))

    def gradients(noise_pred: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((noise_pred * weights).sum(), tensors)

    batched = gradients(student.predict_noise(*inputs_of(inputs), **conditioning))
    features = student.encode(
        inputs["latents"], TIMESTEPS[0], inputs["prompt_embeds"], **conditioning
    )
    looped = gradients(torch.cat([student.decode(features, [t]) for t in TIMESTEPS]))
    names = [*inputs, *(name for name, _ in unet.named_parameters())]
    errors = {
        n: relative_error(a, b) for n, a, b in zip(names, batched, looped, strict=True) if b.any()
    }
    assert len(errors) > 0.9 * len(names)
    assert max(errors.values()) <= 1e-10, max(errors.items(), key=lambda item: item[1])


def test_gradient_checkpointing_changes_nothing() -> None:
    unet = make_unet("sdxl").train()
    student, conditioning = TiUEUNet.from_unet(unet), make_conditioning("sdxl")
    results = []
    for checkpointing in (False, True):
        (unet.enable_gradient_checkpointing if checkpointing else lambda: None)()
        unet.zero_grad()
        student.predict_noise(*inputs_of(make_inputs()), **conditioning).square().sum().backward()
        results.append([p.grad.clone() for p in unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_in_training_differs_between_timesteps_of_one_value() -> None:
    student = TiUEUNet.from_unet(make_unet("sd1", dropout=0.5).train())
    inputs = make_inputs()
    first, second = student.predict_noise(inputs["latents"], [501, 501], inputs["prompt_embeds"])
    assert relative_error(first, second) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_is_as_near_as_diffusers_own(dtype: torch.dtype) -> None:
    unet = make_unet("sd1")
    inputs = make_inputs()
    exact = unet(inputs["latents"], 501, inputs["prompt_embeds"]).sample
    unet = unet.to(dtype)
    half = {k: v.to(dtype) for k, v in inputs.items()}
    theirs = unet(half["latents"], 501, half["prompt_embeds"]).sample
    ours = TiUEUNet.from_unet(unet).predict_noise(half["latents"], [501], half["prompt_embeds"])[0]
    assert ours.dtype == dtype
    floor = torch.finfo(dtype).eps
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + floor


@torch.no_grad()
def test_autocast() -> None:
    unet = make_unet("sd1").float()
    inputs = {k: v.float() for k, v in make_inputs().items()}
    student = TiUEUNet.from_unet(unet)
    exact = student.predict_noise(*inputs_of(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = student.predict_noise(*inputs_of(inputs))
        theirs = unet(inputs["latents"], TIMESTEPS[0], inputs["prompt_embeds"]).sample
    assert mixed.dtype == theirs.dtype
    assert relative_error(mixed[0], exact[0]) <= 2 * relative_error(theirs, exact[0]) + 2**-8


@torch.no_grad()
def test_channels_last() -> None:
    unet = make_unet("sd1")
    student, inputs = TiUEUNet.from_unet(unet), make_inputs()
    plain = student.predict_noise(*inputs_of(inputs))
    unet.to(memory_format=torch.channels_last)
    inputs["latents"] = inputs["latents"].contiguous(memory_format=torch.channels_last)
    assert relative_error(student.predict_noise(*inputs_of(inputs)), plain) <= EXACT_RELATIVE


@torch.no_grad()
def test_no_weight_is_cached() -> None:
    unet = make_unet("sd1")
    student, inputs = TiUEUNet.from_unet(unet), make_inputs()
    schedule = OnePassSchedule.from_scheduler(SCHEDULER, 4)
    student.one_pass(inputs["latents"], schedule, inputs["prompt_embeds"])
    for parameter in unet.parameters():
        parameter.mul_(1.01)
    fresh = TiUEUNet.from_unet(make_unet("sd1"))
    fresh.load_state_dict(unet.state_dict())
    arguments = (inputs["latents"], schedule, inputs["prompt_embeds"])
    assert torch.equal(student.one_pass(*arguments), fresh.one_pass(*arguments))


@torch.no_grad()
def test_euler_scales_the_input_of_the_model_only() -> None:
    schedule = OnePassSchedule.from_scheduler(
        EulerDiscreteScheduler.from_config(SCHEDULER.config), 4
    )
    student, inputs = TiUEUNet.from_unet(make_unet("sd1")), make_inputs()
    latents = inputs["latents"] * schedule.init_noise_sigma
    scaled = schedule.scale_model_input(latents)
    noise_pred = student.predict_noise(scaled, schedule.timesteps, inputs["prompt_embeds"])
    one_pass = student.one_pass(latents, schedule, inputs["prompt_embeds"])
    assert relative_error(one_pass, schedule.combine(latents, noise_pred)) <= EXACT_RELATIVE


@torch.no_grad()
def test_forward_and_saving_are_the_parents(tmp_path) -> None:
    unet = make_unet("sd1").float()
    student = TiUEUNet.from_unet(unet)
    inputs = {k: v.float() for k, v in make_inputs().items()}
    arguments = (inputs["latents"], 501, inputs["prompt_embeds"])
    assert torch.equal(student(*arguments).sample, unet(*arguments).sample)

    student.save_pretrained(tmp_path / "student")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "student")
    plain.save_pretrained(tmp_path / "plain")
    back = TiUEUNet.from_pretrained(tmp_path / "plain")
    for other in (plain, back):
        assert type(other) in (UNet2DConditionModel, TiUEUNet)
        state = other.state_dict()
        assert state.keys() == unet.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in unet.state_dict().items())
    assert '"UNet2DConditionModel"' in (tmp_path / "student" / "config.json").read_text()


def test_from_unet_shares_parameters_but_not_registries() -> None:
    unet = make_unet("sd1")
    student = TiUEUNet.from_unet(unet)
    mine, theirs = dict(student.named_parameters()), dict(unet.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    student.conv_out = torch.nn.Conv2d(16, 4, 1)
    assert unet.conv_out is not student.conv_out


class TestBadInput:
    def test_missing_folder(self, tmp_path) -> None:
        with pytest.raises(CheckpointError, match="no folder"):
            TiUEUNet.from_pretrained(tmp_path / "nothing")

    def test_pickle(self, tmp_path) -> None:
        make_unet("sd1").save_pretrained(tmp_path, safe_serialization=False)
        with pytest.raises(CheckpointError, match=r"only safetensors are loaded.*convert"):
            TiUEUNet.from_pretrained(tmp_path)

    def test_another_architecture(self, tmp_path) -> None:
        from diffusers import UNet2DModel

        UNet2DModel(8, 3, 3, block_out_channels=(32, 32), layers_per_block=1,
                    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                    ).save_pretrained(tmp_path)  # fmt: skip
        with pytest.raises(CheckpointError, match="holds a UNet2DModel"):
            TiUEUNet.from_pretrained(tmp_path)

    def test_damaged_weights(self, tmp_path) -> None:
        make_unet("sd1").save_pretrained(tmp_path)
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)
        with pytest.raises(CheckpointError, match="cannot load the unet"):
            TiUEUNet.from_pretrained(tmp_path)

    def test_subfolder_forgotten(self, tmp_path) -> None:
        make_unet("sd1").save_pretrained(tmp_path / "unet")
        with pytest.raises(CheckpointError, match="subfolder='unet'"):
            TiUEUNet.from_pretrained(tmp_path)

    def test_no_cross_attention(self) -> None:
        unet = make_unet(
            "sd1",
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            mid_block_type="UNetMidBlock2D",
        )
        with pytest.raises(ArchitectureError, match="no cross-attention"):
            TiUEUNet.from_unet(unet)

    def test_not_a_unet(self) -> None:
        with pytest.raises(ArchitectureError, match="not Linear"):
            TiUEUNet.from_unet(torch.nn.Linear(2, 2))

    @pytest.mark.parametrize(
        ("latents", "timesteps", "message"),
        [
            (torch.zeros(BATCH, 5, 8, 8), TIMESTEPS, r"\[B, 4, H, W\].*5"),
            (torch.zeros(4, 8, 8), TIMESTEPS, r"\[B, 4, H, W\]"),
            (torch.zeros(3, 4, 8, 8), TIMESTEPS, "one row for each"),
            (torch.zeros(BATCH, 4, 8, 8), (), "K of at least 1"),
            (torch.zeros(BATCH, 4, 8, 8), torch.tensor(5), "K of at least 1"),
        ],
    )
    def test_shapes(self, latents: torch.Tensor, timesteps: Any, message: str) -> None:
        student = TiUEUNet.from_unet(make_unet("sd1"))
        with pytest.raises(InputError, match=message):
            student.predict_noise(latents.double(), timesteps, make_inputs()["prompt_embeds"])


@torch.no_grad()
def test_weights_are_laid_out_for_a_device_that_wants_it(tmp_path, monkeypatch) -> None:
    """As on a GPU: where the student is made, and where it is brought to another dtype."""
    unet = make_unet("sd1")
    inputs = (make_inputs()["latents"], [751, 1], make_inputs()["prompt_embeds"])
    expected = TiUEUNet.from_unet(unet).predict_noise(*inputs)
    monkeypatch.setattr(TiUEUNet, "channels_last_on", ("cpu",))
    student = TiUEUNet.from_unet(unet)
    for laid in (student, TiUEUNet.from_unet(make_unet("sd1").float()).double()):
        convs = [module for module in laid.modules() if isinstance(module, torch.nn.Conv2d)]
        assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convs)
    assert student.conv_in.weight is unet.conv_in.weight
    features = student.encode(inputs[0], 751, inputs[2])
    assert all(s.is_contiguous(memory_format=torch.channels_last) for s in features.skips)
    assert relative_error(student.predict_noise(*inputs), expected) <= EXACT_RELATIVE
    student.save_pretrained(tmp_path)
    loaded = TiUEUNet.from_pretrained(tmp_path)
    assert torch.equal(loaded.conv_in.weight, student.conv_in.weight)


def test_an_attention_backend_changes_nothing_and_says_so(caplog) -> None:
    unet = TiUEUNet.from_unet(make_unet(next(iter(CONFIGS))))
    with caplog.at_level("WARNING", logger="tiue.unet"):
        unet.set_attention_backend("native")
    assert "changes nothing" in caplog.text
    with pytest.raises(ValueError, match="must be one of"):
        unet.set_attention_backend("none")
