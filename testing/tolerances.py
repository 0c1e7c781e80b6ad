"""How far results may lie from their reference: one file, and loosening one is its own commit."""

import torch

# Largest difference over the largest reference value. The golden cases were computed in float64.
GOLDEN_RELATIVE = {torch.float64: 1e-10, torch.float32: 2e-5}
GOLDEN_GRADIENT_RELATIVE = 1e-5
# Two orders of the same float64 sums; the largest seen was 3e-14.
EXACT_RELATIVE = 1e-11
# Whole pipelines against themselves in the published form, text encoder to latents.
PIPELINE_RELATIVE = {torch.float64: 1e-9, torch.float32: 2e-5}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the largest reference value; NaN where either has one."""
    if not reference.numel():
        return 0.0
    difference = (value.double() - reference.double()).abs().max()
    return (difference / reference.double().abs().max()).item()


# Rounding floor of the criterion (error at most twice that of torch, plus this), over the largest
# reference value: half a unit in the last place where torch happens to be exact.
ROUNDING_FLOORS = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# The same behind a convolution or a product by torch's own libraries, which sum float32 in an order
# of their choice: split in two and in channels_last, 23,040 terms were off by 1.6e-6, torch's one
# convolution by 0.7e-6. Half types are accumulated in float32, where the order does not show.
PRODUCT_FLOORS = ROUNDING_FLOORS | {torch.float32: 2.0**-19}

# Winograd's F(4 x 4, 3 x 3) in float32 against float64, over the standard deviation of the output.
WINOGRAD_RELATIVE = 1e-4
