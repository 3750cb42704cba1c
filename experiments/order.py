"""Does native order help? The same generators on tokens of different tokenizers, under one budget.

    titok               latent tokens inside a ViT, unordered
    titok-causal        the same, with a causal mask among the latents
    titok-taildrop      titok, ordered by dropping the tail of the tokens in half of the steps
    nativetok-joint     MIT and MoCET at full length from the start
    nativetok-hnt       MIT and MoCET, grown by hierarchical native training: the paper
    nativetok-shared    joint, but one expert serves all positions: the control for experts

and, when asked for,

    nativetok-block     joint, with the published two-layer block experts (narrower)
    nativetok-hidden    joint, but experts read each other's outputs unquantized and share one head,
                        as in the first author's earlier code
    nativetok-joint-forced, nativetok-hnt-forced
                        with --teacher_forcing: no gradient reaches an expert through the tokens
                        that later ones read
    nativetok-joint-swaps, titok-swaps
                        the decoder sees wrong tokens of one training image in ten: each is one of
                        the 12 codes nearest to the right one [RobusTok, arXiv 2509.12474]
    nativetok-reversed  control: nativetok-hnt's tokens, and the generator gets the last one first
    nativetok-shuffled  control: the same in a random order, another one for each seed

Shared   images and their order, steps (HNT's phases together take as many as the others), codebook,
         optimizer, decoder, number of tokens, generators. Only titok-taildrop drops tails
Sizes    encoders have as many parameters as NativeTok's, within 10%: titok's ViT is twice as deep
         as MIT and as wide as it takes; block experts and the shared expert are as wide as it takes
Order    shows only where a token is forced and later ones answer (evaluation/intervention.py).
         Bits cannot show it: a perfect predictor pays the same in any order (the chain rule), and
         tokens that carry nothing cost nothing. Look at bits together with PSNR
Samples  are judged by the Fréchet distance in the features of one classifier for all arms of a
         data set (not FID), at the guidance that was best on other samples. Photographs need one
         that is right on most of them: --judge, made by experiments/judge.py
Lengths  tokens that say more cost more, so an arm is a curve: bits against PSNR, and against the
         distance of samples. --tokens 8 12 16 trains each arm at each length

Run      python -m experiments.order --preset tiny            the shapes, one seed, on a CPU
         python -m experiments.order --preset tiny --quick    does it run?
         python -m experiments.order --preset cifar --data DIR --val_data DIR --seeds 0 1 2
         (on a GPU; cifar-cpu: smaller). Repeat a command to go on: finished arms are skipped, a
         broken-off one goes on where it was saved; another --out starts anew
         python -m experiments.order --preset cifar-cpu --data DIR --val_data DIR --seeds 0 1 2 \
             --arms titok nativetok-joint nativetok-hnt --tokens 8 12 16 --generators ar \
             --judge judge.pt
Makes    OUT/ARM-SEED.json, or OUT/ARM-tokens-SEED.json for each of --tokens; pca.json; tinycnn.pt,
         unless --judge is given; OUT/runs/, what was trained; tables and figures by order_table.py
Exit     0 finished, 1 failure, 2 user error, 3 interrupted and saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import bisect
import contextlib
import functools
import json
import math
import os
import shlex
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

import config
import train
from config import CONFIGS, PRESETS, TokenizerConfig
from evaluation.intervention import interventions
from evaluation.judging import (
    Batching,
    ImageSource,
    Reference,
    extract,
    generated,
    judge,
    real,
    reconstruction,
    tinycnn_nets,
)
from evaluation.tinycnn import train_judge
from experiments.order_table import costs, fd_key, read_results, write_tables
from experiments.pca import transform_code
from flow_decoder import Decoding
from generator import GENERATORS, Generator
from layers import count_parameters
from losses import mse, to_db
from mocet import MoCET, norm
from nativetok import NativeTok, as_it_is, doubling
from plumbing import checkpoint
from plumbing.batches import eval_batches
from plumbing.datasets import ImageSet, train_and_val
from plumbing.flags import DEVICES, Parser, as_flags, build, choose, need, need_seed, number
from plumbing.images import to_float, to_uint8
from plumbing.outputs import need_places
from plumbing.processes import Processes, need_one_process, provenance
from plumbing.tokens import cache_tokens
from quantizer import usage

SCALES = (1.5, 2.0, 3.0, 4.5, 7.0, 10.0)  # guidance that is tried beside 1, plain
OTHER_SAMPLES = 1000  # added to the seed, where guidance is chosen
INTERVENED = 1000  # held-out images of which tokens are swapped
BATCH = 250


# ------------------------------------------------------------------------------------------------
# the arms

@dataclass(frozen=True)
class Arm:
    settings: dict = field(default_factory=dict)  # beside those that all arms share
    grown: bool = False  # by HNT's phases, instead of all tokens at once
    order: str = "as made"  # in which the generator gets the tokens: as made, reversed, shuffled
    change: Callable = as_it_is  # of the model, as train.main takes it


def share_experts(model: NativeTok) -> NativeTok:
    """One expert for all positions; only query and position are each one's own."""
    first, *others = model.mocet.experts
    for expert in others:
        expert.layers, expert.head = first.layers, first.head
    return model


