"""D²iT in three stages: codes, maps, content.

stage 1   dvae      the threshold is calibrated, encoder and decoder learn, the codes are measured
stage 2   grain     which cells are fine, given the class: generator.py over n² words of two
stage 3   content   the DVAE is frozen; noise is predicted in its codes, encoded anew at each step

Run       python -m d2it.train --preset d2it-tiny         all stages that are not finished yet
          torchrun --nproc_per_node=8 -m d2it.train -- --preset d2it-64 --data DIR \\
                   --run runs/mine      (the -- keeps torchrun from taking --run for its own)
Makes     runs/NAME/ with config.json dvae.pt grain.pt content.pt log.jsonl samples/
          Repeat the command to go on. SIGTERM and Ctrl-C save first, then exit with 3
Exit      0 finished, 1 failure, 2 something to mend, 3 interrupted and saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2it import diffusion
from d2it.content import Content
from d2it.dvae import DVAE, Codes
from d2it.grain import code_weights, grained_noise, painted
from d2it.presets import parse_run, settings
from d2it.progress import held_out, reconstruction_quality, some_training_images
from generator import ARGenerator, default_guidance
from layers import count_parameters
from loop import Loop, LossOf, frozen_copy, need_equal_pieces, new_optimizer
from losses import reconstruction
from plumbing import checkpoint
from plumbing.batches import ImageStream
from plumbing.flags import as_dict, need
from plumbing.images import to_float
from plumbing.processes import enough_memory
from plumbing.run import Run

FILES = {1: "dvae.pt", 2: "grain.pt", 3: "content.pt"}
NAMES = {1: "dvae", 2: "grain", 3: "content"}


class Stage:
    """One network on its way: from the checkpoint as far as it has come, to the next checkpoint.

    new        makes the network
    content    what its checkpoint holds beside weights, so that it can be loaded by itself
    """

    def __init__(self, run: Run, number: int, new: Callable[[], nn.Module], **content):
        self.run, self.name, self.path = run, NAMES[number], run.path(FILES[number])
        self.content, self.began = content, time.time()
        self.fixed = settings(number, *run.configs)
        self.saved = run.resume(self.path, self.fixed, needs=tuple(content))
        for key in ("dvae", "tokenizer"):                     # whose codes or maps it has learned
            need(not self.saved or self.saved.get(key) == content.get(key), f"{self.path} was "
                 f"trained with another DVAE; delete {self.path} and repeat the command")
        self.finished = self.saved is not None and self.saved["phase"] == "finished"

        train = run.train
        torch.manual_seed(train.seed)                         # the same weights on every process
        self.model = new().to(run.procs.device)
        self.ema = frozen_copy(self.model)
        self.steps = getattr(train, f"{self.name}_steps")
        self.rate = getattr(train, f"{self.name}_learning_rate")
        self.optimizer = new_optimizer(self.model, train.optimizer, train.weight_decay, train.beta2,
                                       train.muon_learning_rate / (self.rate or 1))
        if self.saved:
            checkpoint.load_strict(self.model, self.saved["model"], self.path)
            checkpoint.load_strict(self.ema, self.saved["ema"], self.path)
            checkpoint.load_optimizer(self.optimizer, self.saved["optimizer"],
                                      f"{self.path}: optimizer")
        self.number, self.start = number, self.saved["step"] if self.saved else 0

    def loop(self, model: nn.Module | None = None) -> Loop:
        """Pixels uint8 (B, S, S, 3) and labels (B,), as often as there are steps left."""
        run, train, procs = self.run, self.run.train, self.run.procs
        # Fresh noise in every stage: other numbers than the stage before has drawn.
        run.seed(self.saved["random"] if self.saved else None, 1000 * self.number)
        run.say(f"{self.name}: {count_parameters(self.model):,} parameters, step {self.start} of "
                f"{self.steps}")

        def stream(step):
            return iter(ImageStream(run.data, run.configs[0].image_size, train.batch_size,
                                    train.seed, train.flip, train.random_crop, procs.rank,
                                    procs.world, step, train.workers, train.skip_bad,
                                    train.timeout))
        rates = (self.rate, train.min_learning_rate, train.warmup_steps)
        return Loop(run, self.name, model or self.model, self.ema, self.optimizer, stream,
                    self.steps, train.batch_size, rates, self.start)

    def after(self, loop: Loop, show: Callable[[str], None]) -> None:
        """At the end of a step: a checkpoint and a picture, if it is time."""
        if loop.time_to_save:
            self.save(loop.step)
        if loop.time_to_show and self.run.procs.main:
            show(f"{self.name}-{loop.step:07}")

    def save(self, step: int, phase: str | None = None) -> None:
        self.run.save(self.path, settings=self.fixed, phase=phase or self.name, step=step,
                      model=self.model.state_dict(), ema=self.ema.state_dict(),
                      optimizer=self.optimizer.state_dict(), **self.content)

    def finish(self, show: Callable[[str], None], **results) -> None:
        """The last line of the log, checkpoint and picture."""
        results = {name: round(float(value), 4) for name, value in results.items()}
        # Before saving: a line whose checkpoint is never made is dropped, and made again.
        self.run.log(phase=self.name, step=self.steps, **results,
                     seconds=round(time.time() - self.began, 1))
        self.save(self.steps, "finished")
        if self.run.procs.main:
            show(self.name)
        told = ", ".join(f"{name} {value:g}" for name, value in results.items())
        self.run.say(f"{self.name}: finished; held out: {told}")


# ------------------------------------------------------------------------------------------------
# stage 1

def train_dvae(run: Run, change: Callable) -> None:
    cfg = run.configs[0]
    stage = Stage(run, 1, lambda: change(DVAE(cfg)), dvae_config=as_dict(cfg))
    if stage.finished:
        return
    model, ema = stage.model, stage.ema

    # 1. Which cells are fine is settled before anything is learned, and stays.
    if not stage.saved:
        scores = torch.cat([model.entropy(pixels) for pixels in some_training_images(run)])
        for both in (model, ema):
            both.calibrate(scores)
    run.say(f"dvae: cells with an entropy above {model.limit.item():.4f} nats are fine")

    def show(name: str) -> None:
        pixels = run.some_held_out(12)
        codes = ema.encode(pixels.to(run.procs.device), torch.Generator().manual_seed(0))
        run.grid(name, [to_float(pixels), to_float(painted(pixels, codes.grain)),
                        ema.decode(codes)])

    # 2. Learn: squared error, and a pull towards N(0, 1) that keeps codes from growing without
    #    limit and gives each a width, so that what the diffusion misses by a little still decodes.
    loop = stage.loop()
    with loop.saved_by(stage.save):
        for pixels, _ in loop:
            images, grain = to_float(pixels), model.grain_of(pixels)
            with loop.autocast():
                recon, divergence = loop.model(images, grain)
            if not loop.alone:
                # A mean over the codes of this micro-batch, which has to weigh as one over those
                # of the whole step, on all processes.
                codes = code_weights(model.grain_of(loop.whole[0])).mean()
                divergence = divergence * code_weights(grain).mean() / run.procs.mean(codes)
            terms = {"pixels": reconstruction(recon, images), "kl": divergence}
            loop.backward(terms["pixels"] + cfg.kl_weight * terms["kl"], terms)
            stage.after(loop, show)

        # 3. The averaged weights are the ones that stay; their codes are measured, for the
        #    diffusion.
        torch.manual_seed(run.train.seed)
        ema.measure(some_training_images(run))
        quality = reconstruction_quality(ema, held_out(run))
    model.load_state_dict(ema.state_dict())
    stage.finish(show, **quality)


# ------------------------------------------------------------------------------------------------
# stage 2

def finished_dvae(run: Run) -> DVAE:
    path = run.path(FILES[1])
    need(checkpoint.exists(path) and checkpoint.load(path)["phase"] == "finished",
         f"stages 2 and 3 need a finished DVAE, and {run.folder} has none; run stage 1 first")
    return DVAE.load(path).to(run.procs.device)


def train_grain(run: Run) -> None:
    """A map is a sentence of n² words from a vocabulary of two: 1 fine, 0 coarse."""
    cfg, classes = run.configs[1].generator(), len(run.data.classes)
    dvae, cells = finished_dvae(run), run.configs[0].side ** 2
    stage = Stage(run, 2, lambda: ARGenerator(cfg, cells, 2, classes), kind="ar",
                  generator_config=as_dict(cfg), num_tokens=cells, codebook_size=2,
                  tokenizer=dvae.fingerprint)
    if stage.finished:
        return

    def words(pixels: Tensor) -> Tensor:
        return dvae.grain_of(pixels).flatten(1).long()        # (B, n²)

    def show(name: str) -> None:
        noise = torch.Generator().manual_seed(run.train.seed)
        labels = torch.arange(min(10, classes), device=run.procs.device).repeat_interleave(8)
        maps = stage.ema.sample(labels, generator=noise).view(len(labels), 1, dvae.cfg.side, -1)
        maps = (maps.repeat(1, 3, 1, 1) * 2.0 - 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
        run.grid(name, list(maps.split(8)))

    loop = stage.loop(LossOf(stage.model))
    with loop.saved_by(stage.save):
        for pixels, labels in loop:
            maps = words(pixels)
            with loop.autocast():
                loss, _ = loop.model(maps, labels)            # nats per cell
            loop.backward(loss, {})
            stage.after(loop, show)
        with torch.no_grad():
            parts = [(stage.ema.loss(words(pixels), labels)[0].item(), len(pixels))
                     for pixels, labels in held_out(run)]
    nats = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
    stage.finish(show, bits_per_map=nats * cells / math.log(2))


# ------------------------------------------------------------------------------------------------
# stage 3

def train_content(run: Run, change: Callable) -> None:
    dvae_cfg, cfg, train = run.configs
    dvae, classes = finished_dvae(run), len(run.data.classes)
    C, n = dvae_cfg.code_dim, dvae_cfg.side
    stage = Stage(run, 3, lambda: change(Content(cfg, C, n, classes)), content_config=as_dict(cfg),
                  channels=C, side=n, dvae=dvae.fingerprint)
    if stage.finished:
        return

    def show(name: str) -> None:
        """Held-out images, their maps, and samples under these maps: this stage by itself."""
        pixels, labels = next(held_out(run, 12))
        grain = dvae.grain_of(pixels)
        start = grained_noise(grain, C, torch.Generator().manual_seed(train.seed))
        z = diffusion.sample(stage.ema, start, labels, grain, classes, cfg.path, 50,
                             default_guidance(cfg.label_dropout))
        pixels = pixels.cpu()
        run.grid(name, [to_float(pixels), to_float(painted(pixels, grain)),
                        dvae.decode(Codes(z, grain))])

    loop = stage.loop()
    with loop.saved_by(stage.save):
        for pixels, labels in loop:
            # TRAP: a cache of codes would freeze one mirror image and one draw of the posterior.
            z, grain = dvae.encode(pixels)
            with loop.autocast():
                loss, terms = diffusion.loss(loop.model, z, labels, grain, cfg.path, cfg.grain_loss)
            loop.backward(loss, terms, diffusion.loss_weights(grain, cfg.grain_loss).mean())
            stage.after(loop, show)

        torch.manual_seed(train.seed)                         # the same times and noise every time
        total = 0.0
        with torch.no_grad():
            for pixels, labels in held_out(run):
                z, grain = dvae.encode(pixels)
                loss, _ = diffusion.loss(stage.ema, z, labels, grain, cfg.path, cfg.grain_loss)
                total += loss.item() * len(pixels)
    stage.finish(show, loss=total / len(run.eval_indices))


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


def main(args, change_dvae: Callable = lambda dvae: dvae,
         change_content: Callable = lambda content: content) -> None:
    """Run the stages that args ask for.

    Experiments change what is trained by two functions, which are given the new networks before
    anything is learned.
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
            train_grain(run)
        if args.stage in (None, 3):
            train_content(run, change_content)
    run.say(f"finished; samples: python -m d2it.sample --run {run.folder}")
    run.end()


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse_run(__doc__)))
