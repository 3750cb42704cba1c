"""The arms of grain.py: ways to spend codes on an image, and ways to learn to draw these codes.

Shared   images and their order, sizes of the networks, steps, rates. In entropy, static, random,
         inverted and error an image has the same number of fine cells, so the same number of codes
Numbers  coarse10 has as many numbers an image as entropy has on average, and fewer codes; fine2 and
         fine3 have fewer and more numbers, and more codes
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2it.dvae import DVAE
from d2it.grain import entropy, take_top
from plumbing.images import to_float


@dataclass(frozen=True)
class Arm:
    settings: dict = field(default_factory=dict)  # of d2it.train, beside those that all arms share
    codes: str = ""  # the arm whose codes it learns to draw; empty: it makes codes itself
    everywhere: bool = False  # RefineNet looks at the codes of all cells


BASE = "entropy"
CODES = {
    "coarse": Arm(dict(grain_policy="coarse")),
    "fine": Arm(dict(grain_policy="fine")),
    BASE: Arm(),
    "static": Arm(dict(grain_policy="static")),
    "random": Arm(dict(grain_policy="random")),
    "inverted": Arm(dict(grain_policy="inverted")),
    "coarse10": Arm(dict(grain_policy="coarse", code_dim=10)),
    "fine2": Arm(dict(grain_policy="fine", code_dim=2)),
    "fine3": Arm(dict(grain_policy="fine", code_dim=3)),
    "error": Arm(),  # its maps are handed in, see fine_where_it_fails
    "r25": Arm(dict(grain_ratio=0.25)),
    "r75": Arm(dict(grain_ratio=0.75)),
}
PLAIN = dict(content_depth=6, refine_depth=0)
IMAGES = {
    "dit-fine": Arm(PLAIN, "fine"),
    "dit-coarse10": Arm(PLAIN, "coarse10"),
    "d2it-6+0": Arm(PLAIN, BASE),
    "d2it-4+2": Arm({}, BASE),
    "d2it-3+3": Arm(dict(content_depth=3, refine_depth=3), BASE),
    "d2it-slot": Arm(dict(grain_loss="slot"), BASE),
    "d2it-static": Arm({}, "static"),
    "d2it-all": Arm({}, BASE, everywhere=True),
    # the sweep of r; d2it-4+2 is its middle
    "d2it-r0": Arm({}, "coarse"),
    "d2it-r25": Arm({}, "r25"),
    "d2it-r75": Arm({}, "r75"),
    "d2it-r100": Arm({}, "fine"),
}
ARMS = {**CODES, **IMAGES}
# Only when asked for: half of the shapes' cells are flat and tie, so on them r75 is entropy.
EXTRA = ("r75", "d2it-r75")
SWEEP = {0: ("coarse", "d2it-r0"), 0.25: ("r25", "d2it-r25"), 0.5: (BASE, "d2it-4+2"),
         0.75: ("r75", "d2it-r75"), 1: ("fine", "d2it-r100")}
THREE_MAPS = "d2it-4+2"  # is sampled under true and random maps too


@dataclass(frozen=True)
class Plan:
    preset: str
    sizes: dict  # settings of the preset that change here
    num_samples: int  # images of each kind that are drawn
    sampling_steps: int
    judge_steps: int


PLANS = {
    "tiny": Plan("d2it-tiny", dict(dvae_steps=600, grain_steps=400, content_steps=600),
                 500, 25, 500),
    "cifar-cpu": Plan("d2it-cifar", dict(
        dvae_width=16, content_width=128, content_heads=4, ema_decay=0.995, dvae_steps=1000,
        grain_steps=600, content_steps=2000), 1000, 25, 1000),
    "quick": Plan("d2it-tiny", dict(
        dvae_width=8, content_width=32, content_heads=2, grain_width=32, grain_depth=1,
        grain_heads=2, batch_size=8, dvae_steps=12, grain_steps=4, content_steps=12, log_every=2),
        20, 2, 4),
}


# ------------------------------------------------------------------------------------------------
# maps by error

def fine_where_it_fails(coarse: DVAE, limit: float) -> Callable[[Tensor], Tensor]:
    """-> pixels -> grain: as many fine cells as the entropy map has, where `coarse` is far off.

    A better map than entropy's, if there is one: it knows what a coarse code will lose. Nobody
    could draw it for an image that is not there yet.
    """
    S = coarse.cfg.cell_size

    @torch.no_grad()
    def maps(pixels: Tensor) -> Tensor:
        images = to_float(pixels)
        # The mean of the posterior: a map must not change from one look at an image to the next.
        mean, _ = coarse.moments(images, coarse.grain_of(pixels))
        off = (coarse.decoder(mean) - images).square().mean(dim=1)            # (B, H, W)
        off = off.unflatten(2, (-1, S)).unflatten(1, (-1, S)).mean(dim=(2, 4))        # (B, n, n)
        return take_top(off, (entropy(pixels, S) > limit).flatten(1).sum(dim=1))
    return maps
