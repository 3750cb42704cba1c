"""Every setting of the program: frozen dataclasses, the presets, one command line.

In       a preset's name, then command-line flags; the later one wins: default, preset, flag
Out      TokenizerConfig, GeneratorConfig, FlowDecoderConfig, TrainConfig
How      each field below becomes a flag, and the comment behind it becomes the flag's --help line,
         so there is one list of settings and it cannot disagree with itself
Sources  [paper] NativeTok, arXiv 2601.22837, as far as its summaries tell; [TiTok] the public
         1d-tokenizer recipe; [MaskGIT] its MaskGIT part; [LlamaGen] the public AR recipe;
         [2024] the first author's earlier public experiments, order_1-d; [ours] our choice,
         measured where README.md or experiments/README.md says so
Try      python config.py      (prints the presets side by side)
"""
import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from plumbing.flags import (
    Parser, UserError, as_dict, at_least_one, below_one, build, choose, need, need_seed,
    not_negative, number, parse_command, shares, sizes)


@dataclass(frozen=True)
class TokenizerConfig:
    tokenizer: str = "nativetok"  # encoder: nativetok, or a baseline: titok, titok-causal
    image_size: int = 256  # side of the square images, in pixels
    patch_size: int = 16  # side of a patch, in pixels [TiTok]
    encoder_width: int = 768  # channels of MIT (or of the baseline's ViT) [TiTok-B]
    encoder_depth: int = 12  # transformer blocks of MIT [TiTok-B]
    encoder_heads: int = 12  # attention heads of MIT [TiTok-B]
    # expert form: query (only the query row is computed) or block (as published)
    expert: str = "query"
    # channels of an expert; the dimension switcher maps MIT to this [paper]
    expert_width: int = 256
    expert_depth: int = 2  # layers of an expert [paper]
    expert_heads: int = 4  # attention heads of an expert [ours: 64 channels each]
    # experts learn all at once, and no gradient reaches one through the tokens that others read
    # [ours: half of the operations, 0.1 dB less for grown tokenizers, see mocet.py]
    teacher_forcing: bool = False
    # tokens after stage 1, then after each growth step [paper]
    token_schedule: tuple[int, ...] = (32, 64, 128)
    codebook_size: int = 4096  # number of codes, shared by all positions [TiTok]
    code_dim: int = 12  # channels of a code [TiTok]
    # weight of the loss that keeps each position from emitting always the same code, 0 for none
    # [ours: measured, experiments/README.md]
    entropy_weight: float = 0.025
    decoder_width: int = 768  # channels of the decoder [TiTok-B]
    decoder_depth: int = 12  # transformer blocks of the decoder [TiTok-B]
    decoder_heads: int = 12  # attention heads of the decoder [TiTok-B]
    # how patches read codes: attention [TiTok], linear, one map of its own for each code [ours], or
    # both
    decoder_reads: str = "attention"
    # pixels of its neighbours that a patch predicts too, blended, so that no seam shows [ours]
    decoder_overlap: int = 0
    # fraction of training steps that keep the first k ~ U{1..L} tokens only [One-D-Piece]
    tail_drop: float = 0.0

    def __post_init__(self):
        choose("tokenizer", self.tokenizer, ("nativetok", "titok", "titok-causal"))
        choose("expert", self.expert, ("query", "block"))
        choose("decoder_reads", self.decoder_reads, ("attention", "linear", "both"))
        sizes(self, "image_size", most=2 ** 14)
        sizes(self, "patch_size", "encoder_width", "encoder_heads", "expert_width", "expert_heads",
              "codebook_size", "code_dim", "decoder_width", "decoder_heads")
        sizes(self, "encoder_depth", "expert_depth", "decoder_depth", most=1000)
        if self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            options = " or ".join(str(s) for s in (below, below + self.patch_size) if s)
            raise UserError(f"image_size {self.image_size} is not a multiple of patch_size "
                            f"{self.patch_size}; try {options}")
        for part in ("encoder", "expert", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            need(width % heads == 0,
                 f"{part}_width {width} is not a multiple of {part}_heads {heads}")
        # Half of the channels tell the row, half the column, each as sine and cosine.
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            both = math.lcm(4, heads)
            need(width % both == 0, f"{part}_width {width} is not a multiple of 4 and of "
                 f"{part}_heads {heads}; try {width // both * both + both}")
        steps = self.token_schedule
        need(len(steps) > 0 and steps[0] >= 1 and all(a < b for a, b in zip(steps, steps[1:])),
             f"token_schedule {' '.join(map(str, steps))} must grow at every step, like 32 64 128")
        need(steps[-1] <= 2 ** 16,
             f"token_schedule {steps[-1]} is out of range; give up to {2 ** 16:,} tokens")
        need(len(steps) == 1 or self.tokenizer == "nativetok",
             f"{self.tokenizer} has no experts to grow; give one length, "
             f"like --token_schedule {steps[-1]}")
        shares(self, "tail_drop")
        not_negative(self, "entropy_weight", "decoder_overlap")
        need(2 * self.decoder_overlap <= self.patch_size,
             f"decoder_overlap {self.decoder_overlap} is more than half of patch_size "
             f"{self.patch_size}")

    @property
    def num_patches(self) -> int:  # N
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:  # L at the end of training
        return self.token_schedule[-1]


@dataclass(frozen=True)
class GeneratorConfig:
    generator_width: int = 768  # channels [LlamaGen-B]
    generator_depth: int = 12  # transformer blocks [LlamaGen-B]
    generator_heads: int = 12  # attention heads [LlamaGen-B]
    generator_dropout: float = 0.1  # dropout after attention and MLP [LlamaGen, MaskGIT]
    label_smoothing: float = 0.1  # MaskGIT only: label smoothing [MaskGIT]

    def __post_init__(self):
        sizes(self, "generator_width", "generator_heads")
        sizes(self, "generator_depth", most=1000)
        below_one(self, "generator_dropout", "label_smoothing")  # at 1 nothing would be learned
        width, heads = self.generator_width, self.generator_heads
        need(width % heads == 0 and width // heads % 2 == 0,
             f"generator_width {width} must be generator_heads {heads} times an even number "
             "(rotary pairs)")


# Share of labels hidden in training, so that guidance has an unconditional side [LlamaGen, DiT].
LABEL_DROPOUT = 0.1


@dataclass(frozen=True)
class FlowDecoderConfig:
    flow_decoder_width: int = 768  # channels [DiT-B]
    flow_decoder_depth: int = 12  # DiT blocks [DiT-B]
    flow_decoder_heads: int = 12  # attention heads [DiT-B]
    flow_decoder_patch_size: int = 16  # side of its patches, in pixels [JiT-B/16]

    def __post_init__(self):
        sizes(self, "flow_decoder_width", "flow_decoder_heads", "flow_decoder_patch_size")
        sizes(self, "flow_decoder_depth", most=1000)
        width, both = self.flow_decoder_width, math.lcm(4, self.flow_decoder_heads)
        need(width % both == 0, f"flow_decoder_width {width} is not a multiple of 4 and of "
             f"flow_decoder_heads {self.flow_decoder_heads}; try {width // both * both + both}")


class Optim(NamedTuple):
    """How one network learns: what a stage of training takes of the settings."""
    batch_size: int  # over all processes
    steps: int
    learning_rate: float  # the peak, after warmup_steps
    min_learning_rate: float  # at the end
    warmup_steps: int
    beta2: float
    weight_decay: float


@dataclass(frozen=True)
class RunConfig:
    """What every training run has, of NativeTok and of D2iT."""
    # image folder, flat folder, .tar .tar.gz .tar.xz .zip, WebDataset shards, .npz, or "shapes"
    data: str = "shapes"
    val_data: str = ""  # held-out images in any of these forms; empty: some of --data are set aside
    # images of --data set aside when there is no --val_data (at most a tenth of them)
    holdout: int = 1000
    # training takes a random crop of the resized image instead of its centre
    random_crop: bool = False
    flip: bool = True  # training mirrors half of the images; the token cache holds both copies
    # count unreadable images and go on, up to 1%, instead of stopping at the first
    skip_bad: bool = False
    seed: int = 0  # seed of weights, data order, augmentation and noise
    # how weights are moved
    batch_size: int = 256  # images per step over all processes [TiTok, DiT]
    # learning rate at the end of a phase, at most its peak [TiTok]
    min_learning_rate: float = 1e-5
    warmup_steps: int = 5000  # steps until the learning rate has reached its peak [TiTok]
    # of hidden matrices: adamw [TiTok, DiT] or muon [ours: see muon.py]
    optimizer: str = "adamw"
    # Muon's peak; it rises and falls like the other learning rates [Jordan]
    muon_learning_rate: float = 0.02
    beta2: float = 0.999  # AdamW's second decay; the first is 0.9 [TiTok]
    weight_decay: float = 1e-4  # AdamW's weight decay, on matrices only [TiTok]
    grad_clip: float = 1.0  # largest gradient norm, 0 for no limit [TiTok]
    # micro-batches per step and process, to fit a large batch into memory; the entropy loss and the
    # restart of dead codes then look at one micro-batch at a time
    accumulate: int = 1
    # decay of the averaged weights, which are the ones that are used [TiTok]
    ema_decay: float = 0.999
    # how to run: these may differ when a run is resumed
    workers: int = 0  # data-loading processes per training process
    precision: str = "auto"  # auto (bf16 where the GPU has it), fp32 or bf16
    # seconds that a process waits for the others before it gives up and ends the run
    timeout: int = 600
    log_every: int = 50  # steps between lines of log.jsonl
    save_every: int = 1000  # steps between checkpoints
    sample_every: int = 5000  # steps between pictures in samples/

    def __post_init__(self):
        need_seed(self.seed)
        below_one(self, "beta2")  # at 1 the average would never take anything in
        choose("precision", self.precision, ("auto", "fp32", "bf16"))
        choose("optimizer", self.optimizer, ("adamw", "muon"))
        shares(self, "ema_decay")
        sizes(self, "batch_size", "accumulate")
        at_least_one(self, "holdout", "timeout", "log_every", "save_every", "sample_every")
        not_negative(self, "workers", "min_learning_rate", "warmup_steps", "weight_decay",
                     "grad_clip", "muon_learning_rate")
        need(self.workers <= 1024, f"workers {self.workers} is out of range; give 0 to 1024")

    def optim(self, steps: int, learning_rate: float) -> Optim:
        """For a network that learns for so many steps, with this peak of its learning rate."""
        return Optim(self.batch_size, steps, learning_rate, self.min_learning_rate,
                     self.warmup_steps, self.beta2, self.weight_decay)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    # stages 1 and 2: the tokenizer
    learning_rate: float = 1e-4  # peak learning rate [TiTok]
    # first steps without quantization, before the codebook is drawn from z [ours]
    continuous_steps: int = 1000
    base_steps: int = 300000  # steps of stage 1, the continuous ones included [ours]
    grow_steps: int = 100000  # steps of each growth step in stage 2 [ours]
    finetune_steps: int = 50000  # steps of the joint fine-tune at the end of stage 2 [ours]
    # the codebook's learning rate, as a multiple of the others': a faster codebook tracks the
    # encoder better, and the distance between them is what quantization costs [ours: LOG.md]
    codebook_rate: float = 1.0
    # steps between replacements of codes that nothing chose, 0 for never [ours]
    reseed_every: int = 100
    # stage 3: the generators
    generators: str = "both"  # which generators to train: ar, maskgit or both
    generator_batch_size: int = 256  # token sequences per step over all processes [LlamaGen]
    generator_learning_rate: float = 1e-4  # peak learning rate [LlamaGen]
    generator_warmup_steps: int = 1000  # steps until the learning rate has reached its peak [ours]
    generator_steps: int = 500000  # steps of each generator [MaskGIT]
    # stage 4: the flow decoder
    flow_decoder_steps: int = 0  # steps of the flow decoder, such as 2000 at 32 pixels; 0 for none
    flow_decoder_learning_rate: float = 1e-4  # peak learning rate [DiT]
    # how to run, beside what RunConfig has
    # on CUDA GPUs: record the kernels of a training step and replay them, see plumbing/graphs.py
    cuda_graph: bool = True

    def __post_init__(self):
        super().__post_init__()
        choose("generators", self.generators, ("ar", "maskgit", "both"))
        sizes(self, "generator_batch_size")
        at_least_one(self, "base_steps", "grow_steps", "finetune_steps", "generator_steps")
        not_negative(self, "learning_rate", "codebook_rate",
                     "generator_learning_rate", "generator_warmup_steps", "reseed_every",
                     "flow_decoder_steps", "flow_decoder_learning_rate")
        need(0 <= self.continuous_steps < self.base_steps,
             f"continuous_steps {self.continuous_steps} must leave quantized steps in base_steps "
             f"{self.base_steps}")

    @property
    def generator(self) -> Optim:
        """How each generator learns; its last rate and AdamW's two decays are LlamaGen's."""
        return Optim(self.generator_batch_size, self.generator_steps, self.generator_learning_rate,
                     1e-4, self.generator_warmup_steps, beta2=0.95, weight_decay=0.05)

    @property
    def generator_kinds(self) -> tuple[str, ...]:
        return ("ar", "maskgit") if self.generators == "both" else (self.generators,)


# May differ when a run is resumed.
RUN_ONLY = ("data", "val_data", "generators", "workers", "precision", "cuda_graph", "timeout",
            "log_every", "save_every", "sample_every", "skip_bad")
CONFIGS = (TokenizerConfig, GeneratorConfig, FlowDecoderConfig, TrainConfig)
GENERATOR_FIELDS = tuple(f.name for f in dataclasses.fields(GeneratorConfig))

# The defaults above are these presets' own.
IMAGENET = dict(teacher_forcing=True, random_crop=True, workers=8)
# 32x32 images. Sizes, rates and shares of the phases: by quality per minute on two CPU cores [ours:
# experiments/LOG.md]. Small models get more steps, and Muon makes each of them worth about two.
SMALL = dict(
    image_size=32, patch_size=8, encoder_width=128, encoder_depth=1, encoder_heads=4,
    expert_width=64, expert_depth=1, expert_heads=16, token_schedule=(4, 8, 16),
    decoder_width=128, decoder_depth=1, decoder_heads=4, decoder_reads="linear", decoder_overlap=2,
    optimizer="muon", batch_size=64, learning_rate=3e-3, min_learning_rate=1.5e-4,
    warmup_steps=20, beta2=0.99, ema_decay=0.99, reseed_every=50,
    generator_heads=4, generator_learning_rate=1e-3, generator_warmup_steps=20,
    flow_decoder_width=160, flow_decoder_depth=4, flow_decoder_heads=5,
    flow_decoder_patch_size=4, flow_decoder_learning_rate=2e-3)
PRESETS = {
    "tiny": dict(  # the built-in shapes, stages 1 to 3 in minutes on a CPU
        SMALL, codebook_size=256, flip=False, continuous_steps=70, base_steps=420, grow_steps=175,
        finetune_steps=630, generator_width=128, generator_depth=4, generator_dropout=0.0,
        label_smoothing=0.0, generator_batch_size=64, generator_steps=500, log_every=20,
        save_every=250, sample_every=250),
    "cifar": dict(  # real 32x32 images, --data needed; an hour or two on 2 CPU cores
        SMALL, codebook_size=512, encoder_depth=2, decoder_depth=2, decoder_reads="both",
        codebook_rate=5.0, weight_decay=0.1, continuous_steps=200, base_steps=2000, grow_steps=600,
        finetune_steps=10000,
        generator_width=192, generator_depth=4, generator_batch_size=64, generator_steps=5000,
        save_every=500, sample_every=1000),
    "imagenet-32": dict(IMAGENET, token_schedule=(32,)),
    "imagenet-64": dict(IMAGENET, token_schedule=(32, 64)),
    "imagenet-128": dict(IMAGENET, token_schedule=(32, 64, 128)),
}


def load_preset(name: str) -> tuple:
    """A preset's configurations, one of each of CONFIGS. Raises UserError for an unknown name."""
    choose("preset", name, PRESETS)
    return build(CONFIGS, PRESETS[name])


def parse_run(doc: str, argv=None) -> argparse.Namespace:
    """The command line of train.py -> .run .preset .stage .device and .tok .gen .flow .train.

    Later wins: default, preset, flag. A run folder that exists stands for the preset it was made
    with, and for the settings that were given then.
    """
    parser = Parser(prog="python train.py", description=doc, epilog=(
        f"Presets: {', '.join(PRESETS)}. Defaults above are those of the imagenet presets; "
        "python config.py shows what the others change."))
    args, (tok, gen, flow, train) = parse_command(parser, PRESETS, "tiny", CONFIGS,
                                                   (1, 2, 3, 4), argv)
    return argparse.Namespace(**vars(args), tok=tok, gen=gen, flow=flow, train=train)


def settings(kind: str, *configs) -> dict:
    """What must stay the same while a "tokenizer", a "generator" or a "flow_decoder" is trained:
    {name: value}."""
    def owner(name):
        if name.startswith("flow_decoder_"):
            return "flow_decoder"
        of_generator = name.startswith("generator_") or name in GENERATOR_FIELDS
        return "generator" if of_generator else "tokenizer"
    return {name: value for name, value in as_dict(*configs).items()
            if owner(name) == kind and name not in RUN_ONLY}


# ------------------------------------------------------------------------------------------------
# how samples are drawn: flags of sample.py and eval_fid.py

class Option(NamedTuple):
    """What a model's sample() can be given, as a flag: read(text) -> value."""
    read: Callable
    default: float | None  # None: the model knows, .default_steps
    help: str


GUIDANCE = 2.0  # what programs guide with where nothing else is asked for [ours]
SAMPLING = {
    "cfg_scale": Option(number(float), GUIDANCE, "guidance: 0 unconditional, 1 plain, above 1 "
                        "guided (default: 2)"),
    "temperature": Option(number(float), 1.0, "of the tokens' distribution; 0 takes the likeliest "
                          "(default: 1)"),
    "top_k": Option(number(int), 0, "ar: draw from the k likeliest tokens; 0: off (default: 0)"),
    "top_p": Option(number(float, 1e-6, 1), 1.0, "ar: draw from the likeliest tokens that reach "
                    "this probability; 1: off (default: 1)"),
    "steps": Option(number(int, 1), None, "maskgit: passes, from 1 to the number of tokens "
                    "(default: 8, at most that number)"),
    "randomize_temperature": Option(number(float), 4.5, "maskgit: noise on the confidences; "
                                    "0: none (default: 4.5)"),
}


if __name__ == "__main__":
    columns = {name: as_dict(*load_preset(name)) for name in PRESETS}
    print(f"{'':28}" + "".join(f"{name:>16}" for name in columns))
    for field in columns["tiny"]:
        cells = [column[field] for column in columns.values()]
        text = [" ".join(map(str, c)) if isinstance(c, list) else str(c) for c in cells]
        mark = "   *" if len(set(text)) > 1 else ""
        print(f"{field:28}" + "".join(f"{t:>16}" for t in text) + mark)
    print("\n* differs between presets; every value's source stands behind its field in this file")
