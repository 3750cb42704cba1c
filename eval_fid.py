"""How good are the reconstructions and the samples of a run, or any two sets of images?

Run      python eval_fid.py --run runs/NAME --train_features
             in features of a small classifier of the run's own images (not FID)
         python eval_fid.py --run runs/NAME --features inception --data imagenet/val \\
                            --num_samples 50000
             rFID, gFID, Inception Score
         python eval_fid.py --run runs/NAME --generator maskgit \\
                            --sweep cfg_scale=1,1.5,2,3 temperature=0.8,1.0
         python eval_fid.py --images samples.npz --features inception \\
                            --reference VIRTUAL_imagenet256_labeled.npz
         torchrun --nproc_per_node=8 -- eval_fid.py --run runs/NAME ...
             the same numbers, sooner
Makes    RUN/summary.json, or --json FILE; RUN/tinycnn.pt with --train_features; --save_stats FILE
Exit     0 done, 1 failure, 2 something to mend

One row of results for each of these:
  real             as many training images: the floor, what nothing can be expected to beat
  reconstruction   the reference images, encoded and decoded (rFID)
  ar, maskgit      samples, every class equally often (gFID)
  --images         a folder, an archive or an .npz in their place
  --controls       real images made worse on purpose: does the measure notice?
Each is compared with the run's held-out images, with --data, or with --reference: an .npz with mu
and sigma (ADM's files: what they say of the whole data set is used, never their arr_0, which is a
part of it). Small n makes every distance too large.
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import itertools
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass

import numpy as np

from config import CONFIGS, add_sampling_flags, sampling_options
from evaluation.judging import (
    Batching,
    FeatureNet,
    ImageSource,
    Reference,
    controls,
    extract,
    generated,
    inception_net,
    judge,
    read_reference,
    real,
    reconstruction,
    tinycnn_nets,
)
from evaluation.measures import frechet_distance
from evaluation.tinycnn import train_judge
from generator import GENERATORS, Generator
from nativetok import NativeTok, from_checkpoint
from plumbing import checkpoint
from plumbing.datasets import ImageSet, open_images
from plumbing.flags import Parser, UserError, need, number
from plumbing.processes import Processes, provenance
from plumbing.run import OpenRun, open_run

__all__ = ["frechet_distance", "main", "parse"]  # the first for others to call

# what --sweep takes
GRID = {"cfg_scale": float, "temperature": float, "top_k": int, "top_p": float, "steps": int,
        "randomize_temperature": float}


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace. Raises UserError for combinations that would be ignored."""
    parser = Parser(prog="eval_fid.py", usage="%(prog)s --run RUN [flags]", description=__doc__)
    to = parser.add_argument_group("what is judged")
    to.add_argument("--run", help="folder of a run of train.py: reconstructions and generators")
    to.add_argument("--images", metavar="PATH", help="judge these images instead: a folder, an "
                    "archive, or an .npz as sample.py writes it")
    to.add_argument("--generator", choices=("ar", "maskgit", "both"), default="both",
                    help="which generators of the run (default: both)")
    to.add_argument("--num_samples", type=number(int, 2), default=2000, metavar="N",
                    help="images of each kind (default: 2000; papers use 50000)")
    to.add_argument("--controls", action="store_true",
                    help="also judge real images made worse: blurred, with noise, classes missing")
    to = parser.add_argument_group("by what and against what")
    to.add_argument("--features", choices=("tinycnn", "inception"), default="tinycnn",
                    help="whose features (default: tinycnn; inception is FID)")
    to.add_argument("--train_features", type=number(int), nargs="?", const=500, default=0,
                    metavar="STEPS", help="train the run's TinyCNN first (default: 500 steps)")
    to.add_argument("--inception", default="", metavar="FILE",
                    help="Inception's weights (default: torch's cache, downloaded once)")
    to.add_argument("--data", metavar="PATH", help="reference images, also what is reconstructed "
                    "(default: the run's held-out images)")
    to.add_argument("--reference", metavar="FILE",
                    help=".npz with mu and sigma, in place of reference images")
    to.add_argument("--num_reference", type=number(int, 2), default=50000, metavar="N",
                    help="reference images at most (default: 50000)")
    to.add_argument("--save_stats", metavar="FILE",
                    help="write mu and sigma of the reference images, for --reference")
    to.add_argument("--image_size", type=number(int, 1), metavar="N", help="crop and resize to "
                    "this (default: the run's size, else that of the first image)")
    add_sampling_flags(parser)
    to = parser.add_argument_group("which samples, and where")
    to.add_argument("--sweep", nargs="+", default=[], metavar="NAME=A,B,C",
                    help=f"every combination of these, of {' '.join(GRID)}")
    to.add_argument("--seed", type=number(int), default=0, help="seed of the samples (default: 0)")
    to.add_argument("--batch_size", type=number(int, 1), default=250,
                    help="images at a time; another one gives other samples (default: 250)")
    to.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                    help="where to compute")
    to.add_argument("--json", metavar="FILE",
                    help="write all numbers there (default: RUN/summary.json)")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else map(str, argv)
    args.command = "python eval_fid.py " + shlex.join(words)
    need(args.run or args.images or (args.data and args.save_stats), "give --run, or --images with "
         "--reference or --data, or --data with --save_stats")
    need(args.run or args.features == "inception", "TinyCNN features need --run, whose images it "
         "learned from; or use --features inception")
    need(args.run or args.data or args.reference,
         "--images need something to be compared with: --reference or --data")
    need(not (args.data and args.reference),
         "--data and --reference are two references; give one of them")
    need(not (args.save_stats and args.reference),
         "--save_stats writes the statistics of images; leave --reference out")
    need(not (args.train_features and args.features == "inception"),
         "--train_features trains the TinyCNN, which --features inception does not use")
    need(not args.images or not (args.sweep or args.controls),
         "--sweep and --controls belong to a run's samples; leave --images out")
    args.sweep = read_sweep(args.sweep)
    return args