class HiddenMoCET(MoCET):
    """Experts read each other's outputs unquantized and without positions, and share one head."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__(cfg)
        del self.embed_code
        for expert in self.experts:
            del expert.pos
            expert.head = self.experts[0].head

    def forward(self, x_latent: Tensor, quantizer: nn.Module, force: dict | None = None):
        rows, emitted, force = x_latent, [], force or {}
        for i, expert in enumerate(self.experts):
            h = expert(rows)  # (B, E)
            z_q_i, id_i, z_i = quantizer.quantize(expert.head(norm(h)), quantizer.codes())
            if i in force:
                z_q_i, id_i = quantizer.emit(z_i, force[i])
            rows = torch.cat([rows, h[:, None]], dim=1)
            emitted.append((z_q_i, id_i, z_i))
        return self.joined(emitted, quantizer)


def hide_codes(model: NativeTok) -> NativeTok:
    model.mocet = HiddenMoCET(model.cfg)
    return model


class Swapping(NativeTok):
    """In training its decoder gets wrong tokens of one image in ten [RobusTok]."""
    NEAR = 12  # a wrong token is one of so many codes, those nearest to the right one

    def tokenize(self, images: Tensor, force: dict | None = None):
        z_q, ids, losses = super().tokenize(images, force)
        if self.training and not self.quantizer.bypass:
            codes = self.quantizer.codes().detach()
            near = (codes[ids] @ codes.T).topk(1 + self.NEAR).indices[..., 1:]  # (B, L, NEAR)
            chosen = torch.randint(self.NEAR, (*ids.shape, 1), device=ids.device)
            wrong = codes[near.gather(-1, chosen)[..., 0]]                      # (B, L, d)
            hit = torch.rand(len(ids), 1, 1, device=ids.device) < 0.1
            z_q = torch.where(hit, z_q + (wrong - z_q).detach(), z_q)
        return z_q, ids, losses


def swap_codes(model: NativeTok) -> NativeTok:
    return Swapping(model.cfg)


MAIN = {  # trained unless other arms are asked for
    "titok": Arm({"tokenizer": "titok"}),
    "titok-causal": Arm({"tokenizer": "titok-causal"}),
    "titok-taildrop": Arm({"tokenizer": "titok", "tail_drop": 0.5}),
    "nativetok-joint": Arm(),
    "nativetok-hnt": Arm(grown=True),
    "nativetok-shared": Arm(change=share_experts),
}
EXTRA = {
    "nativetok-block": Arm({"expert": "block", "expert_depth": 2}),
    "nativetok-hidden": Arm(change=hide_codes),
    "nativetok-joint-forced": Arm({"teacher_forcing": True}),
    "nativetok-hnt-forced": Arm({"teacher_forcing": True}, grown=True),
    "nativetok-joint-swaps": Arm(change=swap_codes),
    "titok-swaps": Arm({"tokenizer": "titok"}, change=swap_codes),
    # With the same seed these train nativetok-hnt's tokenizer again, to the same weights.
    "nativetok-reversed": Arm(grown=True, order="reversed"),
    "nativetok-shuffled": Arm(grown=True, order="shuffled"),
}
ARMS = {**MAIN, **EXTRA}
# settings of commit 403a52d that are gone from the code; their results are kept
GONE = ("nativetok-hnt-drop50", "nativetok-hnt-blur50", "nativetok-prior06",
        # the same function as -forced, without being faster (commit 0e362e1)
        "nativetok-joint-cut", "nativetok-hnt-cut",
        # other weights of the entropy term, in percent of 0.05 (commit d0f853f); 50 is the default
        *(f"{arm}-entropy{weight}" for arm in ("nativetok-joint", "nativetok-hnt", "titok")
          for weight in (0, 25, 50)))


@dataclass(frozen=True)
class Plan:
    preset: str
    sizes: dict  # settings of the preset that change here
    budget: int  # steps of each tokenizer
    generator_steps: int
    num_samples: int  # images for each setting of each generator
    judge_steps: int


PLANS = {
    "tiny": Plan("tiny", dict(), 1200, 400, 500, 500),  # six arms in under 40 minutes
    "cifar": Plan("cifar", dict(), 14000, 2500, 2000, 2000),
    # An arm and seed in about 7 minutes of one thread. With the preset's long fine-tune the first
    # tokens would be left with 200 steps.
    "cifar-cpu": Plan("cifar", dict(finetune_steps=4300, flip=False, generator_width=128,
                                    generator_dropout=0.0), 1300, 800, 1000, 1000),
    "quick": Plan("tiny", dict(encoder_width=64, encoder_heads=2, expert_width=32, expert_heads=2,
                               decoder_width=64, decoder_heads=2, token_schedule=(4, 8),
                               codebook_size=32, batch_size=16, reseed_every=10,
                               generator_width=32, generator_depth=2, generator_heads=2,
                               generator_batch_size=16), 60, 40, 100, 5),
}


# ------------------------------------------------------------------------------------------------
# one budget, and encoders of one size

@functools.cache
def encoder_parameters(tok: TokenizerConfig, change: Callable = as_it_is) -> int:
    """Of what makes tokens of images, at full length."""
    with torch.device("meta"):  # counted without making them
        model = change(NativeTok(replace(tok, token_schedule=(tok.num_tokens,))))
    parts = (model.mit, model.mocet) if tok.tokenizer == "nativetok" else (model.titok,)
    return sum(map(count_parameters, parts))


def matched(tok: TokenizerConfig, name: str, step: int, target: int, change: Callable) -> int:
    """The multiple of `step` that, as tok's `name`, brings the encoder nearest to the target."""
    def size(value: int) -> int:
        return encoder_parameters(replace(tok, **{name: value}), change)
    values = range(step, 8192, step)
    above = bisect.bisect_left(values, target, key=size)
    return min(values[max(0, above - 1):above + 1], key=lambda value: abs(size(value) - target))


