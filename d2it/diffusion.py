"""Diffusion on codes: noise, loss, sampler and guidance, all of it on one page.

    t = 0        clean                          z_t = alpha z + sigma noise
    t = T        noise alone
    path "noise" alpha, sigma from 1,000 small steps; the net predicts the noise [DiT]
    path "flow"  a straight line, alpha = 1 - t/T; the net predicts its direction, noise - z [SiT]

Paper    multi-grained noise: a coarse code is one number in four slots, and so is its noise
In       content(z_t, t, labels, grain) -> (B, C, 2n, 2n), any such network; codes of mean 0, std 1
Out      a loss, and samples z (B, C, 2n, 2n)
Differs  every code counts once in the loss; the paper's own formula is not known to us. No learned
         variance, no clipping of latents, no weights over t: what they are for, DiT's users ask
Try      python -m d2it.diffusion      (CPU, a second)
"""
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from d2it.grain import code_weights, grained_noise
from generator import guide
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
    """What the net should say."""
    return noise - z if path == "flow" else noise


def estimates(z_t: Tensor, out: Tensor, t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """What the net said at z_t -> its guess of z and of the noise; mixed as at t, they are z_t."""
    alpha, sigma = alpha_sigma(t, path)
    if path == "flow":
        return z_t - sigma * out, z_t + alpha * out
    return (z_t - sigma * out) / alpha, out


# ------------------------------------------------------------------------------------------------
# learning

def random_times(batch: int, path: str, device=None) -> Tensor:
    """(B,) rising times, one in each B-th of [0, T]: the same distribution, evenly spread [VDM].

    Images come in random order, so which of them gets which time is chance enough.
    """
    t = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) * (T / batch)
    # TRAP: 63 + rand rounds to 64 once in a million times, and T + 1 is no step.
    return t if path == "flow" else (t.floor() + 1).clamp_max(T)


def loss(content: Callable, z: Tensor, labels: Tensor, grain: Tensor, path: str = "noise",
         grain_loss: str = "code") -> tuple[Tensor, dict]:
    """-> mean squared error, a scalar, and what to log: the error by grain and by quarter of T.

    Starts at 1 (path "flow": 2), when the net says nothing. An error near 1 in quarter 1 and near
    0 in quarter 4 is no fault: little noise is hard to see, and much of it is all there is.
    """
    t = random_times(len(z), path, z.device)                  # (B,)
    noise = grained_noise(grain, z.shape[1])                  # (B, C, 2n, 2n)
    alpha, sigma = alpha_sigma(t, path)
    out = content(alpha * z + sigma * noise, t, labels, grain)
    error = (out.float() - target(z, noise, path)).square().mean(dim=1)   # (B, 2n, 2n)
    fine = code_weights(grain)[:, 0] == 1                     # (B, 2n, 2n)
    quarter = (4 * (t.ceil() - 1).clamp_min(0) / T).long()    # (B,) 0 .. 3; T/4 is of the first
    logs = {"fine": error[fine], "coarse": error[~fine]}
    logs |= {f"quarter_{q + 1}": error[quarter == q] for q in range(4)}
    logs = {name: part.detach().mean() for name, part in logs.items() if part.numel()}
    weights = loss_weights(grain, grain_loss)
    return (weights * error).sum() / weights.sum(), logs


def loss_weights(grain: Tensor, grain_loss: str = "code") -> Tensor:
    """How much each slot counts in the loss, (B, 2n, 2n): a code once, or a slot once."""
    weights = code_weights(grain)[:, 0]                       # 1 or 1/4
    return torch.ones_like(weights) if grain_loss == "slot" else weights


# ------------------------------------------------------------------------------------------------
# sampling

def guided(content: Callable, z_t: Tensor, t: Tensor, labels: Tensor, grain: Tensor,
           no_class: int, scale: float) -> Tensor:
    """Classifier-free guidance: scale 0 unconditional, 1 plain, above 1 guided."""
    if scale == 1:
        return at_least_float32(content(z_t, t, labels, grain))
    none = torch.full_like(labels, no_class)
    both = content(z_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, none]),
                   grain.repeat(2, 1, 1))                     # (2B, C, 2n, 2n)
    # TRAP: DiT guides 3 of its 4 channels, a remnant of pixel code.
    return guide(*at_least_float32(both).chunk(2), scale)


def times(steps: int) -> list[int]:
    """Falling whole times, first T, last 0: the last step ends at a clean image."""
    need(1 <= steps <= T, f"steps {steps} must be from 1 to {T}")
    return torch.linspace(T, 0, steps + 1).round().long().tolist()


@torch.no_grad()
def sample(content: Callable, z: Tensor, labels: Tensor, grain: Tensor, no_class: int,
           path: str = "noise", steps: int = 50, cfg_scale: float = 1.0, eta: float = 0.0,
           generator: torch.Generator | None = None, trace: list | None = None) -> Tensor:
    """Noise z (B, C, 2n, 2n) from grained_noise -> codes.

    A step splits z_t into the guessed image and the guessed noise, and mixes them for an earlier
    time. On the path "noise" this is DDIM, and with eta = 1 DDPM, where new noise takes the place
    of a part of the guessed one. On "flow" it is Euler's method, exactly.
    trace   a list to which (t, z_t, guessed z) of every step are appended
    """
    need(eta == 0 or path == "noise", f"eta {eta:g} is for the path noise; leave it 0 on flow")
    need(0 <= eta <= 1, f"eta {eta:g} must be from 0 (DDIM) to 1 (DDPM)")
    for now, then in pairwise(times(steps)):
        t, s = (torch.full((len(z),), time, device=z.device) for time in (now, then))
        out = guided(content, z, t, labels, grain, no_class, cfg_scale)
        z_hat, noise_hat = estimates(z, out, t, path)
        if trace is not None:
            trace.append((now, z, z_hat))
        (a_t, s_t), (a_s, s_s) = alpha_sigma(t, path), alpha_sigma(s, path)
        fresh = eta * s_s / s_t * (1 - (a_t / a_s).square()).sqrt()           # DDIM, its sigma
        z = a_s * z_hat + (s_s.square() - fresh.square()).clamp_min(0).sqrt() * noise_hat
        if eta:
            z = z + fresh * grained_noise(grain, z.shape[1], generator)
    return z


if __name__ == "__main__":
    print("How much of a code is signal and how much noise?   (alpha, sigma)")
    for t in (0, 1, 100, 250, 500, 750, 1000):
        cells = [alpha_sigma(torch.tensor([t]), path) for path in ("noise", "flow")]
        text = [f"{alpha.item():.3f} {sigma.item():.3f}" for alpha, sigma in cells]
        print(f"  t {t:4}    noise {text[0]}    flow {text[1]}")
    print("\nHalfway DiT's path has lost nearly all signal, the straight line half of it. Which")
    print("steps decide where things are, and which ones how sharp they get?")
