"""Pictures out of a run: samples of its generators, or images encoded and decoded again.

    classes ─► generator ─► ids ─► NativeTok.decode ─► images      a row per class, or an .npz
    photo ─► NativeTok.encode ─► ids[:, :k] ─► NativeTok.decode    a column per prefix length k

Run      python sample.py --run runs/NAME
         python sample.py --run runs/NAME --generator ar --classes 207 250 --cfg_scale 2.0
         python sample.py --run runs/NAME --generator maskgit --classes cat "tabby dog" \\
                          --steps 8 --per_class 8
         python sample.py --run runs/NAME --npz samples.npz --num_samples 50000 --batch_size 256
         python sample.py --run runs/NAME --reconstruct photo.jpg --prefixes 1 8 32 128
Makes    RUN/samples/sample-ar.png or sample-maskgit.png, or with --npz an .npz for an evaluator,
         or with --reconstruct RUN/samples/reconstruct.png. Batch b draws from (--seed, b): the same
         command writes the same bytes on the same machine, while another --batch_size, or a GPU
         instead of a CPU, gives other samples
Exit     0 done, 1 failure, 2 something to mend in the command or the run
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import os
import re
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import SAMPLING, add_sampling_flags, sampling_options
from generator import GENERATORS, Generator, need_guidance
from losses import psnr
from nativetok import NativeTok, doubling, sample_batch
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.images import read_image, resize_crop, save_grid, to_float, to_uint8
from plumbing.outputs import NPZ, PNG, need_places
from plumbing.processes import Processes, enough_memory, need_one_process
from plumbing.samples import class_number, write_npz


def parse(argv=None) -> argparse.Namespace:
    """The command line -> namespace of all flags; .options is what the generator's sample() takes.

    Raises UserError for a flag that this use or this generator would not read, and for a run that
    is not there.
    """
    parser = Parser(prog="sample.py", usage="%(prog)s --run RUN [flags]", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of the run, made by train.py")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="where to compute; auto: a GPU if there is one (default: auto)")
    parser.add_argument("--out", metavar="DIR", help="folder for PNGs (default: RUN/samples)")
    # None until it is known that a flag is read at all.
    to = parser.add_argument_group("samples")
    to.add_argument("--generator", choices=tuple(GENERATORS), help="which one (default: ar)")
    to.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers; what is both "
                    "is taken as a name (default: all, in a picture the first 10)")
    to.add_argument("--seed", type=number(int), metavar="INT",
                    help="another one gives other samples (default: 0)")
    to.add_argument("--batch_size", type=number(int, 1), metavar="INT",
                    help="samples at a time; another one gives other samples (default: 64)")
    to.add_argument("--per_class", type=number(int, 1), metavar="INT",
                    help="in a picture: samples of each class (default: 8)")
    to.add_argument("--single", action="store_true", default=None,
                    help="also write every sample as OUT/NNN_CLASS.png")
    to.add_argument("--npz", metavar="FILE", help="instead of a picture write arr_0, uint8 (n, H, "
                    "W, 3), as ADM's evaluator reads it, labels arr_1, and the names classes")
    to.add_argument("--num_samples", type=number(int, 1), metavar="INT",
                    help="in an .npz: how many; the classes take turns (default: 50000)")
    add_sampling_flags(parser)
    to = parser.add_argument_group("reconstructions")
    to.add_argument("--reconstruct", nargs="+", metavar="FILE",
                    help="encode and decode these images")
    to.add_argument("--prefixes", nargs="+", type=number(int, 1), metavar="INT",
                    help="numbers of tokens to decode from; all tokens come last "
                         "(default: 1 2 4 ...)")
    args = parser.parse_args(argv)

    def refuse(names: tuple[str, ...], reason: str) -> None:
        for name in names:
            need(getattr(args, name) is None, f"--{name} is for {reason}; leave it out")
    need(args.npz is None or args.reconstruct is None,
         "--npz and --reconstruct are two uses; give one of them")
    if args.reconstruct:
        refuse(("generator", "classes", "seed", "batch_size", "per_class", "single", "num_samples",
                *SAMPLING), "samples")
    else:
        refuse(("prefixes",), "--reconstruct")
    if args.npz is not None:
        refuse(("out", "per_class", "single"), "pictures")
    else:
        refuse(("num_samples",), "--npz")
    args.generator = args.generator or "ar"
    reads = GENERATORS[args.generator].options
    for kind, other in GENERATORS.items():
        refuse(tuple(name for name in other.options if name not in reads), kind)
    need(os.path.isdir(args.run),
         f"{args.run} is not there; give --run the folder of a run that train.py has made")

    args.options = sampling_options(args, reads)
    defaults = dict(out=os.path.join(args.run, "samples"), seed=0, batch_size=64, per_class=8,
                    num_samples=50000)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# ------------------------------------------------------------------------------------------------
# samples

def draw_samples(model: Generator, tokenizer: NativeTok, labels: Tensor, options: dict, seed: int,
                 batch_size: int) -> np.ndarray:
    """labels (n,) -> uint8 (n, H, W, 3).

    Raises UserError for one of model.sample()'s options out of range and for lack of memory.
    """
    size = tokenizer.cfg.image_size
    # delay: an option out of range shows in the first batch, and then its one line stands alone.
    bar = tqdm(total=len(labels), desc="sampling", unit=" images", delay=1, mininterval=1)
    with bar, enough_memory("lower --batch_size, or ask for fewer samples"):
        images = np.empty((len(labels), size, size, 3), np.uint8)
        for b, part in enumerate(labels.split(batch_size)):                   # (B,)
            first = b * batch_size
            batch = sample_batch(model, tokenizer, part, options, seed, b)    # (B, H, W, 3)
            images[first:first + len(part)] = batch.numpy()
            bar.update(len(part))
    return images


def samples(args, tokenizer: NativeTok, device: torch.device) -> None:
    """--npz FILE, or a picture with one row per class."""
    need_places({"--npz": (args.npz, NPZ)})
    model = Generator.of_run(args.run, args.generator, tokenizer, device)
    names = model.classes
    if args.classes:
        classes = torch.tensor([class_number(c, names) for c in args.classes])
    else:
        classes = torch.arange(len(names) if args.npz else min(10, len(names)))
    if args.npz:  # in turn, so that the classes' counts differ by one at most
        labels = classes[torch.arange(args.num_samples) % len(classes)]
    else:         # a row each
        labels = classes.repeat_interleave(args.per_class)
    options = args.options
    if args.cfg_scale is None:
        options = {**options, "cfg_scale": model.default_cfg_scale}
    need_guidance(options["cfg_scale"], model.cfg.label_dropout)
    if options.get("steps", 0) is None:
        options = {**options, "steps": model.default_steps}
    if not args.npz:
        need_places(folders={"--out": args.out})

    began = time.perf_counter()
    images = draw_samples(model, tokenizer, labels.to(device), options, args.seed, args.batch_size)
    seconds = time.perf_counter() - began
    if args.npz:
        made = write_npz(args.npz, images, labels, names,
                         "; ".join(filter(None, (tokenizer.unfinished, model.unfinished))))
    else:
        made = write_pictures(args, images, labels, names)
    print(f"{args.generator}:", *(f"{name} {value:g}," for name, value in options.items()),
          f"seed {args.seed}, batch_size {args.batch_size}")
    print(f"{len(images):,} samples, {len(images) / seconds:.1f} images per second "
          f"on {device.type}")
    print("\n".join(made))


def write_pictures(args, images: np.ndarray, labels: Tensor, names: list[str]) -> list[str]:
    """Write the grid and the single files -> what to say of them."""
    path = os.path.join(args.out, f"sample-{args.generator}.png")
    save_grid(images, path, columns=args.per_class, scale=max(1, 64 // images.shape[1]))
    rows = [names[c] for c in labels[::args.per_class]]
    more = ""
    if not args.classes and len(names) > len(rows):
        more = f" (the first {len(rows)} of {len(names)}; --classes chooses others)"
    made = [f"{path}: {args.per_class} samples in a row; rows {', '.join(rows)}{more}"]
    if args.single:
        for j, (image, label) in enumerate(zip(images, labels)):
            # "tabby, tabby cat" and a/b make no file names, nor do 300 letters.
            name = re.sub(r"[^\w-]+", "-", names[label])[:40]
            file_name = os.path.join(args.out, f"{j:03}_{name}.png")
            with checkpoint.replacing(file_name) as file:
                Image.fromarray(image).save(file, "PNG")
        made.append(f"{os.path.join(args.out, '000_*.png')} to {j:03}: the same, one by one")
    return made


# ------------------------------------------------------------------------------------------------
# reconstructions

def reconstruct(args, tokenizer: NativeTok, device: torch.device) -> None:
    """A row per file: the image cropped to the model's size, then what its first k tokens say."""
    L, size = tokenizer.num_tokens, tokenizer.cfg.image_size
    prefixes = sorted({L, *(args.prefixes or doubling(L))})
    need(prefixes[-1] == L, f"--prefixes {prefixes[-1]} is out of range; this tokenizer makes {L} "
         f"tokens, so give 1 to {L}")
    # (F, H, W, 3)
    images = np.stack([resize_crop(read_image(file), size) for file in args.reconstruct])
    path = os.path.join(args.out, "reconstruct.png")
    need_places({"its picture": (path, PNG)}, {"--out": args.out},
                {"--reconstruct": args.reconstruct})

    rows, lines = [], []
    for file, image in zip(args.reconstruct, torch.from_numpy(images)):
        x = to_float(image[None].to(device))                                  # (1, 3, H, W)
        with enough_memory("use --device cpu"):
            ids = tokenizer.encode(x)                                         # (1, L)
            recon = torch.cat([tokenizer.decode(ids[:, :k]) for k in prefixes])
        recon = recon.clamp(-1, 1)                                            # (P, 3, H, W)
        rows.append(torch.cat([image[None], to_uint8(recon).cpu()]))          # (1+P, H, W, 3)
        quality = [f"{k}: {dB:.2f}" for k, dB in zip(prefixes, psnr(recon, x).tolist())]
        lines += [file, f"  PSNR  {', '.join(quality)} dB",
                 f"  ids   {' '.join(map(str, ids[0].tolist()))}"]
    save_grid(torch.cat(rows), path, columns=1 + len(prefixes), scale=max(1, 64 // size))
    print("\n".join(lines))
    print(f"{path}: the original, then decoded from the first {' '.join(map(str, prefixes))} "
          "tokens")


def main(args: argparse.Namespace) -> None:
    need_one_process("sample.py")
    device = Processes(args.device).device
    tokenizer = NativeTok.of_run(args.run, device)
    if args.reconstruct:
        reconstruct(args, tokenizer, device)
    else:
        samples(args, tokenizer, device)


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
