"""train.py and loop.py: phases, steps, exact resume, several processes."""
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import config
import loop
import train
from config import CONFIGS
from helpers import (
    SMALL,
    interrupt_at,
    ranks,
    rows,
    same_content,
    train_shapes,
    without_times,
)
from nativetok import NativeTok, from_checkpoint
from plumbing import checkpoint
from plumbing.flags import UserError, build

pytestmark = pytest.mark.usefixtures("quick")


# ------------------------------------------------------------------------------------------------
# phases


def test_the_phases_are_those_of_the_table():
    tok, _, cfg = config.load_preset("imagenet-128")
    plan = train.phases(tok, cfg)
    assert [(p.name, p.stage, p.num_tokens) for p in plan] == [
        ("base", 1, 32),
        ("grow-64", 2, 64),
        ("grow-128", 2, 128),
        ("finetune", 2, 128),
    ]
    assert [p.learns for p in plan] == [
        train.PARTS,
        ("new experts", "decoder"),
        ("new experts", "decoder"),
        train.PARTS,
    ]


def test_one_length_has_nothing_to_grow_and_nothing_to_fine_tune():
    tok, _, cfg = build(CONFIGS, {"token_schedule": [16]})
    assert [p.name for p in train.phases(tok, cfg)] == ["base"]


def test_a_grow_phase_trains_the_newest_experts_and_the_decoder_only():
    model = NativeTok(config.parse_run("", SMALL).tok)
    model.grow(4)
    train.freeze(model, ("new experts", "decoder"))
    for name, p in model.named_parameters():
        learns = name.startswith(("mocet.experts.2.", "mocet.experts.3.", "decoder."))
        assert p.requires_grad == learns, name


def test_weight_decay_touches_matrices_only():
    model = NativeTok(config.parse_run("", SMALL).tok)
    names = {id(p): name for name, p in model.named_parameters()}
    for kind in ("adamw", "muon"):
        groups = loop.new_optimizer(model, kind, 0.1, 0.99).param_groups
        decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
        kept = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
        assert {"mit.embed.weight", "mocet.experts.0.layers.0.wq.weight",
                "mocet.experts.0.head.weight"} <= decayed
        assert {"quantizer.codebook", "mit.pos", "mocet.experts.0.query", "mit.norm.weight",
                "mocet.experts.0.layers.0.w1.bias"} <= kept


def test_the_learning_rate_rises_falls_and_ends_where_it_should():
    rates = [loop.learning_rate(step, 100, 1.0, 0.1, 10) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == 0.1 and max(rates) == 1.0 and 0.1 <= rates[-1] < 0.101
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


# ------------------------------------------------------------------------------------------------
# a whole run


def test_a_run_leaves_everything_behind(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.json",
        "tokenizer.pt",
        "generator-ar.pt",
        "generator-maskgit.pt",
        "log.jsonl",
        "samples",
        "tokens",
    } <= names
    assert {"base.png", "grow-4.png", "grow-6.png", "finetune.png", "ar.png", "maskgit.png"} <= {
        p.name for p in (finished / "samples").iterdir()
    }
    results = [row for row in rows(finished) if "psnr" in row]
    assert [(row["phase"], row["num_tokens"]) for row in results] == [
        ("base", 2),
        ("grow-4", 4),
        ("grow-6", 6),
        ("finetune", 6),
    ]
    assert all(row["images"] == 6 for row in results)  # a tenth of 60 is held out


def test_a_finished_run_is_left_as_it_is(finished, data):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    train_shapes(finished, data)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "phase, step",
    [("base", 2), ("base", 5), ("grow-4", 3), ("finetune", 1), ("ar", 3), ("maskgit", 2)],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    finished, data, tmp_path, monkeypatch, phase, step
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, phase, step)
        with pytest.raises(SystemExit) as stopped:
            train_shapes(tmp_path, data)
    assert stopped.value.code == loop.INTERRUPTED
    train_shapes(tmp_path, data)
    for name in ("tokenizer.pt", "generator-ar.pt", "generator-maskgit.pt"):
        assert same_content(
            without_times(checkpoint.load(tmp_path / name)),
            without_times(checkpoint.load(finished / name)),
        ), name
    steps = [(row["phase"], row["step"]) for row in rows(tmp_path) if "loss" in row]
    # each step is logged once
    assert steps == [(row["phase"], row["step"]) for row in rows(finished) if "loss" in row]


