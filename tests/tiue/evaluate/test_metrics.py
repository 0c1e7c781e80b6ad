"""The metrics against torchmetrics, prdc, scipy's linear algebra, and by hand."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.functional.image import lpips as library
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from tiue.errors import InputError, NonFiniteError
from tiue.evaluate import lpips
from tiue.evaluate.metrics import (
    check_samples,
    clip_score,
    fid,
    kid,
    least_samples,
    neighbours,
    set_figures,
)
from tiue.evaluate.protocol import METRICS, SET_METRICS, Protocol, check_metrics

RTOL = 1e-3
PROTOCOL = Protocol("test", "of the tests", kid_subsets=5, kid_subset_size=20)


class MeanColours(nn.Module):
    """A feature network of pictures that the libraries can run themselves: 12 means of patches."""

    num_features = 12

    def forward(self, pictures):
        return nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 2).flatten(1)


@pytest.fixture(scope="module")
def pictures():
    """Two fixed sets of 64 and 80 pictures [N, 3, 8, 8]: noise, the second darker on one side."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8)
    second = torch.randint(256, (80, 3, 8, 8), generator=generator, dtype=torch.uint8)
    second[..., :1] //= 2
    return first, second


@pytest.fixture(scope="module")
def features(pictures):
    return tuple(MeanColours()(side) for side in pictures)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fid_is_that_of_torchmetrics_on_pictures(pictures, features):
    theirs = FrechetInceptionDistance(feature=MeanColours()).set_dtype(torch.float64)
    theirs.update(pictures[1], real=True)
    theirs.update(pictures[0], real=False)
    assert fid(*features) == pytest.approx(theirs.compute().item(), rel=RTOL)
    assert fid(*features) > 0.01


def test_fid_is_the_formula_with_a_matrix_square_root(features):
    one, other = (side.double().numpy() for side in features)
    covariances = [np.cov(side, rowvar=False) for side in (one, other)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    want = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert fid(*features) == pytest.approx(want, rel=RTOL)


def test_fid_of_a_shift_is_its_square():
    side = normal(50, 4)
    assert fid(side + torch.tensor([3.0, 4.0, 0.0, 0.0]), side) == pytest.approx(25, rel=1e-5)


def test_fid_of_a_scale_is_by_hand():
    """(1 - 3)^2 times the variance, in one dimension and without a mean."""
    side = normal(50, 1)
    side = side - side.mean()
    assert fid(3 * side, side) == pytest.approx(4 * side.var().item(), rel=1e-5)


def test_fid_does_not_cancel_far_from_zero(features):
    assert fid(features[0] + 1e4, features[1] + 1e4) == pytest.approx(fid(*features), rel=RTOL)


def test_kid_is_that_of_torchmetrics_on_pictures(pictures, features):
    theirs = KernelInceptionDistance(feature=MeanColours(), subsets=5, subset_size=20)
    theirs.update(pictures[1], real=True)
    theirs.update(pictures[0], real=False)
    torch.manual_seed(3)
    want = [value.item() for value in theirs.compute()]
    state = torch.get_rng_state()
    assert kid(*features, subsets=5, subset_size=20, seed=3) == pytest.approx(want, rel=RTOL)
    assert torch.equal(torch.get_rng_state(), state)


def test_kid_is_by_hand():
    """Of one subset that holds everything: k(x, y) = (x y + 1)^3 in one dimension, no diagonal."""
    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [1.0], [3.0]])
    within_x = 2 * (1 + 1 + 27) / 6
    within_y = 2 * (8 + 64 + 64) / 6
    across = (1 + 1 + 1 + 8 + 8 + 64 + 27 + 27 + 343) / 9
    want = within_x + within_y - 2 * across
    assert kid(x, y, subsets=1, subset_size=3)[0] == pytest.approx(want, rel=1e-6)


