"""Hierarchical Native Training: a short tokenizer, then longer ones, then what reads its tokens.

stage 1   base          MIT, codebook, first experts and decoder learn together
stage 2   grow          per length: new experts learn, all that is older is frozen, but the decoder
          finetune      all together once more, briefly
stage 3   ar, maskgit   the tokenizer is frozen, its ids are cached, the generators learn from them
stage 4   flow_decoder  the tokenizer is frozen, a second decoder learns to draw sharp images, if
                        there are --flow_decoder_steps

Run       python train.py --preset tiny        all stages that are not finished yet
          torchrun --nproc_per_node=8 -- train.py --preset imagenet-128 --data DIR --stage 2
          (the -- keeps torchrun from taking --run for one of its own flags)
Makes     runs/NAME/ with config.json tokenizer.pt generator-ar.pt generator-maskgit.pt
          flow-decoder.pt log.jsonl samples/ tokens/
Resume    repeat the command. SIGTERM and Ctrl-C save first, then exit with 3; a second one quits at
          once.
Exit      0 finished, 1 failure, 2 user error, in the command or the data, 3 interrupted and
          saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import config
import flow_decoder
from config import TokenizerConfig, TrainConfig, settings
from evaluation.progress import (
    drawn_psnr, evaluate, held_out_loss, show_drawn, show_reconstructions, show_samples)
from flow_decoder import FlowDecoder, FlowNet
from generator import GENERATORS, Generator
from loop import Stage, make_ema, need_equal_pieces
from losses import reconstruction
from nativetok import NativeTok, as_it_is, from_checkpoint
from plumbing import checkpoint
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

def train_tokenizer(run: Run, stage: int | None, change: Callable) -> None:
    """The phases of stages 1 and 2 that are not finished yet; of one stage if it is given."""
    plan, path = phases(run.tok, run.train), run.path("tokenizer.pt")
    run.say(phase_table(plan))
    # A phase whose result is in the checkpoint is finished.
    done = checkpoint.load(path, needs=("results",))["results"] if checkpoint.exists(path) else {}
    missing = [p.name for p in plan if p.stage < (stage or 1) and p.name not in done]
    need(not missing, f"stage {stage} needs stage 1, and {', '.join(missing)} is not finished in "
                      f"{run.folder}; run it without --stage, or with --stage 1")
    for number, phase in enumerate(plan):
        if phase.name not in done and stage in (None, phase.stage):
            train_phase(run, phase, number, sum(p.steps for p in plan[:number]), change)


def train_phase(run: Run, phase: Phase, number: int, steps_before: int, change: Callable) -> None:
    """One row of the phase table, from wherever the checkpoint stands to its end."""
    tok, train = run.tok, run.train

    def new(saved: dict | None) -> NativeTok:
        """At the length that the checkpoint has reached."""
        model = change(NativeTok(tok))
        return model.grow_to(saved["num_tokens"]) if saved else model

    def content() -> dict:
        return {"tokenizer_config": as_dict(tok), "num_tokens": model.num_tokens,
                "results": results, "bypass": model.quantizer.bypass}

    # 1. The tokenizer as the phase before has left it, or as far as this one has come. It grows if
    #    this phase is longer than the last. Then the average is copied anew, because new experts
    #    have no past to be averaged with. Each phase has a seed of its own, so that one that starts
    #    from a checkpoint draws the same new experts as one that runs through.
    stage = Stage(run, "tokenizer.pt", phase.name, new, settings("tokenizer", tok, train), content,
                  needs=("num_tokens", "results", "bypass"))
    model, saved = stage.raw_model, stage.saved
    results = saved["results"] if saved else {}
    if model.num_tokens < phase.num_tokens:
        torch.manual_seed(train.seed + number)
        model.grow(phase.num_tokens)
        stage.ema = make_ema(model)
    ema = stage.ema

    # 2. Who learns. The very first steps run without quantization: a codebook of random codes would
    #    be noise to the decoder. When they are over, the codebook is drawn from what the experts
    #    emit by then. Momentum says nothing about a phase in which other parts learn, so every
    #    phase begins with a new optimizer.
    freeze(model, phase.learns)
    model.quantizer.bypass = (saved["bypass"] if stage.goes_on
                                  else number == 0 and train.continuous_steps > 0)
    stage.begin(train.optim(phase.steps, train.learning_rate), number,
                codebook_rate=train.codebook_rate, cuda_graph=stage.is_recorded(
                    "--tail_drop cuts each batch to another length" if tok.tail_drop else ""))

    # 3. Learn. Every term is a mean over the batch; this is the one place that weighs them.
    weights = {"pixels": 1.0, "codebook": 1.0, "commitment": 0.25,  # [TiTok]
               "entropy": tok.entropy_weight}

    def show(name: str) -> None:
        show_reconstructions(run, ema, name)

    with stage.saving():
        for pixels, _ in stage.over(run.stream(train.batch_size, steps_before + stage.step)):
            images = to_float(pixels)                               # (B, 3, H, W) in [-1, 1]
            with stage.autocast():
                recon, _, terms = stage.model(images)
            terms["pixels"] = reconstruction(recon, images)
            stage.backward(sum(weights[name] * term for name, term in terms.items()), terms)
            if stage.stepped:
                update_codebook(model.quantizer, ema.quantizer, stage.step, phase, train)
            stage.save_or_show(show)
        result = {"num_tokens": model.num_tokens, **evaluate(ema, run), "seconds": stage.seconds}

    # 4. The averaged weights become the weights: what is frozen from now on, and what later experts
    #    are made for, must be what will be used.
    model.load_state_dict(ema.state_dict())
    results[phase.name] = result
    stage.finish(result, phase=phase.name)
    show(phase.name)
    run.say(f"{phase.name}: {model.num_tokens} tokens, held-out PSNR {result['psnr']:.2f} dB, "
            f"{result['codebook_used']:.0%} of the codebook in use")


@torch.no_grad()
def update_codebook(quantizer: nn.Module, ema: nn.Module, step: int, phase: Phase,
                  train: TrainConfig) -> None:
    """After `step` steps: begin to quantize when it is time, and move codes that nobody chose."""
    moved, restart = None, train.reseed_every and step % train.reseed_every == 0
    # At or after, not exactly at: the step in question may have been skipped.
    if quantizer.bypass and step >= train.continuous_steps:
        quantizer.draw_codebook(quantizer.recent)
        quantizer.bypass, moved = False, slice(None)
    elif restart and not quantizer.bypass and "codebook" in phase.learns:
        moved = quantizer.restart_dead_codes()
    if moved is not None:  # a code that was moved has no past: an average of two places is no code
        ema.codebook[moved] = quantizer.codebook[moved]


# ------------------------------------------------------------------------------------------------
# stage 3: the generators

def finished_tokenizer(run: Run, stage: int, change: Callable) -> NativeTok:
    """The tokenizer of this run. Raises UserError while a phase of stages 1 and 2 is missing."""
    path = run.path("tokenizer.pt")
    need(checkpoint.exists(path), f"stage {stage} needs a tokenizer, and {run.folder} has none; "
                                  "run stages 1 and 2 first")
    saved = checkpoint.load(path)
    missing = [p.name for p in phases(run.tok, run.train) if p.name not in saved["results"]]
    need(not missing, f"stage {stage} needs a finished tokenizer, and {', '.join(missing)} is "
                      f"missing in {run.folder}; run stages 1 and 2 first")
    return from_checkpoint(saved, path, change).to(run.procs.device)


def train_generator(run: Run, kind: str, change_model: Callable,
                    change_tokenizer: Callable) -> None:
    """Train one generator, "ar" or "maskgit", on the ids of this run's finished tokenizer."""
    tok, gen, train, procs = run.tok, run.gen, run.train, run.procs
    tokenizer = change_tokenizer(finished_tokenizer(run, 3, change_model))

    def new(saved: dict | None) -> Generator:
        return GENERATORS[kind](gen, tok.num_tokens, tok.codebook_size, len(run.data.classes))

    def content() -> dict:
        return {"kind": kind, "generator_config": as_dict(gen), "num_tokens": tok.num_tokens,
                "codebook_size": tok.codebook_size, "tokenizer": tokenizer.fingerprint}

    # 1. The generator, as far as it has come.
    stage = Stage(run, f"generator-{kind}.pt", kind, new, settings("generator", gen, train),
                  content, needs=("tokenizer",))
    need_its_tokenizer(stage, tokenizer)
    if stage.finished:
        return

    # 2. Every image as ids, encoded once: the tokenizer is frozen, so they never change.
    def encode(pixels: Tensor) -> Tensor:
        return tokenizer.encode(to_float(pixels.to(procs.device))).cpu()
    ids, labels = cache_tokens(run.path("tokens"), tokenizer.fingerprint, run.data, tok.image_size,
                               train.flip, encode, procs, workers=train.workers,
                               skip_bad=train.skip_bad, timeout=train.timeout)
    run.say(f"{kind}: {ids.shape[0]:,} images in {ids.shape[1]} copies")
    # Other random numbers for dropout and masks than any phase of the tokenizer had, hence 100.
    stage.begin(train.generator, 100 + list(GENERATORS).index(kind), stage.raw_model.loss,
                cuda_graph=stage.is_recorded())

    # 3. Learn.
    def show(name: str) -> None:
        show_samples(run, tokenizer, stage.ema, name)

    batches = TokenStream(ids, labels, train.generator.batch_size, train.seed, rank=procs.rank,
                          world=procs.world, start_step=stage.step)
    result = {}
    with stage.saving():
        for batch_ids, batch_labels in stage.over(batches):      # (B, L), (B,)
            with stage.autocast():
                loss, terms = stage.model(batch_ids, batch_labels)
            weight = terms.pop("weight", 1.0)
            # nll_by_position is a vector; it is for explain.py, and no line of the log.
            logged = {name: term for name, term in terms.items() if term.ndim == 0}
            stage.backward(loss, logged, weight)
            stage.save_or_show(show)

        # 4. How good it is on images that nothing was learned from, if their classes mean the same.
        if run.val.classes == run.data.classes:
            result["held_out_loss"] = round(held_out_loss(run, stage.ema, encode), 4)
    stage.finish({**result, "seconds": stage.seconds})
    show(kind)


