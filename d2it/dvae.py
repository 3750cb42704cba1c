"""The Dynamic VAE: four codes for a cell with detail, one for a cell without, one decoder for both.

    pixels ─► grain map ─────────────────────┐
    images ─► trunk ─┬─► fine head    (2n)² ─┴► merge ─► mean, logvar ─► z ─► decoder ─► images
                     └─► coarse head   n²  ───┘         (B, C, 2n, 2n)

Paper    stage 1, with a hierarchical encoder: one trunk, one head per grid. Irregular codes are
         copied to the finest grid, so that an ordinary convolutional decoder can read them
In       images float32 (B, 3, H, W) in [-1, 1] and their grain maps, bool (B, n, n)
Out      Codes(z, grain): z (B, C, 2n, 2n), of mean 0 and std 1 per channel and grain; and back
Differs  - the decoder never sees the map; it has a learned vector for each corner of a cell, or
           four equal codes could not tell which quarter of the cell each stands for [ours]
         - no attention in trunk and decoder, which DQ-VAE has [ours]
Try      python -m d2it.dvae      (CPU, two seconds)
"""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2it.grain import entropy, grain_map, grained_noise, merge, per_code, spread, threshold
from d2it.presets import DVAEConfig, load_preset, norm_groups
from layers import ExactBuffers, as_weights, at_least_float32, count_parameters
from nativetok import as_it_is
from plumbing import checkpoint
from plumbing.flags import as_dict, build, need
from plumbing.given import described, need_here, need_map, need_pixels
from plumbing.images import to_float
from plumbing.run import unfinished


class Codes(NamedTuple):
    """What an image is to the second stage. z is constant in the 2x2 block of every coarse cell."""
    z: Tensor  # (B, C, 2n, 2n)
    grain: Tensor  # bool (B, n, n)


# ------------------------------------------------------------------------------------------------
# parts

def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(norm_groups(width), width)


