"""The metrics, each of features that are there already: thin over torchmetrics and prdc."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tiue.errors import DependencyError, InputError, NonFiniteError
from tiue.evaluate.protocol import METRICS, NEIGHBOUR_METRICS, Protocol

# The first rank has all features and computes alone: the others are gone, and must not be asked.
_ALONE: dict[str, Any] = {"sync_on_compute": False}


class _Identity(nn.Module):
    """Stands where torchmetrics has its feature network: the features are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_library(module: str, package: str) -> None:
    """See that a library of the `eval` extra is installed, before minutes are spent.

    Args:
        module: Its name in Python.
        package: Its name for pip.

    Raises:
        DependencyError: It is not.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise DependencyError(
            f"evaluation needs the package {package}: install it with `pip install tiue[eval]`"
        )


def least_samples(metric: str, protocol: Protocol, width: int) -> int:
    """Pictures that a metric needs of each side.

    Args:
        metric: One of `METRICS`.
        protocol: Its subset sizes and neighbours.
        width: Size of a feature.

    Returns:
        The number. FID needs one more than a feature has entries: of fewer, a covariance has no
        full rank, and the distance is of the sample rather than of the model.
    """
    needed = {
        "fid": width + 1,
        "kid": protocol.kid_subset_size,
        "precision": protocol.precision_k + 2,
        "recall": protocol.precision_k + 2,
        "density": protocol.coverage_k + 2,
        "coverage": protocol.coverage_k + 2,
    }
    return needed.get(metric, 1)


def check_samples(
    metrics: list[str], protocol: Protocol, width: int, generated: int, reference: int
) -> None:
    """Refuse sets that are too small for a metric.

    Args:
        metrics: Some of `METRICS`.
        protocol: As in `least_samples`.
        width: Size of a feature.
        generated: Pictures of the model.
        reference: Pictures that they are compared with.

    Raises:
        InputError: Naming the metrics, what they need and what there is.
    """
    short = []
    for metric in metrics:
        needed = least_samples(metric, protocol, width)
        for side, count in (("generated", generated), ("reference", reference)):
            if metric in METRICS[:6] and count < needed:
                short.append(f"{metric} needs {needed} {side} pictures and there are {count}")
    if short:
        rest = [metric for metric in METRICS if metric in metrics and f"{metric} needs" not in
                " ".join(short)]  # fmt: skip
        hint = f", or ask for --metrics {','.join(rest)}" if rest else ""
        raise InputError(f"{'; '.join(short)}. Give more pictures{hint}.")


def _pair(generated: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    sides = {"generated": generated, "reference": reference}
    for side, features in sides.items():
        if features.ndim != 2:
            raise InputError(f"{side} features must be [N, D], got {list(features.shape)}")
        if not features.isfinite().all():
            raise NonFiniteError(f"the {side} pictures' features hold NaN or infinity")
    if generated.shape[1] != reference.shape[1]:
        raise InputError(
            f"features of two sizes, {generated.shape[1]} and {reference.shape[1]}: both sides "
            "must come from one extractor"
        )
    return generated.detach().cpu().double(), reference.detach().cpu().double()


def _need(metric: str, least: int, *sides: Tensor) -> None:
    count = min(len(side) for side in sides)
    if count < least:
        raise InputError(f"{metric} needs {least} pictures a side, got {count}")


def fid(generated: Tensor, reference: Tensor) -> float:
    """Frechet distance of two sets of features, each taken for a normal distribution.

    Args:
        generated: Features of the model's pictures, [N, D].
        reference: Features of the others, [M, D].

    Returns:
        The distance; 0 for equal sets.

    Raises:
        InputError: A side has fewer than D + 1 pictures, or the shapes do not fit.
        NonFiniteError: A feature is not finite.

    Source: Heusel et al., 2017, arXiv 1706.08500, equation 6; torchmetrics.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    generated, reference = _pair(generated, reference)
    width = generated.shape[1]
    _need("fid", width + 1, generated, reference)
    metric = FrechetInceptionDistance(feature=_Identity(width), **_ALONE)
    metric.set_dtype(torch.float64)
    # A shift moves both sets alike, and keeps sum of squares minus square of sums from cancelling.
    centre = reference.mean(0)
    metric.update(reference - centre, real=True)
    metric.update(generated - centre, real=False)
    # Equal sets come out as a rounding error of either sign.
    return max(0.0, metric.compute().item())


