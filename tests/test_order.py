"""experiments/order.py: arms of equal size, controls that lose nothing but the order, results that
are whole and repeatable."""
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
from experiments import order, order_arms, order_measure, order_table
from helpers import held_shapes, some_shapes
from nativetok import NativeTok
from plumbing.datasets import open_images
from plumbing.flags import as_dict, build
from plumbing.start import main_with_user_errors

ROOT = Path(__file__).parent.parent

TRIED = ["titok", "nativetok-hnt", "nativetok-shuffled"]


def command(*flags) -> tuple[int, str, str]:
    """order.py in this process -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            words = [*map(str, flags), "--device", "cpu"]
            main_with_user_errors(lambda: order.main(order.parse(words)))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A quick run of three arms on 60 shapes with hardly any steps: bad, but complete."""
    folder = tmp_path_factory.mktemp("order")
    data, val = some_shapes(folder / "shapes.npz", 60), held_shapes(folder / "held.npz")
    flags = ["--quick", "--data", data, "--val_data", val, "--budget", 20, "--generator_steps", 4,
             "--num_samples", 20, "--out", folder / "out", "--arms", *TRIED]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    code, _, err = command(*flags)
    assert code == 0, err
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert after == before, "Ctrl-C and SIGTERM would be answered by a run that is over"
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
    images = [] if preset == "tiny" else ["--data", "x", "--val_data", "x"]
    args, size = order.parse(["--preset", preset, *images]), {}
    for arm in order_arms.ARMS:
        settings, parameters, target = order_arms.settings_of(arm, args)
        tok = build(CONFIGS, {**config.PRESETS[args.preset], **settings})[0]
        flags = order.train_flags(settings, 0, args, "nowhere")
        assert config.parse_run("", flags).tok == tok, "the flags say the same"
        model = NativeTok(tok).grow_to(tok.num_tokens)                        # counted another way
        size[arm] = sum(p.numel() for name, p in model.named_parameters()
                        if not name.startswith(("decoder", "quantizer", "ar_prior")))
        assert size[arm] == parameters
        assert target == size.get("nativetok-joint", target)
    for arm in order_arms.ARMS:
        assert abs(size[arm] / size["nativetok-joint"] - 1) < 0.1, size


def test_all_arms_take_the_same_steps_and_differ_only_where_they_should():
    args, shared = order.parse(["--budget", "999"]), set()
    differing = {"tokenizer", "encoder_width", "encoder_depth", "expert", "expert_width",
                 "expert_depth", "token_schedule", "base_steps", "grow_steps", "finetune_steps"}
    for arm in order_arms.ARMS:
        settings, _, _ = order_arms.settings_of(arm, args)
        made = config.parse_run("", order.train_flags(settings, 3, args, "nowhere"))
        steps = sum(phase.steps for phase in order.train.phases(made.tok, made.train))
        assert steps == (899 if arm == "nativetok-joint-time" else 999), arm
        assert (len(made.tok.token_schedule) > 1) == order_arms.ARMS[arm].grown
        assert (made.tok.tail_drop > 0) == ("drop" in arm or "blur" in arm)
        values, own = as_dict(made.tok, made.gen, made.train), order_arms.ARMS[arm].settings
        assert all(values[name] == value for name, value in own.items())
        plain = as_dict(*config.load_preset(args.preset))
        same = (str(plain[name] if name in own else value) for name, value in values.items()
                if name not in differing)
        shared.add((made.tok.num_tokens, *same))
    assert len(shared) == 1


def test_a_tokenizer_in_another_order_makes_the_same_images():
    torch.manual_seed(0)
    inside = NativeTok(config.TokenizerConfig(
        image_size=32, patch_size=8, encoder_width=32, encoder_depth=1, encoder_heads=2,
        expert_width=32, expert_heads=2, token_schedule=(6,), codebook_size=16, decoder_width=32,
        decoder_depth=1, decoder_heads=2)).eval()
    inside.fingerprint = "inside"
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    plain = inside.encode(images)
    assert order_arms.in_order_of("nativetok-hnt", 0, inside) is inside
    turned = order_arms.in_order_of("nativetok-reversed", 0, inside)
    mixed = order_arms.in_order_of("nativetok-shuffled", 0, inside)
    other = order_arms.in_order_of("nativetok-shuffled", 1, inside)
    assert torch.equal(turned.encode(images), plain.flip(1))
    for tokenizer in (turned, mixed, other):
        assert torch.equal(tokenizer.encode(images).sort().values, plain.sort().values)
        assert torch.equal(tokenizer.decode(tokenizer.encode(images)), inside.decode(plain))
    inside.fingerprint = "another inside"
    turned_other = order_arms.in_order_of("nativetok-reversed", 0, inside)
    tokenizers = (inside, turned, mixed, other, turned_other)
    names = {tokenizer.fingerprint for tokenizer in tokenizers}
    assert len(names) == 5, "or a generator could be used with ids that it has not learned"


