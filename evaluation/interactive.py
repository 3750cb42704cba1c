"""The sections of explain.py's page that a reader can change: all that they can show, computed.

    change   token i of an image becomes another image's: broken, and re-encoded by later experts
    prefix   the first k tokens decoded, k = 1 .. L, and what they cost in bits
    look     what each expert attends to: patches, and the tokens before its own
    write    the AR model's likeliest next tokens, three times, and samples that finish them

In       a tokenizer, held-out images, an AR model if there is one
Out      sections of a Page: HTML, plain values for plumbing/page.js, tiles
"""
import base64
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from config import GUIDANCE
from evaluation.intervention import errors, intervene
from flow_decoder import Decoding
from generator import ARGenerator, sample_from
from layers import eval_mode
from losses import to_db
from nativetok import NativeTok
from plumbing.images import to_float, to_uint8
from plumbing.page import Page

PICTURES = 800   # the most of the section "change"; longer tokenizers show fewer images and donors
CHOICES = 5      # likeliest tokens that a reader chooses from
DEPTH = 3        # how many times


def drawn(draw: Decoding, ids: Tensor) -> Tensor:
    """ids (B, k) -> uint8 (B, H, W, 3) on the CPU; image b of a batch from the same noise for any
    k."""
    return to_uint8(draw(ids, torch.Generator().manual_seed(0))).cpu()


def tiles_of(page: Page, model: NativeTok, ids: Tensor) -> list[int]:
    """ids (B, k) -> B tile numbers of what the decoder makes of them."""
    return page.sheet.add(to_uint8(model.decode(ids)))


def dB_of(model: NativeTok, ids: Tensor, x: Tensor) -> list[float]:
    """PSNR of each image x (B, 3, H, W) decoded from ids (B, k), in 8-bit RGB; at most 99."""
    return [round(min(dB, 99), 2) for dB in to_db(errors(model, ids, x)).tolist()]


