"""Where does an image need detail? The grain map, and everything that follows from it alone.

Paper    Sec. 3, Dynamic Grained Coding: the entropy of the gray levels in a cell of S x S pixels;
         above a threshold the cell is fine and gets four codes of C numbers, else it is coarse and
         gets one, which is copied to its four slots, the places of the 2n x 2n latent
In       pixels uint8 (B, H, W, 3); everything about maps starts there, and not at floats whose
         range one would have to remember
Out      grain bool (B, n, n), True where fine; n = H / S cells on a side
Differs  - bins are the 256 gray levels and 20 on either side. With the paper's 256 bins on [0, 1]
           half of the kernel falls off at the ends: flat black scores 0.6 less than flat gray
         - scores are computed in double precision: the same maps on all machines
Try      python -m d2it.grain      (CPU, two seconds; draws grain.png)
"""
import functools

import torch
from torch import Tensor

from plumbing.flags import need
from plumbing.given import described

SIGMA = 0.01  # width of the kernel, as a share of the way from black to white [paper]
MARGIN = 20  # bins beyond black and white: 7.8 sigma, so that nothing is cut off [ours]
POLICIES = ("entropy", "coarse", "fine")


# ------------------------------------------------------------------------------------------------
# entropy

def gray(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> gray levels int64 (B, H, W), 0..255; integers are alike everywhere."""
    r, g, b = pixels.long().unbind(-1)
    return (299 * r + 587 * g + 114 * b + 500) // 1000


@functools.cache
def kernel() -> Tensor:
    """(256, 296): how much a pixel of each gray level counts in each bin."""
    level = torch.arange(256, dtype=torch.float64)[:, None]
    bins = torch.arange(-MARGIN, 256 + MARGIN, dtype=torch.float64)
    return torch.exp(-0.5 * ((level - bins) / (255 * SIGMA)).square())


def entropy(pixels: Tensor, cell: int) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, n, n): entropy of each cell's gray levels, in nats.

    The paper sums a Gaussian over the pixels for every bin. Pixels of one level have one Gaussian,
    so counting levels first costs a histogram and one matrix product, and gives the same.
    Anchors: any flat cell 2.355; half black, half white 2.355 + ln 2; all 256 levels alike 5.6.
    """
    # TRAP: floats from 0 to 1 would run as well, and all of them are level 0 or 1.
    need(isinstance(pixels, Tensor) and pixels.dtype == torch.uint8 and pixels.ndim == 4
         and pixels.shape[-1] == 3 and pixels.shape[1] == pixels.shape[2]
         and pixels.shape[1] % cell == 0, f"images are {described(pixels)}; entropy takes uint8 "
         f"(B, H, H, 3), H a multiple of {cell}")
    B, H, W, _ = pixels.shape
    n, S = H // cell, cell
    levels = gray(pixels).reshape(B, n, S, n, S).transpose(2, 3).reshape(B * n * n, S * S)
    histogram = torch.zeros(B * n * n, 256, dtype=torch.float64, device=pixels.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float64))
    p = histogram @ kernel().to(pixels.device)                # (B*n*n, 256) -> (B*n*n, 296)
    p = p / p.sum(dim=1, keepdim=True)
    # TRAP: in float32 a GPU multiplies with three digits (TF32), and has other maps than a CPU.
    # Summed as doubles and then rounded, all flat cells score the same, and none passes by chance.
    return torch.special.entr(p).sum(dim=1).reshape(B, n, n).float()


def threshold(scores: Tensor, ratio: float) -> float:
    """Scores of many cells, any shape -> the score that a share `ratio` of them is strictly above.

    Fewer than that when cells tie with it: half of the built-in shapes' cells are flat.
    """
    falling = scores.flatten().sort(descending=True).values
    wanted = round(ratio * len(falling))
    return falling[wanted].item() if wanted < len(falling) else falling[-1].item() - 1


# ------------------------------------------------------------------------------------------------
# maps

def grain_map(pixels: Tensor, cell: int, limit: float, policy: str = "entropy") -> Tensor:
    """uint8 (B, H, W, 3) -> grain bool (B, n, n), True where fine. An image has one map, always.

    policy   entropy: cells above the limit [paper]; coarse: none; fine: all of them
    """
    grain = entropy(pixels, cell) > limit                     # (B, n, n)
    return grain if policy == "entropy" else torch.full_like(grain, policy == "fine")


def take_top(ranking: Tensor, count: Tensor) -> Tensor:
    """ranking (B, n, n), count (B,) -> bool (B, n, n): the `count` highest of each image."""
    order = ranking.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1)                              # (B, n*n), 0 for the highest
    return (place < count[:, None]).view_as(ranking)


def count_codes(grain: Tensor) -> Tensor:
    """grain (B, n, n) -> int64 (B,): one code a cell, three more if it is fine."""
    return grain[0].numel() + 3 * grain.flatten(1).sum(dim=1)


# ------------------------------------------------------------------------------------------------
# two grids in one: coarse cells are constant 2x2 blocks of the fine grid

