"""Train the judge of all tables of 32x32 photographs, once.

A judge that is wrong on a third of real images cannot say whether samples show their class, and
the order of two arms turns with it. This one is right on nine of ten (evaluation/airbench.py).
Its file is needed by every table that is to be compared with another one: the distance's name has
the file's fingerprint. On another kind of processor, or with another number of threads, the same
command gives a judge as good, but not the same.

Run      python -m experiments.judge --data DIR --val_data DIR --out runs/judge.pt
         then --judge runs/judge.pt for eval_fid.py, experiments.order and experiments.flow
Makes    FILE, and FILE.json: command, commit, accuracy on all held-out images, minutes
Exit     0 finished, 1 failure, 2 user error, 3 interrupted
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import time

import torch

from evaluation.airbench import Airbench, learn
from evaluation.tinycnn import save_judge
from plumbing import checkpoint
from plumbing.datasets import train_and_val
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.outputs import PT, need_places
from plumbing.processes import Processes, need_one_process, provenance


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.judge", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="PATH", help="images to learn from")
    add("--val_data", required=True, metavar="PATH", help="held-out images, of the same classes")
    add("--out", required=True, metavar="FILE", help="the judge; must not be there yet")
    add("--steps", type=number(int, 1), default=1950, help="batches of 256 (default: 1950, ten "
        "times the images of CIFAR-10)")
    add("--device", choices=DEVICES, default="auto")
    return parser.parse_args(argv)


def main(args) -> None:
    need_one_process("experiments.judge")
    need(not checkpoint.exists(args.out), f"{args.out} is there already, and its numbers bear its "
         "fingerprint; give --out another name")
    need_places({"--out": (args.out, PT)}, reads={"--data": args.data,
                                                     "--val_data": args.val_data})
    data, val = train_and_val(args.data, args.val_data, 0, 0)
    need(len(data.classes) > 1 and data.classes == val.classes,
         f"{args.data} and {args.val_data} need the same classes, two or more")
    procs, began = Processes(args.device), time.time()
    torch.manual_seed(0)
    judge = Airbench(len(data.classes))
    learn(judge, data, args.steps, False, procs.device)
    right = save_judge(args.out, judge, data, val, 32, args.steps, procs.device, cut=(0, 0))
    row = {**provenance(args.command, procs.device),
           "seed": 0, "steps": args.steps, "judge_accuracy": round(right, 4), "held_out": len(val),
           "minutes": round((time.time() - began) / 60, 1),
           "fingerprint": checkpoint.fingerprint(judge.state_dict())[:8]}
    checkpoint.write_json(args.out + ".json", row)
    print(f"{args.out}: right on {right:.2%} of {len(val)} held-out images, "
          f"{row['minutes']} minutes, fingerprint {row['fingerprint']}")


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
