"""experiments/order.py: arms of equal size, controls that lose nothing but the order, results that are whole and repeatable."""
import contextlib
import csv
import io
import json
import math
import signal
from pathlib import Path

import pytest
import torch

import config
from config import CONFIGS
from experiments import order, order_table
from helpers import some_shapes
from nativetok import NativeTok
from plumbing.flags import as_dict, build
from plumbing.start import main_with_user_errors

ROOT = Path(__file__).parent.parent

TRIED = ["titok", "nativetok-hnt", "nativetok-shuffled"]


def command(*flags) -> tuple[int, str, str]:
    """order.py in this process -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main_with_user_errors(lambda: order.main(order.parse([*map(str, flags), "--device", "cpu"])))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A quick run of three arms on 60 shapes with hardly any steps: bad, but complete."""
    folder = tmp_path_factory.mktemp("order")
    data, before = some_shapes(folder / "shapes.npz", 60), [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    flags = ["--quick", "--data", data, "--val_data", data, "--budget", 20, "--generator_steps", 4, "--num_samples", 20,
             "--out", folder / "out", "--arms", *TRIED]
    try:
        code, _, err = command(*flags)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
            signal.signal(number, handler)
    assert code == 0, err
    return flags


@pytest.fixture
def out(flags):
    return flags[flags.index("--out") + 1]


@pytest.fixture
def results(out):
    return {arm: json.loads((out / f"{arm}-0.json").read_text()) for arm in TRIED}


# ------------------------------------------------------------------------------------------------
# what is compared

@pytest.mark.parametrize("preset", ("tiny", "cifar", "cifar-cpu"))
def test_encoders_of_all_arms_have_the_same_size_within_a_tenth(preset):
    args, size = order.parse(["--preset", preset, *([] if preset == "tiny" else ["--data", "x", "--val_data", "x"])]), {}
    for arm in order.ARMS:
        settings, parameters, target = order.settings_of(arm, args)
        tok = build(CONFIGS, {**config.PRESETS[args.preset], **settings})[0]
        assert config.parse_run("", order.command(settings, 0, args, "nowhere")).tok == tok, "the flags say the same"
        model = NativeTok(tok).grow_to(tok.num_tokens)                        # counted another way
        size[arm] = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("decoder", "quantizer")))
        assert size[arm] == parameters
        assert target == size.get("nativetok-joint", target)
    for arm in order.ARMS:
        assert abs(size[arm] / size["nativetok-joint"] - 1) < 0.1, size


def test_all_arms_take_the_same_steps_and_differ_only_where_they_should():
    args, shared = order.parse(["--budget", "999"]), set()
    for arm in order.ARMS:
        run = config.parse_run("", order.command(order.settings_of(arm, args)[0], 3, args, "nowhere"))
        assert sum(phase.steps for phase in order.train.phases(run.tok, run.train)) == round(999 * order.SHARE.get(arm, 1)), arm
        assert (len(run.tok.token_schedule) > 1) == (arm in ("nativetok-hnt", "nativetok-reversed", "nativetok-shuffled"))
        assert (run.tok.tail_drop > 0) == (arm == "titok-taildrop")
        values = as_dict(run.tok, run.gen, run.train)
        differing = ("tokenizer", "encoder_width", "encoder_depth", "expert", "expert_width", "expert_depth", "tail_drop",
                     "token_schedule", "base_steps", "grow_steps", "finetune_steps")
        shared.add((run.tok.num_tokens, *(str(v) for name, v in values.items() if name not in differing)))
    assert len(shared) == 1


def test_a_tokenizer_in_another_order_makes_the_same_images():
    torch.manual_seed(0)
    inside = NativeTok(config.TokenizerConfig(image_size=32, patch_size=8, encoder_width=32, encoder_depth=1, encoder_heads=2, expert_width=32, expert_heads=2,
                                              token_schedule=(6,), codebook_size=16, decoder_width=32, decoder_depth=1, decoder_heads=2)).eval()
    inside.fingerprint = "inside"
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    plain = inside.encode(images)
    assert order.in_order_of("nativetok-hnt", 0, inside) is inside
    turned, mixed, other = (order.in_order_of(arm, seed, inside) for arm, seed in (("nativetok-reversed", 0), ("nativetok-shuffled", 0), ("nativetok-shuffled", 1)))
    assert torch.equal(turned.encode(images), plain.flip(1))
    for tokenizer in (turned, mixed, other):
        assert torch.equal(tokenizer.encode(images).sort().values, plain.sort().values)
        assert torch.equal(tokenizer.decode(tokenizer.encode(images)), inside.decode(plain))
    inside.fingerprint = "another inside"
    names = {tokenizer.fingerprint for tokenizer in (inside, turned, mixed, other, order.in_order_of("nativetok-reversed", 0, inside))}
    assert len(names) == 5, "or a generator could be used with ids that it has not learned"


# ------------------------------------------------------------------------------------------------
# what is written

