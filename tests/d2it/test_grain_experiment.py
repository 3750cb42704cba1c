"""experiments/grain.py: arms that differ in one thing, budgets that are equal where it says so,
results that are whole, repeatable and not mixed up."""
import csv
import io
import json
import shutil
from dataclasses import replace

import pytest
import torch

from d2it import train
from d2it.content import Content, DiTBlock
from d2it.dvae import DVAE
from d2it.grain import entropy, take_top
from d2it.model import D2iT
from d2it.presets import ContentConfig, DVAEConfig, load_preset, parse_run
from experiments import grain, grain_arms, grain_measure, grain_table
from experiments.grain_arms import ARMS, CODES, EXTRA, IMAGES, PLANS, SWEEP
from helpers import held_shapes, interrupt_at, refused, same_content
from plumbing import checkpoint
from plumbing import run as run_folder
from plumbing.datasets import open_images
from plumbing.flags import as_dict

TRIED = ["error", "d2it-4+2", "d2it-all"]


def command(*words) -> None:
    grain.main(grain.parse([*map(str, words), "--device", "cpu"]))


@pytest.fixture(scope="module")
def words(tmp_path_factory, shapes_npz):
    """A quick run of three arms on 60 shapes, broken off once: bad, but complete."""
    folder = tmp_path_factory.mktemp("grain")
    out, val = folder / "out", held_shapes(folder / "held.npz")
    words = ["--quick", "--data", shapes_npz, "--val_data", val, "--out", out, "--arms", *TRIED]
    patch = pytest.MonkeyPatch()
    patch.setattr(run_folder, "EVAL_IMAGES", 20)
    with pytest.MonkeyPatch.context() as broken:
        interrupt_at(broken, "content", 8)
        with pytest.raises(SystemExit) as left:
            command(*words)
    assert left.value.code == 3
    command(*words)
    patch.undo()
    return words


@pytest.fixture
def out(words):
    return words[words.index("--out") + 1]


@pytest.fixture
def results(out):
    return {arm: json.loads((out / f"{arm}-0.json").read_text()) for arm in TRIED}


# ------------------------------------------------------------------------------------------------
# what is compared

@pytest.mark.parametrize("preset", ["tiny", "cifar-cpu"])
def test_arms_differ_from_the_first_only_in_what_they_are_named_after(preset):
    args = grain.parse(["--preset", preset, "--data", "x", "--val_data", "y"])
    may = {"coarse": {"grain_policy"}, "fine": {"grain_policy"}, "static": {"grain_policy"},
           "random": {"grain_policy"}, "inverted": {"grain_policy"}, "entropy": set(),
           "error": set(), "coarse10": {"grain_policy", "code_dim"},
           "fine2": {"grain_policy", "code_dim"}, "fine3": {"grain_policy", "code_dim"},
           "r25": {"grain_ratio"}, "r75": {"grain_ratio"}}
    depth = {"content_depth", "refine_depth"}
    more = {"dit-fine": depth, "dit-coarse10": depth, "d2it-6+0": depth, "d2it-3+3": depth,
            "d2it-slot": {"grain_loss"}}
    runs = {arm: parse_run("", grain.flags_of(arm, 3, args)) for arm in ARMS}
    base = as_dict(runs["entropy"].dvae, runs["entropy"].content, runs["entropy"].train)
    for arm, run in runs.items():
        values = as_dict(run.dvae, run.content, run.train)
        differ = {name for name in values if values[name] != base[name]}
        assert differ == may[ARMS[arm].codes or arm] | more.get(arm, set()), arm
        assert run.run.endswith(f"{arm}-3") and run.train.seed == 3
        if arm in IMAGES:
            blocks = run.content.content_depth + run.content.refine_depth
            assert blocks == 6, "all have as many blocks"