def read_sweep(parts: list[str]) -> dict[str, list]:
    """["cfg_scale=1,2", ...] -> {"cfg_scale": [1.0, 2.0], ...}."""
    sweep = {}
    for part in parts:
        name, _, values = part.partition("=")
        need(name in GRID, f"--sweep {part}: cannot sweep {name!r}; choose from {', '.join(GRID)}, "
             "as in cfg_scale=1,1.5,2")
        try:
            sweep[name] = [GRID[name](value) for value in values.split(",")]
        except ValueError:
            raise UserError(f"--sweep {part}: {values!r} are not numbers with commas between "
                            "them") from None
    return sweep


# ------------------------------------------------------------------------------------------------
# 1. what is given

@dataclass
class Given:
    """What the command line names, opened."""
    run: OpenRun | None
    tokenizer: NativeTok | None  # of the run
    images: ImageSet | None      # --images
    compared: ImageSet | None    # --data, or the run's held-out images; None with --reference alone
    size: int                    # pixels of a side to which all of them are cropped and resized


def open_given(args, procs: Processes) -> Given:
    run = tokenizer = None
    if args.run:
        run = open_run(args.run, CONFIGS)
        tokenizer = from_checkpoint(run.saved, os.path.join(args.run, "tokenizer.pt"))
        tokenizer = tokenizer.to(procs.device)
        need("base" in run.saved.get("results", {}),
             f"{args.run} has no finished phase yet; let train.py go on")
    images = open_images(args.images) if args.images else None
    compared = run.val if run else None
    if args.data:
        compared = open_images(args.data)
    if args.image_size:
        size = args.image_size
    elif run:
        size = tokenizer.cfg.image_size
    else:
        size = min((images or compared).load(0).shape[:2])
    return Given(run, tokenizer, images, compared, size)


# ------------------------------------------------------------------------------------------------
# 2. by what: networks whose features are compared, and the reference

