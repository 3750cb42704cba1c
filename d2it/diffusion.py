"""Diffusion on codes of two grains: loss, guidance, samples. The two paths: ../diffusion.py.

Paper    multi-grained noise: a coarse code is one number in four slots, and so is its noise
In       network(z_t, t, labels, grain) -> (B, C, 2n, 2n), any such network; codes of mean 0, std 1
Out      a loss, and samples z (B, C, 2n, 2n)
Differs  every code counts once in the loss; the paper's own formula is not known to us
Try      python -m d2it.diffusion      (CPU, a second)
"""
from collections.abc import Callable

import torch
from torch import Tensor

import diffusion as paths
from d2it.grain import code_weights, grained_noise
from diffusion import T, alpha_sigma, random_times, target
from generator import guide
from layers import at_least_float32


def loss(network: Callable, z: Tensor, labels: Tensor, grain: Tensor,
         path: str = "noise") -> tuple[Tensor, dict]:
    """-> mean squared error over codes, a scalar, and the error by grain and by quarter of T.

    Starts at 1 (path "flow": 2), when the net says nothing. An error near 1 in quarter 1 and near
    0 in quarter 4 is no fault: little noise is hard to see, and much of it is all there is.
    """
    t = random_times(len(z), path, z.device)                  # (B,)
    noise = grained_noise(grain, z.shape[1])                  # (B, C, 2n, 2n)
    alpha, sigma = alpha_sigma(t, path)
    out = network(alpha * z + sigma * noise, t, labels, grain)
    error = (out.float() - target(z, noise, path)).square().mean(dim=1)   # (B, 2n, 2n)
    weights = code_weights(grain)[:, 0]                       # (B, 2n, 2n): 1 fine, 1/4 coarse
    fine = weights == 1
    # (B,) 0 .. 3; T/4 is of the first
    quarter = (4 * (t.ceil() - 1).clamp_min(0) / T).long()
    logs = {"fine": error[fine], "coarse": error[~fine]}
    logs |= {f"quarter_{q + 1}": error[quarter == q] for q in range(4)}
    logs = {name: part.detach().mean() for name, part in logs.items() if part.numel()}
    return (weights * error).sum() / weights.sum(), logs


def guided(network: Callable, z_t: Tensor, t: Tensor, labels: Tensor, grain: Tensor,
           no_class: int, scale: float) -> Tensor:
    """Classifier-free guidance: scale 0 unconditional, 1 plain, above 1 guided."""
    if scale == 1:
        return at_least_float32(network(z_t, t, labels, grain))
    none = torch.full_like(labels, no_class)
    both = network(z_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, none]),
                   grain.repeat(2, 1, 1))                     # (2B, C, 2n, 2n)
    # TRAP: DiT guides 3 of its 4 channels, a remnant of pixel code.
    return guide(*at_least_float32(both).chunk(2), scale)


@torch.no_grad()
def sample(network: Callable, noise: Tensor, labels: Tensor, grain: Tensor, no_class: int,
           path: str = "noise", steps: int = 50, cfg_scale: float = 1.0, eta: float = 0.0,
           generator: torch.Generator | None = None, trace: list | None = None) -> Tensor:
    """Grained noise (B, C, 2n, 2n) -> codes, under maps (B, n, n); see sample() in ../diffusion.py.
    """
    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        return guided(network, z_t, t, labels, grain, no_class, cfg_scale)

    def new_noise() -> Tensor:
        return grained_noise(grain, noise.shape[1], generator)
    return paths.sample(predict, noise, path, steps, eta, new_noise, trace)


if __name__ == "__main__":
    torch.manual_seed(0)
    grain = torch.zeros(1000, 1, 1, dtype=torch.bool)
    wrong, right = torch.randn(1000, 1, 2, 2), grained_noise(grain, 1)
    print("A coarse code is one number in four slots. How large is its noise, which a network")
    print("reads as the mean of the slots?")
    for name, noise in (("four numbers", wrong), ("one number, grained noise", right)):
        print(f"  {name:26} {noise.mean(dim=(2, 3)).std():.2f}")
    print("\nHalf of the noise is missing. What would the samples of such a network look like?")
