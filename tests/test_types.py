"""Every module of both systems in every type: .bfloat16(), .half(), .double() and .to(device).

Images stay what they are, float32 or uint8. Numbers are those of float32, and so many of the ids:

    float64     up to 1e-5 of their norm, float32's own rounding; all ids
    float16     0.6% (it has 11 bits); 97%
    bfloat16    5% (it has 8 bits); 90%: a choice that is close falls the other way, and the tokens
                after it answer to that
"""
import pytest
import torch
from torch import nn

from config import FlowDecoderConfig, GeneratorConfig, TokenizerConfig
from d2it.content import Content
from d2it.diffusion import loss
from d2it.dvae import DVAE
from d2it.model import D2iT
from d2it.presets import CONFIGS, PRESETS
from decoder import Decoder
from evaluation.inception import FIDInceptionV3
from evaluation.tinycnn import TinyCNN
from flow_decoder import FlowNet
from generator import GENERATORS
from mit import MIT
from mocet import Expert, MoCET
from nativetok import NativeTok
from plumbing.flags import build
from quantizer import VectorQuantizer

ERROR = {torch.float64: 1e-5, torch.float16: 0.006, torch.bfloat16: 0.05}
SHARE = {torch.float64: 1.0, torch.float16: 0.97, torch.bfloat16: 0.9}
B, CLASSES = 16, 4
SMALL = dict(image_size=32, patch_size=8, token_schedule=(2, 4), codebook_size=8, code_dim=4,
             encoder_width=32, encoder_depth=1, encoder_heads=2, expert_width=32, expert_heads=2,
             expert_depth=2, decoder_width=32, decoder_depth=1, decoder_heads=2)
LABELS = torch.arange(B) % CLASSES


def some(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


IMAGES = some(B, 3, 32, 32).clamp(-1, 1)
GRAIN = some(B, 4, 4) > 0
PIXELS = torch.randint(256, (B, 32, 32, 3), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(1))


def tokenizer(**options) -> NativeTok:
    model = NativeTok(TokenizerConfig(**{**SMALL, **options}))
    if model.cfg.tokenizer == "nativetok":
        model.grow(4)
    return model


def mocet(form: str) -> nn.ModuleList:
    cfg = TokenizerConfig(**SMALL, expert=form)
    return nn.ModuleList([MoCET(cfg), VectorQuantizer(cfg)])


def generator(kind: str, num_tokens: int = 4, codebook_size: int = 8):
    """With a head of unit scale, so that the likeliest id is likelier by far than the next one."""
    cfg = GeneratorConfig(generator_width=32, generator_depth=2, generator_heads=2)
    model = GENERATORS[kind](cfg, num_tokens, codebook_size, CLASSES)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.label.weight)
    return model


def d2it_settings():
    """-> those of the DVAE, of the content transformer."""
    small = dict(dvae_width=8, content_width=32, content_depth=1, refine_depth=1, content_heads=2)
    return build(CONFIGS, {**PRESETS["d2it-tiny"], **small})[:2]


def dvae() -> DVAE:
    model = DVAE(d2it_settings()[0])
    model.calibrate(model.entropy(PIXELS))
    return model


def content() -> Content:
    """With heads and conditions that are not zero, as after training."""
    dvae, cfg = d2it_settings()
    model = Content(cfg, dvae.code_dim, dvae.side, CLASSES)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def flow_net() -> FlowNet:
    """With heads and conditions that are not zero, as after training."""
    cfg = FlowDecoderConfig(flow_decoder_width=32, flow_decoder_depth=1, flow_decoder_heads=2,
                            flow_decoder_patch_size=8)
    net = FlowNet(cfg, TokenizerConfig(**SMALL))
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net


def d2it() -> D2iT:
    return D2iT(dvae(), generator("ar", 16, 2), content(), list("abcd"))


def inception() -> FIDInceptionV3:
    """With weights that keep the scale of what they read: float16 has no numbers below 1e-7."""
    net = FIDInceptionV3()
    for p in net.parameters():
        if p.ndim == 4:
            nn.init.kaiming_normal_(p)
    return net


# What a model answers: ids (int64), maps (bool) or numbers, one after the other.

