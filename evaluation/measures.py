"""Numbers by which images are judged: Fréchet distance, Inception Score, precision, recall, SSIM.

In       features (n, f) or logits (n, C) of a network; or images (B, 3, H, W) in [-1, 1].
         Statistics and InceptionScore take them in pieces, on many processes, and are merged at the
         end: 50,000 images never lie in memory together
Out      plain floats; each formula's source stands beside it
Differs  the network is the caller's business; a Fréchet distance is called FID only for Inception
         features
Try      python -m evaluation.measures   (a second: few images make the distance too large)
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.flags import need

# ------------------------------------------------------------------------------------------------
# Fréchet distance

class Statistics:
    """Mean and covariance (n - 1) of features (n, f) that come in pieces, in float64.

    Sums of squares lose digits where the mean is large, so pieces are joined by their means and
    scatter matrices [Chan, Golub, LeVeque 1983]; joining is also what merges two processes.
    """

    def __init__(self, f: int):
        # scatter = sum of (x - mu)(x - mu)^T
        self.n, self.mu, self.scatter = 0, np.zeros(f), np.zeros((f, f))

    def add(self, features: np.ndarray) -> None:
        """features (m, f), any m from 1 on."""
        piece, x = Statistics(len(self.mu)), np.asarray(features, np.float64)
        piece.n, piece.mu = len(x), x.mean(axis=0)
        piece.scatter = (x - piece.mu).T @ (x - piece.mu)
        self.merge(piece)

    def merge(self, other: "Statistics") -> None:
        n = self.n + other.n
        if other.n:
            step = other.mu - self.mu
            self.scatter += other.scatter + np.outer(step, step) * (self.n * other.n / n)
            self.mu = self.mu + step * (other.n / n)
            self.n = n

    @property
    def sigma(self) -> np.ndarray:
        """(f, f). Raises UserError for fewer than two images."""
        need(self.n >= 2, f"a covariance takes at least 2 images, not {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray,
                     mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^1/2)

    [Heusel et al. 2017, arXiv 1706.08500]. The last trace is the sum of the singular values of
    H1^T H2 with H H^T = sigma: no square root of a product that is not symmetric, no complex
    numbers, and accurate where there are fewer images than features.
    """
    def half(sigma):
        values, vectors = np.linalg.eigh(np.asarray(sigma, np.float64))
        return vectors * np.sqrt(values.clip(0))
    cross = np.linalg.svd(half(sigma1).T @ half(sigma2), compute_uv=False).sum()
    means = np.square(np.asarray(mu1, np.float64) - mu2).sum()
    return float(means + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def frechet_from_features(x: np.ndarray, y: np.ndarray) -> float:
    """The same from features (n, f) and (m, f), by way of the smaller matrices.

    The centred features, divided by sqrt(n - 1), are such an H^T themselves. Where n and m are
    below f, an (n, m) matrix takes the place of the (f, f) ones and nothing is decomposed twice.
    TRAP: with many images that same matrix is huge; 10,000 of each would take minutes.
    """
    need(len(x) >= 2 and len(y) >= 2, "a covariance takes at least 2 images")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    f = x.shape[1]
    if max(len(x), len(y)) >= f:
        stats = Statistics(f), Statistics(f)
        for stat, features in zip(stats, (x, y)):
            stat.add(features)
        return frechet_distance(stats[0].mu, stats[0].sigma, stats[1].mu, stats[1].sigma)
    a, b = ((z - z.mean(axis=0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    means = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    return float(means + np.square(a).sum() + np.square(b).sum() - 2 * cross)


# ------------------------------------------------------------------------------------------------
# Inception Score

SPLITS = 10  # for the mean and deviation that papers print


class InceptionScore:
    """exp(mean over images of KL(p(y|x) || p(y))), for n images in all.

    [Salimans et al. 2016, arXiv 1606.03498]. KL's mean is mean(sum_y p log p) - sum_y P log P with
    P the mean of p, so two sums per split are enough.
    """

    def __init__(self, n: int, classes: int):
        self.n, self.p, self.plogp = n, np.zeros((SPLITS, classes)), np.zeros(SPLITS)
        self.count = np.zeros(SPLITS, np.int64)

    def add(self, logits: Tensor, first: int) -> None:
        """logits (m, C) of images first, first + 1, ...; image i is of split i * SPLITS // n."""
        logp = logits.cpu().double().log_softmax(dim=1).numpy()  # an Apple GPU has no float64
        split = (first + np.arange(len(logp))) * len(self.p) // self.n
        np.add.at(self.p, split, np.exp(logp))
        np.add.at(self.plogp, split, (np.exp(logp) * logp).sum(axis=1))
        np.add.at(self.count, split, 1)

    def merge(self, other: "InceptionScore") -> None:
        self.p += other.p
        self.plogp += other.plogp
        self.count += other.count

    def scores(self) -> tuple[float, float, float]:
        """-> the score of all images together; mean and std over the splits, as papers print it."""
        def score(p, plogp, count):
            P = p / count
            return float(np.exp(plogp / count - (P * np.log(P.clip(1e-300))).sum()))
        parts = [score(*part) for part in zip(self.p, self.plogp, self.count) if part[2]]
        whole = score(self.p.sum(axis=0), self.plogp.sum(), self.count.sum())
        return whole, float(np.mean(parts)), float(np.std(parts))


# ------------------------------------------------------------------------------------------------
# precision and recall

def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """real (n, f), fake (m, f) -> precision, recall

    [Kynkäänniemi et al. 2019, arXiv 1904.06991, k = 3]. A set's manifold is the union of balls
    around its points, each reaching to the k-th neighbour in the set.
    precision   share of fakes inside the real manifold: how many samples look real
    recall      share of reals inside the fake manifold: how much of what is real can be made
    Theirs are VGG-16 features; ours are the caller's, so the numbers are comparable only within
    one network.
    """
    k = 3
    need(min(len(real), len(fake)) > k, f"precision and recall take more than {k} images of each")
    real, fake = real.double(), fake.double()

    def radii(x):
        # k + 1: a point's nearest neighbour is itself
        return torch.cat([torch.cdist(part, x).topk(k + 1, largest=False).values[:, -1]
                          for part in x.split(1000)])

    def inside(x, centres, reach):
        hits = [(torch.cdist(part, centres) <= reach).any(dim=1) for part in x.split(1000)]
        return torch.cat(hits).double().mean().item()
    return inside(fake, real, radii(real)), inside(real, fake, radii(fake))


# ------------------------------------------------------------------------------------------------
# SSIM

SSIM_WINDOW = 11  # pixels; smaller images have no SSIM


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (B,) of images (B, 3, H, W) in [-1, 1]; 1 for equal ones.

    Wang, Bovik, Sheikh, Simoncelli 2004, equation 13: Gaussian windows of 11 pixels with sigma 1.5
    where they fit whole (so images have 11 pixels or more), K1 = 0.01, K2 = 0.03, the range is 2;
    the mean over places and colour channels.
    """
    side = min(a.shape[-2:])
    need(side >= SSIM_WINDOW, f"SSIM takes images of {SSIM_WINDOW} pixels or more, not {side}")
    x = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-x.square() / (2 * 1.5 ** 2))
    window = (window / window.sum()).to(a.device)

    def blur(images):  # (B, 3, H, W) -> (B, 3, H-10, W-10)
        x = images.double().flatten(0, 1)[:, None]
        x = F.conv2d(F.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
        return x.unflatten(0, images.shape[:2]).squeeze(2)
    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / (
        (mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(dim=1).float()


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    print("Fréchet distance between two draws from one normal distribution of 128 features:")
    for n in (50, 100, 200, 500, 2000, 10000):
        x, y = rng.standard_normal((n, 128)), rng.standard_normal((n, 128))
        print(f"  n {n:6}  {frechet_from_features(x, y):8.3f}")
    print("The truth is 0. So a distance says little without its n, and without what two sets of")
    print("real images get at the same n.")
