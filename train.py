"""Hierarchical Native Training: a short tokenizer, then longer ones, then the generators.

stage 1   base          MIT, codebook, first experts and decoder learn together
stage 2   grow          per length: new experts learn, all that is older is frozen, but the decoder
          finetune      all together once more, briefly
stage 3   ar, maskgit   the tokenizer is frozen, its ids are cached, the generators learn from them

Run       python train.py --preset tiny        all stages that are not finished yet
          torchrun --nproc_per_node=8 -- train.py --preset imagenet-128 --data DIR --stage 2
          (the -- keeps torchrun from taking --run for one of its own flags)
Makes     runs/NAME/ with config.json tokenizer.pt generator-ar.pt generator-maskgit.pt log.jsonl
          samples/ tokens/
Resume    repeat the command. SIGTERM and Ctrl-C save first, then exit with 3; a second one quits at
          once.
Exit      0 finished, 1 failure, 2 something to mend in the command or the data, 3 interrupted and
          saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import config
from config import TokenizerConfig, TrainConfig, settings
from evaluation.progress import evaluate, held_out_loss, show_reconstructions, show_samples
from generator import GENERATORS
from layers import count_parameters
from loop import Loop, LossOf, frozen_copy, need_equal_pieces, new_optimizer
from losses import Adversary, Perceptual, reconstruction
from muon import Muon
from nativetok import NativeTok, as_it_is, from_checkpoint
from plumbing import checkpoint
from plumbing.batches import ImageStream
from plumbing.flags import as_dict, need
from plumbing.images import to_float
from plumbing.processes import enough_memory
from plumbing.run import Run
from plumbing.tokens import TokenStream, cache_tokens

# ------------------------------------------------------------------------------------------------
# what learns when

PARTS = ("mit", "codebook", "old experts", "new experts", "decoder")


@dataclass(frozen=True)
class Phase:
    name: str
    stage: int
    num_tokens: int
    steps: int
    learns: tuple[str, ...]                                                   # a selection of PARTS


def phases(tok: TokenizerConfig, train: TrainConfig) -> list[Phase]:
    """Stages 1 and 2 as a list of phases: the one place that says what learns when."""
    first, *longer = tok.token_schedule
    # The decoder goes on learning while the tokenizer grows, or nothing would read new tokens.
    grow = ("new experts", "decoder")
    plan = [Phase("base", 1, first, train.base_steps, PARTS)]
    plan += [Phase(f"grow-{L}", 2, L, train.grow_steps, grow) for L in longer]
    if longer:
        plan += [Phase("finetune", 2, tok.num_tokens, train.finetune_steps, PARTS)]
    return plan


def phase_table(plan: list[Phase]) -> str:
    head = f"  {'phase':10}{'tokens':>8}{'steps':>9}" + "".join(f"{part:>13}" for part in PARTS)
    lines = [head]
    for p in plan:
        learns = ["learns" if part in p.learns else "frozen" for part in PARTS]
        lines.append(f"  {p.name:10}{p.num_tokens:>8}{p.steps:>9}"
                     + "".join(f"{word:>13}" for word in learns))
    return "\n".join(lines)


def freeze(model: NativeTok, learns: tuple[str, ...]) -> None:
    """Let the parameters of the named PARTS learn and no others.

    "new experts" are those of the last growth step; "old experts" the others, and the embedding
    through which experts read prior tokens: to change it would change the old ones' ids.
    """
    def let(module: nn.Module, part: str) -> None:
        module.requires_grad_(part in learns)
    let(model.quantizer, "codebook")
    let(model.decoder, "decoder")
    if model.cfg.tokenizer != "nativetok":
        let(model.titok, "mit")
        return
    let(model.mit, "mit")
    let(model.mocet, "old experts")
    for expert in model.mocet.newest():
        let(expert, "new experts")


# ------------------------------------------------------------------------------------------------
# stages 1 and 2: the tokenizer

class Tokenizer:
    """What stages 1 and 2 train, and what a checkpoint of theirs holds.

    model      learns; ema is its running average, the one that is used later
    results    {phase: what evaluate() said at its end}; a phase that is in here is finished
    saved      the checkpoint that training goes on from, or None
    """

    def __init__(self, run: Run, change: Callable):
        self.run, self.path = run, run.path("tokenizer.pt")
        tok, train, device = run.tok, run.train, run.procs.device
        self.fixed = settings("tokenizer", tok, train)
        needs = ("num_tokens", "results", "tokenizer_config", "adversary", "continuous")
        self.saved = run.resume(self.path, self.fixed, needs)
        self.results = self.saved["results"] if self.saved else {}

        # One seed on every process, so that all begin with the same weights.
        torch.manual_seed(train.seed)
        self.model = change(NativeTok(tok))
        if self.saved:
            self.model.grow_to(self.saved["num_tokens"])
            checkpoint.load_strict(self.model, self.saved["model"], self.path)
        self.model.to(device)
        self.ema = frozen_copy(self.model)
        if self.saved:
            checkpoint.load_strict(self.ema, self.saved["ema"], self.path)

        # Two optional judges of sharpness. Squared error alone prefers a blur to a wrong edge.
        self.perceptual = Perceptual().to(device) if train.perceptual_weight else None
        self.adversary = None
        if train.adversarial_weight:
            self.adversary = Adversary(train.learning_rate, device, train.accumulate)
            if self.saved:
                self.adversary.load(self.saved["adversary"] or {}, self.path)

    def save(self, phase: str, step: int, optimizer: Muon) -> None:
        self.run.save(self.path, tokenizer_config=as_dict(self.run.tok), settings=self.fixed,
                      num_tokens=self.model.num_tokens, phase=phase, step=step,
                      results=self.results, model=self.model.state_dict(),
                      continuous=self.model.quantizer.continuous,
                      ema=self.ema.state_dict(), optimizer=optimizer.state_dict(),
                      adversary=self.adversary and self.adversary.state_dict())


def train_tokenizer(run: Run, stage: int | None, change: Callable) -> None:
    """The phases of stages 1 and 2 that are not finished yet; of one stage if it is given."""
    plan = phases(run.tok, run.train)
    run.say(phase_table(plan))
    tokenizer = Tokenizer(run, change)
    missing = [p.name for p in plan if p.stage < (stage or 1) and p.name not in tokenizer.results]
    need(not missing, f"stage {stage} needs stage 1, and {', '.join(missing)} is not finished in "
                      f"{run.folder}; run it without --stage, or with --stage 1")
    for number, phase in enumerate(plan):
        if phase.name not in tokenizer.results and stage in (None, phase.stage):
            train_phase(tokenizer, phase, number, steps_before=sum(p.steps for p in plan[:number]))


def train_phase(tokenizer: Tokenizer, phase: Phase, number: int, steps_before: int) -> None:
    """One row of the phase table, from wherever the checkpoint stands to its end."""
    run, saved = tokenizer.run, tokenizer.saved
    tok, train, procs, model = run.tok, run.train, run.procs, tokenizer.model

    # 1. Grow, if this phase is longer than the last. The average is copied anew, because the new
    #    experts have no past to be averaged with. Each phase has a seed of its own, so that one
    #    that starts from a checkpoint draws the same new experts as one that runs through.
    if model.num_tokens < phase.num_tokens:
        torch.manual_seed(train.seed + number)
        model.grow(phase.num_tokens)
        tokenizer.ema = frozen_copy(model)
    ema = tokenizer.ema

    # 2. Who learns, and how far the phase has come. Momentum of a phase says nothing about the
    #    next one, in which other parts learn, so every phase has a new optimizer.
    freeze(model, phase.learns)
    optimizer = new_optimizer(model, train.optimizer, train.weight_decay, train.beta2,
                              train.muon_learning_rate / (train.learning_rate or 1),
                              train.codebook_rate)
    # The very first steps run without quantization: a codebook of random codes would be noise to
    # the decoder. When they are over, the codebook is drawn from what the experts say by then.
    start, random, model.quantizer.continuous = 0, None, number == 0 and train.continuous_steps > 0
    if saved and saved["phase"] == phase.name:
        start, random, model.quantizer.continuous = (
            saved[name] for name in ("step", "random", "continuous"))
        checkpoint.load_optimizer(optimizer, saved["optimizer"], f"{tokenizer.path}: optimizer")
    run.seed(random, number)
    run.say(f"{phase.name}: {model.num_tokens} tokens, "
            f"{count_parameters(model, learning_only=True):,} of {count_parameters(model):,} "
            f"parameters learn, step {start} of {phase.steps}")

    def stream(step):
        return iter(ImageStream(run.data, tok.image_size, train.batch_size, train.seed, train.flip,
                                train.random_crop, procs.rank, procs.world, steps_before + step,
                                train.workers, train.skip_bad, train.timeout))

    # 3. Learn. Every term is a mean over the batch; this is the one place that weighs them.
    weights = {"pixels": 1.0, "codebook": 1.0, "commitment": tok.commitment_weight,
               "entropy": tok.entropy_weight,
               "perceptual": train.perceptual_weight, "adversarial": train.adversarial_weight}
    perceptual, adversary = tokenizer.perceptual, tokenizer.adversary
    began = time.time()
    loop = Loop(run, phase.name, model, ema, optimizer, stream, phase.steps, train.batch_size,
                (train.learning_rate, train.min_learning_rate, train.warmup_steps), start,
                train.cuda_graph)
    def save(step: int) -> None:
        tokenizer.save(phase.name, step, optimizer)

    with loop.saved_by(save):
        for images, _ in loop:
            images = to_float(images)                               # (B, 3, H, W) in [-1, 1]
            with loop.autocast():
                recon, _, terms = loop.model(images)
            terms["pixels"] = reconstruction(recon, images)
            if perceptual:
                terms["perceptual"] = perceptual(recon, images)
            if adversary and train.adversary_learns(steps_before + loop.step):
                adversary.see(images, recon)
            if adversary and train.adversary_judges(steps_before + loop.step):
                terms["adversarial"] = adversary.judge(recon, terms["pixels"])
            loss = sum(weights[name] * term for name, term in terms.items())
            loop.backward(loss, terms)
            if loop.stepped:
                tend_codebook(model.quantizer, ema.quantizer, loop.step, phase, train)
                if adversary:
                    adversary.learn()
            if loop.time_to_save:
                save(loop.step)
            if loop.time_to_show:
                show_reconstructions(run, ema, f"{phase.name}-{loop.step:07}")
        result = {"num_tokens": model.num_tokens, **evaluate(ema, run),
                  "seconds": round(time.time() - began, 1)}

    # 4. The averaged weights become the weights: what is frozen from now on, and what later experts
    #    are made for, must be what will be used.
    model.load_state_dict(ema.state_dict())
    tokenizer.results[phase.name] = result
    run.log(phase=phase.name, step=phase.steps, **result)  # before saving: lost, it is made again
    save(phase.steps)
    show_reconstructions(run, ema, phase.name)
    run.say(f"{phase.name}: {model.num_tokens} tokens, held-out PSNR {result['psnr']:.2f} dB, "
            f"{result['codebook_used']:.0%} of the codebook in use")


@torch.no_grad()
def tend_codebook(quantizer: nn.Module, ema: nn.Module, step: int, phase: Phase,
                  train: TrainConfig) -> None:
    """After `step` steps: begin to quantize when it is time, and move codes that nobody chose."""
    moved, reseed = None, train.reseed_every and step % train.reseed_every == 0
    # At or after, not exactly at: the step in question may have been skipped.
    if quantizer.continuous and step >= train.continuous_steps:
        quantizer.draw_codebook(quantizer.recent)
        quantizer.continuous, moved = False, slice(None)
    elif reseed and not quantizer.continuous and "codebook" in phase.learns:
        moved = quantizer.reseed()
    if moved is not None:  # a code that was moved has no past: an average of two places is no code
        ema.codebook[moved] = quantizer.codebook[moved]


# ------------------------------------------------------------------------------------------------
# stage 3: the generators

def finished_tokenizer(run: Run, change: Callable) -> NativeTok:
    """The tokenizer of this run. Raises UserError while a phase of stages 1 and 2 is missing."""
    path = run.path("tokenizer.pt")
    need(checkpoint.exists(path), f"stage 3 needs a tokenizer, and {run.folder} has none; "
                                  "run stages 1 and 2 first")
    saved = checkpoint.load(path)
    missing = [p.name for p in phases(run.tok, run.train) if p.name not in saved["results"]]
    need(not missing, f"stage 3 needs a finished tokenizer, and {', '.join(missing)} is missing in "
                      f"{run.folder}; run stages 1 and 2 first")
    return from_checkpoint(saved, path, change).to(run.procs.device)


def train_generator(run: Run, kind: str, change_model: Callable,
                    change_tokenizer: Callable) -> None:
    """Train one generator, "ar" or "maskgit", on the ids of this run's finished tokenizer."""
    gen, train, procs, path = run.gen, run.train, run.procs, run.path(f"generator-{kind}.pt")
    tokenizer = change_tokenizer(finished_tokenizer(run, change_model))
    fixed = settings("generator", gen, train)
    saved = run.resume(path, fixed, needs=("tokenizer",))
    need(not saved or saved["tokenizer"] == tokenizer.fingerprint,
         f"{path} has learned the ids of another tokenizer than the tokenizer.pt beside it; "
         f"delete generator-{kind}*.pt and repeat the command")
    if saved and saved["phase"] == "finished":
        return

    # 1. Every image as ids, encoded once: the tokenizer is frozen, so they never change.
    def encode(images: Tensor) -> Tensor:
        return tokenizer.encode(to_float(images.to(procs.device))).cpu()
    ids, labels = cache_tokens(run.path("tokens"), tokenizer.fingerprint, run.data,
                               run.tok.image_size, train.flip, encode, procs, train.workers,
                               train.skip_bad, train.timeout)

    # 2. The generator, its average and its optimizer, from the checkpoint as far as it has come.
    torch.manual_seed(train.seed)
    classes = len(run.data.classes)
    model = GENERATORS[kind](gen, run.tok.num_tokens, run.tok.codebook_size, classes)
    model.to(procs.device)
    ema = frozen_copy(model)
    optimizer = new_optimizer(model, train.optimizer, train.generator_weight_decay,
                              train.generator_beta2,
                              train.muon_learning_rate / (train.generator_learning_rate or 1))
    start = saved["step"] if saved else 0
    if saved:
        checkpoint.load_strict(model, saved["model"], path)
        checkpoint.load_strict(ema, saved["ema"], path)
        checkpoint.load_optimizer(optimizer, saved["optimizer"], f"{path}: optimizer")
    # Other random numbers for dropout and masks than any phase of the tokenizer had.
    run.seed(saved["random"] if saved else None, 100 + len(kind))
    run.say(f"{kind}: {count_parameters(model):,} parameters, {ids.shape[0]:,} images in "
            f"{ids.shape[1]} copies, step {start} of {train.generator_steps}")

    def stream(step):
        return iter(TokenStream(ids, labels, train.generator_batch_size, train.seed, procs.rank,
                                procs.world, step))

    def save(step, phase=kind):
        run.save(path, kind=kind, generator_config=as_dict(gen), settings=fixed,
                 num_tokens=run.tok.num_tokens, codebook_size=run.tok.codebook_size,
                 tokenizer=tokenizer.fingerprint, phase=phase, step=step, model=model.state_dict(),
                 ema=ema.state_dict(), optimizer=optimizer.state_dict())

    # 3. Learn.
    began, wrapped = time.time(), LossOf(model)
    loop = Loop(run, kind, wrapped, LossOf(ema), optimizer, stream, train.generator_steps,
                train.generator_batch_size,
                (train.generator_learning_rate, train.generator_min_learning_rate,
                 train.generator_warmup_steps), start, train.cuda_graph)
    held_out = {}
    with loop.saved_by(save):
        for batch_ids, batch_labels in loop:                     # (B, L), (B,)
            with loop.autocast():
                loss, terms = loop.model(batch_ids, batch_labels)
            weight = terms.pop("weight", 1.0)
            # nll_by_position is a vector; it is for explain.py, and no line of the log.
            logged = {name: term for name, term in terms.items() if term.ndim == 0}
            loop.backward(loss, logged, weight)
            if loop.time_to_save:
                save(loop.step)
            if loop.time_to_show:
                show_samples(run, tokenizer, ema, f"{kind}-{loop.step:07}")

        # 4. How good it is on images that nothing was learned from, if their classes mean the same.
        if run.val.classes == run.data.classes:
            held_out["held_out_loss"] = round(held_out_loss(run, ema, encode), 4)
    run.log(phase=kind, step=train.generator_steps, **held_out,
            seconds=round(time.time() - began, 1))
    save(train.generator_steps, "finished")
    show_samples(run, tokenizer, ema, kind)