def test_equal_codes_and_equal_numbers_are_equal():
    n, dim = load_preset("d2it-tiny")[0].side ** 2, 4
    numbers = {arm: dim * (n + 3 * n * this.settings.get("grain_ratio", 0.5))
               for arm, this in CODES.items() if "grain_policy" not in this.settings}
    for arm in ("coarse", "fine", "coarse10", "fine2", "fine3"):
        codes = n if CODES[arm].settings["grain_policy"] == "coarse" else 4 * n
        numbers[arm] = codes * CODES[arm].settings.get("code_dim", dim)
    assert numbers["entropy"] == numbers["error"] == numbers["coarse10"] == 160
    assert numbers["fine2"] < numbers["entropy"] < numbers["fine3"]
    assert [numbers[codes] for codes, _ in SWEEP.values()] == sorted(numbers[codes] for codes, _
                                                                     in SWEEP.values())


def test_the_sweep_and_the_defaults_name_arms_that_there_are():
    for codes, images in SWEEP.values():
        assert IMAGES[images].codes == codes
    assert all(this.codes in CODES for this in IMAGES.values()) and set(EXTRA) < set(ARMS)
    assert not set(CODES) & set(IMAGES)
    assert grain.parse([]).arms == [arm for arm in ARMS if arm not in EXTRA]
    # read_results finds the files of an arm by the beginning of their names
    assert not [(a, b) for a in ARMS for b in ARMS if b.startswith(f"{a}-") and b[len(a) + 1:][0]
                in "0123456789"]


def test_maps_by_error_are_fine_where_the_coarse_arm_is_furthest_off():
    torch.manual_seed(0)
    cfg = DVAEConfig(image_size=32, cell_size=8, dvae_width=8, dvae_mults=(1, 2, 2, 4),
                     dvae_blocks=1, grain_policy="coarse")
    data = open_images("shapes")
    pixels = torch.stack([torch.from_numpy(data.load(i).copy()) for i in range(12)])
    coarse = DVAE(cfg).eval()
    limit = 2.5
    maps = grain_arms.fine_where_it_fails(coarse, limit)
    found = maps(pixels)
    count = (entropy(pixels, 8) > limit).flatten(1).sum(1)
    assert torch.equal(found.flatten(1).sum(1), count) and torch.equal(found, maps(pixels))
    mean, _ = coarse.moments(pixels.permute(0, 3, 1, 2) / 127.5 - 1, torch.zeros(12, 4, 4).bool())
    off = (coarse.decoder(mean) - (pixels.permute(0, 3, 1, 2) / 127.5 - 1)).square().mean(1)
    by_hand = torch.stack([torch.stack([off[:, 8 * i:8 * i + 8, 8 * j:8 * j + 8].mean((1, 2))
                                        for j in range(4)], dim=1) for i in range(4)], dim=1)
    assert torch.equal(found, take_top(by_hand, count))
    assert not torch.equal(found, take_top(entropy(pixels, 8), count))


def test_the_arm_error_learns_under_the_maps_that_it_is_handed(out, words, shapes_npz):
    """Its codes are constant in cells that the handed map calls coarse, and not in others."""
    args = grain.parse([*map(str, words), "--device", "cpu"])
    shared_limit = grain_measure.half_limit(open_images(shapes_npz), 32, 8)
    (change,) = grain.own_maps("error", 0, args, shared_limit, torch.device("cpu")).values()
    dvae = change(DVAE.load(out / "runs" / "error-0" / "dvae.pt"))
    data = open_images(shapes_npz)
    pixels = torch.stack([torch.from_numpy(data.load(i).copy()) for i in range(20)])
    grain_of, plain = dvae.encode(pixels).grain, DVAE.load(out / "runs/error-0/dvae.pt")
    assert torch.equal(grain_of, dvae.own_maps(pixels))
    assert not torch.equal(grain_of, plain.grain_of(pixels))
    # its statistics were measured under these maps too
    torch.manual_seed(0)
    dvae.measure([pixels])
    assert not torch.allclose(dvae.latent_std, torch.ones(2, 4))


@pytest.mark.parametrize("arm, plain, file", [
    ("error", "entropy", "dvae.pt"), ("d2it-all", "d2it-4+2", "content.pt")])
def test_what_the_settings_do_not_say_has_changed_what_is_learned(out, arm, plain, file):
    """Equal settings, equal seeds: without what the experiment hands in, they would be one."""
    changed, same = (checkpoint.load(out / "runs" / f"{name}-0" / file) for name in (arm, plain))
    assert changed["settings"] == same["settings"]
    assert not same_content(changed["ema"], same["ema"])


