"""What bench.py measures of the tokenizer and of training: one function per comparison.

Floors come from operations that PyTorch counts while both sides warm up, or from what has to be
held in memory.

In       a Bench (timing.py)
Out      its rows: name, value, unit, floor, target, met, note
"""
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from config import TokenizerConfig, load_preset
from experiments.timing import GIB, Bench, Operations, flops_of, in_child
from generator import ARGenerator
from layers import count_parameters
from loop import frozen_copy, new_optimizer, update_ema
from losses import reconstruction
from mit import MIT
from mocet import MoCET
from nativetok import NativeTok
from plumbing.batches import ImageStream
from plumbing.datasets import open_images
from plumbing.images import to_float
from plumbing.processes import peak_memory
from plumbing.tokens import TokenStream
from quantizer import VectorQuantizer
from titok import TiTok
from train import PARTS, freeze

# ------------------------------------------------------------------------------------------------
# the tokenizer

def tokenizer_config(**changes) -> TokenizerConfig:
    return replace(load_preset("imagenet-128")[0], **changes)


def experts(L: int, form: str, bench: Bench) -> tuple[MoCET, VectorQuantizer]:
    cfg = tokenizer_config(token_schedule=(L,), expert=form)
    torch.manual_seed(0)
    return MoCET(cfg).to(bench.device), VectorQuantizer(cfg).to(bench.device).eval()


@torch.no_grad()
def forward(mocet: MoCET, way: Callable, x: Tensor, quantizer: VectorQuantizer) -> Tensor:
    """way: MoCET.forward or MoCET.forward_loop -> ids (B, L)."""
    return way(mocet, x, quantizer)[1]


def forward_backward(mocet: MoCET, way: Callable, x: Tensor, quantizer: VectorQuantizer) -> None:
    z_q, _, losses = way(mocet, x, quantizer)
    (z_q.sum() + losses["codebook"]).backward()
    mocet.zero_grad(set_to_none=True)


def query_against_block(bench: Bench) -> None:
    x = torch.randn(4, 256, 256, device=bench.device)
    for L in (32, 128):
        query, quantizer = experts(L, "query", bench)
        block, _ = experts(L, "block", bench)
        # Each repeat of 128 block experts costs half a minute; their times vary little.
        repeats = 1 if L == 128 else None
        for what, call, target in (("forward", forward, 12),
                                   ("forward+backward", forward_backward, 8)):
            fast, slow = bench.seconds(partial(call, query, MoCET.forward, x, quantizer),
                                       partial(call, block, MoCET.forward, x, quantizer),
                                       repeats=repeats, spend=5)
            bench.row(f"query against block, {L} experts, {what}", slow / fast, "x", target,
                      floor=bench.flops[1] / bench.flops[0],
                      note=f"{fast * 1e3:.0f} ms against {slow * 1e3:.0f}; "
                           f"block at {bench.of_peak(bench.flops[1], slow)}")


def query_against_loop(bench: Bench) -> None:
    x = torch.randn(4, 256, 256, device=bench.device)
    for L in (32, 64):  # the loop's backward takes time as L squared: 128 experts half a minute
        mocet, quantizer = experts(L, "query", bench)
        same = torch.equal(forward(mocet, MoCET.forward, x, quantizer),
                           forward(mocet, MoCET.forward_loop, x, quantizer))
        for what, call, target in (("forward", forward, 3),
                                   ("forward+backward", forward_backward, 2)):
            fast, slow = bench.seconds(partial(call, mocet, MoCET.forward, x, quantizer),
                                       partial(call, mocet, MoCET.forward_loop, x, quantizer),
                                       repeats=1 if call is forward_backward else None, spend=5)
            bench.row(f"query against its loop, {L} experts, {what}", slow / fast, "x", target,
                      floor=bench.flops[1] / bench.flops[0],
                      note=f"{fast * 1e3:.0f} ms against {slow * 1e3:.0f}; same ids: {same}")


def encode(images: Tensor, mit: MIT, mocet: MoCET, quantizer: VectorQuantizer) -> Tensor:
    return mocet(mit(images), quantizer)[1]


