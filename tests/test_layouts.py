"""Every public function that takes a tensor takes it in any layout, with any number of rows.

The values are the same and lie otherwise in memory: transposed, cut out of a larger tensor, every
second one of a longer row, one row for all. Results equal those of contiguous tensors up to the
rounding of another kernel, 1e-5 of their largest number in float32 and 2% in bfloat16; and at most
one id in ten may be another one, where a choice was that close.
"""
import copy
import functools
import importlib
import inspect
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import decoder
import diffusion
import flow_decoder
import generator
import layers
import losses
import mocet
import quantizer
from config import FlowDecoderConfig, GeneratorConfig, TokenizerConfig
from d2it import content, dvae, grain
from d2it.model import D2iT
from d2it.presets import ContentConfig, DVAEConfig
from diffusion import T
from flow_decoder import Decoding, FlowDecoder
from mit import MIT
from nativetok import NativeTok, sample_batch
from titok import TiTok

FILES = ("layers", "mit", "mocet", "titok", "quantizer", "decoder", "nativetok", "generator",
         "losses", "diffusion", "flow_decoder", "d2it.grain", "d2it.dvae", "d2it.content",
         "d2it.model")
D, HEADS, K, d, C, P = 8, 2, 8, 4, 3, 4  # width, heads, codes, channels of one, classes, patch
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.02}


# ------------------------------------------------------------------------------------------------
# inputs

