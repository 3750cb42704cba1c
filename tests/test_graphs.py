"""Recorded steps: what is recorded when, the same steps as without, and resume to the same bits.

Real recordings need a CUDA GPU. Elsewhere helpers.replayed stands for them: its outputs and
gradients lie, as theirs do, in memory that the next replay writes over.
"""
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from config import GeneratorConfig, Optim, TokenizerConfig
from generator import GENERATORS
from helpers import (
    SMALL, ended, held_shapes, ranks, refused, replayed, same_content, some_shapes, start_program,
    train_shapes)
from loop import Loop, Stage, new_optimizer
from nativetok import NativeTok
from plumbing import checkpoint, graphs
from plumbing.graphs import Recorded, recordable
from plumbing.processes import Processes

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


@pytest.mark.parametrize("device, wanted, obstacle, recorded", [
    ("cuda", True, "", True), ("cuda", True, "lengths differ", False), ("cuda", False, "", False),
    ("cuda", False, "lengths differ", False), ("cpu", True, "", False),
    ("cpu", True, "lengths differ", False)])
def test_a_gpu_records_unless_it_is_told_not_to_or_says_why_not(device, wanted, obstacle, recorded):
    stage, said, procs = Stage.__new__(Stage), [], Processes("cpu")
    procs.device, stage.name = torch.device(device), "base"
    stage.run = SimpleNamespace(train=SimpleNamespace(cuda_graph=wanted), procs=procs,
                                say=said.append)
    assert stage.is_recorded(obstacle) == recorded
    assert len(said) == (device == "cuda" and wanted and bool(obstacle))
    assert all("base" in line and "lengths differ" in line for line in said)


def test_what_a_recording_cannot_follow_is_one_line_with_the_flag_that_helps():
    def fail(text):
        with recordable(torch.nn.Linear(1, 1)):
            raise RuntimeError(text)
    refused(fail, "CUDA error: operation not permitted when stream is capturing\nCompile with ...",
            names=["Linear", "not permitted", "--no-cuda_graph"])
    with pytest.raises(RuntimeError, match="shapes"):
        fail("mat1 and mat2 shapes cannot be multiplied")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Steps are "recorded" -> the models of which one is."""
    made = []

    def record(model, call, inputs):
        made.append(type(model).__name__)
        return replayed(model, call, inputs)
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(Processes, "can_record", True)
    return made


def few_steps(cuda_graph: bool, accumulate: int):
    torch.manual_seed(0)
    model, logged = NativeTok(CFG), []
    loop = Loop(model, None, new_optimizer(model, "adamw", 0.1, 0.99),
                Optim(8, 3, 0.01, 0.01, 1, 0.99, 0.1), accumulate=accumulate, log_every=1,
                cuda_graph=cuda_graph, on_log=logged.append)
    batches = torch.rand(3, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for images, in loop.over(iter((batch,) for batch in batches)):
        recon, _, terms = loop.model(images)
        loop.backward((recon - images).square().mean() + sum(terms.values()), terms)
    quick = ("per_second", "peak_mb")
    return model.state_dict(), [{k: v for k, v in row.items() if k not in quick} for row in logged]


@pytest.mark.parametrize("accumulate", (1, 4))
def test_recorded_steps_are_the_same_to_the_bit_of_several_micro_batches_too(
        as_on_a_gpu, accumulate):
    recorded, plain = (few_steps(way, accumulate) for way in (True, False))
    assert as_on_a_gpu == ["NativeTok"]
    assert same_content(recorded, plain)


@pytest.mark.usefixtures("quick")
def test_a_run_records_all_but_dropped_tails_and_the_flow_decoder_and_learns_the_same(
        finished, data, tmp_path, as_on_a_gpu, capsys):
    train_shapes(tmp_path, data)
    assert as_on_a_gpu == ["ARGenerator", "MaskGITGenerator"]
    said = [line for line in capsys.readouterr().out.splitlines() if "not recorded" in line]
    assert [line.split(":")[0] for line in said] == [
        "base", "grow-4", "grow-6", "finetune", "flow_decoder"]
    for name in ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt"):
        a, b = (checkpoint.load(str(folder / name))["model"] for folder in (finished, tmp_path))
        assert same_content(a, b), name


@pytest.mark.usefixtures("quick")
def test_without_a_gpu_nothing_is_said_and_without_the_flag_nothing_recorded(
        data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graphs, "record", None)
    flags = ("--stage", "1", "--base_steps", "4")
    train_shapes(tmp_path / "cpu", data, *flags)
    monkeypatch.setattr(Processes, "can_record", True)
    train_shapes(tmp_path / "gpu", data, *flags, "--no-cuda_graph", "--tail_drop", "0")
    assert "recorded" not in capsys.readouterr().out


TWO = """
import copy, os, sys
sys.path.insert(0, "tests")
import torch
import torch.distributed as dist
from helpers import replayed
from loop import Loop, new_optimizer
from nativetok import NativeTok
from plumbing import graphs, processes
from test_graphs import CFG
from config import Optim
torch.set_num_threads(1)
def gloo(timeout, backend, device_id=None, original=dist.init_process_group, **how):
    original("gloo", timeout=timeout, **how)  # nccl wants a GPU for each process