def test_neighbours_are_by_hand():
    """On a line, k = 1: radii of the reference 1, 1, 1, 7; of the generated 1, 1, 96, 97."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    generated = torch.tensor([[0.5], [1.5], [97.5], [194.5]])
    found = neighbours(generated, reference, 1)
    # 0.5 lies in the balls of 0 and 1, 1.5 in those of 1 and 2, the others in none; 9's reaches 2.
    assert found["precision"] == 0.5
    assert found["density"] == pytest.approx(4 / 4)
    # 0, 1, 2 are within 1 of a generated one; 9 lies in the ball of 97.5, of radius 96.
    assert found["recall"] == 1.0
    # 9's nearest is 1.5, 7.5 away, and its radius 7.
    assert found["coverage"] == 0.75


def test_precision_and_recall_are_those_written_out(features):
    """Precision and recall written out with torch.cdist."""
    one, other = (side.double() for side in features)
    found = neighbours(one, other, 3)
    for name, inner, outer in (("precision", one, other), ("recall", other, one)):
        radii = torch.cdist(outer, outer).kthvalue(4, dim=1).values  # itself, then three
        want = (torch.cdist(inner, outer) < radii).any(1).double().mean().item()
        assert found[name] == pytest.approx(want, rel=RTOL)
        assert 0 < want < 1


def test_equal_sets():
    side = normal(64, 8)
    figures = set_figures(side, side.clone(), list(SET_METRICS), PROTOCOL)
    assert figures["fid"] == pytest.approx(0, abs=1e-9)
    assert abs(figures["kid"]) < 0.5
    assert [figures[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert list(figures) == ["fid", "kid", "kid_deviation", *SET_METRICS[2:]]


def test_disjoint_sets():
    side = normal(64, 8)
    figures = set_figures(side + 100, side, list(SET_METRICS), PROTOCOL)
    assert figures["fid"] == pytest.approx(8 * 100**2, rel=1e-5)
    assert [figures[name] for name in SET_METRICS[2:]] == [0, 0, 0, 0]


def test_one_picture_repeated_is_precise_and_covers_nothing():
    side = normal(64, 8)
    repeated = side[:1].expand(64, 8) + 1e-3 * normal(64, 8, seed=1)
    figures = set_figures(repeated, side, ["precision", "recall", "coverage"], PROTOCOL)
    assert figures["precision"] == 1
    assert figures["recall"] < 0.1
    assert figures["coverage"] < 0.2


def test_samples_of_the_neighbours_are_drawn_by_seed(features):
    few = Protocol("test", "", neighbour_samples=30)
    again = Protocol("test", "", neighbour_samples=30, metric_seed=1)
    names = ["precision", "density"]
    first = set_figures(*features, names, few)
    assert first == set_figures(*features, names, few)
    assert first != set_figures(*features, names, again)
    assert first != set_figures(*features, names, PROTOCOL)


@pytest.mark.parametrize(
    ("metric", "count", "needed"),
    [("fid", 12, 13), ("kid", 19, 20), ("precision", 4, 5), ("coverage", 6, 7)],
)
def test_too_few_samples_are_refused_with_the_number(features, metric, count, needed):
    one, other = features
    message = f"{metric} needs {needed} generated pictures and there are {count}"
    with pytest.raises(InputError, match=message):
        set_figures(one[:count], other, [metric], PROTOCOL)
    with pytest.raises(InputError, match=f"{needed} reference pictures"):
        set_figures(one, other[:count], [metric], PROTOCOL)
    assert least_samples(metric, PROTOCOL, 12) == needed
    assert metric in set_figures(one[:needed], other[:needed], [metric], PROTOCOL)


def test_the_refusal_says_what_can_be_computed():
    with pytest.raises(InputError, match="--metrics precision,clip_score"):
        check_samples(["fid", "precision", "clip_score"], PROTOCOL, 100, 50, 200)


def test_features_that_do_not_fit_are_refused(features):
    with pytest.raises(InputError, match="two sizes, 12 and 3"):
        fid(features[0], features[1][:, :3])
    with pytest.raises(NonFiniteError, match="generated"):
        fid(features[0] * float("nan"), features[1])
    with pytest.raises(InputError, match=r"must be \[N, D\]"):
        fid(features[0][0], features[1])


def test_clip_score_is_by_hand():
    pictures = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    texts = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    mean, deviation = clip_score(pictures, texts)
    assert mean == pytest.approx((1 + 0 + 0.8) / 3)
    assert deviation == pytest.approx(np.std([1, 0, 0.8]))


@pytest.mark.parametrize("counts", [(3, 2), (2, 3), (0, 0)])
def test_pictures_and_prompts_that_do_not_pair_are_refused(counts):
    one, other = (torch.ones(count, 2) for count in counts)
    message = f"{counts[0]} pictures and {counts[1]} prompts do not pair"
    with pytest.raises(InputError, match=message):
        clip_score(one, other)


@pytest.fixture(scope="module")
def alexnet():
    """AlexNet's layout with random weights: the published ones need a network to get."""
    torch.manual_seed(0)
    return lpips.AlexNetMaps().eval()


