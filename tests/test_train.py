"""train.py: phases, what learns in each, two processes. Exact resume: test_loop.py."""
import pytest
import torch

import config
import train
from config import CONFIGS
from helpers import SMALL, interrupt_at, names, ranks, refused, rows, train_shapes
from nativetok import NativeTok, from_checkpoint
from plumbing import checkpoint
from plumbing.flags import build

pytestmark = pytest.mark.usefixtures("quick")


# ------------------------------------------------------------------------------------------------
# phases

def test_the_phases_are_those_of_the_table():
    tok, *_, cfg = config.load_preset("imagenet-128")
    plan = train.phases(tok, cfg)
    assert [(p.name, p.stage, p.num_tokens) for p in plan] == [
        ("base", 1, 32), ("grow-64", 2, 64), ("grow-128", 2, 128), ("finetune", 2, 128)]
    growing = ("new experts", "decoder")
    assert [p.learns for p in plan] == [train.PARTS, growing, growing, train.PARTS]
    tok, *_, cfg = build(CONFIGS, {"token_schedule": [16]})
    assert [p.name for p in train.phases(tok, cfg)] == ["base"], "nothing to grow or fine-tune"


def test_a_grow_phase_trains_the_newest_experts_and_the_decoder_only():
    model = NativeTok(config.parse_run("", SMALL).tok)
    model.grow(4)
    train.freeze(model, ("new experts", "decoder"))
    for name, p in model.named_parameters():
        learns = name.startswith(("mocet.experts.2.", "mocet.experts.3.", "decoder."))
        assert p.requires_grad == learns, name


# ------------------------------------------------------------------------------------------------
# a whole run

def test_a_run_leaves_everything_behind(finished):
    assert {"config.json", "tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt",
            "flow-decoder.pt", "log.jsonl", "samples", "tokens"} <= set(names(finished))
    assert {"base.png", "grow-4.png", "grow-6.png", "finetune.png", "ar.png",
            "maskgit.png", "flow_decoder.png"} <= set(names(finished / "samples"))
    results = [row for row in rows(finished) if "psnr" in row]
    assert [(row["phase"], row["num_tokens"]) for row in results] == [
        ("base", 2), ("grow-4", 4), ("grow-6", 6), ("finetune", 6)]
    drawn = rows(finished)[-1]
    assert drawn["phase"] == "flow_decoder" and {"psnr_drawn", "psnr_mean"} <= set(drawn)
    assert all(row["images"] == 6 for row in (*results, drawn))  # a tenth of 60 is held out


def test_all_parts_learn_but_growing_leaves_the_old_ids_as_they_were(
        finished, data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    before = NativeTok(config.parse_run("", SMALL).tok).state_dict()
    train_shapes(tmp_path, data, "--stage", "1")
    base = checkpoint.load(tmp_path / "tokenizer.pt")["model"]
    short = NativeTok.load(tmp_path / "tokenizer.pt")
    interrupt_at(monkeypatch, "finetune", 1)
    with pytest.raises(SystemExit):
        train_shapes(tmp_path, data, "--stage", "2", "--save_every", "100")
    # the end of the last growth step
    saved = checkpoint.load(checkpoint.previous(tmp_path / "tokenizer.pt"))
    assert saved["phase"] == "grow-6"
    grown = from_checkpoint(saved, "previous")
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(grown.encode(images)[:, :2], short.encode(images))

    after = checkpoint.load(finished / "tokenizer.pt")["model"]  # the same base, fine-tuned
    assert base.keys() == before.keys() and "mocet.embed_code.weight" in before
    # Nobody reads the last token of the base, so its position learns later.
    for name in before.keys() - {"quantizer.count", "mocet.experts.1.pos"}:
        assert not torch.equal(base[name], before[name]), name
        assert not torch.equal(base[name], after[name]), name


@pytest.mark.parametrize("optimizer", ("muon", pytest.param("adamw", marks=pytest.mark.faults)))
def test_two_processes_with_micro_batches_take_the_steps_of_one(data, tmp_path, optimizer):
    """Up to rounding, where the loss is a mean over images: the entropy term and the restart of
    dead codes look at one micro-batch. The generators and d2it: test_loop.py."""
    flags = ["--optimizer", optimizer, "--stage", "1", "--base_steps", "4", "--tail_drop", "0",
             "--continuous_steps", "0", "--entropy_weight", "0", "--reseed_every", "0"]
    train_shapes(tmp_path / "one", data, *flags)
    command = ["train.py", *SMALL, "--run", tmp_path / "two", "--data", data, *flags]
    for rank in ranks(2, *command, "--accumulate", 2):
        assert rank.returncode == 0, rank.stderr[-2000:]
    one, two = (checkpoint.load(tmp_path / run / "tokenizer.pt")["model"] for run in ("one", "two"))
    for name, weights in one.items():  # a step of Muon moves them by about 1e-2
        assert torch.allclose(weights, two[name], atol=2e-4), name
    whole, cut = ([row for row in rows(tmp_path / run) if "grad_norm" in row]
                  for run in ("one", "two"))
    for a, b in zip(whole, cut, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("flag", ["--batch_size", "--generator_batch_size"])
def test_a_batch_that_cannot_be_cut_into_equal_micro_batches_is_refused(data, tmp_path, flag):
    refused(train_shapes, tmp_path, data, "--accumulate", "4", flag, "10", names=["try 8"])
    assert not (tmp_path / "config.json").exists()