def test_results_hold_what_was_promised(results):
    for arm, result in results.items():
        L = len(result["order"])
        assert {"psnr", "codebook_used", "encoder_parameters", "encoder_parameters_off", "command", "tokenizer_command", "seed", "device", "commit", "torch",
                "settings", "real"} <= set(result), arm
        assert result["arm"] == arm and order_table.fd_key(result).startswith("fd_tinycnn_") and len(order_table.fd_key(result)) == len("fd_tinycnn_") + 8
        assert len(result["perplexity"]) == len(result["ar_bits"]) == len(result["marginal_bits"]) == L == 8
        assert list(result["prefix_psnr"]) == ["1", "2", "4", "8"]
        assert result["prefix_psnr"]["8"] == pytest.approx(result["psnr"], abs=2e-3), "all tokens: the reconstruction itself"
        swept = {(row["name"], row.get("steps"), row["cfg_scale"]) for row in result["samples"]}
        assert {("ar", None, scale) for scale in (1, *order.SCALES)} | {("maskgit", 8, scale) for scale in (1, *order.SCALES)} <= swept
        assert {(name, n) for name, n, scale in swept if scale == 1} == {("ar", None), *(("maskgit", n) for n in (1, 2, 4, 8))}
        for row in result["samples"]:
            assert row["n"] == 20 and row[order_table.fd_key(result)] >= 0 and 0 <= row["class_accuracy"] <= 1
        assert {"ar", "maskgit", "base"} <= set(result["costs"]) and sum(c["steps"] for p, c in result["costs"].items() if p not in ("ar", "maskgit")) == 20
        for cost in result["costs"].values():
            assert cost["seconds"] > 0 and cost["peak_mb"] >= 0 and cost["loss_by_tenth"]
    assert len({order_table.fd_key(result) for result in results.values()}) == 1, "one judge for all"


def test_bits_by_position_sum_to_those_of_an_image(results):
    for result in results.values():
        assert sum(result["ar_bits"]) == pytest.approx(result["ar_bits_total"], rel=1e-3)
        assert sum(result["marginal_bits"]) == pytest.approx(result["marginal_bits_total"], rel=1e-3)
        assert all(0 <= bits < 1.5 * math.log2(32) for bits in result["ar_bits"] + result["marginal_bits"])


def test_a_control_has_the_tokens_of_hnt_in_another_order(results):
    made, mixed = results["nativetok-hnt"], results["nativetok-shuffled"]
    assert mixed["order"] != made["order"] == list(range(8)) == sorted(mixed["order"])
    for name in ("psnr", "prefix_psnr", "codebook_used", "marginal_bits_total"):
        assert mixed[name] == pytest.approx(made[name])
    for name in ("perplexity", "marginal_bits"):
        assert mixed[name] == pytest.approx([made[name][i] for i in mixed["order"]])
    assert mixed["ar_bits"] != made["ar_bits"]


def test_frequencies_alone_cost_what_they_should():
    """A code that is always the same costs next to nothing, four alike two bits, one never seen before log2(n + K/2) + 1."""
    learned = torch.stack([torch.zeros(4000, dtype=torch.int64), torch.arange(4000) % 4, torch.zeros(4000, dtype=torch.int64)], dim=1).numpy()
    ids = torch.tensor([[0, k, 3] for k in range(4)])
    constant, four, unseen = order.marginal_bits(learned, ids, 16)
    assert constant < 0.01 and four == pytest.approx(2, abs=0.01) and unseen == pytest.approx(math.log2(4008) + 1)


def test_the_table_has_one_row_per_arm(out):
    tables = (out / "table.md").read_text().split("## ")[1:]
    assert [table.splitlines()[0] for table in tables][:3] == ["Summary", "Reconstruction and bits", "Samples"] and len(tables) == 6
    for table in tables:
        rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
        assert [row[0] for row in rows] == ["| arm", *(f"| {arm}" for arm in TRIED)] and len({len(row) for row in rows}) == 1


def test_the_csv_holds_every_number_of_every_arm_and_seed(out, results):
    with open(out / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["arm"], line["seed"]) for line in lines] == [(arm, "0") for arm in TRIED]
    for line in lines:
        told = {f"{title}: {name}": value for title, row in order_table.columns(results[line["arm"]]).items() for name, value in row.items()}
        assert {name: float(line[name]) for name in told} == pytest.approx(told)


def test_several_seeds_are_told_by_mean_and_spread(results, tmp_path):
    for seed, db in ((0, 20.0), (1, 22.0)):
        (tmp_path / f"titok-{seed}.json").write_text(json.dumps({**results["titok"], "seed": seed, "psnr": db}))
    code, text, _ = command("--table", "--out", tmp_path)
    assert code == 0 and " | 21 ± 1.4 | " in text and "titok: 2" in text


def test_a_second_call_trains_nothing_and_changes_nothing(flags, out, monkeypatch):
    def contents():
        return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    before = contents()
    monkeypatch.setattr(order, "train_arm", None)  # whoever calls it fails
    code, text, err = command(*flags)
    assert code == 0 and text.count("finished before") == 3, err
    assert contents() == before


# ------------------------------------------------------------------------------------------------
# wrong use

@pytest.mark.parametrize("wrong, says", [
    (("--arms", "titoc"), ("titoc", "titok")),
    (("--budget", 0), ("budget 0", "20")),
    (("--seeds", -1), ("seeds",)),
    (("--num_samples", 1), ("num_samples",)),
    (("--preset", "cifar"), ("--data",)),
    (("--data", "nowhere"), ("--val_data",)),
    (("--data", "nowhere", "--val_data", "nowhere"), ("nowhere",)),
    (("--table", "--out", "nowhere"), ("no results",)),
    (("--nonsense",), ("--nonsense",)),
])
def test_wrong_use_gets_one_line(wrong, says):
    code, _, err = command(*wrong)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    for text in says:
        assert text in err, err


def test_results_of_other_settings_are_not_taken_for_these(flags):
    code, _, err = command(*flags, "--budget", 30)
    assert code == 2 and "base_steps: 20 -> 30" in err and "--out" in err, err


def test_results_of_two_judges_are_not_compared(results, tmp_path):
    (tmp_path / "titok-0.json").write_text(json.dumps(results["titok"]))
    (tmp_path / "nativetok-hnt-0.json").write_text(json.dumps(results["nativetok-hnt"]).replace(order_table.fd_key(results["titok"]), "fd_tinycnn_00000000"))
    code, _, err = command("--table", "--out", tmp_path)
    assert code == 2 and "different judges" in err
