"""Which layers may be taken apart into operators, and rows repeated for those that may not."""

import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)
_told: set[str] = set()


def is_plain(module: nn.Module | None, *classes: type[nn.Module] | str) -> bool:
    """Whether a module is exactly of one of these classes and is called through its own forward.

    A hook, an adapter that wraps the layer, a parametrization (another class) or a replaced
    `forward` (accelerate's offloading) would be left out if the module were taken apart; the
    weight of another tensor class (torchao's int8 and float8) is known to torch's operators alone.

    Args:
        module: any.
        *classes: classes, or names of classes of diffusers, which this package does not import,
            or of `tiue_kernels.nn`.
    """
    known = type(module) in classes or is_named(module, *classes)
    return known and is_untouched(module) and _holds_plain_tensors(module)


def is_named(instance: object, *names: type | str) -> bool:
    """Whether something's class is diffusers' or this package's of one of these names."""
    # Read off the instance: torch.compile does not trace __module__ of some of diffusers' classes.
    return type(instance).__name__ in names and instance.__module__.startswith(
        ("diffusers.", "tiue_kernels.")
    )


def is_untouched(module: Any) -> bool:
    """Whether calling a module runs the forward of its class and nothing else."""
    # Attribute by attribute: a pass asks 600 times, and a loop over names took 4 % of an eager one.
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl  # of its own `compile`
    ) and runs_own_forward(module)


def runs_own_forward(module: Any) -> bool:
    """Whether a module's forward is that of its class; accelerate's hooks leave it there, set."""
    forward = vars(module).get("forward")
    if forward is None:
        return True
    own: Any = type(module)
    bound = getattr(forward, "__self__", None) is module
    return bound and getattr(forward, "__func__", None) is own.forward


def _holds_plain_tensors(module: Any) -> bool:
    """Whether a module's own parameters are torch's, or an exporter's stand-ins for those."""
    for parameter in module._parameters.values():
        kind = type(parameter)
        plain = parameter is None or kind is nn.Parameter or kind is torch.Tensor
        if not plain and not kind.__module__.startswith("torch._subclasses"):
            return False
    return True


def is_affine_group_norm(norm: Any) -> bool:
    """Whether a norm is a plain GroupNorm with scale and shift."""
    return is_plain(norm, nn.GroupNorm) and norm.affine


def is_affine_layer_norm(norm: Any) -> bool:
    """Whether a norm is a plain LayerNorm over the last axis, with scale and shift."""
    return (
        is_plain(norm, nn.LayerNorm) and norm.bias is not None and len(norm.normalized_shape) == 1
    )


def is_idle(dropout: Any) -> bool:
    """Whether a dropout does nothing."""
    return is_plain(dropout, nn.Dropout) and (dropout.p == 0 or not dropout.training)


def repeat_rows(value: Any, timesteps: int) -> Any:
    """Repeat B rows to K*B timestep-major rows, in tensors, tuples, lists and dicts of them.

    Tensors are new even where K is 1: a block that is called whole may write to its input (FreeU).
    """
    if isinstance(value, torch.Tensor):
        return value.repeat(timesteps, *[1] * (value.ndim - 1))
    if isinstance(value, (tuple, list)):
        return type(value)(repeat_rows(entry, timesteps) for entry in value)
    if isinstance(value, dict):
        return {key: repeat_rows(entry, timesteps) for key, entry in value.items()}
    return value


def tell_once(module: nn.Module) -> None:
    """Says in the log, once a class, that a module is not taken apart; silent in torch.compile."""
    if torch.compiler.is_compiling():  # a call of the log would break the graph in two
        return
    name = type(module).__name__
    if name not in _told:
        _told.add(name)
        logger.warning(
            "A %s runs over repeated features, because an adapter that is more than LoRAs (DoRA), "
            "a hook, a quantised weight, FreeU or an option changes it: exact, but slower. Said "
            "once.",
            name,
        )
