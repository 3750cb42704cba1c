"""Pictures out of a run: samples with their maps, or images encoded and decoded again.

    class ─► map ─► codes ─► image         a row per class, each image above its map, or an .npz
    photo ─► entropy ─► map ─► codes ─► image          a row per file

Run       python -m d2it.sample --run runs/NAME --classes disc ring --cfg_scale 2
          python -m d2it.sample --run runs/NAME --grain map.png       a map drawn by hand: dark is
                                                                      coarse, bright is fine
          python -m d2it.sample --run runs/NAME --npz samples.npz --num_samples 50000
          python -m d2it.sample --run runs/NAME --reconstruct a.jpg b.png
Makes     RUN/samples/sample.png, or the .npz, for eval_fid.py, or RUN/samples/reconstruct.png.
          With --json FILE measures of the samples in the .npz: codes, speed, maps obeyed.
          The same command writes the same bytes on the same machine
Exit      0 done, 1 failure, 2 user error
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
import os
import sys

import numpy as np
import torch
from torch import Tensor

import config
from d2it.dvae import DVAE
from d2it.grain import count_codes, gray, heat, painted
from d2it.model import D2iT
from diffusion import T
from losses import psnr
from plumbing import checkpoint
from plumbing.flags import need, number
from plumbing.images import read_image, resize_crop, save_grid, to_float, to_uint8
from plumbing.outputs import JSON, NPZ, PNG, need_places
from plumbing.processes import Processes, need_one_process, provenance
from plumbing.run import need_parts
from plumbing.samples import (
    add_sampling_flags, asked_labels, asked_photos, draw_samples, how_drawn, named_rows,
    parse_samples, sample_parser, sampling_options, write_npz)

SAMPLING = {
    "cfg_scale": config.SAMPLING["cfg_scale"],
    "steps": config.Option(number(int, 1, T), 50, "DDIM steps (default: 50)"),
    "eta": config.Option(number(float, 0, 1), 0.0, "0 DDIM, 1 DDPM; needs path noise (default: 0)"),
}


def parse(argv=None) -> argparse.Namespace:
    """The command line. Raises UserError for a flag that would not be read."""
    parser, to = sample_parser("python -m d2it.sample", __doc__)
    to.add_argument("--grain", metavar="FILE", help="a square image as map for all samples, bright "
                    "is fine (default: maps are predicted)")
    to.add_argument("--json", metavar="FILE",
                    help="with --npz: write what is said of the samples there, too")
    add_sampling_flags(parser, SAMPLING)
    return parse_samples(parser, argv, samples=("grain", *SAMPLING), npz=("json",))


def read_map(path: str, side: int) -> Tensor:
    """An image as bool (1, n, n): cells above middle gray are fine. UserError unless it is square,
    and as large as the map or some times larger.

    What is transparent counts as black. Of two colours the brighter one is fine, whichever they
    are: 1 beside 0, or the red and blue of our own pictures. A note where all cells come out alike
    though the picture is not of one colour, which cannot be what was meant.
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


def samples(args: argparse.Namespace, device: torch.device) -> None:
    """--npz FILE, or a picture with two rows per class: images, and their maps on them."""
    # 1. What can be refused is refused before anything is drawn.
    need_places({"--npz": (args.npz, NPZ), "--json": (args.json, JSON)},
                reads={"--grain": args.grain})
    model = D2iT.of_run(args.run, device)
    labels = asked_labels(args, model.classes)                                # (n,)
    options = sampling_options(args, SAMPLING, model)
    grain = read_map(args.grain, model.dvae.cfg.side).to(device) if args.grain else None
    path = None if args.npz else os.path.join(args.out, "sample.png")
    need_places({"its picture": (path, PNG)}, {"--out": path and args.out},
                {"--grain": args.grain})

    # 2. Draw, batch after batch: images (n, H, W, 3), maps (n, side, side).
    def draw(part: Tensor, b: int) -> tuple[Tensor, Tensor]:
        own = None if grain is None else grain.expand(len(part), -1, -1)
        return model.draw(part, options, args.seed, b, own)
    (images, maps), speed = draw_samples(draw, labels.to(device), args.batch_size)

    # 3. Write, and only then say so.
    if args.npz:
        made = write_npz(args.npz, images, labels, model.classes, model.unfinished)
    else:
        rows = [row for pair in zip(images.split(args.per_class),
                                    painted(images, maps).split(args.per_class)) for row in pair]
        save_grid(torch.cat(rows), path, args.per_class, max(1, 64 // images.shape[1]))
        made = (f"{path}: two rows a class, images and their maps: "
                f"{named_rows(args, labels, model.classes)}")
    print(how_drawn(args, options))
    # Detail lies in the middle anyway; so how well do the maps of other samples fit?
    own, other = (model.obeyed(images, m) for m in (maps, maps.roll(1, 0)))
    codes = count_codes(maps).float().mean().item()
    print(f"{len(images):,} samples of {codes:.1f} codes each, "
          f"{speed:.1f} images per second on {device.type}")
    print(f"maps obeyed {own:.1%}; the maps of their neighbours would be {other:.1%}")
    if args.json:
        checkpoint.write_json(args.json, {
            **provenance(args.command, device), "seed": args.seed, **options,
            "n": len(images), "codes": codes, "images_per_second": speed, "maps_obeyed": own,
            "maps_of_neighbours_obeyed": other,
            **({"unfinished": model.unfinished} if model.unfinished else {})})
    print(made)


def reconstruct(args: argparse.Namespace, device: torch.device) -> None:
    """A row per file: image, entropy, map, reconstruction."""
    need_parts(args.run, ("dvae.pt",), "-m d2it.train")
    model = DVAE.load(os.path.join(args.run, "dvae.pt")).to(device)
    size = model.cfg.image_size
    pixels, path = asked_photos(args, size)                                   # (F, S, S, 3)

    codes = model.encode(pixels.to(device), torch.Generator().manual_seed(0))
    recon, counts = model.decode(codes).clamp(-1, 1), count_codes(codes.grain).tolist()
    columns = [pixels, heat(model.entropy(pixels.to(device)), size), painted(pixels, codes.grain),
               to_uint8(recon).cpu()]
    save_grid(torch.stack(columns, dim=1).flatten(0, 1), path, 4, max(1, 64 // size))
    most = 4 * codes.grain[0].numel()
    for file, count, dB in zip(args.reconstruct, counts, psnr(recon.cpu(), to_float(pixels))):
        print(f"{file}\n  {count} codes of at most {most}, PSNR {dB:.2f} dB")
    print(f"{path}: image, entropy, map, reconstruction")


def main(args: argparse.Namespace) -> None:
    need_one_process("d2it.sample")
    device = Processes(args.device).device
    if args.reconstruct:
        reconstruct(args, device)
    else:
        samples(args, device)


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