def tokenizer_config(preset: dict, settings: dict) -> TokenizerConfig:
    return build(CONFIGS, {**preset, **settings})[0]


def settings_of(arm: str, args, tokens: int | None = None) -> tuple[dict, int, int]:
    """-> settings of train.py for this arm beside the preset's, its encoder's parameters,
    NativeTok's. tokens: how many, where not as many as the preset has."""
    this, preset = ARMS[arm], {**PRESETS[args.preset], **args.sizes}
    if tokens:
        shorter = (k for k in preset["token_schedule"] if k < tokens)
        preset["token_schedule"] = (*shorter, tokens)
    longer, full_length = preset["token_schedule"][1:], (preset["token_schedule"][-1],)

    # 1. Steps. Joint training is one phase of all steps; HNT's phases share the budget in the
    #    preset's proportions. Without quantization go at most as many steps in all arms.
    total = sum((preset["base_steps"], len(longer) * preset["grow_steps"],
                 preset["finetune_steps"]))
    continuous = round(args.budget * preset["base_steps"] / total) // 3
    settings = {**args.sizes, "tail_drop": 0.0, "token_schedule": full_length,
                "base_steps": args.budget, "generator_steps": args.generator_steps,
                "continuous_steps": min(preset["continuous_steps"], continuous),
                **this.settings}
    if this.grown:
        base = max(1, round(args.budget * preset["base_steps"] / total))
        grow = max(1, round(args.budget * preset["grow_steps"] / total))
        settings |= {"token_schedule": preset["token_schedule"], "base_steps": base,
                     "grow_steps": grow, "finetune_steps": args.budget - base - len(longer) * grow}

    # 2. Parameters.
    native = tokenizer_config(preset, {"token_schedule": full_length})
    target, tok = encoder_parameters(native), tokenizer_config(preset, settings)
    if tok.tokenizer != "nativetok":
        deep = replace(tok, encoder_depth=2 * native.encoder_depth)
        width = matched(deep, "encoder_width", math.lcm(4, tok.encoder_heads), target,
                        as_it_is)
        settings |= {"encoder_depth": deep.encoder_depth, "encoder_width": width}
    elif arm in ("nativetok-block", "nativetok-shared"):
        settings |= {"expert_width": matched(tok, "expert_width", tok.expert_heads, target,
                                             this.change)}
    return settings, encoder_parameters(tokenizer_config(preset, settings), this.change), target


