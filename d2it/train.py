"""D²iT in three stages: codes, maps, content.

stage 1   dvae      the threshold is calibrated, encoder and decoder learn, the codes are measured
stage 2   grain     which cells are fine, given the class: generator.py over n² tokens of two kinds
stage 3   content   the DVAE is frozen; noise is predicted in its codes, encoded anew at each step

Run       python -m d2it.train --preset d2it-tiny         all stages that are not finished yet
          torchrun --nproc_per_node=8 -m d2it.train -- --preset d2it-64 --data DIR \\
                   --run runs/mine      (the -- keeps torchrun from taking --run for its own)
Makes     runs/NAME/ with config.json dvae.pt grain.pt content.pt log.jsonl samples/
          Repeat the command to resume. SIGTERM and Ctrl-C save first, then exit with 3
Exit      0 finished, 1 failure, 2 user error, 3 interrupted and saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import math
from collections.abc import Callable

import torch
from torch import Tensor

from config import GUIDANCE
from d2it import diffusion
from d2it.content import Content
from d2it.dvae import DVAE, Codes
from d2it.grain import code_weights, grained_noise, painted
from d2it.presets import parse_run, settings
from d2it.progress import held_out, reconstruction_quality, some_training_images
from generator import ARGenerator
from loop import Stage, need_equal_pieces
from losses import reconstruction
from nativetok import as_it_is
from plumbing import checkpoint
from plumbing.flags import as_dict, need
from plumbing.images import to_float
from plumbing.processes import enough_memory
from plumbing.run import Run

FILES = {1: "dvae.pt", 2: "grain.pt", 3: "content.pt"}


def finish(stage: Stage, show: Callable[[str], None], **results) -> None:
    """The last line of the log, checkpoint and picture, and what the stage has come to."""
    results = {name: round(float(value), 4) for name, value in results.items()}
    stage.finish({**results, "seconds": stage.seconds})
    if stage.procs.main:
        show(stage.name)
    told = ", ".join(f"{name} {value:g}" for name, value in results.items())
    stage.run.say(f"{stage.name}: finished; held out: {told}")


# ------------------------------------------------------------------------------------------------
# stage 1

def train_dvae(run: Run, change: Callable) -> None:
    cfg, _, train = run.configs
    stage = Stage(run, FILES[1], "dvae", lambda saved: change(DVAE(cfg)), settings(1, *run.configs),
                  lambda: {"dvae_config": as_dict(cfg)})
    if stage.finished:
        return
    model, ema = stage.raw_model, stage.ema

    # 1. Which cells are fine is settled before anything is learned, and stays.
    if not stage.saved:
        scores = torch.cat([model.entropy(pixels) for pixels in some_training_images(run)])
        for both in (model, ema):
            both.calibrate(scores)
    run.say(f"dvae: cells with an entropy above {model.limit.item():.4f} nats are fine")
    # Fresh noise in every stage: other numbers than the stage before has drawn.
    stage.begin(train.optim(train.dvae_steps, train.dvae_learning_rate), 1000)

    def show(name: str) -> None:
        pixels = run.some_held_out(12)
        codes = ema.encode(pixels.to(run.procs.device), torch.Generator().manual_seed(0))
        run.grid(name, [to_float(pixels), to_float(painted(pixels, codes.grain)),
                        ema.decode(codes)])

    # 2. Learn: squared error, and a pull towards N(0, 1) that keeps codes from growing without
    #    limit and gives each a width, so that what the diffusion misses by a little still decodes.
    with stage.saving():
        for pixels, _ in stage.over(run.stream(train.batch_size, stage.step)):
            images, grain = to_float(pixels), model.grain_of(pixels)
            with stage.autocast():
                recon, divergence = stage.model(images, grain)
            if not stage.alone:
                # A mean over the codes of this micro-batch, which has to weigh as one over those
                # of the whole step, on all processes.
                codes = code_weights(model.grain_of(stage.whole[0])).mean()
                divergence = divergence * code_weights(grain).mean() / run.procs.mean(codes)
            terms = {"pixels": reconstruction(recon, images), "kl": divergence}
            stage.backward(terms["pixels"] + cfg.kl_weight * terms["kl"], terms)
            stage.save_or_show(show)

        # 3. The averaged weights are the ones that stay; their codes are measured, for the
        #    diffusion.
        torch.manual_seed(train.seed)
        ema.measure(some_training_images(run))
        quality = reconstruction_quality(ema, held_out(run))
    model.load_state_dict(ema.state_dict())
    finish(stage, show, **quality)


# ------------------------------------------------------------------------------------------------
# stage 2

def finished_dvae(run: Run, change: Callable) -> DVAE:
    path = run.path(FILES[1])
    need(checkpoint.exists(path) and checkpoint.load(path)["phase"] == "finished",
         f"stages 2 and 3 need a finished DVAE, and {run.folder} has none; run stage 1 first")
    return DVAE.load(path, change).to(run.procs.device)


def need_its_dvae(stage: Stage, dvae: DVAE, key: str) -> None:
    """Raise UserError when the stage's checkpoint has learned the maps or codes of another DVAE."""
    need(not stage.saved or stage.saved[key] == dvae.fingerprint,
         f"{stage.path} was trained with another DVAE; delete {stage.path} and repeat the command")


