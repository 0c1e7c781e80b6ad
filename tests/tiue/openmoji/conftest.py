"""A small set of pictures that needs no OpenMoji package: noise, with real prompts."""

import pytest
import torch

from tiue.openmoji.data import Pictures, name_pictures, sampling_weights

CODES = ["1F34E", "1F680", "1F431", "2600", "1F382", "1F332", "1F3E0", "1F355", "2764", "1F419"]


@pytest.fixture
def pictures() -> Pictures:
    names = name_pictures(CODES)
    images = torch.randint(256, (len(CODES), 3, 64, 64), generator=torch.Generator().manual_seed(0))
    return Pictures(
        images=images.byte(),
        codes=CODES,
        prompts=[names[code][0] for code in CODES],
        aliases=[names[code][1] for code in CODES],
        weights=sampling_weights(CODES),
    )
