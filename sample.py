"""Pictures out of a run: samples of its generators, or images encoded and decoded again.

    classes ─► generator ─► ids ─► NativeTok.decode ─► images         one row per class, or an .npz for an evaluator
    photo ─► NativeTok.encode ─► ids[:, :k] ─► NativeTok.decode       one column per prefix length k

python sample.py --run runs/NAME                                      -> RUN/samples/sample-ar.png
python sample.py --run runs/NAME --generator ar --classes 207 250 --cfg_scale 2.0
python sample.py --run runs/NAME --generator maskgit --classes cat "tabby dog" --steps 8 --per_class 8
python sample.py --run runs/NAME --npz samples.npz --num_samples 50000 --batch_size 256
python sample.py --run runs/NAME --reconstruct photo.jpg --prefixes 1 8 32 128      -> RUN/samples/reconstruct.png

Repeat    batch b draws from (--seed, b): the same command writes the same bytes on the same machine, while another
          --batch_size, or a GPU instead of a CPU, gives other samples
Exit      0 done, 1 failure, 2 something to mend in the command or the run
"""
import argparse
import difflib
import os
import re
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from generator import Generator
from losses import psnr
from nativetok import NativeTok, sample_batch
from plumbing import checkpoint
from plumbing.flags import Parser, UserError, main_with_user_errors, need
from plumbing.images import read_image, resize_crop, save_grid, to_float, to_uint8
from plumbing.processes import Processes, enough_memory, need_room

PICTURE, NPZ, RECONSTRUCT = "pictures of samples", "--npz", "--reconstruct"   # the three uses


