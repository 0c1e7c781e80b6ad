"""Kernels run in Triton's interpreter where there is no GPU: set before triton is imported."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests.tiue_kernels.triton.interpreter import patch_language_once

    patch_language_once()
