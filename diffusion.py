"""Diffusion: two paths from data to noise, and a sampler that goes back.

    t = 0        clean                          z_t = alpha z + sigma noise
    t = T        noise alone
    path "noise" alpha, sigma from 1,000 small steps; the net predicts the noise [DiT]
    path "flow"  a straight line, alpha = 1 - t/T; the net predicts its direction, noise - z [SiT]

In       z (B, C, H, W) of about unit scale: D²iT's codes, or the images of flow_decoder.py
         predict(z_t, t) -> (B, C, H, W), what target() asks for; t (B,) from 0 to T
Out      samples z (B, C, H, W)
Differs  no learned variance, no clipping, no weights over t, which DiT's code has
Try      python diffusion.py      (CPU, a second)
"""
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from layers import at_least_float32
from plumbing.flags import need

T = 1000  # steps of the path "noise" [DDPM, DiT]

# ------------------------------------------------------------------------------------------------
# the two paths

# What is left of the signal's variance after t steps, counted as in the DDPM paper: 1 at t = 0.
# TRAP: DiT's code counts from 0; its 999 is our 1000. Mixed up, the last step leaves noise.
KEPT = torch.cat([torch.ones(1, dtype=torch.float64),
                  torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), dim=0)])


def alpha_sigma(t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """t (B,) from 0 to T -> alpha, sigma (B, 1, 1, 1): how much is signal, how much noise."""
    if path == "flow":
        sigma = t.double() / T
        alpha = 1 - sigma
    else:
        kept = KEPT.to(t.device)[t.long()]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    return alpha.float().view(-1, 1, 1, 1), sigma.float().view(-1, 1, 1, 1)


def target(z: Tensor, noise: Tensor, path: str) -> Tensor:
    """What the net should predict."""
    return noise - z if path == "flow" else noise


def estimates(z_t: Tensor, out: Tensor, t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """The net's output at z_t -> its guess of z and of the noise; mixed as at t, they are z_t."""
    alpha, sigma = alpha_sigma(t, path)
    if path == "flow":
        return z_t - sigma * out, z_t + alpha * out
    return (z_t - sigma * out) / alpha, out


# ------------------------------------------------------------------------------------------------
# times

def random_times(batch: int, path: str, device=None) -> Tensor:
    """(B,) rising times, one in each B-th of [0, T]: the same distribution, evenly spread [VDM].

    Images are shuffled, so times may be sorted.
    """
    t = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) * (T / batch)
    # TRAP: 63 + rand rounds to 64 once in a million times, and T + 1 is no step.
    return t if path == "flow" else (t.floor() + 1).clamp_max(T)


def times(steps: int) -> list[int]:
    """Falling whole times, first T, last 0: the last step ends at a clean image."""
    need(1 <= steps <= T, f"steps {steps} must be from 1 to {T}")
    return torch.linspace(T, 0, steps + 1).round().long().tolist()


# ------------------------------------------------------------------------------------------------
# sampling

@torch.no_grad()
def sample(predict: Callable, z: Tensor, path: str = "noise", steps: int = 50, eta: float = 0.0,
           new_noise: Callable[[], Tensor] | None = None, trace: list | None = None) -> Tensor:
    """Noise z (B, C, H, W) -> data.

    A step splits z_t into the guessed data and the guessed noise, and mixes them for an earlier
    time. On the path "noise" this is DDIM, and with eta = 1 DDPM, where new noise takes the place
    of a part of the guessed one. On "flow" it is Euler's method, exactly.
    new_noise   () -> noise like z, for eta above 0
    trace       a list to which (t, z_t, guessed z) of every step are appended
    """
    need(eta == 0 or path == "noise", f"eta {eta:g} is for the path noise; leave it 0 on flow")
    need(0 <= eta <= 1, f"eta {eta:g} must be from 0 (DDIM) to 1 (DDPM)")
    for now, then in pairwise(times(steps)):
        t, s = (torch.full((len(z),), time, device=z.device) for time in (now, then))
        out = at_least_float32(predict(z, t))
        z_hat, noise_hat = estimates(z, out, t, path)
        if trace is not None:
            trace.append((now, z, z_hat))
        (a_t, s_t), (a_s, s_s) = alpha_sigma(t, path), alpha_sigma(s, path)
        fresh = eta * s_s / s_t * (1 - (a_t / a_s).square()).sqrt()           # DDIM, its sigma
        z = a_s * z_hat + (s_s.square() - fresh.square()).clamp_min(0).sqrt() * noise_hat
        if eta:
            z = z + fresh * new_noise()
    return z


if __name__ == "__main__":
    print("How much of z_t is signal and how much noise?   (alpha, sigma)")
    for t in (0, 1, 100, 250, 500, 750, 1000):
        cells = [alpha_sigma(torch.tensor([t]), path) for path in ("noise", "flow")]
        text = [f"{alpha.item():.3f} {sigma.item():.3f}" for alpha, sigma in cells]
        print(f"  t {t:4}    noise {text[0]}    flow {text[1]}")
    print("\nHalfway DiT's path has lost nearly all signal, the straight line half of it. Which")
    print("steps decide where things are, and which ones how sharp they get?")
