"""The bugs that `benchmarks.mutants` plants: a text of a file, what stands in its place, and tests.

Each text stands exactly once in its file (tests/benchmarks/test_mutants.py looks), and the tests
are those that name the file, narrowed to what takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One planted bug.

    Attributes:
        file: Its place in the checkout.
        before: The text that is replaced.
        after: What it is replaced by.
        tests: Arguments of pytest.
        equal: Where no test can tell it from the original, why not.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    equal: str = ""


def _tests(path: str, words: str = "") -> tuple[str, ...]:
    return (f"tests/{path}", *(("-k", words) if words else ()))


SCHEDULE = _tests("tiue/test_schedule.py")
EDGES = _tests("tiue_kernels/test_edges.py", "not cuda")
ON_HOST = _tests("tiue_kernels/cuda/test_attention_on_host.py", "(text or 2x3) and f32")
NORM_ON_HOST = _tests("tiue_kernels/cuda/test_norm_on_host.py", "f32 and not order")
WEIGHTS = _tests("tiue/test_weights.py")
LOSSES = _tests("tiue/distill/test_losses.py")
TEACHER = _tests("tiue/distill/test_teacher.py")
STEP = _tests("tiue/distill/test_step.py", "by_hand")
GUARD = _tests("tiue/distill/test_interruptions.py", "guard or float16 or diverges")
RESUME = _tests("tiue/distill/test_trainer.py", "resumed_run_equals")
GAN = _tests("tiue/distill/test_gan.py", "classifier or by_hand or resumes or scales")


def _unet(words: str) -> tuple[str, ...]:
    return _tests("tiue/test_unet.py", words)


def _norms(words: str) -> tuple[str, ...]:
    return _tests("tiue_kernels/triton/test_launchers_norm.py", words)


def _attention(words: str) -> tuple[str, ...]:
    return _tests("tiue_kernels/triton/test_launchers_attention.py", words)


def _functional(words: str) -> tuple[str, ...]:
    return _tests("tiue_kernels/test_functional.py", words)


MUTATIONS = (
    # Schedule
    Mutation("tiue/schedule.py", "error <= 1e-5 *", "error <= 1e-1 *", SCHEDULE),
    Mutation("tiue/schedule.py", "if drew_noise:", "if drew_noise and False:", SCHEDULE),
    Mutation("tiue/schedule.py", ".abs() >= bound", ".abs() > bound", SCHEDULE),
    Mutation(
        "tiue/schedule.py", "return latents * self.model", "return latents / self.model", SCHEDULE
    ),
    Mutation(
        "tiue/schedule.py",
        "stepped = copy.deepcopy(scheduler)\n",
        "stepped = scheduler\n",
        SCHEDULE,
    ),
    Mutation(
        "tiue/schedule.py",
        "init_noise_sigma=init_noise_sigma,",
        "init_noise_sigma=1.0,",
        SCHEDULE,
    ),
    Mutation(
        "tiue/schedule.py",
        "self, timesteps=self.timesteps[kept],",
        "self, encoder_timestep=self.timesteps[kept][0], timesteps=self.timesteps[kept],",
        SCHEDULE,
    ),
    Mutation(
        "tiue/schedule.py", "or num_decoder_steps < 1:", "or num_decoder_steps < 0:", SCHEDULE
    ),
    # UNet, encoder, decoder
    Mutation("tiue/decoder.py", "attentions, reversed(skips)", "attentions, skips", _unet("sd1")),
    Mutation(
        "tiue/unet.py",
        "if skips and not exact else None",
        "if skips and exact else None",
        _unet("odd"),
    ),
    Mutation("tiue/unet.py", "skip + extra for", "skip for", _unet("controlnet")),
    Mutation("tiue/unet.py", "hidden = hidden + mid", "hidden = hidden", _unet("controlnet")),
    Mutation("tiue/features.py", "* -10000.0)", "* -1.0)", _unet("attention_mask")),
    Mutation(
        "tiue/unet.py",
        "timesteps.repeat_interleave(batch)",
        "timesteps.repeat(batch)",
        _unet("any_batch"),
    ),
    Mutation("tiue/encoder.py", "hidden = hidden + residual", "hidden = residual", _unet("t2i")),
    Mutation(
        "tiue/encoder.py",
        "            hidden = downsampler(hidden)\n        skips += (hidden,)\n",
        "            hidden = downsampler(hidden)\n        skips += (hidden * 1.01,)\n",
        _unet("any_batch"),
    ),
    Mutation(
        "tiue/unet_blocks.py",
        'kwargs["gligen"], self.timesteps)',
        'kwargs["gligen"], 1)',
        _tests("tiue/test_unet.py", "gligen"),
    ),
    # Pipeline and loading
    Mutation(
        "tiue/pipelines/program.py",
        "noise * schedule.init_noise_sigma",
        "noise",
        _tests("tiue/test_program.py"),
    ),
    Mutation("tiue/loading/weights.py", "    if missing:\n", "    if False:\n", WEIGHTS),
    Mutation("tiue/loading/weights.py", "    if shapes:\n", "    if False:\n", WEIGHTS),
    Mutation("tiue/loading/weights.py", "keys[:_SHOWN]", "keys[:_SHOWN - 1]", WEIGHTS),
    Mutation(
        "tiue/loading/weights.py",
        'if library not in ("diffusers", "transformers") and not',
        'if library in ("diffusers", "transformers") and False and not',
        WEIGHTS,
    ),
    Mutation(
        "tiue/loading/weights.py", "if names and not student and kind", "if not kind", WEIGHTS
    ),
    # Operators: what they mean
    Mutation(
        "tiue_kernels/reference/shared_skip_group_norm_silu.py",
        "hidden_groups = -(-hidden.shape[1] // group_size)",
        "hidden_groups = hidden.shape[1] // group_size",
        _norms("skip and f32 and reference"),
    ),
    Mutation(
        "tiue_kernels/reference/shared_skip_group_norm_silu.py",
        "= rows.sum(0) if batch else 0",
        "= rows[0] if batch else 0",
        _norms("skip and f32 and reference"),
    ),
    Mutation(
        "tiue_kernels/reference/broadcast_add_group_norm_silu.py",
        "(timesteps, len(shared))).sum(0)",
        "(timesteps, len(shared)))[0]",
        _norms("add and f32 and reference"),
    ),
    Mutation(
        "tiue_kernels/reference/broadcast_add_group_norm_silu.py",
        "grad = grad * (1 + scale)",
        "grad = grad * scale",
        _norms("scale and f32 and reference"),
    ),
    Mutation(
        "tiue_kernels/reference/group_norm.py",
        "x.shape[1] // values.shape[1], dim=1",
        "x.shape[1] // values.shape[1], dim=1).flip(1",
        _norms("sum and f32 and reference"),
    ),
    Mutation(
        "tiue_kernels/reference/timestep_sum_group_norm_silu.py",
        ".repeat_interleave(len(grad))",
        ".repeat(len(grad))",
        _norms("sum and f32 and reference"),
    ),
    Mutation(
        "tiue_kernels/reference/noise_kl.py",
        "dim=-1, correction=1",
        "dim=-1, correction=0",
        _functional("noise_kl"),
    ),
    Mutation("tiue_kernels/reference/noise_kl.py", "/ (count - 1)", "/ count", EDGES),
    Mutation("tiue_kernels/reference/noise_kl.py", ".clamp_min(LEAST_VARIANCE)", "", EDGES),
    Mutation(
        "tiue_kernels/reference/cross_timestep_attention.py",
        "logsumexp.masked_fill_(logsumexp == -torch.inf, 0.0)",
        "logsumexp",
        EDGES,
    ),
    Mutation(
        "tiue_kernels/reference/cross_timestep_attention.py",
        "unflatten(0, (copies, -1)).sum(0, dtype",
        "unflatten(0, (copies, -1)).mean(0, dtype",
        _attention("reference and repeated and f32"),
    ),
    Mutation(
        "tiue_kernels/ops/upsample_conv2d.py",
        "taps = (first + middle, last) if parity",
        "taps = (first + middle, last) if not parity",
        _attention("upsample and phases and f32"),
    ),
    Mutation(
        "tiue_kernels/ops/upsample_conv2d.py",
        "(y + 1 - i) // 2, (x",
        "(y + i) // 2, (x",
        _attention("upsample and phases and f32"),
    ),
    # Triton
    Mutation(
        "tiue_kernels/triton/noise_kl.py",
        "pivot = tl.load(x_ptr).to(tl.float32)",
        "pivot = 0.0",
        EDGES,
    ),
    Mutation(
        "tiue_kernels/triton/group_norm.py",
        "return mean + rest, squares - rest * rest * count",
        "return mean, squares",
        EDGES,
    ),
    Mutation(
        "tiue_kernels/triton/attention.py",
        'tl.where(m == float("-inf"), 0.0, m)',
        "m",
        EDGES,
    ),
    Mutation(
        "tiue_kernels/triton/attention.py",
        'mask=mask, other=float("-inf")',
        "mask=mask, other=0.0",
        _attention("triton and masked"),
    ),
    Mutation(
        "tiue_kernels/triton/attention_forward.py",
        "total = total * correction + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        _attention("triton and many-keys"),
    ),
    Mutation(
        "tiue_kernels/triton/attention_backward.py",
        "p * (grad_p - delta[None, :])",
        "p * grad_p",
        _attention("triton and 4x1-masked"),
    ),
    Mutation(
        "tiue_kernels/triton/geglu.py",
        "(below + gate * density)",
        "below",
        _norms("geglu and triton and f32"),
    ),
    Mutation(
        "tiue_kernels/triton/one_pass_combine.py",
        "latent_coefficient * grad, mask",
        "grad, mask",
        _norms("combine and triton and f32"),
    ),
    Mutation(
        "tiue_kernels/dispatch.py",
        "_forced.remove(entry)",
        "_forced.pop()",
        _tests("tiue_kernels/test_dispatch.py"),
    ),
    Mutation(
        "tiue_kernels/ops/cross_timestep_attention.py",
        "if size % 8 or size > 256:",
        "if size > 256:",
        _tests("tiue_kernels/test_dispatch.py"),
    ),
    # CUDA C++ on the host, and the CPU library
    Mutation(
        "csrc/cross_timestep_attention/fwd.cu",
        "if (row_max[half] == -INFINITY) {",
        "if (row_max[half] == INFINITY) {",
        _tests("tiue_kernels/test_edges.py", "cuda"),
    ),
    Mutation(
        "csrc/cross_timestep_attention/bwd.cu",
        "grad[i][n] = p[i][n] * (grad[i][n] - deltas[at]);",
        "grad[i][n] = p[i][n] * grad[i][n];",
        ON_HOST,
    ),
    Mutation(
        "csrc/shared_skip_group_norm_silu/fwd.cu",
        "values[i] = squares[i] + count * delta * delta;",
        "values[i] = squares[i];",
        NORM_ON_HOST,
    ),
    Mutation(
        "csrc/cpu/attention.cpp",
        "*sum *= scale;",
        "",
        _tests("tiue_kernels/cpu/test_cross_timestep_attention.py", "output"),
    ),
    # Distillation
    Mutation("tiue/distill/losses.py", "return sigma.square() if", "return sigma if", LOSSES),
    Mutation(
        "tiue/distill/losses.py",
        "teacher_noise.float() - lora_noise.float()",
        "lora_noise.float() - teacher_noise.float()",
        LOSSES,
    ),
    Mutation("tiue/distill/losses.py", "return (alpha * (noise", "return (1 * (noise", LOSSES),
    Mutation(
        "tiue/distill/losses.py", 'maps.sum() if reduction == "sum"', "maps.sum() if True", LOSSES
    ),
    Mutation("tiue/distill/losses.py", "F.relu(target -", "(target -", LOSSES),
    Mutation(
        "tiue/distill/teacher.py",
        "return alpha * output + sigma * noisy",
        "return alpha * output - sigma * noisy",
        TEACHER,
    ),
    Mutation(
        "tiue/distill/teacher.py",
        "output = empty_half + guidance_scale",
        "output = conditional + guidance_scale",
        TEACHER,
    ),
    Mutation(
        "tiue/distill/teacher.py",
        "(own.ndim - 1)), none, own)",
        "(own.ndim - 1)), own, none)",
        TEACHER,
    ),
    Mutation(
        "tiue/distill/step.py",
        "draws.normal(self.latent_shape) * self.schedule.init_noise_sigma",
        "draws.normal(self.latent_shape) * 2.0",
        STEP,
    ),
    Mutation(
        "tiue/distill/step.py", "fixed = images.detach()", "fixed = images.detach() * 2", STEP
    ),
    Mutation("tiue/distill/losses.py", "F.softplus(-real", "F.softplus(real", GAN),
    Mutation("tiue/distill/adversary.py", "(loss * images.numel(), images)", "(loss, images)", GAN),
    Mutation(
        "tiue/distill/adversary.py",
        "for latents in (images, real)]",
        "for latents in (real, images)]",
        GAN,
    ),
    Mutation(
        "tiue/distill/step.py",
        "handed = config.gan_weight * losses",
        "handed = losses",
        GAN,
    ),
    Mutation(
        "tiue/distill/checkpoint.py",
        "_read_critic(lora_unet, folder / _CRITIC_FILE)",
        "pass",
        GAN,
    ),
    Mutation(
        "tiue/distill/pictures.py",
        "(mean - shift) * vae.config.scaling_factor",
        "mean - shift",
        GAN,
    ),
    Mutation("tiue/distill/guards.py", ">= self.PATIENCE", "> self.PATIENCE", GUARD),
    Mutation(
        "tiue/distill/guards.py",
        "            return  # the mean does not follow",
        "            # the mean does not follow",
        GUARD,
    ),
    Mutation(
        "tiue/distill/trainer.py",
        "self.guard.load_state_dict(self.state.guard)",
        "pass",
        RESUME,
    ),
    Mutation(
        "tiue/distill/checkpoint.py",
        "self.state.changed = dict(changed)",
        "self.state.step = 0",
        _tests("tiue/distill/test_trainer.py", "allow"),
    ),
)
