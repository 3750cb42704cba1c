"""The second stage: generators over token ids, left to right (AR) or from masks (MaskGIT).

Paper    reports one generator of each kind, LlamaGen-B and MaskGIT with 8 steps, without further
         detail; so the body of both is [LlamaGen], masks, loss and sampling are those of the
         MaskGIT paper (arXiv 2202.04200) with the numbers of [TiTok], 1d-tokenizer's MaskGIT part
In       ids (B, L) int64 in 0..K-1    what a frozen tokenizer made of images
         labels (B,) int64 in 0..C-1   their classes; label C is "no class", for guidance
Out      .loss(ids, labels)            -> scalar, dict of detached tensors
         .sample(labels, ...)          -> ids (B, L)
Differs  - positions are both rotary and learned, see Generator
         - scale 1 is plain guidance; TiTok counts from there in its constant and its linear ramp,
           so its guidance_scale 3.0 is 4.0 here (its power-cosine ramp counts as we do); our ramp
           ends at its scale, TiTok's linear one stops one step short of it
         - MaskGIT's tokens are drawn at `temperature`; TiTok heats them like the confidences, so
           its randomize_temperature of 9.5 to 11 does not carry over
Try      python generator.py           (CPU, about a second)

No pixels here, only ids. What a row of the transformer reads, and below it what it predicts:

              row 0      row 1      row 2             row L
    AR        class      id_1       id_2      ...                  sees rows up to its own
              -> id_1    -> id_2    -> id_3
    MaskGIT   class      mask       id_2      ...     mask         sees all rows
                         -> id_1    -> id_2           -> id_L
"""
import math
import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import LABEL_DROPOUT, GeneratorConfig
from layers import (
    ExactBuffers, KVCache, LlamaBlock, RMSNorm, at_least_float32, eval_mode, rotary_table)
from plumbing import checkpoint
from plumbing.flags import build, need
from plumbing.given import need_generator, need_labels, need_number
from plumbing.run import unfinished

# ------------------------------------------------------------------------------------------------
# from logits to tokens

def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: scale 0 unconditional, 1 plain, above 1 guided."""
    return uncond + scale * (cond - uncond)


def gumbel(shape, generator: torch.Generator | None, device) -> Tensor:
    """Standard Gumbel noise, float32; drawn where the generator is, so that a CPU's serves all."""
    u = torch.rand(shape, generator=generator, device=generator.device if generator else device)
    # TRAP: torch.rand can return 0; its noise is -inf, and annealed to 0 * -inf it is NaN.
    return -torch.log(-torch.log(u.clamp_min(1e-20))).to(device)


