"""Promises of measures.py: the published formulas, whether images come at once or in pieces.

GOLDEN_FRECHET came from scipy 1.17's linalg.sqrtm in float64,
|mu1 - mu2|^2 + tr(s1 + s2 - 2 sqrtm(s1 @ s2)).real, on sets() below; GOLDEN_SSIM from
scikit-image's structural_similarity with gaussian_weights=True, sigma=1.5, data_range=2,
use_sample_covariance=False, channel_axis=2, on images(). Neither package is needed here.
"""
import math

import numpy as np
import pytest
import torch

from evaluation.measures import (
    InceptionScore,
    Statistics,
    frechet_distance,
    frechet_from_features,
    precision_recall,
    ssim,
)
from helpers import refused

GOLDEN_FRECHET = {
    "full rank": 28.855420605878138,
    "rank-deficient": 11.874905850571094,
    "ill-conditioned": 82365.89752920266,
    "fewer images than features": 75.11010887526488,
}
GOLDEN_SSIM = [0.9405206277339384, 0.8370482303777497]


def sets(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features (n, 64)."""
    rng = np.random.default_rng(7)
    mix = rng.standard_normal((64, 64)) / 8
    if case == "full rank":
        return rng.standard_normal((500, 64)) @ mix, rng.standard_normal((400, 64)) + 0.3
    if case == "rank-deficient":  # 20 of 64 dimensions, not the same ones
        x, y = rng.standard_normal((500, 20)), rng.standard_normal((500, 20))
        return x @ mix[:20], y @ mix[10:30] + 0.1
    if case == "ill-conditioned":
        scale = np.logspace(-3, 3, 64)
        x, y = rng.standard_normal((500, 64)), rng.standard_normal((500, 64))
        return x * scale, y * scale * 1.1 + 0.01
    if case == "fewer images than features":
        return rng.standard_normal((20, 64)), rng.standard_normal((30, 64)) + 0.2
    raise KeyError(case)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 3, 24, 32) in [-1, 1], and the same with noise."""
    rng = np.random.default_rng(11)
    across = np.linspace(0, 5, 32)[:, None] * np.arange(1, 4)
    a = np.sin(np.linspace(0, 9, 24)[:, None, None] + across) * 0.8
    a = np.stack([a, a[::-1] * 0.5])
    b = (a + 0.1 * rng.standard_normal(a.shape)).clip(-1, 1)
    return tuple(torch.from_numpy(x.copy()).permute(0, 3, 1, 2).float() for x in (a, b))


def moments(x):
    return x.mean(axis=0), np.cov(x, rowvar=False)


# ------------------------------------------------------------------------------------------------
# Fréchet distance

@pytest.mark.parametrize("case", GOLDEN_FRECHET)
def test_frechet_distance_equals_scipys_and_is_nothing_for_equal_sets(case):
    x, y = sets(case)
    size = np.trace(np.cov(x, rowvar=False)) + np.trace(np.cov(y, rowvar=False))
    assert abs(frechet_distance(*moments(x), *moments(y)) - GOLDEN_FRECHET[case]) < 1e-6 * size
    assert abs(frechet_from_features(x, y) - GOLDEN_FRECHET[case]) < 1e-6 * size
    for same in (x, y):
        assert abs(frechet_distance(*moments(same), *moments(same))) < 1e-6 * size
        assert abs(frechet_from_features(same, same)) < 1e-6 * size


def test_many_images_never_become_a_matrix_of_images_by_images(monkeypatch):
    """Either way gives the same distance, and nothing larger than f x f is decomposed."""
    rng, sizes = np.random.default_rng(0), []
    original = np.linalg.svd

    def watched(matrix, **options):
        sizes.append(matrix.shape)
        return original(matrix, **options)
    monkeypatch.setattr(np.linalg, "svd", watched)
    for n, m, f in ((500, 400, 16), (40, 30, 16), (10, 300, 16), (12, 15, 16)):
        x, y = rng.standard_normal((n, f)), rng.standard_normal((m, f)) + 0.3
        distance = frechet_from_features(x, y)
        assert distance == pytest.approx(frechet_distance(*moments(x), *moments(y)), abs=1e-6)
    assert max(max(size) for size in sizes) <= 16, sizes


def test_statistics_in_pieces_or_of_two_processes_equal_statistics_at_once():
    # a large mean: sums of squares would lose half of the digits
    x = np.random.default_rng(0).standard_normal((1000, 16)) + 1e4
    whole, pieces, other, empty = (Statistics(16) for _ in range(4))
    whole.add(x)
    for start, end in ((0, 1), (1, 300), (300, 600)):
        pieces.add(x[start:end])
    other.add(x[600:])
    pieces.merge(other), pieces.merge(empty), empty.merge(pieces)
    for s in (whole, pieces, empty):
        np.testing.assert_allclose(s.mu, x.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(s.sigma, np.cov(x, rowvar=False), atol=1e-9)
        assert s.n == 1000


def test_a_covariance_of_one_image_is_refused():
    one = Statistics(4)
    one.add(np.ones((1, 4)))
    refused(lambda: one.sigma, names=("2 images",))
    refused(frechet_from_features, np.ones((1, 4)), np.ones((5, 4)), names=("2 images",))


# ------------------------------------------------------------------------------------------------
# Inception Score

def scored(logits, pieces):
    score, first = InceptionScore(len(logits), logits.shape[1]), 0
    for piece in logits.split(pieces):
        score.add(piece, first)
        first += len(piece)
    return score.scores()


def test_inception_score_anchors_sure_and_balanced_is_the_number_of_classes_and_unsure_is_1():
    sure = torch.eye(5).repeat(20, 1) * 100
    assert scored(sure, 7) == pytest.approx((5, 5, 0), abs=1e-5)
    assert scored(torch.zeros(100, 5), 7)[0] == pytest.approx(1)
    assert scored(sure[:1].repeat(100, 1), 7)[0] == pytest.approx(1)  # always the same class


def test_inception_score_in_pieces_equals_its_formula():
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) * 2
    p = logits.double().softmax(1)

    def formula(p):
        return torch.exp((p * (p.log() - p.mean(0).log())).sum(1).mean()).item()
    whole, mean, std = scored(logits, 33)
    parts = [formula(part) for part in p.split(20)]
    expected = formula(p), np.mean(parts), np.std(parts)
    assert (whole, mean, std) == pytest.approx(expected)
    one, other = InceptionScore(200, 7), InceptionScore(200, 7)  # on two processes
    for b, piece in enumerate(logits.split(8)):
        (one, other)[b % 2].add(piece, 8 * b)
    one.merge(other)
    assert one.scores() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------
# precision and recall

def test_precision_and_recall_equal_the_plain_double_loop():
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(60, 5, generator=rng), torch.randn(50, 5, generator=rng) * 0.7 + 0.5

    def share(points, centres):
        # [0] is itself
        reach = [sorted((c - other).norm().item() for other in centres)[3] for c in centres]
        inside = [any((p - c).norm().item() <= r for c, r in zip(centres, reach)) for p in points]
        return sum(inside) / len(points)
    precision, recall = precision_recall(real, fake)
    assert 0.2 < recall < 1 and precision > 0.2
    assert precision == pytest.approx(share(fake, real))
    assert recall == pytest.approx(share(real, fake))


def test_precision_and_recall_anchors():
    rng = torch.Generator().manual_seed(0)
    many = torch.randn(1200, 4, generator=rng)  # more than whose distances are computed at once
    assert precision_recall(many, many) == (1, 1)
    real = many[:200]
    assert precision_recall(real, real + 100) == (0, 0)
    five = real[:5].repeat(40, 1) + 0.001 * torch.randn(200, 4, generator=rng)
    precision, recall = precision_recall(real, five)
    assert precision > 0.9 and recall < 0.1, "five samples over and over look real and cover little"
    refused(precision_recall, real[:3], real, names=("3 images",))


# ------------------------------------------------------------------------------------------------
# SSIM

def test_ssim_equals_scikit_images():
    a, b = images()
    np.testing.assert_allclose(ssim(a, b).numpy(), GOLDEN_SSIM, rtol=1e-5)


def test_ssim_anchors():
    a, _ = images()
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    white, black = torch.ones(1, 3, 16, 16), -torch.ones(1, 3, 16, 16)
    # no structure; means 1 and -1
    assert ssim(white, black).item() == pytest.approx((-2 + 4e-4) / (2 + 4e-4), abs=1e-5)
    refused(ssim, white[..., :10], white[..., :10], names=("11 pixels",))
    assert not math.isnan(ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)).item())
