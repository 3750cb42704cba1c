"""What programs that draw samples do alike, from the command line to the file.

    --classes ─► labels, in turn or in rows ─► batch b is drawn from (seed, b) ─► an .npz or a grid

In       the words of a command line; a function that draws one batch
Out      uint8 images; a picture, or an .npz as ADM's evaluator and eval_fid.py read it
Differs  a flag that nothing would read is refused: who gave it expects an effect
"""
import argparse
import difflib
import os
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from plumbing import checkpoint
from plumbing.archives import kind_of
from plumbing.flags import DEVICES, Parser, UserError, need, number
from plumbing.images import read_image, resize_crop
from plumbing.outputs import PNG, need_places
from plumbing.processes import enough_memory

# ------------------------------------------------------------------------------------------------
# the command line; a flag is None until it is known that it is read at all

def refuse(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise UserError for those of the flags that were given."""
    for name in names:
        need(getattr(args, name) is None, f"--{name} {reason}; leave it out")


def fill(args: argparse.Namespace, **defaults) -> None:
    """The defaults of flags that were not given."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def add_batch_flags(to, batch_size: int) -> None:
    to.add_argument("--seed", type=number(int), metavar="INT",
                    help="another one gives other samples (default: 0)")
    to.add_argument("--batch_size", type=number(int, 1), metavar="INT", help="images at a time; "
                    f"another one gives other samples (default: {batch_size})")


def add_sampling_flags(parser: Parser, options: dict) -> None:
    """options: config.SAMPLING, or others of its kind."""
    to = parser.add_argument_group("how samples are drawn")
    for name, option in options.items():
        to.add_argument(f"--{name}", type=option.read, metavar=option.read.__name__.upper(),
                        help=option.help)


def add_decoder_flags(parser: Parser) -> None:
    """For flow_decoder.Decoding.of_run()."""
    to = parser.add_argument_group("how tokens become images")
    to.add_argument("--decoder", choices=("mean", "flow"), help="mean: the tokenizer's own; flow: "
                    "drawn, sharp (default: flow where the run has a finished one)")
    to.add_argument("--flow_steps", type=number(int, 1, 1000), metavar="INT",
                    help="flow: steps from noise to an image (default: 12)")


def sampling_options(args: argparse.Namespace, options: dict, model) -> dict:
    """-> what to give to model.sample(): of each option the flag, else the default."""
    found = {}
    for name, option in options.items():
        found[name] = getattr(args, name)
        if found[name] is None:
            found[name] = option.default
        if found[name] is None:
            found[name] = getattr(model, f"default_{name}")
    return found


def sample_parser(prog: str, doc: str) -> tuple[Parser, argparse._ArgumentGroup]:
    """-> a parser with the flags of every program that draws samples, and their group."""
    parser = Parser(prog=prog, usage="%(prog)s --run RUN [flags]", description=doc)
    add = parser.add_argument
    add("--run", required=True, help="folder of the run")
    add("--device", choices=DEVICES, default="auto",
        help="where to compute; auto: a GPU if there is one (default: auto)")
    add("--out", metavar="DIR", help="folder for PNGs (default: RUN/samples)")
    add("--reconstruct", nargs="+", metavar="FILE",
        help="instead of samples: encode and decode these images")
    to = parser.add_argument_group("samples")
    to.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers; what is both "
                    "is taken as a name (default: all, in a picture the first 10)")
    add_batch_flags(to, 64)
    to.add_argument("--per_class", type=number(int, 1), metavar="INT",
                    help="in a picture: samples of each class (default: 8)")
    to.add_argument("--npz", metavar="FILE", help="instead of a picture write arr_0, uint8 (n, H, "
                    "W, 3), as ADM's evaluator reads it, labels arr_1, and the names classes")
    to.add_argument("--num_samples", type=number(int, 1), metavar="INT",
                    help="in an .npz: how many; the classes take turns (default: 50000)")
    return parser, to


def parse_samples(parser: Parser, argv: list[str] | None, samples: tuple[str, ...] = (),
                  pictures: tuple[str, ...] = (), npz: tuple[str, ...] = ()) -> argparse.Namespace:
    """The command line of a sample_parser().

    samples, pictures, npz   further flags, by what reads them: all samples, or one of both forms
    Raises UserError for a flag that this use would not read, and for a run that is not there.
    """
    args = parser.parse_args(argv)
    need(args.npz is None or args.reconstruct is None,
         "--npz and --reconstruct are two uses; give one of them")
    pictures, npz = ("per_class", *pictures), ("num_samples", *npz)
    if args.reconstruct:
        refuse(args, ("classes", "seed", "batch_size", *samples, *pictures, *npz), "is for samples")
    elif args.npz:
        refuse(args, ("out", *pictures), "is for pictures")
    else:
        refuse(args, npz, "is for --npz")
    need(os.path.isdir(args.run), f"{args.run} is not there; give --run the folder of a run")
    fill(args, out=os.path.join(args.run, "samples"), seed=0, batch_size=64, per_class=8,
         num_samples=50000)
    return args


