"""Does native order help? The same generator on tokens of different tokenizers, under one budget.

    titok                 latent tokens inside a ViT, unordered
    titok-causal          the same, with a causal mask among the latents
    titok-taildrop        the same as titok, ordered by dropping tails in half of the training steps
    nativetok-joint       MIT and MoCET at full length from the start
    nativetok-hnt         MIT and MoCET, grown by hierarchical native training: the paper
    nativetok-shared      like joint, but one expert serves all positions: the control for experts

and, when asked for, levers of order_arms.py, one change each, and

    nativetok-joint-time  joint for as long as hnt takes, whose steps are cheaper
    nativetok-block       like joint, with the published two-layer block experts (narrower)
    nativetok-reversed    control: nativetok-hnt's tokens, and the generator gets the last one first
    nativetok-shuffled    control: the same in a random order, another one for each seed

What the arms share, and how their encoders come to be of one size: order_arms.py. What is measured:
order_measure.py. Only one of these numbers is out of reach of unordered tokens: what later ones
answer when an earlier one is forced (evaluation/intervention.py). Few bits prove nothing: tokens
that say nothing cost nothing, so look at them with PSNR. Samples are judged by the Fréchet
distance in the features of one TinyCNN for all arms of a data set (not FID, see
evaluation/tinycnn.py). Guidance is the best of a few by that distance on other samples than those
that are reported; MaskGIT's is chosen at 8 steps.

Run      python -m experiments.order --preset tiny            the shapes, one seed, on a CPU
         python -m experiments.order --preset tiny --quick    does it run?
         python -m experiments.order --preset cifar --data DIR --val_data DIR --seeds 0 1 2
         (on a GPU; cifar-cpu: smaller). Repeat a command to go on: finished arms are skipped, a
         broken-off one goes on where it was saved; another --out starts anew
Makes    OUT/ARM-SEED.json, pca.json, tinycnn.pt, the judge; OUT/runs/, what was trained; tables and
         a figure by order_table.py
Exit     0 finished, 1 failure, 2 something to mend, 3 interrupted and saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable

import torch

import config
import train
from config import CONFIGS, PRESETS
from experiments.order_arms import ARMS, EXTRA, HNT, PLANS, in_order_of, settings_of
from experiments.order_measure import SCALES, measure
from experiments.order_table import draw_figure, read_results, write_tables
from experiments.pca import transform_code
from plumbing import checkpoint
from plumbing.datasets import ImageSet, train_and_val
from plumbing.flags import DEVICES, Parser, as_flags, build, choose, need, need_seed
from plumbing.outputs import need_places
from plumbing.processes import Processes, provenance


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace, with the plan's numbers where none were given.

    Raises UserError for wrong use.
    """
    parser = Parser(prog="order.py", description=__doc__)
    parser.add_argument("--preset", choices=("tiny", "cifar", "cifar-cpu"), default="tiny",
                        help="sizes and budget (default: tiny)")
    parser.add_argument("--data", default="shapes", help="training images, in any form that "
                        "train.py takes (default: the built-in shapes)")
    parser.add_argument("--val_data", default="",
                        help="held-out images; not needed for the shapes")
    parser.add_argument("--out", metavar="DIR",
                        help="results (default: runs/order-PRESET, or runs/order-quick)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N",
                        help="of weights, data order and samples (default: 0)")
    parser.add_argument("--arms", nargs="+", metavar="ARM",
                        default=[arm for arm in ARMS if arm not in EXTRA],
                        help=f"only these (default: all but {', '.join(EXTRA)})")
    parser.add_argument("--budget", type=int, metavar="STEPS",
                        help="steps of each tokenizer, all its phases together")
    parser.add_argument("--generator_steps", type=int, metavar="STEPS",
                        help="steps of each generator")
    parser.add_argument("--num_samples", type=int, metavar="N",
                        help="images per setting of each generator")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="where to compute")
    parser.add_argument("--cuda_graph", action="store_true", help="train.py's flag, for all "
                        "tokenizers that drop no tails, and for the generators")
    parser.add_argument("--quick", action="store_true",
                        help="tiny sizes and few steps, to see that everything runs")
    parser.add_argument("--table", action="store_true", help="train nothing; make table and "
                        "figure anew from the results that are there")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = "python -m experiments.order " + shlex.join(words)

    name = "quick" if args.quick else args.preset
    plan = PLANS[name]
    args.out = args.out or os.path.join("runs", f"order-{name}")
    args.preset, args.sizes, args.judge_steps = plan.preset, plan.sizes, plan.judge_steps
    # 20: HNT cuts the budget into phases. 4: precision and recall ask for the third neighbour.
    for number, least in (("budget", 20), ("generator_steps", 1), ("num_samples", 4)):
        if getattr(args, number) is None:
            setattr(args, number, getattr(plan, number))
        need(getattr(args, number) >= least,
             f"{number} {getattr(args, number)} must be at least {least}")
    for seed in args.seeds:
        need_seed(seed, "seeds")
    for arm in args.arms:
        choose("arm", arm, ARMS)
    need(args.preset != "cifar" or args.data != "shapes" or args.table,
         f"--preset {name} needs images: give --data and --val_data")
    # Held-out images cut from --data would differ between seeds, and so would their judge.
    need(args.data == "shapes" or args.val_data or args.table,
         "--data needs --val_data, so that all seeds are judged by the same images")
    return args


# ------------------------------------------------------------------------------------------------
# training

