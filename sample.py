"""Pictures out of a run: samples of its generators, or images encoded and decoded again.

    classes ─► generator ─► ids ─► decoder ─► images      a row per class, or an .npz
    photo ─► NativeTok.encode ─► ids[:, :k] ─► decoder    a column per prefix length k

Run      python sample.py --run runs/NAME
         python sample.py --run runs/NAME --generator ar --classes 207 250 --cfg_scale 2.0
         python sample.py --run runs/NAME --generator maskgit --classes cat "tabby dog" \\
                          --steps 8 --per_class 8
         python sample.py --run runs/NAME --npz samples.npz --num_samples 50000 --batch_size 256
         python sample.py --run runs/NAME --reconstruct photo.jpg --prefixes 1 8 32 128
         python sample.py --run runs/NAME --best_of 4
         (draws four of each and keeps the one in which a classifier sees its class most)
         --decoder mean or flow: the tokenizer's own decoder, or the one that draws sharp images,
         which is taken where the run has one
Makes    RUN/samples/sample-ar.png or sample-maskgit.png, or with --npz an .npz for an evaluator,
         or with --reconstruct RUN/samples/reconstruct.png. Batch b draws from (--seed, b): the same
         command writes the same bytes on the same machine, while another --batch_size, or a GPU
         instead of a CPU, gives other samples
Exit     0 done, 1 failure, 2 user error, in the command or the run
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import os
import re

import torch
from PIL import Image
from torch import Tensor

from config import SAMPLING
from evaluation.best_of import BestOf, class_seen, load_chooser
from flow_decoder import Decoding
from generator import GENERATORS, Generator
from losses import psnr
from nativetok import NativeTok, doubling, sample_batch
from plumbing import checkpoint
from plumbing.flags import need, number
from plumbing.images import save_grid, to_float, to_uint8
from plumbing.outputs import NPZ, PNG, need_places
from plumbing.processes import Processes, enough_memory, need_one_process
from plumbing.samples import (
    add_decoder_flags, add_sampling_flags, asked_labels, asked_photos, draw_samples, fill,
    how_drawn, named_rows, parse_samples, refuse, sample_parser, sampling_options, write_npz)


def parse(argv=None) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that would not be read."""
    parser, to = sample_parser("python sample.py", __doc__)
    to.add_argument("--generator", choices=tuple(GENERATORS), help="which one (default: ar)")
    to.add_argument("--single", action="store_true", default=None,
                    help="also write every sample as OUT/NNN_CLASS.png")
    to.add_argument("--best_of", type=number(int, 2, 1000), metavar="N", help="draw N in place of "
                    "each and keep the one in which --judge sees its class most")
    to.add_argument("--judge", metavar="FILE", help="for --best_of: a classifier (default: "
                    "RUN/tinycnn.pt, which eval_fid.py --train_features makes)")
    add_sampling_flags(parser, SAMPLING)
    parser.add_argument("--prefixes", nargs="+", type=number(int, 1), metavar="INT",
                        help="with --reconstruct: numbers of tokens to decode from; all tokens "
                        "come last (default: 1 2 4 ...)")
    add_decoder_flags(parser)
    args = parse_samples(parser, argv, samples=("generator", "best_of", "judge", *SAMPLING),
                         pictures=("single",))
    if not args.reconstruct:
        refuse(args, ("prefixes",), "is for --reconstruct")
    if not args.best_of:
        refuse(args, ("judge",), "is for --best_of")
    fill(args, generator="ar", judge=os.path.join(args.run, "tinycnn.pt"))
    reads = GENERATORS[args.generator].options
    for kind, other in GENERATORS.items():
        refuse(args, (name for name in other.options if name not in reads), f"is for {kind}")
    return args


