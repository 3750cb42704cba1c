"""The arms of order.py: tokenizers of equal size under one budget, and tokens in another order.

Shared   images and their order, steps (HNT's phases together take as many as the others),
         optimizer, codebook, decoder, number of tokens, generator. No arm but one drops tails.
Sizes    encoders have as many parameters as NativeTok's, within 10%: the ViT of titok is twice as
         deep as MIT and as wide as it takes; block experts, and one expert for all positions, are
         as wide as it takes.

nativetok-hidden   joint, as in the first author's earlier code: experts read each other's outputs
                   unquantized and share one head
"""
import bisect
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from config import CONFIGS, PRESETS, TokenizerConfig
from layers import count_parameters
from mocet import MoCET, norm
from nativetok import NativeTok, as_it_is
from plumbing import checkpoint
from plumbing.flags import build


@dataclass(frozen=True)
class Arm:
    settings: dict = field(default_factory=dict)  # beside those that all arms share
    grown: bool = False  # by HNT's phases, instead of all tokens at once
    order: str = "as made"  # in which the generator gets the tokens: as made, reversed, shuffled
    share: float = 1.0  # of the budget's steps
    change: Callable = as_it_is  # of the model, as train.main takes it


def share_experts(model: NativeTok) -> NativeTok:
    """One expert for all positions; only query and position are each one's own."""
    first, *others = model.mocet.experts
    for expert in others:
        expert.layers, expert.head = first.layers, first.head
    return model


class HiddenMoCET(MoCET):
    """Experts read each other's outputs unquantized and without positions, and share one head."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__(cfg)
        del self.embed_code
        for expert in self.experts:
            del expert.pos
            expert.head = self.experts[0].head

    def forward(self, x_latent: Tensor, quantizer: nn.Module, force: dict | None = None):
        rows, emitted, force = x_latent, [], force or {}
        for i, expert in enumerate(self.experts):
            h = expert(rows)  # (B, E)
            z_q_i, id_i, z_i = quantizer.quantize(expert.head(norm(h)), quantizer.codes())
            if i in force:
                z_q_i, id_i = quantizer.say(z_i, force[i])
            rows = torch.cat([rows, h[:, None]], dim=1)
            emitted.append((z_q_i, id_i, z_i))
        return self.joined(emitted, rows, quantizer)


def hide_codes(model: NativeTok) -> NativeTok:
    model.mocet = HiddenMoCET(model.cfg)
    return model


MAIN = {  # what a table is of, unless other arms are asked for
    "titok": Arm({"tokenizer": "titok"}),
    "titok-causal": Arm({"tokenizer": "titok-causal"}),
    "titok-taildrop": Arm({"tokenizer": "titok", "tail_drop": 0.5}),
    "nativetok-joint": Arm(),
    "nativetok-hnt": Arm(grown=True),
    "nativetok-shared": Arm(change=share_experts),
}
ARMS = MAIN | {
    # hnt's training time by joint's, as measured
    "nativetok-joint-time": Arm(share=0.9),
    "nativetok-block": Arm({"expert": "block", "expert_depth": 2}),
    # the tokens of HNT
    "nativetok-reversed": Arm(grown=True, order="reversed"),
    "nativetok-shuffled": Arm(grown=True, order="shuffled"),
    "nativetok-hidden": Arm(change=hide_codes),
}
HNT = "nativetok-hnt"
# levers of commit 403a52d, gone from the code, whose results are kept
GONE = ("nativetok-hnt-drop50", "nativetok-hnt-blur50", "nativetok-prior06")
EXTRA = tuple(arm for arm in ARMS if arm not in MAIN)


@dataclass(frozen=True)
class Plan:
    preset: str
    sizes: dict  # settings of the preset that change here
    budget: int  # steps of each tokenizer
    generator_steps: int
    num_samples: int  # images for each setting of each generator
    judge_steps: int


PLANS = {
    "tiny": Plan("tiny", dict(), 1200, 400, 500, 500),  # seven arms in under 40 minutes
    "cifar": Plan("cifar", dict(), 14000, 2500, 2000, 2000),
    # An arm and seed in about 7 minutes of one thread. With the preset's long fine-tune the first
    # tokens would be left with 200 steps.
    "cifar-cpu": Plan("cifar", dict(finetune_steps=4300, flip=False, generator_width=128,
                                    generator_dropout=0.0), 1300, 800, 1000, 1000),
    "quick": Plan("tiny", dict(encoder_width=64, encoder_heads=2, expert_width=32, expert_heads=2,
                               decoder_width=64, decoder_heads=2, token_schedule=(4, 6, 8),
                               codebook_size=32, batch_size=16, reseed_every=10,
                               generator_width=32, generator_depth=2, generator_heads=2,
                               generator_batch_size=16), 60, 40, 100, 20),
}


# ------------------------------------------------------------------------------------------------
# one budget, and encoders of one size

@functools.cache
def encoder_parameters(tok: TokenizerConfig, change: Callable = as_it_is) -> int:
    """Of what makes tokens of images, at full length."""
    with torch.device("meta"):  # counted without making them
        model = change(NativeTok(replace(tok, token_schedule=(tok.num_tokens,))))
    parts = (model.mit, model.mocet) if tok.tokenizer == "nativetok" else (model.titok,)
    return sum(map(count_parameters, parts))


def matched(tok: TokenizerConfig, name: str, step: int, target: int, change: Callable) -> int:
    """The multiple of `step` that, as tok's `name`, brings the encoder nearest to the target."""
    def size(value: int) -> int:
        return encoder_parameters(replace(tok, **{name: value}), change)
    values = range(step, 8192, step)
    above = bisect.bisect_left(values, target, key=size)
    return min(values[max(0, above - 1):above + 1], key=lambda value: abs(size(value) - target))


