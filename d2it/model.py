"""D²iT, the three of them joined: class -> map -> codes -> image.

    labels ─► grain transformer ─► map ─► content transformer, 50 steps ─► codes ─► DVAE ─► images
              (B, n, n) bool              (B, C, 2n, 2n), from grained noise

Paper    the map is predicted first, then the noise of both grains; samples of the headline numbers
         are drawn under predicted maps
In       the folder of a run of d2it.train
Out      images uint8; for a given map too, which is how the paper compares true and random maps
Differs  the grain transformer is generator.py's, left to right over n² tokens, fine or coarse.
         It *samples* a map. A network that only sees the class and learns by cross-entropy would
         answer with the class's mean map, and every disc would be in the middle
Try      python -m d2it.sample --run runs/d2it-tiny
"""
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import GUIDANCE
from d2it import diffusion
from d2it.content import Content
from d2it.dvae import DVAE, Codes
from d2it.grain import grained_noise, take_top
from generator import ARGenerator, Generator
from nativetok import as_it_is
from plumbing.flags import need
from plumbing.given import need_generator, need_labels, need_map, need_number, need_pixels
from plumbing.images import to_uint8
from plumbing.run import need_parts

PIXELS = 1 << 16  # of images whose entropies are in memory at a time


class D2iT(nn.Module):
    """dvae, grain and content of one run, in eval mode; .classes are the names of the labels."""

    def __init__(self, dvae: DVAE, grain: ARGenerator, content: Content, classes: list[str]):
        super().__init__()
        self.dvae, self.grain, self.content, self.classes = dvae, grain, content, classes
        parts = (getattr(part, "unfinished", "") for part in (dvae, grain, content))
        self.unfinished = "; ".join(filter(None, parts))  # how far training had come

    @staticmethod
    def of_run(folder: str, device: torch.device, change_dvae: Callable = as_it_is,
               change_content: Callable = as_it_is) -> "D2iT":
        """Raises UserError when a part is missing or was trained with another DVAE.

        change_dvae, change_content   what train.main was given, if it was given something
        """
        names = ("dvae.pt", "grain.pt", "content.pt")
        need_parts(folder, names, "-m d2it.train")
        paths = [os.path.join(folder, name) for name in names]
        dvae, grain = DVAE.load(paths[0], change_dvae), Generator.load(paths[1])
        content = Content.load(paths[2], change_content)
        # TRAP: codes of another DVAE have the same shape, and decode to noise.
        for stage, path, learned in ((2, paths[1], grain.tokenizer_fingerprint),
                                     (3, paths[2], content.fingerprint)):
            need(learned == dvae.fingerprint, f"{path} has learned from another DVAE than the "
                 f"dvae.pt beside it; delete {path} and retrain it: "
                 f"python -m d2it.train --run {folder} --stage {stage}")
        return D2iT(dvae, grain, content, grain.classes).to(device).eval()

    @torch.no_grad()
    def maps(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """labels (B,) -> bool (B, n, n), drawn as learned: without guidance, at temperature 1."""
        n = self.dvae.cfg.side
        return self.grain.sample(labels, generator=generator).view(-1, n, n).bool()

    @torch.no_grad()
    def sample(self, labels: Tensor, cfg_scale: float = GUIDANCE, steps: int = 50,
               eta: float = 0.0, generator: torch.Generator | None = None,
               grain: Tensor | None = None, trace: list | None = None) -> Codes:
        """labels (B,) -> codes. The same generator state gives the same bits.

        cfg_scale   guidance of the content: 0 unconditional, 1 plain, above 1 guided (default: 2)
        grain       a map (B, n, n) to use in place of a predicted one
        Raises UserError for labels, maps and settings that are none.
        """
        cfg, n, here = self.content.cfg, self.dvae.cfg.side, self.dvae.limit
        need_labels(labels, len(self.classes), here)
        need_generator(generator)
        need_number("cfg_scale", cfg_scale)
        need_number("steps", steps, 1, diffusion.T, whole=True)
        need_number("eta", eta, 0, 1)
        labels = labels.long()
        if grain is None:
            grain = self.maps(labels, generator)
        need_map(grain, len(labels), n, here)
        noise = grained_noise(grain, self.content.channels, generator)
        z = diffusion.sample(self.content, noise, labels, grain, self.content.classes, cfg.path,
                           steps, cfg_scale, eta, generator, trace)
        return Codes(z, grain)

    def decode(self, codes: Codes) -> Tensor:
        """-> images (B, 3, H, W) in about [-1, 1]."""
        return self.dvae.decode(codes)

    def draw(self, labels: Tensor, options: dict, seed: int, batch: int,
             grain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Batch number `batch` of a set of samples -> uint8 (B, H, W, 3), their maps, on the CPU.

        Its noise is a function of (seed, batch) alone, and the CPU's on every machine.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + batch)
        codes = self.sample(labels, generator=generator, grain=grain, **options)
        return to_uint8(self.decode(codes)).cpu(), codes.grain.cpu()

    def obeyed(self, images: Tensor, grain: Tensor) -> float:
        """Have samples uint8 (B, H, W, 3) their detail where their maps asked for it?

        Of each image as many cells are looked for as its map has fine ones, the most detailed.
        (Not those above the threshold: a decoder's faint noise lifts flat cells above it.) The mean
        of two shares, fine cells that are among them and coarse ones that are not: 1 all, 0.5
        chance.
        """
        need_pixels(images.cpu() if isinstance(images, Tensor) else images,
                    self.dvae.cfg.image_size, torch.empty(0))
        need_map(grain.cpu() if isinstance(grain, Tensor) else grain, len(images),
                 self.dvae.cfg.side, torch.empty(0))
        right, count = torch.zeros(2, 2, dtype=torch.float64)  # of fine cells, of coarse ones
        # Part by part: of all at once the entropy would take a hundred times the images' memory.
        few = max(1, PIXELS // images[0, ..., 0].numel())
        for pixels, asked in zip(images.split(few), grain.cpu().split(few)):
            scores = self.dvae.entropy(pixels.cpu())
            found = take_top(scores, asked.flatten(1).sum(dim=1))
            for row, mine in enumerate((asked, ~asked)):
                right[row] += (found == asked)[mine].sum()
                count[row] += mine.sum()
        return (right / count).nanmean().item()               # nan: no cell of that kind
