"""The arms of order.py: tokenizers of equal size under one budget, and tokens in another order.

Shared   images and their order, steps (HNT's phases together take as many as the others),
         optimizer, codebook, decoder, number of tokens, generator. No arm but one drops tails.
Sizes    encoders have as many parameters as NativeTok's, within 10%: the ViT of titok is twice as
         deep as MIT and as wide as it takes; block experts, and one expert for all positions, are
         as wide as it takes.

Levers, one change each, when asked for:

    nativetok-hidden      joint, as in the first author's earlier code: experts read each other's
                          outputs as they are and share one head
    nativetok-hnt-drop25  hnt; a quarter of the images keeps the tokens of an earlier stage only
    nativetok-hnt-drop50  the same with half of them
    nativetok-hnt-blur50  the same, and these are asked for a blurred target only
    nativetok-prior02     joint, with an AR prior in the tokenizer's loss: weight 0.02
    nativetok-prior06     0.06
    nativetok-prior20     0.2
    nativetok-hnt-gentle  hnt; growth climbs to 0.3 of the peak
    nativetok-hnt-thawed  hnt; old experts learn on at a tenth of the rate, so old ids do not stay:
                          no hierarchical native training any more
"""
import bisect
import functools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from config import CONFIGS, PRESETS, TokenizerConfig
from layers import count_parameters
from mit import MIT
from mocet import MoCET
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.flags import build
from titok import TiTok


@dataclass(frozen=True)
class Arm:
    settings: dict = field(default_factory=dict)  # beside those that all arms share
    grown: bool = False  # by HNT's phases, instead of all tokens at once
    order: str = "as made"  # in which the generator gets the tokens: as made, reversed, shuffled
    share: float = 1.0  # of the budget's steps


STAGES = {"tail_drop_lengths": "stages"}
MAIN = {  # what a table is of, unless other arms are asked for
    "titok": Arm({"tokenizer": "titok"}),
    "titok-causal": Arm({"tokenizer": "titok-causal"}),
    "titok-taildrop": Arm({"tokenizer": "titok", "tail_drop": 0.5}),
    "nativetok-joint": Arm(),
    "nativetok-hnt": Arm(grown=True),
    "nativetok-shared": Arm({"experts": "shared", "head": "shared"}),
}
ARMS = MAIN | {
    # hnt's training time by joint's, as measured
    "nativetok-joint-time": Arm(share=0.9),
    "nativetok-block": Arm({"expert": "block", "expert_depth": 2}),
    # the tokens of HNT
    "nativetok-reversed": Arm(grown=True, order="reversed"),
    "nativetok-shuffled": Arm(grown=True, order="shuffled"),
    "nativetok-hidden": Arm({"prior": "hidden", "head": "shared"}),
    "nativetok-hnt-drop25": Arm({"tail_drop": 0.25, **STAGES}, grown=True),
    "nativetok-hnt-drop50": Arm({"tail_drop": 0.5, **STAGES}, grown=True),
    "nativetok-hnt-blur50": Arm({"tail_drop": 0.5, **STAGES, "tail_drop_blur": True}, grown=True),
    "nativetok-prior02": Arm({"ar_prior_weight": 0.02}),
    "nativetok-prior06": Arm({"ar_prior_weight": 0.06}),
    "nativetok-prior20": Arm({"ar_prior_weight": 0.2}),
    "nativetok-hnt-gentle": Arm({"grow_rate": 0.3}, grown=True),
    "nativetok-hnt-thawed": Arm({"grow_old_rate": 0.1}, grown=True),
}
HNT = "nativetok-hnt"
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
def encoder_parameters(tok: TokenizerConfig) -> int:
    """Of what makes tokens of images, at full length."""
    # Tails are cut to earlier lengths, and there are none here.
    whole = replace(tok, token_schedule=(tok.num_tokens,), tail_drop=0.0)
    with torch.device("meta"):  # counted without making them
        parts = (MIT(whole), MoCET(whole)) if tok.tokenizer == "nativetok" else (TiTok(whole),)
    return sum(map(count_parameters, parts))


def matched(tok: TokenizerConfig, name: str, step: int, target: int) -> int:
    """The multiple of `step` that, as tok's `name`, brings the encoder nearest to the target."""
    def size(value: int) -> int:
        return encoder_parameters(replace(tok, **{name: value}))
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
        width = matched(deep, "encoder_width", math.lcm(4, tok.encoder_heads), target)
        settings |= {"encoder_depth": deep.encoder_depth, "encoder_width": width}
    elif tok.expert == "block" or tok.experts == "shared":
        settings |= {"expert_width": matched(tok, "expert_width", tok.expert_heads, target)}
    return settings, encoder_parameters(tokenizer_config(preset, settings)), target


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
