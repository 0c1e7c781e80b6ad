"""The package's exceptions: each says what was wrong and what to do about it."""


class TiUEError(Exception):
    """Base of every error that this package raises on purpose."""


class CheckpointError(TiUEError, OSError, ValueError):
    """A model folder or hub id is missing, incomplete, a pickle, or of another architecture."""


class ArchitectureError(TiUEError, ValueError):
    """A UNet that the one pass cannot be formed of (no cross-attention, no skip connections)."""


class SchedulerError(TiUEError, ValueError):
    """A scheduler whose steps are not one fixed linear map of latents and model outputs."""


class InputError(TiUEError, ValueError):
    """An argument of the wrong value, shape or type."""


class NonFiniteError(TiUEError, FloatingPointError):
    """A NaN or infinity where a finite result was due."""


class DivergenceError(TiUEError, ArithmeticError):
    """Training figures that grew far beyond what they were; the last good checkpoint is kept."""


class OutputError(TiUEError, OSError):
    """A place that results were to be written to cannot be written."""


class DependencyError(TiUEError, ImportError):
    """An optional package that a call needs is not installed; the message says which to install."""
