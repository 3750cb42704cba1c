"""Hierarchical Native Training: a short tokenizer, then longer ones, then the generators.

stage 1   base          MIT, codebook, first experts and decoder learn together
stage 2   grow          per length: new experts learn, all that is older is frozen, the decoder goes on (a flag)
          finetune      all together once more, briefly
stage 3   ar, maskgit   the tokenizer is frozen, its ids are cached once, the generators learn from the cache

Run       python train.py --preset tiny        all stages that are not finished yet
          torchrun --nproc_per_node=8 -- train.py --preset imagenet-128 --data DIR --stage 2
          (the -- keeps torchrun from taking --run for one of its own flags)
Makes     runs/NAME/ with config.json tokenizer.pt generator-ar.pt generator-maskgit.pt log.jsonl samples/ tokens/
Resume    repeat the command. SIGTERM and Ctrl-C save first, then exit with 3; a second one quits at once.
Exit      0 finished, 1 failure, 2 something to mend in the command or the data, 3 interrupted and saved
"""
import copy
import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import config
from config import TokenizerConfig, TrainConfig, settings
from generator import GENERATORS
from layers import count_parameters
from loop import Job, fit, new_optimizer
from losses import Adversary, Perceptual, mse, reconstruction, to_db
from nativetok import NativeTok, from_checkpoint
from plumbing import checkpoint
from plumbing.batches import ImageStream, eval_batches
from plumbing.flags import as_dict, main_with_user_errors, need
from plumbing.images import to_float
from plumbing.processes import enough_memory
from plumbing.run import Run
from plumbing.tokens import TokenStream, cache_tokens
from quantizer import usage

# ------------------------------------------------------------------------------------------------
# what learns when

PARTS = ("mit", "codebook", "old experts", "new experts", "decoder")


@dataclass(frozen=True)
class Phase:
    name: str
    stage: int
    num_tokens: int
    steps: int
    learning_rate: float
    learns: tuple[str, ...]                                                   # a selection of PARTS


def phases(tok: TokenizerConfig, train: TrainConfig) -> list[Phase]:
    """Stages 1 and 2 as a list of phases: the one place that says what learns when."""
    first, *longer = tok.token_schedule
    grow = ("new experts", "decoder") if train.grow_decoder else ("new experts",)
    plan = [Phase("base", 1, first, train.base_steps, train.learning_rate, PARTS)]
    plan += [Phase(f"grow-{L}", 2, L, train.grow_steps, train.learning_rate, grow) for L in longer]
    if longer:
        plan += [Phase("finetune", 2, tok.num_tokens, train.finetune_steps, train.finetune_learning_rate, PARTS)]
    return plan


def phase_table(plan: list[Phase]) -> str:
    lines = [f"  {'phase':10}{'tokens':>8}{'steps':>9}" + "".join(f"{part:>13}" for part in PARTS)]
    lines += [f"  {p.name:10}{p.num_tokens:>8}{p.steps:>9}" +
              "".join(f"{'learns' if part in p.learns else 'frozen':>13}" for part in PARTS) for p in plan]
    return "\n".join(lines)


def freeze(model: NativeTok, learns: tuple[str, ...]) -> None:
    """Let the parameters of the named PARTS learn and no others; "new experts" are the newest group."""
    newest = f"mocet.groups.{len(model.mocet.groups) - 1}." if hasattr(model, "mocet") else None
    for name, p in model.named_parameters():
        part = {"mit": "mit", "titok": "mit", "quantizer": "codebook", "decoder": "decoder"}.get(name.split(".")[0])
        part = part or ("new experts" if name.startswith(newest) else "old experts")
        p.requires_grad_(part in learns)


# ------------------------------------------------------------------------------------------------
# stages 1 and 2