def test_all_parts_move_in_base_and_in_the_fine_tune(data, tmp_path, monkeypatch):
    train_shapes(tmp_path, data, "--stage", "1")
    torch.manual_seed(0)
    before = NativeTok(config.parse_run("", SMALL).tok).state_dict()
    base = checkpoint.load(tmp_path / "tokenizer.pt")["model"]
    train_shapes(tmp_path, data, "--stage", "2", "--save_every", "1")
    after = checkpoint.load(tmp_path / "tokenizer.pt")["model"]
    assert base.keys() == before.keys() and "mocet.embed_code.weight" in before
    # Nobody reads the last token of the base, so its position learns later.
    for name in before.keys() - {"quantizer.count", "mocet.experts.1.pos"}:
        assert not torch.equal(base[name], before[name]), name
        assert not torch.equal(base[name], after[name]), name


def test_growing_left_the_old_ids_as_they_were(data, tmp_path, monkeypatch):
    train_shapes(tmp_path, data, "--stage", "1")
    base = NativeTok.load(tmp_path / "tokenizer.pt")
    interrupt_at(monkeypatch, "finetune", 1)
    with pytest.raises(SystemExit):
        train_shapes(tmp_path, data, "--stage", "2", "--save_every", "100")
    # the end of the last growth step
    saved = checkpoint.load(checkpoint.previous(tmp_path / "tokenizer.pt"))
    assert saved["phase"] == "grow-6"
    grown = from_checkpoint(saved, "previous")
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(grown.encode(images)[:, :2], base.encode(images))


def test_a_step_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "reconstruction", lambda recon, images: recon.mean() * float("nan"))
    with pytest.raises(UserError, match="not finite in 10 steps"):
        train_shapes(tmp_path, data, "--base_steps", "30")
    assert all(
        torch.isfinite(t).all()
        for t in checkpoint.load(tmp_path / "tokenizer.pt")["model"].values()
    )


def test_two_processes_go_on_where_one_stopped(data, tmp_path):
    train_shapes(tmp_path, data, "--stage", "1")
    for rank in ranks(2, "train.py", *SMALL, "--run", tmp_path, "--data", data, "--stage", 2):
        assert rank.returncode == 0, rank.stderr[-2000:]
    assert list(checkpoint.load(tmp_path / "tokenizer.pt")["results"]) == [
        "base",
        "grow-4",
        "grow-6",
        "finetune",
    ]


@pytest.mark.parametrize("optimizer", ("muon", "adamw"))
def test_two_processes_take_the_steps_of_one(data, tmp_path, optimizer):
    """Up to rounding, where the loss is a mean over images: the entropy term and the redrawing of
    codes look at the batch of a process."""
    flags = ["--optimizer", optimizer, "--stage", "1", "--base_steps", "4", "--tail_drop", "0",
             "--continuous_steps", "0", "--entropy_weight", "0", "--reseed_every", "0"]
    train_shapes(tmp_path / "one", data, *flags)
    command = ["train.py", *SMALL, "--run", tmp_path / "two", "--data", data, *flags]
    for rank in ranks(2, *command):
        assert rank.returncode == 0, rank.stderr[-2000:]
    one, two = (checkpoint.load(tmp_path / run / "tokenizer.pt")["model"] for run in ("one", "two"))
    for name, weights in one.items():  # a step of Muon moves them by about 1e-2
        assert torch.allclose(weights, two[name], atol=2e-4), name