def painted(model: Decoder) -> tuple:
    return model(some(B, 4, 4)), model(some(B, 1, 4))


def tokens(model: NativeTok) -> tuple:
    ids = (some(B, 4).abs() * 100).long() % 8
    recon, its_ids, losses = model(IMAGES)
    return (model.encode(IMAGES), model.decode(ids), model.decode(ids[:, :1]), its_ids,
            torch.stack([*losses.values()]))


def sampled(model) -> tuple:
    draw = torch.Generator().manual_seed(0)
    ids = torch.zeros_like(LABELS)[:, None].expand(B, 3)
    return (model.sample(LABELS, temperature=0), model.sample(LABELS, 2.0 if model.causal else None,
            generator=draw), model(LABELS, ids))


def experts(model: nn.ModuleList) -> tuple:
    mocet, quantizer = model
    x_latent = some(B, 16, 32)
    both = (mocet(x_latent, quantizer), mocet.forward_loop(x_latent, quantizer))
    told = tuple(part for _, ids, losses in both for part in (ids, losses["commitment"]))
    if type(mocet.experts[0]) is Expert:  # the last part of a training step
        x_latent = x_latent.to(mocet.embed_code.weight.dtype)
        z_q, _, z = mocet.one_by_one(x_latent, quantizer, {})
        told += mocet.all_at_once(x_latent, z_q, z),
    return told


def coded(model: DVAE) -> tuple:
    codes = model.encode(PIXELS, torch.Generator().manual_seed(0))
    fine = model.grain_of(PIXELS)
    return *codes, model.decode(codes), *model.moments(IMAGES, fine)


def denoised(model: Content) -> tuple:
    t = LABELS * 300 + 1
    return model(some(B, 4, 8, 8), t, LABELS, GRAIN),


def drawn(model: D2iT) -> tuple:
    draw = torch.Generator().manual_seed(0)
    codes = model.sample(LABELS, steps=3, generator=draw, grain=GRAIN)
    return model.maps(LABELS, draw), codes.z, model.decode(codes)


MODULES = {
    "MIT": (lambda: MIT(TokenizerConfig(**SMALL)), lambda model: (model(IMAGES),)),
    "MoCET query": (lambda: mocet("query"), experts),
    "MoCET block": (lambda: mocet("block"), experts),
    "VectorQuantizer": (lambda: VectorQuantizer(TokenizerConfig(**SMALL)),
                        lambda model: model(some(B, 4, 4))[:2]),
    "Decoder": (lambda: tokenizer().decoder, painted),
    "Decoder linear": (lambda: tokenizer(decoder_reads="linear").decoder, painted),
    "Decoder both, overlap 2": (
        lambda: tokenizer(decoder_reads="both", decoder_overlap=2).decoder, painted),
    "NativeTok": (tokenizer, tokens),
    "NativeTok block": (lambda: tokenizer(expert="block"), tokens),
    "titok": (lambda: tokenizer(tokenizer="titok", token_schedule=(4,)), tokens),
    "titok-causal": (lambda: tokenizer(tokenizer="titok-causal", token_schedule=(4,)), tokens),
    "FlowNet": (flow_net, lambda model: (model(IMAGES, LABELS * 300 + 1.0, some(B, 4, 4),
                                               IMAGES / 2),)),
    "ARGenerator": (lambda: generator("ar"), sampled),
    "MaskGITGenerator": (lambda: generator("maskgit"), sampled),
    "DVAE": (dvae, coded),
    "Content": (content, denoised),
    "D2iT": (d2it, drawn),
    "TinyCNN": (lambda: TinyCNN(CLASSES), lambda model: (
        *model(IMAGES), model(some(2, 3, 64, 64))[0])),
    "FIDInceptionV3": (inception, lambda model: model(PIXELS[:2].permute(0, 3, 1, 2))),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name][0]().eval()


def answers(name: str, model: nn.Module) -> tuple:
    torch.manual_seed(0)
    with torch.no_grad():
        return MODULES[name][1](model)


