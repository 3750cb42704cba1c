"""Does it matter which token is first? Weak predictors, beginnings of samples, MaskGIT's order.

predictors   Bits of a tokenizer's tokens in native, reversed and shuffled order. A perfect
             predictor pays the same in all of them (the chain rule), so one that is to tell an
             order has to be weak: a network of one layer, or one that has learned for a few steps.
             Counting how often a token follows the one or two before it is beside them as a check.
             That tells neighbours from strangers, native from shuffled, but hardly native from
             reversed: its bits are the entropies of all windows minus those of their overlaps, and
             these are the same windows backwards.
beginnings   What the first k tokens that AR writes show, and what it brings to choose the best of
             four beginnings. Ordered tokens should say early what the image will be.
revealed     MaskGIT, with the positions revealed in a given order in place of the surest first

In       tokens of training and of held-out images, finished generators
Out      numbers, samples
"""
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from config import GeneratorConfig, TrainConfig
from generator import ARGenerator, MaskGITGenerator, mask_schedule, sample_from
from layers import eval_mode
from loop import learning_rate, new_optimizer
from nativetok import NativeTok
from plumbing.images import to_uint8
from plumbing.tokens import TokenStream

STRENGTHS = np.array([1.0, 4.0, 16.0, 64.0, 256.0])  # observations that a prior counts for
BEST_OF = 4
BATCH = 250


def orders_of(num_tokens: int, seed: int) -> dict[str, Tensor]:
    """Place i of an order holds token order[i]."""
    native = torch.arange(num_tokens)
    shuffled = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    return {"native": native, "reversed": native.flip(0), "shuffled": shuffled}


# ------------------------------------------------------------------------------------------------
# by counting