def test_refinement_of_all_looks_at_every_code_and_still_corrects_fine_ones_only():
    torch.manual_seed(0)
    cfg = ContentConfig(content_width=32, content_depth=1, refine_depth=1, content_heads=2,
                        grain_width=32, grain_depth=1, grain_heads=2)
    model = Content(cfg, 4, 4, 3).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    z, t, labels = torch.randn(3, 4, 8, 8), torch.tensor([9, 99, 999]), torch.arange(3)
    fine = torch.rand(3, 4, 4) < 0.4
    seen = tokens_seen(model)
    few = model(z, t, labels, fine)
    model.refine.everywhere = True
    everything, rough = model(z, t, labels, fine), model(z, t, labels, fine, refine=False)
    assert seen == [16, 4 * int(fine.flatten(1).sum(1).max()), 16, 64, 16]
    changed = (everything != rough).any(dim=1)
    inside = fine.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(changed, inside) and not torch.allclose(few, everything, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# what is written

def test_results_hold_what_was_promised(results, out):
    fd = grain_table.fd_key(results["error"])
    for arm, result in results.items():
        assert {"command", "run_command", "commit", "torch", "device", "settings"} <= set(result)
        assert (result["arm"], result["seed"]) == (arm, 0) and result[fd] >= 0
    codes = results["error"]
    assert 16 < codes["codes"] < 64 and codes["numbers"] == pytest.approx(4 * codes["codes"], 1e-3)
    assert {"psnr", "psnr_fine_cells", "psnr_coarse_cells"} <= set(codes)
    assert codes["costs"]["dvae"]["steps"] == PLANS["quick"].sizes["dvae_steps"]
    for arm in TRIED[1:]:
        names = [row["name"] for row in results[arm]["samples"]]
        assert names == (["predicted", "true", "random"] if arm == "d2it-4+2" else ["predicted"])
        for row in results[arm]["samples"]:
            assert row["n"] == 20 and 0 <= row["class_accuracy"] <= 1 and row["ms_an_image"] > 0
        assert results[arm]["costs"]["content"]["steps"] == 12
    assert 0 <= results["d2it-4+2"]["samples"][0]["map_obeyed"] <= 1
    real = json.loads((out / "real.json").read_text())
    assert real[fd] >= 0 and real["n"] == 20 and real["commit"]


def tokens_seen(model: Content) -> list[int]:
    """A list that grows by the number of tokens whenever a block is called."""
    seen = []
    for module in model.modules():
        if isinstance(module, DiTBlock):
            module.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    return seen


def test_an_image_costs_what_the_blocks_are_given(results, out):
    """tokens x blocks of one image, counted in the network itself."""
    for arm in TRIED[1:]:
        model = D2iT.of_run(str(out / "runs" / f"{arm}-0"), torch.device("cpu"))
        if arm == "d2it-all":
            model.content.refine.everywhere = True
        grain_map = torch.ones(1, 4, 4).bool()
        grain_map[:, 2:] = False
        seen = tokens_seen(model.content)
        model.content(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.zeros(1).long(), grain_map)
        codes = 16 + 3 * int(grain_map.sum())
        assert grain_measure.tokens_times_blocks(model, codes) == sum(seen), arm


def test_true_maps_belong_to_their_labels_and_random_ones_have_as_many_fine_cells(words, out):
    args = grain.parse([*map(str, words), "--device", "cpu"])
    shared = grain.Shared(args)
    model = D2iT.of_run(str(out / "runs" / "d2it-4+2-0"), torch.device("cpu"))
    labels, true = grain_measure.asked("true", model, shared.judge, 20)
    again, random = grain_measure.asked("random", model, shared.judge, 20)
    assert torch.equal(labels, again) and not torch.equal(true, random)
    assert torch.equal(true.flatten(1).sum(1), random.flatten(1).sum(1))
    pixels = torch.stack([torch.from_numpy(shared.val.load(i).copy()) for i in range(20)])
    assert torch.equal(true, model.dvae.grain_of(pixels))
    assert labels.tolist() == shared.val.labels[:20].tolist()
    assert grain_measure.asked("predicted", model, shared.judge, 20)[1] is None
    # an arm with one map for all images is given it, and it is no merit to obey it
    for policy, codes in (("coarse", 16), ("fine", 64)):
        model.dvae.cfg = replace(model.dvae.cfg, grain_policy=policy)
        row = grain_measure.sampled("predicted", model, shared.judge, 20, 1, 0)
        assert row["codes"] == codes and row["map_obeyed"] is None and row["n"] == 20


def test_a_second_call_trains_nothing_and_changes_nothing(words, out, monkeypatch, capsys):
    def contents():
        return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    before = contents()
    monkeypatch.setattr(train, "main", None)  # whoever calls it fails
    command(*words)
    assert capsys.readouterr().out.count("finished before") == len(TRIED)
    assert contents() == before


def test_tables_have_a_row_for_each_arm_and_kind_of_maps_and_a_mean(results, tmp_path, out):
    shutil.copyfile(out / "real.json", tmp_path / "real.json")
    for seed, dB in ((0, 20.0), (1, 22.0)):
        for arm in ("error", "d2it-4+2"):
            made = {**results[arm], "seed": seed} | ({"psnr": dB} if arm == "error" else {})
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(made))
    one_map = {**results["d2it-all"], "arm": "dit-fine"}
    one_map["samples"] = [{**one_map["samples"][0], "map_obeyed": None}]
    (tmp_path / "dit-fine-0.json").write_text(json.dumps(one_map))
    text = grain_table.write_tables(str(tmp_path))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    heads = [row for row in rows if row[1] == "seeds"]
    by_name = {row[0]: row for row in rows if row[1] != "seeds"}
    assert list(by_name) == ["error", "dit-fine", "d2it-4+2", "d2it-4+2, true maps",
                             "d2it-4+2, random maps"]
    assert by_name["error"][heads[0].index("PSNR, dB")] == "21.00 ± 1.4"
    assert by_name["dit-fine"][heads[1].index("map obeyed")] == "-"
    assert all(len(row) == len(heads[row[0] != "error"]) for row in by_name.values())
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [(line["arm"], line["seed"]) for line in lines][:3] == [
        ("error", "0"), ("error", "1"), ("dit-fine", "0")] and len(lines) == 9
    assert float(lines[1]["PSNR, dB"]) == 22


