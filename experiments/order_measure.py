"""What order.py measures of one arm: reconstructions, bits of the tokens, samples.

In       the folder of a finished run of train.py, and of the run that its tokenizer comes from
Out      one dictionary, most of an OUT/ARM-SEED.json

Bits     AR code length of held-out images per position, -log2 p(id | class, ids before it), and
         beside it what a position costs when only its frequencies in the training ids are known
         (marginal). The difference is what order, and the class, explain.
"""
import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.judging import (
    Batching,
    ImageSource,
    Reference,
    extract,
    generated,
    judge,
    real,
    reconstruction,
    tinycnn_nets,
)
from evaluation.tinycnn import train_judge
from experiments.order_arms import Permuted, in_order_of
from experiments.order_table import costs, fd_key
from generator import GENERATORS, Generator
from losses import mse, to_db
from nativetok import NativeTok, doubling
from plumbing import checkpoint
from plumbing.batches import eval_batches
from plumbing.datasets import ImageSet
from plumbing.images import to_float, to_uint8
from plumbing.processes import Processes
from plumbing.tokens import cache_tokens
from quantizer import usage

SCALES = (1.5, 2.0, 3.0)  # guidance that is tried beside 1, plain
BATCH = 250


# ------------------------------------------------------------------------------------------------
# tokens

def marginal_bits(learned: np.ndarray, ids: Tensor, codebook_size: int) -> list[float]:
    """Bits of ids (m, L) per position when only the frequencies in learned (n, L) are known.

    Half a count is added to each code, so that one which training never saw is possible.
    """
    bits = []
    for training_ids, held_out_ids in zip(learned.T, ids.cpu().numpy().T):
        counts = np.bincount(training_ids, minlength=codebook_size) + 0.5
        share = counts / counts.sum()
        bits.append(float(-np.log2(share[held_out_ids]).mean()))
    return bits


