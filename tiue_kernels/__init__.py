"""Operators that a UNet decoder needs when it runs K timesteps over shared encoder features.

`tiue_kernels.functional` holds the public functions. Rows of K timesteps and B samples are
timestep-major: row k * B + b. Tensors with B rows are shared by all timesteps and never repeated.
"""

__version__ = "0.2.0"  # read while the package is imported

from tiue_kernels import functional
from tiue_kernels.dispatch import BackendError, explain, use_backend

__all__ = ["BackendError", "explain", "functional", "use_backend"]