@torch.no_grad()
def evaluate(model: NativeTok, run: Run) -> dict:
    """PSNR of the mean squared error over held-out images, share of codes in use, perplexity of each position."""
    ids, errors = [], []
    for images, _ in eval_batches(run.val, run.tok.image_size, 250, run.eval_indices, skip_bad=run.train.skip_bad):
        images = to_float(images.to(run.procs.device))
        ids.append(model.encode(images))
        errors.append(mse(model.decode(ids[-1]).clamp(-1, 1), images))
    used, perplexity = usage(torch.cat(ids), run.tok.codebook_size)
    return {"psnr": round(to_db(torch.cat(errors).mean()).item(), 3), "codebook_used": round(used, 4),
            "perplexity": [round(p, 1) for p in perplexity.tolist()], "images": len(run.eval_indices)}


def load_adversary(adversary: Adversary, parts: dict, path: str) -> None:
    missing = [name for name in ("net", "lecam", "optimizer") if name not in parts]
    need(not missing, f"{path}: adversary has no {', '.join(missing)}")
    checkpoint.load_strict(adversary.net, parts["net"], f"{path}: adversary net")
    checkpoint.load_strict(adversary.lecam, parts["lecam"], f"{path}: adversary lecam")
    checkpoint.load_optimizer(adversary.optimizer, parts["optimizer"], f"{path}: adversary optimizer", may_be_new=True)   # before adversarial_start