def test_the_sweep_shows_both_distances_for_every_r_that_has_them(results):
    found = {codes: [results["error"]] for codes, _ in list(SWEEP.values())[:3]}
    found |= {images: [results["d2it-4+2"]] for _, images in list(SWEEP.values())[1:]}
    points = grain_table.sweep(found)
    assert list(points) == [0.25, 0.5]
    fd = grain_table.fd_key(results["error"])
    assert points[0.5][2:4] == [results["error"][fd], results["d2it-4+2"]["samples"][0][fd]]
    other = {**results["d2it-4+2"], "seed": 7, "samples": [
        {**results["d2it-4+2"]["samples"][0], fd: 1e9}]}
    found["d2it-4+2"] = [*found["d2it-4+2"], other]
    assert grain_table.sweep(found) == points, "a seed that not all points have would not compare"
    drawing = grain_table.figure(points)
    assert drawing.startswith("<svg xmlns=") and drawing.count("<polyline") == 2


# ------------------------------------------------------------------------------------------------
# wrong use

@pytest.mark.parametrize("wrong, says", [
    (("--arms", "entropie"), ("entropie", "entropy")),
    (("--seeds", "-1"), ("seeds",)),
    (("--preset", "cifar-cpu"), ("--data",)),
    (("--data", "nowhere"), ("--val_data",)),
])
def test_wrong_use_gets_one_line(wrong, says):
    refused(grain.parse, wrong, names=says)


def test_no_results_and_results_of_other_settings_are_refused(words, out, tmp_path):
    refused(command, "--table", "--out", tmp_path, names=["no results"])
    changed = json.loads((out / "error-0.json").read_text())
    changed["settings"]["dvae_steps"] = 99
    (tmp_path / "error-0.json").write_text(json.dumps(changed))
    for name in ("tinycnn.pt", "real.json"):
        shutil.copyfile(out / name, tmp_path / name)
    again = [*words[:words.index("--out")], "--out", tmp_path, "--arms", "error"]
    refused(command, *again, names=["dvae_steps: 99 -> 12", "--out"])
