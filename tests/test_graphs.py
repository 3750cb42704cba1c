"""--cuda_graph: a recorded step is the step, and a recorded run resumes to the same bits.

That needs a CUDA GPU; what is recorded when, and what is refused, is tried everywhere.
"""
import copy
from dataclasses import replace

import pytest
import torch

import config
import train
from config import GeneratorConfig, TokenizerConfig
from generator import GENERATORS
from helpers import SMALL, ended, held_shapes, refused, some_shapes, start_program
from nativetok import NativeTok
from plumbing import checkpoint, graphs
from plumbing.graphs import Recorded

CFG = TokenizerConfig(image_size=16, patch_size=4, encoder_width=16, encoder_heads=2,
                      encoder_depth=2, decoder_width=16, decoder_heads=2, decoder_depth=2,
                      expert_width=16, expert_heads=2, token_schedule=(6,), codebook_size=8,
                      code_dim=4)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_a_recording_is_made_anew_when_a_shape_or_the_quantizers_switch_changes(monkeypatch):
    made = []

    def record(model, call, inputs):
        made.append(len(inputs[0]))
        return call
    monkeypatch.setattr(graphs, "record", record)
    model = NativeTok(CFG).eval()
    call, images = Recorded(model), torch.rand(4, 3, 16, 16) * 2 - 1
    call(images), call(images.clone())
    assert made == [4]
    call(images[:2]), call(images[:2])
    model.quantizer.bypass = True
    call(images[:2]), call(images[:2])
    assert made == [4, 2, 2]


@pytest.mark.parametrize("flags, reason", [
    ((), "needs a CUDA GPU"), (("--tail_drop", "0.5"), "leave out --cuda_graph"),
    (("--accumulate", "2"), "leave out --accumulate")])
def test_what_cannot_be_recorded_is_refused_before_anything_begins(tmp_path, flags, reason):
    words = ["--run", str(tmp_path / "run"), "--cuda_graph", "--device", "cpu", *flags]
    assert reason in refused(lambda: train.main(config.parse_run("", words)))
    assert not (tmp_path / "run" / "config.json").exists()


def gradients(model, call, *inputs):
    """-> outputs, gradients; of one training step."""
    model.zero_grad()
    outputs = call(*inputs)
    flat, _ = torch.utils._pytree.tree_flatten(outputs)
    sum(x.float().square().mean() for x in flat if x.requires_grad).backward()
    return [x.detach().clone() for x in flat], [p.grad.clone() for p in model.parameters()]


@on_a_gpu
@pytest.mark.parametrize("tokenizer", ("nativetok", "titok"))
def test_a_recorded_step_of_the_tokenizer_is_the_step(tokenizer):
    torch.manual_seed(0)
    plain = NativeTok(replace(CFG, tokenizer=tokenizer)).cuda().train()
    recorded = copy.deepcopy(plain)
    replay, batches = Recorded(recorded), torch.rand(4, 3, 3, 16, 16, device="cuda") * 2 - 1
    for images, continuous in zip(batches, (True, True, False, False)):
        plain.quantizer.bypass = recorded.quantizer.bypass = continuous
        for ours, theirs in zip(gradients(recorded, replay, images),
                                gradients(plain, plain, images)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        assert torch.equal(recorded.quantizer.count, plain.quantizer.count)
        torch.testing.assert_close(recorded.quantizer.recent, plain.quantizer.recent)


@on_a_gpu
@pytest.mark.parametrize("Kind", GENERATORS.values())
def test_a_recorded_generator_draws_new_masks_at_each_step(Kind):
    torch.manual_seed(0)
    model = Kind(GeneratorConfig(generator_width=32, generator_depth=2, generator_heads=2),
                 6, 16, 3).cuda().train()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.4)
    replay = Recorded(model, model.loss)
    ids, labels = torch.randint(16, (8, 6), device="cuda"), torch.arange(8, device="cuda") % 3
    random = torch.cuda.get_rng_state()
    first = [replay(ids, labels)[0].item() for _ in range(3)]
    assert len(set(first)) == 3, "dropout"
    torch.cuda.set_rng_state(random)
    assert [replay(ids, labels)[0].item() for _ in range(3)] == first
    alone = copy.deepcopy(model).eval().loss(ids[:4], labels[:4])[0].item()
    assert replay(ids[:4], labels[:4])[0].item() == pytest.approx(alone, rel=0.5), "another shape"


@on_a_gpu
def test_a_recorded_run_resumes_to_the_same_bits(tmp_path):
    data, val = some_shapes(tmp_path / "shapes.npz", 60), held_shapes(tmp_path / "held.npz")

    def run(name, *flags):
        done = ended(start_program("train.py", *SMALL, "--run", tmp_path / name, "--data", data,
                                   "--val_data", val, "--cuda_graph", "--tail_drop", 0,
                                   "--device", "cuda", *flags), timeout=300)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    whole, halves = run("whole"), run("halves", "--stage", 1)
    run("halves")
    for name in ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt"):
        a, b = (checkpoint.load(str(folder / name))["ema"] for folder in (whole, halves))
        assert all(torch.equal(a[key], b[key]) for key in a), name
