"""A speed run that others can beat: how soon do 144 bits beat a PCA code of 144 bits?

The rule: train `cifar` at its full length, 16 tokens of 512 codes, in one piece, and be at 20.02 dB
or more on all held-out images when the time is up (CIFAR-10's test set; 20.02 dB is what
experiments/pca.py reaches there). Anything in the repository may be changed. Time is that of
training, reading images and the judgement included, imports left out. Records: RECORDS.md.

Run      python -m experiments.speedrun --data cifar10/train --val_data cifar10/test
         python -m experiments.speedrun ... --steps 1000 -- --batch_size 32      flags of train.py
Makes    the run's folder under --out; minutes, steps, threads, peak memory, PSNR on stdout and in
         OUT/speedrun.json. What an earlier speed run has left in OUT goes; a folder that holds
         anything else is left as it is
Exit     0 passed, 1 not passed, 2 user error, 3 interrupted (repeat to start anew)
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import glob
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import config
import train
from evaluation.progress import evaluate
from nativetok import NativeTok
from plumbing import checkpoint, run
from plumbing.datasets import train_and_val
from plumbing.flags import Parser, need, number
from plumbing.outputs import need_places
from plumbing.processes import (
    forget_holder, lock_folder, need_one_process, peak_memory, provenance)

TARGET = 20.02  # dB, by experiments/pca.py at 144 bits on CIFAR-10's test images
BITS = 144


def parse(argv=None):
    parser = Parser(prog="python -m experiments.speedrun", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, help="images to learn from, in any form that train.py takes")
    add("--val_data", required=True, help="images to be judged by, all of them")
    add("--steps", type=number(int, 1), default=850,
        help="training steps (default: 850, the record's)")
    add("--out", default="runs/speedrun", help="folder of its own, made anew (default: "
        "runs/speedrun)")
    add("flags", nargs="*", help="after --: flags of train.py, in place of the preset's settings")
    return parser.parse_args(argv)


# All that a speed run leaves in its folder, beside pictures; the first is there from the start.
MARK = "speedrun.json"
OWN = (MARK, "config.json", "log.jsonl", "tokenizer.pt", "tokenizer.prev.pt", ".lock")


def strangers(folder: str) -> Iterator[str]:
    """What lies in `folder` and no speed run has made."""
    for entry in os.scandir(folder):
        if entry.name == "samples" and entry.is_dir(follow_symlinks=False):
            yield from (f"samples/{name}" for name in os.listdir(entry)
                        if not re.fullmatch(r"base(-\d+)?\.png", name))
        elif entry.name not in OWN or not entry.is_file(follow_symlinks=False):
            yield entry.name


def empty_folder(folder: str) -> None:
    """Make `folder`, or remove an earlier speed run from it. UserError if it holds anything else.

    Nothing is removed before all of it is known to be a speed run's, and nobody writes there.
    """
    need_places(folders={"--out": folder})
    path = os.path.join(folder, MARK)
    if not os.listdir(folder):
        return
    need(os.path.isfile(path), f"--out {folder} is not empty and no speed run's folder: it has no "
         f"{MARK}; give another folder, or empty it yourself")
    found = checkpoint.read_json(path)
    need(isinstance(found, dict) and "experiments.speedrun" in str(found.get("command")),
         f"{path} was not written by experiments.speedrun; give another folder with --out")
    lock = lock_folder(folder)  # another speed run may be at work there
    try:
        checkpoint.sweep(folder)  # what it was writing when it was killed
        others = sorted(strangers(folder))
        need(not others, f"--out {folder} holds {', '.join(others[:3])}, which no speed run has "
             "made; move that, or give another folder")
        for name in [*glob.glob("samples/*.png", root_dir=folder), *OWN]:
            Path(folder, name).unlink(missing_ok=True)
    finally:
        forget_holder(lock)
        lock.close()


def main(args) -> None:
    need_one_process("experiments.speedrun")
    flags = ["--preset", "cifar", "--stage", "1", "--token_schedule", "16", "--run", args.out,
             "--data", args.data, "--val_data", args.val_data, "--base_steps", str(args.steps),
             "--save_every", str(args.steps), *args.flags]
    settings = config.parse_run(train.__doc__, flags)
    bits = settings.tok.num_tokens * np.log2(settings.tok.codebook_size)
    need(bits <= BITS, f"{bits:.0f} bits are more than the {BITS} that the rule allows")
    given = {"--run": (settings.run, args.out), "--data": (settings.train.data, args.data),
             "--val_data": (settings.train.val_data, args.val_data),
             "--base_steps": (settings.train.base_steps, args.steps)}
    for flag, (now, asked) in given.items():
        need(now == asked, f"{flag} after -- would change what this program has been given before "
             "it; leave it out")
    train_and_val(args.data, args.val_data, settings.train.holdout, settings.train.seed)
    empty_folder(args.out)
    checkpoint.write_json(os.path.join(args.out, MARK), {"command": args.command})
    run.EVAL_IMAGES = 1  # all of them are looked at below, when the clock has stopped

    began = time.perf_counter()
    train.main(settings)
    minutes = (time.perf_counter() - began) / 60

    judged = run.Run(settings, (settings.tok, settings.gen, settings.train))
    judged.tok, judged.eval_indices = settings.tok, np.arange(len(judged.val))
    tokenizer = NativeTok.of_run(args.out, judged.procs.device)
    result = evaluate(tokenizer, judged)
    judged.end()
    row = {**provenance(args.command, judged.procs.device),
           "minutes": round(minutes, 2), "steps": args.steps, "seed": settings.train.seed,
           "threads": torch.get_num_threads(), "psnr": result["psnr"], "images": result["images"],
           "peak_mb": peak_memory(judged.procs.device) >> 20, "passed": result["psnr"] >= TARGET}
    checkpoint.write_json(os.path.join(args.out, MARK), row)
    verdict = "passed" if row["passed"] else f"not passed: {TARGET} dB were to be reached"
    print(f"{minutes:.2f} minutes, {args.steps} steps, {row['threads']} threads, "
          f"{row['peak_mb']} MB: {result['psnr']:.2f} dB on {result['images']:,} images, {verdict}")
    sys.exit(not row["passed"])


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