def samples(args: argparse.Namespace, decode: Decoding, device: torch.device) -> None:
    """--npz FILE, or a picture with one row per class."""
    # 1. What can be refused is refused before anything is drawn.
    need_places({"--npz": (args.npz, NPZ)})
    tokenizer = decode.tokenizer
    model = Generator.of_run(args.run, args.generator, tokenizer, device)
    labels = asked_labels(args, model.classes)                                # (n,)
    options = sampling_options(args, {name: SAMPLING[name] for name in model.options}, model)
    told, drawing = {**options, **decode.settings}, model
    if args.best_of:
        chooser = load_chooser(args.judge, args.run, model.classes).to(device)
        drawing = BestOf(model, class_seen(tokenizer, chooser), args.best_of)
        told["best_of"] = args.best_of
    path = None if args.npz else os.path.join(args.out, f"sample-{args.generator}.png")
    need_places({"its picture": (path, PNG)}, {"--out": path and args.out})

    # 2. Draw, batch after batch.
    def draw(part: Tensor, b: int) -> tuple[Tensor]:
        return (sample_batch(drawing, decode, part, options, args.seed, b),)
    (images,), speed = draw_samples(draw, labels.to(device), args.batch_size)  # (n, H, W, 3)

    # 3. Write, and only then say so.
    if args.npz:
        unfinished = "; ".join(filter(None, (decode.unfinished, model.unfinished)))
        made = [write_npz(args.npz, images, labels, model.classes, unfinished)]
    else:
        save_grid(images, path, columns=args.per_class, scale=max(1, 64 // images.shape[1]))
        made = [f"{path}: {args.per_class} samples in a row; rows "
                f"{named_rows(args, labels, model.classes)}"]
    if args.single:
        made.append(write_single_files(args.out, images, labels, model.classes))
    print(f"{args.generator}: {how_drawn(args, told)}")
    print(f"{len(images):,} samples, {speed:.1f} images per second on {device.type}")
    print("\n".join(made))


def write_single_files(folder: str, images: Tensor, labels: Tensor, names: list[str]) -> str:
    """Each of uint8 (n, H, W, 3) as FOLDER/NNN_CLASS.png -> what to say of them."""
    for j, (image, label) in enumerate(zip(images, labels)):
        # "tabby, tabby cat" and a/b make no file names, nor do 300 letters.
        name = re.sub(r"[^\w-]+", "-", names[label])[:40]
        with checkpoint.replacing(os.path.join(folder, f"{j:03}_{name}.png")) as file:
            Image.fromarray(image.numpy()).save(file, "PNG")
    return f"{os.path.join(folder, '000_*.png')} to {j:03}: the same, one by one"


def reconstruct(args: argparse.Namespace, decode: Decoding, device: torch.device) -> None:
    """A row per file: the image cropped to the model's size, then decoded from its first k tokens.

    All are drawn from one noise: the image keeps its composition while tokens arrive.
    """
    tokenizer = decode.tokenizer
    L, size = tokenizer.num_tokens, tokenizer.cfg.image_size
    prefixes = sorted({L, *(args.prefixes or doubling(L))})
    need(prefixes[-1] == L, f"--prefixes {prefixes[-1]} is out of range; this tokenizer makes {L} "
         f"tokens, so give 1 to {L}")
    images, path = asked_photos(args, size)                                   # (F, H, W, 3)

    rows, lines = [], []
    for file, image in zip(args.reconstruct, images):
        x = to_float(image[None].to(device))                                  # (1, 3, H, W)
        with enough_memory("use --device cpu"):
            ids = tokenizer.encode(x)                                         # (1, L)
            recon = torch.cat([decode(ids[:, :k], torch.Generator().manual_seed(args.seed))
                               for k in prefixes])
        recon = recon.clamp(-1, 1)                                            # (P, 3, H, W)
        rows.append(torch.cat([image[None], to_uint8(recon).cpu()]))          # (1+P, H, W, 3)
        quality = [f"{k}: {dB:.2f}" for k, dB in zip(prefixes, psnr(recon, x).tolist())]
        lines += [file, f"  PSNR  {', '.join(quality)} dB",
                  f"  ids   {' '.join(map(str, ids[0].tolist()))}"]
    save_grid(torch.cat(rows), path, columns=1 + len(prefixes), scale=max(1, 64 // size))
    print("\n".join(lines))
    how = "".join(f", {name} {value}" for name, value in decode.settings.items())
    print(f"{path}: the original, then decoded from the first {' '.join(map(str, prefixes))} "
          f"tokens{how}")


def main(args: argparse.Namespace) -> None:
    need_one_process("sample.py")
    device = Processes(args.device).device
    tokenizer = NativeTok.of_run(args.run, device)
    decode = Decoding.of_run(args.run, tokenizer, args.decoder, args.flow_steps)
    if args.reconstruct:
        reconstruct(args, decode, device)
    else:
        samples(args, decode, device)


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
