"""Promises of muon.py: a step is that of each matrix alone, AdamW is torch's, a state goes on."""
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import config
from d2it import presets
from d2it.content import Content
from d2it.dvae import DVAE
from generator import ARGenerator
from helpers import ROOT
from layers import Attention
from loop import new_optimizer
from muon import Muon, matrices_of, newton_schulz, newton_schulz_fast
from nativetok import NativeTok


@pytest.mark.parametrize("rows, columns", [(64, 64), (64, 256), (256, 64), (5, 7)])
def test_the_fast_form_is_the_readable_one(rows, columns):
    torch.manual_seed(0)
    # Singular values over four decades, as gradients have them.
    u = torch.randn(3, rows, columns) * torch.logspace(0, -4, rows)[:, None]
    lying = u.double().mT if rows > columns else u.double()
    exact = newton_schulz(lying)
    fast = newton_schulz_fast(u)
    fast = fast.mT if rows > columns else fast
    assert (fast - exact).norm() / exact.norm() < 1e-3
    s = torch.linalg.svdvals(newton_schulz_fast(torch.randn(2, 32, 96)))
    assert 0.6 < s.min() and s.max() < 1.3, "singular values come near one"


def plain_step(w, g, lr, b=0.95):
    """One step from rest on one matrix, as the formula says it."""
    u = b * (1 - b) * g + (1 - b) * g
    lying = u.T if u.shape[0] > u.shape[1] else u
    done = newton_schulz(lying[None])[0]
    done = done.T if u.shape[0] > u.shape[1] else done
    return w - lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * done


