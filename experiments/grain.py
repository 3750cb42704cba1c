"""Is it worth deciding where the codes go? D²iT's maps against others, under equal budgets.

Arms of codes: the same autoencoder (stage 1), trained under each map
    coarse, fine          no cell is fine; all are: the two ends
    entropy               the paper: cells above a threshold, half of them
    static                as many fine cells an image, where the data set has detail on average
    random, inverted      as many, anywhere; as many, where there is least detail
    error                 as many, where the arm coarse is furthest off
    coarse10              no cell is fine, codes of 10 numbers: as many numbers as entropy has
    fine2, fine3          all cells are fine, codes of 2 and of 3 numbers: fewer, and more
    r25, r75              entropy, with a quarter and three quarters of the cells fine
Arms of images: a content transformer of six blocks (stage 3), trained on the codes of such an arm
    dit-fine, dit-coarse10                DiT with patches of 2, on the codes of fine and coarse10
    d2it-6+0, d2it-4+2, d2it-3+3          of entropy; RefineNet has none, two, three of the blocks
    d2it-static           4 + 2 blocks, on the codes of static
    d2it-all              4 + 2 blocks, and RefineNet reads the codes of all cells
    d2it-r0 -r25 -r75 -r100               4 + 2 blocks, on coarse, r25, r75, fine

Shared   images and their order, sizes of the networks, steps, learning rates. entropy, static,
         random, inverted and error have the same number of fine cells in each image
Cells    "fine" and "coarse" cells in a table are those of the entropy map at r = 1/2, whatever the
         arm's own map is: the same pixels in all arms
Samples  are judged by the Fréchet distance in the features of one classifier for all arms of a
         data set (not FID); photographs need --judge, as in order.py. d2it-4+2 draws under
         predicted maps, under those of held-out images and under random ones. What was expected
         stands in LOG.md
Run      python -m experiments.grain --preset tiny --seeds 0 1 2        the shapes, on a CPU
         python -m experiments.grain --preset tiny --quick              does it run?
         python -m experiments.grain --preset cifar-cpu --data DIR --val_data DIR --seeds 0 1 \
             --judge judge.pt
         Repeat a command to go on: finished arms are skipped, a broken-off one goes on where it was
         saved; another --out starts anew
Makes    OUT/ARM-SEED.json, real.json, tinycnn.pt unless --judge is given; OUT/runs/, what was
         trained; tables and a figure by grain_table.py
Exit     0 finished, 1 failure, 2 user error, 3 interrupted and saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import hashlib
import itertools
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from d2it import train
from d2it.content import Content, RefineNet
from d2it.dvae import DVAE
from d2it.grain import count_codes, entropy, grain_map, take_top, threshold
from d2it.model import D2iT
from d2it.presets import DVAEConfig, parse_run, settings
from d2it.progress import CALIBRATION, reconstruction_quality
from evaluation.judging import Batching, ImageSource, real
from experiments.grain_table import write_tables
from experiments.order import (
    Judge, check_settings, handlers_of_its_own, images_of, parse_for, parser_of)
from experiments.order_table import costs, fd_key
from nativetok import as_it_is
from plumbing import checkpoint
from plumbing.batches import eval_batches
from plumbing.datasets import ImageSet
from plumbing.flags import as_flags, read_log
from plumbing.images import to_float, to_uint8
from plumbing.processes import Processes, provenance

HELD_OUT = 2000  # images that arms are judged by, at most
BATCH = 250
GUIDANCE = 2.0


# ------------------------------------------------------------------------------------------------
# other maps than the paper's, and another RefineNet: the changes that train.main takes

class RankedMaps(DVAE):
    """As many fine cells in each image as the entropy map has: those that rank highest."""

    def __init__(self, cfg: DVAEConfig):
        super().__init__(cfg)
        # Empty, and saved with the weights: a plain DVAE, which has other maps, refuses them.
        self.register_buffer("own_maps", torch.zeros(0))

    def grain_of(self, pixels: Tensor) -> Tensor:
        count = super().grain_of(pixels).flatten(1).sum(dim=1)                # (B,)
        return take_top(self.ranking(pixels), count)


class StaticMaps(RankedMaps):
    """Where the data set has detail. Is the map more than "things are in the middle"?"""

    def __init__(self, cfg: DVAEConfig):
        super().__init__(cfg)
        self.register_buffer("places", torch.zeros(cfg.side, cfg.side))  # the mean entropy at each

    def calibrate(self, scores: Tensor) -> None:
        super().calibrate(scores)
        self.places.copy_(scores.mean(dim=0))

    def ranking(self, pixels: Tensor) -> Tensor:
        return self.places.expand(len(pixels), -1, -1)        # (B, n, n)


class RandomMaps(RankedMaps):
    """Anywhere. Does it matter where?"""

    def ranking(self, pixels: Tensor) -> Tensor:
        return hashed_noise(pixels, self.cfg.side)


class InvertedMaps(RankedMaps):
    """Where there is least detail. Does it matter that much?"""

    def ranking(self, pixels: Tensor) -> Tensor:
        # The noise only decides between equals.
        return -self.entropy(pixels) + 1e-5 * hashed_noise(pixels, self.cfg.side)


class ErrorMaps(RankedMaps):
    """Where a coarse code fails: a better map than entropy's, if there is one.

    Nobody could draw such a map for an image that is not there yet.
    coarse   the DVAE of the arm coarse
    """

    def __init__(self, cfg: DVAEConfig, coarse: DVAE):
        super().__init__(cfg)
        self.coarse = (coarse,)  # in a tuple, so it is no part of what learns and is saved

    @torch.no_grad()
    def ranking(self, pixels: Tensor) -> Tensor:
        (coarse,), S, images = self.coarse, self.cfg.cell_size, to_float(pixels)
        # The mean of the posterior: a map must not change from one look at an image to the next.
        mean, _ = coarse.moments(images, coarse.grain_of(pixels))
        off = (coarse.decoder(mean) - images).square().mean(dim=1)            # (B, H, W)
        return off.unflatten(2, (-1, S)).unflatten(1, (-1, S)).mean(dim=(2, 4))       # (B, n, n)


def hashed_noise(pixels: Tensor, n: int) -> Tensor:
    """uint8 (B, H, W, 3) -> uniform numbers (B, n, n) that follow from an image's bytes: the same
    in every epoch and stage."""
    def noise(image: Tensor) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(image.cpu().numpy().tobytes()).digest()[:7], "big")
        return torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    return torch.stack([noise(image) for image in pixels]).to(pixels.device)


def with_maps(kind: Callable[[DVAEConfig], DVAE]) -> Callable[[DVAE], DVAE]:
    """-> a change: the same DVAE, weight by weight, with maps of this kind."""
    def change(dvae: DVAE) -> DVAE:
        changed = kind(dvae.cfg)
        changed.load_state_dict(dvae.state_dict(), strict=False)  # but for its own buffers
        return changed
    return change


class RefineEverywhere(nn.Module):
    """RefineNet reads the codes of all cells. Content uses its output for fine ones, as before."""

    def __init__(self, refine: RefineNet):
        super().__init__()
        self.refine = refine

    def forward(self, h: Tensor, cells: Tensor, c: Tensor, grain: Tensor) -> Tensor:
        return self.refine(h, cells, c, torch.ones_like(grain))


def refine_everywhere(content: Content) -> Content:
    content.refine = RefineEverywhere(content.refine)
    return content


# ------------------------------------------------------------------------------------------------
# the arms

@dataclass(frozen=True)
class Arm:
    settings: dict = field(default_factory=dict)  # of d2it.train, beside those that all arms share
    codes: str = ""  # the arm whose codes it learns to draw; empty: it makes codes itself
    change: Callable = as_it_is  # of the network that it trains, as train.main takes it


BASE = "entropy"
CODES = {
    "coarse": Arm(dict(grain_policy="coarse")),
    "fine": Arm(dict(grain_policy="fine")),
    BASE: Arm(),
    "static": Arm(change=with_maps(StaticMaps)),
    "random": Arm(change=with_maps(RandomMaps)),
    "inverted": Arm(change=with_maps(InvertedMaps)),
    "error": Arm(),  # the arm coarse has to be trained first: see change_of
    "coarse10": Arm(dict(grain_policy="coarse", code_dim=10)),
    "fine2": Arm(dict(grain_policy="fine", code_dim=2)),
    "fine3": Arm(dict(grain_policy="fine", code_dim=3)),
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
    "d2it-static": Arm({}, "static"),
    "d2it-all": Arm({}, BASE, change=refine_everywhere),
    # the sweep of r; d2it-4+2 is its middle
    "d2it-r0": Arm({}, "coarse"),
    "d2it-r25": Arm({}, "r25"),
    "d2it-r75": Arm({}, "r75"),
    "d2it-r100": Arm({}, "fine"),
}
ARMS = {**CODES, **IMAGES}
# Only when asked for: half of the shapes' cells are flat and tie, so on them r75 is entropy.
EXTRA = ("r75", "d2it-r75")
MAIN = [arm for arm in ARMS if arm not in EXTRA]
# a setting of commit 403a52d that is gone from the code; its results are kept
GONE = ("d2it-slot",)
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
# training

def flags_of(arm: str, seed: int, args) -> list[str]:
    """The command line of d2it.train for this arm; its codes have the settings of their own arm."""
    this, plan = ARMS[arm], args.plan
    of_codes = ARMS[this.codes].settings if this.codes else {}
    return ["--preset", plan.preset, "--run", os.path.join(args.out, "runs", f"{arm}-{seed}"),
            "--data", args.data, "--val_data", args.val_data, "--seed", str(seed),
            "--device", args.device, *as_flags({**plan.sizes, **of_codes, **this.settings})]


def train_stage(flags: list[str], stage: int, **changes) -> str:
    """A stage of d2it.train in this process, unless it is finished; -> the run's folder.

    Exits with 3 when interrupted, as d2it.train does.
    """
    with handlers_of_its_own():
        args = parse_run("", [*flags, "--stage", str(stage)])
        train.main(args, **changes)
    return args.run


def change_of(codes: str, seed: int, args, device: torch.device) -> Callable[[DVAE], DVAE]:
    """How the DVAE of this arm differs from a plain one. The arm error needs a trained one."""
    if codes != "error":
        return ARMS[codes].change
    folder = train_stage(flags_of("coarse", seed, args), 1)
    coarse = DVAE.load(os.path.join(folder, "dvae.pt")).to(device)
    return with_maps(lambda cfg: ErrorMaps(cfg, coarse))


def train_content(arm: str, seed: int, args, change: Callable) -> tuple[str, str]:
    """Stages 1 and 2 in the folder of the codes' arm, stage 3 in a folder of its own, with copies.

    -> both folders
    """
    source_flags, flags = flags_of(ARMS[arm].codes, seed, args), flags_of(arm, seed, args)
    for stage in (1, 2):
        source = train_stage(source_flags, stage, change_dvae=change)
    folder = parse_run("", flags).run
    os.makedirs(folder, exist_ok=True)
    for name in ("dvae.pt", "grain.pt"):
        with open(os.path.join(source, name), "rb") as made:
            with checkpoint.replacing(os.path.join(folder, name)) as copy:
                shutil.copyfileobj(made, copy)
    train_stage(flags, 3, change_dvae=change, change_content=ARMS[arm].change)
    return source, folder


# ------------------------------------------------------------------------------------------------
# measuring

class Shared:
    """What all arms of a data set share: images, the judge, and whose cells are called fine."""

    def __init__(self, args):
        self.procs = Processes(args.device)
        self.data, val = images_of(args)
        self.val = val.subset(np.random.default_rng(0).permutation(len(val))[:HELD_OUT])
        run = parse_run("", flags_of(BASE, 0, args))
        self.size, flip = run.dvae.image_size, run.train.flip
        self.judge = Judge(args.judge or os.path.join(args.out, "tinycnn.pt"), self.size, flip,
                           args.plan.judge_steps, 0, self.data, self.val, self.procs)
        self.limit = half_limit(self.data, self.size, run.dvae.cell_size)


def half_limit(data: ImageSet, size: int, cell: int) -> float:
    """The entropy above which half of the cells of some training images lie."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(data))[:CALIBRATION])
    batches = eval_batches(data, size, BATCH, chosen)
    return threshold(torch.cat([entropy(pixels, cell) for pixels, _ in batches]), 0.5)