# ------------------------------------------------------------------------------------------------
# another order, for the two controls

class Permuted(nn.Module):
    """A tokenizer whose tokens come in another order: place i of its ids is token order[i] of the
    one inside."""

    def __init__(self, tokenizer: NativeTok, order: Tensor):
        super().__init__()
        self.tokenizer, self.num_tokens, self.cfg = tokenizer, tokenizer.num_tokens, tokenizer.cfg
        self.unfinished = tokenizer.unfinished
        self.register_buffer("order", order)
        self.fingerprint = checkpoint.fingerprint({"order": order},
                                                  {"tokenizer": tokenizer.fingerprint})

    def encode(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)[:, self.order]                   # (B, L)

    def decode(self, ids: Tensor) -> Tensor:
        # all L of them: a prefix has holes when put back
        return self.tokenizer.decode(ids[:, self.order.argsort()])


def in_order_of(arm: str, seed: int, tokenizer: NativeTok) -> NativeTok | Permuted:
    """The tokenizer as this arm's generator sees it."""
    L = tokenizer.num_tokens
    if ARMS[arm].order == "as made":
        return tokenizer
    if ARMS[arm].order == "reversed":
        order = torch.arange(L).flip(0)
    else:
        order = torch.randperm(L, generator=torch.Generator().manual_seed(seed))
    return Permuted(tokenizer, order.to(tokenizer.quantizer.codebook.device))


# ------------------------------------------------------------------------------------------------
# training

def kinds_of(args) -> tuple[str, ...]:
    return tuple(GENERATORS) if args.generators == "both" else (args.generators,)


def train_flags(settings: dict, seed: int, args, folder: str) -> list[str]:
    """The command line of train.py for these settings, tokenizer and generators."""
    return ["--preset", args.preset, "--run", folder, "--data", args.data,
            "--val_data", args.val_data, "--seed", str(seed), "--device", args.device,
            "--generators", args.generators, *as_flags(settings)]


