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
         python eval_fid.py --images samples.npz --judge runs/demo/tinycnn.pt --data shapes
             samples of any program, by the classifier of a run on the same images (--val_data
             if that run was given held-out images)
         torchrun --nproc_per_node=8 -- eval_fid.py --run runs/NAME ...
             the same numbers, sooner
Makes    RUN/summary.json, or --json FILE, with every row as soon as it is known; RUN/tinycnn.pt
         with --train_features; --save_stats FILE
Exit     0 done, 1 failure, 2 something to mend, 130 stopped by Ctrl-C

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
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace

import numpy as np

from config import CONFIGS, SAMPLING, SAMPLING_TYPES, add_sampling_flags, sampling_options
from evaluation.judging import (
    Batching, FeatureNet, ImageSource, Reference, comparable, controls, extract, generated,
    inception_net, judge, read_reference, real, reconstruction, tinycnn_nets, why_unlabelled)
from evaluation.measures import SSIM_WINDOW, frechet_distance
from evaluation.report import headline, phases_table, run_summary, table
from evaluation.tinycnn import CUT, images_of_judge, is_to_be_trained, train_judge
from generator import GENERATORS, Generator, need_guidance
from nativetok import NativeTok, from_checkpoint
from plumbing import checkpoint
from plumbing.archives import note
from plumbing.datasets import ImageSet, open_images, tell_seen
from plumbing.flags import DEVICES, Parser, UserError, need, number
from plumbing.outputs import JSON, NPZ, need_places
from plumbing.processes import Processes, need_room, provenance
from plumbing.run import OpenRun, open_run
from plumbing.samples import unfinished_maker

__all__ = ["frechet_distance", "main", "parse"]  # the first for others to call


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace. Raises UserError for combinations that would be ignored."""
    parser = Parser(prog="eval_fid.py", usage="%(prog)s --run RUN [flags]", description=__doc__)
    to = parser.add_argument_group("what is judged")
    to.add_argument("--run", help="folder of a run of train.py: reconstructions and generators")
    to.add_argument("--images", metavar="PATH", help="judge these images instead: a folder, an "
                    "archive, or an .npz as sample.py writes it")
    to.add_argument("--generator", choices=(*GENERATORS, "both"),
                    help="which generators of the run (default: both)")
    to.add_argument("--num_samples", type=number(int, 2), metavar="N",
                    help="images of each kind (default: 2000; papers use 50000)")
    to.add_argument("--controls", action="store_true",
                    help="also judge real images made worse: blurred, with noise, classes missing")
    to = parser.add_argument_group("by what and against what")
    to.add_argument("--features", choices=("tinycnn", "inception"), default="tinycnn",
                    help="whose features (default: tinycnn; inception is FID)")
    to.add_argument("--judge", metavar="FILE", help="with --images and --data: a TinyCNN that "
                    "learned from --data; held-out images are the reference")
    to.add_argument("--val_data", metavar="PATH", help="with --judge: the held-out images "
                    "(default: cut from --data)")
    to.add_argument("--train_features", type=number(int), nargs="?", const=500, default=0,
                    metavar="STEPS", help="train the TinyCNN first, unless it has learned so "
                    "before (default: 500 steps)")
    to.add_argument("--inception", metavar="FILE",
                    help="Inception's weights (default: torch's cache, downloaded once)")
    to.add_argument("--data", metavar="PATH", help="reference images, also what is reconstructed "
                    "(default: the run's held-out images)")
    to.add_argument("--reference", metavar="FILE",
                    help=".npz with mu and sigma, in place of reference images")
    to.add_argument("--num_reference", type=number(int, 2), metavar="N",
                    help="reference images at most (default: 50000)")
    to.add_argument("--save_stats", metavar="FILE",
                    help="write mu and sigma of the reference images, for --reference")
    to.add_argument("--image_size", type=number(int, 1), metavar="N", help="crop and resize to "
                    "this (default: the run's size, else that of the first image)")
    add_sampling_flags(parser)
    to = parser.add_argument_group("which samples, and where")
    to.add_argument("--sweep", nargs="+", default=[], metavar="NAME=A,B,C",
                    help=f"every combination of these, of {' '.join(SAMPLING)}")
    to.add_argument("--seed", type=number(int), metavar="INT",
                    help="seed of the samples (default: 0)")
    to.add_argument("--batch_size", type=number(int, 1), default=250, metavar="INT",
                    help="images at a time; another one gives other samples (default: 250)")
    to.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    to.add_argument("--json", metavar="FILE",
                    help="write all numbers there (default: RUN/summary.json)")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else map(str, argv)
    args.command = "python eval_fid.py " + shlex.join(words)

    need(args.run or args.images or (args.data and args.save_stats), "give --run, or --images with "
         "--reference or --data, or --data with --save_stats")
    need(args.run or args.judge or args.features == "inception", "TinyCNN features need --run, "
         "whose images it learned from; or use --judge, or --features inception")
    need(not args.judge or (args.images and args.data and not args.run),
         "--judge FILE needs --images and --data, without --run")
    need(args.run or args.data or args.reference,
         "--images need something to be compared with: --reference or --data")
    need(not (args.data and args.reference),
         "--data and --reference are two references; give one of them")
    args.sweep = read_sweep(args.sweep)
    refuse_unread(args)
    defaults = dict(generator="both", num_samples=2000, num_reference=50000, seed=0)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def read_sweep(parts: list[str]) -> dict[str, list]:
    """["cfg_scale=1,2", ...] -> {"cfg_scale": [1.0, 2.0], ...}, each value in its flag's range."""
    sweep = {}
    for part in parts:
        name, _, values = part.partition("=")
        need(name in SAMPLING, f"--sweep {part}: cannot sweep {name!r}; choose from "
             f"{', '.join(SAMPLING)}, as in cfg_scale=1,1.5,2")
        need(name not in sweep, f"--sweep names {name} twice; give all its values at once, as in "
             f"{name}=A,B,C")
        try:
            sweep[name] = [SAMPLING_TYPES[name](value) for value in values.split(",")]
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--sweep {part}: {error}") from None
        except ValueError:
            raise UserError(f"--sweep {part}: {values!r} are not numbers with commas between "
                            "them") from None
    return sweep


