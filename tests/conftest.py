"""Kernels run in Triton's interpreter where there is no GPU.

Triton reads the variable where it is imported, and diffusers imports it: so this comes first of
all, in the folder that pytest reads before it collects a test.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