# ------------------------------------------------------------------------------------------------
# classes

def class_number(text: str, names: list[str]) -> int:
    """A name or a number as text -> the class's number. What is both is taken as a name.

    Raises UserError that says which names are close.
    """
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    close = [name for name in names if text.lower() in name.lower()]
    close = close or difflib.get_close_matches(text, names)
    if close:
        hint = f"did you mean {' or '.join(map(repr, close[:3]))}?"
    else:
        few = ", ".join(f"{k} {name}" for k, name in enumerate(names[:5]))
        hint = f"the run has {len(names)} classes: {few}" + (", ..." if len(names) > 5 else "")
    raise UserError(f"class {text!r} is unknown; {hint}")


def asked_labels(args: argparse.Namespace, names: list[str]) -> Tensor:
    """The class (n,) of each sample that the command line asks for."""
    if args.classes:
        classes = torch.tensor([class_number(c, names) for c in args.classes])
    else:
        classes = torch.arange(len(names) if args.npz else min(10, len(names)))
    if args.npz:  # in turn, so that the classes' counts differ by one at most
        return classes[torch.arange(args.num_samples) % len(classes)]
    return classes.repeat_interleave(args.per_class)                          # a row each


def named_rows(args: argparse.Namespace, labels: Tensor, names: list[str]) -> str:
    """The classes of a picture's rows, and that there are others, if nobody chose them."""
    rows = [names[c] for c in labels[::args.per_class]]
    more = ""
    if not args.classes and len(names) > len(rows):
        more = f" (the first {len(rows)} of {len(names)}; --classes chooses others)"
    return ", ".join(rows) + more


# ------------------------------------------------------------------------------------------------
# drawing

def draw_samples(draw: Callable[[Tensor, int], tuple[Tensor, ...]], labels: Tensor,
                 batch_size: int) -> tuple[list[Tensor], float]:
    """draw(labels (B,), b) -> images of batch b, or more, each (B, ...) on the CPU.

    -> the same of all labels (n,), and images per second. Raises UserError for lack of memory.
    """
    began, drawn = time.perf_counter(), []
    # delay: an option out of range shows in the first batch, and then its one line stands alone.
    bar = tqdm(total=len(labels), desc="sampling", unit=" images", delay=1, mininterval=1)
    with bar, enough_memory("lower --batch_size, or ask for fewer samples"):
        for b, part in enumerate(labels.split(batch_size)):                   # (B,)
            batch = draw(part, b)
            # Filled in place: a list of batches, joined in the end, would be in memory twice.
            drawn = drawn or [one.new_empty(len(labels), *one.shape[1:]) for one in batch]
            for whole, one in zip(drawn, batch):
                whole[b * batch_size:b * batch_size + len(part)] = one
            bar.update(len(part))
    return drawn, len(labels) / (time.perf_counter() - began)


def how_drawn(args: argparse.Namespace, options: dict) -> str:
    """What the samples depend on, beside the run."""
    words = "".join(f"{name} {value if isinstance(value, str) else f'{value:g}'}, "
                    for name, value in options.items())
    return f"{words}seed {args.seed}, batch_size {args.batch_size}"


def write_npz(path: str, images: Tensor, labels: Tensor, names: list[str],
              unfinished: str = "") -> str:
    """Write uint8 (n, H, W, 3) and labels (n,) under ADM's names -> what to say of them.

    names        of the classes; with them a judge of another run knows which class was asked for
    unfinished   how far the training of a network had come that was not at its end
    """
    more = {"unfinished": np.array(unfinished)} if unfinished else {}
    with checkpoint.replacing(path) as file:
        np.savez(file, arr_0=images.numpy(), arr_1=labels.numpy(), classes=np.array(names), **more)
    return (f"{path}: arr_0 uint8 {tuple(images.shape)}, arr_1 their labels, "
            f"{len(labels.unique())} classes")


def unfinished_maker(path: str) -> str:
    """What write_npz() was told of an unfinished training; "" of other files and of folders."""
    if not (os.path.isfile(path) and kind_of(path) == "npz"):
        return ""
    with np.load(path, allow_pickle=False) as arrays:
        return str(arrays["unfinished"]) if "unfinished" in arrays else ""


# ------------------------------------------------------------------------------------------------
# reconstructions

def asked_photos(args: argparse.Namespace, size: int) -> tuple[Tensor, str]:
    """-> the files of --reconstruct, uint8 (F, size, size, 3), and the place of their picture.

    Raises UserError for what is no image, and for a place that cannot be written.
    """
    images = np.stack([resize_crop(read_image(file), size) for file in args.reconstruct])
    path = os.path.join(args.out, "reconstruct.png")
    need_places({"its picture": (path, PNG)}, {"--out": args.out},
                {"--reconstruct": args.reconstruct})
    return torch.from_numpy(images), path
