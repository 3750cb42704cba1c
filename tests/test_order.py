"""experiments/order.py: arms of equal size, controls that lose nothing but the order, results that
are whole and repeatable."""
import dataclasses
import json
import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import config
from config import CONFIGS
from experiments import order, order_table
from generator import ARGenerator
from helpers import called, good, held_shapes, some_shapes, turned_away
from nativetok import NativeTok, as_it_is
from plumbing import checkpoint
from plumbing.datasets import open_images
from plumbing.flags import UserError, as_dict, build

ROOT = Path(__file__).parent.parent

TRIED = ["nativetok-hnt", "nativetok-shuffled"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A quick run of an arm and a control, with hardly any steps and guidances."""
    folder, patch = tmp_path_factory.mktemp("order"), pytest.MonkeyPatch()
    patch.setattr(order, "SCALES", (1.5,))
    data, val = some_shapes(folder / "shapes.npz", 60), held_shapes(folder / "held.npz")
    flags = ["--quick", "--data", data, "--val_data", val, "--budget", 20, "--generator_steps", 4,
             "--num_samples", 20, "--out", folder / "out", "--arms", *TRIED]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    good(order, *flags)
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert after == before, "Ctrl-C and SIGTERM would be answered by a run that is over"
    yield flags
    patch.undo()


@pytest.fixture
def out(flags):
    return flags[flags.index("--out") + 1]


@pytest.fixture
def results(out):
    return {arm: json.loads((out / f"{arm}-0.json").read_text()) for arm in TRIED}


# ------------------------------------------------------------------------------------------------
# what is compared

@pytest.mark.parametrize("preset", ("tiny", pytest.param("cifar", marks=pytest.mark.faults)))
def test_encoders_of_all_arms_have_the_same_size_within_a_tenth(preset):
    images = [] if preset == "tiny" else ["--data", "x", "--val_data", "x"]
    args, size = order.parse(["--preset", preset, *images]), {}
    for arm in order.ARMS:
        settings, parameters, target = order.settings_of(arm, args)
        tok = build(CONFIGS, {**config.PRESETS[args.preset], **settings})[0]
        flags = order.train_flags(settings, 0, args, "nowhere")
        assert config.parse_run("", flags).tok == tok, "the flags say the same"
        # counted another way
        with torch.device("meta"):
            model = order.ARMS[arm].change(NativeTok(tok)).grow_to(tok.num_tokens)
        size[arm] = sum(p.numel() for name, p in model.named_parameters()
                        if not name.startswith(("decoder", "quantizer")))
        assert size[arm] == parameters
        assert target == size.get("nativetok-joint", target)
    for arm in order.ARMS:
        assert abs(size[arm] / size["nativetok-joint"] - 1) < 0.1, size


def test_all_arms_take_the_same_steps_and_differ_only_where_they_should():
    args, shared = order.parse(["--budget", "999"]), set()
    differing = {"tokenizer", "encoder_width", "encoder_depth", "expert", "expert_width",
                 "expert_depth", "token_schedule", "base_steps", "grow_steps", "finetune_steps"}
    for arm in order.ARMS:
        settings, _, _ = order.settings_of(arm, args)
        made = config.parse_run("", order.train_flags(settings, 3, args, "nowhere"))
        steps = sum(phase.steps for phase in order.train.phases(made.tok, made.train))
        assert steps == 999, arm
        assert (len(made.tok.token_schedule) > 1) == order.ARMS[arm].grown
        assert (made.tok.tail_drop > 0) == ("drop" in arm)
        values, own = as_dict(made.tok, made.gen, made.train), order.ARMS[arm].settings
        assert all(values[name] == value for name, value in own.items())
        plain = as_dict(*config.load_preset(args.preset))
        same = (str(plain[name] if name in own else value) for name, value in values.items()
                if name not in differing)
        shared.add((made.tok.num_tokens, *same))
    assert len(shared) == 1


@pytest.mark.parametrize("tokens, schedule", [(6, (4, 6)), (16, (4, 8, 16)), (20, (4, 8, 16, 20))])
def test_an_arm_at_another_length_has_the_same_budget_and_the_same_size(tokens, schedule):
    args, sizes = order.parse(["--budget", "999", "--tokens", str(tokens)]), []
    for arm in ("titok", "nativetok-joint", "nativetok-hnt"):
        settings, parameters, target = order.settings_of(arm, args, tokens)
        made = config.parse_run("", order.train_flags(settings, 0, args, "nowhere"))
        steps = sum(phase.steps for phase in order.train.phases(made.tok, made.train))
        assert steps == 999 and made.tok.num_tokens == tokens
        assert made.tok.token_schedule == (schedule if order.ARMS[arm].grown else (tokens,))
        sizes.append(parameters)
    assert max(sizes) / min(sizes) < 1.1 and target == sizes[1]


def changed_tokenizer(change=as_it_is) -> NativeTok:
    torch.manual_seed(0)
    model = change(NativeTok(config.TokenizerConfig(
        image_size=32, patch_size=8, encoder_width=32, encoder_depth=1, encoder_heads=2,
        expert_width=32, expert_heads=2, expert_depth=1, token_schedule=(6,), codebook_size=16,
        decoder_width=32, decoder_depth=1, decoder_heads=2)))
    for expert in model.mocet.experts:
        torch.nn.init.normal_(expert.head.bias, std=0.3)
    return model


def test_one_expert_for_all_is_there_once_and_what_equal_experts_are():
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    plain, shared = changed_tokenizer(), changed_tokenizer(order.share_experts)
    expert = sum(p.numel() for p in plain.mocet.experts[0].parameters()) - 2 * 32  # query, pos
    more = [sum(p.numel() for p in model.parameters()) for model in (plain, shared)]
    assert more[0] - more[1] == 5 * expert
    with torch.no_grad():
        for other in plain.mocet.experts[1:]:
            other.layers.load_state_dict(plain.mocet.experts[0].layers.state_dict())
            other.head.load_state_dict(plain.mocet.experts[0].head.state_dict())
        plain.mocet.load_state_dict(shared.mocet.state_dict())
    assert torch.equal(plain.eval().encode(images), shared.eval().encode(images))


def test_with_hidden_priors_no_id_that_is_forced_moves_a_later_one_and_only_they_load_it(tmp_path):
    images, moved = torch.rand(40, 3, 32, 32) * 2 - 1, []
    for change in (as_it_is, order.hide_codes):
        model = changed_tokenizer(change).eval()
        ids = model.encode(images)
        forced = [model.encode(images, {i: (ids[:, i] + 7) % 16}) for i in range(5)]
        moved.append(sum((now[:, i + 1:] != ids[:, i + 1:]).sum().item()
                         for i, now in enumerate(forced)))
    assert moved[0] > 0 == moved[1]
    path = tmp_path / "tokenizer.pt"
    checkpoint.save(path, {"tokenizer_config": as_dict(model.cfg), "num_tokens": 6,
                           "ema": model.state_dict()})
    assert torch.equal(NativeTok.load(path, order.hide_codes).encode(images), ids)
    with pytest.raises(UserError, match="missing: mocet.embed_code"):
        NativeTok.load(path)


def test_swapped_codes_are_near_ones_of_some_images_in_training_alone():
    model, images = changed_tokenizer(order.swap_codes), torch.rand(400, 3, 32, 32) * 2 - 1
    plain = changed_tokenizer()
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        told, kept = model.train().tokenize(images), plain.train().tokenize(images)
        assert torch.equal(told[1], kept[1]), "ids are as they were"
        moved = (told[0] - kept[0]).flatten(1).any(dim=1)
        assert 0.05 < moved.float().mean() < 0.2
        codes, near = plain.quantizer.codes(), model.NEAR
        for z_q, ids in zip(told[0][moved], told[1][moved]):
            found = (z_q @ codes.T).argmax(dim=-1)                              # (L,)
            ranks = (codes[ids] @ codes.T).argsort(dim=-1, descending=True).argsort(dim=-1)
            assert 1 <= ranks[range(6), found].min() <= ranks[range(6), found].max() <= near
        assert torch.equal(model.eval().encode(images), plain.eval().encode(images))
        assert torch.equal(model.tokenize(images)[0], plain.tokenize(images)[0])
    model.train().tokenize(images)[0].sum().backward()
    assert model.mit.pos.grad.any(), "the gradient passes the swap"


def test_a_tokenizer_in_another_order_makes_the_same_images():
    inside = changed_tokenizer().eval()
    inside.fingerprint = "inside"
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    plain = inside.encode(images)
    assert order.in_order_of("nativetok-hnt", 0, inside) is inside
    turned = order.in_order_of("nativetok-reversed", 0, inside)
    mixed = order.in_order_of("nativetok-shuffled", 0, inside)
    other = order.in_order_of("nativetok-shuffled", 1, inside)
    assert torch.equal(turned.encode(images), plain.flip(1))
    for tokenizer in (turned, mixed, other):
        assert torch.equal(tokenizer.encode(images).sort().values, plain.sort().values)
        assert torch.equal(tokenizer.decode(tokenizer.encode(images)), inside.decode(plain))
    inside.fingerprint = "another inside"
    turned_other = order.in_order_of("nativetok-reversed", 0, inside)
    tokenizers = (inside, turned, mixed, other, turned_other)
    names = {tokenizer.fingerprint for tokenizer in tokenizers}
    assert len(names) == 5, "or a generator could be used with ids that it has not learned"


# ------------------------------------------------------------------------------------------------
# what is written

def test_results_hold_what_was_promised(results):
    promised = {"psnr", "codebook_used", "encoder_parameters", "encoder_parameters_off", "command",
                "tokenizer_command", "seed", "device", "commit", "torch", "settings", "real"}
    for arm, result in results.items():
        fd = order_table.fd_key(result)
        assert promised <= set(result) and result["arm"] == arm
        assert re.fullmatch("fd_tinycnn_[0-9a-f]{8}", fd)
        assert all(len(result[name]) == 8 for name in ("perplexity", "ar_bits", "marginal_bits"))
        for name in ("ar_bits", "marginal_bits"):
            assert sum(result[name]) == pytest.approx(result[f"{name}_total"], rel=1e-3)
            assert all(0 <= bits < 1.5 * math.log2(32) for bits in result[name])
        assert list(result["prefix_psnr"]) == ["1", "2", "4", "8"]
        all_tokens = result["prefix_psnr"]["8"]
        assert all_tokens == pytest.approx(result["psnr"], abs=2e-3), "the reconstruction itself"
        assert [row["position"] for row in result["intervention"]] == [1, 2, 4, 8]
        assert sum(row["later_ids_changed"] for row in result["intervention"]) > 0
        for row in (*result["tried"], *result["samples"]):
            assert row["n"] == 20 and row[fd] >= 0 and 0 <= row["class_accuracy"] <= 1
            assert row.get("steps") == (8 if row["name"] == "maskgit" else None)
        assert {"ar", "maskgit", "base"} <= set(result["costs"])
        of_tokenizer = [cost["steps"] for phase, cost in result["costs"].items()
                        if phase not in ("ar", "maskgit")]
        assert sum(of_tokenizer) == 20
        for cost in result["costs"].values():
            assert cost["seconds"] > 0 and cost["loss_by_tenth"]
            assert cost["peak_mb"] > 0 or not Path("/proc/self/status").exists()


def test_bits_under_ar_are_the_loss_of_the_model():
    """In bits of an image, over two batches of unequal size."""
    torch.manual_seed(0)
    _, gen, *_ = config.load_preset("tiny")
    gen = dataclasses.replace(gen, generator_width=32, generator_depth=1, generator_heads=2)
    model = ARGenerator(gen, 6, 8, 2).eval()
    ids, labels = torch.randint(8, (order.BATCH + 30, 6)), torch.arange(order.BATCH + 30) % 2
    with torch.no_grad():
        loss, _ = model.loss(ids, labels)
    assert sum(order.ar_bits(model, ids, labels)) == pytest.approx(6 * loss.item() / math.log(2))


def test_frequencies_alone_cost_what_they_should():
    """A code that is always the same costs next to nothing, four alike two bits, one never seen
    before log2(n + K/2) + 1."""
    def bits(seen, asked):
        return order.frequency_bits(seen, np.array(asked), 16)
    constant, alike = np.zeros(4000, np.int64), np.arange(4000) % 4
    assert bits(constant, [0])[0] < 0.01
    assert bits(alike, [0, 1, 2, 3]) == pytest.approx(2, abs=0.01)
    assert bits(constant, [3])[0] == pytest.approx(math.log2(4008) + 1)


def test_a_control_has_the_tokens_of_hnt_in_another_order(results):
    made, mixed = results["nativetok-hnt"], results["nativetok-shuffled"]
    assert mixed["order"] != made["order"] == list(range(8)) == sorted(mixed["order"])
    for name in ("psnr", "prefix_psnr", "codebook_used", "marginal_bits_total"):
        assert mixed[name] == pytest.approx(made[name])
    assert mixed["intervention"] == made["intervention"], "of the tokens in their own order"
    for name in ("perplexity", "marginal_bits"):
        assert mixed[name] == pytest.approx([made[name][i] for i in mixed["order"]])
    assert mixed["ar_bits"] != made["ar_bits"]


@pytest.mark.parametrize("best", (1.0, 1.5, 2.0))
def test_guidance_is_chosen_on_other_samples_than_are_reported(best, monkeypatch):
    """With noise 7, the one that is reported, another guidance looks best."""
    monkeypatch.setattr(order, "SCALES", (1.5, 2.0))
    def judged(kind, noise, cfg_scale):
        fd = abs(cfg_scale - (best if noise != 7 else 100))
        return {"name": kind, "cfg_scale": cfg_scale, "seed": noise, "fd_tinycnn_x": fd}
    rows = order.sample_rows(judged, ("ar", "maskgit"), 7)
    assert 7 not in {row["seed"] for row in rows["tried"]}
    for kind in ("ar", "maskgit"):
        tried = [row["cfg_scale"] for row in rows["tried"] if row["name"] == kind]
        assert tried == [1.0, 1.5, 2.0]
        (row,) = (row for row in rows["samples"] if row["name"] == kind)
        assert (row["seed"], row["cfg_scale"]) == (7, best)
        assert order_table.reported({**rows, "fd_tinycnn_x": 0}, kind) is row


# ------------------------------------------------------------------------------------------------
# tables

def test_both_tables_have_one_row_per_arm_and_figures_a_curve(out):
    tables = (out / "table.md").read_text().split("## ")[1:]
    assert [table.splitlines()[0] for table in tables] == list(order_table.TABLES)
    for table in tables:
        rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
        assert [row[0] for row in rows] == ["| arm", *(f"| {arm}" for arm in TRIED)]
        assert len({len(row) for row in rows}) == 1
    for name in ("recovered.svg", "bits.svg"):
        drawing = (out / name).read_text()
        assert drawing.startswith("<svg xmlns=") and drawing.count("<polyline") == len(TRIED)


def test_an_arm_at_several_lengths_is_a_curve(out, results, tmp_path):
    """Lengths 4 and 8 of one arm; and no column of a generator that learned nothing."""
    made = results["nativetok-hnt"]
    made["samples"], made["tried"] = ([row for row in made[key] if row["name"] == "ar"]
                                      for key in ("samples", "tried"))
    for tokens, seed, bits in ((4, 0, 20.0), (4, 1, 22.0), (8, 0, 30.0)):
        result = {**made, "seed": seed, "ar_bits_total": bits, "psnr": 10 + bits / 10}
        (tmp_path / f"nativetok-hnt-{tokens}-{seed}.json").write_text(json.dumps(result))
    good(order, "--table", "--out", tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| nativetok-hnt, 4 tokens | 2 | 12.10 ± 0.14 |" in text and "MaskGIT" not in text
    for name in ("psnr.svg", "fd.svg"):
        drawing = (tmp_path / name).read_text()
        assert drawing.count("<polyline") == 1 and drawing.count("<circle") == 2
    curve, = order_table.by_price(order_table.read_results(str(tmp_path), order.ARMS), "PSNR, dB",
                                  [])
    assert (curve.x, curve.y) == ([21.0, 30.0], pytest.approx([12.1, 13.0]))
    assert curve.spread == pytest.approx([0.1414, 0], abs=1e-3)


# ------------------------------------------------------------------------------------------------
# going on

def test_a_second_call_trains_nothing_and_changes_nothing(flags, out, monkeypatch):
    def contents():
        return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    before = contents()
    monkeypatch.setattr(order, "train_arm", None)  # whoever calls it fails
    assert good(order, *flags).count("finished before") == len(TRIED)
    assert contents() == before


def test_the_yardstick_gets_an_eighth_to_all_of_the_tokens_bits(tmp_path):
    """8 tokens of 5 bits; more bits, more decibels; and a file that is there is not made anew."""
    args = order.parse(["--quick", "--out", str(tmp_path)])
    args.sizes = {**args.sizes, "image_size": 8}  # sooner
    images = open_images(some_shapes(tmp_path / "shapes.npz", 200))
    order.make_pca(args, images, images)
    written = (tmp_path / "pca.json").read_bytes()
    made = json.loads(written)
    bits, psnr = zip(*made["bits_and_psnr"])
    assert bits == (5, 10, 15, 20, 25, 30, 35, 40) and list(psnr) == sorted(set(psnr))
    assert "--bits 5 10 15 20" in made["pca_command"] and made["commit"]
    order.make_pca(args, None, None)
    assert (tmp_path / "pca.json").read_bytes() == written


# ------------------------------------------------------------------------------------------------
# wrong use

@pytest.mark.parametrize("wrong, says", [
    (("--arms", "titoc"), ("titoc", "titok")),
    (("--budget", 0), ("budget 0", "20")),
    (("--seeds", -1), ("seeds",)),
    (("--preset", "cifar"), ("--data",)),
    (("--data", "nowhere"), ("--val_data",)),
    (("--data", "nowhere", "--val_data", "nowhere"), ("nowhere",)),
    (("--table", "--out", "nowhere"), ("no results",)),
])
def test_wrong_use_gets_one_line(wrong, says):
    turned_away(order, *wrong, says=says)


def test_results_of_other_settings_or_judges_are_not_taken_for_these(flags, results, tmp_path):
    code, _, err = called(order, *flags, "--budget", 30)
    assert code == 2 and "base_steps: " in err and "--out" in err, err
    mine, other = (json.dumps(results[arm]) for arm in TRIED[:2])
    other = other.replace(order_table.fd_key(results[TRIED[0]]), "fd_tinycnn_00000000")
    for arm, text in zip(TRIED, (mine, other)):
        (tmp_path / f"{arm}-0.json").write_text(text)
    turned_away(order, "--table", "--out", tmp_path, says=["different judges"])