def agree(name: str, dtype: torch.dtype, told: tuple, expected: tuple) -> None:
    for answer, wanted in zip(told, expected, strict=True):
        answer = answer.cpu()
        assert answer.shape == wanted.shape
        assert answer.is_floating_point() == wanted.is_floating_point()
        if wanted.is_floating_point():
            error = (answer.double() - wanted.double()).norm() / wanted.double().norm()
            assert error <= ERROR.get(dtype, 1e-3), f"{name}: {error:.2g}"
        else:
            share = (answer == wanted).double().mean()
            assert share >= SHARE.get(dtype, 0.99), f"{name}: {share:.2f}"


# torch's CPU kernels know float16 too, but its convolutions there are slow.
SLOW = [("DVAE", torch.float16), ("D2iT", torch.float16), ("FIDInceptionV3", torch.bfloat16)]
QUICK = [(name, dtype) for name in MODULES for dtype in ERROR
         if name != "FIDInceptionV3" and (name, dtype) not in SLOW]


@pytest.mark.parametrize("name, dtype", [
    *QUICK, *(pytest.param(*case, marks=pytest.mark.faults) for case in SLOW)], ids=str)
def test_answers_are_those_of_float32(name, dtype):
    model = made(name)
    expected = answers(name, model)
    agree(name, dtype, answers(name, model.to(dtype)), expected)


@pytest.mark.parametrize("name", ["MIT", "MoCET query", "MoCET block", "Decoder", "Decoder linear",
                                  "Decoder both, overlap 2", "FlowNet", "ARGenerator",
                                  "MaskGITGenerator", "Content", "TinyCNN"])
def test_float64_is_computed_in_float64(name):
    """A change of 1e-11 in the weights shows in the numbers, where float32 would lose it."""
    model = made(name).double()
    numbers = [answer for answer in answers(name, model) if answer.is_floating_point()]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-11)
    changed = [answer for answer in answers(name, model) if answer.is_floating_point()]
    for before, after in zip(numbers, changed, strict=True):
        assert before.dtype == torch.float64
        assert 0 < (after - before).norm() < 1e-7 * before.norm()


def test_maps_angles_and_statistics_are_exact_whatever_the_weights_are():
    model = d2it()
    model.dvae.measure([PIXELS])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert {"dvae.limit", "dvae.latent_std", "grain.rotary", "content.time.omega"} <= set(before)
    for dtype in ERROR:
        for name, buffer in model.to(dtype).named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name


IDS = torch.arange(4).expand(B, 4)


def learned(model: NativeTok) -> torch.Tensor:
    """The loss of a tokenizer that has grown; then its dead codes are restarted."""
    recon, _, losses = model.train()(IMAGES)
    model.quantizer.count.zero_()
    model.quantizer.restart_dead_codes()
    return recon.square().mean() + sum(losses.values())


LOSSES = {
    "NativeTok": learned,
    "ARGenerator": lambda model: model.loss(IDS, LABELS)[0],
    "MaskGITGenerator": lambda model: model.loss(IDS, LABELS)[0],
    "DVAE": lambda model: sum(part.square().mean() for part in model(IMAGES, GRAIN)),
    "Content": lambda model: loss(model, some(B, 4, 8, 8), LABELS, GRAIN)[0],
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_of_another_type_can_learn(name):
    model = made(name).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    LOSSES[name](model).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) >= len(list(model.parameters())) - 1, "all but the last token's position"
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_stays_behind_when_a_model_moves(name):
    """The device "meta" has shapes and no numbers: each machine has it."""
    model = made(name).to("meta")
    for path, part in model.named_modules():
        held = [*part.parameters(False), *part.buffers(False)]
        held += [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in held), path


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, *ERROR], ids=str)
def test_answers_on_a_gpu_are_those_of_the_cpu(dtype, monkeypatch):
    """In float32 up to 0.1% of the norm and 99% of the ids, as products may be of TF32."""
    models = {name: made(name) for name in MODULES}
    expected = {name: answers(name, model) for name, model in models.items()}
    for tensor in ("IMAGES", "PIXELS", "LABELS", "GRAIN"):
        monkeypatch.setitem(globals(), tensor, globals()[tensor].cuda())
    monkeypatch.setitem(globals(), "some", lambda *shape: torch.randn(
        shape, generator=torch.Generator().manual_seed(0)).cuda())
    for name, model in models.items():
        agree(name, dtype, answers(name, model.to("cuda", dtype)), expected[name])