def feature_nets(args, given: Given, procs: Processes) -> tuple[list[FeatureNet], float | None]:
    """-> the networks, and the held-out accuracy of the run's classifier."""
    if args.features == "inception":
        return [inception_net(args.inception, procs.device)], None
    run, path = given.run, os.path.join(args.run, "tinycnn.pt")
    if args.train_features and procs.main:
        _, _, train = run.configs
        train_judge(path, run.data, run.val, given.tokenizer.cfg.image_size, train.flip,
                    args.train_features, procs.device)
    procs.barrier()
    need(checkpoint.exists(path), f"{args.run} has no classifier yet; add --train_features "
         "(trained once, then kept)")
    return tinycnn_nets(path, run.data, procs.device)


def reference_images(args, given: Given, how: Batching) -> ImageSource | None:
    if args.reference:
        return None
    # TRAP: the first n images of a folder are those of its first classes.
    chosen = np.random.default_rng(0).permutation(len(given.compared))[:args.num_reference]
    return real("reference", given.compared, np.sort(chosen), given.size, how)


# ------------------------------------------------------------------------------------------------
# 3. what is judged

def image_sources(args, given: Given, originals: ImageSource | None, how: Batching,
                  procs: Processes) -> list[ImageSource]:
    """--images, or what a run has to show: real images, reconstructions, samples."""
    run, images = given.run, given.images
    if images is not None:
        chosen = np.random.default_rng(0).permutation(len(images))[:args.num_samples]
        labelled = run is not None and images.classes == run.data.classes
        return [real(images.name, images, chosen, given.size, how, labelled)]
    if run is None:
        return []
    chosen = np.random.default_rng(0).permutation(len(run.data))[:args.num_samples]
    sources = [real("real", run.data, chosen, given.size, how)]
    if args.controls:
        sources += controls(run.data, len(chosen), given.size, how)
    if originals is not None:
        sources.append(reconstruction(given.tokenizer, originals, procs.device))
    for kind in generator_kinds(args):
        model = Generator.of_run(args.run, kind, given.tokenizer, procs.device)
        options = sampling_options(args, model.options)
        for swept in combinations(args.sweep, model.options):
            sources.append(generated(kind, model, given.tokenizer, args.num_samples, options,
                                     swept, how, procs.device))
    return sources


def generator_kinds(args) -> list[str]:
    """The one that is asked for, or all that the run has."""
    if args.generator != "both":
        return [args.generator]
    return [kind for kind in GENERATORS
            if checkpoint.exists(os.path.join(args.run, f"generator-{kind}.pt"))]


def combinations(sweep: dict[str, list], options: tuple[str, ...]) -> list[dict]:
    """Every combination of the swept values that a generator with these options reads."""
    names = [name for name in sweep if name in options]
    return [dict(zip(names, values))
            for values in itertools.product(*(sweep[name] for name in names))]


# ------------------------------------------------------------------------------------------------
# 4. report

COLUMNS = ("psnr", "ssim", "inception_score", "precision", "recall", "class_accuracy")


def table(rows: list[dict], nets: list[FeatureNet]) -> str:
    """The results as text, one row per set of images."""
    columns = [net.key for net in nets] + [c for c in COLUMNS if any(c in row for row in rows)]
    names = [row["name"] + "".join(f" {k}={v:g}" for k, v in row.get("swept", {}).items())
             for row in rows]
    first = max(map(len, names), default=0) + 2
    lines = [f"{'':{first}}{'n':>7}" + "".join(f"{c:>{len(c) + 3}}" for c in columns)]
    for name, row in zip(names, rows):
        cells = [format(row[c], ".4g") if c in row else "-" for c in columns]
        lines.append(f"{name:{first}}{row['n']:>7}" +
                     "".join(f"{cell:>{len(c) + 3}}" for c, cell in zip(columns, cells)))
    return "\n".join(lines)


