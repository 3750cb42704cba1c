"""Settings of D²iT: three dataclasses, which become the flags of d2it/train.py, and their presets.

In       the command line
Out      DVAEConfig, ContentConfig, TrainConfig; later wins: default, preset, flag
Differs  the paper's settings of training are not published where we could read them. What stands
         here is DiT's or ours, and every field says which
Try      python -m d2it.presets
"""
import argparse
import math
from dataclasses import dataclass

from config import RUN_ONLY, GeneratorConfig, RunConfig
from d2it.grain import POLICIES
from plumbing.flags import (
    Parser, as_dict, at_least_one, build, choose, need, not_negative, parse_command, shares,
    sizes)


def norm_groups(width: int) -> int:
    """Groups in which so many channels are normed: 32, or fewer of four channels each."""
    return min(32, width // 4)


@dataclass(frozen=True)
class DVAEConfig:
    image_size: int = 256  # side of the square images, in pixels
    grain_ratio: float = 0.5  # share of the training images' cells that are to be fine [DQ-VAE]
    grain_policy: str = "entropy"  # entropy [paper]; none or all: coarse, fine
    code_dim: int = 4  # numbers in a code [LDM]
    dvae_width: int = 128  # channels at full resolution [DQ-VAE]
    # channels / dvae_width; each but the first halves, down to one coarse code: four halvings make
    # cells of 16 pixels, as in the paper [DQ-VAE]
    dvae_mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    dvae_blocks: int = 2  # residual blocks a level; the decoder has one more [DQ-VAE]
    kl_weight: float = 1e-4  # weight of the KL divergence, in nats per number of a code [ours]

    def __post_init__(self):
        choose("grain_policy", self.grain_policy, POLICIES)
        sizes(self, "image_size", most=2 ** 14)
        sizes(self, "code_dim", "dvae_width")
        sizes(self, "dvae_blocks", most=1000)
        shares(self, "grain_ratio")
        not_negative(self, "kl_weight")
        cell, mults = self.cell_size, " ".join(map(str, self.dvae_mults))
        need(min(self.dvae_mults, default=0) >= 1, f"dvae_mults {mults} must be 1 or above")
        need(cell >= 4, f"dvae_mults {mults} make cells of {cell} pixels, which cannot be halved "
             "twice; give three numbers or more")
        widest = max(self.dvae_mults) * self.dvae_width
        need(widest <= 2 ** 20, f"dvae_width {self.dvae_width} by dvae_mults {mults} makes "
             f"{widest:,} channels; give less")
        # A multiple of 32 always fits.
        near = next(w for w in range(self.dvae_width, self.dvae_width + 33) if self.normed(w))
        need(near == self.dvae_width, f"dvae_width {self.dvae_width} by dvae_mults {mults} makes "
             f"channels that cannot be normed in equal groups; try --dvae_width {near}")
        below = self.image_size // cell * cell
        options = " or ".join(str(s) for s in (below, below + cell) if s)
        need(self.image_size % cell == 0,
             f"image_size {self.image_size} is not a multiple of {cell}, the side of a cell "
             f"(dvae_mults {mults}); try {options}")

    def normed(self, width: int) -> bool:
        """Can all levels of a DVAE of this width be normed in equal groups?"""
        levels = [mult * width for mult in self.dvae_mults]
        return width % 4 == 0 and not any(level % norm_groups(level) for level in levels)

    @property
    def cell_size(self) -> int:  # S, pixels on a side; a fine code stands for a quarter of a cell
        return 2 ** (len(self.dvae_mults) - 1)

    @property
    def side(self) -> int:  # n, cells on a side
        return self.image_size // self.cell_size


@dataclass(frozen=True)
class ContentConfig:
    content_width: int = 768  # channels of the content transformer [DiT-B]
    content_depth: int = 10  # blocks of the rough network, over the cells [paper]
    refine_depth: int = 2  # blocks of RefineNet, over fine codes only; 0 for none [paper]
    content_heads: int = 12  # attention heads [DiT-B]
    path: str = "noise"  # noise: the net predicts the noise [DiT]; flow: a direction [SiT]
    grain_width: int = 384  # channels of the grain transformer [ours: DiT-S's size]
    grain_depth: int = 12  # blocks of the grain transformer [ours]
    grain_heads: int = 6  # attention heads of the grain transformer [ours]

    def __post_init__(self):
        choose("path", self.path, ("noise", "flow"))
        sizes(self, "content_width", "content_heads", "grain_width", "grain_heads")
        sizes(self, "content_depth", "grain_depth", most=1000)
        need(0 <= self.refine_depth <= 1000,
             f"refine_depth {self.refine_depth} is out of range; give 0 (none) to 1,000")
        width, heads = self.content_width, self.content_heads
        both = math.lcm(4, heads)
        need(width % both == 0, f"content_width {width} is not a multiple of 4 and of "
             f"content_heads {heads}; try {width // both * both + both}")
        need(self.grain_width % (2 * self.grain_heads) == 0, f"grain_width {self.grain_width} must "
             f"be grain_heads {self.grain_heads} times an even number")

    def generator(self) -> GeneratorConfig:
        """The grain transformer's settings, as generator.py calls them."""
        return GeneratorConfig(generator_width=self.grain_width, generator_depth=self.grain_depth,
                               generator_heads=self.grain_heads, generator_dropout=0.0)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    dvae_steps: int = 300000  # steps of stage 1 [ours]
    dvae_learning_rate: float = 1e-4  # its peak learning rate [ours]
    grain_steps: int = 100000  # steps of stage 2 [ours]
    grain_learning_rate: float = 1e-4  # its peak learning rate [LlamaGen]
    content_steps: int = 400000  # steps of stage 3 [DiT]
    content_learning_rate: float = 1e-4  # its peak learning rate [DiT, where it stays constant]

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "dvae_steps", "grain_steps", "content_steps")
        not_negative(self, "dvae_learning_rate", "grain_learning_rate", "content_learning_rate")