# ------------------------------------------------------------------------------------------------
# what is written

def test_results_hold_what_was_promised(results):
    promised = {"psnr", "codebook_used", "encoder_parameters", "encoder_parameters_off", "command",
                "tokenizer_command", "seed", "device", "commit", "torch", "settings", "real"}
    scales, as_made = (1, *order_measure.SCALES), ("titok", "nativetok-hnt")

    def swept(rows):
        return {(row["name"], row.get("steps"), row["cfg_scale"]) for row in rows}
    for arm, result in results.items():
        L, fd = len(result["order"]), order_table.fd_key(result)
        assert promised <= set(result), arm
        assert result["arm"] == arm
        assert fd.startswith("fd_tinycnn_") and len(fd) == len("fd_tinycnn_") + 8
        assert len(result["perplexity"]) == L == 8
        assert len(result["ar_bits"]) == len(result["marginal_bits"]) == L
        assert list(result["prefix_psnr"]) == ["1", "2", "4", "8"]
        all_tokens = result["prefix_psnr"]["8"]
        assert all_tokens == pytest.approx(result["psnr"], abs=2e-3), "the reconstruction itself"
        assert [row["position"] for row in result["intervention"]] == [1, 2, 4, 8]
        assert list(result["predictors"]) == ["native", "reversed", "shuffled"]
        assert {("ar", None, scale) for scale in scales} <= swept(result["tried"])
        assert {("maskgit", 8, scale) for scale in scales} <= swept(result["tried"])
        plain = {(name, steps) for name, steps, scale in swept(result["samples"]) if scale == 1}
        assert plain == {("ar", None), *(("maskgit", n) for n in (1, 2, 4, 8))}
        lengths = [1, 2, 4, 8] if arm in as_made else [8]  # a prefix of another order has holes
        assert [row["tokens"] for row in result["first_tokens"]] == lengths
        assert [row["after"] for row in result["best_of"]] == lengths
        ways = ["left to right", "right to left", "shuffled"]
        assert [row["order"] for row in result["revealed"]] == ways
        for kind in ("tried", "samples", "first_tokens", "best_of", "revealed"):
            for row in result[kind]:
                assert row["n"] == 20 and row[fd] >= 0 and 0 <= row["class_accuracy"] <= 1
        assert {"ar", "maskgit", "base"} <= set(result["costs"])
        of_tokenizer = [cost["steps"] for phase, cost in result["costs"].items()
                        if phase not in ("ar", "maskgit")]
        assert sum(of_tokenizer) == 20
        for cost in result["costs"].values():
            assert cost["seconds"] > 0 and cost["loss_by_tenth"]
            assert cost["peak_mb"] > 0 or not Path("/proc/self/status").exists()
    judges = {order_table.fd_key(result) for result in results.values()}
    assert len(judges) == 1, "one judge for all"


def test_bits_by_position_sum_to_those_of_an_image(results):
    for result in results.values():
        for name in ("ar_bits", "marginal_bits"):
            bits = result[name]
            assert sum(bits) == pytest.approx(result[f"{name}_total"], rel=1e-3)
            assert all(0 <= b < 1.5 * math.log2(32) for b in bits)


def test_a_control_has_the_tokens_of_hnt_in_another_order(results):
    made, mixed = results["nativetok-hnt"], results["nativetok-shuffled"]
    assert mixed["order"] != made["order"] == list(range(8)) == sorted(mixed["order"])
    for name in ("psnr", "prefix_psnr", "codebook_used", "marginal_bits_total"):
        assert mixed[name] == pytest.approx(made[name])
    for name in ("intervention", "predictors"):
        assert mixed[name] == made[name], "these are of the tokenizer inside, in its own order"
    for name in ("perplexity", "marginal_bits"):
        assert mixed[name] == pytest.approx([made[name][i] for i in mixed["order"]])
    assert mixed["ar_bits"] != made["ar_bits"]


def test_only_experts_answer_when_a_token_is_forced(results):
    answered = {arm: sum(row["later_ids_changed"] for row in result["intervention"])
                for arm, result in results.items()}
    assert answered["titok"] == 0 < answered["nativetok-hnt"]
    assert all(row["repaired"] == 0 for row in results["titok"]["intervention"])


@pytest.mark.parametrize("best", (1.0, *order_measure.SCALES))
def test_guidance_is_chosen_on_other_samples_than_are_reported(best):
    """With noise 7, the one that is reported, another guidance looks best."""
    def judged(kind, noise, steps=8, cfg_scale=1.0):
        fd = abs(cfg_scale - (best if noise != 7 else 100))
        row = {"name": kind, "cfg_scale": cfg_scale, "seed": noise, "fd_tinycnn_x": fd}
        return row | ({"steps": steps} if kind == "maskgit" else {})
    rows = order_measure.sample_rows(judged, 16, 7)
    assert 7 not in {row["seed"] for row in rows["tried"]}
    assert {row["seed"] for row in rows["samples"]} == {7}
    for kind, numbers in (("ar", [None]), ("maskgit", [1, 2, 4, 8, 16])):
        tried = [row["cfg_scale"] for row in rows["tried"] if row["name"] == kind]
        assert tried == [1.0, *order_measure.SCALES]
        reported = [(row.get("steps"), row["cfg_scale"]) for row in rows["samples"]
                    if row["name"] == kind]
        assert reported == [(steps, scale) for steps in numbers for scale in sorted({1.0, best})]


