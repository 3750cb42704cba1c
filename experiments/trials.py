"""Small trials: one change at a time against one base, to learn what matters before a long run is spent on it.

Base     CIFAR-10-sized images, 16 tokens from the start, experts of width 64, 800 steps; then 600 steps of a small AR generator
Told     held-out PSNR; mean perplexity of the positions; AR bits of an image, and the entropy of its tokens one by one
         (2,000 held-out images, so an entropy near log2 of the codebook comes out a little too small)
Read     these are leads, not results: short runs, one seed unless --seeds says more. Differences below 0.2 dB mean little.
Run      python -m experiments.trials --data cifar10/train --val_data cifar10/test                      all of them
         python -m experiments.trials --data ... --val_data ... --trials base "no entropy term"         some of them
Resume   repeat the command: finished trials are only read
Makes    OUT/trials.json and OUT/trials.md; OUT/runs/, the runs themselves. What was measured is kept in experiments/results/
Exit     0 finished, 1 failure, 2 something to mend, 3 interrupted and saved
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import contextlib
import json
import math
import os
import shlex
import statistics
import sys
from pathlib import Path
from unittest import mock

from experiments.order import train_stages
from mocet import MoCET
from plumbing import checkpoint
from plumbing.flags import Parser, as_flags, choose
from plumbing.processes import Processes, provenance

BASE = dict(token_schedule=(16,), expert_width=64, base_steps=800, continuous_steps=150, flip=False, tail_drop=0.0, generators="ar", generator_width=192,
            generator_batch_size=32, generator_dropout=0.0, generator_steps=600, sample_every=100000)
TRIALS = {  # name: settings of train.py that differ from BASE
    "base": {},
    "no gradient through the prefix": {},  # see without_prefix_gradient
    "experts of two layers": dict(expert_depth=2),
    "experts twice as wide": dict(expert_width=128),
    "MIT twice as deep": dict(encoder_depth=4),
    "no entropy term": dict(entropy_weight=0.0),
    "grown, long fine-tune": dict(token_schedule=(8, 12, 16), base_steps=240, grow_steps=60, finetune_steps=440),
    "grown, brief fine-tune": dict(token_schedule=(8, 12, 16), base_steps=500, grow_steps=110, finetune_steps=80),
    "grown, no entropy term": dict(token_schedule=(8, 12, 16), base_steps=240, grow_steps=60, finetune_steps=440, entropy_weight=0.0),
}


def without_prefix_gradient():
    """A patch under which an expert's token is a constant for the experts after it: they cannot teach it what to say."""
    made = MoCET.__init__

    def init(self, cfg):
        made(self, cfg)
        self.embed_code.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
    return mock.patch.object(MoCET, "__init__", init)


def run_trial(name: str, seed: int, args) -> dict:
    """Train one trial, or read what it came to -> its row."""
    folder = os.path.join(args.out, "runs", f"{name.replace(' ', '-').replace(',', '')}-{seed}")
    flags = ["--preset", "cifar", "--run", folder, "--data", args.data, "--val_data", args.val_data, "--seed", str(seed), *as_flags({**BASE, **args.sizes, **TRIALS[name]})]
    with without_prefix_gradient() if name == "no gradient through the prefix" else contextlib.nullcontext():
        train_stages(flags, 1, 2, 3)
    rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    judged, generator = [row for row in rows if "psnr" in row], [row for row in rows if "held_out_loss" in row][-1]
    perplexity = judged[-1]["perplexity"]
    return {"trial": name, "seed": seed, "settings": TRIALS[name], "psnr": judged[-1]["psnr"], "perplexity": round(statistics.mean(perplexity), 1),
            "ar_bits": round(generator["held_out_loss"] * len(perplexity) / math.log(2), 1), "entropy_bits": round(sum(map(math.log2, perplexity)), 1),
            "tokenizer_seconds": round(sum(row["seconds"] for row in judged), 1)}


def table(rows: list[dict]) -> str:
    lines = ["| trial | seeds | PSNR | perplexity | AR bits | entropy | tokenizer, s |", "|---" * 7 + "|"]
    for name in dict.fromkeys(row["trial"] for row in rows):
        mine = [row for row in rows if row["trial"] == name]
        cells = ["{:.2f} dB", "{:.0f}", "{:.1f}", "{:.1f}", "{:.0f}"]
        means = [statistics.mean(row[key] for row in mine) for key in ("psnr", "perplexity", "ar_bits", "entropy_bits", "tokenizer_seconds")]
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cell.format(mean) for cell, mean in zip(cells, means)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = Parser(prog="trials.py", description=__doc__)
    parser.add_argument("--data", required=True, help="training images, in any form that train.py takes")
    parser.add_argument("--val_data", required=True, help="held-out images")
    parser.add_argument("--trials", nargs="+", default=list(TRIALS), metavar="NAME", help=f"only these (default: all): {', '.join(map(repr, TRIALS))}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of weights and data order (default: 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of tokenizer and generator, to see quickly that everything runs")
    parser.add_argument("--out", default="runs/trials", metavar="DIR", help="results (default: runs/trials)")
    args = parser.parse_args()
    for name in args.trials:
        choose("trial", name, TRIALS)
    args.sizes = {} if args.steps is None else dict(base_steps=args.steps, continuous_steps=args.steps // 4, generator_steps=args.steps)
    args.command = "python -m experiments.trials " + shlex.join(sys.argv[1:])
    device, path = Processes("auto").device, os.path.join(args.out, "trials.json")
    rows = checkpoint.read_json(path)["rows"] if os.path.exists(path) else []
    for seed in args.seeds:
        for name in args.trials:
            if any((row["trial"], row["seed"]) == (name, seed) for row in rows):
                continue
            print(f"\n--- {name}, seed {seed}", flush=True)
            row = {**run_trial(name, seed, args), **provenance(args.command, device)}
            # Read again: another call may have added to it meanwhile.
            rows = [*(checkpoint.read_json(path)["rows"] if os.path.exists(path) else []), row]
            checkpoint.write_json(path, {"base": BASE | args.sizes, "rows": sorted(rows, key=lambda row: (list(TRIALS).index(row["trial"]), row["seed"]))})
    rows = checkpoint.read_json(path)["rows"]
    with checkpoint.replacing(os.path.join(args.out, "trials.md")) as file:
        file.write(table(rows).encode())
    print("\n" + table(rows))


if __name__ == "__main__":
    main_with_user_errors(main)