def train_tokenizer(run: Run, stage: int | None) -> None:
    """The phases of stages 1 and 2 that are not finished yet; of one stage if it is given."""
    tok, train, procs, path = run.tok, run.train, run.procs, run.path("tokenizer.pt")
    plan, fixed = phases(tok, train), settings("tokenizer", tok, train)
    run.say(phase_table(plan))
    saved = run.resume(path, fixed, run.data.fingerprint, needs=("num_tokens", "results", "tokenizer_config", "adversary"))
    results = saved["results"] if saved else {}
    missing = [p.name for p in plan if p.stage < (stage or 1) and p.name not in results]
    need(not missing, f"stage {stage} needs stage 1, and {', '.join(missing)} is not finished in {run.folder}; run it without --stage, or with --stage 1")

    torch.manual_seed(train.seed)  # the same weights on every process
    model = NativeTok(tok)
    if saved:
        checkpoint.load_strict(model.grow_to(saved["num_tokens"]), saved["model"], path)
    model.to(procs.device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if saved:
        checkpoint.load_strict(ema, saved["ema"], path)
    perceptual = Perceptual().to(procs.device) if train.perceptual_weight else None
    adversary = Adversary(train.learning_rate, procs.device) if train.adversarial_weight else None
    if saved and adversary:
        load_adversary(adversary, saved["adversary"] or {}, path)
    show = to_float(next(eval_batches(run.val, tok.image_size, 16, run.eval_indices[:: max(1, len(run.eval_indices) // 16)]))[0])

    for number, phase in enumerate(plan):
        if phase.name in results or stage not in (None, phase.stage):
            continue
        start = saved["step"] if saved and saved["phase"] == phase.name else 0
        steps_before = sum(p.steps for p in plan[:number])
        if model.num_tokens < phase.num_tokens:
            torch.manual_seed(train.seed + number)  # the same new experts on every process
            model.grow(phase.num_tokens)
            ema = copy.deepcopy(model).requires_grad_(False).eval()
        freeze(model, phase.learns)
        optimizer = new_optimizer(model, train.weight_decay, train.beta2)
        if start:
            checkpoint.load_optimizer(optimizer, saved["optimizer"], f"{path}: optimizer")
        run.seed(saved["random"] if start else None, number)
        model.quantizer.continuous = number == 0 and start < train.continuous_steps
        run.say(f"{phase.name}: {model.num_tokens} tokens, {count_parameters(model, learning_only=True):,} of "
                f"{count_parameters(model):,} parameters learn, step {start} of {phase.steps}")

        def loss(wrapped, batch):
            images = to_float(batch[0])
            recon, _, terms = wrapped(images)
            terms["pixels"] = reconstruction(recon, images)
            weights = {"pixels": 1.0, "codebook": 1.0, "commitment": tok.commitment_weight, "entropy": tok.entropy_weight}
            if perceptual:
                terms["perceptual"], weights["perceptual"] = perceptual(recon, images), train.perceptual_weight
            if adversary and steps_before + job.step >= train.adversarial_start:
                terms["adversarial"], weights["adversarial"] = adversary.judge(images, recon), train.adversarial_weight
            return sum(weights[name] * term for name, term in terms.items()), {name: term.detach() for name, term in terms.items()}

        @torch.no_grad()
        def after_step(done):
            quantizer, moved = model.quantizer, None
            if quantizer.continuous and done == train.continuous_steps:
                quantizer.draw_codebook(quantizer.recent)
                quantizer.continuous, moved = False, ...
            elif "codebook" in phase.learns and not quantizer.continuous and train.reseed_every and done % train.reseed_every == 0:
                moved = quantizer.reseed()
            if moved is not None:  # an average of old and new places is no code
                ema.quantizer.codebook[moved] = quantizer.codebook[moved]
            if adversary:
                with torch.enable_grad():
                    adversary.learn()

        def save(step):
            run.save(path, tokenizer_config=as_dict(tok), settings=fixed, num_tokens=model.num_tokens, phase=phase.name, step=step, results=results,
                     model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), adversary=adversary and adversary.state_dict())

        def picture(name):
            if procs.main:
                run.grid(name, [show, ema.decode(ema.encode(show.to(procs.device)))])

        def stream(step):
            return iter(ImageStream(run.data, tok.image_size, train.batch_size, train.seed, train.flip, train.random_crop,
                                    procs.rank, procs.world, steps_before + step, train.workers, train.skip_bad))

        job = Job(phase.name, phase.steps, train.batch_size, (phase.learning_rate, train.min_learning_rate, train.warmup_steps),
                  model, ema, optimizer, stream, loss, after_step, save, picture, start)
        began = time.time()
        fit(job, run)
        model.load_state_dict(ema.state_dict())  # what is frozen from now on is what will be used
        results[phase.name] = {"num_tokens": model.num_tokens, **evaluate(ema, run), "seconds": round(time.time() - began, 1)}
        save(phase.steps)
        picture(phase.name)
        run.log(phase=phase.name, step=phase.steps, **results[phase.name])
        run.say(f"{phase.name}: {model.num_tokens} tokens, held-out PSNR {results[phase.name]['psnr']:.2f} dB, "
                f"{results[phase.name]['codebook_used']:.0%} of the codebook in use")


# ------------------------------------------------------------------------------------------------
# stage 3

class LossOf(nn.Module):
    """A generator whose forward is its loss, because that is what DistributedDataParallel and compile look at."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator

    def forward(self, ids: Tensor, labels: Tensor):
        return self.generator.loss(ids, labels)


def train_generator(run: Run, kind: str) -> None:
    """Train one generator on the ids of the finished tokenizer in this run."""
    gen, train, procs, path = run.gen, run.train, run.procs, run.path(f"generator-{kind}.pt")
    need(checkpoint.exists(run.path("tokenizer.pt")), f"stage 3 needs a tokenizer, and {run.folder} has none; run stages 1 and 2 first")
    saved_tokenizer = checkpoint.load(run.path("tokenizer.pt"))
    missing = [p.name for p in phases(run.tok, train) if p.name not in saved_tokenizer["results"]]
    need(not missing, f"stage 3 needs a finished tokenizer, and {', '.join(missing)} is missing in {run.folder}; run stages 1 and 2 first")
    tokenizer = from_checkpoint(saved_tokenizer, run.path("tokenizer.pt")).to(procs.device)
    fixed = {**settings("generator", gen, train), "tokenizer": tokenizer.fingerprint}
    saved = run.resume(path, fixed, run.data.fingerprint)
    if saved and saved["phase"] == "finished":
        return

    def encode(images: Tensor) -> Tensor:
        return tokenizer.encode(to_float(images.to(procs.device))).cpu()
    ids, labels = cache_tokens(run.path("tokens"), tokenizer.fingerprint, run.data, run.tok.image_size, train.flip, encode, procs, train.workers, train.skip_bad)

    torch.manual_seed(train.seed)
    model = GENERATORS[kind](gen, run.tok.num_tokens, run.tok.codebook_size, len(run.data.classes)).to(procs.device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = new_optimizer(model, train.generator_weight_decay, train.generator_beta2)
    start = saved["step"] if saved else 0
    if saved:
        checkpoint.load_strict(model, saved["model"], path)
        checkpoint.load_strict(ema, saved["ema"], path)
        checkpoint.load_optimizer(optimizer, saved["optimizer"], f"{path}: optimizer")
    run.seed(saved["random"] if saved else None, 100 + len(kind))
    run.say(f"{kind}: {count_parameters(model):,} parameters, {ids.shape[0]:,} images in {ids.shape[1]} copies, step {start} of {train.generator_steps}")

    def loss(wrapped, batch):
        total, logs = wrapped(*batch)
        return total, {name: value for name, value in logs.items() if value.ndim == 0}

    def save(step, phase=kind):
        run.save(path, kind=kind, generator_config=as_dict(gen), settings=fixed, num_tokens=run.tok.num_tokens,
                 codebook_size=run.tok.codebook_size, tokenizer=tokenizer.fingerprint, phase=phase, step=step,
                 model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())

    def picture(name):
        if procs.main:
            classes = torch.arange(min(10, len(run.data.classes)), device=procs.device)
            noise = torch.Generator().manual_seed(train.seed)
            samples = ema.sample(classes.repeat_interleave(8), cfg_scale=2.0, generator=noise)
            run.grid(name, list(tokenizer.decode(samples).split(8)))

    def stream(step):
        return iter(TokenStream(ids, labels, train.generator_batch_size, train.seed, procs.rank, procs.world, step))

    wrapped = LossOf(model)
    job = Job(kind, train.generator_steps, train.generator_batch_size,
              (train.generator_learning_rate, train.generator_min_learning_rate, train.generator_warmup_steps),
              wrapped, LossOf(ema), optimizer, stream, loss, lambda done: None, save, picture, start)
    began = time.time()
    fit(job, run)
    with torch.no_grad():
        batches = eval_batches(run.val, run.tok.image_size, 250, run.eval_indices, skip_bad=train.skip_bad)
        held_out = [(encode(images).to(procs.device), y.to(procs.device)) for images, y in batches]
        torch.manual_seed(train.seed)  # MaskGIT's loss draws masks
        losses = [ema.loss(i, y)[0].item() * len(i) for i, y in held_out] if run.val.classes == run.data.classes else []
    save(train.generator_steps, "finished")
    picture(kind)
    run.log(phase=kind, step=train.generator_steps, **({"held_out_loss": round(sum(losses) / len(run.eval_indices), 4)} if losses else {}),
            seconds=round(time.time() - began, 1))


def main(args) -> None:
    run = Run(args)
    procs = run.procs
    run.say(f"{run.folder}: {procs.world} x {procs.device.type} ({torch.get_num_threads()} threads each), {procs.precision(run.train.precision)}; images {run.data.name}: "
            f"{len(run.data):,} to learn from, {len(run.val):,} held out, {len(run.data.classes)} classes")
    with enough_memory("lower --batch_size or --generator_batch_size, or raise --accumulate, and repeat the command"):
        if args.stage in (None, 1, 2):
            train_tokenizer(run, args.stage)
        if args.stage in (None, 3):
            for kind in run.train.generator_kinds:
                train_generator(run, kind)
    made = [name for name in ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt", "log.jsonl", "samples") if os.path.exists(run.path(name))]
    run.say(f"finished; in {run.folder}: {' '.join(made)}")
    run.procs.end()


if __name__ == "__main__":
    main_with_user_errors(lambda: main(config.parse_run(__doc__)))
