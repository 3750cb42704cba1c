"""How good are the reconstructions and the samples of a run, or any two sets of images?

Run      python eval_fid.py --run runs/NAME --train_features                     in features of a small classifier (not FID)
         python eval_fid.py --run runs/NAME --features inception --data imagenet/val --num_samples 50000   rFID, gFID, IS
         python eval_fid.py --run runs/NAME --generator maskgit --sweep cfg_scale=1,1.5,2,3 temperature=0.8,1.0
         python eval_fid.py --images samples.npz --reference VIRTUAL_imagenet256_labeled.npz --features inception
         torchrun --nproc_per_node=8 -- eval_fid.py --run runs/NAME ...          the same numbers, sooner
Judged   real             as many training images: the floor, what nothing can be expected to beat
         reconstruction   the reference images, encoded and decoded                                   (rFID)
         ar, maskgit      samples, every class equally often                                          (gFID)
         --images         a folder, an archive or an .npz in their place
         --controls       real images made worse on purpose: does the measure notice?
Against  the run's held-out images, --data, or --reference: an .npz with mu and sigma (ADM's files: what they say of the whole
         data set is used, never their arr_0, which is a part of it)
Prints   what was compared with what: weights, reference, n. Small n makes every distance too large.
Makes    RUN/summary.json, or --json FILE; RUN/tinycnn.pt with --train_features; --save_stats FILE
Exit     0 done, 1 failure, 2 something to mend
"""
import argparse
import itertools
import json
import os
import shlex
import sys
import time

import numpy as np

from config import CONFIGS
from evaluation.judging import (
    Eye,
    Reference,
    controls,
    generated,
    inception_eye,
    judge,
    look,
    read_reference,
    real,
    reconstruction,
    tinycnn_eyes,
)
from evaluation.measures import frechet_distance  # noqa: F401  the contract's place for it
from evaluation.tinycnn import train_judge
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.datasets import open_images, train_and_val
from plumbing.flags import Parser, UserError, build, main_with_user_errors, need, read_run
from plumbing.processes import Processes, provenance