def refuse_unread(args) -> None:
    """Raise UserError for a flag that this use would not read: its giver expects an effect."""
    def refuse(names: tuple[str, ...], reason: str) -> None:
        for name in names:
            need(not getattr(args, name), f"--{name} {reason}; leave it out")
    if args.images or not args.run:
        refuse(("generator", "controls", "sweep", "seed"), "belongs to a run's samples")
        given = tuple(name for name in SAMPLING if getattr(args, name) is not None)
        refuse(given, "belongs to a run's samples")
    if not (args.images or args.run):
        refuse(("num_samples", "json"), "belongs to what is judged, --run or --images")
    if not args.judge:
        refuse(("val_data",), "belongs to --judge; --data is what is compared with")
    if args.reference:
        refuse(("save_stats", "num_reference"), "belongs to reference images, not to --reference")
    if args.features == "inception":
        refuse(("judge", "train_features"), "belongs to the TinyCNN, not to --features inception")
    else:
        refuse(("inception",), "belongs to --features inception")
    for name in SAMPLING:
        flag = getattr(args, name) is not None
        need(not (flag and name in args.sweep), f"--{name} and --sweep {name}: give one of them")
        if args.generator in GENERATORS and (flag or name in args.sweep):
            need(name in GENERATORS[args.generator].options,
                 f"--generator {args.generator} does not read {name}; leave it out")


# ------------------------------------------------------------------------------------------------
# 1. what is given

@dataclass
class Given:
    """What the command line names, opened."""
    run: OpenRun | None
    tokenizer: NativeTok | None  # of the run
    images: ImageSet | None      # --images
    data: ImageSet | None        # what the TinyCNN learned from, and what was held out of it
    val: ImageSet | None
    compared: ImageSet | None    # --data, or what was held out; None with --reference alone
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
    data, val = (run.data, run.val) if run else (None, None)
    if args.judge:
        data, val = images_of_judge(args.judge, args.data, args.val_data or "")
    if args.reference:
        compared = None
    else:
        compared = val if args.judge or not args.data else open_images(args.data)
    if run:
        size = tokenizer.cfg.image_size
        need(images or args.image_size in (None, size), f"--image_size {args.image_size} does not "
             f"fit this run, whose images have {size} pixels; leave it out")
    else:
        size = min((images or compared).load(0).shape[:2])
    size = args.image_size or size
    if run and args.data:
        tell_seen(run.data, compared, args.data, f"the data of {args.run}")
    return Given(run, tokenizer, images, data, val, compared, size)


