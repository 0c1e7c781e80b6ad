"""What the fused modules have in common: standing for a module of diffusers."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, TypeVar

from torch import nn

from tiue_kernels.nn.layers import is_named, is_plain

T = TypeVar("T", bound="Fused")


class Fused(nn.Module):
    """A module over the layers of a diffusers module, made by `from_module`."""

    STANDS_FOR: ClassVar[str]

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} has no layers of its own: make it with {name}.from_module(module)")

    @classmethod
    def from_module(cls: type[T], module: nn.Module) -> T:
        """The fused form of a module of diffusers; the module itself is not changed.

        Args:
            module: its layers, and so its parameters, are shared, not copied.

        Returns:
            A module with the same state-dict keys and the same results up to rounding.

        Raises:
            TypeError: the module is of another class, or its call is hooked or replaced.
            ValueError: it has an option that the fused form does not know.
        """
        if not is_named(module, cls.STANDS_FOR):
            raise TypeError(
                f"{cls.__name__} stands for diffusers' {cls.STANDS_FOR}, got "
                f"{type(module).__name__}"
            )
        if not is_plain(module, cls.STANDS_FOR):
            raise TypeError(
                f"this {cls.STANDS_FOR} has hooks or a replaced forward, which its fused form "
                "would not run: fuse first, then add them"
            )
        reason = cls._why_not(module)
        if reason is not None:
            raise ValueError(f"this {cls.STANDS_FOR} {reason}: keep it as it is")
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        for name, value in vars(module).items():
            vars(fused)[name] = copy.copy(value) if isinstance(value, dict) else value
        return fused

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether a module may be run as this fused one: of either class, plain, and known."""
        return is_plain(module, cls.STANDS_FOR, cls) and cls._why_not(module) is None

    @classmethod
    def _why_not(cls, module: Any) -> str | None:
        """The option of a module that the fused form does not know; None: it stands for it."""
        return None