def top_k_top_p(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf in logits (..., K) for all but some.

    top_k   keep the k likeliest; 0: off
    top_p   of these, keep the fewest that together reach this probability; 1: off
    """
    need(top_k >= 0, f"top_k {top_k} must be 0 (off) or the number of tokens to keep")
    need(0 < top_p <= 1, f"top_p {top_p} is a probability; give a number above 0, up to 1 (off)")
    if top_k == 0 and top_p == 1:
        return logits
    values, order = logits.sort(dim=-1, descending=True)  # (..., K), most likely first
    if top_k:
        values[..., top_k:] = -math.inf
    if top_p < 1:
        p = values.softmax(dim=-1)
        likelier = p.cumsum(dim=-1) - p  # (..., K), probability of all before this one
        values = values.masked_fill(likelier >= top_p, -math.inf)
    return torch.empty_like(logits).scatter(-1, order, values)


def sample_from(logits: Tensor, generator: torch.Generator | None, temperature: float = 1.0,
                top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits (..., K) -> ids (...) drawn from softmax(logits / temperature); 0: the likeliest."""
    need(temperature >= 0, f"temperature {temperature} must be 0 (the likeliest token) or above")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = top_k_top_p(logits / temperature, top_k, top_p)
    # The argmax of logits plus Gumbel noise is one draw from their softmax (the Gumbel-max trick).
    return (logits + gumbel(logits.shape, generator, logits.device)).argmax(dim=-1)


# ------------------------------------------------------------------------------------------------
# what both generators are made of

class Generator(ExactBuffers):
    """A LlamaGen-style transformer over [class, token, token, ...] -> logits (.., K) at every row.

    ARGenerator and MaskGITGenerator define what a row sees, the loss, and how samples are drawn.
    Generator.load(path) rebuilds either of them from a checkpoint.

    Positions are given twice. Rotary angles [LlamaGen] tell attention how far apart two rows are.
    The learned table [TiTok's MaskGIT has one; ours in AR] tells every row which one it is, because
    the same id means another thing at another position: each has an expert of its own.
    """
    causal: bool              # does a row see earlier rows only?
    options: tuple[str, ...]  # the settings of sample() that a command line can give
    unfinished = ""           # how far training had come; load() knows it

    def __init__(self, cfg: GeneratorConfig, num_tokens: int, codebook_size: int, num_classes: int):
        super().__init__()
        self.cfg, self.num_tokens = cfg, num_tokens
        self.codebook_size, self.num_classes = codebook_size, num_classes
        self.classes = [str(c) for c in range(num_classes)]  # names; load() knows better ones
        self.tokenizer_fingerprint = ""  # of the tokenizer that these ids belong to; "" unknown
        D, heads, depth = cfg.generator_width, cfg.generator_heads, cfg.generator_depth

        # AR never reads its last token; MaskGIT reads all, and has one more token, the mask.
        rows, words = num_tokens, codebook_size
        if not self.causal:
            rows, words = rows + 1, words + 1
        self.label = nn.Embedding(num_classes + 1, D)  # the last one is "no class"
        self.token = nn.Embedding(words, D)
        self.position = nn.Parameter(torch.empty(rows, D))
        self.register_buffer("rotary", rotary_table(rows, D // heads), persistent=False)
        self.blocks = nn.ModuleList(
            LlamaBlock(D, heads, cfg.generator_dropout) for _ in range(depth))
        self.norm = RMSNorm(D)
        self.head = nn.Linear(D, codebook_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Everything is normal with std 0.02 [GPT-2]: the first loss is close to log K.

        That includes the head, which LlamaGen starts from zero [ours; no record is kept of trials].
        """
        nn.init.normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        # Scaled like this the sum of all 2 * depth branches has the variance of one [GPT-2].
        for block in self.blocks:
            for branch in (block.attention.out, block.mlp.w2):
                nn.init.normal_(branch.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))

    def forward(self, labels: Tensor, ids: Tensor) -> Tensor:
        """labels (B,), ids (B, T) -> logits (B, 1+T, K): of the class, then of each token."""
        x = torch.cat([self.label(labels)[:, None], self.token(ids)], dim=1)  # (B, R, D)
        x = x + self.position[:x.shape[1]]
        for block in self.blocks:
            x = block(x, self.rotary[:x.shape[1]], self.causal)
        return self.head(self.norm(x))  # (B, R, K)

    def guided(self, labels: Tensor, ids: Tensor, scale: float,
               forward: Callable | None = None) -> Tensor:
        """forward() under guidance, in float32 or better.

        At scale 1 as it is, else both halves as one batch.
        forward   to be called in its place; see ARGenerator.newest
        """
        forward = forward or self
        if scale == 1:
            logits = at_least_float32(forward(labels, ids))
        else:
            no_class = torch.full_like(labels, self.num_classes)
            both = forward(torch.cat([labels, no_class]), torch.cat([ids, ids]))  # (2B, R, K)
            logits = guide(*at_least_float32(both).chunk(2), scale)
        # TRAP: the argmax of nan is a valid id.
        need(logits.isfinite().all(), f"logits at cfg_scale {scale:g} are not finite (nan or inf)")
        return logits

    def hide_labels(self, labels: Tensor) -> Tensor:
        """In training a share of labels becomes "no class", for guidance's unconditional side."""
        if not self.training:
            return labels
        hidden = torch.rand(labels.shape, device=labels.device) < LABEL_DROPOUT
        return labels.masked_fill(hidden, self.num_classes)

    def check(self, labels: Tensor, generator: torch.Generator | None = None,
              **settings: float) -> None:
        """Raise UserError for what sample() cannot work with."""
        need_labels(labels, self.num_classes, self.position)
        need_generator(generator)
        for name, value in settings.items():
            need_number(name, value, whole=name in ("top_k", "steps"))

    @staticmethod
    def load(path) -> "ARGenerator | MaskGITGenerator":
        """From its checkpoint alone, averaged weights, in eval mode. UserError if it holds none."""
        saved = checkpoint.load(path)
        need(saved.get("kind") in GENERATORS,
             f"{path} holds no generator; try generator-ar.pt or generator-maskgit.pt")
        Kind = GENERATORS[saved["kind"]]
        cfg, = build((GeneratorConfig,), saved["generator_config"])
        model = Kind(cfg, saved["num_tokens"], saved["codebook_size"], len(saved["classes"]))
        checkpoint.load_strict(model, saved["ema"], f"generator weights in {path}")
        model.classes, model.tokenizer_fingerprint = saved["classes"], saved["tokenizer"]
        model.unfinished = unfinished(saved, path)
        return model.eval()

    @staticmethod
    def of_run(folder: str, kind: str, tokenizer: nn.Module,
               device: torch.device) -> "ARGenerator | MaskGITGenerator":
        """The run's, of this kind. Raises UserError unless it has learned this tokenizer's ids."""
        path = os.path.join(folder, f"generator-{kind}.pt")
        train = f"python train.py --run {folder} --stage 3"
        need(checkpoint.exists(path), f"{folder} has no {kind} generator; train it: {train}")
        model = Generator.load(path).to(device)
        # TRAP: ids of another tokenizer run as well, and decode to noise.
        need(model.tokenizer_fingerprint == tokenizer.fingerprint,
             f"{path} has learned the ids of another tokenizer than the tokenizer.pt beside it; "
             f"delete generator-{kind}*.pt and retrain that generator: {train}")
        return model


# ------------------------------------------------------------------------------------------------
# AR: p(ids) = prod_i p(id_i | class, id_1 .. id_{i-1})

class ARGenerator(Generator):
    causal = True
    options = ("cfg_scale", "temperature", "top_k", "top_p")

    def loss(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        """Mean cross-entropy in nats, and "nll_by_position" (L,): how hard each token is to predict
        from those before. Their sum, the cost of an image, is small in an order that helps.
        """
        logits = self(self.hide_labels(labels), ids[:, :-1])  # (B, L, K)
        nll = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
        nll = nll.view(ids.shape)  # (B, L)
        return nll.mean(), {"nll_by_position": nll.detach().mean(dim=0)}

    def sample(self, labels: Tensor, cfg_scale: float = 1.0, temperature: float = 1.0,
               top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
               use_cache: bool = True) -> Tensor:
        """labels (B,) -> ids (B, L), one token after the other.

        The same generator state repeats the same ids. use_cache=False computes every row again for
        every token: slow, and the reading to compare with. Raises UserError for an unknown class
        or a setting out of range.
        """
        self.check(labels, generator, cfg_scale=cfg_scale, temperature=temperature, top_k=top_k,
                   top_p=top_p)
        labels = labels.long()
        ids, newest = self.begin(labels, cfg_scale)
        with eval_mode(self):
            for _ in range(self.num_tokens):
                logits = self.guided(labels, ids, cfg_scale, newest if use_cache else self)
                logits = logits[:, -1]  # (B, K)
                new = sample_from(logits, generator, temperature, top_k, top_p)  # (B,)
                ids = torch.cat([ids, new[:, None]], dim=1)  # (B, T) -> (B, T+1)
        return ids

    def begin(self, labels: Tensor, cfg_scale: float) -> tuple[Tensor, Callable]:
        """-> no ids yet (B, 0), and newest() with empty caches."""
        (rows, D), heads = self.position.shape, self.cfg.generator_heads
        both = len(labels) * (1 if cfg_scale == 1 else 2)  # sides of guidance, see guided()
        caches = [KVCache(both, heads, rows, D // heads, self.position) for _ in self.blocks]
        return labels.new_empty(len(labels), 0), partial(self.newest, caches=caches)

    def newest(self, labels: Tensor, ids: Tensor, caches: list[KVCache]) -> Tensor:
        """The last row of forward(), (B, 1, K), when those before it are in the caches: fast."""
        T = ids.shape[1]
        x = self.token(ids[:, -1]) if T else self.label(labels)  # (B, D)
        x = x + self.position[T]
        for block, cache in zip(self.blocks, caches):
            x = block.newest(x, self.rotary[T:T + 1], cache, T)
        return self.head(self.norm(x))[:, None]


# ------------------------------------------------------------------------------------------------
# MaskGIT: predict all masked tokens at once, keep the confident ones, repeat

def random_masks(batch: int, length: int, device=None) -> Tensor:
    """bool (B, L), True is masked: arccos(u) / (pi/2) of a row, u ~ U(0, 1), at least one [TiTok].

    On average 64% are masked; many rows are masked almost fully, as at the start of sampling.
    """
    share = torch.acos(torch.rand(batch, 1, device=device)) / (math.pi / 2)
    count = (share * length).round().clamp_min(1)  # (B, 1)
    # (B, L), a random permutation per row
    order = torch.rand(batch, length, device=device).argsort(dim=1)
    return order < count


def mask_schedule(length: int, steps: int) -> list[int]:
    """How many tokens are still masked after each step: L arccos(progress) / (pi/2) [TiTok].

    Every step reveals at least one, the last all that are left. Raises UserError if that cannot be.
    """
    need(1 <= steps <= length,
         f"steps {steps} must be from 1 to {length}, as each reveals at least one token")
    schedule, masked = [], length
    for step in range(1, steps + 1):
        wanted = math.floor(length * math.acos(step / steps) / (math.pi / 2))
        # That leaves a token for each later step: arccos is concave, so wanted >= steps - step.
        masked = min(wanted, masked - 1)
        schedule.append(masked)
    return schedule


UNMASKED = 0.1  # loss weight of a token that was not masked [MaskGIT]


class MaskGITGenerator(Generator):
    causal = False
    options = ("cfg_scale", "temperature", "steps", "randomize_temperature")

    @property
    def mask_id(self) -> int:
        return self.codebook_size  # the id after the last code

    @property
    def default_steps(self) -> int:
        """8 as in the paper, but one per token where there are fewer."""
        return min(8, self.num_tokens)

    def loss(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        """Mean of the smoothed cross-entropy: masked tokens weigh 1, others 0.1 [MaskGIT].

        dict   "masked_share"; "masked_accuracy", the share of masked tokens guessed exactly;
               "weight", that of a token on average: what this mean counts in a larger one
        """
        masked = random_masks(*ids.shape, ids.device)  # (B, L)
        hidden = ids.masked_fill(masked, self.mask_id)  # (B, L)
        logits = self(self.hide_labels(labels), hidden)[:, 1:]  # (B, L, K)
        error = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none",
                                label_smoothing=self.cfg.label_smoothing).view(ids.shape)  # (B, L)
        weight = torch.where(masked, 1.0, UNMASKED)
        loss = (weight * error).sum() / weight.sum()
        hits = (logits.detach().argmax(dim=-1) == ids) & masked
        return loss, {"masked_share": masked.float().mean(),
                      "masked_accuracy": hits.sum() / masked.sum(), "weight": weight.mean()}

    def sample(self, labels: Tensor, steps: int | None = None, cfg_scale: float = 1.0,
               temperature: float = 1.0, randomize_temperature: float = 4.5,
               generator: torch.Generator | None = None, trace: list | None = None) -> Tensor:
        """labels (B,) -> ids (B, L) in 1 <= steps <= L passes (None: default_steps).

        cfg_scale              above 1 it is reached in a straight line from 1, so that the first
                               tokens are chosen freely and samples stay varied [Muse, TiTok]; up
                               to 1 it holds from the start
        randomize_temperature  Gumbel noise on the confidences, annealed to 0, so that not every
                               sample starts from the same few safe tokens [MaskGIT paper: 4.5]
        trace                  a list that gets the ids after every step, mask_id where masked

        The same generator state repeats the same ids. Raises UserError for an unknown class or a
        setting out of range.
        """
        steps = self.default_steps if steps is None else steps
        self.check(labels, generator, steps=steps, cfg_scale=cfg_scale, temperature=temperature,
                   randomize_temperature=randomize_temperature)
        labels = labels.long()
        ids = labels.new_full((len(labels), self.num_tokens), self.mask_id)  # (B, L)
        with eval_mode(self):
            for step, still_masked in enumerate(mask_schedule(self.num_tokens, steps), start=1):
                progress = step / steps
                scale = 1 + (cfg_scale - 1) * progress if cfg_scale > 1 else cfg_scale
                logits = self.guided(labels, ids, scale)[:, 1:]  # (B, L, K)

                # 1. Guess every masked token.
                masked = ids == self.mask_id  # (B, L)
                guess = sample_from(logits, generator, temperature)  # (B, L)
                ids = torch.where(masked, guess, ids)

                # 2. How sure is each guess? Kept tokens are beyond doubt, so they never change.
                sure = logits.log_softmax(dim=-1).gather(-1, guess[..., None]).squeeze(-1)  # (B, L)
                noise = gumbel(sure.shape, generator, sure.device)
                sure = sure + randomize_temperature * (1 - progress) * noise
                sure = sure.masked_fill(~masked, math.inf)

                # 3. Mask the least sure ones again, as many as the schedule says.
                again = sure.topk(still_masked, dim=1, largest=False).indices  # (B, still_masked)
                ids = ids.scatter(1, again, self.mask_id)
                if trace is not None:
                    trace.append(ids)
        return ids


# the kinds, as flags and checkpoints spell them
GENERATORS = {"ar": ARGenerator, "maskgit": MaskGITGenerator}


if __name__ == "__main__":
    print("MaskGIT reveals few tokens while it knows little, many when it knows a lot.")
    print("32 tokens, how many are new in each step:")
    for steps in (1, 2, 4, 8, 32):
        masked = [32] + mask_schedule(32, steps)
        print(f"  {steps:2} steps:", *(before - after for before, after in zip(masked, masked[1:])))

    print("\nGuidance moves probability to what the class makes likelier than usual,")
    print("past what is merely likely:")
    cond = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    uncond = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()
    for scale, meaning in ((0, "unconditional"), (1, "plain"), (2, "guided"), (4, "guided more")):
        p = guide(cond, uncond, scale).softmax(0)
        print(f"  scale {scale}:", *(f"{value:.2f}" for value in p), f"  {meaning}")

    print("\nAn untrained generator of 512 codes is as uncertain as a die with as many faces:")
    torch.manual_seed(0)
    cfg = GeneratorConfig(generator_width=64, generator_depth=2, generator_heads=2)
    for kind, Kind in GENERATORS.items():
        model = Kind(cfg, num_tokens=32, codebook_size=512, num_classes=10)
        loss, _ = model.loss(torch.randint(512, (8, 32)), torch.arange(8))
        print(f"  {kind}: exp(loss) = {loss.exp():.1f}")
