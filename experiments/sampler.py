"""Where does the time of a sampling step go? A table of milliseconds by kind of operation.

Measured is AR sampling at the size of imagenet-128 with guidance: one sample in float32, sixteen in
bfloat16. The whole is timed as it is; a second run, in which every operation is timed as torch
calls it, says how the time divides. What lies between the operations (Python, modules, torch's own
calls) is the rest of the whole.

Run      python -m experiments.sampler                                  2 minutes on 2 cores
         python -m experiments.sampler --before old.json --json new.json
             old.json: the same of another commit, shown beside it
Makes    the table; --json FILE: its numbers, and those of --before, each with its commit
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import json
import os
import shlex
import sys

import torch

from experiments.bench_sampling import generator_of, zeros
from experiments.timing import Bench, Operations
from generator import ARGenerator
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, need
from plumbing.processes import provenance

# kind: words in the names of its operations; the first that fits counts
KINDS = {
    "matrix products": ("aten.mm", "aten.addmm"),
    "attention": ("attention", "aten.bmm", "aten.baddbmm", "softmax"),
    "new caches": ("aten.zeros",),
    "moving numbers": ("copy", "cat", "stack", "clone", "embedding", "index", "scatter"),
    "views": ("view", "aten.t.", "slice", "select", "unbind", "permute", "transpose", "expand",
              "unsqueeze", "squeeze", "split", "alias", "detach"),
    "norms, rotary, SwiGLU, drawing": ("",),
}
PYTHON = "between the operations"
CASES = {"1 sample, float32": (1, torch.float32), "16 samples, bfloat16": (16, torch.bfloat16)}


def profile(model: ARGenerator, batch: int, bench: Bench) -> dict:
    """-> ms a step: "whole", and by kind; and calls a step by kind."""
    labels, L = zeros(bench, batch), model.num_tokens
    (whole,) = bench.seconds(lambda: model.sample(labels, cfg_scale=2.0))
    with Operations() as timed:
        model.sample(labels, cfg_scale=2.0)
    ms, calls = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    for operation, seconds in timed.seconds.items():
        name = str(operation)
        kind = next(kind for kind, words in KINDS.items() if any(word in name for word in words))
        ms[kind] += seconds / L * 1e3
        calls[kind] += timed.calls[operation]
    # A clock around each operation makes them a little slower than they are without it.
    ms[PYTHON] = max(0.0, whole / L * 1e3 - sum(ms.values()))
    return {"whole": round(whole / L * 1e3, 2), "ms": {k: round(v, 2) for k, v in ms.items()},
            "calls": {kind: round(n / L, 1) for kind, n in calls.items()}}


def table(now: dict, before: dict | None) -> str:
    """A table of Markdown: ms a step, and calls in brackets, of each case; before -> now."""
    def cell(made, kind):
        if kind == "whole":
            return f"{made['whole']:.1f}"
        calls = f" ({made['calls'][kind]:.0f})" if kind in made["calls"] else ""
        return f"{made['ms'][kind]:.1f}{calls}"
    lines = ["| ms a step (calls) | " + " | ".join(now) + " |", "|---" * (1 + len(now)) + "|"]
    for kind in ("whole", *KINDS, PYTHON):
        cells = [" → ".join(cell(made[case], kind) for made in (before, now) if made)
                 for case in now]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(prog="sampler.py", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--threads", type=int, default=0,
                        help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    parser.add_argument("--before", metavar="FILE", help="what --json wrote at another commit")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    need(args.repeats >= 1, "repeats must be at least 1")
    need(not args.before or os.path.isfile(args.before), f"--before {args.before}: no such file")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    bench, before = Bench(args), None
    if args.before:
        with open(args.before, encoding="utf-8") as file:
            before = json.load(file)["now"]
    made = {}
    for case, (batch, dtype) in CASES.items():
        made[case] = profile(generator_of(ARGenerator, bench).to(dtype), batch, bench)
    print(table(made, before and before["cases"]))
    words = sys.argv[1:] if argv is None else argv
    now = provenance(shlex.join(["python", "-m", "experiments.sampler", *words]), bench.device)
    if args.json:
        checkpoint.write_json(args.json, {**now, "seed": 0, "now": {**now, "cases": made},
                                          "before": before})


if __name__ == "__main__":
    main_with_user_errors(main)