def tokenizer_config(preset: dict, settings: dict) -> TokenizerConfig:
    return build(CONFIGS, {**preset, **settings})[0]


def settings_of(arm: str, args) -> tuple[dict, int, int]:
    """-> settings of train.py for this arm beside the preset's, its encoder's parameters,
    NativeTok's."""
    this, preset = ARMS[arm], {**PRESETS[args.preset], **args.sizes}
    budget, longer = round(args.budget * this.share), preset["token_schedule"][1:]
    full_length = (preset["token_schedule"][-1],)

    # 1. Steps. Joint training is one phase of all steps; HNT's phases share the budget in the
    #    preset's proportions. Without quantization go at most as many steps in all arms.
    total = sum((preset["base_steps"], len(longer) * preset["grow_steps"],
                 preset["finetune_steps"]))
    continuous = round(args.budget * preset["base_steps"] / total) // 3
    settings = {**args.sizes, "tail_drop": 0.0, "token_schedule": full_length,
                "base_steps": budget, "generator_steps": args.generator_steps,
                "continuous_steps": min(preset["continuous_steps"], continuous),
                **this.settings}
    if this.grown:
        base = max(1, round(budget * preset["base_steps"] / total))
        grow = max(1, round(budget * preset["grow_steps"] / total))
        settings |= {"token_schedule": preset["token_schedule"], "base_steps": base,
                     "grow_steps": grow, "finetune_steps": budget - base - len(longer) * grow}

    # 2. Parameters.
    native = tokenizer_config(preset, {"token_schedule": full_length})
    target, tok = encoder_parameters(native), tokenizer_config(preset, settings)
    if tok.tokenizer != "nativetok":
        deep = replace(tok, encoder_depth=2 * native.encoder_depth)
        width = matched(deep, "encoder_width", math.lcm(4, tok.encoder_heads), target,
                        as_it_is)
        settings |= {"encoder_depth": deep.encoder_depth, "encoder_width": width}
    elif arm in ("nativetok-block", "nativetok-shared"):
        settings |= {"expert_width": matched(tok, "expert_width", tok.expert_heads, target,
                                             this.change)}
    return settings, encoder_parameters(tokenizer_config(preset, settings), this.change), target


# ------------------------------------------------------------------------------------------------
# another order

class Permuted(nn.Module):
    """A tokenizer whose tokens come in another order: place i of its ids is token order[i] of the
    one inside."""

    def __init__(self, tokenizer: NativeTok, order: Tensor):
        super().__init__()
        self.tokenizer, self.num_tokens, self.cfg = tokenizer, tokenizer.num_tokens, tokenizer.cfg
        self.register_buffer("order", order)
        self.fingerprint = checkpoint.fingerprint({"order": order},
                                                  {"tokenizer": tokenizer.fingerprint})

    def encode(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)[:, self.order]                   # (B, L)

    def decode(self, ids: Tensor) -> Tensor:
        # all L of them: a prefix has holes when put back
        return self.tokenizer.decode(ids[:, self.order.argsort()])


def in_order_of(arm: str, seed: int, tokenizer: NativeTok) -> NativeTok | Permuted:
    """The tokenizer as this arm's generator sees it."""
    L = tokenizer.num_tokens
    if ARMS[arm].order == "as made":
        return tokenizer
    if ARMS[arm].order == "reversed":
        order = torch.arange(L).flip(0)
    else:
        order = torch.randperm(L, generator=torch.Generator().manual_seed(seed))
    return Permuted(tokenizer, order.to(tokenizer.quantizer.codebook.device))