def need_its_tokenizer(stage: Stage, tokenizer: NativeTok) -> None:
    """Raise UserError if the stage goes on from a checkpoint that learned with another one."""
    name, _ = os.path.splitext(os.path.basename(stage.path))
    need(not stage.saved or stage.saved["tokenizer"] == tokenizer.fingerprint,
         f"{stage.path} has learned the ids of another tokenizer than the tokenizer.pt beside it; "
         f"delete {name}*.pt and repeat the command")


# ------------------------------------------------------------------------------------------------
# stage 4: the flow decoder

def train_flow_decoder(run: Run, change_model: Callable) -> None:
    """Train the decoder that draws, on this run's finished tokenizer."""
    train, flow = run.train, run.flow
    tokenizer = finished_tokenizer(run, 4, change_model)

    def content() -> dict:
        return {"flow_decoder_config": as_dict(flow), "tokenizer": tokenizer.fingerprint}
    stage = Stage(run, "flow-decoder.pt", "flow_decoder", lambda saved: FlowNet(flow, run.tok),
                  settings("flow_decoder", flow, train), content, needs=("tokenizer",))
    need_its_tokenizer(stage, tokenizer)
    if stage.finished:
        return
    # Other random numbers for times, noise and lengths than the stages before had, hence 200.
    stage.begin(train.optim(train.flow_decoder_steps, train.flow_decoder_learning_rate), 200,
                cuda_graph=stage.is_recorded("each step reads another number of tokens"))

    def show(name: str) -> None:
        show_drawn(run, FlowDecoder(tokenizer, stage.ema), name)

    with stage.saving():
        for pixels, _ in stage.over(run.stream(train.batch_size, stage.step)):
            images = to_float(pixels)                               # (B, 3, H, W) in [-1, 1]
            # Encoded anew at each step: a cache of ids knows neither crop nor mirror image.
            # A prefix, so that any number of tokens is a sharp image.
            ids = tokenizer.encode(images)[:, :flow_decoder.prefix_length(run.tok.num_tokens)]
            mean, z_q = tokenizer.decode(ids), tokenizer.quantizer.lookup(ids)
            with stage.autocast():
                loss, terms = flow_decoder.loss(stage.model, images, z_q.detach(), mean)
            stage.backward(loss, terms)
            stage.save_or_show(show)
        result = drawn_psnr(run, FlowDecoder(tokenizer, stage.ema))
    stage.finish({**result, "seconds": stage.seconds})
    show("flow_decoder")