def train_grain(run: Run, change_dvae: Callable) -> None:
    """A map is a sequence of n² tokens from a vocabulary of two: 1 fine, 0 coarse."""
    train, cfg, classes = run.train, run.configs[1].generator(), len(run.data.classes)
    dvae, cells = finished_dvae(run, change_dvae), run.configs[0].side ** 2
    stage = Stage(run, FILES[2], "grain", lambda saved: ARGenerator(cfg, cells, 2, classes),
                  settings(2, *run.configs),
                  lambda: {"kind": "ar", "generator_config": as_dict(cfg), "num_tokens": cells,
                           "codebook_size": 2, "tokenizer": dvae.fingerprint},
                  needs=("tokenizer",))
    need_its_dvae(stage, dvae, "tokenizer")
    if stage.finished:
        return
    stage.begin(train.optim(train.grain_steps, train.grain_learning_rate), 2000,
                stage.raw_model.loss)

    def words(pixels: Tensor) -> Tensor:
        return dvae.grain_of(pixels).flatten(1).long()        # (B, n²)

    def show(name: str) -> None:
        noise = torch.Generator().manual_seed(train.seed)
        labels = torch.arange(min(10, classes), device=run.procs.device).repeat_interleave(8)
        maps = stage.ema.sample(labels, generator=noise).view(len(labels), 1, dvae.cfg.side, -1)
        maps = (maps.repeat(1, 3, 1, 1) * 2.0 - 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
        run.grid(name, list(maps.split(8)))

    with stage.saving():
        for pixels, labels in stage.over(run.stream(train.batch_size, stage.step)):
            maps = words(pixels)
            with stage.autocast():
                loss, _ = stage.model(maps, labels)           # nats per cell
            stage.backward(loss, {})
            stage.save_or_show(show)
        with torch.no_grad():
            parts = [(stage.ema.loss(words(pixels), labels)[0].item(), len(pixels))
                     for pixels, labels in held_out(run)]
    nats = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
    finish(stage, show, bits_per_map=nats * cells / math.log(2))


# ------------------------------------------------------------------------------------------------
# stage 3

def train_content(run: Run, change_dvae: Callable, change: Callable) -> None:
    dvae_cfg, cfg, train = run.configs
    dvae, classes = finished_dvae(run, change_dvae), len(run.data.classes)
    C, n = dvae_cfg.code_dim, dvae_cfg.side
    stage = Stage(run, FILES[3], "content", lambda saved: change(Content(cfg, C, n, classes)),
                  settings(3, *run.configs),
                  lambda: {"content_config": as_dict(cfg), "channels": C, "side": n,
                           "dvae": dvae.fingerprint}, needs=("dvae",))
    need_its_dvae(stage, dvae, "dvae")
    if stage.finished:
        return
    stage.begin(train.optim(train.content_steps, train.content_learning_rate), 3000)

    def show(name: str) -> None:
        """Held-out images, their maps, and samples under these maps: this stage by itself."""
        pixels, labels = next(held_out(run, 12))
        grain = dvae.grain_of(pixels)
        start = grained_noise(grain, C, torch.Generator().manual_seed(train.seed))
        z = diffusion.sample(stage.ema, start, labels, grain, classes, cfg.path, 50, GUIDANCE)
        pixels = pixels.cpu()
        run.grid(name, [to_float(pixels), to_float(painted(pixels, grain)),
                        dvae.decode(Codes(z, grain))])

    with stage.saving():
        for pixels, labels in stage.over(run.stream(train.batch_size, stage.step)):
            # TRAP: a cache of codes would freeze one mirror image and one draw of the posterior.
            z, grain = dvae.encode(pixels)
            with stage.autocast():
                loss, terms = diffusion.loss(stage.model, z, labels, grain, cfg.path)
            stage.backward(loss, terms, code_weights(grain).mean())
            stage.save_or_show(show)

        torch.manual_seed(train.seed)                         # the same times and noise every time
        total = 0.0
        with torch.no_grad():
            for pixels, labels in held_out(run):
                z, grain = dvae.encode(pixels)
                loss, _ = diffusion.loss(stage.ema, z, labels, grain, cfg.path)
                total += loss.item() * len(pixels)
    finish(stage, show, loss=total / len(run.eval_indices))


# ------------------------------------------------------------------------------------------------

def check_belongs(run: Run) -> None:
    """Before anything is written: do settings and images fit what is in the folder?"""
    dvae = run.configs[0]
    need(not checkpoint.exists(run.path("tokenizer.pt")),
         f"{run.folder} is a run of train.py, not of d2it.train; give another folder with --run")
    need(run.train.data != "shapes" or dvae.image_size == 32, "the built-in shapes are 32x32 "
         f"pixels, not {dvae.image_size}; give --data or --image_size 32")
    need_equal_pieces("batch_size", run.train.batch_size, run.procs.world, run.train.accumulate)
    for number, name in FILES.items():
        run.compare(run.path(name), settings(number, *run.configs))


def main(args, change_dvae: Callable = as_it_is, change_content: Callable = as_it_is) -> None:
    """Run the stages that args ask for.

    Experiments change what is trained by two functions, which are given the new networks before
    anything is learned or loaded.
    """
    run = Run(args, (args.dvae, args.content, args.train))
    check_belongs(run)
    run.begin()
    run.say(f"{run.folder}: {run.procs.world} x {run.procs.device.type} "
            f"({torch.get_num_threads()} threads each), "
            f"{run.procs.precision(run.train.precision)}; images {run.data.name}: "
            f"{len(run.data):,} to learn from, {len(run.val):,} held out")
    with enough_memory("lower --batch_size or raise --accumulate, and repeat the command"):
        if args.stage in (None, 1):
            train_dvae(run, change_dvae)
        if args.stage in (None, 2):
            train_grain(run, change_dvae)
        if args.stage in (None, 3):
            train_content(run, change_dvae, change_content)
    run.say(f"finished; samples: python -m d2it.sample --run {run.folder}")
    run.end()


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse_run(__doc__)))
