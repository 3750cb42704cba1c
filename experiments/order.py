"""Does native order help? The same generator on tokens of different tokenizers, under one budget, in one table.

Arms     titok               latent tokens inside a ViT, unordered
         titok-causal        the same, with a causal mask among the latents
         titok-taildrop      the same as titok, ordered by dropping tails in half of the training steps
         nativetok-joint     MIT and MoCET at full length from the start
         nativetok-hnt       MIT and MoCET, grown: the paper
         nativetok-joint-time  joint for as long as hnt takes, whose steps are cheaper: fewer steps (SHARE); only when asked for
         nativetok-block     like joint, with the published two-layer block experts (narrower, see below)
         nativetok-reversed  control: nativetok-hnt's tokens, and the generator gets them last one first
         nativetok-shuffled  control: the same in a random order, another one for each seed
Shared   images and their order, steps (HNT's phases together take as many as the others), optimizer, codebook, decoder,
         number of tokens, generator; encoders have as many parameters as NativeTok's, within 10%: the ViT of titok is twice
         as deep as MIT and as wide as it takes, block experts are as wide as it takes. No arm but one drops tails.
Bits     AR code length of held-out images per position, -log2 p(id | class, ids before it). Beside it what a position costs
         when only its frequencies are known, learned from the training ids (marginal). The difference is what order, and the
         class, explain. Few bits alone prove nothing: tokens that say nothing cost nothing. So look at them with PSNR.
Samples  Fréchet distance in the features of one TinyCNN that judges all arms of a data set (not FID, see tinycnn.py). Guidance
         is the best of SCALES by that distance; MaskGIT's is chosen at 8 steps.
Run      python -m experiments.order --preset tiny                    the shapes, one seed, on a CPU; --quick: does it run?
         python -m experiments.order --preset cifar --data DIR --val_data DIR --seeds 0 1 2         on a GPU; cifar-cpu: smaller
Resume   repeat the command: finished arms are skipped, a broken-off one goes on where it was saved; another --out starts anew
Makes    OUT/ARM-SEED.json, pca.json, tinycnn.pt, the judge; OUT/runs/, the runs; tables and a figure by order_table.py
Exit     0 finished, 1 failure, 2 something to mend, 3 interrupted and saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import config
import train
from config import CONFIGS, PRESETS, TokenizerConfig
from evaluation.judging import (
    Batching,
    Reference,
    extract,
    generated,
    judge,
    real,
    reconstruction,
    tinycnn_nets,
)
from evaluation.tinycnn import train_judge
from experiments.order_table import costs, draw_figure, fd_key, read_results, write_tables
from generator import Generator
from layers import count_parameters
from loop import fit
from losses import mse, to_db
from nativetok import NativeTok, doubling, from_checkpoint
from plumbing import checkpoint
from plumbing.batches import eval_batches
from plumbing.datasets import train_and_val
from plumbing.flags import Parser, as_flags, build, choose, need
from plumbing.images import to_float, to_uint8
from plumbing.processes import Processes, provenance
from plumbing.tokens import cache_tokens
from quantizer import usage

# name: (settings beside those that all arms share, order in which the generator gets the tokens)
ARMS = {
    "titok": ({"tokenizer": "titok"}, "as made"),
    "titok-causal": ({"tokenizer": "titok-causal"}, "as made"),
    "titok-taildrop": ({"tokenizer": "titok", "tail_drop": 0.5}, "as made"),
    "nativetok-joint": ({}, "as made"),
    "nativetok-hnt": ({}, "as made"),
    "nativetok-joint-time": ({}, "as made"),
    "nativetok-block": ({"expert": "block", "expert_depth": 2}, "as made"),
    "nativetok-reversed": ({}, "reversed"),
    "nativetok-shuffled": ({}, "shuffled"),
}
# of the budget's steps: hnt's training time by joint's, as measured
SHARE = {"nativetok-joint-time": 0.9}
GROWN = "nativetok-hnt"  # also the arm whose tokens the controls take
SCALES = (1.5, 2.0, 3.0)  # guidance that is tried beside 1, plain
# preset, its settings that change here, steps of tokenizer and generators, samples, steps of the judge
PLANS = {
    # 16 tokens and narrow experts: eight arms in under 40 minutes, and titok's ViT is as wide as MIT. Over half of hnt's steps are fine-tune, see trials.py.
    "tiny": ("tiny", dict(token_schedule=(8, 12, 16), expert_width=64, base_steps=400, grow_steps=100, finetune_steps=700), 1200, 400, 500, 500),
    "cifar": ("cifar", dict(), 14000, 2500, 2000, 2000),
    "cifar-cpu": ("cifar", dict(expert_width=64, flip=False, generator_width=192, generator_dropout=0.0, generator_batch_size=32), 2000, 1500, 1000, 1000),
    "quick": ("tiny", dict(encoder_width=64, encoder_heads=2, expert_width=32, expert_heads=2, decoder_width=64, decoder_heads=2, token_schedule=(4, 6, 8),
                           codebook_size=32, batch_size=16, reseed_every=10, generator_width=32, generator_depth=2, generator_heads=2, generator_batch_size=16),
              60, 40, 100, 20),
}


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace, with the plan's numbers where none were given. Raises UserError for wrong use."""
    parser = Parser(prog="order.py", description=__doc__)
    parser.add_argument("--preset", choices=("tiny", "cifar", "cifar-cpu"), default="tiny", help="sizes and budget (default: tiny)")
    parser.add_argument("--data", default="shapes", help="training images, in any form that train.py takes (default: the built-in shapes)")
    parser.add_argument("--val_data", default="", help="held-out images; not needed for the shapes")
    parser.add_argument("--out", metavar="DIR", help="results (default: runs/order-PRESET, or runs/order-quick)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of weights, data order and samples (default: 0)")
    parser.add_argument("--arms", nargs="+", default=[arm for arm in ARMS if arm not in SHARE], metavar="ARM", help=f"only these (default: all but {', '.join(SHARE)})")
    parser.add_argument("--budget", type=int, metavar="STEPS", help="steps of each tokenizer, all its phases together")
    parser.add_argument("--generator_steps", type=int, metavar="STEPS", help="steps of each generator")
    parser.add_argument("--num_samples", type=int, metavar="N", help="images per setting of each generator")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few steps, to see that everything runs")
    parser.add_argument("--table", action="store_true", help="train nothing; make table and figure anew from the results that are there")
    args = parser.parse_args(argv)
    args.command = "python -m experiments.order " + shlex.join(sys.argv[1:] if argv is None else argv)
    plan = "quick" if args.quick else args.preset
    args.out = args.out or os.path.join("runs", f"order-{plan}")
    args.preset, args.sizes, *numbers, args.judge_steps = PLANS[plan]
    # 20: HNT cuts the budget into phases. 4: precision and recall ask for the third neighbour.
    for name, least, number in zip(("budget", "generator_steps", "num_samples"), (20, 1, 4), numbers):
        setattr(args, name, number if getattr(args, name) is None else getattr(args, name))
        need(getattr(args, name) >= least, f"{name} {getattr(args, name)} must be at least {least}")
    need(min(args.seeds) >= 0, f"seeds {min(args.seeds)} is negative; give 0 or more")
    for arm in args.arms:
        choose("arm", arm, ARMS)
    need(args.preset != "cifar" or args.data != "shapes" or args.table, f"--preset {plan} needs images: give --data and --val_data")
    # Held-out images cut from --data would differ between seeds, and so would their judge.
    need(args.data == "shapes" or args.val_data or args.table, "--data needs --val_data, so that all seeds are judged by the same images")
    return args


