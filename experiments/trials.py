"""Small trials: one change at a time against one base, before a long run is spent on it.

The base is the preset cifar, shorter: 16 tokens from the start, 800 steps; then 400 steps of a
small AR generator. These are leads, not results: short runs, one seed unless --seeds says
more. Differences below 0.2 dB mean little.

Run      python -m experiments.trials --data cifar10/train --val_data cifar10/test       all of them
         python -m experiments.trials --data ... --val_data ... --trials base "no entropy term"
         Repeat a command to go on: finished trials are only read
Makes    OUT/trials.json and OUT/trials.md: held-out PSNR; mean perplexity of the positions; AR bits
         of an image, and the entropy of its tokens one by one (of 2,000 held-out images, so one
         near log2 of the codebook comes out a little too small); OUT/runs/, what was trained
Exit     0 finished, 1 failure, 2 something to mend, 3 interrupted and saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import math
import os
import shlex
import statistics
import sys

from experiments.order import train_stages
from experiments.order_table import read_log
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.flags import Parser, as_flags, choose, need_seed, number
from plumbing.outputs import need_places
from plumbing.processes import Processes, need_one_process, provenance

BASE = dict(
    token_schedule=(16,), base_steps=800, continuous_steps=130, generators="ar",
    generator_width=128, generator_steps=400, sample_every=100000)
GROWN = dict(token_schedule=(4, 8, 16), base_steps=200, grow_steps=60, finetune_steps=480)
BRIEF = dict(token_schedule=(4, 8, 16), base_steps=500, grow_steps=110, finetune_steps=80)
DETACHED = "no gradient through the prefix"  # the model's setting, not one of train.py's
TRIALS = {  # name: settings of train.py that differ from BASE
    "base": {},
    DETACHED: {},
    "experts of two layers": dict(expert_depth=2),
    "experts twice as wide": dict(expert_width=128),
    "MIT twice as deep": dict(encoder_depth=4),
    "AdamW": dict(optimizer="adamw", learning_rate=1e-3),
    "one rate for all": dict(codebook_rate=1.0),
    "no entropy term": dict(entropy_weight=0.0),
    "grown, long fine-tune": GROWN,
    "grown, brief fine-tune": BRIEF,
    "grown, no entropy term": dict(GROWN, entropy_weight=0.0),
}


def detach_prior(model: NativeTok) -> NativeTok:
    """Make a token a constant for the experts after it: they cannot teach it what to say."""
    model.mocet.detach_prior = True
    return model


def run_trial(name: str, seed: int, args) -> dict:
    """Train one trial, or read what it came to -> its row."""
    short_name = name.replace(" ", "-").replace(",", "")
    folder = os.path.join(args.out, "runs", f"{short_name}-{seed}")
    flags = ["--preset", "cifar", "--run", folder, "--data", args.data,
             "--val_data", args.val_data, "--seed", str(seed),
             *as_flags({**BASE, **args.sizes, **TRIALS[name]})]
    changes = {"change_model": detach_prior} if name == DETACHED else {}
    train_stages(flags, 1, 2, 3, **changes)

    log = read_log(folder)
    ends = [row for row in log if "psnr" in row]  # of the tokenizer's phases
    generator_end = [row for row in log if "held_out_loss" in row][-1]
    perplexity = ends[-1]["perplexity"]
    ar_bits = generator_end["held_out_loss"] * len(perplexity) / math.log(2)
    return {"trial": name, "seed": seed, "settings": TRIALS[name], "psnr": ends[-1]["psnr"],
            "perplexity": round(statistics.mean(perplexity), 1), "ar_bits": round(ar_bits, 1),
            "entropy_bits": round(sum(math.log2(p) for p in perplexity), 1),
            "tokenizer_seconds": round(sum(row["seconds"] for row in ends), 1)}


COLUMNS = (  # key of a row, head of the column, how its mean is written
    ("psnr", "PSNR", "{:.2f} dB"), ("perplexity", "perplexity", "{:.0f}"),
    ("ar_bits", "AR bits", "{:.1f}"), ("entropy_bits", "entropy", "{:.1f}"),
    ("tokenizer_seconds", "tokenizer, s", "{:.0f}"))


def table(rows: list[dict]) -> str:
    """Means over seeds, as Markdown."""
    heads = ["trial", "seeds", *(head for _, head, _ in COLUMNS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(row["trial"] for row in rows):
        of_trial = [row for row in rows if row["trial"] == name]
        cells = [form.format(statistics.mean(row[key] for row in of_trial))
                 for key, _, form in COLUMNS]
        lines.append(f"| {name} | {len(of_trial)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = Parser(prog="trials.py", description=__doc__)
    parser.add_argument("--data", required=True,
                        help="training images, in any form that train.py takes")
    parser.add_argument("--val_data", required=True, help="held-out images")
    parser.add_argument("--trials", nargs="+", default=list(TRIALS), metavar="NAME",
                        help=f"only these (default: all): {', '.join(map(repr, TRIALS))}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N",
                        help="of weights and data order (default: 0)")
    parser.add_argument("--steps", type=number(int, 1), metavar="N", help="steps of tokenizer "
                        "and generator, to see quickly that everything runs")
    parser.add_argument("--out", default="runs/trials", metavar="DIR",
                        help="results (default: runs/trials)")
    args = parser.parse_args()
    for seed in args.seeds:
        need_seed(seed, "seeds")
    for name in args.trials:
        choose("trial", name, TRIALS)
    args.sizes = {}
    if args.steps is not None:
        args.sizes = dict(base_steps=args.steps, continuous_steps=args.steps // 4,
                          generator_steps=args.steps)
    args.command = "python -m experiments.trials " + shlex.join(sys.argv[1:])
    return args


def place(row: dict) -> tuple[int, int]:
    """Of a row in the table."""
    return list(TRIALS).index(row["trial"]), row["seed"]


def main() -> None:
    args = parse()
    need_one_process("experiments.trials")
    device, path = Processes("auto").device, os.path.join(args.out, "trials.json")
    need_places(folders={"--out": args.out})

    def rows_so_far() -> list[dict]:
        return checkpoint.read_json(path)["rows"] if os.path.exists(path) else []

    for seed in args.seeds:
        for name in args.trials:
            if any((row["trial"], row["seed"]) == (name, seed) for row in rows_so_far()):
                continue
            print(f"\n--- {name}, seed {seed}", flush=True)
            row = {**run_trial(name, seed, args), **provenance(args.command, device)}
            # Read again: another call may have added to it meanwhile.
            rows = sorted([*rows_so_far(), row], key=place)
            checkpoint.write_json(path, {"base": BASE | args.sizes, "rows": rows})
    text = table(rows_so_far())
    with checkpoint.replacing(os.path.join(args.out, "trials.md")) as file:
        file.write(text.encode())
    print("\n" + text)


if __name__ == "__main__":
    main_with_user_errors(main)