def run_summary(run: OpenRun, rows: list[dict], accuracy: float | None) -> dict:
    """What a run has come to: quality and codebook use by length, class accuracy, seconds."""
    summary = {"psnr_by_tokens": {}, "codebook_used": {}, "class_accuracy": {}, "seconds": {}}
    # In order of training: the fine-tune overwrites its length's growth step.
    for result in run.saved["results"].values():
        summary["psnr_by_tokens"][str(result["num_tokens"])] = result["psnr"]
        summary["codebook_used"][str(result["num_tokens"])] = result["codebook_used"]
    for row in rows:
        if row["name"] in GENERATORS and "class_accuracy" in row and "swept" not in row:
            summary["class_accuracy"][row["name"]] = row["class_accuracy"]
    if accuracy is not None:
        summary["class_accuracy"]["classifier_on_real"] = round(accuracy, 4)
    with open(os.path.join(run.folder, "log.jsonl"), encoding="utf-8") as log:
        for row in map(json.loads, log):
            if "seconds" in row:
                summary["seconds"][row["phase"]] = row["seconds"]
    return summary


def phases_table(results: dict) -> str:
    lines = [f"{'phase':12}{'tokens':>8}{'PSNR, held out':>16}{'codebook used':>15}"]
    lines += [f"{phase:12}{result['num_tokens']:>8}{result['psnr']:>13.2f} dB"
              f"{result['codebook_used']:>15.0%}" for phase, result in results.items()]
    return "\n".join(lines)


def warn_of_few(rows: list[dict], reference: Reference, net: FeatureNet) -> None:
    few = [f"{row['name']} ({row['n']})" for row in rows if row["n"] <= net.features]
    if reference.n is not None and reference.n <= net.features:
        few.append("the reference")
    if few:
        print(f"warning: not more images than the {net.features} features: {', '.join(few)}; "
              "such a distance is far too large")


def report(given: Given, nets: list[FeatureNet], reference: Reference, rows: list[dict],
           accuracy: float | None, results: dict) -> None:
    count = "n unknown" if reference.n is None else f"n {reference.n}"
    print(f"\nagainst {reference.name}, {count}, at {given.size} pixels")
    for net in nets:
        print(f"{net.key}: {net.title}")
        warn_of_few(rows, reference, net)
    print("\n" + table(rows, nets))
    if accuracy is not None:
        print(f"\nthe classifier is right on {accuracy:.1%} of {given.run.val.name}, held out")
    if "seconds" in results:
        seconds = ", ".join(f"{phase} {s:.0f}" for phase, s in results["seconds"].items())
        print("\n" + phases_table(given.run.saved["results"]) + f"\n\nseconds: {seconds}")


def main(args) -> None:
    began, procs = time.time(), Processes(args.device)
    how = Batching(args.batch_size, args.seed)

    # What is given, by what it is judged, and against what.
    given = open_given(args, procs)
    nets, accuracy = feature_nets(args, given, procs)
    originals = reference_images(args, given, how)
    if originals is None:
        reference, nets = read_reference(args.reference, nets)
    else:
        stats, _ = extract(originals, nets, how, procs)
        reference = Reference.of(given.compared.name, originals.n, nets, stats)

    # Every source of images is judged by itself, by all processes together.
    sources = image_sources(args, given, originals, how, procs)
    rows = [judge(source, nets, reference, how, procs) for source in sources]
    if not procs.main:
        return procs.end()

    if args.save_stats:
        net = nets[0]
        with checkpoint.replacing(args.save_stats) as file:
            np.savez(file, mu=reference.mu[net.key], sigma=reference.sigma[net.key],
                     n=reference.n, key=net.key)
        print(f"{args.save_stats}: mu and sigma of {reference.name} in {net.title}, "
              f"n {reference.n}")
    results = {**provenance(args.command, procs.device), "seed": args.seed,
               "reference": {"name": reference.name, "n": reference.n},
               "eyes": {net.key: net.title for net in nets}, "rows": rows}
    of_run = given.run is not None and given.images is None
    if of_run:
        results = {**run_summary(given.run, rows, accuracy), **results}
        results["seconds"]["eval"] = round(time.time() - began, 1)
    report(given, nets, reference, rows, accuracy, results)
    path = args.json or (os.path.join(args.run, "summary.json") if of_run else None)
    if path:
        checkpoint.write_json(path, results)
        print(f"written: {path}")
    procs.end()


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