# ------------------------------------------------------------------------------------------------
# one budget, and encoders of one size

def encoder_parameters(tok: TokenizerConfig) -> int:
    """Parameters of what makes tokens of images, at full length: all but the codebook and the decoder, which are shared."""
    with torch.device("meta"):  # counted without making them
        model = NativeTok(tok).grow_to(tok.num_tokens)
    return count_parameters(model) - count_parameters(model.quantizer) - count_parameters(model.decoder)


def matched(tok: TokenizerConfig, name: str, step: int, target: int) -> int:
    """The multiple of `step` that, as the value of tok's field `name`, brings the encoder nearest to `target` parameters."""
    best, value = None, step
    while True:
        off = abs(encoder_parameters(replace(tok, **{name: value})) - target)
        if best is not None and off > best[0]:  # past the nearest, as wider is only ever larger
            return best[1]
        best, value = (off, value), value + step


def settings_of(arm: str, args) -> tuple[dict, int, int]:
    """-> settings of train.py for this arm beside the preset's, its encoder's parameters, those of NativeTok."""
    preset, budget = {**PRESETS[args.preset], **args.sizes}, round(args.budget * SHARE.get(arm, 1))
    longer, L = preset["token_schedule"][1:], preset["token_schedule"][-1]

    # 1. Steps. HNT's phases share the budget in the preset's proportions; joint training is one phase of all steps.
    total = preset["base_steps"] + len(longer) * preset["grow_steps"] + preset["finetune_steps"]
    base, grow = (max(1, round(budget * preset[name] / total)) for name in ("base_steps", "grow_steps"))
    # without quantization at most, the same in all arms
    start = round(args.budget * preset["base_steps"] / total) // 3
    settings = {**args.sizes, "tail_drop": 0.0, "token_schedule": (L,), "base_steps": budget, "generator_steps": args.generator_steps,
                "continuous_steps": min(preset["continuous_steps"], start), **ARMS[arm][0]}
    if arm == GROWN or ARMS[arm][1] != "as made":
        settings |= {"token_schedule": preset["token_schedule"], "base_steps": base, "grow_steps": grow,
                     "finetune_steps": budget - base - len(longer) * grow}

    # 2. Parameters.
    native, tok = (build(CONFIGS, {**PRESETS[args.preset], **values})[0] for values in ({**args.sizes, "token_schedule": (L,)}, settings))
    target = encoder_parameters(native)
    if tok.tokenizer != "nativetok":
        deep = replace(tok, encoder_depth=2 * native.encoder_depth)
        width = matched(deep, "encoder_width", math.lcm(4, tok.encoder_heads), target)
        settings |= {"encoder_depth": deep.encoder_depth, "encoder_width": width}
    elif tok.expert == "block":
        settings |= {"expert_width": matched(tok, "expert_width", tok.expert_heads, target)}
    return settings, encoder_parameters(build(CONFIGS, {**PRESETS[args.preset], **settings})[0]), target