dist.init_process_group, os.environ["LOCAL_RANK"] = gloo, "0"
if sys.argv[1] == "cpu":
    graphs.record = replayed
both = processes.Processes(sys.argv[1])
torch.manual_seed(0)
model = NativeTok(CFG).to(both.device)
alone, batches = copy.deepcopy(model), torch.rand(3, 8, 3, 16, 16) * 2 - 1

def norms(model, procs, batches, accumulate, cuda_graph):
    logged = []
    loop = Loop(model, None, new_optimizer(model, "adamw", 0.1, 0.99),
                Optim(8, 3, 0.01, 0.01, 1, 0.99, 0.1), procs=procs, accumulate=accumulate,
                cuda_graph=cuda_graph, log_every=1, on_log=logged.append)
    for images, in loop.over(iter((batch,) for batch in batches)):
        recon, _, terms = loop.model(images)
        loop.backward((recon - images).square().mean() + terms["commitment"], {})
    return torch.tensor([row["grad_norm"] for row in logged])

mine = batches[:, both.rank * 4:both.rank * 4 + 4]
torch.testing.assert_close(
    norms(model, both, mine, 2, True),
    norms(alone, processes.Processes.alone(both.device), batches, 1, False), rtol=1e-3, atol=0)
"""


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=on_a_gpu)))
def test_two_processes_that_record_take_the_steps_of_one_that_does_not(device):
    for done in ranks(2, "-c", TWO, device):
        assert done.returncode == 0, done.stderr[-2000:]


def gradients(model, call, *inputs):
    """-> outputs, gradients; of one training step."""
    model.zero_grad()
    outputs = call(*inputs)
    flat, _ = torch.utils._pytree.tree_flatten(outputs)
    sum(x.float().square().mean() for x in flat if x.requires_grad).backward()
    return [x.detach().clone() for x in flat], [p.grad.clone() for p in model.parameters()]


@on_a_gpu
@pytest.mark.parametrize("tokenizer, teacher_forcing", [
    ("nativetok", False), ("nativetok", True), ("titok", False)])
def test_a_recorded_step_of_the_tokenizer_is_the_step(tokenizer, teacher_forcing):
    torch.manual_seed(0)
    cfg = replace(CFG, tokenizer=tokenizer, teacher_forcing=teacher_forcing)
    plain = NativeTok(cfg).cuda().train()
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
                                   "--val_data", val, "--tail_drop", 0,
                                   "--device", "cuda", *flags), timeout=300)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    whole, halves = run("whole"), run("halves", "--stage", 1)
    run("halves")
    for name in ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt"):
        a, b = (checkpoint.load(str(folder / name))["ema"] for folder in (whole, halves))
        assert all(torch.equal(a[key], b[key]) for key in a), name