def number(kind: type, low: float = 0):
    """For argparse: text -> a `kind` from `low` on. Neither nan nor inf passes."""
    def read(text: str):
        value = kind(text)
        if not low <= value <= 1e9:
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {low} to 1e9")
        return value
    read.__name__ = kind.__name__  # argparse: invalid int value: 'x'
    return read


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace of all flags, with .use and .options, what the generator's sample() takes.

    Raises UserError for a flag that this use or this generator would not read, and for a run that is not there.
    """
    parser = Parser(prog="sample.py", usage="%(prog)s --run RUN [flags]", description=__doc__)
    defaults, readers, to = {}, {}, parser

    def flag(name: str, default, text: str, *read_by: str, **kind) -> None:
        """A flag, its default, and which uses or generators read it; none named means all."""
        defaults[name], readers[name] = default, read_by
        text += "" if default is None or default is False else f" (default: {default})"
        if "type" in kind:
            kind["metavar"] = kind["type"].__name__.upper()
        # SUPPRESS: absent unless given
        to.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **kind)

    flag("run", None, "folder of the run, made by train.py", required=True)
    flag("device", "auto", "where to compute; auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    flag("out", None, "folder for the PNGs (default: RUN/samples)", PICTURE, RECONSTRUCT)
    to = parser.add_argument_group("samples")
    flag("generator", "ar", "which generator", PICTURE, NPZ, choices=("ar", "maskgit"))
    flag("classes", None, "names or numbers; what is both is taken as a name (default: all, in a picture the first 10)",
         PICTURE, NPZ, nargs="+", metavar="CLASS")
    flag("cfg_scale", 2.0, "guidance: 0 unconditional, 1 plain, above 1 guided", PICTURE, NPZ, type=number(float))
    flag("temperature", 1.0, "of the tokens' distribution; 0 takes the likeliest", PICTURE, NPZ, type=number(float))
    flag("top_k", 0, "ar: draw from the k likeliest tokens; 0: off", "ar", type=number(int))
    flag("top_p", 1.0, "ar: draw from the likeliest tokens that reach this probability; 1: off", "ar", type=number(float))
    flag("steps", None, "maskgit: passes, from 1 to the number of tokens (default: 8, at most that number)", "maskgit", type=number(int, 1))
    flag("randomize_temperature", 4.5, "maskgit: noise on the confidences; 0: none", "maskgit", type=number(float))
    flag("seed", 0, "another one gives other samples", PICTURE, NPZ, type=number(int))
    flag("batch_size", 64, "samples at a time; another one gives other samples", PICTURE, NPZ, type=number(int, 1))
    flag("per_class", 8, "samples of each class", PICTURE, type=number(int, 1))
    flag("single", False, "also write every sample as OUT/NNN_CLASS.png", PICTURE, action="store_true")
    to = parser.add_argument_group("samples for an evaluator")
    flag("npz", None, "write arr_0, uint8 (n, H, W, 3), as ADM's evaluator reads it, and arr_1, the labels", NPZ, metavar="FILE")
    flag("num_samples", 50000, "how many; the classes take turns", NPZ, type=number(int, 1))
    to = parser.add_argument_group("reconstructions")
    flag("reconstruct", None, "encode and decode these images", RECONSTRUCT, nargs="+", metavar="FILE")
    flag("prefixes", None, "numbers of tokens to decode from; all tokens come last (default: 1 2 4 ...)", RECONSTRUCT, nargs="+", type=number(int, 1))

    given = vars(parser.parse_args(argv))
    args = argparse.Namespace(**{**defaults, **given})
    need(not {"npz", "reconstruct"} <= given.keys(), "--npz and --reconstruct are two uses; give one of them")
    args.out = args.out or os.path.join(args.run, "samples")
    args.use = RECONSTRUCT if "reconstruct" in given else NPZ if "npz" in given else PICTURE
    active = {args.use} if args.use == RECONSTRUCT else {args.use, args.generator}
    for name in given:
        need(not readers[name] or active & set(readers[name]), f"--{name} is for {' and '.join(readers[name])}; leave it out")
    need(os.path.isdir(args.run), f"{args.run} is not there; give --run the folder of a run that train.py has made")
    own = [name for name in readers if readers[name] == (args.generator,)]
    args.options = {name: getattr(args, name) for name in ("cfg_scale", "temperature", *own)}
    return args


# ------------------------------------------------------------------------------------------------
# what the command line asks for

def class_number(text: str, names: list[str]) -> int:
    """A name or a number as text -> the class's number. What is both is taken as a name. Raises UserError."""
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    close = [name for name in names if text.lower() in name.lower()] or difflib.get_close_matches(text, names)
    few = ", ".join(f"{k} {name}" for k, name in enumerate(names[:5])) + (", ..." if len(names) > 5 else "")
    raise UserError(f"class {text!r} is unknown; " + (
        f"did you mean {' or '.join(map(repr, close[:3]))}?" if close else f"the run has {len(names)} classes: {few}"))


# ------------------------------------------------------------------------------------------------
# samples

def draw_samples(model: Generator, tokenizer: NativeTok, labels: Tensor, options: dict, seed: int, batch_size: int) -> np.ndarray:
    """labels (n,) -> uint8 (n, H, W, 3). Raises UserError for one of model.sample()'s options out of range and for lack of memory."""
    # delay: an option out of range shows in the first batch, and then its one line stands alone.
    bar = tqdm(total=len(labels), desc="sampling", unit=" images", delay=1, mininterval=1)
    with bar, enough_memory("lower --batch_size, or ask for fewer samples"):
        images = np.empty((len(labels), tokenizer.cfg.image_size, tokenizer.cfg.image_size, 3), np.uint8)
        for b, part in enumerate(labels.split(batch_size)):                   # (B,)
            images[b * batch_size:b * batch_size + len(part)] = sample_batch(model, tokenizer, part, options, seed, b).numpy()
            bar.update(len(part))
    return images