def command(settings: dict, seed: int, args, folder: str) -> list[str]:
    """The flags of train.py for these settings, tokenizer and generators."""
    return ["--preset", args.preset, "--run", folder, "--data", args.data, "--val_data", args.val_data, "--seed", str(seed), "--device", args.device,
            *as_flags(settings)]


# ------------------------------------------------------------------------------------------------
# training

class Permuted(nn.Module):
    """A tokenizer whose tokens come in another order: place i of its ids is token order[i] of the one inside."""

    def __init__(self, tokenizer: NativeTok, order: Tensor):
        super().__init__()
        self.tokenizer, self.num_tokens, self.cfg = tokenizer, tokenizer.num_tokens, tokenizer.cfg
        self.register_buffer("order", order)
        self.fingerprint = checkpoint.fingerprint({"order": order}, {"tokenizer": tokenizer.fingerprint})

    def encode(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)[:, self.order]                   # (B, L)

    def decode(self, ids: Tensor) -> Tensor:
        # all L of them: a prefix has holes when put back
        return self.tokenizer.decode(ids[:, self.order.argsort()])


def in_order_of(arm: str, seed: int, tokenizer: NativeTok) -> NativeTok | Permuted:
    """The tokenizer as this arm's generator sees it."""
    how, L = ARMS[arm][1], tokenizer.num_tokens
    if how == "as made":
        return tokenizer
    order = torch.arange(L).flip(0) if how == "reversed" else torch.randperm(L, generator=torch.Generator().manual_seed(seed))
    return Permuted(tokenizer, order.to(tokenizer.quantizer.codebook.device))


def watched_fit(job, run) -> None:
    """loop.fit, and a line in the log with the phase's peak of memory in MiB: of a GPU its tensors, of a CPU the whole process (Linux only)."""
    cuda, status = run.procs.device.type == "cuda", Path("/proc/self/status")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now
    fit(job, run)
    if cuda or status.exists():
        peak = torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
        run.log(phase=job.name, step=job.steps, peak_mb=round(peak))


def train_stages(flags: list[str], *stages: int) -> None:
    """train.py's stages in this process, what is finished already left out. Exits with 3 when interrupted, as train.py does."""
    try:
        with mock.patch.object(train, "fit", watched_fit):
            for stage in stages:
                train.main(config.parse_run("", [*flags, "--stage", str(stage)]))
    finally:  # nobody listens to train.py's handlers any more
        signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)


def train_arm(arm: str, seed: int, source: list[str], flags: list[str]) -> None:
    """Tokenizer and generators of one arm; `source` are the flags of the run whose tokenizer it takes, its own but for the controls."""
    train_stages(source, 1, 2)
    if ARMS[arm][1] == "as made":
        return train_stages(flags, 3)
    folders = [config.parse_run("", words).run for words in (source, flags)]
    os.makedirs(folders[1], exist_ok=True)
    shutil.copyfile(*(os.path.join(folder, "tokenizer.pt") for folder in folders))
    # train.py knows nothing of other orders and need not: it is handed a tokenizer that has one. Its token cache, its pictures and
    # the generators' mark of whose ids they have learned follow, so no other program can take these ids for the tokenizer's own.
    with mock.patch.object(train, "from_checkpoint", lambda saved, path: in_order_of(arm, seed, from_checkpoint(saved, path))):
        train_stages(flags, 3)


