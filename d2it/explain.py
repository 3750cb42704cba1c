"""What does D²iT do with an image? A page for a trained run: a map to change, then pictures.

Run      python -m d2it.explain --run runs/NAME [--against runs/COARSE runs/FINE]
Makes    RUN/explain/index.html, or --out DIR: one file that needs no network; beside it its
         pictures as PNG
Exit     0 done, 1 failure, 2 user error

What a reader can change: which cells are fine. What stands below, as pictures:
  maps             images, the entropy of their cells, which cells are fine
  reconstructions  what the codes keep, and what other runs' codes keep of the same images
  latents          three channels of the codes as colours
  denoising        the rough prediction, the refined one, and their difference
  painted          one noise and one class under four maps
  sampled          maps that the grain transformer draws, beside the mean map of the class
  samples          a class a row, each image above its map
  training         curves out of log.jsonl
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import os
import shlex
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from config import GUIDANCE
from diffusion import estimates
from d2it.dvae import DVAE, Codes
from d2it.grain import count_codes, heat, painted
from d2it.model import D2iT
from d2it.presets import CONFIGS
from losses import mse, to_db
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.images import to_float, to_uint8
from plumbing.page import Page
from plumbing.plot import log_curves
from plumbing.processes import Processes, need_one_process
from plumbing.run import OpenRun, held_out, need_same_held_out, open_run

TITLES = {
    "maps": "Which cells are fine",
    "reconstructions": "What the codes keep",
    "latents": "What the second stage sees",
    "denoising": "Rough and refined",
    "painted": "One noise, four maps",
    "sampled": "Maps are drawn, not averaged",
    "samples": "Samples",
    "training": "Training"}


DIVIDES = "The first guess divides by the share of the signal, 0.006, so its faults look large. "


def parse(argv=None):
    parser = Parser(prog="python -m d2it.explain", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a finished run of d2it.train")
    parser.add_argument("--against", nargs="+", default=[], metavar="RUN",
                        help="runs on the same images, with other maps, for the reconstructions")
    parser.add_argument("--images", type=number(int, 2), default=10, metavar="N",
                        help="images in each picture (default: 10)")
    parser.add_argument("--out", metavar="DIR", help="folder for the page (default: RUN/explain)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    return parser.parse_args(argv)


def fixed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on(dvae: DVAE, pixels: Tensor) -> Tensor:
    return pixels.to(dvae.limit.device)


def shown(images: Tensor) -> Tensor:
    return to_uint8(images.clamp(-1, 1)).cpu()


# ------------------------------------------------------------------------------------------------
# the DVAE

CELLS = """An image is cut into cells. A fine cell (red frame) has four codes, a coarse one a single
code. Click a cell to make it fine or coarse: the image is encoded and decoded again (codes are the
mean of the posterior). Single cells change in the image's own map, which goes by the entropy of
their gray levels; or choose one of five whole maps. Which click gains most for three codes?"""
CELLS_BODY = """<div class="pick" id="images" role="group" aria-label="image"></div>
<div class="pick" id="maps" role="group" aria-label="map"></div>
<div class="row three" id="cells-pictures"></div>
<p id="cells-said" aria-live="polite"></p>"""
WHOLE = ("its own", "all coarse", "all fine", "the opposite", "a diagonal")
PICTURES = 800  # of that section; with larger maps it shows fewer images


def under(dvae: DVAE, pixels: Tensor, grain: Tensor) -> Tensor:
    """uint8 (B, H, W, 3), any map (B, n, n) -> uint8 images decoded from the posterior's mean."""
    with torch.no_grad():
        mean, _ = dvae.moments(to_float(pixels), grain)
        return shown(dvae.decode(Codes(dvae.standardised(mean, grain), grain)))


def whole_maps(own: Tensor) -> Tensor:
    """bool (n, n) -> those of WHOLE (5, n, n)."""
    nothing = torch.zeros_like(own)
    return torch.stack([own, nothing, ~nothing, ~own, hand_painted(len(own)).to(own.device)])