def test_the_table_reports_the_guidance_that_was_chosen(results):
    result = json.loads(json.dumps(results["titok"]))
    fd = order_table.fd_key(result)
    worse, = {row["cfg_scale"] for row in result["samples"] if row["name"] == "ar"} - {1.0} or {1.0}
    for row in result["samples"]:  # now this guidance looks bad where it is reported
        if row["cfg_scale"] == worse:
            row[fd] = 1e6
    assert order_table.columns(result)["Samples"]["AR best FD"] == 1e6


def test_the_table_has_one_row_per_arm(out):
    tables = (out / "table.md").read_text().split("## ")[1:]
    titles = [table.splitlines()[0] for table in tables]
    assert titles[:2] == ["Summary", "Reconstruction and bits"] and len(tables) == 10
    assert tables[0].count("\n| arm |") == 3, "a summary for each question"
    for table in [*tables[0].split("\n*")[1:], *tables[1:]]:
        rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
        assert [row[0] for row in rows] == ["| arm", *(f"| {arm}" for arm in TRIED)]
        assert len({len(row) for row in rows}) == 1


def test_the_csv_holds_every_number_of_every_arm_and_seed(out, results):
    with open(out / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["arm"], line["seed"]) for line in lines] == [(arm, "0") for arm in TRIED]
    for line in lines:
        wanted = {}
        for title, row in order_table.columns(results[line["arm"]]).items():
            wanted |= {f"{title}: {name}": value for name, value in row.items()}
        assert {name: float(line[name]) for name in wanted} == pytest.approx(wanted)


def test_several_seeds_become_mean_and_spread(results, tmp_path):
    for seed, db in ((0, 20.0), (1, 22.0)):
        result = {**results["titok"], "seed": seed, "psnr": db}
        (tmp_path / f"titok-{seed}.json").write_text(json.dumps(result))
    code, text, _ = command("--table", "--out", tmp_path)
    assert code == 0 and " | 21 ± 1.4 | " in text and "titok: 2" in text


def test_a_measure_that_older_results_lack_costs_a_column_and_no_table(results, tmp_path):
    new = ("intervention", "predictors", "tried", "first_tokens", "best_of", "revealed")
    older = {name: value for name, value in results["titok"].items() if name not in new}
    (tmp_path / "titok-0.json").write_text(json.dumps(older))
    code, text, err = command("--table", "--out", tmp_path)
    assert code == 0 and "PSNR" in text and "| ids changed" not in text, err
    assert "chosen by FD on the same samples" in text
    (tmp_path / "nativetok-hnt-0.json").write_text(json.dumps(results["nativetok-hnt"]))
    text = command("--table", "--out", tmp_path)[1]
    rows = [line for line in text.splitlines() if line.startswith(("| arm", "| titok"))]
    assert "| ids changed" in text and all(a.count("|") == b.count("|")
                                         for a, b in zip(rows[::2], rows[1::2]))


def test_a_second_call_trains_nothing_and_changes_nothing(flags, out, monkeypatch):
    def contents():
        return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    before = contents()
    monkeypatch.setattr(order, "train_arm", None)  # whoever calls it fails
    code, text, err = command(*flags)
    assert code == 0 and text.count("finished before") == 3, err
    assert contents() == before


def test_the_yardstick_gets_an_eighth_to_all_of_the_tokens_bits(tmp_path):
    """8 tokens of 5 bits; more bits, more decibels; and a file that is there is not made anew."""
    args = order.parse(["--quick", "--out", str(tmp_path)])
    args.sizes = {**args.sizes, "image_size": 8}  # sooner
    images = open_images(some_shapes(tmp_path / "shapes.npz", 300))
    order.make_pca(args, images, images)
    written = (tmp_path / "pca.json").read_bytes()
    made = json.loads(written)
    bits, psnr = zip(*made["bits_and_psnr"])
    assert bits == (5, 10, 20, 40) and list(psnr) == sorted(set(psnr))
    assert "--bits 5 10 20 40" in made["pca_command"] and made["commit"]
    order.make_pca(args, None, None)
    assert (tmp_path / "pca.json").read_bytes() == written


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
    other = json.dumps(results["nativetok-hnt"]).replace(order_table.fd_key(results["titok"]),
                                                         "fd_tinycnn_00000000")
    (tmp_path / "nativetok-hnt-0.json").write_text(other)
    code, _, err = command("--table", "--out", tmp_path)
    assert code == 2 and "different judges" in err