def samples(args, tokenizer: NativeTok, device: torch.device) -> None:
    """--npz FILE, or a picture with one row per class."""
    folder = args.out if args.use == PICTURE else os.path.dirname(args.npz) or "."
    need(args.use == PICTURE or not os.path.isdir(args.npz or "."), f"--npz {args.npz} is a folder; give the name of a file")
    model = Generator.of_run(args.run, args.generator, tokenizer, device)
    names = model.classes
    everything = range(len(names)) if args.use == NPZ else range(min(10, len(names)))
    classes = torch.tensor([class_number(c, names) for c in args.classes] if args.classes else everything)
    # One row per class, or in turn, so that the classes' counts differ by one at most.
    labels = classes.repeat_interleave(args.per_class) if args.use == PICTURE else classes[torch.arange(args.num_samples) % len(classes)]
    options = {name: model.default_steps if value is None else value for name, value in args.options.items()}   # None: steps
    need_room(folder)

    began = time.perf_counter()
    images = draw_samples(model, tokenizer, labels.to(device), options, args.seed, args.batch_size)
    seconds = time.perf_counter() - began
    print(f"{args.generator}:", *(f"{name} {value:g}," for name, value in options.items()), f"seed {args.seed}, batch_size {args.batch_size}")
    print(f"{len(images):,} samples, {len(images) / seconds:.1f} images per second on {device.type}")
    if args.use == NPZ:
        with checkpoint.replacing(args.npz) as file:
            np.savez(file, arr_0=images, arr_1=labels.numpy())
        return print(f"{args.npz}: arr_0 {images.dtype} {images.shape}, arr_1 their labels, {len(classes)} classes")
    path = os.path.join(folder, f"sample-{args.generator}.png")
    save_grid(images, path, columns=args.per_class, scale=max(1, 64 // tokenizer.cfg.image_size))
    more = "" if args.classes or len(names) <= 10 else f" (the first 10 of {len(names)}; --classes chooses others)"
    print(f"{path}: {args.per_class} samples in a row; rows {', '.join(names[c] for c in classes)}{more}")
    if args.single:
        for j, (image, label) in enumerate(zip(images, labels)):
            # "tabby, tabby cat" and a/b make no file names
            name = re.sub(r"[^\w-]+", "-", names[label])
            with checkpoint.replacing(os.path.join(folder, f"{j:03}_{name}.png")) as file:
                Image.fromarray(image).save(file, "PNG")
        print(f"{os.path.join(folder, '000_*.png')} to {j:03}: the same, one by one")


# ------------------------------------------------------------------------------------------------
# reconstructions

def reconstruct(args, tokenizer: NativeTok, device: torch.device) -> None:
    """One row per file: the image cropped to the model's size, then what the first k tokens say, at last all tokens."""
    L, size = tokenizer.num_tokens, tokenizer.cfg.image_size
    prefixes = sorted({L, *(args.prefixes or (2 ** i for i in range(L.bit_length())))})
    need(prefixes[-1] == L, f"--prefixes {prefixes[-1]} is out of range; this tokenizer makes {L} tokens, so give 1 to {L}")
    images = torch.from_numpy(np.stack([resize_crop(read_image(file), size) for file in args.reconstruct]))   # (F, H, W, 3)
    need_room(args.out)

    rows = []
    for file, image in zip(args.reconstruct, images):
        x = to_float(image[None].to(device))                                  # (1, 3, H, W)
        with enough_memory("use --device cpu"):
            ids = tokenizer.encode(x)                                         # (1, L)
            # (P, 3, H, W)
            recon = torch.cat([tokenizer.decode(ids[:, :k]) for k in prefixes]).clamp(-1, 1)
        rows.append(torch.cat([image[None], to_uint8(recon).cpu()]))          # (1+P, H, W, 3)
        print(f"{file}\n  PSNR  " + ", ".join(f"{k}: {dB:.2f}" for k, dB in zip(prefixes, psnr(recon, x).tolist())) + " dB")
        print("  ids  ", *ids[0].tolist())
    path = os.path.join(args.out, "reconstruct.png")
    save_grid(torch.cat(rows), path, columns=1 + len(prefixes), scale=max(1, 64 // size))
    print(f"{path}: the original, then decoded from the first {' '.join(map(str, prefixes))} tokens")


def main(args: argparse.Namespace) -> None:
    device = Processes(args.device).device
    (reconstruct if args.use == RECONSTRUCT else samples)(args, NativeTok.of_run(args.run, device), device)


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