def encoder_against_titok(bench: Bench) -> None:
    B = 16  # of few images each expert's weights take longer to read than to use
    images = torch.rand(B, 3, 256, 256, device=bench.device) * 2 - 1
    for L in (32, 64, 128):
        cfg = tokenizer_config(token_schedule=(L,))
        mit, (mocet, quantizer) = MIT(cfg).to(bench.device), experts(L, "query", bench)
        titok = TiTok(replace(cfg, tokenizer="titok")).to(bench.device)
        with torch.no_grad():
            ours, theirs = bench.seconds(partial(encode, images, mit, mocet, quantizer),
                                         partial(titok, images, quantizer))
        bench.row(f"whole encoder against TiTok-B, {L} tokens", ours / theirs, "x", least=False,
                  floor=bench.flops[0] / bench.flops[1],
                  note=f"{ours / B * 1e3:.0f} ms against {theirs / B * 1e3:.0f} an image; "
                       f"TiTok at {bench.of_peak(bench.flops[1], theirs)}")


def grown_tokenizer(kind: str, device: torch.device) -> NativeTok:
    """imagenet-128 at its full length; what learns is that of a "joint" step, or of a "grow"."""
    torch.manual_seed(0)
    model = NativeTok(tokenizer_config(token_schedule=(64, 128))).to(device)
    model.grow(128)
    freeze(model, PARTS if kind == "joint" else ("new experts", "decoder"))
    return model


def training_step(kind: str, device: torch.device) -> tuple[float, float, int, float]:
    """For the child that growth() starts: a training step as loop.py makes it, with 2 images.

    -> seconds, peak memory in GiB, operations, and GiB of weights, gradients, moments, averages
    """
    model, times = grown_tokenizer(kind, device), []
    images, ema = torch.rand(2, 3, 256, 256, device=device) * 2 - 1, frozen_copy(model)
    learns = [p for p in model.parameters() if p.requires_grad]
    train = learner(model, partial(tokenizer_loss, model), "adamw", beta2=0.999)

    def step():
        train(images)
        update_ema(ema, model, 0.999, 0)
    flops = flops_of(step)
    for _ in range(3):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    held = 2 * count_parameters(model) + 3 * sum(p.numel() for p in learns)
    return statistics.median(times), peak_memory(device) / GIB, flops, held * 4 / GIB


def growth(bench: Bench) -> None:
    sides = [in_child(bench, "experiments.bench", kind) for kind in ("grow", "joint")]
    (grow_s, joint_s), (grow_gib, joint_gib), (grow_flops, joint_flops), (grow_held, joint_held) = (
        zip(*sides))
    bench.row("growth step against joint step, time", grow_s / joint_s, "x", least=False,
              floor=grow_flops / joint_flops, note=f"{grow_s:.2f} s against {joint_s:.2f}")
    # The floor leaves out what a step computes, which takes less in a growth step too.
    bench.row("growth step against joint step, peak memory", grow_gib / joint_gib, "x",
              least=False, floor=grow_held / joint_held,
              note=f"{grow_gib:.1f} GiB against {joint_gib:.1f}")


def muon_against_adamw(bench: Bench) -> None:
    """Whole training steps of the preset that uses Muon; the same images on both sides."""
    tok, _, train = load_preset("cifar")
    images = torch.rand(train.batch_size, 3, 32, 32, device=bench.device) * 2 - 1
    steps = []
    for kind in ("muon", "adamw"):
        torch.manual_seed(0)
        model = NativeTok(tok).to(bench.device).grow_to(tok.num_tokens)
        step = learner(model, partial(tokenizer_loss, model), kind, train.beta2)
        steps.append(partial(step, images))
    muon, adamw = bench.seconds(*steps, repeats=3 * bench.repeats)
    bench.row("training step of cifar, Muon against AdamW", muon / adamw, "x", least=False,
              floor=bench.flops[0] / bench.flops[1],
              note=f"{muon * 1e3:.0f} ms against {adamw * 1e3:.0f}: "
                   f"{1 - adamw / muon:.0%} of a step is Muon's own")


def waiting(stream: Iterator, step: Callable, steps: int) -> tuple[float, float]:
    """Share of the time of `steps` steps that went by in next(stream), and seconds a step.

    The first three batches are not counted.
    """
    for _ in range(3):
        step(next(stream))
    worked, began = 0.0, time.perf_counter()
    for _ in range(steps):
        batch = next(stream)
        step_began = time.perf_counter()
        step(batch)
        worked += time.perf_counter() - step_began
    total = time.perf_counter() - began
    return 1 - worked / total, total / steps