class ResBlock(nn.Module):
    """(B, in, h, w) -> (B, out, h, w) [DDPM, without its time]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = nn.Sequential(
            norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1),
            norm(outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


def blocks(inputs: int, outputs: int, count: int) -> list[nn.Module]:
    return [ResBlock(inputs if i == 0 else outputs, outputs) for i in range(count)]


def head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1))


class Encoder(nn.Module):
    """images (B, 3, H, W) -> fine (B, 2C, 2n, 2n), coarse (B, 2C, n, n): mean, logvar on each."""

    def __init__(self, cfg: DVAEConfig):
        super().__init__()
        widths = [m * cfg.dvae_width for m in cfg.dvae_mults]                 # H, H/2, ..., H/S
        enter = nn.Conv2d(3, widths[0], 3, padding=1)
        levels = [nn.Sequential(enter, *blocks(widths[0], widths[0], cfg.dvae_blocks))]
        for above, width in zip(widths, widths[1:]):
            halve = nn.Conv2d(above, above, 3, stride=2, padding=1)
            levels.append(nn.Sequential(halve, *blocks(above, width, cfg.dvae_blocks)))
        self.trunk, self.last = nn.Sequential(*levels[:-1]), levels[-1]
        half, full, outputs = widths[-2], widths[-1], 2 * cfg.code_dim
        self.fine = nn.Sequential(ResBlock(half, half), head(half, outputs))
        self.coarse = nn.Sequential(ResBlock(full, full), head(full, outputs))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = as_weights(images, self.trunk[0][0].weight)
        x = self.trunk(images)                                # (B, width, 2n, 2n)
        return self.fine(x), self.coarse(self.last(x))


class Decoder(nn.Module):
    """latents (B, C, 2n, 2n) -> images (B, 3, H, W)."""

    def __init__(self, cfg: DVAEConfig):
        super().__init__()
        # The coarsest level has no place here: the latent starts one above it.
        *widths, widest = [m * cfg.dvae_width for m in cfg.dvae_mults]
        self.enter = nn.Conv2d(cfg.code_dim, widest, 3, padding=1)
        self.corner = nn.Parameter(torch.zeros(1, widest, 2, 2))
        layers, inputs = [], widest
        for level, width in enumerate(reversed(widths)):
            if level:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, inputs, 3, padding=1)]
            layers += blocks(inputs, width, cfg.dvae_blocks + 1)
            inputs = width
        self.body = nn.Sequential(*layers, head(inputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(as_weights(x, self.corner))            # (B, widest, 2n, 2n)
        n = x.shape[-1] // 2
        return self.body(x + self.corner.repeat(1, 1, n, n))


# ------------------------------------------------------------------------------------------------
# the whole

class DVAE(ExactBuffers):
    """Keeps what belongs to its codes: the threshold of its maps, the statistics of its latents.

    They are buffers, so they are saved, loaded and fingerprinted with the weights. They keep their
    type: the maps are the same when the weights are bfloat16.
    TRAP: the averaged copy of the weights has buffers of its own; set them in both (train.py).
    """
    fingerprint = ""  # of these very weights and settings; load() knows it
    unfinished = ""   # how far training had come; load() knows it

    def __init__(self, cfg: DVAEConfig):
        super().__init__()
        self.cfg, C = cfg, cfg.code_dim
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        # the entropy above which a cell is fine
        self.register_buffer("limit", torch.zeros((), dtype=torch.float64))
        # row 0: of coarse codes; row 1: of fine ones
        self.register_buffer("latent_mean", torch.zeros(2, C))
        self.register_buffer("latent_std", torch.ones(2, C))

    # --- maps

    def calibrate(self, scores: Tensor) -> None:
        """Entropies (m, n, n) of training images -> the threshold of the maps."""
        self.limit.fill_(threshold(scores, self.cfg.grain_ratio))

    def entropy(self, pixels: Tensor) -> Tensor:
        return entropy(pixels, self.cfg.cell_size)            # (B, n, n)

    def grain_of(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> bool (B, n, n). Raises UserError for images of another size."""
        cfg = self.cfg
        need_pixels(pixels, cfg.image_size, self.limit)
        return grain_map(pixels, cfg.cell_size, self.limit.item(), cfg.grain_policy)

    # --- codes

    def moments(self, images: Tensor, grain: Tensor) -> tuple[Tensor, Tensor]:
        """-> mean, logvar (B, C, 2n, 2n), each cell from the head of its grain."""
        fine, coarse = self.encoder(images)
        mean, logvar = at_least_float32(merge(fine, coarse, grain)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                    # [LDM]

    @staticmethod
    def draw(mean: Tensor, logvar: Tensor, grain: Tensor,
             generator: torch.Generator | None = None) -> Tensor:
        """A sample of the posterior: one noise per code, so that a coarse block stays constant."""
        # TRAP: randn_like(mean) also runs, and gives a coarse code four different values.
        return mean + torch.exp(0.5 * logvar) * grained_noise(grain, mean.shape[1], generator)

    def forward(self, images: Tensor, grain: Tensor) -> tuple[Tensor, Tensor]:
        """-> recon (B, 3, H, W) float32, KL divergence in nats per number of a code, a scalar."""
        mean, logvar = self.moments(images, grain)
        recon = self.decoder(self.draw(mean, logvar, grain)).float()
        return recon, per_code(kl(mean, logvar), grain)

    def standardised(self, z: Tensor, grain: Tensor, back: bool = False) -> Tensor:
        """z (B, C, 2n, 2n) -> (z - mean) / std by channel and grain, or back.

        The diffusion's noise has variance 1, so its data should have it too; latent diffusion's
        0.18215 does the same with one number for all channels, measured once for one VAE.
        """
        # (2, C) -> (B, n, n, C) -> (B, C, 2n, 2n)
        mean, std = (spread(table[grain.long()].permute(0, 3, 1, 2))
                     for table in (self.latent_mean, self.latent_std))
        return z * std + mean if back else (z - mean) / std

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Codes:
        """uint8 (B, H, W, 3) -> standardised codes, drawn from the posterior anew at every call."""
        grain = self.grain_of(pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # bf16 would round what is learned
            z = self.draw(*self.moments(to_float(pixels), grain), grain, generator)
        return Codes(self.standardised(z, grain), grain)

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """-> images (B, 3, H, W). No clipping of z: a latent has no range that it could leave.

        Raises UserError for what are no codes of this DVAE, and for images that are not finite.
        """
        need(isinstance(codes, tuple) and len(codes) == 2, f"codes are {described(codes)}; give "
             "Codes(z, grain), as encode() and D2iT.sample() make them")
        z, grain = codes
        side, C = self.cfg.side, self.cfg.code_dim
        takes = f"z (B, {C}, {2 * side}, {2 * side}), floats"
        need_here("codes", z, self.limit, takes)
        need(z.ndim == 4 and len(z) and z.shape[1:] == (C, 2 * side, 2 * side)
             and z.is_floating_point(), f"codes are {described(z)}; give {takes}")
        need_map(grain, len(z), side, self.limit)
        images = self.decoder(self.standardised(z, grain, back=True)).float()
        need(images.isfinite().all(), "decoded images are not finite (nan or inf); are the "
             "weights those of a training that diverged?")
        return images

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Batches of uint8 (B, H, W, 3) -> mean and std of their codes, kept for standardised()."""
        count = self.limit.new_zeros(2, 1)
        total, square = self.limit.new_zeros(2, 2, self.cfg.code_dim)
        for pixels in batches:
            grain = self.grain_of(pixels)
            z = self.draw(*self.moments(to_float(pixels), grain), grain).double()
            # TRAP: one row for all slots would count a coarse code four times. Within a grain every
            # code has as many slots as any other, so here slots will do.
            fine = spread(grain[:, None])[:, 0]               # (B, 2n, 2n)
            for row, mine in enumerate((~fine, fine)):
                codes = z.permute(0, 2, 3, 1)[mine]           # (slots, C)
                count[row] += len(codes)
                total[row] += codes.sum(dim=0)
                square[row] += codes.square().sum(dim=0)
        mean = total / count.clamp_min(1)
        std = (square / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
        self.latent_mean.copy_(mean)
        # A grain that never occurs, as under the policies coarse and fine, keeps 1.
        # So does a number that is the same in all codes: nothing can be divided by a spread of 0.
        self.latent_std.copy_(torch.where((count > 0) & (std > 1e-6), std, 1.0))

    @staticmethod
    def load(path: str, change: Callable = as_it_is) -> "DVAE":
        """The averaged weights in a checkpoint, in eval mode.

        change   what train.main(change_dvae=...) was given, if it was given something
        """
        saved = checkpoint.load(path)
        need("dvae_config" in saved, f"{path} holds no DVAE; give a dvae.pt of d2it.train")
        model = change(DVAE(build((DVAEConfig,), saved["dvae_config"])[0]))
        checkpoint.load_strict(model, saved["ema"], path)
        model.fingerprint, model.unfinished = fingerprint(model), unfinished(saved, path)
        return model.eval()


def fingerprint(model: DVAE) -> str:
    # The cell's size was a setting once, and what was trained then knows its DVAE by this.
    settings = {**as_dict(model.cfg), "cell_size": model.cfg.cell_size}
    return checkpoint.fingerprint(model.state_dict(), settings)


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), by element, in nats."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


if __name__ == "__main__":
    import numpy as np

    from plumbing.shapes import draw_shape, numbers

    torch.manual_seed(0)
    model = DVAE(load_preset("d2it-tiny")[0])
    for part in ("encoder", "decoder"):
        print(f"{part:10}{count_parameters(getattr(model, part)):>10,} parameters")
    pixels = torch.from_numpy(np.stack([draw_shape(number) for number in numbers("train")[:200]]))
    model.calibrate(model.entropy(pixels))
    model.measure([pixels])
    codes = model.encode(pixels[:1])
    print("\nThe map of one shape, and the first channel of its codes before anything is learned:")
    for row, values in enumerate(codes.z[0, 0]):
        cells = " ".join(".#"[fine] for fine in codes.grain[0, row // 2].tolist())
        print(f"{'' if row % 2 else cells:10}", *(f"{v:6.2f}" for v in values.tolist()))
    print("\nWhere the map has a dot, four slots hold one number. Which would change if the noise")
    print("of the posterior were drawn for every slot?")