GRID = {"cfg_scale": float, "temperature": float, "top_k": int, "top_p": float, "steps": int, "randomize_temperature": float}   # what --sweep takes


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace. Raises UserError for combinations that would be ignored."""
    parser = Parser(prog="eval_fid.py", usage="%(prog)s --run RUN [flags]", description=__doc__)
    to = parser.add_argument_group("what is judged")
    to.add_argument("--run", help="folder of a run of train.py: its reconstructions and its generators")
    to.add_argument("--images", metavar="PATH", help="judge these images instead: a folder, an archive, or an .npz as sample.py writes it")
    to.add_argument("--generator", choices=("ar", "maskgit", "both"), default="both", help="which generators of the run (default: both)")
    to.add_argument("--num_samples", type=int, default=2000, metavar="N", help="images of each kind (default: 2000; papers use 50000)")
    to.add_argument("--controls", action="store_true", help="also judge real images made worse: blurred, with noise, classes missing")
    to = parser.add_argument_group("by what and against what")
    to.add_argument("--features", choices=("tinycnn", "inception"), default="tinycnn", help="whose features (default: tinycnn; inception is FID)")
    to.add_argument("--train_features", type=int, nargs="?", const=500, default=0, metavar="STEPS", help="train the run's TinyCNN first (500 steps if not given)")
    to.add_argument("--inception", default="", metavar="FILE", help="Inception's weights (default: torch's cache, downloaded once)")
    to.add_argument("--data", metavar="PATH", help="reference images, also what is reconstructed (default: the run's held-out images)")
    to.add_argument("--reference", metavar="FILE", help=".npz with mu and sigma, in place of reference images")
    to.add_argument("--num_reference", type=int, default=50000, metavar="N", help="reference images at most (default: 50000)")
    to.add_argument("--save_stats", metavar="FILE", help="write mu and sigma of the reference images, for --reference")
    to.add_argument("--image_size", type=int, metavar="N", help="crop and resize to this (default: the run's size, else that of the first image)")
    to = parser.add_argument_group("how samples are drawn")
    to.add_argument("--cfg_scale", type=float, default=2.0, help="guidance: 0 unconditional, 1 plain, above 1 guided (default: 2)")
    to.add_argument("--temperature", type=float, default=1.0, help="of the tokens' distribution (default: 1)")
    to.add_argument("--top_k", type=int, default=0, help="ar: draw from the k likeliest tokens (default: 0, off)")
    to.add_argument("--top_p", type=float, default=1.0, help="ar: draw from the likeliest tokens that reach this probability (default: 1, off)")
    to.add_argument("--steps", type=int, help="maskgit: passes (default: 8, at most one per token)")
    to.add_argument("--randomize_temperature", type=float, default=4.5, help="maskgit: noise on the confidences (default: 4.5)")
    to.add_argument("--sweep", nargs="+", default=[], metavar="NAME=A,B,C", help=f"every combination of these, of {' '.join(GRID)}")
    to.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    to = parser.add_argument_group("how to run")
    to.add_argument("--batch_size", type=int, default=250, help="images at a time; another one gives other samples (default: 250)")
    to.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    to.add_argument("--json", metavar="FILE", help="write all numbers there (default: RUN/summary.json)")
    args = parser.parse_args(argv)
    args.command = "python eval_fid.py " + shlex.join(sys.argv[1:] if argv is None else map(str, argv))
    need(args.run or args.images or (args.data and args.save_stats), "give --run, or --images with --reference or --data, or --data with --save_stats")
    need(args.run or args.features == "inception", "TinyCNN features need --run, whose images it learned from; or use --features inception")
    need(args.run or args.data or args.reference, "--images need something to be compared with: --reference or --data")
    need(not (args.data and args.reference), "--data and --reference are two references; give one of them")
    need(not (args.save_stats and args.reference), "--save_stats writes the statistics of images; leave --reference out")
    need(not (args.train_features and args.features == "inception"), "--train_features trains the TinyCNN, which --features inception does not use")
    need(not args.images or not (args.sweep or args.controls), "--sweep and --controls belong to a run's samples; leave --images out")
    for name, least in (("num_samples", 2), ("num_reference", 2), ("batch_size", 1), ("train_features", 0), ("seed", 0)):
        need(getattr(args, name) >= least, f"{name} {getattr(args, name)} must be at least {least}")
    sweep = {}
    for part in args.sweep:
        name, _, values = part.partition("=")
        need(name in GRID, f"--sweep {part}: cannot sweep {name!r}; choose from {', '.join(GRID)}, as in cfg_scale=1,1.5,2")
        try:
            sweep[name] = [GRID[name](value) for value in values.split(",")]
        except ValueError:
            raise UserError(f"--sweep {part}: {values!r} are not numbers with commas between them") from None
    args.sweep = sweep
    return args


# ------------------------------------------------------------------------------------------------
# telling

COLUMNS = ("psnr", "ssim", "inception_score", "precision", "recall", "class_accuracy")


def table(rows: list[dict], eyes: list[Eye]) -> str:
    """The results as text, one row per set of images."""
    columns = [eye.key for eye in eyes] + [c for c in COLUMNS if any(c in row for row in rows)]
    names = [row["name"] + "".join(f" {k}={v:g}" for k, v in row.get("swept", {}).items()) for row in rows]
    wide = max(map(len, names)) + 2
    lines = [f"{'':{wide}}{'n':>7}" + "".join(f"{c:>{len(c) + 3}}" for c in columns)]
    for name, row in zip(names, rows):
        lines.append(f"{name:{wide}}{row['n']:>7}" + "".join(f"{format(row[c], '.4g') if c in row else '-':>{len(c) + 3}}" for c in columns))
    return "\n".join(lines)


READ_BY = {"ar": ("cfg_scale", "temperature", "top_k", "top_p"), "maskgit": ("cfg_scale", "temperature", "steps", "randomize_temperature")}


def options_of(kind: str, args) -> tuple[dict, list[dict]]:
    """-> what this kind of generator reads of the flags, and every combination of the swept values that it reads."""
    base = {name: getattr(args, name) for name in READ_BY[kind] if getattr(args, name) is not None}
    mine = {name: values for name, values in args.sweep.items() if name in READ_BY[kind]}
    return base, [dict(zip(mine, values)) for values in itertools.product(*mine.values())]


def main(args) -> None:
    began, procs = time.time(), Processes(args.device)
    data = val = tokenizer = None
    if args.run:
        values = read_run(args.run)
        values.pop("preset")
        tok, _, train = build(CONFIGS, values)
        tokenizer, size = NativeTok.of_run(args.run, procs.device), tok.image_size
        results = checkpoint.load(os.path.join(args.run, "tokenizer.pt"), needs=("results",))["results"]
        need("base" in results, f"{args.run} has no finished phase yet; let train.py go on")
        data, val = train_and_val(train.data, train.val_data, train.holdout, train.seed, args.run)
    compared = open_images(args.data) if args.data else val
    images = open_images(args.images) if args.images else None
    size = args.image_size or (size if args.run else min(images.load(0).shape[:2]))

    # 1. The eyes.
    if args.features == "inception":
        eyes, accuracy = [inception_eye(args.inception, procs.device)], None
    else:
        path = os.path.join(args.run, "tinycnn.pt")
        if args.train_features and procs.main:
            train_judge(path, data, val, tok.image_size, train.flip, args.train_features, procs.device)
        procs.barrier()
        need(checkpoint.exists(path), f"{args.run} has no classifier yet; add --train_features (trained once, then kept)")
        eyes, accuracy = tinycnn_eyes(path, data, procs.device)

    # 2. The reference.
    if args.reference:
        reference = read_reference(args.reference, eyes)
    else:
        shuffled = np.random.default_rng(0).permutation(len(compared))[:args.num_reference]
        originals = real("reference", compared, np.sort(shuffled), size, args)
        seen, _ = look(originals, eyes, args, procs)
        reference = Reference(compared.name, originals.n, {e.key: s.statistics.mu for e, s in zip(eyes, seen)},
                              {e.key: s.statistics.sigma for e, s in zip(eyes, seen)}, {e.key: s.features() for e, s in zip(eyes, seen)})

    # 3. What is judged.
    subjects = []
    if images is not None:
        # TRAP: the first n images of a folder are those of its first classes.
        chosen = np.random.default_rng(0).permutation(len(images))[:args.num_samples]
        subjects.append(real(images.name, images, chosen, size, args))
        subjects[0].labelled = data is not None and images.classes == data.classes
    elif args.run:
        subjects.append(real("real", data, np.random.default_rng(0).permutation(len(data))[:args.num_samples], size, args))
        subjects += controls(data, subjects[0].n, size, args) if args.controls else []
        if not args.reference:
            subjects.append(reconstruction(tokenizer, originals, procs.device))
        for kind in ("ar", "maskgit") if args.generator == "both" else (args.generator,):
            if args.generator == "both" and not checkpoint.exists(os.path.join(args.run, f"generator-{kind}.pt")):
                continue
            base, combinations = options_of(kind, args)
            for swept in combinations:
                subjects.append(generated(kind, tokenizer, base, swept, args, procs.device))
    rows = [judge(subject, eyes, reference, args, procs) for subject in subjects]

    # 4. Tell.
    if not procs.main:
        return procs.end()
    if args.save_stats:
        with checkpoint.replacing(args.save_stats) as file:
            np.savez(file, mu=reference.mu[eyes[0].key], sigma=reference.sigma[eyes[0].key], n=reference.n, key=eyes[0].key)
        print(f"{args.save_stats}: mu and sigma of {reference.name} in {eyes[0].title}, n {reference.n}")
    count = "n unknown" if reference.n is None else f"n {reference.n}"
    print(f"\nagainst {reference.name}, {count}, at {size} pixels")
    for eye in eyes:
        print(f"{eye.key}: {eye.title}")
        few = [f"{row['name']} ({row['n']})" for row in rows if row["n"] <= eye.features] + (["the reference"] if (reference.n or 10 ** 9) <= eye.features else [])
        if few:
            print(f"warning: not more images than the {eye.features} features: {', '.join(few)}; such a distance is far too large")
    print("\n" + table(rows, eyes))
    if accuracy is not None:
        print(f"\nthe classifier is right on {accuracy:.1%} of {val.name}, held out")
    out = {**provenance(args.command, procs.device), "seed": args.seed, "reference": {"name": reference.name, "n": reference.n}, "eyes": {eye.key: eye.title for eye in eyes}, "rows": rows}
    if args.run and images is None:
        out = {**run_summary(args.run, results, rows, accuracy), **out}
        out["seconds"]["eval"] = round(time.time() - began, 1)
        print("\n" + phases_table(results) + "\n\nseconds: " + ", ".join(f"{phase} {s:.0f}" for phase, s in out["seconds"].items()))
    path = args.json or (os.path.join(args.run, "summary.json") if args.run and images is None else None)
    if path:
        checkpoint.write_json(path, out)
        print(f"written: {path}")
    procs.end()


def run_summary(folder: str, results: dict, rows: list[dict], accuracy: float | None) -> dict:
    """What DESIGN promises of summary.json: quality by length, codebook use, class accuracy, seconds."""
    summary = {"psnr_by_tokens": {}, "codebook_used": {}, "class_accuracy": {}, "seconds": {}}
    for result in results.values():  # in order: the fine-tune overwrites its length's growth step
        summary["psnr_by_tokens"][str(result["num_tokens"])] = result["psnr"]
        summary["codebook_used"][str(result["num_tokens"])] = result["codebook_used"]
    for row in rows:
        if row["name"] in ("ar", "maskgit") and "class_accuracy" in row and "swept" not in row:
            summary["class_accuracy"][row["name"]] = row["class_accuracy"]
    if accuracy is not None:
        summary["class_accuracy"]["classifier_on_real"] = round(accuracy, 4)
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as log:
        summary["seconds"] = {row["phase"]: row["seconds"] for row in map(json.loads, log) if "seconds" in row}
    return summary


def phases_table(results: dict) -> str:
    lines = [f"{'phase':12}{'tokens':>8}{'PSNR, held out':>16}{'codebook used':>15}"]
    lines += [f"{phase:12}{result['num_tokens']:>8}{result['psnr']:>13.2f} dB{result['codebook_used']:>15.0%}" for phase, result in results.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