@torch.no_grad()
def ar_bits(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """-> bits of ids (m, L) per position, and of an image: the second from the model's own loss."""
    by_position, total = 0.0, 0.0
    for i, y in zip(ids.split(BATCH), labels.split(BATCH)):
        loss, logs = model.loss(i, y)
        weight = len(i) / len(ids) / math.log(2)  # from a mean in nats
        by_position += logs["nll_by_position"].double() * weight
        total += loss.item() * ids.shape[1] * weight
    return by_position.tolist(), total


def prefix_psnr(tokenizer: NativeTok, ids: Tensor, images: Tensor) -> dict[str, float]:
    """{k: PSNR in dB of what the decoder makes of the first k tokens}, in 8-bit RGB."""
    result = {}
    for k in doubling(tokenizer.num_tokens):
        errors = []
        for i, x in zip(ids.split(BATCH), images.split(BATCH)):
            recon = to_uint8(tokenizer.decode(i[:, :k])).cpu()
            errors.append(mse(to_float(recon), to_float(x)).double())
        result[str(k)] = round(to_db(torch.cat(errors).mean()).item(), 3)
    return result


def measure_tokens(inside: NativeTok, tokenizer: NativeTok | Permuted, train_args, data: ImageSet,
                   val: ImageSet, procs: Processes) -> dict:
    """Held-out tokens and what they cost, position by position as the generator gets them."""
    device, tok = procs.device, train_args.tok
    batches = list(eval_batches(val, tok.image_size, BATCH))
    images = torch.cat([x for x, _ in batches])
    labels = torch.cat([y for _, y in batches]).to(device)
    # (m, L), in the tokenizer's own order
    made = torch.cat([inside.encode(to_float(x.to(device))) for x, _ in batches])
    order = torch.arange(made.shape[1], device=device)
    if isinstance(tokenizer, Permuted):
        order = tokenizer.order
    ids = made[:, order]

    used, perplexity = usage(ids, tok.codebook_size)
    model = Generator.of_run(train_args.run, "ar", tokenizer, device)
    bits, total = ar_bits(model, ids, labels)
    # The cache was made in training, so nothing has to be encoded here.
    learned, _ = cache_tokens(os.path.join(train_args.run, "tokens"), tokenizer.fingerprint, data,
                              tok.image_size, train_args.train.flip, None, procs)
    marginal = marginal_bits(learned.reshape(-1, ids.shape[1]), ids, tok.codebook_size)
    return {"prefix_psnr": prefix_psnr(inside, made, images), "order": order.tolist(),
            "codebook_used": round(used, 4),
            "perplexity": [round(p, 2) for p in perplexity.tolist()],
            "ar_bits": [round(b, 4) for b in bits], "ar_bits_total": round(total, 3),
            "marginal_bits": [round(b, 4) for b in marginal],
            "marginal_bits_total": round(sum(marginal), 3)}


# ------------------------------------------------------------------------------------------------
# images

class Judge:
    """The TinyCNN that judges all arms of a data set, and the held-out images as its reference.

    path   of the classifier, which is trained here, for `steps`, when it is not there yet
    """

    def __init__(self, path: str, size: int, flip: bool, steps: int, seed: int, data: ImageSet,
                 val: ImageSet, procs: Processes):
        if not checkpoint.exists(path):
            train_judge(path, data, val, size, flip, steps, procs.device)
        (self.net, _), self.accuracy = tinycnn_nets(path, data, procs.device)
        self.how, self.procs = Batching(batch_size=BATCH, seed=seed), procs
        self.held_out = real("held out", val, np.arange(len(val)), size, self.how)
        stats, _ = extract(self.held_out, [self.net], self.how, procs)
        self.reference = Reference.of(val.name, self.held_out.n, [self.net], stats)

    def row(self, source: ImageSource) -> dict:
        """What there is to say of a set of images, in a flat dictionary."""
        row = judge(source, [self.net], self.reference, self.how, self.procs)
        settings = row.pop("settings", {})
        row.pop("swept", None)
        return {"name": row.pop("name"), "n": row.pop("n"), **settings, **row}


def sample_rows(judged: Callable[..., dict], num_tokens: int) -> list[dict]:
    """What the judge says of samples.

    Of AR by guidance; of MaskGIT by guidance at its default of 8 steps, and by steps without
    guidance and with the best one.

    judged   kind, settings of its sample() -> row
    """
    rows = [judged("ar", cfg_scale=float(scale)) for scale in (1, *SCALES)]
    at_eight = [judged("maskgit", cfg_scale=float(scale)) for scale in (1, *SCALES)]
    eight = at_eight[0]["steps"]
    best = min(at_eight, key=lambda row: row[fd_key(row)])["cfg_scale"]
    rows += at_eight
    for steps in doubling(num_tokens):
        if steps != eight:
            rows += [judged("maskgit", steps=steps, cfg_scale=scale)
                     for scale in sorted({1.0, best})]
    return rows


def measure(arm: str, seed: int, source: str, train_args, args, procs: Processes, data: ImageSet,
            val: ImageSet) -> dict:
    """Everything that is said of one arm and seed but where it comes from.

    source       folder of the run whose tokenizer this arm takes: its own, but for the controls
    train_args   the command line of train.py that made this arm's generators
    args         the command line of order.py
    """
    device, folder = procs.device, train_args.run
    inside = NativeTok.of_run(source, device)
    tokenizer = in_order_of(arm, seed, inside)
    judge_of_all = Judge(os.path.join(args.out, "tinycnn.pt"), train_args.tok.image_size,
                         train_args.train.flip, args.judge_steps, seed, data, val, procs)
    how, key = judge_of_all.how, judge_of_all.net.key

    # 1. Real images and reconstructions.
    chosen = np.random.default_rng(0).permutation(len(data))[:args.num_samples]
    training_images = real("real", data, chosen, train_args.tok.image_size, how)
    rebuilt = judge_of_all.row(reconstruction(inside, judge_of_all.held_out, device))
    result = {"psnr": rebuilt["psnr"], "ssim": rebuilt["ssim"], key: rebuilt[key],
              "reconstruction": rebuilt, "real": judge_of_all.row(training_images),
              "judge_accuracy": round(judge_of_all.accuracy, 4)}

    # 2. Tokens.
    result |= measure_tokens(inside, tokenizer, train_args, data, val, procs)

    # 3. Samples.
    models = {kind: Generator.of_run(folder, kind, tokenizer, device) for kind in GENERATORS}

    def judged(kind: str, **options) -> dict:
        return judge_of_all.row(generated(kind, models[kind], tokenizer, args.num_samples, {},
                                          options, how, device))
    result["samples"] = sample_rows(judged, inside.num_tokens)
    result["costs"] = {**costs(source, train_args.train), **costs(folder, train_args.train)}
    return result
