"""--compile: the same results, one code for all blocks and experts, one line where it cannot be.

Slow, since it compiles: run with make test-faults.
"""
import copy
import re

import pytest
import torch
from torch._dynamo.utils import counters

import generator
from config import GeneratorConfig, TokenizerConfig
from helpers import SMALL, ended, program, some_shapes, start_program
from loop import LossOf
from nativetok import NativeTok
from plumbing.processes import need_compiler

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    need_compiler(torch.device("cpu"))
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def tokenizer(tokens: int, **changes) -> NativeTok:
    cfg = TokenizerConfig(image_size=16, patch_size=4, encoder_width=16, encoder_heads=2,
                          encoder_depth=3, decoder_width=16, decoder_heads=2, decoder_depth=3,
                          expert_width=16, expert_heads=2, token_schedule=(tokens,),
                          codebook_size=8, code_dim=4, **changes)
    torch.manual_seed(0)
    return NativeTok(cfg)


def step(model: NativeTok, images: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    recon, ids, losses = model(images)
    (recon.square().mean() + sum(losses.values())).backward()
    return [recon.detach(), ids, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("expert", ("query", "block"))
def test_a_compiled_step_of_the_tokenizer_is_the_step(expert):
    torch.manual_seed(1)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    plain, compiled = tokenizer(6, expert=expert).train(), tokenizer(6, expert=expert).train()
    compiled.compile()
    for a, b in zip(step(plain, images), step(compiled, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    # one for MIT's blocks, one for the decoder's, whose sequences are longer, one for experts
    assert 0 < graphs() <= 3


@pytest.mark.parametrize("tokens", (4, 12))
def test_any_number_of_experts_is_compiled_once(tokens):
    model = tokenizer(tokens).train()
    model.mocet.compile()
    step(model, torch.rand(3, 3, 16, 16) * 2 - 1)
    assert graphs() == 1


def test_a_copy_of_a_compiled_tokenizer_speaks_with_its_own_weights():
    images, model = torch.rand(3, 3, 16, 16) * 2 - 1, tokenizer(6).eval()
    before = model.encode(images)
    model.compile()
    ema = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    assert torch.equal(ema.encode(images), before)
    assert not torch.equal(model.encode(images), before)


@pytest.mark.parametrize("Kind", generator.GENERATORS.values())
def test_a_compiled_generator_learns_and_draws_the_same(Kind):
    torch.manual_seed(0)
    cfg = GeneratorConfig(generator_width=32, generator_depth=3, generator_heads=2,
                          generator_dropout=0.0, label_dropout=0.0)
    plain = Kind(cfg, 6, 16, 3)
    for p in plain.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.4)  # else rounding could decide what is likeliest
    compiled, labels = copy.deepcopy(plain), torch.arange(3)
    LossOf(compiled).compile()
    for scale in (1.0, 2.0):
        ids = [model.sample(labels, cfg_scale=scale, generator=torch.Generator().manual_seed(0))
               for model in (plain, compiled)]
        assert torch.equal(*ids)
    assert 0 < graphs() <= 2, "one for each batch, with and without its second side"
    grads = []
    for model in (plain, compiled):
        torch.manual_seed(0)  # of MaskGIT's masks
        model.loss(ids[0], labels)[0].backward()
        grads.append(model.blocks[1].mlp.w13.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_train_sample_and_eval_run_compiled(tmp_path):
    data, run = some_shapes(tmp_path / "shapes.npz", 60), tmp_path / "run"
    done = ended(start_program("train.py", *SMALL, "--run", run, "--data", data,
                               "--val_data", data, "--token_schedule", 2, 4, "--generators",
                               "ar", "--compile"), timeout=900)
    assert done.returncode == 0, done.stderr
    done = program("sample.py", "--run", run, "--compile", "--per_class", 2)
    assert done.returncode == 0 and re.search(r"^compiled in [\d.]+ s$", done.stdout, re.M)
    done = program("eval_fid.py", "--run", run, "--num_samples", 20, "--train_features", 5,
                   "--compile", "--generator", "ar")
    assert done.returncode == 0 and re.search(r"^ar: compiled in [\d.]+ s$", done.stdout, re.M)


def test_without_a_compiler_it_is_one_line_that_names_what_is_missing(small_run, tmp_path):
    done = program("sample.py", "--run", small_run, "--compile", CXX="no-such-compiler",
                   TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no-such-compiler" in done.stderr and "leave out --compile" in done.stderr