def learner(model: nn.Module, loss: Callable[..., Tensor], kind: str, beta2: float) -> Callable:
    """-> a function of a batch: one training step of the model on loss(batch)."""
    optimizer = new_optimizer(model, kind, 1e-4, beta2)
    model.train()

    def step(batch):
        loss(batch).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def tokenizer_loss(model: NativeTok, images: Tensor) -> Tensor:
    recon, _, losses = model(images)
    return reconstruction(recon, images) + losses["codebook"] + 0.25 * losses["commitment"]


def waiting_for_tokens(bench: Bench) -> None:
    tok, gen, train = load_preset("cifar")
    rng, n = np.random.default_rng(0), 50000
    ids = rng.integers(0, tok.codebook_size, (n, 2, tok.num_tokens)).astype(np.uint16)
    labels = rng.integers(0, 10, n)
    model = ARGenerator(gen, tok.num_tokens, tok.codebook_size, 10).to(bench.device)

    def loss(batch):
        return model.loss(*(part.to(bench.device) for part in batch))[0]
    stream = iter(TokenStream(ids, labels, train.generator_batch_size, 0))
    share, seconds = waiting(stream, learner(model, loss, "adamw",
                                            train.generator_beta2), 20)
    bench.row("stage 3, waiting for data", share * 100, "%", 2, least=False,
              note=f"of {seconds * 1e3:.0f} ms a step")


def write_jpegs(folder: str, n: int) -> None:
    """n pictures of noise, 32 x 32, dealt to ten class folders."""
    rng = np.random.default_rng(0)
    for k in range(n):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        os.makedirs(os.path.join(folder, str(k % 10)), exist_ok=True)
        Image.fromarray(pixels).save(os.path.join(folder, str(k % 10), f"{k}.jpg"), quality=90)


def waiting_for_images(bench: Bench) -> None:
    tok, _, train = load_preset("cifar")
    model = NativeTok(tok).to(bench.device)

    def loss(batch):
        return tokenizer_loss(model, to_float(batch[0].to(bench.device)))
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(folder, 2000)
        stream = iter(ImageStream(open_images(folder), tok.image_size, train.batch_size, 0,
                                  flip=True, workers=2))
        share, seconds = waiting(stream, learner(model, loss, "muon", train.beta2), 30)
        del stream  # ends its workers before the folder goes
    bench.row("stage 1, waiting for JPEGs, 2 workers", share * 100, "%", 10, least=False,
              note=f"of {seconds * 1e3:.0f} ms a step, on {os.cpu_count()} cores")


# ------------------------------------------------------------------------------------------------
# a GPU on paper

LAUNCH = 5e-6                 # seconds until a GPU has begun the next kernel
PEAK, SHARE = 989e12, 0.4     # an H100's dense bf16 operations a second, and what of it one reaches
IMAGES = 32                   # of a GPU in a step


def in_bf16(loss: Callable[[], Tensor]) -> None:
    """Forward and backward as on a GPU, here."""
    with torch.autocast("cpu", torch.bfloat16):
        total = loss()
    total.backward()


def gpu_on_paper(bench: Bench) -> None:
    """A step takes at least the longer of two times: to start its kernels one after the other, and
    to do its arithmetic. Kernels are counted with one image: more of them take no more kernels.
    """
    tok, gen, _ = load_preset("imagenet-128")
    ar = ARGenerator(gen, tok.num_tokens, tok.codebook_size, 1000)
    tokenizer = grown_tokenizer("joint", torch.device("cpu"))
    images, ids = torch.zeros(1, 3, 256, 256), torch.zeros(1, tok.num_tokens, dtype=torch.int64)
    for name, loss in (("joint step", partial(tokenizer_loss, tokenizer, images)),
                       ("AR step", lambda: ar.loss(ids, ids[:, 0])[0])):
        with Operations() as done:
            flops = flops_of(partial(in_bf16, loss))
        starting, computing = done.kernels * LAUNCH, flops * IMAGES / (PEAK * SHARE)
        bench.row(f"on paper: {name}, starting kernels against computing", starting / computing,
                  "x", note=f"{done.kernels:,} kernels of {LAUNCH * 1e6:.0f} us are "
                            f"{starting * 1e3:.0f} ms; {flops * IMAGES / 1e12:.1f} TFLOP of "
                            f"{IMAGES} images are {computing * 1e3:.0f} ms at {SHARE:.0%} of "
                            f"{PEAK / 1e12:.0f} TFLOP/s")