def train_flags(settings: dict, seed: int, args, folder: str) -> list[str]:
    """The command line of train.py for these settings, tokenizer and generators."""
    return ["--preset", args.preset, "--run", folder, "--data", args.data,
            "--val_data", args.val_data, "--seed", str(seed), "--device", args.device,
            *(["--cuda_graph"] if args.cuda_graph and not settings["tail_drop"] else []),
            *as_flags(settings)]


def train_stages(flags: list[str], *stages: int, **changes: Callable) -> None:
    """train.py's stages in this process; what is finished already is left out.

    changes   change_model, change_tokenizer of train.main
    Exits with 3 when interrupted, as train.py does.
    """
    with handlers_of_its_own():
        for stage in stages:
            stage_args = config.parse_run("", [*flags, "--stage", str(stage)])
            train.main(stage_args, **changes)


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


def train_arm(arm: str, seed: int, source_flags: list[str], flags: list[str]) -> None:
    """Tokenizer and generators of one arm.

    source_flags   of the run whose tokenizer it takes: its own flags, but for the controls
    """
    train_stages(source_flags, 1, 2)
    if ARMS[arm].order == "as made":
        train_stages(flags, 3)
        return
    source, folder = (config.parse_run("", words).run for words in (source_flags, flags))
    os.makedirs(folder, exist_ok=True)
    shutil.copyfile(os.path.join(source, "tokenizer.pt"), os.path.join(folder, "tokenizer.pt"))
    # train.py knows nothing of other orders and need not: it is handed a tokenizer that has one.
    # Its token cache, its pictures and the generators' mark of whose ids they have learned follow,
    # so no other program can take these ids for the tokenizer's own.
    train_stages(flags, 3, change_tokenizer=lambda tokenizer: in_order_of(arm, seed, tokenizer))


# ------------------------------------------------------------------------------------------------
# results

def check_settings(path: str, settings: dict) -> None:
    """Raise UserError when the result at `path` was measured with other settings than these."""
    old = checkpoint.read_json(path)["settings"]
    changed = [f"{name}: {old.get(name)} -> {settings.get(name)}"
               for name in {**old, **settings} if old.get(name) != settings.get(name)]
    need(not changed, f"{path} was measured with other settings ({', '.join(changed)}); "
                      "give another --out, or delete it")


def make_result(arm: str, seed: int, args, procs: Processes, data: ImageSet, val: ImageSet) -> None:
    """Train and measure one arm with one seed and write its result, unless that has been done."""
    path = os.path.join(args.out, f"{arm}-{seed}.json")
    settings, parameters, target = settings_of(arm, args)
    recorded = {"preset": args.preset, **settings, "num_samples": args.num_samples,
                "judge_steps": args.judge_steps, "guidance": SCALES, "images": data.fingerprint,
                "held_out": val.fingerprint}
    recorded = json.loads(json.dumps(recorded))  # as it comes back from a file: no tuples
    if os.path.exists(path):
        check_settings(path, recorded)
        print(f"{arm}, seed {seed}: finished before")
        return

    off = parameters / target - 1
    print(f"\n--- {arm}, seed {seed}: encoder of {parameters:,} parameters, "
          f"{off:+.1%} of NativeTok's", flush=True)
    source_arm = arm if ARMS[arm].order == "as made" else HNT
    source, folder = (os.path.join(args.out, "runs", f"{name}-{seed}")
                      for name in (source_arm, arm))
    source_flags, flags = (train_flags(settings, seed, args, name) for name in (source, folder))
    train_arm(arm, seed, source_flags, flags)
    checkpoint.write_json(path, {
        "arm": arm, "seed": seed, **provenance(args.command, procs.device),
        "tokenizer_command": "python train.py " + shlex.join(source_flags), "settings": recorded,
        "encoder_parameters": parameters, "encoder_parameters_off": round(off, 4),
        **measure(arm, seed, source, config.parse_run("", flags), args, procs, data, val)})
    print(f"written: {path}")


def make_pca(args, data: ImageSet, val: ImageSet) -> None:
    """PCA transform codes of an eighth, a quarter, half and all of the tokens' bits -> pca.json."""
    path = os.path.join(args.out, "pca.json")
    if os.path.exists(path):
        return
    tok = build(CONFIGS, {**PRESETS[args.preset], **args.sizes})[0]
    all_bits = tok.num_tokens * math.log2(tok.codebook_size)
    bits = [int(all_bits * share) for share in (0.125, 0.25, 0.5, 1)]
    points = [[total, round(psnr, 2)]
              for total, _, psnr in transform_code(data, val, tok.image_size, bits)]
    flags = ["--data", args.data, "--val_data", args.val_data, "--bits", *map(str, bits)]
    checkpoint.write_json(path, {
        **provenance(args.command, torch.device("cpu")),
        "pca_command": "python -m experiments.pca " + shlex.join(flags),
        "bits_and_psnr": points})


def main(args) -> None:
    if not args.table:
        procs = Processes(args.device)
        data, val = train_and_val(args.data, args.val_data, 0, 0)
        need(val.classes == data.classes and len(data.classes) > 1,
             f"{args.data} and {args.val_data} need the same classes, two or more")
        need_places(folders={"--out": os.path.join(args.out, "runs")})
        for seed in args.seeds:  # a whole table first, then its spread
            for arm in args.arms:
                make_result(arm, seed, args, procs, data, val)
        if not args.quick:
            make_pca(args, data, val)
    results = read_results(args.out, ARMS)
    print("\n" + write_tables(results, args.out))
    draw_figure(results, args.out)


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
