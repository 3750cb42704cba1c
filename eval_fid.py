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
Exit     0 done, 1 failure, 2 user error, 130 stopped by Ctrl-C

One row of results for each of these:
  real             as many training images: the floor, what nothing can be expected to beat
  reconstruction   the reference images, encoded and decoded (rFID), also from --prefixes
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
import sys
import time
from dataclasses import dataclass, replace

import numpy as np

from config import CONFIGS, SAMPLING, TrainConfig
from evaluation.judging import (
    Batching, FeatureNet, ImageSource, Reference, comparable, controls, extract, generated,
    inception_net, judge, read_reference, real, reconstruction, tinycnn_nets, why_unlabelled,
    write_reference)
from evaluation.measures import SSIM_WINDOW, frechet_distance
from evaluation.report import headline, phases_table, run_summary, table
from evaluation.tinycnn import images_of_judge, is_to_be_trained, train_judge
from flow_decoder import Decoding
from generator import GENERATORS, Generator
from nativetok import NativeTok, from_checkpoint
from plumbing import checkpoint
from plumbing.archives import note
from plumbing.datasets import ImageSet, open_images, tell_seen
from plumbing.flags import DEVICES, Parser, UserError, need, number
from plumbing.outputs import JSON, NPZ, need_places
from plumbing.processes import Processes, need_room, provenance
from plumbing.run import OpenRun, open_run
from plumbing.samples import (
    add_batch_flags, add_decoder_flags, add_sampling_flags, fill, refuse, sampling_options,
    unfinished_maker)

__all__ = ["frechet_distance", "main", "parse"]  # the first for others to call
# Flags of what a run makes.
SAMPLED = ("generator", "controls", "sweep", "prefixes", "seed", "decoder", "flow_steps", *SAMPLING)