def test_lpips_is_that_of_torchmetrics(alexnet, monkeypatch):
    """The library's own network, with its own channel weights, around the same convolutions."""
    monkeypatch.setattr(library, "_get_tv_model_features", lambda *_: alexnet.features)
    theirs = library._LPIPS(net="alex", pnet_rand=True)
    generator = torch.Generator().manual_seed(1)
    pair = torch.randint(256, (2, 3, 3, 48, 40), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        want = theirs(*(pair / 127.5 - 1)).flatten()
        got = lpips.distances(alexnet(pair[0]), alexnet(pair[1]), lpips.linear_weights())
    torch.testing.assert_close(got, want, rtol=RTOL, atol=0)
    assert (want > 0).all()


def test_lpips_distance_is_by_hand():
    """Directions (1, 0) and (0, 1) at one of two places: (1 + 1) / 2, weighted (2 + 3) / 2."""
    one = [torch.tensor([[[[5.0, 1.0]], [[0.0, 0.0]]]])]
    other = [torch.tensor([[[[0.0, 9.0]], [[7.0, 0.0]]]])]
    assert lpips.distances(one, other, None).item() == pytest.approx(1, rel=1e-5)
    weights = [torch.tensor([2.0, 3.0])]
    assert lpips.distances(one, other, weights).item() == pytest.approx(2.5, rel=1e-5)


def test_lpips_diversity_is_the_mean_over_pairs_then_prompts(alexnet):
    generator = torch.Generator().manual_seed(2)
    varied = torch.randint(256, (3, 3, 40, 40), generator=generator, dtype=torch.uint8)
    same = varied[:1].repeat(2, 1, 1, 1)
    mean, deviation = lpips.lpips_diversity([varied, same], alexnet, None)
    with torch.no_grad():
        first, second = alexnet(varied[[0, 0, 1]]), alexnet(varied[[1, 2, 2]])
    want = lpips.distances(first, second, None).mean().item()
    assert mean == pytest.approx(want / 2, rel=RTOL)
    assert deviation == pytest.approx(want / 2, rel=RTOL)


@pytest.mark.parametrize("groups", [[], [torch.zeros(1, 3, 40, 40, dtype=torch.uint8)]])
def test_diversity_of_one_picture_is_refused(alexnet, groups):
    with pytest.raises(InputError, match="needs 2 pictures of each prompt, got"):
        lpips.lpips_diversity(groups, alexnet, None)


def test_metric_names_are_put_in_order_and_checked():
    assert check_metrics(["recall", "fid"]) == ["fid", "recall"]
    assert check_metrics(list(METRICS)) == list(METRICS)
    with pytest.raises(InputError, match="no metric fud"):
        check_metrics(["fid", "fud"])
    with pytest.raises(InputError, match="no metric was named"):
        check_metrics([])