def output_places(args) -> str | None:
    """Where the results go, if anywhere. Raises UserError unless that can be written: now."""
    path = args.json
    stats = args.save_stats
    if stats and (args.run or args.images) and not os.path.isdir(os.path.dirname(stats) or "."):
        # A missing folder costs the statistics and not the rows, and may be made meanwhile.
        print(f"warning: --save_stats {stats}: there is no folder {os.path.dirname(stats)}; make "
              "it before the reference is known", file=sys.stderr)
        stats = None
    need_places({"--json": (path, JSON), "--save_stats": (stats, NPZ)},
                reads={"--images": args.images, "--data": args.data, "--judge": args.judge,
                       "--reference": args.reference, "--inception": args.inception})
    if not path and args.run and not args.images:
        path = os.path.join(args.run, "summary.json")
    if args.run and os.path.isdir(args.run) and (args.train_features or not args.json):
        need_room(args.run)
    if args.judge and args.train_features:
        need_room(os.path.dirname(args.judge) or ".")
    return path


# ------------------------------------------------------------------------------------------------
# 2. by what: networks whose features are compared, and the reference

def feature_nets(args, given: Given, procs: Processes) -> tuple[list[FeatureNet], float | None]:
    """-> the networks, and the held-out accuracy of the run's classifier, None without labels."""
    if args.features == "inception":
        return [inception_net(args.inception or "", procs.device)], None
    run, path = given.run, args.judge or os.path.join(args.run, "tinycnn.pt")
    steps = args.train_features
    # All processes ask, so that all leave together if it may not be trained.
    if steps and is_to_be_trained(path, given.data, given.val, steps, replace=run is not None):
        train = run.configs[2] if run else None
        if procs.main:
            train_judge(path, given.data, given.val, run.configs[0].image_size if run else
                        given.size, bool(run and train.flip), steps, procs.device,
                        bool(run and train.skip_bad), (train.holdout, train.seed) if run else CUT)
    procs.barrier()
    need(checkpoint.exists(path), f"{args.run or args.judge} has no classifier yet; add "
         "--train_features (trained once, then kept)")
    nets, accuracy = tinycnn_nets(path, given.data, procs.device, given.val)
    why = why_unlabelled(given.val, args.val_data or (run.configs[-1].val_data if run else ""),
                         given.data.classes)
    if why or accuracy is None:
        note(f"how often the classifier is right on {given.val.name} is left out: "
             f"{why or 'when it learned, other images were held out'}")
    return nets, accuracy if not why else None


def reference_images(args, given: Given, how: Batching) -> ImageSource | None:
    compared = given.compared
    if compared is None:
        return None
    # TRAP: the first n images of a folder are those of its first classes. Sorting what was drawn
    # would read a disk in order, and bring that back for whoever looks at the first of them only.
    chosen = np.random.default_rng(0).permutation(len(compared))[:args.num_reference]
    return real("reference", compared, chosen, given.size, how)


def save_stats(path: str, reference: Reference, net: FeatureNet) -> UserError | None:
    """Write the reference's statistics; -> why that failed, which must not cost the rows."""
    try:
        with checkpoint.replacing(path) as file:
            np.savez(file, mu=reference.mu[net.key], sigma=reference.sigma[net.key],
                     n=reference.n, key=net.key)
    except UserError as error:
        print(f"warning: {error}; the results follow all the same", file=sys.stderr)
        return error
    print(f"{path}: mu and sigma of {reference.name} in {net.title}, n {reference.n}")
    return None


# ------------------------------------------------------------------------------------------------
# 3. what is judged