def measure_codes(model: DVAE, judge: Judge, limit: float) -> dict:
    """PSNR of held-out images, overall and by cells, and the judge's measures."""
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


def asked(mode: str, model: D2iT, judge: Judge, n: int) -> tuple[Tensor, Tensor | None]:
    """-> labels (n,) and the maps that are given with them; None: they are predicted.

    mode   predicted, true or random
    Of an arm with one map for all images, that map; nothing is left to predict.
    """
    dvae, policy = model.dvae, model.dvae.cfg.grain_policy
    labels = torch.arange(n) % len(model.classes)
    if mode == "predicted":
        one = torch.full((n, dvae.cfg.side, dvae.cfg.side), policy == "fine")
        return labels, one if policy in ("coarse", "fine") else None
    # Which maps a class has is known to its images only, so labels come from the same images.
    batches = list(judge.held_out.batches(list(range(-(-n // BATCH)))))
    pixels, labels = (torch.cat(part)[:n] for part in list(zip(*batches))[:2])
    true = dvae.grain_of(pixels.to(dvae.limit.device)).cpu()
    if mode == "true":
        return labels, true
    return labels, take_top(hashed_noise(pixels, dvae.cfg.side), true.flatten(1).sum(dim=1))


def sampled(mode: str, model: D2iT, judge: Judge, n: int, steps: int, seed: int) -> dict:
    """Draw n images under maps of one kind -> the judge's measures."""
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
    fine = cells if isinstance(model.content.refine, RefineEverywhere) else (codes - cells) / 3
    return cells * cfg.content_depth + 4 * fine * cfg.refine_depth


def measure_images(arm: str, source: str, model: D2iT, judge: Judge, plan: Plan,
                   seed: int) -> dict:
    """source: the folder whose codes and maps these are."""
    modes = ("predicted", "true", "random") if arm == THREE_MAPS else ("predicted",)
    rows = [sampled(mode, model, judge, plan.num_samples, plan.sampling_steps, seed)
            for mode in modes]
    (bits,) = [row["bits_per_map"] for row in read_log(source) if "bits_per_map" in row]
    return {fd_key(rows[0]): rows[0][fd_key(rows[0])], "samples": rows, "bits_of_a_map": bits,
            "tokens_times_blocks": round(tokens_times_blocks(model, rows[0]["codes"]), 1)}


# ------------------------------------------------------------------------------------------------
# results

def settings_of(arm: str, seed: int, args, shared: Shared) -> dict:
    """Everything that the result of an arm depends on, as it comes back from a file."""
    run, plan, kept = parse_run("", flags_of(arm, seed, args)), args.plan, {}
    for stage in (1, 2, 3) if ARMS[arm].codes else (1,):
        kept |= settings(stage, run.dvae, run.content, run.train)
    if ARMS[arm].codes:
        kept |= {"num_samples": plan.num_samples, "sampling_steps": plan.sampling_steps}
    return {"preset": plan.preset, **kept, "judge_steps": None if args.judge else plan.judge_steps,
            "images": shared.data.fingerprint, "held_out": shared.val.fingerprint}


def make_result(arm: str, seed: int, args, shared: Shared) -> None:
    """Train and measure one arm with one seed and write its result, unless that has been done."""
    path = os.path.join(args.out, f"{arm}-{seed}.json")
    recorded = settings_of(arm, seed, args, shared)
    if os.path.exists(path):
        check_settings(path, recorded)
        print(f"{arm}, seed {seed}: finished before")
        return
    print(f"\n--- {arm}, seed {seed}", flush=True)
    flags, device = flags_of(arm, seed, args), shared.procs.device
    change = change_of(ARMS[arm].codes or arm, seed, args, device)
    if ARMS[arm].codes:
        source, folder = train_content(arm, seed, args, change)
        model = D2iT.of_run(folder, device, change, ARMS[arm].change)
        found = measure_images(arm, source, model, shared.judge, args.plan, seed)
    else:
        folder = train_stage(flags, 1, change_dvae=change)
        dvae = DVAE.load(os.path.join(folder, "dvae.pt"), change).to(device)
        found = measure_codes(dvae, shared.judge, shared.limit)
    checkpoint.write_json(path, {
        "arm": arm, "seed": seed, **provenance(args.command, device),
        "run_command": "python -m d2it.train " + shlex.join(flags), "settings": recorded, **found,
        "costs": costs(folder, parse_run("", flags).train)})
    print(f"written: {path}")


def make_real(args, shared: Shared) -> None:
    """real.json: as many training images as are drawn, the floor of every distance."""
    path = os.path.join(args.out, "real.json")
    if not os.path.exists(path):
        chosen = np.random.default_rng(0).permutation(len(shared.data))[:args.plan.num_samples]
        source = real("real", shared.data, chosen, shared.size, Batching(batch_size=BATCH))
        checkpoint.write_json(path, {**provenance(args.command, shared.procs.device), "seed": 0,
                                     "judge_accuracy": shared.judge.accuracy,
                                     **shared.judge.row(source)})


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace. Raises UserError for wrong use."""
    parser = parser_of("grain", __doc__, PLANS, MAIN, EXTRA)
    return parse_for("grain", parser, argv, PLANS, ARMS)


def main(args) -> None:
    if not args.table:
        shared = Shared(args)
        make_real(args, shared)
        for seed in args.seeds:  # a whole table first, then its spread
            for arm in args.arms:
                make_result(arm, seed, args, shared)
    print("\n" + write_tables(args.out, (*ARMS, *GONE)))


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