def test_a_step_is_that_of_each_matrix_by_itself():
    torch.manual_seed(0)
    shapes = ((8, 8), (8, 32), (32, 8), (5, 8, 16), (5, 16, 8))
    params, qkv = [nn.Parameter(torch.randn(s)) for s in shapes], nn.Parameter(torch.randn(24, 8))
    before = [p.detach().clone() for p in (*params, qkv)]
    optimizer = Muon([dict(params=params, lr=0.1), dict(params=[qkv], lr=0.1, matrices=3)])
    for p in (*params, qkv):
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, old in zip((*params, qkv), before):
        stacks = [t.view(3, 8, 8) if p is qkv else t if t.ndim == 3 else t[None]
                  for t in (p.detach(), old, p.grad)]
        for w, was, g in zip(*stacks):
            torch.testing.assert_close(w, plain_step(was, g, 0.1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
def test_a_step_is_as_exact_under_autocast_and_with_coarse_products_allowed(device):
    torch.manual_seed(0)
    # Singular values over four decades: rounded to bfloat16 such a step would be noise.
    w, g = torch.randn(6, 32, 96), torch.randn(6, 32, 96) * torch.logspace(0, -4, 32)[:, None]
    exact = torch.stack([plain_step(*pair, 0.1) for pair in zip(w.double(), g.double())])
    p = nn.Parameter(w.to(device, copy=True))
    p.grad, before = g.to(device), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # as bfloat16
    try:
        with torch.autocast(device, torch.bfloat16):
            Muon([dict(params=[p], lr=0.1)]).step()
        assert torch.get_float32_matmul_precision() == "medium", "it is put back"
    finally:
        torch.set_float32_matmul_precision(before)
    off = (p.detach().cpu().double() - exact).norm() / (w - exact).norm()
    assert off < 1e-3


def test_torchs_own_muon_takes_the_same_step_on_a_single_matrix():
    torch.manual_seed(0)
    ours, g = nn.Parameter(torch.randn(16, 48)), torch.randn(16, 48)
    theirs = copy.deepcopy(ours)
    a = Muon([dict(params=[ours], lr=0.1)])
    # Theirs makes Newton-Schulz in bfloat16, so equality is coarse.
    b = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95, nesterov=True)
    ours.grad, theirs.grad = g.clone(), g.clone()
    start = ours.detach().clone()
    a.step(), b.step()
    moved, expected = ours - start, theirs - start
    assert (moved - expected).norm() / expected.norm() < 0.03


def content_transformer() -> Content:
    dvae, cfg, _ = presets.load_preset("d2it-tiny")
    return Content(cfg, dvae.code_dim, dvae.side, 10)


def groups_of(model, kind: str = "muon", *scales) -> dict:
    """{name: group} of the optimizer; each parameter is in one group."""
    groups = new_optimizer(model, kind, 0.1, 0.99, *(scales or (7.0,))).param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    assert len(group_of) == sum(len(group["params"]) for group in groups)
    return {name: group_of[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ("adamw", "muon"))
def test_the_codebook_and_nothing_else_learns_at_its_own_rate(kind):
    model = NativeTok(config.load_preset("tiny")[0])
    groups = groups_of(model, kind, 7.0, 5.0)
    for name, p in model.named_parameters():
        hidden = kind == "muon" and matrices_of(model).get(p)
        scale = 5.0 if name == "quantizer.codebook" else 7.0 if hidden else 1.0
        assert groups[name]["scale"] == scale, name


@pytest.mark.parametrize("kind", ("adamw", "muon"))
def test_weight_decay_touches_matrices_only(kind):
    one_row = ("bias", "pos", "position", "query", "norm.weight", "norm1.weight", "norm2.weight",
               "codebook", "mask_tokens")
    for model in (NativeTok(config.load_preset("tiny")[0]), content_transformer()):
        for name, group in groups_of(model, kind).items():
            assert bool(group["weight_decay"]) != name.endswith(one_row), name
    corner = groups_of(DVAE(presets.load_preset("d2it-tiny")[0]), kind)["decoder.corner"]
    assert corner["weight_decay"] == 0


def test_muon_has_the_hidden_matrices_and_adamw_everything_else():
    """adaLN's six vectors come from six matrices; a cell's split into four codes from four."""
    tok, gen, *_ = config.load_preset("tiny")
    convolutions = DVAE(presets.load_preset("d2it-tiny")[0])
    for model, hidden, others in (
            (NativeTok(tok),
             {"mit.blocks.0.attention.qkv": 3, "mit.dimension_switcher": 1,
              "mocet.experts.0.layers.0.wq": 1, "mocet.experts.0.layers.0.w1": 1,
              "decoder.blocks.0.mlp.0": 1},
             ["mit.embed.weight", "mit.pos", "mocet.embed_code.weight", "mit.norm.weight",
              "mocet.experts.0.head.weight", "mocet.experts.0.query", "quantizer.codebook",
              "mocet.experts.0.layers.0.w1.bias", "decoder.code_to_patch.0",
              "decoder.to_pixels.weight"]),
            (ARGenerator(gen, 16, 256, 10),
             {"blocks.0.attention.qkv": 3, "blocks.0.attention.out": 1, "blocks.0.mlp.w13": 2,
              "blocks.0.mlp.w2": 1},
             ["token.weight", "label.weight", "head.weight", "position"]),
            (content_transformer(),
             {"blocks.0.condition.1": 6, "refine.blocks.0.condition.1": 6, "last.condition.1": 2,
              "refine.last.condition.1": 2, "refine.split": 4, "blocks.0.attention.qkv": 3,
              "time.mlp.2": 1, "blocks.0.mlp.0": 1, "refine.blocks.0.attention.out": 1},
             ["time.mlp.0.weight", "label.weight", "embed.weight", "grain_embed.weight",
              "coarse_head.weight", "fine_head.weight", "refine.embed.weight",
              "refine.head.weight", "position", "refine.position"]),
            (convolutions, {}, dict(convolutions.named_parameters()))):
        groups = groups_of(model)
        for name, count in hidden.items():
            group = groups[f"{name}.weight"]
            assert (group["matrices"], group["scale"]) == (count, 7.0), name
        for name in others:
            assert (groups[name]["matrices"], groups[name]["scale"]) == (0, 1.0), name


def test_the_name_of_a_layer_decides_nothing():
    model = nn.ModuleDict(dict(multihead=Attention(8, 2), tokens=nn.Linear(8, 8)))
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p]: count for p, count in matrices_of(model).items()} == {
        "multihead.qkv.weight": 3, "multihead.out.weight": 1, "tokens.weight": 0}


def test_adamw_is_torchs():
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    theirs = copy.deepcopy(mine)
    a = Muon([dict(params=mine, matrices=0, weight_decay=0.1, lr=0.01)], betas=(0.9, 0.99))
    b = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for _ in range(3):
        for p, q in zip(mine, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step(), b.step()
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs))


def test_a_state_of_other_parameters_is_refused():
    state = Muon([dict(params=[nn.Parameter(torch.zeros(2, 3))])])
    state.params[0].grad = torch.ones(2, 3)
    state.step()
    for other in ([(3, 2)], [(2, 3), (2, 3)]):
        optimizer = Muon([dict(params=[nn.Parameter(torch.zeros(shape)) for shape in other])])
        with pytest.raises(ValueError):
            optimizer.load_state_dict(state.state_dict())


def test_training_starts_without_torchs_compiler():
    """Whoever makes an optimizer of torch.optim imports torch._dynamo, and waits for 3 s."""
    code = ("import sys, torch, loop\n"
            "net = torch.nn.Linear(2, 2)\n"
            "optimizer = loop.new_optimizer(net, 'adamw', 0.0, 0.9)\n"
            "net(torch.ones(1, 2)).sum().backward()\n"
            "optimizer.step(), optimizer.zero_grad(), optimizer.load_state_dict("
            "optimizer.state_dict())\n"
            "sys.exit('torch._dynamo' in sys.modules)")
    # Not helpers.program: what it forks may have the compiler from the start.
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