@contextlib.contextmanager
def handlers_of_its_own():
    """For a training program inside another one: when it is over, nobody listens to its handlers
    any more."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


def train_arm(arm: str, seed: int, flags: list[str]) -> None:
    """train.py in this process, tokenizer and generators; what is finished already is left out.

    train.py knows nothing of other orders and need not: it is given a tokenizer that has one. Its
    token cache, its pictures and the generators' mark of whose ids they have learned follow, so no
    other program can take these ids for the tokenizer's own.
    Exits with 3 when interrupted, as train.py does.
    """
    with handlers_of_its_own():
        train.main(config.parse_run("", flags), change_model=ARMS[arm].change,
                   change_tokenizer=functools.partial(in_order_of, arm, seed))


# ------------------------------------------------------------------------------------------------
# measuring: tokens

def frequency_bits(seen: np.ndarray, asked: np.ndarray, codebook_size: int) -> np.ndarray:
    """Bits (m,) of ids asked (m,) when only their frequencies among those seen (n,) are known.

    Half a count is added to each code, so that one which training never saw is possible.
    """
    counts = np.bincount(seen, minlength=codebook_size)
    return -np.log2((counts[asked] + 0.5) / (len(seen) + codebook_size / 2))


@torch.no_grad()
def ar_bits(model: nn.Module, ids: Tensor, labels: Tensor) -> list[float]:
    """-log2 p(id | class, ids before it) by position: the mean over ids (m, L)."""
    by_position = 0.0
    for i, y in zip(ids.split(BATCH), labels.split(BATCH)):
        _, logs = model.loss(i, y)
        by_position += logs["nll_by_position"].double() * len(i)
    return (by_position / len(ids) / math.log(2)).tolist()  # from nats


@torch.no_grad()
def prefix_psnr(tokenizer: NativeTok, ids: Tensor, images: Tensor) -> dict[str, float]:
    """{k: PSNR in dB of what the decoder makes of the first k tokens}, in 8-bit RGB."""
    result = {}
    for k in doubling(tokenizer.num_tokens):
        errors = []
        for i, x in zip(ids.split(BATCH), images.split(BATCH)):
            recon = to_uint8(tokenizer.decode(i[:, :k])).cpu()
            errors.append(mse(to_float(recon), to_float(x)).double())
        result[str(k)] = round(to_db(torch.cat(errors).mean()).item(), 3)
    return result


def measure_tokens(inside: NativeTok, tokenizer: NativeTok | Permuted, train_args, data: ImageSet,
                   val: ImageSet, procs: Processes) -> dict:
    """What held-out tokens cost and what they answer.

    Bits and perplexity are by position as the generator gets them; prefixes and intervention take
    the tokens in their own order, that of the tokenizer inside.
    """
    device, tok, train_config = procs.device, train_args.tok, train_args.train
    batches = list(eval_batches(val, tok.image_size, BATCH))
    images = torch.cat([x for x, _ in batches])
    labels = torch.cat([y for _, y in batches]).to(device)
    made = torch.cat([inside.encode(to_float(x.to(device))) for x, _ in batches])  # (m, L)
    order = torch.arange(made.shape[1], device=device)
    if isinstance(tokenizer, Permuted):
        order = tokenizer.order
    ids = made[:, order]

    used, perplexity = usage(ids, tok.codebook_size)
    bits = ar_bits(Generator.of_run(train_args.run, "ar", tokenizer, device), ids, labels)
    # The cache was made in training, so nothing has to be encoded here: encode=None.
    learned, _ = cache_tokens(os.path.join(train_args.run, "tokens"), tokenizer.fingerprint, data,
                              tok.image_size, train_config.flip, None, procs)
    marginal = [float(frequency_bits(seen, asked, tok.codebook_size).mean()) for seen, asked
                in zip(learned.reshape(-1, ids.shape[1]).T, ids.cpu().numpy().T)]
    # Folders come class by class: mixed, another image is mostly of another class.
    some = np.random.default_rng(0).permutation(len(images))[:INTERVENED]
    return {"prefix_psnr": prefix_psnr(inside, made, images), "order": order.tolist(),
            "codebook_used": round(used, 4),
            "perplexity": [round(p, 2) for p in perplexity.tolist()],
            "ar_bits": [round(b, 4) for b in bits], "ar_bits_total": round(sum(bits), 3),
            "marginal_bits": [round(b, 4) for b in marginal],
            "marginal_bits_total": round(sum(marginal), 3),
            "intervention": interventions(inside, images[some]), "intervened_images": len(some)}


# ------------------------------------------------------------------------------------------------
# measuring: images

class Judge:
    """The classifier that judges all arms of a data set, and held-out images as its reference.

    path   of the classifier, which is trained here, for `steps`, when it is not there yet
    """

    def __init__(self, path: str, size: int, flip: bool, steps: int, seed: int, data: ImageSet,
                 val: ImageSet, procs: Processes):
        if not checkpoint.exists(path):
            train_judge(path, data, val, size, flip, steps, procs.device)
        (self.net, _), self.accuracy = tinycnn_nets(path, data, procs.device)
        self.how, self.procs = Batching(batch_size=BATCH, seed=seed), procs
        self.held_out = real("held out", val, np.arange(len(val)), size, self.how)
        stats, _ = extract(self.held_out, [self.net], self.how, procs)
        self.reference = Reference.of(val.name, self.held_out.n, [self.net], stats)

    def row(self, source: ImageSource) -> dict:
        """The measures of a set of images, in a flat dictionary."""
        row = judge(source, [self.net], self.reference, self.how, self.procs)
        settings = row.pop("settings", {})
        row.pop("swept", None)
        return {"name": row.pop("name"), "n": row.pop("n"), **settings, **row}


def sample_rows(judged: Callable[..., dict], kinds: Iterable[str], seed: int
                ) -> dict[str, list[dict]]:
    """The judge's measures of samples: {"tried": rows to choose by, "samples": rows to report}.

    Each generator is tried at each guidance; the best one is reported, on samples of other noise.

    judged   kind, seed of the noise, settings of its sample() -> row
    """
    tried, samples = [], []
    for kind in kinds:
        rows = [judged(kind, seed + OTHER_SAMPLES, cfg_scale=scale) for scale in (1.0, *SCALES)]
        best = min(rows, key=lambda row: row[fd_key(row)])
        tried += rows
        samples.append(judged(kind, seed, cfg_scale=best["cfg_scale"]))
    return {"tried": tried, "samples": samples}


def measure(arm: str, seed: int, train_args, args, procs: Processes, data: ImageSet,
            val: ImageSet) -> dict:
    """All measures of one arm and seed; not where they come from.

    train_args   the command line of train.py that made it
    args         the command line of order.py
    """
    device, folder, n = procs.device, train_args.run, args.num_samples
    size, train_config = train_args.tok.image_size, train_args.train
    inside = NativeTok.of_run(folder, device, ARMS[arm].change)
    tokenizer = in_order_of(arm, seed, inside)
    jury = Judge(args.judge or os.path.join(args.out, "tinycnn.pt"), size, train_config.flip,
                 args.judge_steps, seed, data, val, procs)
    models = {kind: Generator.of_run(folder, kind, tokenizer, device)
              for kind in kinds_of(args)}

    def judged(kind: str, noise: int, **options) -> dict:
        return jury.row(generated(kind, models[kind], Decoding(tokenizer), n, {}, options,
                                  replace(jury.how, seed=noise), device))

    chosen = np.random.default_rng(0).permutation(len(data))[:n]
    rebuilt = jury.row(reconstruction(Decoding(inside), jury.held_out, jury.how, device))
    return {"psnr": rebuilt["psnr"], "ssim": rebuilt["ssim"], jury.net.key: rebuilt[jury.net.key],
            "reconstruction": rebuilt, "real": jury.row(real("real", data, chosen, size, jury.how)),
            "judge_accuracy": round(jury.accuracy, 4),
            **measure_tokens(inside, tokenizer, train_args, data, val, procs),
            **sample_rows(judged, kinds_of(args), seed),
            "costs": costs(folder, train_config)}


# ------------------------------------------------------------------------------------------------
# results

def check_settings(path: str, settings: dict) -> None:
    """Raise UserError when the result at `path` was measured with other settings than these."""
    old = checkpoint.read_json(path)["settings"]
    changed = [f"{name}: {old.get(name)} -> {settings.get(name)}"
               for name in {**old, **settings} if old.get(name) != settings.get(name)]
    need(not changed, f"{path} was measured with other settings ({', '.join(changed)}); "
                      "give another --out, or delete it")


def make_result(arm: str, tokens: int | None, seed: int, args, procs: Processes, data: ImageSet,
                val: ImageSet) -> None:
    """Train and measure one arm with one seed and write its result, unless that has been done."""
    name = f"{arm}-{tokens}-{seed}" if tokens else f"{arm}-{seed}"
    path = os.path.join(args.out, f"{name}.json")
    settings, parameters, target = settings_of(arm, args, tokens)
    recorded = {"preset": args.preset, **settings, "num_samples": args.num_samples,
                "judge_steps": None if args.judge else args.judge_steps, "guidance": SCALES,
                "generators": args.generators, "images": data.fingerprint,
                "held_out": val.fingerprint}
    recorded = json.loads(json.dumps(recorded))  # as it comes back from a file: no tuples
    if os.path.exists(path):
        check_settings(path, recorded)
        print(f"{name}: finished before")
        return

    off = parameters / target - 1
    print(f"\n--- {name}: encoder of {parameters:,} parameters, "
          f"{off:+.1%} of NativeTok's", flush=True)
    flags = train_flags(settings, seed, args, os.path.join(args.out, "runs", name))
    train_arm(arm, seed, flags)
    checkpoint.write_json(path, {
        "arm": arm, "seed": seed, **provenance(args.command, procs.device),
        "tokenizer_command": "python train.py " + shlex.join(flags), "settings": recorded,
        "encoder_parameters": parameters, "encoder_parameters_off": round(off, 4),
        **measure(arm, seed, config.parse_run("", flags), args, procs, data, val)})
    print(f"written: {path}")


def make_pca(args, data: ImageSet, val: ImageSet) -> None:
    """PCA transform codes of an eighth of the tokens' bits, a quarter ... all -> pca.json."""
    path = os.path.join(args.out, "pca.json")
    if os.path.exists(path):
        return
    tok = tokenizer_config(PRESETS[args.preset], args.sizes)
    longest = max([tok.num_tokens, *(args.tokens or [])])
    all_bits = longest * math.log2(tok.codebook_size)
    bits = [int(all_bits * share) for share in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)]
    points = [[total, round(psnr, 2)]
              for total, _, psnr in transform_code(data, val, tok.image_size, bits)]
    flags = ["--data", args.data, "--val_data", args.val_data, "--bits", *map(str, bits)]
    checkpoint.write_json(path, {
        **provenance(args.command, torch.device("cpu")),
        "pca_command": "python -m experiments.pca " + shlex.join(flags),
        "bits_and_psnr": points})


