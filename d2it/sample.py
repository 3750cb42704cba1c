"""Pictures out of a run: samples with their maps, or images encoded and decoded again.

    class ─► map ─► codes ─► image         a row per class, each image above its map, or an .npz
    photo ─► entropy ─► map ─► codes ─► image          a row per file

Run       python -m d2it.sample --run runs/NAME --classes disc ring --cfg_scale 2
          python -m d2it.sample --run runs/NAME --grain map.png       a map painted by hand: dark is
                                                                      coarse, bright is fine
          python -m d2it.sample --run runs/NAME --npz samples.npz --num_samples 50000
          python -m d2it.sample --run runs/NAME --reconstruct a.jpg b.png
Makes     RUN/samples/sample.png, or the .npz, for eval_fid.py, or RUN/samples/reconstruct.png.
          With --json FILE what is said of the samples in the .npz: codes, speed, maps obeyed.
          The same command writes the same bytes on the same machine
Exit      0 done, 1 failure, 2 something to mend in the command or the run
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import os
import shlex
import sys
import time

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from d2it.dvae import DVAE
from d2it.grain import count_codes, gray, heat, painted
from d2it.model import D2iT
from generator import need_guidance
from losses import psnr
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.images import read_image, resize_crop, save_grid, to_float, to_uint8
from plumbing.outputs import JSON, NPZ, PNG, need_places
from plumbing.processes import Processes, enough_memory, need_one_process, provenance
from plumbing.run import need_parts
from plumbing.samples import class_number, write_npz

DEFAULTS = dict(cfg_scale=None, steps=50, eta=0.0, seed=0, batch_size=64, per_class=8,
                num_samples=50000)


def parse(argv=None) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that would not be read."""
    parser = Parser(prog="python -m d2it.sample", description=__doc__)
    add = parser.add_argument
    add("--run", required=True, help="folder of a run of d2it.train")
    add("--device", choices=DEVICES, default="auto", help="where to compute (default: auto)")
    add("--out", metavar="DIR", help="folder for pictures (default: RUN/samples)")
    # None until it is known that a flag is read at all.
    add = parser.add_argument_group("samples").add_argument
    add("--classes", nargs="+", metavar="CLASS", help="names or numbers (default: the first 10, "
        "in an .npz all)")
    add("--grain", metavar="FILE", help="a square image as map for all samples, bright is fine "
        "(default: maps are predicted)")
    add("--cfg_scale", type=number(float), metavar="FLOAT",
        help="guidance: 0 unconditional, 1 plain, above 1 guided (default: 2; "
        "1 after --label_dropout 0)")
    add("--steps", type=number(int, 1, 1000), metavar="INT", help="DDIM steps (default: 50)")
    add("--eta", type=number(float, 0, 1), metavar="FLOAT",
        help="0 DDIM, 1 DDPM; needs path noise (default: 0)")
    add("--seed", type=number(int), metavar="INT", help="others give other samples (default: 0)")
    add("--batch_size", type=number(int, 1), metavar="INT",
        help="samples at a time; another one gives other samples (default: 64)")
    add("--per_class", type=number(int, 1), metavar="INT",
        help="in a picture: samples of each class (default: 8)")
    add("--npz", metavar="FILE", help="write arr_0, uint8 (n, H, W, 3), labels arr_1 and classes")
    add("--num_samples", type=number(int, 1), metavar="INT",
        help="in an .npz: how many; the classes take turns (default: 50000)")
    add("--json", metavar="FILE", help="with --npz: write what is said of the samples there, too")
    add = parser.add_argument_group("reconstructions").add_argument
    add("--reconstruct", nargs="+", metavar="FILE", help="encode and decode these images")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else map(str, argv)
    args.command = "python -m d2it.sample " + shlex.join(words)

    def refuse(names, reason: str) -> None:
        for name in names:
            need(getattr(args, name) is None, f"--{name} is for {reason}; leave it out")
    if args.reconstruct:
        refuse((*DEFAULTS, "classes", "grain", "npz", "json"), "samples")
    elif args.npz is None:
        refuse(("num_samples", "json"), "--npz")
    else:
        refuse(("per_class", "out"), "pictures")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    need(os.path.isdir(args.run), f"{args.run} is not there; give the folder of a run")
    args.out = args.out or os.path.join(args.run, "samples")
    args.options = {name: getattr(args, name) for name in ("cfg_scale", "steps", "eta")}
    return args