def cells(page: Page, dvae: DVAE, pixels: Tensor) -> None:
    """The section that a reader can change: of each image five maps, and each single flip."""
    n, images = dvae.cfg.side, []
    for one in pixels[:max(1, min(8, PICTURES // (n * n + len(WHOLE))))]:
        own = dvae.grain_of(on(dvae, one[None]))[0]
        flips = own ^ torch.eye(n * n, dtype=torch.bool, device=own.device).view(-1, n, n)
        grain = torch.cat([whole_maps(own), flips])
        rows = []
        for part in grain.split(64):
            same = one.expand(len(part), *one.shape)
            decoded = under(dvae, on(dvae, same), part)
            dB = to_db(mse(to_float(decoded), to_float(same)))
            for tile, row, codes, db in zip(page.sheet.add(decoded), part.flatten(1).tolist(),
                                            count_codes(part).tolist(), dB.tolist()):
                text = "".join("01"[fine] for fine in row)
                rows.append({"tile": tile, "map": text, "codes": codes,
                             "db": round(min(db, 99), 2)})
        images.append({"tile": page.sheet.add(one[None])[0], "maps": rows[:len(WHOLE)],
                       "flips": rows[len(WHOLE):]})
    page.section("cells", "Make a cell fine or coarse", CELLS, CELLS_BODY,
                 {"side": n, "names": WHOLE, "images": images})


def maps(page: Page, dvae: DVAE, pixels: Tensor) -> None:
    grain, scores = dvae.grain_of(on(dvae, pixels)), dvae.entropy(on(dvae, pixels))
    codes = ", ".join(str(c) for c in count_codes(grain).tolist())
    page.grid("maps", TITLES["maps"], "Held-out images; the entropy of each cell, black where it "
              f"is flat; red cells are fine and have four codes, blue ones have one. {codes} "
              f"codes, where {4 * grain[0].numel()} would be all. A cell counts as detailed when "
              "its gray levels are many. Where lies detail that this measure cannot see?",
              [pixels, heat(scores, pixels.shape[1]), painted(pixels, grain)])


def reconstructions(page: Page, dvae: DVAE, pixels: Tensor, others: dict[str, DVAE]) -> None:
    rows, told = [pixels], []
    for name, model in {"this run": dvae, **others}.items():
        codes = model.encode(on(model, pixels), fixed())
        recon = model.decode(codes).clamp(-1, 1).cpu()
        off = (shown(recon).float() - pixels.float()).abs().mean(dim=-1, keepdim=True)
        off = (4 * off).clamp(0, 255).to(torch.uint8)
        rows += [shown(recon), off.expand(-1, -1, -1, 3)]
        dB = to_db(mse(recon, to_float(pixels)).mean()).item()
        told.append(f"{name} {dB:.1f} dB with {count_codes(codes.grain).float().mean():.0f} codes")
    page.grid("reconstructions", TITLES["reconstructions"], "Images; then, for each run, "
              "what its codes decode to and its error, four times as bright. "
              f"{'; '.join(told)}. Is more lost in fine cells or in coarse ones?", rows)


def latents(page: Page, dvae: DVAE, pixels: Tensor) -> None:
    codes = dvae.encode(on(dvae, pixels), fixed())
    scale = pixels.shape[1] // codes.z.shape[-1]
    colours = shown(codes.z[:, :3] / 3).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    page.grid("latents", TITLES["latents"], "The first three numbers of each code as red, green "
              "and blue; gray is 0, and 3 standard deviations are full colour. Fine cells are four "
              "squares, coarse ones a single square: the map can be read off the latent.",
              [pixels, colours, painted(colours, codes.grain)])


# ------------------------------------------------------------------------------------------------
# the two transformers

@torch.no_grad()
def denoising(page: Page, model: D2iT, count: int) -> None:
    """At eight times of one sampling: what the net takes z to be, rough and refined."""
    labels = torch.arange(min(count, 4, len(model.classes)), device=model.dvae.limit.device)
    trace = []
    _, grain = model.sample(labels, 1.0, 50, generator=fixed(), trace=trace)
    rows, path = [], model.content.cfg.path
    chosen = [trace[k] for k in np.linspace(0, len(trace) - 1, 8).round().astype(int)]
    for now, z_t, _ in chosen:
        t = torch.full((len(labels),), now, device=z_t.device)
        outs = [model.content(z_t, t, labels, grain, refine=on) for on in (False, True)]
        rough, refined = (estimates(z_t, out, t, path)[0] for out in outs)
        off = (outs[1] - outs[0]).abs().mean(dim=1, keepdim=True)
        seen = [model.decode(Codes(z, grain)) for z in (z_t, rough, refined)]
        scale = seen[0].shape[-1] // off.shape[-1]
        off = off.repeat_interleave(scale, 2).repeat_interleave(scale, 3).repeat(1, 3, 1, 1)
        rows.append(torch.cat([shown(x) for x in (*seen, 1 - 2 * off / off.max().clamp_min(1e-9))]))
    # one row per class and kind, one column per time
    n = len(labels)
    columns = torch.stack(rows)                               # (8, 4 kinds * n, H, W, 3)
    lines = [columns[:, kind * n + k] for k in range(n) for kind in range(4)]
    times = ", ".join(str(now) for now, _, _ in chosen)
    page.grid("denoising", TITLES["denoising"], f"From noise to image at times {times} of 1,000; "
              "four rows for each class: the noisy codes decoded, the image guessed without "
              "RefineNet, the image guessed with it, and how much it changed (black is the most; "
              f"coarse cells stay white). {DIVIDES if path == 'noise' else ''}Nothing in training "
              "asks that the rough guess be right where a correction follows: only their sum is "
              "judged. At which time is the class settled, and when the edges?", lines)


def hand_painted(n: int) -> Tensor:
    """bool (n, n): a diagonal band, as nobody's detail lies."""
    place = torch.arange(n)
    return (place[:, None] - place[None]).abs() <= max(0, n // 8)


def four_maps(page: Page, model: D2iT, count: int) -> None:
    n, device = model.dvae.cfg.side, model.dvae.limit.device
    labels = torch.arange(min(count, len(model.classes)), device=device)
    predicted = model.maps(labels, fixed(1))
    variants = [predicted, torch.zeros_like(predicted), torch.ones_like(predicted),
                hand_painted(n).to(device).expand_as(predicted)]
    rows = []
    for grain in variants:
        pixels = shown(model.decode(model.sample(labels, grain=grain, generator=fixed(2))))
        rows += [pixels, painted(pixels, grain)]
    page.grid("painted", TITLES["painted"], "The same noise and class in each column, and under "
              "each row its map: predicted; all coarse; all fine; painted by hand. Content follows "
              "the map as far as it was learned: a coarse cell has only ever been a flat one, so "
              "maps that no image has are questions that training never asked.", rows)


def sampled_maps(page: Page, model: D2iT, pixels: Tensor, labels: Tensor) -> None:
    """Mean map of held-out images, the mean of 100 drawn maps, and eight of these."""
    n, device, S = model.dvae.cfg.side, model.dvae.limit.device, model.dvae.cfg.cell_size
    true, rows = model.dvae.grain_of(on(model.dvae, pixels)).float().cpu(), []
    for label in range(min(6, len(model.classes))):
        drawn = model.maps(torch.full((100,), label, device=device), fixed(label)).float().cpu()
        mine = true[labels == label]
        mean = mine.mean(dim=0) if len(mine) else torch.zeros(n, n)
        rows.append(torch.cat([torch.stack([mean, drawn.mean(dim=0)]), drawn[:8]]))
    cells = [spread_to(row, S) for row in rows]
    names = ", ".join(model.classes[:len(rows)])
    page.grid("sampled", TITLES["sampled"], f"A class a row ({names}). First the mean map of "
              "held-out images and the mean of 100 drawn ones, which should look alike; then eight "
              "of those drawn. A network that always answered with the first would put the same "
              "haze under every image.", cells)


def spread_to(maps: Tensor, S: int) -> Tensor:
    """maps (m, n, n) from 0 to 1 -> dark to light gray images uint8 (m, n*S, n*S, 3)."""
    gray = (50 + 150 * maps).to(torch.uint8).repeat_interleave(S, 1).repeat_interleave(S, 2)
    return gray[..., None].expand(-1, -1, -1, 3)


def samples(page: Page, model: D2iT, per_class: int) -> None:
    labels = torch.arange(min(10, len(model.classes)), device=model.dvae.limit.device)
    scale = GUIDANCE
    images, grain = model.draw(labels.repeat_interleave(per_class), {"cfg_scale": scale}, 0, 0)
    rows = [row for pair in zip(images.split(per_class), painted(images, grain).split(per_class))
            for row in pair]
    page.grid("samples", TITLES["samples"], f"Guidance {scale:g}, 50 steps, two rows a class "
              f"({', '.join(model.classes[:len(labels)])}): images and the maps they were drawn "
              f"under. Maps obeyed: {model.obeyed(images, grain):.0%}; the maps of their "
              f"neighbours would be {model.obeyed(images, grain.roll(1, 0)):.0%}.", rows)


def compared(run: OpenRun, folders: list[str]) -> Iterator[tuple[str, DVAE]]:
    """The other runs' DVAEs, by policy and folder: two may have one policy.

    Raises UserError for one that holds out other images, or takes them in another size.
    """
    size = run.configs[0].image_size
    for folder in folders:
        other = open_run(folder, CONFIGS, "dvae.pt", "-m d2it.train")
        need_same_held_out(run, other)
        cfg = other.configs[0]
        need(cfg.image_size == size, f"{folder} takes images of {cfg.image_size} pixels, and "
             f"{run.folder} of {size}; compare runs of one size")
        yield f"{cfg.grain_policy} ({folder})", DVAE.load(os.path.join(folder, "dvae.pt"))


def main(args) -> None:
    need_one_process("d2it.explain")
    device = Processes(args.device).device
    # All that can be refused is refused before the first picture.
    run = open_run(args.run, CONFIGS, "dvae.pt", "-m d2it.train")
    model = D2iT.of_run(args.run, device)
    others = {name: other.to(device) for name, other in compared(run, args.against)}
    pixels, labels = held_out(run)
    few = pixels[:args.images]
    cfg = run.configs[0]
    unfinished = f"Unfinished: {model.unfinished}. " if model.unfinished else ""
    page = Page(args.out or os.path.join(args.run, "explain"), pixels.shape[1],
                f"What D²iT makes of {run.data.name}", f"{cfg.side} x {cfg.side} cells, threshold "
                f"{model.dvae.limit.item():.3f} nats, policy {cfg.grain_policy}. "
                f"{unfinished}Made by: python -m d2it.explain --run {shlex.quote(args.run)}")

    cells(page, model.dvae, pixels[:8])
    maps(page, model.dvae, few)
    reconstructions(page, model.dvae, few, others)
    latents(page, model.dvae, few)
    denoising(page, model, args.images)
    four_maps(page, model, args.images)
    sampled_maps(page, model, pixels, labels)
    samples(page, model, args.images)
    page.add(TITLES["training"], "Pixel error of the DVAE, nats per cell of the maps, error per "
             "code of the noise. Gray lines: a stage ends.", log_curves(args.run))
    print(f"open {os.path.join(page.folder, 'index.html')}")


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