CONFIGS = (DVAEConfig, ContentConfig, TrainConfig)

# 32x32 images in cells of 8: 4x4 cells, 16 to 64 codes. The straight path is for short runs [ours:
# measured]: on DiT's, half of the times are nearly all noise and weigh next to nothing in the loss,
# though class and places are settled there. After 850 steps on the shapes 99% of the samples show
# their class, on DiT's path 71%.
SMALL = dict(
    image_size=32, dvae_width=16, dvae_mults=(1, 2, 2, 4), dvae_blocks=1,
    content_width=128, content_depth=4, refine_depth=2, content_heads=4, path="flow",
    grain_width=96, grain_depth=3, grain_heads=6, beta2=0.99, weight_decay=0.0,
    optimizer="muon", batch_size=32, warmup_steps=50, ema_decay=0.995,
    dvae_learning_rate=2e-3, grain_learning_rate=1e-3, content_learning_rate=1e-3,
    log_every=20, save_every=100, sample_every=300)
PRESETS = {
    # the built-in shapes, minutes on a CPU
    "d2it-tiny": dict(SMALL, flip=False, dvae_steps=600, grain_steps=400, content_steps=1000),
    # your own images at 32x32, --data needed
    "d2it-cifar": dict(SMALL, dvae_width=32, content_width=192, content_heads=6,
                       dvae_steps=8000, grain_steps=3000, content_steps=30000,
                       save_every=500, sample_every=2000, ema_decay=0.999),
    # your own images at 64x64: 8x8 cells, the smallest size at which a map is worth predicting
    "d2it-64": dict(SMALL, image_size=64, dvae_width=32, dvae_blocks=2, content_width=384,
                    content_depth=10, content_heads=6, grain_width=192, grain_depth=6,
                    batch_size=128, dvae_steps=40000, grain_steps=20000, content_steps=100000,
                    dvae_learning_rate=5e-4, grain_learning_rate=3e-4,
                    content_learning_rate=3e-4, warmup_steps=500, ema_decay=0.9995,
                    log_every=50, save_every=1000, sample_every=5000, workers=4),
    # the paper's size, D²iT-B: DiT-B's width, 10 + 2 blocks; decays as DiT has them, the rest ours
    "d2it-256": dict(workers=8, warmup_steps=1000, beta2=0.99, weight_decay=0.0, ema_decay=0.9999,
                     sample_every=10000),
}


def load_preset(name: str) -> tuple[DVAEConfig, ContentConfig, TrainConfig]:
    """A preset's three configurations. Raises UserError for an unknown name."""
    choose("preset", name, PRESETS)
    return build(CONFIGS, PRESETS[name])


def parse_run(doc: str, argv=None) -> argparse.Namespace:
    """The command line of d2it.train -> .run .preset .stage .device and .dvae .content .train."""
    parser = Parser(prog="python -m d2it.train", description=doc, epilog=(
        f"Presets: {', '.join(PRESETS)}; python -m d2it.presets shows what each of them sets."))
    args, (dvae, content, train) = parse_command(parser, PRESETS, "d2it-tiny", CONFIGS,
                                                 (1, 2, 3), argv)
    return argparse.Namespace(**vars(args), dvae=dvae, content=content, train=train)


def settings(stage: int, dvae: DVAEConfig, content: ContentConfig, train: TrainConfig) -> dict:
    """The fields that must stay the same while this stage is trained, as one flat dictionary.

    Later stages may be trained anew with other settings on the same DVAE.
    """
    of_maps = ("grain_width", "grain_depth", "grain_heads")
    of_content = tuple(name for name in as_dict(content) if name not in of_maps)
    mine = as_dict(dvae) if stage == 1 else {
        name: as_dict(content)[name] for name in (of_maps if stage == 2 else of_content)}
    others = [p for s, p in ((1, "dvae_"), (2, "grain_"), (3, "content_")) if s != stage]
    shared = {name: value for name, value in as_dict(train).items()
              if name not in RUN_ONLY and not name.startswith(tuple(others))}
    return {**mine, **shared}


if __name__ == "__main__":
    columns = {name: as_dict(*load_preset(name)) for name in PRESETS}
    print(f"{'':24}" + "".join(f"{name:>14}" for name in columns))
    for field in columns["d2it-tiny"]:
        text = [str(column[field]).strip("[]").replace(",", "") for column in columns.values()]
        print(f"{field:24}" + "".join(f"{t:>14}" for t in text))
    for name in PRESETS:
        n = load_preset(name)[0].side
        print(f"{name}: {n} x {n} cells, {n * n} to {4 * n * n} codes, 2^{n * n} possible maps")
    print("\nHow many of those maps will ever be seen in training?")
