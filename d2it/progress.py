"""What d2it.train measures with: some training images, all held-out ones, and how well these fare.

In       a Run, a DVAE
Out      batches of pixels; PSNR of the whole image and by the grain of its cells
"""
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from d2it.dvae import DVAE
from d2it.grain import count_codes
from losses import to_db
from plumbing.batches import eval_batches
from plumbing.images import to_float
from plumbing.run import Run

CALIBRATION = 4000  # training images that set the threshold and the statistics of the codes [ours]


def some_training_images(run: Run) -> Iterator[Tensor]:
    """The same few thousand on every process, as pixels (b, S, S, 3)."""
    chosen = np.random.default_rng(run.train.seed).permutation(len(run.data))[:CALIBRATION]
    for pixels, _ in eval_batches(run.data, run.configs[0].image_size, run.train.batch_size,
                                  np.sort(chosen), skip_bad=run.train.skip_bad):
        yield pixels.to(run.procs.device)


def held_out(run: Run, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out pixels (b, S, S, 3) and labels (b,); "none" if val's classes are others."""
    device = run.procs.device
    for pixels, labels in eval_batches(run.val, run.configs[0].image_size, run.train.batch_size,
                                       run.eval_indices[:limit], skip_bad=run.train.skip_bad):
        if run.val.classes != run.data.classes:
            labels = torch.full_like(labels, len(run.data.classes))
        yield pixels.to(device), labels.to(device)


@torch.no_grad()
def reconstruction_quality(model: DVAE, batches: Iterable[tuple[Tensor, Tensor]],
                           maps: Callable[[Tensor], Tensor] | None = None) -> dict:
    """PSNR over all pixels, and over those in fine and in coarse cells; codes per image.

    batches   pixels (b, S, S, 3) and labels (b,)
    maps      whose fine cells these are (default: the model's own)
    """
    noise = torch.Generator().manual_seed(0)
    error, count, codes, n = torch.zeros(2), torch.zeros(2), 0.0, 0
    for pixels, _ in batches:
        encoded = model.encode(pixels, noise)
        off = (model.decode(encoded).clamp(-1, 1) - to_float(pixels)).square().mean(dim=1).cpu()
        S, grain = model.cfg.cell_size, maps(pixels) if maps else encoded.grain
        fine = grain.cpu().repeat_interleave(S, dim=1).repeat_interleave(S, dim=2)
        error += torch.stack([off[~fine].sum(), off[fine].sum()])
        count += torch.stack([(~fine).sum(), fine.sum()])
        codes, n = codes + count_codes(encoded.grain).sum().item(), n + len(pixels)
    parts = {"psnr_coarse_cells": 0, "psnr_fine_cells": 1}
    return {"psnr": to_db(error.sum() / count.sum()), "codes": codes / n,
            **{name: to_db(error[i] / count[i]) for name, i in parts.items() if count[i]}}