def image_sources(args, given: Given, originals: ImageSource | None, how: Batching,
                  procs: Processes) -> list[ImageSource]:
    """--images, or what a run has to show: real images, reconstructions, samples."""
    run, images = given.run, given.images
    if images is not None:
        chosen = np.random.default_rng(0).permutation(len(images))[:args.num_samples]
        source = real(images.name, images, chosen, given.size, how,
                      labelled(args, given, images, args.images))
        unfinished = unfinished_maker(args.images)
        if unfinished:
            note(f"{args.images} was drawn from an unfinished network, {unfinished}")
        return [replace(source, unfinished=unfinished)]
    if run is None:
        return []
    chosen = np.random.default_rng(0).permutation(len(run.data))[:args.num_samples]
    sources = [real("real", run.data, chosen, given.size, how)]
    if args.controls:
        sources += controls(run.data, len(chosen), given.size, how)
    if originals is not None:
        path = args.data or run.configs[-1].val_data
        originals = replace(originals, labelled=labelled(args, given, given.compared, path))
        source = reconstruction(given.tokenizer, originals, procs.device)
        sources.append(replace(source, unfinished=given.tokenizer.unfinished))
        if given.size < SSIM_WINDOW:
            note(f"ssim of reconstruction is left out: it takes {SSIM_WINDOW} pixels or more, and "
                 f"these images have {given.size}")
    kinds = generator_kinds(args)
    asked = [name for name in SAMPLING if getattr(args, name) is not None or name in args.sweep]
    for name in asked:
        need(any(name in GENERATORS[kind].options for kind in kinds),
             f"{name} is read by no generator in {args.run}; leave it out")
    for kind in kinds:
        model = Generator.of_run(args.run, kind, given.tokenizer, procs.device)
        options = sampling_options(args, model.options)
        if args.cfg_scale is None:
            options["cfg_scale"] = model.default_cfg_scale
        for swept in combinations(args.sweep, model.options):
            scale = swept.get("cfg_scale", options["cfg_scale"])
            need_guidance(scale, model.cfg.label_dropout)
            source = generated(kind, model, given.tokenizer, args.num_samples, options, swept, how,
                               procs.device)
            parts = filter(None, (given.tokenizer.unfinished, model.unfinished))
            sources.append(replace(source, unfinished="; ".join(parts)))
    return sources


def labelled(args, given: Given, images: ImageSet, path: str) -> bool:
    """Do the labels of these images say what the classifier should? If not, why is told.

    Inception's classes are nobody's, so with it nothing is asked.
    """
    if args.features == "inception":
        return False
    why = why_unlabelled(images, path, given.data.classes)
    if why:
        note(f"class_accuracy of {images.name} is left out: {why}")
    return not why


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

def main(args) -> None:
    began, procs = time.time(), Processes(args.device)

    # 1. What can be known at the start is looked at now, not after hours.
    path = output_places(args)
    reference = read_reference(args.reference) if args.reference else None
    given = open_given(args, procs)
    skip_bad = given.run is not None and given.run.configs[-1].skip_bad
    how = Batching(args.batch_size, args.seed, skip_bad)
    originals = reference_images(args, given, how)
    sources = image_sources(args, given, originals, how, procs)
    for source in [*([originals] if originals else []), *sources]:
        more = "give --data a set of more images, or hold out more" if source is originals else (
            "give more")
        need(source.n >= 2,
             f"{source.name} has a single image, and a covariance takes two; {more}")

    # 2. By what, and against what.
    nets, accuracy = feature_nets(args, given, procs)
    failure = None
    if reference:
        nets = comparable(nets, reference)
    else:
        stats, _ = extract(originals, nets, how, procs)
        reference = Reference.of(given.compared.name, originals.n, nets, stats)
        if args.save_stats and procs.main:
            failure = save_stats(args.save_stats, reference, nets[0])

    # 3. All processes judge every source together; each row is on the disk before the next one.
    made = {**provenance(args.command, procs.device), "seed": args.seed,
            "reference": {"name": reference.name, "n": reference.n},
            "nets": {net.key: net.title for net in nets}}
    rows = []
    for source in sources:
        rows.append(judge(source, nets, reference, how, procs))
        to_come = [other.name for other in sources[len(rows):]]
        results = {**summary_so_far(given, rows, accuracy, began), **made, "rows": rows,
                   **({"to_come": to_come} if to_come else {})}
        if procs.main and path:
            try:
                checkpoint.write_json(path, results)
            except UserError as error:  # such as a disk that is full: the rows can still be told
                failure = error
    procs.end()

    # 4. Only then is anything said.
    if procs.main and rows:
        print("\n" + headline(rows, nets, reference, given.size))
        print("\n" + table(rows, nets))
        if accuracy is not None:
            print(f"\nthe classifier is right on {accuracy:.1%} of {given.val.name}, held out")
        if "seconds" in results:
            seconds = ", ".join(f"{phase} {s:.0f}" for phase, s in results["seconds"].items())
            print("\n" + phases_table(given.run.saved["results"]) + f"\n\nseconds: {seconds}")
        if path and not failure:
            print(f"written: {path}")
    if failure:
        raise failure


def summary_so_far(given: Given, rows: list[dict], accuracy: float | None, began: float) -> dict:
    """Of a run: its summary, with the time this has taken; of other images nothing."""
    if given.run is None or given.images is not None:
        return {}
    summary = run_summary(given.run, rows, accuracy)
    summary["seconds"]["eval"] = round(time.time() - began, 1)
    return summary


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
