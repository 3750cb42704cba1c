"""What do the tokens mean? A page for a trained run: sections to change, then pictures.

Run      python explain.py --run runs/NAME
         python explain.py --run runs/NAME --against runs/OTHER
             also another run on the same images, say one with --tokenizer titok: its tokens under
             the same clicks, its bits per position
Makes    RUN/explain/index.html, or --out DIR: one file that needs no network
         beside it its pictures as PNG, and answers.json, the numbers of one of them
Exit     0 done, 1 failure, 2 user error

What a reader can change (evaluation/interactive.py):
  change           one token: what breaks, and what later experts recover
  prefix           the image from its first k tokens, with their bits
  look             where each expert looks
  write            the next token, three times; the AR model does the rest

What stands below, as pictures:
  token by token   the image after 1, 2, 4, ... L tokens, and what each step added
  attention        where each expert looks
  answers          token 1 of another image, and how the later experts answer to it
  swaps            token i of one image put into another
  codes            the favourite codes of a position, and images that share them
  sampling         an AR sample token by token, MaskGIT step by step, guidance from 1 upwards
  order            bits per position under the AR model beside the marginal entropy
  training         curves out of log.jsonl

Prefixes and samples are drawn by the flow decoder where the run has one, or as --decoder says.
Whatever compares two images of the decoder is the mean's: else two draws would differ by chance.
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import math
import os
import shlex

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import CONFIGS, GUIDANCE
from evaluation import interactive
from evaluation.intervention import intervene, interventions
from flow_decoder import Decoding
from generator import GENERATORS, Generator
from losses import mse
from nativetok import NativeTok, doubling, from_checkpoint
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.images import to_float, to_uint8
from plumbing.page import Page, opaque
from plumbing.plot import COLORS, Curve, log_curves, svg
from plumbing.processes import Processes, need_one_process
from plumbing.run import OpenRun, held_out, need_same_held_out, open_run
from plumbing.samples import add_decoder_flags
from quantizer import usage


def parse(argv=None):
    parser = Parser(prog="python explain.py", description=__doc__)
    parser.add_argument("--run", required=True,
                        help="folder of a run of train.py, with a finished tokenizer")
    parser.add_argument("--against", metavar="RUN",
                        help="another run on the same images: its tokens under the same clicks, "
                             "its bits in the order picture")
    parser.add_argument("--images", type=number(int, 2), default=6, metavar="N",
                        help="images in each picture (default: 6)")
    parser.add_argument("--out", metavar="DIR", help="folder for the page (default: RUN/explain)")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="where to compute")
    add_decoder_flags(parser)
    return parser.parse_args(argv)


def wrapped(cells: Tensor, columns: int) -> list[Tensor]:
    """uint8 images (n, H, W, 3) -> rows (columns, H, W, 4), the last one filled up."""
    return list(filled(cells, -len(cells) % columns).split(columns))


def even(n: int, most: int) -> int:
    """n cells in as few rows of at most `most` as can be, all of them about equally long."""
    return math.ceil(n / math.ceil(n / most))


def filled(cells: Tensor, missing: int) -> Tensor:
    """uint8 images (n, H, W, 3) and as many transparent ones as are missing: (.., H, W, 4)."""
    return F.pad(opaque(cells), (0, 0) * 3 + (0, missing))


def difference(images: Tensor, before: Tensor) -> Tensor:
    """uint8 images, both of one shape: gray where they are the same."""
    return (images.int() - before.int() + 128).clamp(0, 255).to(torch.uint8)


def decode(model: NativeTok, ids: Tensor) -> Tensor:
    """ids (B, k) -> uint8 (B, H, W, 3) on the CPU."""
    return to_uint8(model.decode(ids)).cpu()


# ------------------------------------------------------------------------------------------------
# the tokenizer

TOKENS = """Each row: a held-out image, then what the decoder makes of its first {ks} tokens.
Look for what comes first: colours and place before outlines."""
ADDED = """The same images: the original, the first step, then each further step minus the one
before; gray is no change, bright is lighter, dark is darker. Late tokens that stay gray are hardly
used."""


def token_by_token(page: Page, model: NativeTok, draw: Decoding, images: Tensor,
                   ids: Tensor) -> None:
    ks, rows, changes = doubling(model.num_tokens), [], []
    drawn = torch.stack([interactive.drawn(draw, ids[:len(images), :k]) for k in ks], dim=1)
    for image, one, shown in zip(images, ids, drawn):
        steps = torch.cat([decode(model, one[None, :k]) for k in ks])         # (P, H, W, 3)
        rows.append(torch.cat([image[None], shown]))
        added = difference(steps[1:], steps[:-1])
        changes.append(torch.cat([image[None], steps[:1], added]))
    page.grid("tokens", "Token by token", TOKENS.format(ks=", ".join(map(str, ks))), rows)
    page.grid("added", "What each step added", ADDED, changes)


ATTENTION = """Experts 1 to {L}, from left to right, {columns} to a block. First row of a block:
attention over the patches, averaged over {n} images and all heads. Below: for single images, bright
where the expert looks. A map that is the same in every row asks for a fixed place; one that moves
follows what is in the image. The rest of their attention goes to earlier tokens and to the query
itself: {first:.0%} at expert 1, {last:.0%} at expert {L}."""


def attention(page: Page, model: NativeTok, images: Tensor, x: Tensor) -> None:
    """The last layer of each expert over the patches, mean of its heads: over all of x, then of
    single images."""
    side = model.cfg.image_size // model.cfg.patch_size
    last_layers = [a[..., :side * side]                                       # L x (B, heads, N)
                   for a in interactive.attention_of(model, x)]
    maps = torch.stack([a.mean(dim=1) for a in last_layers], dim=1).cpu()     # (B, L, N)
    on_tokens = [1 - a.sum(dim=-1).mean().item() for a in last_layers]

    def shown(maps, under):
        """(L, N) -> uint8 (L, H, W, 3): `under`, bright where the expert looks."""
        scaled = maps / maps.amax(dim=1, keepdim=True).clamp_min(1e-9)
        mask = F.interpolate(scaled.view(-1, 1, side, side), size=under.shape[:2], mode="nearest")
        mask = mask.permute(0, 2, 3, 1)                                       # (L, H, W, 1)
        return (under.float() * (0.15 + 0.85 * mask)).to(torch.uint8)
    columns = even(model.num_tokens, 12)
    pictures = [shown(maps.mean(dim=0), torch.full_like(images[0], 255))]
    pictures += [shown(maps[i], images[i]) for i in range(min(4, len(images)))]
    blocks = list(zip(*(wrapped(row, columns) for row in pictures)))          # one per 12 experts
    blank = torch.zeros_like(blocks[0][0])                                    # transparent
    rows = [row for block in blocks for row in (*block, blank)][:-1]
    caption = ATTENTION.format(L=model.num_tokens, columns=columns, n=len(x), first=on_tokens[0],
                               last=on_tokens[-1])
    page.grid("attention", "Where each expert looks", caption, rows)


ANSWERS = """Each row: a held-out image, its reconstruction, another image. Then token 1 is
swapped for that of the other image: first alone, then with the later experts re-encoding. Beside
both stands the difference from the reconstruction; gray is none. {meaning} PSNR over {n} held-out
images: {original:.2f} dB unchanged; {each}. The rows are the images that the swap damages most."""
NATIVE = """Each expert reads the tokens before its own, so later tokens correct what the first gets
wrong: this is native order."""
UNORDERED = """Here no token changes: {name} chooses all its tokens at once, and none reads
another."""
EACH = """token {position} swapped {broken:.2f}, re-encoded {answered:.2f} ({later_ids_changed:.0%}
of the later tokens changed)"""


def answers(page: Page, model: NativeTok, pixels: Tensor, ids: Tensor, rows: int) -> dict:
    """Token 1 of another image; the numbers are those of all pixels, which are one batch.

    -> the row of interventions() for token 1
    """
    name, others = model.cfg.tokenizer, ids.roll(1, dims=0)
    meaning = NATIVE if name == "nativetok" else UNORDERED.format(name=name)
    measured = interventions(model, pixels)
    unfinished = {"unfinished": model.unfinished} if model.unfinished else {}
    checkpoint.write_json(os.path.join(page.folder, "answers.json"),
                          {"images": len(pixels), **unfinished, "rows": measured})
    each = [EACH.format(**row) for row in measured[:-1]]  # nobody comes after the last token
    caption = ANSWERS.format(meaning=meaning, n=len(pixels), original=measured[0]["original"],
                             each="; ".join(each))

    x = to_float(pixels).to(ids.device)
    broken, answered = (decode(model, changed) for changed in
                        intervene(model, x, ids, 1, others[:, 0]))
    whole = decode(model, ids)                                                # (n, H, W, 3)
    worst = mse(to_float(broken), to_float(whole)).topk(min(rows, len(pixels))).indices
    cells = [pixels, whole, pixels.roll(1, dims=0), broken, difference(broken, whole),
             answered, difference(answered, whole)]
    rows = list(torch.stack([cell[worst] for cell in cells], dim=1))
    page.grid("answers", "Later experts re-encode", caption, rows)
    return measured[0]


SWAPS = """Two images, read like text: an image, its reconstruction, another image; then the first
one's reconstruction with token 1, 2, ... {L} swapped for the other's. What changes is what that
token encodes. The other tokens are kept; no expert re-encodes here."""


def swaps(page: Page, model: NativeTok, images: Tensor, ids: Tensor) -> None:
    rows, places = [], torch.arange(model.num_tokens)
    for a, b in ((0, 1), (1, 0)):
        mixed = ids[a].repeat(model.num_tokens, 1)
        mixed[places, places] = ids[b]
        one, other = images[a:a + 1], images[b:b + 1]
        cells = [one, decode(model, ids[a:a + 1]), other, decode(model, mixed)]
        rows += wrapped(torch.cat(cells), even(model.num_tokens + 3, 10))
    page.grid("swaps", "One token from another image", SWAPS.format(L=model.num_tokens), rows)


CODES = """For positions {places}: the two codes that occur there most often, a row for each, with
held-out images that have this code at this position. What do the images of a row share?"""


def favourite_codes(page: Page, model: NativeTok, pixels: Tensor, ids: Tensor) -> None:
    L, columns, rows = model.num_tokens, 8, []
    positions = sorted({0, min(1, L - 1), L // 2, L - 1})
    for position in positions:
        counts = torch.bincount(ids[:, position], minlength=model.cfg.codebook_size)
        for code in counts.topk(min(2, len(counts))).indices.tolist():
            members = (ids[:, position] == code).nonzero()[:columns, 0]
            rows.append(filled(pixels[members.cpu()], columns - len(members)))
    places = ", ".join(str(position + 1) for position in positions)
    page.grid("codes", "Favourite codes", CODES.format(places=places), rows)


# ------------------------------------------------------------------------------------------------
# the generators

def first_labels(model: NativeTok, classes: list[str]) -> tuple[Tensor, str]:
    """Up to six classes, as labels and by name."""
    labels = torch.arange(min(6, len(classes)), device=model.quantizer.codebook.device)
    return labels, ", ".join(classes[:len(labels)])


AR = """Classes {names}, guidance {scale:g}: what the decoder makes of the first {ks} tokens, each
drawn after those before it."""


def ar_growing(page: Page, model: NativeTok, draw: Decoding, ar: Generator) -> None:
    ks, (labels, names) = doubling(model.num_tokens), first_labels(model, ar.classes)
    scale, noise = GUIDANCE, torch.Generator().manual_seed(0)
    ids = ar.sample(labels, cfg_scale=scale, generator=noise)
    rows = list(torch.stack([interactive.drawn(draw, ids[:, :k]) for k in ks], dim=1))
    caption = AR.format(names=names, scale=scale, ks=", ".join(map(str, ks)))
    page.grid("ar", "An AR sample, token by token", caption, rows)


MASKGIT = """Classes {names}, {steps} steps. The strip below each picture has one square per token,
light when it is known, black while it is masked. The decoder cannot show a token that has not been
chosen, so the picture is the final one, and the more of it is masked, the more it is gray."""


def maskgit_steps(page: Page, model: NativeTok, maskgit: Generator) -> None:
    """Tokens still masked are shown as black squares in a strip under the picture."""
    trace, (labels, names) = [], first_labels(model, maskgit.classes)
    final = maskgit.sample(labels, cfg_scale=GUIDANCE, trace=trace,
                           generator=torch.Generator().manual_seed(0))
    rows, size = [], model.cfg.image_size
    for i in range(len(labels)):
        cells = []
        for ids in trace:
            known = ids[i] != maskgit.mask_id
            # The decoder knows no mask: a masked position borrows what it says in the end.
            picture = decode(model, torch.where(known, ids[i], final[i])[None])[0]
            share = 0.25 + 0.75 * known.float().mean().item()
            picture = (picture.float() * share + 128 * (1 - share)).to(torch.uint8)
            strip = torch.where(known.cpu(), 200, 0).float().view(1, 1, 1, -1)
            strip = F.interpolate(strip, size=(max(2, size // 8), size), mode="nearest")[0, 0]
            strip = strip.to(torch.uint8)[..., None].expand(-1, -1, 3)
            cells.append(torch.cat([picture, strip]))
        rows.append(torch.stack(cells))
    caption = MASKGIT.format(names=names, steps=len(trace))
    page.grid("maskgit", "MaskGIT, step by step", caption, rows)


GUIDED = """The same noise under guidance {scales}, one class per row ({names}). More guidance:
more typical, less varied."""


def guidance(page: Page, model: NativeTok, draw: Decoding, ar: Generator) -> None:
    scales, (labels, names) = (1.0, 1.5, 2.0, 3.0, 5.0), first_labels(model, ar.classes)
    columns = []
    for scale in scales:
        noise = torch.Generator().manual_seed(1)
        ids = ar.sample(labels, cfg_scale=scale, generator=noise)
        columns.append(interactive.drawn(draw, ids))
    caption = GUIDED.format(scales=", ".join(f"{s:g}" for s in scales), names=names)
    page.grid("guidance", "Guidance", caption, list(torch.stack(columns, dim=1)))


# ------------------------------------------------------------------------------------------------
# curves

def bits_per_position(model: NativeTok, ar: Generator, ids: Tensor,
                      labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """-> bits of each position under the AR model, and its marginal entropy: what is left to know
    without looking at others."""
    bits = torch.cat([interactive.bits_of_tokens(ar, i, y)
                      for i, y in zip(ids.split(250), labels.split(250))]).mean(dim=0)
    _, perplexity = usage(ids, model.cfg.codebook_size)
    return bits.cpu().numpy(), perplexity.log2().cpu().numpy()


ORDER = """Bits that the AR model needs for each token of {n} held-out images, given the class and
the tokens before it, against the entropy of the position by itself. With {K} codes, {bits:g} bits a
token is guessing. The gap between the two is what the order and the class explain.
The marginal entropy of few images is too small where a position uses many codes, so the gap is a
lower bound."""
OVER = """ Nothing can be read from it for {names}: there the model needs more bits than the
marginal has, so it knows its training images by heart, or too few are held out."""


NO_LABELS = """Left out: the held-out images have no labels of the classes that were learned, and
the bits of a token are counted given the class."""


def order(page: Page, measured: list[tuple[str, np.ndarray, np.ndarray]], n: int, K: int) -> None:
    """measured: name, bits and marginal entropy by position, of each run; K codes."""
    curves, over = [], []
    for color, (name, bits, marginal) in zip(COLORS, measured):
        place = list(range(1, len(bits) + 1))
        curves += [Curve(f"{name}: marginal entropy, {marginal.sum():.0f} bits in all", place,
                         marginal.tolist(), color, dashed=True),
                   Curve(f"{name}: under the AR model, {bits.sum():.0f} bits in all", place,
                         bits.tolist(), color)]
        if bits.sum() > marginal.sum():
            over.append(name)
    caption = ORDER.format(n=n, K=K, bits=round(math.log2(K), 2))
    caption += OVER.format(names=", ".join(over)) if over else ""
    page.add("What order explains", caption, svg(curves, "position", "bits"))


TRAINING = """Pixel error of the tokenizer's phases, then the generators' losses (nats a token;
MaskGIT's counts masked tokens, so the two cannot be compared). Gray lines: a phase ends."""


# ------------------------------------------------------------------------------------------------

def encoded(model: NativeTok, pixels: Tensor) -> Tensor:
    device = model.quantizer.codebook.device
    return torch.cat([model.encode(to_float(part.to(device))) for part in pixels.split(250)])


def opened(folder: str, device: torch.device) -> tuple[OpenRun, NativeTok, dict]:
    """A run, its tokenizer, and its generators by kind, as many as there are."""
    run = open_run(folder, CONFIGS)
    model = from_checkpoint(run.saved, os.path.join(folder, "tokenizer.pt")).to(device)
    generators = {kind: Generator.of_run(folder, kind, model, device) for kind in GENERATORS
                  if checkpoint.exists(os.path.join(folder, f"generator-{kind}.pt"))}
    return run, model, generators


def bits_of(model: NativeTok, ar: Generator, ids: Tensor, labels: Tensor) -> tuple:
    """-> the tokenizer's name, bits and marginal entropy by position."""
    return model.cfg.tokenizer, *bits_per_position(model, ar, ids, labels.to(ids.device))


def main(args) -> None:
    need_one_process("explain.py")
    device = Processes(args.device).device
    # All that can be refused is refused before the first picture.
    run, model, generators = opened(args.run, device)
    draw = Decoding.of_run(args.run, model, args.decoder, args.flow_steps)
    val = run.val
    need(len(val) >= 2,
         f"{val.name} has a single held-out image, and tokens are swapped between two; train on "
         "more pictures, of which a tenth is held out, or give train.py --val_data")
    if args.against:
        other, other_model, other_generators = opened(args.against, device)
        need_same_held_out(run, other)
        need("ar" in other_generators, f"{args.against} has no ar generator, whose bits are to be "
             "compared; train it, or leave --against out")
    name = os.path.basename(os.path.abspath(args.run))
    shown = [draw, *generators.values()]
    if args.against:
        shown += [other_model, other_generators["ar"]]
    parts = [network.unfinished for network in shown if network.unfinished]
    unfinished = f"Unfinished: {'; '.join(parts)}. " if parts else ""
    how = "Prefixes and samples are drawn by the flow decoder. " if draw.flow else ""
    intro = (f"{model.cfg.tokenizer}, {model.num_tokens} tokens of {model.cfg.codebook_size} "
             f"codes, images held out of {val.name}. "
             f"{unfinished}{how}Made by: python explain.py --run {shlex.quote(args.run)}")
    page = Page(args.out or os.path.join(args.run, "explain"), model.cfg.image_size,
                f"What the tokens of {name} mean", intro)
    pixels, labels = held_out(run)
    ids, images = encoded(model, pixels), pixels[:args.images]

    labelled = val.classes == run.data.classes  # a flat folder's labels say nothing

    token_by_token(page, model, draw, images, ids)
    if model.cfg.tokenizer == "nativetok":
        attention(page, model, images, to_float(pixels[:64].to(device)))
    token_1 = answers(page, model, pixels[:250], ids[:250], args.images)
    models, all_ids = [model], [ids[:250]]
    if args.against and other_model.num_tokens == model.num_tokens:  # a chip for each, in both
        models.append(other_model)
        all_ids.append(encoded(other_model, pixels[:250]))
    interactive.sections(page, models, draw, pixels[:250], all_ids, token_1, generators.get("ar"),
                         labels if labelled else None)
    swaps(page, model, images, ids)
    favourite_codes(page, model, pixels, ids)

    for kind in GENERATORS:
        if kind not in generators:
            print(f"no {kind} generator in {args.run}; its pictures are left out")
    measured = []
    if "ar" in generators:
        ar_growing(page, model, draw, generators["ar"])
        guidance(page, model, draw, generators["ar"])
        if labelled:
            measured.append(bits_of(model, generators["ar"], ids, labels))
    if "maskgit" in generators:
        maskgit_steps(page, model, generators["maskgit"])
    if args.against and labelled:
        other_pixels, other_labels = held_out(other)
        other_ids = encoded(other_model, other_pixels)
        measured.append(bits_of(other_model, other_generators["ar"], other_ids, other_labels))
    if measured:
        order(page, measured, len(ids), model.cfg.codebook_size)
    elif not labelled:
        page.add("What order explains", NO_LABELS, "")
    page.add("Training", TRAINING, log_curves(args.run))
    print(f"open {os.path.join(page.folder, 'index.html')}")


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