def spread(x: Tensor) -> Tensor:
    """(B, C, n, n) -> (B, C, 2n, 2n): every value copied to the four slots of its cell."""
    return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def merge(fine: Tensor, coarse: Tensor, grain: Tensor) -> Tensor:
    """fine (B, C, 2n, 2n), coarse (B, C, n, n) -> (B, C, 2n, 2n): each cell from its own grid."""
    return torch.where(spread(grain[:, None]), fine, spread(coarse))


def code_weights(grain: Tensor) -> Tensor:
    """(B, 1, 2n, 2n): 1 in a fine slot, 1/4 in a copied one, so that every *code* counts once.

    TRAP: a plain mean over slots runs too, and lets a coarse code weigh as much as four fine ones.
    """
    return torch.where(spread(grain[:, None]), 1.0, 0.25)


def per_code(x: Tensor, grain: Tensor) -> Tensor:
    """The mean of x (B, C, 2n, 2n) over codes and channels, a scalar in float32."""
    weights = code_weights(grain)
    return (weights * x.float()).sum() / (weights.sum() * x.shape[1])


def grained_noise(grain: Tensor, channels: int, generator: torch.Generator | None = None) -> Tensor:
    """(B, C, 2n, 2n) of unit variance: one draw per code, copied to its slots.

    Drawn on the generator's own device, so a CPU one gives every machine the same noise.
    TRAP: independent noise in all slots also runs; a coarse code's four independent noises then
    average to half of the noise that its time stands for.
    """
    (B, n, _), device = grain.shape, generator.device if generator else grain.device
    fine = torch.randn(B, channels, 2 * n, 2 * n, generator=generator, device=device)
    coarse = torch.randn(B, channels, n, n, generator=generator, device=device)
    return merge(fine.to(grain.device), coarse.to(grain.device), grain)


# ------------------------------------------------------------------------------------------------
# only the fine cells, side by side: what makes the second network cheap

def pack(x: Tensor, grain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, n*n, ...) -> the fine cells' rows (B, M, ...), keep bool (B, M), index (B, M).

    M is the most that any image of the batch has, at least 1, as attention over no rows at all is
    not defined everywhere; images with fewer are filled up with coarse cells, where keep is False.
    """
    flat = grain.flatten(1)
    most = max(1, int(flat.sum(dim=1).max()))
    order = (~flat).to(torch.uint8).argsort(dim=1, stable=True)         # fine ones first
    index = order[:, :most]
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index], flat.gather(1, index), index


def unpack(packed: Tensor, keep: Tensor, index: Tensor, length: int) -> Tensor:
    """The way back: (B, M, ...) -> (B, length, ...), zero where nothing was kept."""
    keep = keep.view(*keep.shape, *[1] * (packed.ndim - 2))
    out = packed.new_zeros(len(packed), length, *packed.shape[2:])
    rows = torch.arange(len(packed), device=packed.device)[:, None]
    return out.index_put((rows, index), packed * keep)


# ------------------------------------------------------------------------------------------------
# pictures

def painted(pixels: Tensor, grain: Tensor) -> Tensor:
    """uint8 (B, H, W, 3): the images, fine cells in red and coarse ones in blue."""
    S = pixels.shape[1] // grain.shape[1]
    fine = grain.repeat_interleave(S, dim=1).repeat_interleave(S, dim=2)[..., None].cpu()
    tint = torch.where(fine, torch.tensor([255., 60, 50]), torch.tensor([40., 90, 230]))
    return (0.6 * pixels.float() + 0.4 * tint).to(torch.uint8)


def heat(scores: Tensor, side: int) -> Tensor:
    """Entropies (B, n, n) as gray images uint8 (B, side, side, 3): flat is black, 4.5 white."""
    level = (255 * (scores - 2.355) / (4.5 - 2.355)).clamp(0, 255).to(torch.uint8).cpu()
    S = side // level.shape[1]
    level = level.repeat_interleave(S, dim=1).repeat_interleave(S, dim=2)
    return level[..., None].expand(-1, -1, -1, 3)


def main() -> None:
    """Draws grain.png where one stands."""
    import numpy as np

    from plumbing.images import save_grid
    from plumbing.shapes import draw_shape, numbers

    pixels = torch.from_numpy(np.stack([draw_shape(number) for number in numbers("train")[:500]]))
    scores = entropy(pixels, 8)
    maps = {share: scores > threshold(scores, share) for share in (0.25, 0.5, 0.75)}
    rows = [pixels[:10], heat(scores[:10], 32)]
    rows += [painted(pixels[:10], grain[:10]) for grain in maps.values()]
    save_grid(torch.cat(rows), "grain.png", columns=10, scale=2)
    print("grain.png: ten shapes, their entropy, and three maps: more and more cells are fine\n")
    flat = (scores == scores.min()).float().mean()
    print(f"{len(pixels)} shapes in cells of 8 pixels; {flat:.0%} of the cells are flat.")
    for share, grain in maps.items():
        print(f"  {share:.0%} of the cells are to be fine, {grain.float().mean():.1%} are: "
              f"{count_codes(grain).float().mean():.1f} codes an image, of 64")
    print("\nWhy do the last two agree? And would a gradient from black to white, which no one")
    print("calls detailed, be fine or coarse?")


if __name__ == "__main__":
    from plumbing.start import main_with_user_errors

    main_with_user_errors(main)