# ------------------------------------------------------------------------------------------------
# samples

def read_map(path: str, side: int) -> Tensor:
    """An image as bool (1, n, n): cells above middle gray are fine. UserError unless it is square,
    and as large as the map or some times larger.

    What is transparent counts as black. Of two colours the brighter one is fine, whichever they
    are: 1 beside 0, or the red and blue of our own pictures. A note where all cells come out alike
    though the picture is not of one colour: its painter wanted something else.
    """
    image = read_image(path, background="black")
    height, width = image.shape[:2]
    need(height == width and width % side == 0, f"{path} is {width} x {height}; a map is {side} x "
         f"{side} here, or some times larger, for instance {16 * side} x {16 * side}")
    levels = gray(torch.tensor(image)).numpy()                            # (H, W), 0..255
    two = np.unique(levels)
    if len(two) == 2:
        levels = np.where(levels == two[1], 255, 0)
    shown = resize_crop(levels.astype(np.uint8)[..., None].repeat(3, axis=2), side)[..., 0]
    fine = shown > 127                                                        # (n, n)
    if fine.all() == fine.any() and not one_colour(path):
        kind = "fine" if fine.all() else "coarse"
        print(f"note: {path} has several colours, and all {fine.size} cells come out {kind}: dark, "
              "or transparent, is coarse, and what is brighter than middle gray is fine",
              file=sys.stderr)
    return torch.from_numpy(fine)[None]


def one_colour(path: str) -> bool:
    """Does the picture look the same everywhere, before black and before white?"""
    seen = [read_image(path, background=colour).reshape(-1, 3) for colour in ("black", "white")]
    return all((pixels == pixels[0]).all() for pixels in seen)


def draw_samples(model: D2iT, labels: Tensor, options: dict, seed: int, batch_size: int,
                 grain: Tensor | None = None) -> tuple[np.ndarray, Tensor]:
    """labels (n,) -> uint8 (n, H, W, 3) and maps (n, side, side)."""
    cfg = model.dvae.cfg
    bar = tqdm(total=len(labels), desc="sampling", unit=" images", delay=1, mininterval=1)
    with bar, enough_memory("lower --batch_size, or ask for fewer samples"):
        # Filled in place: a list of batches, joined in the end, would be in memory twice.
        images = np.empty((len(labels), cfg.image_size, cfg.image_size, 3), np.uint8)
        maps = torch.empty(len(labels), cfg.side, cfg.side, dtype=torch.bool)
        for b, part in enumerate(labels.split(batch_size)):
            own = None if grain is None else grain.to(part.device).expand(len(part), -1, -1)
            drawn, used = model.draw(part, options, seed, b, own)
            here = slice(b * batch_size, b * batch_size + len(part))
            images[here], maps[here] = drawn.numpy(), used
            bar.update(len(part))
    return images, maps


