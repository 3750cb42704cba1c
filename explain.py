"""What do the tokens mean? Pictures for a trained run, and a page that shows them.

Run      python explain.py --run runs/NAME                        -> runs/NAME/explain/index.html, needs no network
         python explain.py --run runs/NAME --against runs/OTHER   also bits per position of another run, say with --tokenizer titok
Shows    token by token   the image after 1, 2, 4, ... L tokens, and what each step added
         attention        where each expert looks
         swaps            token i of one image put into another
         codes            the favourite codes of a position, and images that share them
         sampling         an AR sample token by token, MaskGIT step by step, guidance from 1 upwards
         order            bits per position under the AR model beside the marginal entropy       (with matplotlib)
         training         curves out of log.jsonl                                                (with matplotlib)
Exit     0 done, 1 failure, 2 something to mend
"""
import html
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import CONFIGS
from generator import Generator
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.batches import eval_batches
from plumbing.datasets import ImageSet, train_and_val
from plumbing.flags import Parser, build, main_with_user_errors, need, read_run
from plumbing.images import save_grid, to_float, to_uint8
from plumbing.processes import Processes, need_room
from quantizer import usage


def parse(argv=None):
    parser = Parser(prog="explain.py", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a run of train.py, with a finished tokenizer")
    parser.add_argument("--against", metavar="RUN", help="another run on the same images, for the order picture")
    parser.add_argument("--images", type=int, default=6, help="images in each picture (default: 6)")
    parser.add_argument("--out", help="folder for the page (default: RUN/explain)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    args = parser.parse_args(argv)
    need(args.images >= 2, "images must be at least 2, to swap tokens between them")
    return args


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}
img{{max-width:100%;height:auto;display:block;border:1px solid #ddd}} figure{{margin:1.5rem 0 3rem}} figcaption{{margin:.5rem 0}}
h2{{margin:2rem 0 .5rem}} code{{background:#f3f3f3;overflow-wrap:anywhere}}</style>
<h1>{title}</h1><p>{intro}</p>{figures}</html>
"""


class Page:
    """Pictures with captions, and in the end the HTML that shows them."""

    def __init__(self, folder: str, size: int):
        need_room(folder)
        self.folder, self.scale, self.figures = folder, max(1, 64 // size), []

    def grid(self, name: str, title: str, caption: str, rows: list[Tensor]) -> None:
        """rows of uint8 images (n, H, W, 3), all with the same n."""
        save_grid(torch.cat(rows), os.path.join(self.folder, f"{name}.png"), columns=len(rows[0]), scale=self.scale)
        self.add(name, title, caption)

    def plot(self, name: str, title: str, caption: str, draw) -> None:
        """draw(matplotlib axes); without matplotlib the page says so."""
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            print(f"{name}: needs matplotlib (pip install matplotlib); left out")
            return self.figures.append(f"<h2>{html.escape(title)}</h2><p>Left out: this curve needs matplotlib (<code>pip install matplotlib</code>).</p>")
        figure, axes = plt.subplots(figsize=(8.5, 4), constrained_layout=True)
        draw(axes)
        with checkpoint.replacing(os.path.join(self.folder, f"{name}.png")) as file:
            figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
        self.add(name, title, caption)

    def add(self, name: str, title: str, caption: str) -> None:
        self.figures.append(f'<h2>{html.escape(title)}</h2><figure><img src="{name}.png" alt="{html.escape(title)}"><figcaption>{html.escape(caption)}</figcaption></figure>')
        print(f"{os.path.join(self.folder, name)}.png: {title}")

    def write(self, title: str, intro: str) -> None:
        with checkpoint.replacing(os.path.join(self.folder, "index.html")) as file:
            file.write(PAGE.format(title=html.escape(title), intro=html.escape(intro), figures="\n".join(self.figures)).encode())


def wrapped(cells: Tensor, columns: int) -> list[Tensor]:
    """uint8 images (n, H, W, 3) -> rows of `columns` images, the last filled up with white: n in one row would be too small to see."""
    missing = -len(cells) % columns
    return list(torch.cat([cells, torch.full((missing, *cells.shape[1:]), 255, dtype=torch.uint8)]).split(columns))


def prefixes(L: int) -> list[int]:
    return sorted({*(2 ** i for i in range(L.bit_length())), L})


def decode(model: NativeTok, ids: Tensor) -> Tensor:
    """ids (B, k) -> uint8 (B, H, W, 3) on the CPU."""
    return to_uint8(model.decode(ids)).cpu()


# ------------------------------------------------------------------------------------------------
# the tokenizer

def token_by_token(page: Page, model: NativeTok, images: Tensor, ids: Tensor) -> None:
    ks, rows = prefixes(model.num_tokens), []
    for image, one in zip(images, ids):
        steps = torch.cat([decode(model, one[None, :k]) for k in ks])         # (P, H, W, 3)
        rows.append(torch.cat([image[None], steps]))
    page.grid("tokens", "Token by token", f"Each row: a held-out image, then what the decoder makes of its first {', '.join(map(str, ks))} tokens. "
              "Look for what comes first: colours and place before outlines.", rows)
    changes = []
    for row in rows:
        steps = row[1:].int()
        added = ((steps[1:] - steps[:-1]) + 128).clamp(0, 255).to(torch.uint8)
        changes.append(torch.cat([row[:1], row[1:2], added]))
    page.grid("added", "What each step added", "The same images: the original, the first step, then each further step minus the one before; gray is no change, "
              "bright is lighter, dark is darker. Late tokens that stay gray are hardly used.", changes)


def attention(page: Page, model: NativeTok, images: Tensor, x: Tensor) -> None:
    """The last layer of each expert over the patches, mean of its heads: over all of x, and for the first image."""
    trace, side = [], model.cfg.image_size // model.cfg.patch_size
    with torch.no_grad():
        model.mocet.forward_loop(model.mit(x), model.quantizer, trace)
    depth = model.cfg.expert_depth
    maps = torch.stack([a[..., :side * side].mean(dim=1) for a in trace[depth - 1::depth]], dim=1).cpu()      # (B, L, N)
    on_tokens = [1 - a[..., :side * side].sum(dim=-1).mean().item() for a in trace[depth - 1::depth]]

    def shown(maps, under):
        """(L, N) -> uint8 (L, H, W, 3): `under`, bright where the expert looks."""
        scaled = maps / maps.amax(dim=1, keepdim=True).clamp_min(1e-9)
        # (L, 1, H, W)
        mask = F.interpolate(scaled.view(-1, 1, side, side), size=under.shape[:2], mode="nearest")
        return (under.float() * (0.15 + 0.85 * mask.permute(0, 2, 3, 1))).to(torch.uint8)
    white, L, columns = torch.full_like(images[0], 255), model.num_tokens, 12
    looks = [shown(maps.mean(dim=0), white), *(shown(maps[i], images[i]) for i in range(min(4, len(images))))]
    blocks = list(zip(*(wrapped(row, columns) for row in looks)))             # one per 12 experts
    blank = torch.full_like(torch.cat([white[None]] * columns), 255)
    rows = [row for block in blocks for row in (*block, blank)][:-1]
    page.grid("attention", "Where each expert looks", f"Experts 1 to {L}, from left to right, {columns} to a block. First row of a block: attention over the patches, averaged over {len(x)} images and all heads. "
              "Below: for single images, bright where the expert looks. A map that is the same in every row asks for a fixed place; one that moves follows what is in the image. "
              f"The rest of their attention goes to earlier tokens and to the query itself: {on_tokens[0]:.0%} at expert 1, {on_tokens[-1]:.0%} at expert {L}.", rows)


def swaps(page: Page, model: NativeTok, images: Tensor, ids: Tensor) -> None:
    rows = []
    for a, b in ((0, 1), (1, 0)):
        mixed = ids[a].repeat(model.num_tokens, 1)
        places = torch.arange(model.num_tokens)
        mixed[places, places] = ids[b]
        rows += wrapped(torch.cat([images[a:a + 1], decode(model, ids[a:a + 1]), images[b:b + 1], decode(model, mixed)]), 9)
    page.grid("swaps", "One token from another image", f"Twice, read like text: an image, its reconstruction, another image; then the first one's reconstruction with token 1, 2, ... {model.num_tokens} "
              "taken from the other. What changes is what that position says. Positions after it were chosen with the old token in view, so the picture can fall apart.", rows)


def favourite_codes(page: Page, model: NativeTok, pixels: Tensor, ids: Tensor, columns: int = 8) -> None:
    rows = []
    for position in sorted({0, 1, model.num_tokens // 2, model.num_tokens - 1}):
        counts = torch.bincount(ids[:, position], minlength=model.cfg.codebook_size)
        for code in counts.topk(2).indices.tolist():
            members = (ids[:, position] == code).nonzero()[:columns, 0]
            cells = pixels[members.cpu()]
            rows.append(torch.cat([cells, torch.full((columns - len(cells), *cells.shape[1:]), 255, dtype=torch.uint8)]))
    page.grid("codes", "Favourite codes", f"For positions 1, 2, {model.num_tokens // 2 + 1} and {model.num_tokens}: the two codes that each says most often, two rows a position; "
              "each row shows held-out images for which it says that code. What do the images of a row share?", rows)


# ------------------------------------------------------------------------------------------------
# the generators

def ar_growing(page: Page, model: NativeTok, ar, classes: list[str]) -> None:
    ks, labels = prefixes(model.num_tokens), torch.arange(min(6, len(classes)), device=model.quantizer.codebook.device)
    ids = ar.sample(labels, cfg_scale=2.0, generator=torch.Generator().manual_seed(0))
    page.grid("ar", "An AR sample, token by token", f"Classes {', '.join(classes[:len(labels)])}, guidance 2: what the decoder makes of the first {', '.join(map(str, ks))} tokens, "
              "each drawn after those before it.", list(torch.stack([decode(model, ids[:, :k]) for k in ks], dim=1)))


def maskgit_steps(page: Page, model: NativeTok, maskgit, classes: list[str]) -> None:
    """Tokens still masked are shown as black squares in a strip under the picture."""
    trace = []
    labels = torch.arange(min(6, len(classes)), device=model.quantizer.codebook.device)
    final = maskgit.sample(labels, cfg_scale=2.0, generator=torch.Generator().manual_seed(0), trace=trace)
    rows, size = [], model.cfg.image_size
    for i in range(len(labels)):
        cells = []
        for ids in trace:
            known = ids[i] != maskgit.mask_id
            # The decoder knows no mask, so a masked position borrows what the sample says there in the end.
            picture = decode(model, torch.where(known, ids[i], final[i])[None])[0]
            strip = torch.where(known.cpu(), 200, 0).to(torch.uint8)
            strip = F.interpolate(strip.float().view(1, 1, 1, -1), size=(max(2, size // 8), size), mode="nearest")[0, 0]
            dim = 0.25 + 0.75 * known.float().mean().item()
            cells.append(torch.cat([(picture.float() * dim + 255 * (1 - dim)).to(torch.uint8), strip[..., None].expand(-1, -1, 3).to(torch.uint8)]))
        rows.append(torch.stack(cells))
    page.grid("maskgit", "MaskGIT, step by step", f"Classes {', '.join(classes[:len(labels)])}, {len(trace)} steps. The strip below each picture has one square per token, gray when it is known, black while it is "
              "masked. The picture is the final one, the paler the more of it is still masked: a decoder cannot show a token that has not been chosen.", rows)


def guidance(page: Page, model: NativeTok, ar, classes: list[str]) -> None:
    scales, labels = (1.0, 1.5, 2.0, 3.0, 5.0), torch.arange(min(6, len(classes)), device=model.quantizer.codebook.device)
    samples = [decode(model, ar.sample(labels, cfg_scale=s, generator=torch.Generator().manual_seed(1))) for s in scales]
    page.grid("guidance", "Guidance", f"The same noise under guidance {', '.join(f'{s:g}' for s in scales)}, one class per row ({', '.join(classes[:len(labels)])}). More guidance: more typical, less varied.",
              list(torch.stack(samples, dim=1)))


@torch.no_grad()
def bits_per_position(model: NativeTok, ar, ids: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """-> bits of each position under the AR model, and its marginal entropy: what is left to know without looking at others."""
    nll = torch.stack([ar.loss(i, y)[1]["nll_by_position"] * len(i) for i, y in zip(ids.split(250), labels.split(250))]).sum(dim=0) / len(ids)
    _, perplexity = usage(ids, model.cfg.codebook_size)
    return nll.cpu().numpy() / math.log(2), perplexity.log2().cpu().numpy()


def order(page: Page, found: list[tuple[str, np.ndarray, np.ndarray]], n: int) -> None:
    def draw(axes):
        for k, (name, bits, marginal) in enumerate(found):
            place = np.arange(1, len(bits) + 1)
            axes.plot(place, marginal, "--", color=f"C{k}", label=f"{name}: marginal entropy, {marginal.sum():.0f} bits in all")
            axes.plot(place, bits, "o-", color=f"C{k}", label=f"{name}: under the AR model, {bits.sum():.0f} bits in all")
        axes.set_xlabel("position"), axes.set_ylabel("bits"), axes.set_ylim(bottom=0), axes.grid(alpha=0.3), axes.legend(fontsize=8)
    over = [name for name, bits, marginal in found if bits.sum() > marginal.sum()]
    page.plot("order", "What order explains", f"Bits needed for each token of {n} held-out images, given the class and the tokens before it, against the entropy of the position by itself. "
              "The gap is what the order and the class explain. The marginal entropy of few images is too small where a position uses many codes, so the gap is a lower bound. " +
              (f"Nothing can be read from it for {', '.join(over)}: there the model needs more bits than the marginal has, so it knows its training images by heart, or too few are held out." if over else ""), draw)


def training(page: Page, folder: str) -> None:
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as log:
        rows = [row for row in map(json.loads, log) if "loss" in row]
    phases = list(dict.fromkeys(row["phase"] for row in rows))

    def draw(axes):
        offset = 0
        for phase in phases:
            mine = [row for row in rows if row["phase"] == phase]
            key = "pixels" if "pixels" in mine[0] else "loss"
            axes.plot([offset + row["step"] for row in mine], [row[key] for row in mine], label=f"{phase} ({key})")
            offset += mine[-1]["step"]
            axes.axvline(offset, color="0.8", lw=0.8)
        axes.set_yscale("log"), axes.set_xlabel("steps, phase after phase"), axes.legend(fontsize=8), axes.grid(alpha=0.3)
    page.plot("training", "Training", "Pixel error of the tokenizer's phases, then the generators' losses (nats a token; MaskGIT's counts masked tokens, so the two cannot be compared). "
              "Gray lines: a phase ends.", draw)


# ------------------------------------------------------------------------------------------------

def held_out(folder: str, limit: int = 1000) -> tuple[ImageSet, Tensor, Tensor]:
    """-> the run's held-out images: the data set, uint8 (n, H, W, 3), labels (n,)."""
    values = read_run(folder)
    values.pop("preset")
    tok, _, train = build(CONFIGS, values)
    _, val = train_and_val(train.data, train.val_data, train.holdout, train.seed, folder)
    indices = np.random.default_rng(0).permutation(len(val))[:limit]
    pairs = list(eval_batches(val, tok.image_size, 250, indices))
    return val, torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


def encoded(model: NativeTok, pixels: Tensor) -> Tensor:
    return torch.cat([model.encode(to_float(part.to(model.quantizer.codebook.device))) for part in pixels.split(250)])


def main(args) -> None:
    device = Processes(args.device).device
    model = NativeTok.of_run(args.run, device)
    val, pixels, labels = held_out(args.run)
    ids, images = encoded(model, pixels), pixels[:args.images]
    need(len(images) >= 2, f"{val.name} has a single held-out image, and tokens are swapped between two")
    page = Page(args.out or os.path.join(args.run, "explain"), model.cfg.image_size)

    token_by_token(page, model, images, ids)
    if model.cfg.tokenizer == "nativetok":
        attention(page, model, images, to_float(pixels[:64].to(device)))
    swaps(page, model, images, ids)
    favourite_codes(page, model, pixels, ids)
    found = []
    for kind in ("ar", "maskgit"):
        if not checkpoint.exists(os.path.join(args.run, f"generator-{kind}.pt")):
            print(f"no {kind} generator in {args.run}; its pictures are left out")
            continue
        generator = Generator.of_run(args.run, kind, model, device)
        if kind == "maskgit":
            maskgit_steps(page, model, generator, generator.classes)
        else:
            ar_growing(page, model, generator, generator.classes)
            guidance(page, model, generator, generator.classes)
            found.append((model.cfg.tokenizer, *bits_per_position(model, generator, ids, labels.to(device))))
    if args.against:
        other = NativeTok.of_run(args.against, device)
        other_val, other_pixels, other_labels = held_out(args.against)
        need(other_val.fingerprint == val.fingerprint, f"{args.against} holds out other images than {args.run}; train both on the same data")
        ar = Generator.of_run(args.against, "ar", other, device)
        found.append((other.cfg.tokenizer, *bits_per_position(other, ar, encoded(other, other_pixels), other_labels.to(device))))
    if found:
        order(page, found, len(ids))
    training(page, args.run)
    name = os.path.basename(os.path.abspath(args.run))
    page.write(f"What the tokens of {name} mean", f"{model.cfg.tokenizer}, {model.num_tokens} tokens of {model.cfg.codebook_size} codes, images held out of {val.name}. "
               f"Made by: python explain.py --run {args.run}")
    print(f"open {os.path.join(page.folder, 'index.html')}")


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