def kid(
    generated: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance: squared MMD under a cubic kernel, unbiased, over random subsets.

    Args:
        generated: Features of the model's pictures, [N, D].
        reference: Features of the others, [M, D].
        subsets: How many.
        subset_size: Pictures of each side in each.
        seed: Of the subsets.

    Returns:
        Mean over the subsets, and their deviation. Near 0, and also below, for equal distributions.

    Raises:
        InputError: A side has fewer than `subset_size` pictures, or the shapes do not fit.
        NonFiniteError: A feature is not finite.

    Source: Binkowski et al., 2018, arXiv 1801.01401; torchmetrics.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    generated, reference = _pair(generated, reference)
    _need("kid", subset_size, generated, reference)
    identity = _Identity(generated.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features: they are here
        metric = KernelInceptionDistance(
            feature=identity, subsets=subsets, subset_size=subset_size, **_ALONE
        )
    metric.update(reference, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):  # it draws from the default generator
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def neighbours(generated: Tensor, reference: Tensor, nearest_k: int) -> dict[str, float]:
    """Precision, recall, density and coverage by balls that reach the k-th neighbour.

    Args:
        generated: Features of the model's pictures, [N, D].
        reference: Features of the others, [M, D].
        nearest_k: k, the picture itself not counted.

    Returns:
        The four by name. Equal sets have precision, recall and coverage 1.

    Raises:
        InputError: A side has fewer than k + 2 pictures, or the shapes do not fit.
        NonFiniteError: A feature is not finite.

    Source: Kynkaanniemi et al., 2019, arXiv 1904.06991; Naeem et al., 2020, arXiv 2002.09797; prdc.
    """
    from prdc import compute_prdc

    generated, reference = _pair(generated, reference)
    _need("precision, recall, density and coverage", nearest_k + 2, generated, reference)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the counts
        found = compute_prdc(reference.numpy(), generated.numpy(), nearest_k)
    return {name: float(value) for name, value in found.items()}


def _sample(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(features) <= count:
        return features
    return features[torch.randperm(len(features), generator=generator)[:count]]


def set_figures(
    generated: Tensor, reference: Tensor, metrics: list[str], protocol: Protocol
) -> dict[str, float]:
    """Compute those of FID, KID, precision, recall, density and coverage that are asked for.

    Args:
        generated: Features of the model's pictures, [N, D].
        reference: Features of the others, [M, D].
        metrics: Some of `METRICS`.
        protocol: Its numbers.

    Returns:
        Figures by name, `kid_deviation` beside `kid`.

    Raises:
        InputError: Too few pictures for one of them.
        NonFiniteError: A feature is not finite.
    """
    check_samples(metrics, protocol, generated.shape[1], len(generated), len(reference))
    figures: dict[str, float] = {}
    if "fid" in metrics:
        figures["fid"] = fid(generated, reference)
    if "kid" in metrics:
        figures["kid"], figures["kid_deviation"] = kid(
            generated,
            reference,
            protocol.kid_subsets,
            protocol.kid_subset_size,
            protocol.metric_seed,
        )
    if set(metrics) & set(NEIGHBOUR_METRICS):
        generator = torch.Generator().manual_seed(protocol.metric_seed)
        some = _sample(generated, protocol.neighbour_samples, generator)
        others = _sample(reference, protocol.neighbour_samples, generator)
        for k, names in (
            (protocol.precision_k, NEIGHBOUR_METRICS[:2]),
            (protocol.coverage_k, NEIGHBOUR_METRICS[2:]),
        ):
            wanted = [name for name in names if name in metrics]
            found = neighbours(some, others, k) if wanted else {}
            figures |= {name: found[name] for name in wanted}
    return figures


def clip_score(pictures: Tensor, texts: Tensor) -> tuple[float, float]:
    """Mean cosine of pictures with their own prompts.

    The field's tables give the cosine itself (0.31); Hessel et al. multiply it by 2.5, torchmetrics
    by 100.

    Args:
        pictures: Embeddings [N, D], one a picture.
        texts: Embeddings [N, D], that of the picture's prompt.

    Returns:
        Mean and deviation over the pictures.

    Raises:
        InputError: Pictures and prompts do not pair.
        NonFiniteError: An embedding is not finite.

    Source: Hessel et al., 2021, arXiv 2104.08718.
    """
    if len(pictures) != len(texts) or not len(pictures):
        raise InputError(
            f"{len(pictures)} pictures and {len(texts)} prompts do not pair: give one prompt a"
            " picture, in the pictures' order"
        )
    pictures, texts = _pair(pictures, texts)
    cosines = nn.functional.cosine_similarity(pictures, texts)
    return cosines.mean().item(), cosines.std(unbiased=False).item()