# ------------------------------------------------------------------------------------------------
# measuring

def marginal_bits(learned: np.ndarray, ids: Tensor, codebook_size: int) -> list[float]:
    """Bits of ids (m, L) per position when all that is known are the frequencies in learned (n, L), half a count added to each."""
    bits = []
    for seen, column in zip(learned.T, ids.cpu().numpy().T):
        share = (np.bincount(seen, minlength=codebook_size) + 0.5) / (len(seen) + 0.5 * codebook_size)
        bits.append(float(-np.log2(share[column]).mean()))
    return bits


@torch.no_grad()
def ar_bits(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """-> bits of ids (m, L) per position, and of an image; the second from the model's own mean loss."""
    by_position, total = 0.0, 0.0
    for i, y in zip(ids.split(250), labels.split(250)):
        loss, logs = model.loss(i, y)
        by_position += logs["nll_by_position"].double() * (len(i) / len(ids) / math.log(2))
        total += loss.item() * ids.shape[1] * (len(i) / len(ids) / math.log(2))
    return by_position.tolist(), total


def prefix_psnr(tokenizer: NativeTok, ids: Tensor, images: Tensor) -> dict:
    """{k: PSNR in dB of what the decoder makes of the first k tokens}, in 8-bit RGB as in eval_fid.py."""
    found = {}
    for k in doubling(tokenizer.num_tokens):
        errors = [mse(to_float(to_uint8(tokenizer.decode(i[:, :k])).cpu()), to_float(x)).double()
                  for i, x in zip(ids.split(250), images.split(250))]
        found[str(k)] = round(to_db(torch.cat(errors).mean()).item(), 3)
    return found


def sample_rows(judged, num_tokens: int) -> list[dict]:
    """What the judge says of samples: AR by guidance; MaskGIT by guidance at its default of 8 steps, and by steps without and with the best one."""
    rows = [judged("ar", cfg_scale=float(scale)) for scale in (1, *SCALES)]
    rows += [judged("maskgit", cfg_scale=float(scale)) for scale in (1, *SCALES)]
    eight = rows[-1]["steps"]
    best = min(rows[-1 - len(SCALES):], key=lambda row: row[fd_key(row)])["cfg_scale"]
    rows += [judged("maskgit", steps=n, cfg_scale=scale) for n in doubling(num_tokens) if n != eight for scale in sorted({1.0, best})]
    return rows


def measure(arm: str, seed: int, source: str, run, args, procs: Processes, data, val) -> dict:
    """Everything that is told of one arm and seed but where it comes from; source: the folder of its tokenizer's run."""
    device, folder, K, size = procs.device, run.run, run.tok.codebook_size, run.tok.image_size
    inside = NativeTok.of_run(source, device)
    tokenizer = in_order_of(arm, seed, inside)
    judge_path = os.path.join(args.out, "tinycnn.pt")
    if not checkpoint.exists(judge_path):
        train_judge(judge_path, data, val, size, run.train.flip, args.judge_steps, device)
    (net, _), accuracy = tinycnn_nets(judge_path, data, device)
    how = Batching(seed=seed)

    # 1. Reconstruction.
    originals = real("held out", val, np.arange(len(val)), size, how)
    stats, _ = extract(originals, [net], how, procs)
    reference = Reference.of(val.name, originals.n, [net], stats)

    def judged(source) -> dict:
        row = judge(source, [net], reference, how, procs)
        return {"name": row.pop("name"), "n": row.pop("n"), **row.pop("settings", {}), **{k: v for k, v in row.items() if k != "swept"}}
    some = np.random.default_rng(0).permutation(len(data))[:args.num_samples]
    rebuilt = judged(reconstruction(inside, originals, device))

    # 2. Tokens of the held-out images and what they cost, position by position as the generator gets them.
    batches = list(eval_batches(val, size, 250))
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]).to(device)
    ids = torch.cat([inside.encode(to_float(x.to(device))) for x, _ in batches])   # (m, L)
    order = tokenizer.order if isinstance(tokenizer, Permuted) else torch.arange(ids.shape[1], device=device)
    used, perplexity = usage(ids[:, order], K)
    bits, total = ar_bits(Generator.of_run(folder, "ar", tokenizer, device), ids[:, order], labels)
    learned, _ = cache_tokens(os.path.join(folder, "tokens"), tokenizer.fingerprint, data, size, run.train.flip, None, procs)   # made in training
    marginal = marginal_bits(learned.reshape(-1, ids.shape[1]), ids[:, order], K)

    # 3. Samples.
    def sampled(kind: str, **options) -> dict:
        model = Generator.of_run(folder, kind, tokenizer, device)
        return judged(generated(kind, model, tokenizer, args.num_samples, {}, options, how, device))
    rows = sample_rows(sampled, ids.shape[1])
    return {"psnr": rebuilt["psnr"], "ssim": rebuilt["ssim"], net.key: rebuilt[net.key], "reconstruction": rebuilt,
            "real": judged(real("real", data, some, size, how)), "judge_accuracy": round(accuracy, 4), "prefix_psnr": prefix_psnr(inside, ids, images),
            "order": order.tolist(), "codebook_used": round(used, 4), "perplexity": [round(p, 2) for p in perplexity.tolist()],
            "ar_bits": [round(b, 4) for b in bits], "ar_bits_total": round(total, 3),
            "marginal_bits": [round(b, 4) for b in marginal], "marginal_bits_total": round(sum(marginal), 3), "samples": rows,
            "costs": {**costs(source, run.train), **costs(folder, run.train)}}