def strict_rows(folder):
    """The log as a program reads it that takes JSON at its word."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_quantization_begins_even_if_the_very_step_was_skipped(data, tmp_path, monkeypatch):
    """SMALL quantizes after step 3; that step is not finite here."""
    steps = iter(range(1, 100))

    def broken_once(recon, images, original=train.reconstruction):
        return original(recon, images) * (float("nan") if next(steps) == 3 else 1)

    monkeypatch.setattr(train, "reconstruction", broken_once)
    train_shapes(tmp_path, data, "--stage", "1", "--log_every", "1")
    logged = [row for row in strict_rows(tmp_path) if "learning_rate" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[2]["skipped"] == 1 and "loss" not in logged[2]
    assert logged[1]["commitment"] == 0 == logged[3]["commitment"]
    assert all(row["commitment"] > 0 for row in logged[4:])


def test_accumulated_micro_batches_are_one_batch(data, tmp_path):
    """Up to rounding, and where nothing looks at the batch as a whole: entropy, redrawn codes."""
    flags = (
        "--stage",
        "1",
        "--entropy_weight",
        "0",
        "--tail_drop",
        "0",
        "--reseed_every",
        "0",
        "--continuous_steps",
        "0",
        "--base_steps",
        "3",
        "--log_every",
        "3",
        "--no-flip",
    )
    for pieces in ("1", "4"):
        train_shapes(tmp_path / pieces, data, *flags, "--accumulate", pieces)
    whole, cut = (rows(tmp_path / pieces)[0] for pieces in ("1", "4"))
    for name in ("loss", "pixels", "commitment", "grad_norm"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-4), name
    weights = [
        checkpoint.load(tmp_path / pieces / "tokenizer.pt")["model"] for pieces in ("1", "4")
    ]
    # AdamW makes a whole step of a gradient that is nothing but rounding, as that of keys' biases
    # is.
    differ = [(p - weights[1][name]).abs() > 1e-4 for name, p in weights[0].items() if p.ndim]
    assert sum(d.sum() for d in differ) < 0.01 * sum(d.numel() for d in differ)


@pytest.mark.parametrize("flag", ["--batch_size", "--generator_batch_size"])
def test_a_batch_that_cannot_be_cut_into_equal_micro_batches_is_refused(data, tmp_path, flag):
    with pytest.raises(UserError, match="try 8"):
        train_shapes(tmp_path, data, "--accumulate", "4", flag, "10")
    assert not (tmp_path / "config.json").exists()


def test_grad_clip_0_is_no_limit(data, tmp_path):
    for limit in ("0", "1e9"):
        train_shapes(tmp_path / limit, data, "--stage", "1", "--grad_clip", limit)
    weights = [
        checkpoint.load(tmp_path / limit / "tokenizer.pt")["model"] for limit in ("0", "1e9")
    ]
    assert same_content(*weights)


def test_the_discriminator_learns_before_it_judges(data, tmp_path):
    flags = ("--stage", "1", "--adversarial_weight", "0.1", "--adversarial_start", "5",
             "--adversarial_warmup", "3", "--base_steps", "6", "--log_every", "1")
    train_shapes(tmp_path, data, *flags)
    logged = [row for row in rows(tmp_path) if "learning_rate" in row]
    assert ["adversarial" in row for row in logged] == [False] * 5 + [True]
    state = checkpoint.load(tmp_path / "tokenizer.pt")["adversary"]["optimizer"]["state"]
    assert {int(part["step"]) for part in state.values()} == {4}  # after steps 2, 3, 4 and 5


def test_the_average_follows_what_learns_and_does_not_touch_what_is_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = loop.frozen_copy(model)
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[1].weight += 1
    before, frozen = ema[1].weight.clone(), ema[0].weight._version
    loop.update_ema(ema, model, 0.9, 1000)
    torch.testing.assert_close(ema[1].weight, before + 0.1)
    assert ema[0].weight._version == frozen
