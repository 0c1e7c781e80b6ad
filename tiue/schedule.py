"""The K steps of a deterministic diffusers scheduler as one linear map of latents and outputs."""

import copy
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np
import torch

from tiue.errors import InputError, SchedulerError
from tiue_kernels import functional

_CURE = "use for instance DDIMScheduler.from_config(scheduler.config, clip_sample=False)"


@dataclass(frozen=True)
class OnePassSchedule:
    """x = S z + sum_k E_k eps_k (TiUE, arXiv 2505.21960): K scheduler steps taken at once.

    The steps are one linear map because no model output depends on another.

    Attributes:
        timesteps: [K], the decoder's timesteps, as the scheduler gives them.
        latent_coefficient: S.
        noise_coefficients: [K] float64, E_k.
        encoder_timestep: scalar tensor, the scheduler's first timestep; the encoder runs at it.
        prediction_type: what the model outputs mean: "epsilon", "v_prediction", "sample" or
            "flow_prediction" (the velocity, noise - data).
        init_noise_sigma: standard deviation of the initial latents.
        model_input_scale: what the model's input is multiplied by at the first timestep.
    """

    timesteps: torch.Tensor
    latent_coefficient: float
    noise_coefficients: torch.Tensor
    encoder_timestep: torch.Tensor
    prediction_type: str
    init_noise_sigma: float
    model_input_scale: float
    # Of `on`: the last device's copy, by device and by how often the tensors were written to.
    _copies: dict[tuple[Any, ...], "OnePassSchedule"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_decoder_steps: int = 4,
        strength: float = 1.0,
        mu: float | None = None,
    ) -> "OnePassSchedule":
        """Take S and E from a scheduler by stepping a copy of it on scalars, in float64.

        Args:
            scheduler: any deterministic diffusers scheduler whose step is linear in the sample
                and the model outputs (DDIM, Euler, DPM-Solver++, ...); it is not changed.
            num_decoder_steps: K.
            strength: part of the training noise levels, from the lowest up, that the timesteps are
                spread over, as `begun_at`; 1 for all, which begin at pure noise.
            mu: shift of the noise levels by the picture's size, for a flow-matching scheduler with
                use_dynamic_shifting, as its `set_timesteps` takes it.

        Returns:
            The schedule.

        Raises:
            InputError: K < 1, or more steps than the scheduler was made for; no strength in 0..1.
            SchedulerError: the scheduler draws noise, clips, thresholds, wants more than one
                model output a step, or is not linear for another reason.

        Examples:
            >>> from diffusers import DDIMScheduler
            >>> betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
            >>> published = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
            >>> scheduler = DDIMScheduler(**betas, **published)
            >>> schedule = OnePassSchedule.from_scheduler(scheduler, num_decoder_steps=4)
            >>> schedule.timesteps.tolist(), round(schedule.latent_coefficient, 3)
            ([751, 501, 251, 1], 4.235)
        """
        config = scheduler.config
        limit = config.get("num_train_timesteps")
        whole = isinstance(num_decoder_steps, int) and not isinstance(num_decoder_steps, bool)
        if not whole or num_decoder_steps < 1:
            raise InputError(
                f"num_decoder_steps must be a whole number of at least 1, got {num_decoder_steps!r}"
            )
        if limit is not None and num_decoder_steps > limit:
            raise InputError(
                f"num_decoder_steps = {num_decoder_steps} is more than the {limit} timesteps "
                f"that {type(scheduler).__name__} was made for"
            )
        for setting in ("clip_sample", "thresholding"):
            if config.get(setting):
                raise SchedulerError(
                    f"{type(scheduler).__name__} has {setting}=True, which is not linear: build "
                    f"it with {setting}=False"
                )
        dynamic = bool(config.get("use_dynamic_shifting"))
        if dynamic != (mu is not None):
            raise SchedulerError(
                f"{type(scheduler).__name__} has use_dynamic_shifting={dynamic}: "
                + ("give mu, the shift for the picture's size" if dynamic else "leave mu out")
            )
        scheduler = begun_at(scheduler, strength, num_decoder_steps)
        try:
            # Tensors of inference_mode could not be trained with, and count no versions.
            with torch.inference_mode(False), torch.no_grad():
                return cls._probe(scheduler, num_decoder_steps, {} if mu is None else {"mu": mu})
        except (InputError, SchedulerError):
            raise
        except Exception as error:
            raise SchedulerError(
                f"{type(scheduler).__name__} cannot be stepped on scalars "
                f"({type(error).__name__}: {error}); {_CURE}"
            ) from error

    @classmethod
    def _probe(
        cls, scheduler: Any, num_decoder_steps: int, options: dict[str, float]
    ) -> "OnePassSchedule":
        name = type(scheduler).__name__
        stepped = copy.deepcopy(scheduler)
        stepped.set_timesteps(num_decoder_steps, **options)
        timesteps = stepped.timesteps.clone()
        if len(timesteps) != num_decoder_steps:
            raise SchedulerError(
                f"{name} wants {len(timesteps)} model outputs for {num_decoder_steps} steps;"
                f" {_CURE}"
            )
        # Flow-matching schedulers begin at noise of deviation 1 and scale no input: they have
        # neither name.
        init_noise_sigma = float(getattr(stepped, "init_noise_sigma", 1.0))
        model_input_scale = 1.0
        if hasattr(stepped, "scale_model_input"):
            one = torch.ones((), dtype=torch.float64)
            model_input_scale = copy.deepcopy(stepped).scale_model_input(one, timesteps[0]).item()

        # The unit vectors give the coefficients; a map that clips, saturates or adds a constant
        # fails on zero or on large values.
        size = num_decoder_steps + 1
        generator = torch.Generator().manual_seed(0)
        trials = torch.randn(3, size, dtype=torch.float64, generator=generator)
        trials *= torch.tensor([[0.0], [1.0], [1e3]], dtype=torch.float64)
        results, drew_noise = _run(stepped, torch.cat([torch.eye(size).to(trials), trials]))
        if drew_noise:
            of_its_own = scheduler.config.get("stochastic_sampling")  # of flow matching
            cure = "build it with stochastic_sampling=False" if of_its_own else _CURE
            raise SchedulerError(f"{name} draws noise at its steps; {cure}")
        coefficients = results[:size]
        if not coefficients.isfinite().all() and _has_zero_snr(stepped):
            raise SchedulerError(
                f"{name} begins at a timestep of no signal at all (rescale_betas_zero_snr), where"
                f" prediction_type={stepped.config.get('prediction_type')!r} tells nothing of the"
                " picture: use prediction_type='v_prediction' if the model was trained so, else"
                " rescale_betas_zero_snr=False"
            )
        error = (results[size:] - trials @ coefficients).abs()
        # 1e-5: several schedulers step in float32 whatever they are given.
        if not (error <= 1e-5 * (trials.abs() @ coefficients.abs())).all():
            raise SchedulerError(
                f"the steps of {name} are not a linear map of latents and model outputs; {_CURE}"
            )

        return cls(
            timesteps=timesteps,
            latent_coefficient=coefficients[0].item(),
            # Copies: torch.compile would look at the sizes of what they are views of.
            noise_coefficients=coefficients[1:].clone(),
            encoder_timestep=timesteps[0].clone(),
            prediction_type=scheduler.config.get(
                "prediction_type", "flow_prediction" if is_flow_matching(scheduler) else "epsilon"
            ),
            init_noise_sigma=init_noise_sigma,
            model_input_scale=model_input_scale,
        )

    @property
    def num_decoder_steps(self) -> int:
        """K."""
        return len(self.timesteps)

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that a pass takes from the schedule, as numbers: equal keys, equal passes."""
        return (
            tuple(self.timesteps.tolist()),
            self.encoder_timestep.item(),
            self.latent_coefficient,
            tuple(self.noise_coefficients.tolist()),
            self.init_noise_sigma,
            self.model_input_scale,
        )

    def on(self, device: torch.device) -> "OnePassSchedule":
        """The schedule with its tensors on a device, copied at the first call only.

        A copy to a GPU waits for everything that the GPU was given before.

        Args:
            device: that of the latents.

        Returns:
            The schedule; itself where its tensors are there already.
        """
        if self.timesteps.device == device:
            return self
        # A version counts what was written to a tensor in place: no copy outlives its original.
        tensors = (self.timesteps, self.noise_coefficients, self.encoder_timestep)
        if any(tensor.is_inference() for tensor in tensors):  # these count no versions
            return self.copied(device)
        key = (device, *(tensor._version for tensor in tensors))
        found = self._copies.get(key)
        if found is None:
            with torch.inference_mode(False):  # what is kept may be trained with
                found = self.copied(device)
            self._copies.clear()
            self._copies[key] = found
        return found

    def copied(self, device: torch.device) -> "OnePassSchedule":
        """The schedule with tensors of its own on a device."""
        return replace(
            self,
            timesteps=self.timesteps.to(device, copy=True),
            noise_coefficients=self.noise_coefficients.to(device, copy=True),
            encoder_timestep=self.encoder_timestep.to(device, copy=True),
        )

    def scale_model_input(self, latents: torch.Tensor) -> torch.Tensor:
        """The model's input at the first timestep (Euler divides by sqrt(sigma^2 + 1)).

        Args:
            latents: [B, C, H, W].

        Returns:
            [B, C, H, W].
        """
        if self.model_input_scale == 1.0:
            return latents
        return latents * self.model_input_scale

    def combine(self, latents: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """S z + sum_k E_k eps_k, differentiable.

        Args:
            latents: [B, C, H, W], z, not scaled by `scale_model_input`.
            noise_pred: [K, B, C, H, W], from `TiUEUNet.predict_noise`.

        Returns:
            [B, C, H, W].

        Raises:
            ValueError: the shapes do not fit together.
        """
        return functional.one_pass_combine(
            latents, noise_pred, self.latent_coefficient, self.noise_coefficients
        )

    def add(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """S z + noise, for a sum over k that is taken already.

        Args:
            latents: [B, C, H, W], z, not scaled.
            noise: [B, C, H, W], sum_k E_k eps_k.

        Returns:
            [B, C, H, W] in the dtype of latents.
        """
        return (self.latent_coefficient * latents + noise).to(latents.dtype)

    def skip_below(self, bound: float) -> "OnePassSchedule":
        """Drop the decoder rows whose |E_k| is under a bound: lossy, cheaper.

        With K = 4 and the usual Stable Diffusion schedule, t = 1 has weight 0.0121. The encoder
        keeps its timestep.

        Args:
            bound: the least |E_k| that is kept.

        Returns:
            The shorter schedule.

        Raises:
            InputError: no row would be left, or the bound is no number.
        """
        if not isinstance(bound, Real):
            raise InputError(f"skip_below must be a number, got {bound!r}")
        kept = self.noise_coefficients.abs() >= bound
        if not kept.any():
            raise InputError(
                f"skip_below = {bound} drops every decoder row; the largest |E_k| is "
                f"{self.noise_coefficients.abs().max():.4g}"
            )
        return replace(
            self, timesteps=self.timesteps[kept], noise_coefficients=self.noise_coefficients[kept]
        )


def begun_at(scheduler: Any, strength: float, num_decoder_steps: int = 1) -> Any:
    """A copy of a scheduler that knows the lowest noise levels alone, to begin at a noised picture.

    Its K timesteps are spread over those as the scheduler spreads them over all: with K = 4 and the
    usual Stable Diffusion schedule [751, 501, 251, 1] at strength 1, [376, 251, 126, 1] at 0.5.

    Args:
        scheduler: any diffusers scheduler; it is not changed.
        strength: part of the training timesteps to keep, from the lowest up, over 0 to 1.
        num_decoder_steps: K, for which enough of them must be left.

    Returns:
        The copy, no timesteps set.

    Raises:
        InputError: a strength out of its range, or too low for K timesteps.
        SchedulerError: the scheduler has no tables of noise levels to shorten.
    """
    if (
        isinstance(strength, bool)
        or not isinstance(strength, (int, float))
        or not 0 < strength <= 1
    ):
        raise InputError(f"strength must be over 0 and at most 1, got {strength!r}")
    begun = copy.deepcopy(scheduler)
    if strength == 1:
        return begun
    levels = scheduler.config.num_train_timesteps
    kept = round(levels * strength)
    if kept < 2 * num_decoder_steps:
        raise InputError(
            f"strength = {strength} leaves {kept} of {levels} noise levels, too few for"
            f" num_decoder_steps = {num_decoder_steps}: raise it, or give fewer steps"
        )
    tables = {
        name: value[:kept]
        for name, value in vars(begun).items()
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.shape == (levels,)
    }
    if "alphas_cumprod" not in tables:
        raise SchedulerError(f"{type(scheduler).__name__} has no noise levels to begin at; {_CURE}")
    vars(begun).update(tables)
    begun.register_to_config(num_train_timesteps=kept)
    return begun


def settings_of(scheduler: Any) -> tuple[Any, ...]:
    """All that a scheduler's steps depend on, to compare: equal settings, equal schedules.

    What was written to it in place is seen, a table of noise levels as well as its configuration.
    """
    values: list[tuple[Any, ...]] = []
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray):
            values.append((name, value.dtype.str, value.shape, value.tobytes()))
        else:
            values.append((name, repr(value)))
    return (type(scheduler), *values)


def is_flow_matching(scheduler: Any) -> bool:
    """Whether a scheduler mixes data and noise as flow matching does: (1 - sigma) x + sigma z.

    Lipman et al., "Flow Matching for Generative Modeling", 2023.
    """
    return hasattr(scheduler, "scale_noise")


def _has_zero_snr(scheduler: Any) -> bool:
    levels = getattr(scheduler, "alphas_cumprod", None)
    return levels is not None and not levels[int(scheduler.timesteps[0])]


def _run(scheduler: Any, probes: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Step over given model outputs, every probe a sample of one pixel.

    Args:
        scheduler: its timesteps are set; its state is used up.
        probes: [probes, 1 + K] float64, the latent and the K model outputs of each.

    Returns:
        [probes] float64, and whether the scheduler drew random numbers.
    """
    sample, *outputs = probes.T[:, :, None, None, None].unbind()  # (probes, 1, 1, 1) each
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, timestep)  # Euler complains if it is not asked
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        drew_noise = not torch.equal(state, torch.get_rng_state())
    return sample.flatten().double(), drew_noise