def parse(argv=None) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that would not be read."""
    parser = Parser(prog="python eval_fid.py", usage="%(prog)s --run RUN [flags]",
                    description=__doc__)
    add = parser.add_argument_group("what is judged").add_argument
    add("--run", help="folder of a run of train.py: reconstructions and generators")
    add("--images", metavar="PATH",
        help="judge these images instead: a folder, an archive, or an .npz as sample.py writes it")
    add("--generator", choices=(*GENERATORS, "both"),
        help="which generators of the run (default: both)")
    add("--num_samples", type=number(int, 2), metavar="N",
        help="images of each kind (default: 2000; papers use 50000)")
    add("--controls", action="store_true", default=None,
        help="also judge real images made worse: blurred, with noise, classes missing")
    add = parser.add_argument_group("by what and against what").add_argument
    add("--features", choices=("tinycnn", "inception"), default="tinycnn",
        help="whose features (default: tinycnn; inception is FID)")
    add("--judge", metavar="FILE", help="the classifier (default: RUN/tinycnn.pt); with --images, "
        "one that learned from --data, whose held-out images are the reference")
    add("--val_data", metavar="PATH",
        help="with --judge and --images: the held-out images (default: cut from --data)")
    add("--train_features", type=number(int), nargs="?", const=500, metavar="STEPS",
        help="train the TinyCNN first, unless it has learned so before (default: 500 steps)")
    add("--inception", metavar="FILE",
        help="Inception's weights (default: torch's cache, downloaded once)")
    add("--data", metavar="PATH", help="reference images, also what is reconstructed (default: the "
        "run's held-out images)")
    add("--reference", metavar="FILE", help=".npz with mu and sigma, in place of reference images")
    add("--num_reference", type=number(int, 2), metavar="N",
        help="reference images at most (default: 50000)")
    add("--save_stats", metavar="FILE",
        help="write mu and sigma of the reference images, for --reference")
    add("--image_size", type=number(int, 1), metavar="N", help="crop and resize to this (default: "
        "the run's size, else that of the first image)")
    add_sampling_flags(parser, SAMPLING)
    add_decoder_flags(parser)
    to = parser.add_argument_group("which samples, and where")
    to.add_argument("--prefixes", type=number(int, 1), nargs="+", metavar="INT",
                    help="also reconstructions from the first so many tokens")
    to.add_argument("--sweep", type=values_to_try, nargs="+", metavar="NAME=A,B,C",
                    help=f"every combination of these, of {' '.join(SAMPLING)}")
    add_batch_flags(to, 250)
    to.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    to.add_argument("--json", metavar="FILE",
                    help="write all numbers there (default: RUN/summary.json)")
    args = parser.parse_args(argv)

    # Enough to judge something by something, and not two of a kind.
    need(args.run or args.images or (args.data and args.save_stats), "give --run, or --images with "
         "--reference or --data, or --data with --save_stats")
    need(args.run or args.judge or args.features == "inception", "TinyCNN features need --run, "
         "whose images it learned from; or use --judge, or --features inception")
    need(not args.judge or args.run or (args.images and args.data),
         "--judge FILE needs --run, or --images and --data")
    need(args.run or args.data or args.reference,
         "--images need something to be compared with: --reference or --data")
    need(not (args.data and args.reference),
         "--data and --reference are two references; give one of them")

    # Nothing that this use would not read: what a flag belongs to, is that asked for, the flags.
    inception = args.features == "inception"
    for owner, asked, flags in (
            ("what a run makes", args.run and not args.images, SAMPLED),
            ("what is judged, --run or --images", args.run or args.images, ("num_samples", "json")),
            ("--judge without --run; --data is what is compared with",
             args.judge and not args.run, ("val_data",)),
            ("reference images, not to --reference", not args.reference,
             ("save_stats", "num_reference")),
            ("the TinyCNN, not to --features inception", not inception,
             ("judge", "train_features")),
            ("--features inception", inception, ("inception",))):
        if not asked:
            refuse(args, flags, f"belongs to {owner}")

    fill(args, generator="both", num_samples=2000, num_reference=50000, seed=0, batch_size=250,
         sweep=[], prefixes=[], train_features=0)
    given = [name for name in SAMPLING if getattr(args, name) is not None]
    given += [name for name, _ in args.sweep]
    args.sweep, args.kinds = dict(args.sweep), generator_kinds(args)
    for name in given:
        need(given.count(name) == 1, f"{name} is given twice; give all its values at once, as in "
             f"--sweep {name}=A,B,C")
        need(any(name in GENERATORS[kind].options for kind in args.kinds),
             f"no generator that is judged reads {name}; leave it out")
    return args


def values_to_try(text: str) -> tuple[str, list]:
    """For argparse: "cfg_scale=1,2" -> ("cfg_scale", [1.0, 2.0]), each in its flag's range."""
    name, _, values = text.partition("=")
    need(name in SAMPLING, f"cannot sweep {name!r}; choose from {', '.join(SAMPLING)}, as in "
         "cfg_scale=1,1.5,2")
    return name, [SAMPLING[name].read(value) for value in values.split(",")]


def generator_kinds(args) -> tuple[str, ...]:
    """The one that is asked for, or all that the run has."""
    if args.images or not args.run:
        return ()
    if args.generator != "both":
        return (args.generator,)
    return tuple(kind for kind in GENERATORS
                 if checkpoint.exists(os.path.join(args.run, f"generator-{kind}.pt")))


def output_places(args) -> str | None:
    """Where the results go, if anywhere. Raises UserError unless that can be written: now."""
    stats = args.save_stats
    if stats and (args.run or args.images) and not os.path.isdir(os.path.dirname(stats) or "."):
        # A missing folder costs the statistics and not the rows, and may be made meanwhile.
        print(f"warning: --save_stats {stats}: there is no folder {os.path.dirname(stats)}; make "
              "it before the rows are known", file=sys.stderr)
        stats = None
    need_places({"--json": (args.json, JSON), "--save_stats": (stats, NPZ)},
                reads={"--images": args.images, "--data": args.data, "--judge": args.judge,
                       "--reference": args.reference, "--inception": args.inception})
    summary = args.run and not args.images and not args.json
    folder = args.run or os.path.dirname(args.judge or "") or "."
    if os.path.isdir(folder) and (args.train_features or summary):
        need_room(folder)
    return os.path.join(folder, "summary.json") if summary else args.json


# ------------------------------------------------------------------------------------------------
# 1. what is given