# ------------------------------------------------------------------------------------------------

def main(args, change_model: Callable = as_it_is, change_tokenizer: Callable = as_it_is) -> None:
    """Run the stages that args ask for.

    Experiments change what is trained by two functions. One is given each new NativeTok at its
    first length, before it is trained or a checkpoint is loaded into it; NativeTok.load takes the
    same function. The other is given the finished tokenizer before stage 3 reads its ids.
    """
    run = Run(args, (args.tok, args.gen, args.train))
    run.tok, run.gen = args.tok, args.gen
    check_belongs(run)
    run.begin()
    train, procs = run.train, run.procs
    run.say(f"{run.folder}: {procs.world} x {procs.device.type} ({torch.get_num_threads()} threads "
            f"each), {procs.precision(train.precision)}; images {run.data.name}: "
            f"{len(run.data):,} to learn from, {len(run.val):,} held out, "
            f"{len(run.data.classes)} classes")
    repair = ("lower --batch_size or --generator_batch_size, or raise --accumulate, "
              "and repeat the command")
    with enough_memory(repair):
        if args.stage in (None, 1, 2):
            train_tokenizer(run, args.stage, change_model)
        if args.stage in (None, 3):
            for kind in train.generator_kinds:
                train_generator(run, kind, change_model, change_tokenizer)
    names = ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt", "log.jsonl", "samples")
    made = [name for name in names if os.path.exists(run.path(name))]
    run.say(f"finished; in {run.folder}: {' '.join(made)}")
    run.end()


def check_belongs(run: Run) -> None:
    """Before anything is written: are settings and images those of the checkpoints in the folder?

    What only a later stage would notice is asked here too, so that nobody waits hours for it.
    """
    tok, gen, train, world = run.tok, run.gen, run.train, run.procs.world
    need(train.data != "shapes" or tok.image_size == 32,
         f"the built-in shapes are 32x32 pixels, not {tok.image_size}; "
         "give --data or --image_size 32")
    if train.cuda_graph:
        need(not tok.tail_drop, "--tail_drop cuts each batch to another length, which no recording "
             "can follow; leave out --cuda_graph")
        run.procs.need_recordable()
    need_equal_pieces("batch_size", train.batch_size, world, train.accumulate)
    need_equal_pieces("generator_batch_size", train.generator_batch_size, world, train.accumulate)
    run.compare(run.path("tokenizer.pt"), settings("tokenizer", tok, train))
    for kind in train.generator_kinds:
        run.compare(run.path(f"generator-{kind}.pt"), settings("generator", gen, train))


if __name__ == "__main__":
    main_with_user_errors(lambda: main(config.parse_run(__doc__)))