# ------------------------------------------------------------------------------------------------
# the program, and what grain.py's is like

def parser_of(name: str, doc: str, plans: Iterable[str], arms: Iterable[str],
              extra: Iterable[str]) -> Parser:
    """The flags of order.py and grain.py. arms: trained by default; extra: when asked for."""
    parser = Parser(prog=f"python -m experiments.{name}", description=doc)
    add = parser.add_argument
    add("--preset", choices=[plan for plan in plans if plan != "quick"], default="tiny",
        help="sizes and steps (default: tiny)")
    add("--data", default="shapes", help="training images, in any form that train.py takes "
        "(default: the built-in shapes)")
    add("--val_data", default="", help="held-out images; not needed for the shapes")
    add("--out", metavar="DIR",
        help=f"results (default: runs/{name}-PRESET, or runs/{name}-quick)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N",
        help="of weights, order of images and samples (default: 0)")
    add("--arms", nargs="+", metavar="ARM", default=[*arms],
        help=f"only these (default: all but {', '.join(extra)})")
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--judge", metavar="FILE", help="a classifier of these images, by experiments/judge.py "
        "(default: a TinyCNN, trained in OUT)")
    add("--quick", action="store_true", help="tiny sizes and few steps, to see that it runs")
    add("--table", action="store_true",
        help="train nothing; make tables and figures anew from the results that are there")
    return parser


