"""Intervention: token i is replaced by another image's. Only ordered tokens can react to it.

    ids 1 .. L of an image, token i taken from another ─┬─► decoded as they are        broken
                                                        └─► experts after i read it
                                                            and re-encode: decoded     answered

In       a tokenizer, held-out images
Out      for i = 1, 2, 4, ... L: dB of both, and how many of the later ids changed
Differs  from bits, which cannot show an order: a perfect predictor pays the same from left to right
         as from right to left (the chain rule). Here the later tokens either depend on token i or
         they do not. titok computes all of its tokens at once, so its two pictures are equal to the
         bit: 0 dB recovered, no id changed [ours]
"""
import torch
from torch import Tensor

from losses import mse, to_db
from nativetok import NativeTok, doubling
from plumbing.images import to_float, to_uint8

BATCH = 250


def intervene(tokenizer: NativeTok, images: Tensor, ids: Tensor, position: int,
              other: Tensor) -> tuple[Tensor, Tensor]:
    """The token at `position`, counted from 1, becomes other (B,) -> broken, answered ids (B, L).

    images (B, 3, H, W), ids (B, L) what the tokenizer makes of them
    """
    broken = ids.clone()
    broken[:, position - 1] = other
    return broken, tokenizer.encode(images, force={position - 1: other})


def errors(tokenizer: NativeTok, ids: Tensor, images: Tensor) -> Tensor:
    """Mean squared error (B,) of each image in 8-bit RGB, decoded from ids (B, L)."""
    return mse(to_float(to_uint8(tokenizer.decode(ids))), images).double()


def interventions(tokenizer: NativeTok, pixels: Tensor) -> list[dict]:
    """uint8 images (n, H, W, 3) in mixed order -> for each position what forcing does to them.

    Image k gets the token of image k - 1. PSNR is that of the mean squared error of all images
    in 8-bit RGB.

    original, broken, answered   dB of the reconstruction; with token i replaced; with later tokens
                                 re-encoded
    repaired                     answered - broken, dB
    later_ids_changed            share of the ids after i that changed
    other_id                     share of the images whose replaced id differs from their own
    """
    device = tokenizer.quantizer.codebook.device
    batches = [to_float(part.to(device)) for part in pixels.split(BATCH)]
    ids = [tokenizer.encode(images) for images in batches]
    others = torch.cat(ids).roll(1, dims=0).split(BATCH)

    original = torch.cat([errors(tokenizer, own, images) for images, own in zip(batches, ids)])
    rows = []
    for position in doubling(tokenizer.num_tokens):
        wrong, mended, changed, other_id = [], [], [], []
        for images, own, other in zip(batches, ids, others):
            forced = other[:, position - 1]
            broken, answered = intervene(tokenizer, images, own, position, forced)
            wrong.append(errors(tokenizer, broken, images))
            mended.append(errors(tokenizer, answered, images))
            changed.append((answered != own)[:, position:].flatten())
            other_id.append(forced != own[:, position - 1])
        broken, answered = (to_db(torch.cat(parts).mean()).item() for parts in (wrong, mended))
        later = torch.cat(changed).float()
        rows.append({"position": position, "original": round(to_db(original.mean()).item(), 3),
                     "broken": round(broken, 3), "answered": round(answered, 3),
                     "repaired": round(answered - broken, 3),
                     "later_ids_changed": round(later.mean().item(), 4) if len(later) else 0.0,
                     "other_id": round(torch.cat(other_id).float().mean().item(), 4)})
    return rows