# ------------------------------------------------------------------------------------------------

def main(args, change_model: Callable = as_it_is, change_tokenizer: Callable = as_it_is) -> None:
    """Run the stages that args ask for.

    Experiments change what is trained by two functions. One is given each new NativeTok at its
    first length, before it is trained or a checkpoint is loaded into it; NativeTok.load takes the
    same function. The other is given the finished tokenizer before stage 3 reads its ids.
    """
    run = Run(args, (args.tok, args.gen, args.flow, args.train))
    run.tok, run.gen, run.flow = args.tok, args.gen, args.flow
    check_belongs(run)
    need(args.stage != 4 or args.train.flow_decoder_steps,
         "stage 4 takes --flow_decoder_steps, such as 2000 at 32 pixels")
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
        if args.stage == 4 or args.stage is None and train.flow_decoder_steps:
            train_flow_decoder(run, change_model)
    names = ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt", "flow-decoder.pt",
             "log.jsonl", "samples")
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
    need_equal_pieces("batch_size", train.batch_size, world, train.accumulate)
    need_equal_pieces("generator_batch_size", train.generator.batch_size, world, train.accumulate)
    run.compare(run.path("tokenizer.pt"), settings("tokenizer", tok, train))
    for kind in train.generator_kinds:
        run.compare(run.path(f"generator-{kind}.pt"), settings("generator", gen, train))
    if train.flow_decoder_steps:
        P = run.flow.flow_decoder_patch_size
        need(tok.image_size % P == 0, f"image_size {tok.image_size} is not a multiple of "
             f"flow_decoder_patch_size {P}; give another one")
        run.compare(run.path("flow-decoder.pt"), settings("flow_decoder", run.flow, train))


if __name__ == "__main__":
    main_with_user_errors(lambda: main(config.parse_run(__doc__)))
