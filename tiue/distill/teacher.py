"""The frozen teacher and the LoRA teacher: one network, with an adapter switched off and on."""

from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn

from tiue.distill.networks import UNET, call, family_of
from tiue.distill.text import Text
from tiue.errors import ArchitectureError, SchedulerError
from tiue.schedule import is_flow_matching


class NoiseSchedule:
    """The diffusion that the teacher was trained on: x_t = alpha_t x + sigma_t eps.

    Args:
        scheduler: Gives `alphas_cumprod` and `prediction_type`.

    Raises:
        SchedulerError: If the teacher predicts something other than noise, v or the sample.
    """

    def __init__(self, scheduler: DDIMScheduler) -> None:
        # Formed in float64 and kept in float32: in half precision, sigma at t = 999 would be 1.
        alphas_cumprod = scheduler.alphas_cumprod.double()
        self.alpha = alphas_cumprod.sqrt().float()
        self.sigma = (1 - alphas_cumprod).sqrt().float()
        self.prediction_type: str = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise SchedulerError(
                f"A teacher with prediction_type '{self.prediction_type}' cannot be distilled; "
                "it must be 'epsilon', 'v_prediction' or 'sample'."
            )

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device) -> "NoiseSchedule":
        """Move the tables to a device."""
        self.alpha, self.sigma = self.alpha.to(device), self.sigma.to(device)
        return self

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Look up alpha_t and sigma_t of timesteps [B]: two tensors [B, 1, 1, 1]."""
        shape = (-1, 1, 1, 1)
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Diffuse latents [B, C, H, W] to timesteps [B]: alpha_t x + sigma_t eps."""
        alpha, sigma = self.at(timesteps)
        return alpha * latents + sigma * noise

    def for_network(self, timesteps: Tensor) -> Tensor:
        """Timesteps [B] as the network takes them."""
        return timesteps

    def prediction(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What teacher, LoRA teacher and their loss are compared in: noise; as `to_noise`."""
        return self.to_noise(output, noisy, timesteps)

    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        """What `prediction` is right to give for images [B, C, H, W] and the noise in x_t."""
        return noise

    def lora_weight(self, timesteps: Tensor) -> Tensor:
        """Weight of the LoRA teacher's loss at timesteps [B]: alpha_t, [B, 1, 1, 1]."""
        return self.at(timesteps)[0]

    def to_noise(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Convert what the UNet predicts at x_t into noise.

        v = alpha eps - sigma x and x_t = alpha x + sigma eps give eps = alpha v + sigma x_t
        (arXiv 2202.00512).

        Args:
            output: The UNet's prediction, [B, C, H, W].
            noisy: x_t, [B, C, H, W].
            timesteps: t, [B].

        Returns:
            The predicted noise, [B, C, H, W] float32.
        """
        output = output.float()
        if self.prediction_type == "epsilon":
            return output
        alpha, sigma = self.at(timesteps)
        if self.prediction_type == "v_prediction":
            return alpha * output + sigma * noisy
        return (noisy - alpha * output) / sigma


class FlowSchedule(NoiseSchedule):
    """The flow that the teacher was trained on: x_t = (1 - sigma_t) x + sigma_t eps.

    Teacher, LoRA teacher and their loss are compared in velocity, eps - x (arXiv 2210.02747), which
    is what such networks predict. Timestep i is noise level i of the training, from the lowest up.

    Args:
        scheduler: Gives the number of noise levels and their shift.

    Raises:
        SchedulerError: If the shift depends on the picture's size.
    """

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        if config.use_dynamic_shifting:
            raise SchedulerError(
                "This teacher's noise levels are shifted by the picture's size "
                "(use_dynamic_shifting), and a run has one size: set use_dynamic_shifting to false "
                "and shift to that size's in its scheduler_config.json."
            )
        levels = torch.arange(1, config.num_train_timesteps + 1, dtype=torch.float64)
        levels = levels / config.num_train_timesteps
        levels = config.shift * levels / (1 + (config.shift - 1) * levels)
        self.sigma, self.alpha = levels.float(), (1 - levels).float()
        self.prediction_type = "flow_prediction"

    def for_network(self, timesteps: Tensor) -> Tensor:
        """Noise levels times their number, as these networks take them."""
        return self.sigma[timesteps] * len(self)

    def to_noise(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """eps = x_t + (1 - sigma_t) v, of v = eps - x."""
        alpha, _ = self.at(timesteps)
        return noisy + alpha * output.float()

    def prediction(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity, as it is."""
        return output.float()

    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        """The velocity, eps - x."""
        return noise - images

    def lora_weight(self, timesteps: Tensor) -> Tensor:
        """1: flow matching weighs all levels alike."""
        return torch.ones_like(self.at(timesteps)[0])


def noise_schedule_of(scheduler: Any) -> NoiseSchedule:
    """The diffusion or flow that a teacher was trained on, by its scheduler."""
    return FlowSchedule(scheduler) if is_flow_matching(scheduler) else NoiseSchedule(scheduler)


class Teacher:
    """A frozen teacher and its LoRA copy in the memory of one network.

    Args:
        unet: The teacher's UNet or transformer; it is frozen and receives the adapter.
        noise_schedule: The diffusion or flow that it was trained on.
        lora_rank: Rank of the LoRA on every query's and value's projection.
        lora_alpha: The LoRA's output is scaled by lora_alpha / lora_rank.

    Raises:
        ArchitectureError: If the UNet wants more than latents, timestep and text.
    """

    def __init__(
        self,
        unet: Any,
        noise_schedule: NoiseSchedule,
        lora_rank: int = 64,
        lora_alpha: float = 108.0,
    ) -> None:
        family = family_of(unet)
        added = unet.config.get("addition_embed_type")
        known = added in (None, "text", "text_time") and not unet.config.get("class_embed_type")
        if family is UNET and not known:
            raise ArchitectureError(
                "This teacher's UNet takes conditions besides the prompt and SDXL's sizes (class "
                "labels, pictures); UNets of Stable Diffusion 1, 2 and XL can be distilled."
            )
        self.unet = unet.requires_grad_(False).eval()
        self._dtype = unet.dtype
        self.noise_schedule = noise_schedule
        unet.add_adapter(
            LoraConfig(
                r=lora_rank,
                lora_alpha=lora_alpha,
                target_modules=list(family.lora_targets),
                init_lora_weights="gaussian",
            )
        )
        cast_training_params(unet, torch.float32)
        # The module that the LoRA is trained through: what accelerate wraps for many processes.
        self.trained: nn.Module = unet
        self.lora_parameters = [p for p in unet.parameters() if p.requires_grad]

    @torch.no_grad()
    def guided_noise(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Text,
        empty: Text,
        guidance_scale: float,
        lora: bool,
    ) -> Tensor:
        """Predict noise with classifier-free guidance, both halves in one call.

        eps^cfg = eps(x_t, empty) + w (eps(x_t, c) - eps(x_t, empty)); arXiv 2207.12598.

        Args:
            noisy: x_t, [B, C, H, W].
            timesteps: t, [B].
            text: The condition c, B rows.
            empty: The empty prompt, one row.
            guidance_scale: w; 1 runs the conditional half alone.
            lora: Ask the LoRA teacher instead of the frozen one.

        Returns:
            The guided noise, or of a flow the velocity, [B, C, H, W] float32, without a graph.
        """
        self._switch(lora)
        if guidance_scale == 1:
            output = self._call(self.unet, noisy, timesteps, text)
        else:
            both = text.pair(empty, lambda own, none: torch.cat([none.expand_as(own), own]))
            output = self._call(self.unet, noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both)
            empty_half, conditional = output.float().chunk(2)
            output = empty_half + guidance_scale * (conditional - empty_half)
        # Guiding v and then converting it is the same as the reverse: both are affine in v.
        return self.noise_schedule.prediction(output, noisy, timesteps)

    def lora_noise(self, noisy: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """Predict noise with the LoRA teacher for its training, unguided and with a graph.

        Args:
            noisy: x_t, [B, C, H, W].
            timesteps: t, [B].
            text: The condition, B rows.

        Returns:
            The noise, or of a flow the velocity, [B, C, H, W] float32.
        """
        self._switch(True)
        output = self._call(self.trained, noisy, timesteps, text)
        return self.noise_schedule.prediction(output, noisy, timesteps)

    def classify(self, noisy: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """Ask the critic on the LoRA teacher's features, with a graph.

        Args:
            noisy: x_t, [B, C, H, W].
            timesteps: t, [B].
            text: The condition, B rows.

        Returns:
            Logits, [B, 1, h, w].
        """
        self._switch(True)
        return self.unet.classify(noisy, timesteps, text.map(self._as_weights))

    def _call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        # Text as the weights are: a CPU's autocast leaves the norm of pooled text alone.
        text = text.map(self._as_weights)
        timesteps = self.noise_schedule.for_network(timesteps)
        return call(network, self.unet, noisy, timesteps, text)

    def _as_weights(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype)

    def _switch(self, lora: bool) -> None:
        """Switch the adapter on or off."""
        if lora:
            self.unet.enable_adapters()
            return
        self.unet.disable_adapters()
        # PEFT freezes what it switches off, and FSDP2 never trains what is frozen when it starts.
        for parameter in self.lora_parameters:
            parameter.requires_grad_(True)


def drop_prompts(text: Text, empty: Text, dropped: Tensor) -> Text:
    """Put the empty prompt (one row) in the place of the rows where `dropped` [B] holds."""
    return text.pair(
        empty,
        lambda own, none: torch.where(dropped.view(-1, *[1] * (own.ndim - 1)), none, own),
    )