@dataclass(frozen=True)
class Case:
    """Rows B, tokens T (1 or 4, a square for images), and the type of models and numbers."""
    B: int
    T: int
    dtype: torch.dtype

    @property
    def side(self) -> int:
        return round(self.T ** 0.5)

    def x(self, *shape, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def images(self, size: int = 0) -> Tensor:
        size = size or P * self.side
        return self.x(self.B, 3, size, size).clamp(-1, 1)

    def ids(self, count: int, *shape) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        return torch.randint(count, shape, generator=draw)

    def pixels(self) -> Tensor:
        return self.ids(256, self.B, 4 * self.side, 4 * self.side, 3).to(torch.uint8)

    def grain(self) -> Tensor:
        return self.ids(2, self.B, self.side, self.side).bool()


@functools.cache
def model(kind: str, case: Case):
    """One of the small models below, for so many tokens; the same one at every call."""
    T, side = case.T, case.side
    cfg = TokenizerConfig(
        image_size=P * side, patch_size=P, token_schedule=(T,), codebook_size=K, code_dim=d,
        encoder_width=D, encoder_depth=1, encoder_heads=HEADS, expert_width=D, expert_heads=HEADS,
        expert="block" if kind == "block" else "query", decoder_width=D, decoder_depth=1,
        decoder_heads=HEADS, decoder_reads="both", decoder_overlap=1, tail_drop=0.5,
        tokenizer="titok-causal" if kind == "titok" else "nativetok")
    gen = GeneratorConfig(generator_width=D, generator_depth=1, generator_heads=HEADS)
    dv = DVAEConfig(image_size=4 * side, cell_size=4, code_dim=d, dvae_width=8, dvae_blocks=1,
                    dvae_mults=(1, 1, 1))
    con = ContentConfig(content_width=D, content_depth=1, refine_depth=1, content_heads=HEADS)
    make = {
        "attention": lambda: layers.Attention(D, HEADS),
        "mlp": lambda: layers.MLP(D),
        "vit": lambda: layers.ViTBlock(D, HEADS),
        "rms": lambda: layers.RMSNorm(D),
        "swiglu": lambda: layers.SwiGLU(D),
        "llama": lambda: layers.LlamaBlock(D, HEADS),
        "mit": lambda: MIT(cfg), "titok": lambda: TiTok(cfg),
        "query": lambda: mocet.MoCET(cfg), "block": lambda: mocet.MoCET(cfg),
        "codes": lambda: quantizer.VectorQuantizer(cfg),
        "decoder": lambda: decoder.Decoder(cfg),
        "nativetok": lambda: NativeTok(cfg),
        "ar": lambda: generator.ARGenerator(gen, T, K, C),
        "maskgit": lambda: generator.MaskGITGenerator(gen, T, K, C),
        "maps": lambda: generator.ARGenerator(gen, T, 2, C),
        "res": lambda: dvae.ResBlock(D, 4), "dvae": lambda: dvae.DVAE(dv),
        "flow": lambda: flow_decoder.FlowNet(FlowDecoderConfig(
            flow_decoder_width=D, flow_decoder_depth=1, flow_decoder_heads=HEADS,
            flow_decoder_patch_size=P), cfg),
        "time": lambda: layers.TimeEmbedding(D), "dit": lambda: layers.DiTBlock(D, HEADS),
        "last": lambda: layers.LastNorm(D),
        "refine": lambda: content.RefineNet(con, d, side),
        "content": lambda: content.Content(con, d, side, C),
        "d2it": lambda: D2iT(dvae.DVAE(dv), generator.ARGenerator(gen, T, 2, C),
                             content.Content(con, d, side, C), ["a", "b", "c"]),
    }
    with torch.random.fork_rng():  # a model may be made in the middle of what it is used for
        torch.manual_seed(0)
        made = make[kind]()
        for p in made.parameters():
            if p.ndim > 1 and not p.any():  # as after training: at first some parts say nothing
                nn.init.normal_(p, std=0.1)
    return made.to(case.dtype).eval()


def expert(c: Case, form: str = "query"):
    """-> MoCET, its first expert and that one's first layer."""
    net = model(form, c)
    return net, net.experts[0], net.experts[0].layers[0]


def angles(c):
    return layers.rotary_table(c.T, D // HEADS)


def draw():
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------------------------------------
# each function once: case -> (what to call, its tensors)

def attended(c):
    def call(x, mask, rotary):
        net = model("attention", c)
        return net(x), net(x, mask), net(x, causal=True, rotary=rotary)
    mask = torch.ones(c.T, c.T, dtype=torch.bool).tril()
    return call, c.x(c.B, c.T, D), mask, angles(c)


def newest_row(c):
    def call(x, angles):
        block = model("llama", c)
        cache = layers.KVCache(c.B, HEADS, c.T, D // HEADS, x)
        return block.newest(x, angles, cache, c.T - 1)
    return call, c.x(c.B, D), angles(c)[-1:]


def kept_rows(c):
    def call(q, k, v):
        cache = layers.KVCache(c.B, HEADS, c.T, D // HEADS, q)
        return cache.attend(q, k, v, c.T - 1), cache.k, cache.v
    return call, *(c.x(c.B, HEADS, D // HEADS, seed=seed) for seed in range(3))


def mocet_forward(c, name: str = "forward"):
    def call(x):
        return [getattr(model(form, c), name)(x, model("codes", c)) for form in ("query", "block")]
    return call, c.x(c.B, c.T, D)


def drawn_codebook(c):
    def call(z):
        net = copy.deepcopy(model("codes", c))
        net.draw_codebook(z)
        return net.codebook
    return call, c.x(c.B * c.T, d)


def newest_logits(c):
    def call(labels, ids):
        net = model("ar", c)
        _, newest = net.begin(labels, 1)
        return [newest(labels, ids[:, :t]) for t in range(c.T)]
    return call, c.ids(C, c.B), c.ids(K, c.B, c.T)


def calibrated(c):
    def call(scores):
        net = copy.deepcopy(model("dvae", c))
        net.calibrate(scores)
        return net.limit
    return call, c.x(c.B, c.side, c.side).float()


def measured(c):
    def call(pixels):
        net = copy.deepcopy(model("dvae", c))
        net.measure([pixels])
        return net.latent_mean, net.latent_std
    return call, c.pixels()


def noisy(c):
    """z, time, labels, map: what a content transformer reads."""
    return (c.x(c.B, d, 2 * c.side, 2 * c.side), c.ids(1000, c.B) + 1, c.ids(C, c.B), c.grain())


def flowing(c):
    """x_t, t, z_q and mean, as FlowNet takes them."""
    return c.images(), 500 + c.x(c.B).abs(), c.x(c.B, c.T, d, seed=1), c.images() / 2


def diffused_plainly(c):
    def call(z):
        return [diffusion.sample(lambda z_t, t: z_t * t.view(-1, 1, 1, 1) / T, z, path, 3)
                for path in ("noise", "flow")]
    return call, noisy(c)[0].float()


def diffused(c):
    def call(z, labels, grain):
        paths = (("noise", 1.0), ("flow", 0.0))
        net = model("content", c)
        return [content.sample(net, z, labels, grain, C, path, 3, 2.0, eta, draw())
                for path, eta in paths]
    z, _, labels, grain = noisy(c)
    return call, z.float(), labels, grain


def unpacked(c):
    packed, keep, index = grain.pack(c.x(c.B, c.T, D), c.grain())
    return lambda *x: grain.unpack(*x, c.T), packed, keep, index


def hidden_labels(c, function):
    """In training."""
    net = SimpleNamespace(training=True, num_classes=C, classes=C)
    return functools.partial(function, net), c.ids(C, c.B)


def two(c, *shape):
    return c.x(*shape), c.x(*shape, seed=1)


def latent(c, seed: int = 0):
    return c.x(c.B, d, 2 * c.side, 2 * c.side, seed=seed)


def scaled(c):
    return c.x(c.B, c.T, D), c.x(c.B, D, seed=1), c.x(c.B, D, seed=2)


TABLE = {
    "layers.as_weights": lambda c: (layers.as_weights, *two(c, c.B, c.T)),
    "layers.at_least_float32": lambda c: (layers.at_least_float32, c.x(c.B, c.T)),
    "layers.patchify": lambda c: (lambda x: layers.patchify(x, P), c.images()),
    "layers.unpatchify": lambda c: (
        lambda x: layers.unpatchify(x, P, P * c.side), c.x(c.B, c.T, 3 * P * P)),
    "layers.rotate": lambda c: (
        layers.rotate, c.x(c.B, HEADS, c.T, D // HEADS), angles(c).to(c.dtype)),
    "layers.Attention.forward": attended,
    "layers.MLP.forward": lambda c: (model("mlp", c), c.x(c.B, c.T, D)),
    "layers.ViTBlock.forward": lambda c: (model("vit", c), c.x(c.B, c.T, D)),
    "layers.RMSNorm.forward": lambda c: (model("rms", c), c.x(c.B, c.T, D)),
    "layers.SwiGLU.forward": lambda c: (model("swiglu", c), c.x(c.B, c.T, D)),
    "layers.LlamaBlock.forward": lambda c: (
        lambda x, table: model("llama", c)(x, table, True), c.x(c.B, c.T, D), angles(c)),
    "layers.LlamaBlock.newest": newest_row,
    "layers.KVCache.attend": kept_rows,
    "mit.MIT.forward": lambda c: (model("mit", c), c.images()),
    "mocet.norm": lambda c: (mocet.norm, c.x(c.B, c.T, D)),
    "mocet.split_heads": lambda c: (lambda x: mocet.split_heads(x, HEADS), c.x(c.B, c.T, D)),
    "mocet.Layer.attend": lambda c: (
        lambda *x: expert(c)[2].attend(*x, HEADS, []), c.x(c.B, 2, D), c.x(c.B, c.T, D, seed=1)),
    "mocet.Layer.mlp": lambda c: (expert(c)[2].mlp, c.x(c.B, c.T, D)),
    "mocet.Expert.forward": lambda c: (expert(c)[1], c.x(c.B, c.T, D)),
    "mocet.BlockExpert.forward": lambda c: (expert(c, "block")[1], c.x(c.B, c.T, D)),
    "mocet.MoCET.forward_loop": lambda c: mocet_forward(c, "forward_loop"),
    "mocet.MoCET.forward": mocet_forward,
    "mocet.MoCET.as_prior": lambda c: (
        lambda z: expert(c)[0].as_prior(z, expert(c)[1]), c.x(c.B, d)),
    "mocet.MoCET.joined": lambda c: (  # of one expert
        lambda *x: mocet.MoCET.joined([x[:3]], x[3], model("codes", c)),
        c.x(c.B, d), c.ids(K, c.B), c.x(c.B, d).float(), c.x(c.B, c.T, D)),
    "mocet.first_scores": lambda c: (
        lambda cx: mocet.first_scores([*model("query", c).experts], cx), c.x(c.B, c.T, D)),
    "mocet.query_in_context_space": lambda c: (
        lambda *x: mocet.query_in_context_space(*x, HEADS),
        *two(c, c.B, D, D), c.x(c.B, D, seed=2)),
    "mocet.query_layer_fast": lambda c: (
        lambda *x: mocet.query_layer_fast(expert(c)[2], *x, HEADS),
        c.x(c.B, D), c.x(c.B, c.T, D, seed=1), c.x(c.B, c.T, D, seed=2)),
    "titok.TiTok.forward": lambda c: (
        lambda x: model("titok", c)(x, model("codes", c)), c.images()),
    "quantizer.VectorQuantizer.forward": lambda c: (model("codes", c), c.x(c.B, c.T, d)),
    "quantizer.VectorQuantizer.quantize": lambda c: (
        model("codes", c).quantize, c.x(c.B, c.T, d), model("codes", c).codes().detach()),
    "quantizer.VectorQuantizer.emit": lambda c: (
        model("codes", c).emit, c.x(c.B, c.T, d), c.ids(K, c.B, c.T)),
    "quantizer.VectorQuantizer.losses": lambda c: (
        model("codes", c).losses, c.x(c.B, c.T, d).float(), c.ids(K, c.B, c.T)),
    "quantizer.VectorQuantizer.entropy_loss": lambda c: (
        model("codes", c).entropy_loss, c.x(c.B, c.T, d).float()),
    "quantizer.VectorQuantizer.lookup": lambda c: (model("codes", c).lookup, c.ids(K, c.B, c.T)),
    "quantizer.VectorQuantizer.draw_codebook": drawn_codebook,
    "quantizer.shared_sample": lambda c: (
        lambda z: quantizer.shared_sample(z, K), c.x(c.B * c.T, d)),
    "quantizer.usage": lambda c: (lambda ids: quantizer.usage(ids, K), c.ids(K, c.B, c.T)),
    "decoder.Decoder.forward": lambda c: (model("decoder", c), c.x(c.B, c.T, d)),
    "nativetok.NativeTok.forward": lambda c: (model("nativetok", c), c.images()),
    "nativetok.NativeTok.drop_tails": lambda c: (
        model("nativetok", c).drop_tails, c.x(c.B, c.T, d)),
    "nativetok.NativeTok.tokenize": lambda c: (model("nativetok", c).tokenize, c.images()),
    "nativetok.NativeTok.encode": lambda c: (
        lambda images, said: model("nativetok", c).encode(images, {0: said}),
        c.images(), c.ids(K, c.B)),
    "nativetok.NativeTok.decode": lambda c: (model("nativetok", c).decode, c.ids(K, c.B, c.T)),
    "nativetok.sample_batch": lambda c: (
        lambda labels: sample_batch(model("ar", c), Decoding(model("nativetok", c)), labels, {}, 0,
                                    0),
        c.ids(C, c.B)),
    "generator.guide": lambda c: (lambda *x: generator.guide(*x, 2.0), *two(c, c.B, c.T, K)),
    "generator.top_k_top_p": lambda c: (
        lambda x: [generator.top_k_top_p(x, *how) for how in ((0, 1.0), (3, 1.0), (3, 0.7))],
        c.x(c.B, c.T, K)),
    "generator.sample_from": lambda c: (
        lambda x: [generator.sample_from(x, draw(), heat, 3, 0.9) for heat in (0, 1)],
        c.x(c.B, c.T, K)),
    "generator.Generator.forward": lambda c: (
        model("maskgit", c), c.ids(C, c.B), c.ids(K, c.B, c.T)),
    "generator.Generator.guided": lambda c: (
        lambda *x: [model("ar", c).guided(*x, scale) for scale in (1, 2)],
        c.ids(C, c.B), c.ids(K, c.B, c.T - 1)),
    "generator.Generator.hide_labels": lambda c: hidden_labels(c, generator.Generator.hide_labels),
    "generator.Generator.check": lambda c: (
        lambda labels: model("ar", c).check(labels, None), c.ids(C, c.B)),
    "generator.ARGenerator.loss": lambda c: (
        model("ar", c).loss, c.ids(K, c.B, c.T), c.ids(C, c.B)),
    "generator.ARGenerator.sample": lambda c: (
        lambda labels: [model("ar", c).sample(labels, scale, generator=draw(), use_cache=cache)
                        for scale in (1, 2) for cache in (True, False)], c.ids(C, c.B)),
    "generator.ARGenerator.begin": lambda c: (
        lambda labels: model("ar", c).begin(labels, 2)[0], c.ids(C, c.B)),
    "generator.ARGenerator.newest": newest_logits,
    "generator.MaskGITGenerator.loss": lambda c: (
        model("maskgit", c).loss, c.ids(K, c.B, c.T), c.ids(C, c.B)),
    "generator.MaskGITGenerator.sample": lambda c: (
        lambda labels: [model("maskgit", c).sample(labels, cfg_scale=scale, generator=draw())
                        for scale in (1, 2)], c.ids(C, c.B)),
    "losses.reconstruction": lambda c: (losses.reconstruction, c.images(), c.images().neg()),
    "losses.mse": lambda c: (losses.mse, c.images(), c.images().neg()),
    "losses.to_db": lambda c: (losses.to_db, c.x(c.B, c.T).square()),
    "losses.psnr": lambda c: (losses.psnr, c.images(), c.images().neg()),
    "d2it.grain.gray": lambda c: (grain.gray, c.pixels()),
    "d2it.grain.entropy": lambda c: (lambda x: grain.entropy(x, 4), c.pixels()),
    "d2it.grain.threshold": lambda c: (
        lambda x: grain.threshold(x, 0.5), c.x(c.B, c.side, c.side)),
    "d2it.grain.grain_map": lambda c: (
        lambda x: [grain.grain_map(x, 4, 2.5, how) for how in grain.POLICIES], c.pixels()),
    "d2it.grain.take_top": lambda c: (
        grain.take_top, c.x(c.B, c.side, c.side), c.ids(c.T + 1, c.B)),
    "d2it.grain.count_codes": lambda c: (grain.count_codes, c.grain()),
    "d2it.grain.spread": lambda c: (grain.spread, c.x(c.B, d, c.side, c.side)),
    "d2it.grain.merge": lambda c: (
        grain.merge, latent(c), c.x(c.B, d, c.side, c.side, seed=1), c.grain()),
    "d2it.grain.code_weights": lambda c: (grain.code_weights, c.grain()),
    "d2it.grain.per_code": lambda c: (grain.per_code, latent(c), c.grain()),
    "d2it.grain.grained_noise": lambda c: (
        lambda x: grain.grained_noise(x, d, draw()), c.grain()),
    "d2it.grain.pack": lambda c: (grain.pack, c.x(c.B, c.T, D), c.grain()),
    "d2it.grain.unpack": unpacked,
    "d2it.grain.painted": lambda c: (grain.painted, c.pixels(), c.grain()),
    "d2it.grain.heat": lambda c: (
        lambda x: grain.heat(x, 4 * c.side), c.x(c.B, c.side, c.side).float()),
    "d2it.dvae.ResBlock.forward": lambda c: (model("res", c), c.x(c.B, D, 3, 3)),
    "d2it.dvae.Encoder.forward": lambda c: (model("dvae", c).encoder, c.images()),
    "d2it.dvae.Decoder.forward": lambda c: (model("dvae", c).decoder, latent(c)),
    "d2it.dvae.DVAE.calibrate": calibrated,
    "d2it.dvae.DVAE.entropy": lambda c: (model("dvae", c).entropy, c.pixels()),
    "d2it.dvae.DVAE.grain_of": lambda c: (model("dvae", c).grain_of, c.pixels()),
    "d2it.dvae.DVAE.moments": lambda c: (model("dvae", c).moments, c.images(), c.grain()),
    "d2it.dvae.DVAE.draw": lambda c: (
        dvae.DVAE.draw, latent(c), latent(c, seed=1), c.grain()),
    "d2it.dvae.DVAE.forward": lambda c: (model("dvae", c), c.images(), c.grain()),
    "d2it.dvae.DVAE.standardised": lambda c: (
        lambda z, map: model("dvae", c).standardised(z, map, back=True), latent(c), c.grain()),
    "d2it.dvae.DVAE.encode": lambda c: (model("dvae", c).encode, c.pixels()),
    "d2it.dvae.DVAE.decode": lambda c: (
        lambda z, map: model("dvae", c).decode(dvae.Codes(z, map)), latent(c), c.grain()),
    "d2it.dvae.DVAE.measure": measured,
    "d2it.dvae.kl": lambda c: (dvae.kl, *two(c, c.B, d, 2, 2)),
    "diffusion.alpha_sigma": lambda c: (
        lambda t: [diffusion.alpha_sigma(t, path) for path in ("noise", "flow")], noisy(c)[1]),
    "diffusion.target": lambda c: (
        lambda *x: [diffusion.target(*x, path) for path in ("noise", "flow")],
        latent(c), latent(c, seed=1)),
    "diffusion.estimates": lambda c: (
        lambda *x: [diffusion.estimates(*x, path) for path in ("noise", "flow")],
        latent(c), latent(c, seed=1), noisy(c)[1]),
    "diffusion.sample": diffused_plainly,
    "flow_decoder.FlowNet.forward": lambda c: (model("flow", c), *flowing(c)),
    "flow_decoder.image_noise": lambda c: (flow_decoder.image_noise, c.images()),
    "flow_decoder.loss": lambda c: (
        lambda x, z_q, mean: flow_decoder.loss(model("flow", c), x, z_q, mean),
        *(flowing(c)[i] for i in (0, 2, 3))),
    "flow_decoder.FlowDecoder.decode": lambda c: (
        lambda ids: FlowDecoder(model("nativetok", c), model("flow", c)).decode(ids, 2, draw()),
        c.ids(K, c.B, c.T)),
    "d2it.content.loss": lambda c: (
        lambda z, labels, map: content.loss(model("content", c), z, labels, map),
        *(noisy(c)[i] for i in (0, 2, 3))),
    "d2it.content.guided": lambda c: (
        lambda *x: content.guided(model("content", c), *x, C, 2.0), *noisy(c)),
    "d2it.content.sample": diffused,
    "layers.TimeEmbedding.forward": lambda c: (model("time", c), noisy(c)[1]),
    "layers.modulate": lambda c: (layers.modulate, *scaled(c)),
    "layers.DiTBlock.forward": lambda c: (model("dit", c), *scaled(c)[:2]),
    "layers.LastNorm.forward": lambda c: (model("last", c), *scaled(c)[:2]),
    "d2it.content.RefineNet.forward": lambda c: (
        model("refine", c), c.x(c.B, c.T, D), c.x(c.B, c.T, 4 * d, seed=1), c.x(c.B, D, seed=2),
        c.grain()),
    "d2it.content.Content.hide_labels": lambda c: hidden_labels(c, content.Content.hide_labels),
    "d2it.content.Content.forward": lambda c: (model("content", c), *noisy(c)),
    "d2it.model.D2iT.maps": lambda c: (
        lambda labels: model("d2it", c).maps(labels, draw()), c.ids(C, c.B)),
    "d2it.model.D2iT.sample": lambda c: (
        lambda labels, map: model("d2it", c).sample(labels, steps=2, generator=draw(), grain=map),
        c.ids(C, c.B), c.grain()),
    "d2it.model.D2iT.decode": lambda c: (
        lambda z, map: model("d2it", c).decode(dvae.Codes(z, map)), latent(c), c.grain()),
    "d2it.model.D2iT.draw": lambda c: (
        lambda labels, map: model("d2it", c).draw(labels, {"steps": 2}, 0, 0, map),
        c.ids(C, c.B), c.grain()),
    "d2it.model.D2iT.obeyed": lambda c: (model("d2it", c).obeyed, c.pixels(), c.grain()),
}


# ------------------------------------------------------------------------------------------------
# the same values, lying otherwise in memory

def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def cut_out(x: Tensor) -> Tensor:
    larger = torch.cat([x[..., :1], x, x[..., :1]], dim=-1)
    return larger[1:-1] if x.ndim == 1 else torch.cat([larger, larger])[len(x):, ..., 1:-1]


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def first_row_for_all(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def first_column_for_all(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x)


LAYOUTS = (transposed, cut_out, every_second, first_row_for_all, first_column_for_all)


def leaves(result) -> list:
    """The tensors and numbers in a result, one after the other."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        return [leaf for part in result for leaf in leaves(part)]
    return [] if result is None else [torch.as_tensor(result)]


def answers(call, tensors) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return leaves(call(*tensors))


QUICK = (Case(1, 4, torch.float32), Case(2, 4, torch.bfloat16), Case(5, 4, torch.float32))
ALL = [Case(B, T, dtype) for B, T in ((1, 1), (1, 4), (2, 4), (3, 4), (5, 4)) for dtype in ROUNDING]


@pytest.mark.parametrize("cases", [pytest.param(QUICK, id="some"),
                                   pytest.param(ALL, id="all", marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", TABLE)
def test_any_layout_and_number_of_rows_gives_the_same(name, cases):
    for case, layout in itertools.product(cases, LAYOUTS):
        call, *tensors = TABLE[name](case)
        laid = [layout(x) if x.numel() else x for x in tensors]
        expected = answers(call, [x.contiguous() for x in laid])
        for told, wanted in zip(answers(call, laid), expected, strict=True):
            where = f"{case}, {layout.__name__}"
            assert told.shape == wanted.shape and told.dtype == wanted.dtype, where
            if not wanted.is_floating_point():
                assert (told != wanted).sum() <= wanted.numel() / 10, where
            elif wanted.numel():
                finite = wanted.isfinite()
                assert torch.equal(told[~finite].nan_to_num(), wanted[~finite].nan_to_num()), where
                off, largest = (told - wanted)[finite].abs(), wanted[finite].abs()
                assert not len(off) or off.max() <= ROUNDING[case.dtype] * largest.max(), where


def takes_a_tensor(function) -> bool:
    return any("Tensor" in str(p.annotation) or "Codes" in str(p.annotation)
               for p in inspect.signature(function).parameters.values())


def test_each_public_function_that_takes_a_tensor_is_in_the_table():
    found = set()
    for file in FILES:
        module = importlib.import_module(file)
        own = [thing for thing in vars(module).values() if getattr(thing, "__module__", "") == file]
        for thing in own:
            inside = vars(thing).values() if inspect.isclass(thing) else [thing]
            functions = [getattr(part, "__func__", part) for part in inside]
            found |= {f"{file}.{function.__qualname__}" for function in functions
                      if inspect.isfunction(function) and not function.__name__.startswith("_")
                      and takes_a_tensor(function)}
    assert found | {"layers.MLP.forward"} == set(TABLE), "torch's own forward"
