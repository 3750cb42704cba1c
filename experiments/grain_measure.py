"""What grain.py measures of one arm: reconstructions of its codes, or images drawn in them.

In       the folder of a finished run of d2it.train, and the judge that all arms share
Out      one dictionary, most of an OUT/ARM-SEED.json

Cells    "fine" and "coarse" cells are those of the entropy map at r = 1/2, whatever the arm's own
         map is: the same pixels in all arms
"""
import itertools
import time

import numpy as np
import torch
from torch import Tensor

from d2it.dvae import DVAE
from d2it.grain import count_codes, entropy, grain_map, threshold
from d2it.model import D2iT
from d2it.progress import CALIBRATION, reconstruction_quality
from evaluation.judging import Batching, ImageSource, real
from experiments.grain_arms import THREE_MAPS
from experiments.order import Judge
from experiments.order_table import fd_key
from plumbing.batches import eval_batches
from plumbing.datasets import ImageSet
from plumbing.flags import read_log
from plumbing.images import to_uint8

BATCH = 250
GUIDANCE = 2.0


def half_limit(data: ImageSet, size: int, cell: int) -> float:
    """The entropy above which half of the cells of some training images lie."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(data))[:CALIBRATION])
    batches = eval_batches(data, size, BATCH, chosen)
    return threshold(torch.cat([entropy(pixels, cell) for pixels, _ in batches]), 0.5)


def real_images(judge: Judge, data: ImageSet, size: int, n: int) -> dict:
    """As many training images as are drawn: the floor of every distance."""
    chosen = np.random.default_rng(0).permutation(len(data))[:n]
    return judge.row(real("real", data, chosen, size, Batching(batch_size=BATCH)))


# ------------------------------------------------------------------------------------------------
# stage 1

def measure_codes(model: DVAE, judge: Judge, limit: float) -> dict:
    """PSNR of held-out images, overall and by cells, and what the judge says of them."""
    held_out, device = judge.held_out, model.limit.device

    def pixels_of(numbers):
        return ((pixels.to(device), labels) for pixels, labels, _ in held_out.batches(numbers))

    def rebuilt(numbers):
        for b, (pixels, labels) in zip(numbers, pixels_of(numbers)):
            recon = model.decode(model.encode(pixels, torch.Generator().manual_seed(b)))
            yield to_uint8(recon).cpu(), labels, pixels.cpu()

    everything = range(-(-held_out.n // BATCH))
    quality = reconstruction_quality(model, pixels_of(list(everything)),
                                     lambda p: grain_map(p, model.cfg.cell_size, limit))
    row = judge.row(ImageSource("reconstruction", held_out.n, rebuilt))
    codes = quality.pop("codes")
    return {**{name: round(float(dB), 3) for name, dB in quality.items()},
            "codes": round(codes, 2), "numbers": round(codes * model.cfg.code_dim, 1),
            fd_key(row): row[fd_key(row)], "reconstruction": row}


# ------------------------------------------------------------------------------------------------
# stage 2

def asked(mode: str, model: D2iT, judge: Judge, n: int) -> tuple[Tensor, Tensor | None]:
    """-> labels (n,) and the maps that are given with them; None: they are predicted.

    Of an arm with one map for all images, that map; nothing is left to predict.
    """
    dvae = model.dvae
    labels = torch.arange(n) % len(model.classes)
    if mode == "predicted":
        if dvae.cfg.grain_policy in ("coarse", "fine"):
            side = dvae.cfg.side
            return labels, torch.full((n, side, side), dvae.cfg.grain_policy == "fine")
        return labels, None
    # Which maps a class has is known to its images only, so labels come from the same images.
    batches = list(judge.held_out.batches(list(range(-(-n // BATCH)))))
    pixels, labels = (torch.cat(part)[:n] for part in list(zip(*batches))[:2])
    policy = dvae.cfg.grain_policy if mode == "true" else "random"
    return labels, grain_map(pixels, dvae.cfg.cell_size, dvae.limit.item(), policy, dvae.places)


def sampled(mode: str, model: D2iT, judge: Judge, n: int, steps: int, seed: int) -> dict:
    """Draw n images under maps of one kind -> what the judge says of them."""
    labels, given = asked(mode, model, judge, n)
    parts = labels.split(BATCH)
    grains = itertools.repeat(None) if given is None else given.split(BATCH)
    options, device = {"cfg_scale": GUIDANCE, "steps": steps}, model.dvae.limit.device
    began = time.perf_counter()
    drawn = [model.draw(part.to(device), options, seed, b, None if own is None else own.to(device))
             for b, (part, own) in enumerate(zip(parts, grains))]
    seconds = time.perf_counter() - began

    def batches(numbers):
        return ((drawn[b][0], parts[b], None) for b in numbers)
    row = judge.row(ImageSource(mode, len(labels), batches, settings=options))
    images, maps = (torch.cat(part) for part in zip(*drawn))
    # Where there is one map for all images, nothing can be disobeyed.
    one = bool((maps == maps[0]).all())
    return {**row, "map_obeyed": None if one else round(model.obeyed(images, maps), 4),
            "codes": round(count_codes(maps).float().mean().item(), 2),
            "ms_an_image": round(1000 * seconds / len(labels), 2)}


def tokens_times_blocks(model: D2iT, codes: float) -> float:
    """What an image of so many codes costs the content transformer at each step."""
    cfg, cells = model.content.cfg, model.dvae.cfg.side ** 2
    fine = (codes - cells) / 3
    if cfg.refine_depth and model.content.refine.everywhere:
        fine = cells
    return cells * cfg.content_depth + 4 * fine * cfg.refine_depth


def losses(folder: str) -> dict:
    """Error per code at the end: held out; then by grain and by quarter of the time, the mean over
    the last tenth of the log."""
    rows = [row for row in read_log(folder) if row["phase"] == "content"]
    logged = [row for row in rows if "learning_rate" in row]
    last, result = logged[-max(1, len(logged) // 10):], {"held out": rows[-1]["loss"]}
    for name in ("fine", "coarse", *(f"quarter_{q}" for q in range(1, 5))):
        values = [row[name] for row in last if name in row]
        if values:
            result[name] = round(float(np.mean(values)), 5)
    return result


def measure_images(arm: str, folder: str, source: str, model: D2iT, judge: Judge, plan,
                   seed: int) -> dict:
    """source: the folder whose codes and maps these are."""
    modes = ("predicted", "true", "random") if arm == THREE_MAPS else ("predicted",)
    rows = [sampled(mode, model, judge, plan.num_samples, plan.sampling_steps, seed)
            for mode in modes]
    fd, (bits,) = fd_key(rows[0]), [row["bits_per_map"] for row in read_log(source)
                                    if "bits_per_map" in row]
    return {fd: rows[0][fd], "samples": rows, "bits_of_a_map": bits, "loss": losses(folder),
            "tokens_times_blocks": round(tokens_times_blocks(model, rows[0]["codes"]), 1)}