def run_arm(arm: str, seed: int, args, procs: Processes, data, val) -> None:
    """Train and measure one arm with one seed and write its result, unless that has been done."""
    path = os.path.join(args.out, f"{arm}-{seed}.json")
    settings, parameters, target = settings_of(arm, args)
    asked = {"preset": args.preset, **settings, "num_samples": args.num_samples, "judge_steps": args.judge_steps, "images": data.fingerprint, "held_out": val.fingerprint}
    asked = json.loads(json.dumps(asked))  # as it comes back from a file: no tuples
    if os.path.exists(path):
        found = checkpoint.read_json(path)["settings"]
        changed = [f"{k}: {found.get(k)} -> {asked.get(k)}" for k in {**found, **asked} if found.get(k) != asked.get(k)]
        need(not changed, f"{path} was measured with other settings ({', '.join(changed)}); give another --out, or delete it")
        print(f"{arm}, seed {seed}: finished before")
        return
    print(f"\n--- {arm}, seed {seed}: encoder of {parameters:,} parameters, {parameters / target - 1:+.1%} of NativeTok's", flush=True)
    source, folder = (os.path.join(args.out, "runs", f"{name}-{seed}") for name in (arm if ARMS[arm][1] == "as made" else GROWN, arm))
    source_flags, flags = (command(settings, seed, args, run) for run in (source, folder))
    train_arm(arm, seed, source_flags, flags)
    checkpoint.write_json(path, {
        "arm": arm, "seed": seed, **provenance(args.command, procs.device), "tokenizer_command": "python train.py " + shlex.join(source_flags), "settings": asked,
        "encoder_parameters": parameters, "encoder_parameters_off": round(parameters / target - 1, 4),
        **measure(arm, seed, source, config.parse_run("", flags), args, procs, data, val)})
    print(f"written: {path}")


def run_pca(args) -> None:
    """The yardstick of experiments/pca.py at an eighth, a quarter, half and all of the tokens' bits -> pca.json."""
    path = os.path.join(args.out, "pca.json")
    if os.path.exists(path):
        return
    values = {**PRESETS[args.preset], **args.sizes}
    most = values["token_schedule"][-1] * math.log2(values["codebook_size"])
    flags = ["--data", args.data, "--val_data", args.val_data, "--bits", *(str(int(most * share)) for share in (0.125, 0.25, 0.5, 1))]
    done = subprocess.run([sys.executable, "-m", "experiments.pca", *flags], capture_output=True, text=True)
    need(done.returncode == 0, f"experiments/pca.py failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    points = [[int(bits), float(db)] for bits, db in re.findall(r"(\d+) bits.*: ([\d.]+) dB", done.stdout)]
    checkpoint.write_json(path, {**provenance(args.command, torch.device("cpu")), "pca_command": "python -m experiments.pca " + shlex.join(flags), "bits_and_psnr": points})


def main(args) -> None:
    if not args.table:
        procs = Processes(args.device)
        data, val = train_and_val(args.data, args.val_data, 0, 0)
        need(val.classes == data.classes and len(data.classes) > 1, f"{args.data} and {args.val_data} need the same classes, two or more")
        os.makedirs(os.path.join(args.out, "runs"), exist_ok=True)
        for seed in args.seeds:  # a whole table first, then its spread
            for arm in args.arms:
                run_arm(arm, seed, args, procs, data, val)
        if not args.quick:
            run_pca(args)
    found = read_results(args.out, ARMS)
    print("\n" + write_tables(found, args.out))
    draw_figure(found, args.out)


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