def extent(L: int) -> tuple[int, int]:
    """-> images, donors for each of their tokens: two pictures for each, PICTURES in all."""
    donors = 3 if L <= 32 else 1
    return max(2, min(8, PICTURES // (2 * L * donors))), donors


# ------------------------------------------------------------------------------------------------
# change one token

CHANGE = """Each chip is a token: its place, and its code below. One token was swapped for that of
another image, which damages the decoded image. {then} Click a chip to swap that token; click it
again for another donor. The page opens with the image that recovers most; the mean of {n} held-out
images is {original:.1f} dB, {broken:.1f} dB with token 1 swapped, {answered:.1f} dB re-encoded."""
NATIVE = """Then the experts after it read the new token and encode the image again: the filled
chips are those that changed."""
UNORDERED = """Then the image was encoded again with this token held: {name} chooses all tokens at
once, so none of the others changes."""
CHANGE_BODY = """<div class="pick" id="images" role="group" aria-label="image"></div>
<div class="pick" id="models" role="group" aria-label="tokenizer"></div>
<div class="row four" id="change-pictures"></div>
<div class="chips" id="change-chips" role="group" aria-label="tokens; arrow keys move"></div>
<p id="change-said" aria-live="polite"></p>"""


def donors_of(codes: list[int], k: int, most: int) -> list[int]:
    """Images before k, in a circle, that have other codes than its own and each other's at a
    position; codes are those of all images there. The image before k where there is none."""
    found = {}
    for step in range(1, len(codes)):
        d = (k - step) % len(codes)
        if codes[d] != codes[k] and len(found) < most:
            found.setdefault(codes[d], d)
    return list(found.values()) or [(k - 1) % len(codes)]


def swaps(page: Page, model: NativeTok, pixels: Tensor, ids: Tensor) -> dict:
    """What page.js shows of one tokenizer. pixels (n, H, W, 3) and ids (n, L), n the donors'."""
    count, most = extent(ids.shape[1])
    count = min(count, len(pixels))
    x = to_float(pixels[:count].to(ids.device))
    table = [[] for _ in range(count)]                        # (image, position, donor)
    for place in range(ids.shape[1]):
        codes = ids[:, place].tolist()
        pairs = [(k, d) for k in range(count) for d in donors_of(codes, k, most)]
        own, donors = (torch.tensor(part, device=ids.device) for part in zip(*pairs))
        broken, answered = intervene(model, x[own], ids[own], place + 1, ids[donors, place])
        columns = zip(
            page.sheet.add(pixels[donors.cpu()]), ids[donors, place].tolist(),
            tiles_of(page, model, broken), dB_of(model, broken, x[own]),
            tiles_of(page, model, answered), dB_of(model, answered, x[own]),
            answered[:, place + 1:].tolist())
        names = ("donor", "code", "broken", "brokenDb", "answered", "answeredDb", "later")
        for row in table:
            row.append([])
        for (k, _), values in zip(pairs, columns):
            table[k][place].append(dict(zip(names, values)))
    return {"name": model.cfg.tokenizer, "ids": ids[:count].tolist(),
            "recon": tiles_of(page, model, ids[:count]), "db": dB_of(model, ids[:count], x),
            "swaps": table}


def change(page: Page, models: list[NativeTok], pixels: Tensor, all_ids: list[Tensor],
           token_1: dict) -> int:
    """The first model is the run's; -> the number of images shown.

    all_ids    of each model (n, L), of pixels (n, H, W, 3)
    token_1    its row of interventions() on these pixels, for the caption
    """
    shown = [swaps(page, model, pixels, ids) for model, ids in zip(models, all_ids)]
    first = [rows[0][0] for rows in shown[0]["swaps"]]
    gains = [row["answeredDb"] - row["brokenDb"] for row in first]
    data = {"models": shown, "images": page.sheet.add(pixels[:len(first)]),
            "open": gains.index(max(gains))}
    name = models[0].cfg.tokenizer
    then = NATIVE if name == "nativetok" else UNORDERED.format(name=name)
    caption = CHANGE.format(then=then, n=len(pixels), **token_1)
    page.section("change", "Change one token", caption, CHANGE_BODY, data)
    return len(first)


# ------------------------------------------------------------------------------------------------
# a prefix

PREFIX = """The same image from its first k tokens: move the slider. A codebook of {K} codes makes a
token cost at most log2 {K} = {bits:g} bits: {bits:g} bits is guessing.{ar} The last picture is what
token k changed, black for nothing, three times as bright.{drawn}"""
DRAWN = """ The pictures are drawn by the flow decoder, from one noise for all k; PSNR is that of
the tokenizer's own decoder."""
BY_AR = """ The AR model, which knows the class and the tokens before, needs fewer where it has
learned something."""
PREFIX_BODY = """<label>k = <output id="prefix-k"></output>
<input type="range" id="prefix-slider" min="1" value="1"></label>
<div class="row three" id="prefix-pictures"></div>
<p id="prefix-said" aria-live="polite"></p>"""


@torch.no_grad()
def bits_of_tokens(ar: ARGenerator, ids: Tensor, labels: Tensor) -> Tensor:
    """ids (B, L), labels (B,) -> bits of each token given the class and those before it (B, L)."""
    logits = ar(labels, ids[:, :-1]).float()                  # (B, L, K)
    return F.cross_entropy(logits.mT, ids, reduction="none") / math.log(2)


def prefix(page: Page, model: NativeTok, draw: Decoding, pixels: Tensor, ids: Tensor,
           ar: ARGenerator | None, labels: Tensor | None) -> None:
    """pixels (n, H, W, 3), ids (n, L), labels (n,) of the images of `change`."""
    x, L, K = to_float(pixels.to(ids.device)), ids.shape[1], model.cfg.codebook_size
    tiles = [page.sheet.add(drawn(draw, ids[:, :k])) for k in range(1, L + 1)]
    dB = [dB_of(model, ids[:, :k], x) for k in range(1, L + 1)]
    data = {"tiles": list(zip(*tiles)), "db": list(zip(*dB)), "bits": math.log2(K),
            "raw": pixels[0].numel() * 8}
    if ar:
        spent = bits_of_tokens(ar, ids, labels.to(ids.device)).cumsum(dim=1)
        data["spent"] = [[round(bits, 2) for bits in row] for row in spent.tolist()]
    caption = PREFIX.format(K=K, bits=round(math.log2(K), 2), ar=BY_AR if ar else "",
                            drawn=DRAWN if draw.flow else "")
    page.section("prefix", "The first k tokens", caption, PREFIX_BODY, data)


# ------------------------------------------------------------------------------------------------
# where each expert looks

LOOK = """The same image. Point at a chip, or move to it: the picture is bright where the expert of
that token attends (mean of its heads, last layer), and the bars in the earlier chips are its
weights on those tokens. What is left goes to the expert's own query."""
LOOK_BODY = """<div class="row two" id="look-pictures"></div>
<div class="chips" id="look-chips" role="group" aria-label="experts; arrow keys move"></div>
<p id="look-said" aria-live="polite"></p>"""


def attention_of(model: NativeTok, x: Tensor) -> list[Tensor]:
    """x (B, 3, H, W) -> for each expert (B, heads, N + earlier tokens + 1), of its last layer."""
    trace, depth = [], model.cfg.expert_depth
    with torch.no_grad():
        model.mocet.forward_loop(model.mit(x), model.quantizer, trace)
    return trace[depth - 1::depth]


def look(page: Page, model: NativeTok, pixels: Tensor) -> None:
    """pixels (n, H, W, 3) of the images of `change`."""
    N, heads = model.cfg.num_patches, attention_of(
        model, to_float(pixels.to(model.quantizer.codebook.device)))
    means = [a.mean(dim=1).cpu() for a in heads]              # L x (n, N + i + 1)
    # As bytes, brightest 255: large maps as numbers would fill the page.
    bright = torch.stack([a[:, :N] / a[:, :N].amax(dim=1, keepdim=True) for a in means], dim=1)
    maps = [base64.b64encode((255 * m).round().byte().numpy().tobytes()).decode() for m in bright]
    weights = [[[round(w, 4) for w in a[k, N:-1].tolist()] for a in means]
               for k in range(len(pixels))]
    patches = [[round(a[k, :N].sum().item(), 4) for a in means] for k in range(len(pixels))]
    page.section("look", "Where each expert looks", LOOK, LOOK_BODY, {
        "side": model.cfg.image_size // model.cfg.patch_size, "maps": maps, "weights": weights,
        "patches": patches})


# ------------------------------------------------------------------------------------------------
# write it yourself

WRITE = """An AR model of the tokens is asked for {name}. Choose the next token among its
{choices} likeliest, {depth} times. Each picture is what the decoder makes of the tokens so far;
below it are the token's probability and what that costs in bits ({bits:g} bits is guessing). Then
the model draws the other tokens itself, with guidance {scale:g}."""
WRITE_BODY = """<div class="row five" id="write-choices"></div>
<p id="write-said" aria-live="polite"></p>
<button type="button" id="write-again">start again</button>"""


def finished(ar: ARGenerator, labels: Tensor, begun: Tensor, scale: float,
             noise: torch.Generator) -> Tensor:
    """begun (B, k) -> ids (B, L): the model draws the tokens after k."""
    ids, newest = ar.begin(labels, scale)
    with eval_mode(ar):
        for place in range(ar.num_tokens):
            logits = ar.guided(labels, ids, scale, newest)[:, -1]  # (B, K)
            known = place < begun.shape[1]
            new = begun[:, place] if known else sample_from(logits, noise)
            ids = torch.cat([ids, new[:, None]], dim=1)
    return ids


def write(page: Page, draw: Decoding, ar: ARGenerator) -> None:
    """A tree: {"id", "p", "tile", "next": [...]}, at its leaves "last", the tile of a sample."""
    device, scale, label = ar.position.device, GUIDANCE, 0
    depth, choices = min(DEPTH, ar.num_tokens), min(CHOICES, ar.codebook_size)
    begun, layer = torch.empty(1, 0, dtype=torch.long, device=device), [{}]
    root = layer[0]
    for _ in range(depth):
        labels = torch.full((len(begun),), label, device=device)
        with eval_mode(ar):
            p, new = ar(labels, begun)[:, -1].float().softmax(dim=-1).topk(choices)
        begun = torch.cat([begun.repeat_interleave(choices, 0), new.flatten()[:, None]], dim=1)
        tiles = page.sheet.add(drawn(draw, begun))
        leaves = [{"id": i, "p": round(q, 5), "tile": tile} for i, q, tile in
                  zip(new.flatten().tolist(), p.flatten().tolist(), tiles)]
        for k, parent in enumerate(layer):
            parent["next"] = leaves[k * choices:(k + 1) * choices]
        layer = leaves
    labels = torch.full((len(begun),), label, device=device)
    ids = finished(ar, labels, begun, scale, torch.Generator().manual_seed(0))
    for leaf, tile in zip(layer, page.sheet.add(drawn(draw, ids))):
        leaf["last"] = tile
    bits = math.log2(ar.codebook_size)
    caption = WRITE.format(name=f'"{ar.classes[label]}"', choices=choices, depth=depth,
                           bits=round(bits, 2), scale=scale)
    page.section("write", "Write it yourself", caption, WRITE_BODY,
                 {"next": root["next"], "bits": bits, "length": ar.num_tokens})


# ------------------------------------------------------------------------------------------------

def sections(page: Page, models: list[NativeTok], draw: Decoding, pixels: Tensor,
             all_ids: list[Tensor], token_1: dict, ar: ARGenerator | None,
             labels: Tensor | None) -> None:
    """All of them, as far as there is an AR model, and labels (n,) of the classes it knows.

    draw   how the first model's tokens become pictures of prefixes and samples
    """
    count = change(page, models, pixels, all_ids, token_1)
    model, few = models[0], pixels[:count]
    known = ar if labels is not None else None
    prefix(page, model, draw, few, all_ids[0][:count], known, labels[:count] if known else None)
    if model.cfg.tokenizer == "nativetok":
        look(page, model, few)
    if ar:
        write(page, draw, ar)
