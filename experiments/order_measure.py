"""What order.py measures of one arm: reconstructions, the tokens and their order, samples.

In       the folder of a finished run of train.py, and of the run that its tokenizer comes from
Out      one dictionary, most of an OUT/ARM-SEED.json

intervention   token i forced to be another image's, and what later experts do about it:
               evaluation/intervention.py
bits           AR code length of held-out images per position, -log2 p(id | class, ids before it),
               and beside it what a position costs when only its frequencies in the training ids
               are known (marginal). The difference is what order, and the class, explain
predictors     bits under weak predictors, from first to last and in other orders: directional.py
samples        of both generators, by guidance and steps. Guidance is chosen on other samples
               (`tried`) than those that are reported
first_tokens   images of the first k tokens that AR writes, and what choosing the best of four
               beginnings of k tokens does for the whole image
revealed       MaskGIT's tokens from left to right, from right to left, in a random order, in place
               of the surest first
"""
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

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
from evaluation.intervention import interventions
from evaluation.tinycnn import train_judge
from experiments.directional import (
    BATCH,
    ar_bits,
    beginnings,
    frequency_bits,
    orders_of,
    predictors,
    revealed,
    weak_networks,
)
from experiments.order_arms import Permuted, in_order_of
from experiments.order_table import chosen_scale, costs
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

SCALES = (1.5, 2.0, 3.0, 4.5)  # guidance that is tried beside 1, plain
OTHER_SAMPLES = 1000  # added to the seed, where guidance is chosen
INTERVENED = 1000  # held-out images


# ------------------------------------------------------------------------------------------------
# tokens

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
    """Held-out tokens, what they cost and what they answer.

    Bits and perplexity are position by position as the generator gets them; prefixes,
    intervention and predictors take the tokens in the tokenizer's own order.
    """
    device, tok, gen, train = procs.device, train_args.tok, train_args.gen, train_args.train
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
    learned, learned_labels = cache_tokens(os.path.join(train_args.run, "tokens"),
                                           tokenizer.fingerprint, data, tok.image_size, train.flip,
                                           None, procs)
    marginal = [float(frequency_bits(seen, asked, tok.codebook_size).mean()) for seen, asked
                in zip(learned.reshape(-1, ids.shape[1]).T, ids.cpu().numpy().T)]
    weak = predictors(learned[..., order.argsort().cpu().numpy()], learned_labels, made, labels,
                      len(data.classes), tok.codebook_size, gen, train)
    # Folders come class by class: mixed, another image is mostly of another class.
    some = np.random.default_rng(0).permutation(len(images))[:INTERVENED]
    return {"prefix_psnr": prefix_psnr(inside, made, images), "order": order.tolist(),
            "codebook_used": round(used, 4),
            "perplexity": [round(p, 2) for p in perplexity.tolist()],
            "ar_bits": [round(b, 4) for b in bits], "ar_bits_total": round(total, 3),
            "marginal_bits": [round(b, 4) for b in marginal],
            "marginal_bits_total": round(sum(marginal), 3),
            "intervention": interventions(inside, images[some]), "intervened_images": len(some),
            "predictors": weak, "layers_and_steps": weak_networks(gen, train)}


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
        (self.net, _), self.accuracy = tinycnn_nets(path, data, val, procs.device)
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


def decoded(name: str, tokenizer: NativeTok | Permuted, ids: Tensor, classes: int,
            settings: dict) -> ImageSource:
    """Images of ids (n, k), whose classes take turns."""
    labels = torch.arange(len(ids)) % classes

    def batches(numbers):
        for b in numbers:
            part = slice(b * BATCH, (b + 1) * BATCH)
            yield to_uint8(tokenizer.decode(ids[part])).cpu(), labels[part], None
    return ImageSource(name, len(ids), batches, settings=settings)