def samples(args, device: torch.device) -> None:
    """--npz FILE, or a picture with two rows per class: images, and their maps on them."""
    need_places({"--npz": (args.npz, NPZ), "--json": (args.json, JSON)},
                reads={"--grain": args.grain})
    model = D2iT.of_run(args.run, device)
    names, side = model.classes, model.dvae.cfg.side
    if args.cfg_scale is None:
        args.options["cfg_scale"] = model.default_cfg_scale
    need_guidance(args.options["cfg_scale"], model.content.cfg.label_dropout)
    if args.classes:
        classes = torch.tensor([class_number(c, names) for c in args.classes])
    else:
        classes = torch.arange(len(names) if args.npz else min(10, len(names)))
    if args.npz:
        labels = classes[torch.arange(args.num_samples) % len(classes)]
    else:
        labels = classes.repeat_interleave(args.per_class)
    grain = read_map(args.grain, side) if args.grain else None
    path = None if args.npz else os.path.join(args.out, "sample.png")
    need_places({"its picture": (path, PNG)}, {"--out": path and args.out},
                {"--grain": args.grain})

    began = time.perf_counter()
    images, maps = draw_samples(model, labels.to(device), args.options, args.seed, args.batch_size,
                                grain)
    seconds = time.perf_counter() - began
    if args.npz:
        made = write_npz(args.npz, images, labels, names, model.unfinished)
    else:
        shown = torch.from_numpy(images)
        rows = [row for pair in zip(shown.split(args.per_class),
                                    painted(shown, maps).split(args.per_class)) for row in pair]
        save_grid(torch.cat(rows), path, args.per_class, max(1, 64 // images.shape[1]))
        made = [f"{path}: two rows a class, images and their maps: "
                f"{', '.join(names[c] for c in classes)}"]
    print(*(f"{name} {value:g}," for name, value in args.options.items()),
          f"seed {args.seed}, batch_size {args.batch_size}")
    # Detail lies in the middle anyway; so how well do the maps of other samples fit?
    own, other = (model.obeyed(torch.from_numpy(images), m) for m in (maps, maps.roll(1, 0)))
    codes, speed = count_codes(maps).float().mean().item(), len(images) / seconds
    print(f"{len(images):,} samples of {codes:.1f} codes each, "
          f"{speed:.1f} images per second on {device.type}")
    print(f"maps obeyed {own:.1%}; the maps of their neighbours would be {other:.1%}")
    if args.json:
        checkpoint.write_json(args.json, {
            **provenance(args.command, device), "seed": args.seed, **args.options,
            "n": len(images), "codes": codes, "images_per_second": speed, "maps_obeyed": own,
            "maps_of_neighbours_obeyed": other,
            **({"unfinished": model.unfinished} if model.unfinished else {})})
    print("\n".join(made))


# ------------------------------------------------------------------------------------------------
# reconstructions

def reconstruct(args, device: torch.device) -> None:
    """A row per file: image, entropy, map, reconstruction."""
    path = os.path.join(args.run, "dvae.pt")
    need_parts(args.run, ("dvae.pt",), "-m d2it.train")
    model = DVAE.load(path).to(device)
    size = model.cfg.image_size
    pixels = np.stack([resize_crop(read_image(file), size) for file in args.reconstruct])
    pixels = torch.from_numpy(pixels).to(device)              # (F, S, S, 3)
    out = os.path.join(args.out, "reconstruct.png")
    need_places({"its picture": (out, PNG)}, {"--out": args.out},
                {"--reconstruct": args.reconstruct})

    codes = model.encode(pixels, torch.Generator().manual_seed(0))
    recon = model.decode(codes).clamp(-1, 1)
    pixels, counts = pixels.cpu(), count_codes(codes.grain).tolist()
    columns = [pixels, heat(model.entropy(pixels.to(device)), size), painted(pixels, codes.grain),
               to_uint8(recon).cpu()]
    save_grid(torch.stack(columns, dim=1).flatten(0, 1), out, 4, max(1, 64 // size))
    most = 4 * codes.grain[0].numel()
    for file, count, dB in zip(args.reconstruct, counts, psnr(recon.cpu(), to_float(pixels))):
        print(f"{file}\n  {count} codes of at most {most}, PSNR {dB:.2f} dB")
    print(f"{out}: image, entropy, map, reconstruction")


def main(args: argparse.Namespace) -> None:
    need_one_process("d2it.sample")
    device = Processes(args.device).device
    if args.reconstruct:
        reconstruct(args, device)
    else:
        samples(args, device)


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
