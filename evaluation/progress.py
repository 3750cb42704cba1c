"""How far a run has come: numbers and pictures of held-out images at a phase's end.

In       a Run, a tokenizer or a generator with averaged weights
Out      numbers for log.jsonl and the checkpoint; pictures in RUN/samples
"""
from collections.abc import Callable

import torch
from torch import nn

from config import GUIDANCE
from flow_decoder import FlowDecoder
from losses import mse, to_db
from nativetok import NativeTok
from plumbing.batches import eval_batches
from plumbing.images import to_float
from plumbing.run import Run
from quantizer import usage


@torch.no_grad()
def evaluate(model: NativeTok, run: Run) -> dict:
    """PSNR over held-out images, share of codes in use, perplexity of each position."""
    ids, errors = [], []
    batches = eval_batches(run.val, run.tok.image_size, 250, run.eval_indices,
                           skip_bad=run.train.skip_bad)
    for images, _ in batches:
        images = to_float(images.to(run.procs.device))
        ids.append(model.encode(images))
        errors.append(mse(model.decode(ids[-1]).clamp(-1, 1), images))
    used, perplexity = usage(torch.cat(ids), run.tok.codebook_size)
    return {"psnr": round(to_db(torch.cat(errors).mean()).item(), 3),
            "codebook_used": round(used, 4),
            "perplexity": [round(p, 1) for p in perplexity.tolist()],
            "images": len(run.eval_indices)}


def show_reconstructions(run: Run, model: NativeTok, name: str) -> None:
    """samples/NAME.png: held-out images above what the tokenizer makes of them."""
    if run.procs.main:
        images = to_float(run.some_held_out(16))
        run.grid(name, [images, model.decode(model.encode(images.to(run.procs.device)))])


def show_drawn(run: Run, decoder: FlowDecoder, name: str) -> None:
    """samples/NAME.png: held-out images, their reconstructions by the mean, and two draws each."""
    if run.procs.main:
        images = to_float(run.some_held_out(16)).to(run.procs.device)
        ids, noise = decoder.tokenizer.encode(images), torch.Generator().manual_seed(run.train.seed)
        drawn = [decoder.decode(ids, generator=noise).clamp(-1, 1) for _ in range(2)]
        run.grid(name, [images, decoder.tokenizer.decode(ids), *drawn])


def drawn_psnr(run: Run, decoder: FlowDecoder) -> dict:
    """PSNR over held-out images, drawn and by the tokenizer's own decoder."""
    errors = {"psnr_drawn": [], "psnr_mean": []}
    noise = torch.Generator().manual_seed(run.train.seed)
    batches = eval_batches(run.val, run.tok.image_size, 250, run.eval_indices,
                           skip_bad=run.train.skip_bad)
    for images, _ in batches:
        images = to_float(images.to(run.procs.device))
        ids = decoder.tokenizer.encode(images)
        errors["psnr_drawn"].append(mse(decoder.decode(ids, generator=noise).clamp(-1, 1), images))
        errors["psnr_mean"].append(mse(decoder.tokenizer.decode(ids).clamp(-1, 1), images))
    found = {name: round(to_db(torch.cat(parts).mean()).item(), 3)
             for name, parts in errors.items()}
    return {**found, "images": len(run.eval_indices)}


@torch.no_grad()
def held_out_loss(run: Run, model: nn.Module, encode: Callable) -> float:
    """The averaged model's mean loss over held-out images, in nats per token."""
    total, device = 0.0, run.procs.device
    batches = list(eval_batches(run.val, run.tok.image_size, 250, run.eval_indices,
                                skip_bad=run.train.skip_bad))
    held_out = [(encode(images).to(device), labels.to(device)) for images, labels in batches]
    torch.manual_seed(run.train.seed)  # MaskGIT's loss draws masks: the same ones every time
    for ids, labels in held_out:
        total += model.loss(ids, labels)[0].item() * len(ids)
    return total / len(run.eval_indices)


def show_samples(run: Run, tokenizer: NativeTok, model: nn.Module, name: str) -> None:
    """samples/NAME.png: eight samples of each of the first ten classes, guided if that was learned.
    """
    if run.procs.main:
        classes = torch.arange(min(10, len(run.data.classes)), device=run.procs.device)
        noise = torch.Generator().manual_seed(run.train.seed)
        ids = model.sample(classes.repeat_interleave(8), cfg_scale=GUIDANCE,
                           generator=noise)
        run.grid(name, list(tokenizer.decode(ids).split(8)))