def sample_rows(judged: Callable[..., dict], num_tokens: int, seed: int) -> dict[str, list[dict]]:
    """What the judge says of samples: {"tried": rows to choose by, "samples": rows to report}.

    Of AR at each guidance, of MaskGIT at each guidance with its default of 8 steps, rows are tried;
    then, on samples of other noise, both are reported without guidance and with the one that was
    best, MaskGIT also in other numbers of steps.

    judged   kind, seed of the noise, settings of its sample() -> row
    """
    tried, samples = [], []
    for kind in GENERATORS:
        rows = [judged(kind, seed + OTHER_SAMPLES, cfg_scale=scale) for scale in (1.0, *SCALES)]
        best = chosen_scale(rows, kind)
        numbers = [{}] if kind == "ar" else [{"steps": steps} for steps in
                                             sorted({*doubling(num_tokens), rows[0]["steps"]})]
        tried += rows
        samples += [judged(kind, seed, cfg_scale=scale, **steps)
                    for steps in numbers for scale in sorted({1.0, best})]
    return {"tried": tried, "samples": samples}


def measure(arm: str, seed: int, source: str, train_args, args, procs: Processes, data: ImageSet,
            val: ImageSet) -> dict:
    """Everything that is said of one arm and seed but where it comes from.

    source       folder of the run whose tokenizer this arm takes: its own, but for the controls
    train_args   the command line of train.py that made this arm's generators
    args         the command line of order.py
    """
    device, folder, n = procs.device, train_args.run, args.num_samples
    inside = NativeTok.of_run(source, device)
    tokenizer = in_order_of(arm, seed, inside)
    judge_of_all = Judge(os.path.join(args.out, "tinycnn.pt"), train_args.tok.image_size,
                         train_args.train.flip, args.judge_steps, seed, data, val, procs)
    how, key = judge_of_all.how, judge_of_all.net.key

    # 1. Real images and reconstructions.
    chosen = np.random.default_rng(0).permutation(len(data))[:n]
    training_images = real("real", data, chosen, train_args.tok.image_size, how)
    rebuilt = judge_of_all.row(reconstruction(inside, judge_of_all.held_out, device))
    result = {"psnr": rebuilt["psnr"], "ssim": rebuilt["ssim"], key: rebuilt[key],
              "reconstruction": rebuilt, "real": judge_of_all.row(training_images),
              "judge_accuracy": round(judge_of_all.accuracy, 4)}

    # 2. Tokens.
    result |= measure_tokens(inside, tokenizer, train_args, data, val, procs)

    # 3. Samples.
    models = {kind: Generator.of_run(folder, kind, tokenizer, device) for kind in GENERATORS}
    ar, maskgit = models["ar"], models["maskgit"]

    def judged(kind: str, noise: int, **options) -> dict:
        return judge_of_all.row(generated(kind, models[kind], tokenizer, n, {}, options,
                                          replace(how, seed=noise), device))

    def judged_ids(name: str, ids: Tensor, **settings) -> dict:
        return judge_of_all.row(decoded(name, tokenizer, ids, len(data.classes), settings))
    result |= sample_rows(judged, inside.num_tokens, seed)

    # 4. Beginnings. The first places of another order are no prefix that a decoder knows.
    lengths = doubling(inside.num_tokens) if tokenizer is inside else [inside.num_tokens]
    result["first_tokens"], result["best_of"] = beginnings(
        ar, tokenizer, lengths, n, seed, judge_of_all.net.network, partial(judged_ids, "ar"))

    # 5. MaskGIT from one end to the other, at the guidance that was chosen for the surest first.
    best, result["revealed"] = chosen_scale(result["tried"], "maskgit"), []
    labels = torch.arange(n, device=device) % len(data.classes)
    ways = ("left to right", "right to left", "shuffled")
    for way, order in zip(ways, orders_of(inside.num_tokens, seed).values()):
        noise = torch.Generator().manual_seed(seed)
        ids = torch.cat([revealed(maskgit, part, order, best, noise)
                         for part in labels.split(BATCH)])
        result["revealed"].append(judged_ids("maskgit", ids, order=way, cfg_scale=best))
    result["costs"] = {**costs(source, train_args.train), **costs(folder, train_args.train)}
    return result
