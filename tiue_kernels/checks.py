"""What the public operators refuse: every error names operator, argument and rule."""

from __future__ import annotations

from typing import NoReturn

import torch


class Checks:
    """Refusals of one operator's call.

    Args:
        operator: the name that every message begins with.
    """

    def __init__(self, operator: str) -> None:
        self.operator = operator

    def fail(self, message: str) -> NoReturn:
        """Raises ValueError, the operator's name before the message."""
        raise ValueError(f"{self.operator}: {message}")

    def require(self, condition: bool, message: str) -> None:
        """Fails unless the condition holds."""
        if not condition:
            self.fail(message)

    def maps(self, **tensors: torch.Tensor) -> None:
        """Every tensor is [rows, C, H, W]."""
        for name, tensor in tensors.items():
            if tensor.ndim != 4:
                self.fail(f"{name} must be [rows, C, H, W], got {tuple(tensor.shape)}")

    def rows(self, name: str, rows: torch.Tensor, shared_name: str, shared: torch.Tensor) -> None:
        """The rows are a whole number of timesteps over the shared rows."""
        batch = shared.shape[0]
        if rows.shape[0] % batch if batch else rows.shape[0]:
            self.fail(
                f"{name} has {rows.shape[0]} rows, which is no multiple of the {batch} rows of "
                f"{shared_name}: it must have K*B rows, timestep-major"
            )

    def norm(
        self, channels: int, num_groups: int, weight: torch.Tensor, bias: torch.Tensor
    ) -> None:
        """The groups divide the channels, and weight and bias have one value a channel."""
        if num_groups < 1 or channels % num_groups:
            self.fail(f"num_groups must divide the channels: {channels} into {num_groups}")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor.shape != (channels,):
                self.fail(f"{name} of the norm must be ({channels},), got {tuple(tensor.shape)}")

    def convolution(self, channels: int, weight: torch.Tensor) -> None:
        """The weight is a 2D kernel over these input channels."""
        if weight.ndim != 4 or weight.shape[1] != channels:
            self.fail(
                f"weight must be [C_out, {channels}, height, width], got {tuple(weight.shape)}"
            )

    def tensors(self, **tensors: torch.Tensor | None) -> list[torch.Tensor]:
        """Floating-point tensors of one device; those that are None are left out.

        Raises:
            TypeError: a tensor does not hold floating-point numbers.
            ValueError: the tensors lie on several devices.
        """
        given = [tensor for tensor in tensors.values() if tensor is not None]
        if _are_floats_of_one_device(given):
            return given
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        for name, tensor in present.items():
            if not tensor.is_floating_point():
                raise TypeError(
                    f"{self.operator}: {name} must hold floating-point numbers, got {tensor.dtype}"
                )
        devices = {name: tensor.device for name, tensor in present.items()}
        if len(set(devices.values())) > 1:
            found = ", ".join(f"{name} on {device}" for name, device in devices.items())
            self.fail(f"all tensors must be on one device, got {found}")
        return list(present.values())

    def one_dtype(self, lower: bool = False, **tensors: torch.Tensor | None) -> list:
        """The tensors in one dtype, which they must have unless autocast settles it.

        Args:
            lower: under autocast take its dtype, as for a matrix product; else the widest given.
            **tensors: to be brought to one dtype; those that are None stay None.

        Returns:
            The tensors in the order given.

        Raises:
            TypeError: the dtypes differ outside of autocast.
        """
        given = list(tensors.values())
        if _are_alike(given):
            return given
        present = self.tensors(**tensors)
        device = present[0].device.type
        dtypes = {tensor.dtype for tensor in present}
        if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast
            wanted = present[0].dtype
            for tensor in present[1:]:
                wanted = torch.promote_types(wanted, tensor.dtype)
            if lower and wanted == torch.float32:
                wanted = torch.get_autocast_dtype(device)
            dtypes = {wanted}
        if len(dtypes) > 1:
            found = ", ".join(f"{n} {t.dtype}" for n, t in tensors.items() if t is not None)
            raise TypeError(f"{self.operator}: all must have one dtype, got {found}")
        (dtype,) = dtypes
        return [None if tensor is None else tensor.to(dtype) for tensor in tensors.values()]


def _are_floats_of_one_device(tensors: list[torch.Tensor]) -> bool:
    device = tensors[0].device
    for tensor in tensors:  # no generator: this runs several times an operator
        if not tensor.dtype.is_floating_point or tensor.device != device:
            return False
    return True


def _are_alike(tensors: list[torch.Tensor | None]) -> bool:
    """Whether there is nothing to bring to one dtype, and nothing to refuse."""
    present = [tensor for tensor in tensors if tensor is not None]
    dtype, device = present[0].dtype, present[0].device
    for tensor in present:
        if tensor.dtype is not dtype or tensor.device != device:
            return False
    if not dtype.is_floating_point:
        return False
    return device.type == "meta" or not torch.is_autocast_enabled(device.type)