@dataclass
class Given:
    """What the command line names, opened."""
    run: OpenRun | None
    tokenizer: NativeTok | None  # of the run
    decode: Decoding | None      # its tokens
    train: TrainConfig           # of the run; without one, as a judge's images are read
    images: ImageSet | None      # --images
    data: ImageSet | None        # what the TinyCNN learned from, and what was held out of it
    val: ImageSet | None
    compared: ImageSet | None    # --data, or what was held out; None with --reference alone
    size: int                    # pixels of a side to which all of them are cropped and resized


def open_given(args, procs: Processes) -> Given:
    run = tokenizer = decode = data = val = compared = None
    train = TrainConfig(flip=False)
    if args.run:
        run = open_run(args.run, CONFIGS)
        tokenizer = from_checkpoint(run.saved, os.path.join(args.run, "tokenizer.pt"))
        tokenizer = tokenizer.to(procs.device)
        need("base" in run.saved.get("results", {}),
             f"{args.run} has no finished phase yet; let train.py go on")
        train, data, val = run.configs[-1], run.data, run.val
        decode = Decoding.of_run(args.run, tokenizer, args.decoder, args.flow_steps)
        L = tokenizer.num_tokens
        need(all(k < L for k in args.prefixes), f"--prefixes {' '.join(map(str, args.prefixes))} "
             f"must be below {L}, the number of this tokenizer's tokens")
    elif args.judge:
        data, val = images_of_judge(args.judge, args.data, args.val_data or "")
    images = open_images(args.images) if args.images else None
    if not args.reference:
        compared = open_images(args.data) if args.data and (run or not args.judge) else val
    if run and args.data:
        tell_seen(run.data, compared, args.data, f"the data of {args.run}")
    size = tokenizer.cfg.image_size if run else min((images or compared).load(0).shape[:2])
    need(images or not run or args.image_size in (None, size), f"--image_size {args.image_size} "
         f"does not fit this run, whose images have {size} pixels; leave it out")
    size = args.image_size or size
    return Given(run, tokenizer, decode, train, images, data, val, compared, size)


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


# ------------------------------------------------------------------------------------------------
# 2. by what: networks whose features are compared

def feature_nets(args, given: Given, procs: Processes) -> tuple[list[FeatureNet], float | None]:
    """-> the networks, and the held-out accuracy of the run's classifier, None without labels."""
    if args.features == "inception":
        return [inception_net(args.inception or "", procs.device)], None
    path = args.judge or os.path.join(args.run, "tinycnn.pt")
    train, steps = given.train, args.train_features
    # All processes ask, so that all leave together if it may not be trained.
    missing = steps and is_to_be_trained(path, given.data, given.val, steps,
                                         replace=bool(args.run and not args.judge))
    if missing and procs.main:
        size = given.tokenizer.cfg.image_size if args.run else given.size
        train_judge(path, given.data, given.val, size, train.flip, steps, procs.device,
                    train.skip_bad, (train.holdout, train.seed))
    procs.barrier()
    need(checkpoint.exists(path), f"{path}: there is no classifier yet; add --train_features "
         "(trained once, then kept)")
    nets, accuracy = tinycnn_nets(path, given.data, procs.device, given.val)
    why = why_unlabelled(given.val, args.val_data or train.val_data, given.data.classes)
    if why or accuracy is None:
        note(f"how often the classifier is right on {given.val.name} is left out: "
             f"{why or 'when it learned, other images were held out'}")
    return nets, accuracy if not why else None


# ------------------------------------------------------------------------------------------------
# 3. what is judged, and the images that it is compared with

def some(images: ImageSet, n: int) -> np.ndarray:
    """The numbers of n images at most, in mixed order."""
    # TRAP: the first n images of a folder are those of its first classes. Sorting what was drawn
    # would read a disk in order, and bring that back for whoever looks at the first of them only.
    return np.random.default_rng(0).permutation(len(images))[:n]


def reference_images(args, given: Given, how: Batching) -> ImageSource | None:
    if given.compared is None:
        return None
    chosen = some(given.compared, args.num_reference)
    return real("reference", given.compared, chosen, given.size, how)