def parse_for(name: str, parser: Parser, argv: list[str] | None, plans: dict,
              arms: Iterable[str]) -> argparse.Namespace:
    """The command line -> namespace, with .plan and .out.

    Raises UserError for wrong use.
    """
    args = parser.parse_args(argv)
    need_one_process(f"experiments.{name}")
    plan = "quick" if args.quick else args.preset
    args.plan, args.out = plans[plan], args.out or os.path.join("runs", f"{name}-{plan}")
    for seed in args.seeds:
        need_seed(seed, "seeds")
    for arm in args.arms:
        choose("arm", arm, arms)
    own = args.data != "shapes"
    need(own or args.table or not plan.startswith("cifar"),
         f"--preset {plan} needs images: give --data and --val_data")
    # Held-out images cut from --data would differ between seeds, and so would their judge.
    need(not own or args.val_data or args.table, f"--data {args.data} needs --val_data, so that "
         "all seeds are judged by the same images")
    need(not args.judge or checkpoint.exists(args.judge), f"--judge {args.judge}: no such file; "
         "experiments/judge.py makes one")
    return args


def images_of(args) -> tuple[ImageSet, ImageSet]:
    """Images to train on and held-out ones; the folder of the results can be written."""
    data, val = train_and_val(args.data, args.val_data, 0, 0)
    need(val.classes == data.classes and len(data.classes) > 1,
         f"{args.data} and {args.val_data} need the same classes, two or more")
    need_places(folders={"--out": os.path.join(args.out, "runs")})
    return data, val


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace, with the plan's numbers where none were given.

    Raises UserError for wrong use.
    """
    parser = parser_of("order", __doc__, PLANS, MAIN, EXTRA)
    add = parser.add_argument
    add("--budget", type=int, metavar="STEPS",
        help="steps of each tokenizer, all its phases together")
    add("--generator_steps", type=int, metavar="STEPS", help="steps of each generator")
    add("--num_samples", type=int, metavar="N", help="images per setting of each generator")
    add("--tokens", type=number(int, 2), nargs="+", metavar="N",
        help="tokens of an image, one result for each (default: as many as the preset has)")
    add("--generators", choices=(*GENERATORS, "both"), default="both",
        help="which generators learn the tokens (default: both)")
    args = parse_for("order", parser, argv, PLANS, ARMS)
    plan = args.plan
    args.preset, args.sizes, args.judge_steps = plan.preset, plan.sizes, plan.judge_steps
    # 20: HNT cuts the budget into phases. 4: precision and recall ask for the third neighbour.
    for name, least in (("budget", 20), ("generator_steps", 1), ("num_samples", 4)):
        if getattr(args, name) is None:
            setattr(args, name, getattr(plan, name))
        need(getattr(args, name) >= least, f"{name} {getattr(args, name)} must be at least {least}")
    return args


def main(args) -> None:
    if not args.table:
        procs = Processes(args.device)
        data, val = images_of(args)
        for seed in args.seeds:  # a whole table first, then its spread
            for tokens in args.tokens or [None]:
                for arm in args.arms:
                    make_result(arm, tokens, seed, args, procs, data, val)
        if not args.quick:
            make_pca(args, data, val)
    results = read_results(args.out, (*ARMS, *GONE))
    print("\n" + write_tables(results, args.out))


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