def counts_of(seen: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """How often each of the numbers asked (m,) is among those seen (n,): (m,)."""
    values, counts = np.unique(seen, return_counts=True)
    place = np.searchsorted(values, asked).clip(max=len(values) - 1)
    return np.where(values[place] == asked, counts[place], 0)


def frequency_bits(seen: np.ndarray, asked: np.ndarray, codebook_size: int) -> np.ndarray:
    """Bits (m,) of ids asked (m,) when only their frequencies among those seen (n,) are known.

    Half a count is added to each code, so that one which training never saw is possible.
    """
    share = (counts_of(seen, asked) + 0.5) / (len(seen) + codebook_size / 2)
    return -np.log2(share)


def window_bits(learned: np.ndarray, ids: np.ndarray, codebook_size: int, window: int,
                strengths: np.ndarray) -> np.ndarray:
    """Bits of an image of ids (m, L) for each of the strengths, by counting in learned (n, L).

    Each token is predicted from the `window` tokens before it: share of the times that it followed
    them. What followed a shorter window serves as a prior, worth `strength` observations, down to
    the frequencies of the position: additive smoothing.
    """
    learned, ids = learned.astype(np.int64), ids.astype(np.int64)
    K, total = codebook_size, np.zeros(len(strengths))
    for i in range(ids.shape[1]):
        share = 2.0 ** -frequency_bits(learned[:, i], ids[:, i], K)  # (m,), later (strengths, m)
        before, asked = np.zeros(len(learned), np.int64), np.zeros(len(ids), np.int64)
        for back in range(1, min(window, i) + 1):
            before = before * K + learned[:, i - back]  # a window as one number
            asked = asked * K + ids[:, i - back]
            followed = counts_of(before * K + learned[:, i], asked * K + ids[:, i])
            prior = strengths[:, None]
            share = (followed + prior * share) / (counts_of(before, asked) + prior)
        total -= np.log2(share).mean(axis=-1)
    return total


def counted(learned: np.ndarray, ids: np.ndarray, codebook_size: int, window: int) -> float:
    """window_bits at the strength that is best on the last tenth of what was learned from."""
    cut = len(learned) * 9 // 10
    tried = window_bits(learned[:cut], learned[cut:], codebook_size, window, STRENGTHS)
    best = STRENGTHS[tried.argmin()][None]
    return float(window_bits(learned, ids, codebook_size, window, best)[0])


# ------------------------------------------------------------------------------------------------
# by a small network

def weak_networks(gen: GeneratorConfig, train: TrainConfig) -> dict[str, tuple[int, int]]:
    """{predictor: its layers and steps}: weak by size, and weak by time."""
    return {"one layer": (1, max(1, train.generator_steps // 5)),
            "few steps": (gen.generator_depth, max(1, train.generator_steps // 10))}


def learned_briefly(learned: np.ndarray, labels: np.ndarray, classes: int, codebook_size: int,
                    gen: GeneratorConfig, train: TrainConfig, steps: int,
                    device: torch.device) -> ARGenerator:
    """An AR model after `steps` steps of stage 3's recipe, the rate's fall included.

    The same weights at the start and the same images in every order.
    """
    torch.manual_seed(train.seed)
    model = ARGenerator(gen, learned.shape[-1], codebook_size, classes).to(device).train()
    optimizer = new_optimizer(model, train.optimizer, train.generator_weight_decay,
                              train.generator_beta2,
                              train.muon_learning_rate / (train.generator_learning_rate or 1))
    batches = iter(TokenStream(learned, labels, train.generator_batch_size, train.seed))
    for step in range(steps):
        rate = learning_rate(step, steps, train.generator_learning_rate,
                             train.generator_min_learning_rate, train.generator_warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        ids, y = next(batches)
        optimizer.zero_grad()
        model.loss(ids.to(device), y.to(device))[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or math.inf)
        optimizer.step()
    return model.eval()


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


# ------------------------------------------------------------------------------------------------

def predictors(learned: np.ndarray, learned_labels: np.ndarray, ids: Tensor, labels: Tensor,
               classes: int, codebook_size: int, gen: GeneratorConfig,
               train: TrainConfig) -> dict[str, dict[str, float]]:
    """{order: {predictor: bits of an image}}; the networks are given the class, counting is not.

    learned (n, copies, L) with its labels (n,) are training tokens, ids (m, L) held-out ones.
    """
    # Folders come class by class, and the last tenth has to be like the rest.
    mixed = learned[np.random.default_rng(train.seed).permutation(len(learned))]
    result = {}
    for name, order in orders_of(ids.shape[1], train.seed).items():
        place = order.numpy()
        rows, asked = mixed[..., place].reshape(-1, len(place)), ids.cpu().numpy()[:, place]
        bits = {"pair": counted(rows, asked, codebook_size, 1),
                "window of 2": counted(rows, asked, codebook_size, 2)}
        for title, (depth, steps) in weak_networks(gen, train).items():
            model = learned_briefly(learned[..., place], learned_labels, classes, codebook_size,
                                    replace(gen, generator_depth=depth), train, steps, ids.device)
            bits[title] = ar_bits(model, ids[:, order], labels)[1]
        result[name] = {title: round(value, 3) for title, value in bits.items()}
    return result


# ------------------------------------------------------------------------------------------------
# what is written first

def beginnings(model: ARGenerator, tokenizer: NativeTok, lengths: list[int], n: int, seed: int,
               network: Callable, judged: Callable[..., dict]) -> tuple[list[dict], list[dict]]:
    """Plain samples (guidance 1) -> rows for images of the first k tokens, rows for the best of 4.

    For each image four sequences are written, and the judge keeps the one whose first k tokens,
    decoded, look most like the class that was asked for. That choice knows nothing of later tokens,
    so what the sequence goes on with is a fair draw of what follows the chosen beginning, as if
    it were only written now.

    network   a judge: uint8 images -> features, logits
    judged    ids (n, k), settings -> row
    """
    device = next(model.parameters()).device
    labels = torch.arange(n, device=device) % model.num_classes
    noise = torch.Generator().manual_seed(seed)
    written = torch.stack([
        torch.cat([model.sample(part, generator=noise) for part in labels.split(BATCH)])
        for _ in range(BEST_OF)])  # (4, n, L)

    def likeness(ids):  # (n, k) -> (n,)
        scores = []
        for part, asked in zip(ids.split(BATCH), labels.split(BATCH)):
            _, logits = network(to_uint8(tokenizer.decode(part)))
            scores.append(logits.log_softmax(dim=-1).gather(1, asked[:, None])[:, 0])
        return torch.cat(scores)

    first, best = [], []
    with torch.no_grad():
        for k in lengths:
            first.append(judged(written[0, :, :k], tokens=k))
            likely = torch.stack([likeness(ids[:, :k]) for ids in written])  # (4, n)
            chosen = written[likely.argmax(dim=0), torch.arange(n, device=device)]  # (n, L)
            best.append(judged(chosen, of=BEST_OF, after=k))
    return first, best


def revealed(model: MaskGITGenerator, labels: Tensor, order: Tensor, cfg_scale: float,
             noise: torch.Generator) -> Tensor:
    """labels (B,) -> ids (B, L) as sample() makes them in its default steps, but the positions are
    revealed in this order."""
    L, steps, rank = model.num_tokens, model.default_steps, order.argsort().to(labels.device)
    ids = labels.new_full((len(labels), L), model.mask_id)
    with eval_mode(model):
        for step, still_masked in enumerate(mask_schedule(L, steps), start=1):
            scale = 1 + (cfg_scale - 1) * step / steps if cfg_scale > 1 else cfg_scale
            guess = sample_from(model.guided(labels, ids, scale)[:, 1:], noise)  # (B, L)
            now = (ids == model.mask_id) & (rank < L - still_masked)
            ids = torch.where(now, guess, ids)
    return ids