def image_sources(args, given: Given, originals: ImageSource | None, how: Batching,
                  procs: Processes) -> list[ImageSource]:
    """--images, or what a run has to show: real images, reconstructions, samples."""
    run, images = given.run, given.images
    if images is not None:
        source = real(images.name, images, some(images, args.num_samples), given.size, how,
                      labelled(args, given, images, args.images))
        unfinished = unfinished_maker(args.images)
        if unfinished:
            note(f"{args.images} was drawn from an unfinished network, {unfinished}")
        return [replace(source, unfinished=unfinished)]
    if run is None:
        return []
    chosen = some(run.data, args.num_samples)
    sources = [real("real", run.data, chosen, given.size, how)]
    if args.controls:
        sources += controls(run.data, len(chosen), given.size, how)
    if originals is not None:
        path = args.data or given.train.val_data
        originals = replace(originals, labelled=labelled(args, given, given.compared, path))
        for k in (*args.prefixes, given.tokenizer.num_tokens):
            sources.append(reconstruction(given.decode, originals, how, procs.device, k))
        if given.size < SSIM_WINDOW:
            note(f"ssim of reconstruction is left out: it takes {SSIM_WINDOW} pixels or more, and "
                 f"these images have {given.size}")
    for kind in args.kinds:
        sources += samples(args, kind, given, how, procs)
    return sources


def samples(args, kind: str, given: Given, how: Batching, procs: Processes) -> list[ImageSource]:
    """Of one generator, once for each combination of the swept values that it reads."""
    model = Generator.of_run(args.run, kind, given.tokenizer, procs.device)
    options = sampling_options(args, {name: SAMPLING[name] for name in model.options}, model)
    names = [name for name in args.sweep if name in model.options]
    sources = []
    for values in itertools.product(*(args.sweep[name] for name in names)):
        tried = dict(zip(names, values))
        sources.append(generated(kind, model, given.decode, args.num_samples, options, tried, how,
                                 procs.device))
    return sources


# ------------------------------------------------------------------------------------------------

def main(args) -> None:
    began, procs = time.time(), Processes(args.device)

    # 1. What can be known at the start is looked at now, not after hours.
    path = output_places(args)
    reference = read_reference(args.reference) if args.reference else None
    given = open_given(args, procs)
    how = Batching(args.batch_size, args.seed, given.train.skip_bad)
    originals = reference_images(args, given, how)
    sources = image_sources(args, given, originals, how, procs)
    for source in [*([originals] if originals else []), *sources]:
        need(source.n >= 2, f"{source.name} has a single image, and a covariance takes two; give "
             "more with --images or --data, or hold out more")

    # 2. By what, and against what.
    nets, accuracy = feature_nets(args, given, procs)
    if reference:
        nets = comparable(nets, reference)
    else:
        stats, _ = extract(originals, nets, how, procs)
        reference = Reference.of(given.compared.name, originals.n, nets, stats)

    # 3. All processes judge every source together; each row is on the disk before the next one.
    made = {**provenance(args.command, procs.device), "seed": args.seed,
            "reference": {"name": reference.name, "n": reference.n},
            "nets": {net.key: net.title for net in nets}}
    rows, summary, failure = [], {}, None
    for source in sources:
        rows.append(judge(source, nets, reference, how, procs))
        to_come = [other.name for other in sources[len(rows):]]
        if given.run and not given.images:
            summary = run_summary(given.run, rows, accuracy, time.time() - began)
        if procs.main and path:
            try:
                checkpoint.write_json(path, {**summary, **made, "rows": rows,
                                             **({"to_come": to_come} if to_come else {})})
            except UserError as error:  # such as a disk that is full: the rows can still be told
                failure = error
    procs.end()

    # 4. Only then is anything said.
    if procs.main and rows:
        print("\n" + headline(rows, nets, reference, given.size))
        print("\n" + table(rows, nets))
        if accuracy is not None:
            print(f"\nthe classifier is right on {accuracy:.1%} of {given.val.name}, held out")
        if summary:
            seconds = ", ".join(f"{phase} {s:.0f}" for phase, s in summary["seconds"].items())
            print("\n" + phases_table(given.run.saved["results"]) + f"\n\nseconds: {seconds}")
        if path and not failure:
            print(f"written: {path}")
    if procs.main and args.save_stats:
        write_reference(args.save_stats, reference, nets[0])
    if failure:
        raise failure


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
