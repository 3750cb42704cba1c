"""experiments/grain.py: arms that differ in one thing, budgets that are equal where it says so,
results that are whole, repeatable and not mixed up."""
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from d2it import train
from d2it.content import Content, DiTBlock
from d2it.dvae import DVAE
from d2it.grain import take_top
from d2it.model import D2iT
from d2it.presets import ContentConfig, DVAEConfig, parse_run
from experiments import grain, grain_table
from experiments.grain import ARMS, CODES, IMAGES, PLANS
from experiments.grain_table import SWEEP
from helpers import contents, held_shapes, interrupt_at, refused, shape_pixels
from plumbing import checkpoint
from plumbing import run as run_folder
from plumbing.flags import as_dict

TRIED = ["error", "d2it-4+2", "d2it-all"]
SMALL = DVAEConfig(image_size=32, dvae_width=8, dvae_mults=(1, 2, 2, 4), dvae_blocks=1)


def command(*words) -> None:
    grain.main(grain.parse([*map(str, words), "--device", "cpu"]))


@pytest.fixture(scope="module")
def words(tmp_path_factory, data):
    """A quick run of three arms on 60 shapes, broken off once: bad, but complete."""
    folder = tmp_path_factory.mktemp("grain")
    out, val = folder / "out", held_shapes(folder / "held.npz")
    words = ["--quick", "--data", data, "--val_data", val, "--out", out, "--arms", *TRIED]
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

def test_arms_differ_from_the_first_only_in_what_they_are_named_after():
    args = grain.parse(["--preset", "cifar-cpu", "--data", "x", "--val_data", "y"])
    both = {"grain_policy", "code_dim"}
    may = {"coarse": {"grain_policy"}, "fine": {"grain_policy"}, "coarse10": both, "fine2": both,
           "fine3": both, "r25": {"grain_ratio"}, "r75": {"grain_ratio"}}
    depth = {"content_depth", "refine_depth"}
    more = {"dit-fine": depth, "dit-coarse10": depth, "d2it-6+0": depth, "d2it-3+3": depth}
    runs = {arm: parse_run("", grain.flags_of(arm, 3, args)) for arm in ARMS}
    base = as_dict(runs["entropy"].dvae, runs["entropy"].content, runs["entropy"].train)
    for arm, run in runs.items():
        values = as_dict(run.dvae, run.content, run.train)
        differ = {name for name in values if values[name] != base[name]}
        assert differ == may.get(ARMS[arm].codes or arm, set()) | more.get(arm, set()), arm
        assert run.run.endswith(f"{arm}-3") and run.train.seed == 3
        if arm in IMAGES:
            blocks = run.content.content_depth + run.content.refine_depth
            assert blocks == 6, "all have as many blocks"


def test_arms_have_as_many_numbers_as_their_names_say_and_the_sweep_goes_up():
    n, dim, fine = 16, 4, {"coarse": 0, "fine": 1}
    share = {arm: fine.get(this.settings.get("grain_policy"), this.settings.get("grain_ratio", 0.5))
             for arm, this in CODES.items()}
    numbers = {arm: (n + 3 * n * share[arm]) * this.settings.get("code_dim", dim)
               for arm, this in CODES.items()}
    assert numbers["entropy"] == numbers["error"] == numbers["coarse10"] == 160
    assert numbers["fine2"] < numbers["entropy"] < numbers["fine3"]
    swept = [numbers[codes] for codes, _ in SWEEP.values()]
    assert swept == sorted(swept)
    assert all(IMAGES[images].codes == codes for codes, images in SWEEP.values())
    # read_results finds the files of an arm by the beginning of their names
    assert not [arm for arm in ARMS for other in ARMS if re.match(rf"{re.escape(arm)}-\d", other)]


def dvae(change=lambda dvae: dvae, pixels: torch.Tensor | None = None) -> DVAE:
    """As training makes it: the change of a new one, calibrated."""
    torch.manual_seed(0)
    model = change(DVAE(SMALL)).eval()
    if pixels is not None:
        model.calibrate(model.entropy(pixels))
    return model


def changes() -> dict:
    """{arm: its change} of all arms of codes with maps of their own."""
    coarse = DVAE(replace(SMALL, grain_policy="coarse")).eval()
    return {arm: CODES[arm].change for arm in ("static", "random", "inverted")} | {
        "error": grain.with_maps(lambda cfg: grain.ErrorMaps(cfg, coarse))}


def test_a_control_has_as_many_fine_cells_in_each_image_as_entropy_and_others():
    pixels = shape_pixels(200)
    plain = dvae(pixels=pixels)
    scores, wanted = plain.entropy(pixels), plain.grain_of(pixels)
    maps = {}
    for arm, change in changes().items():
        model = dvae(change, pixels)
        maps[arm] = model.grain_of(pixels)
        assert torch.equal(maps[arm].flatten(1).sum(1), wanted.flatten(1).sum(1)), arm
        assert not torch.equal(maps[arm], wanted)
        torch.manual_seed(7)
        again = torch.cat([model.grain_of(part) for part in pixels[:9].flip(0).split(2)])
        assert torch.equal(again.flip(0), maps[arm][:9]), "the same in every batch and call"
    # static: images with as many fine cells have them in the same places, the data set's
    for count in wanted.flatten(1).sum(1).unique():
        mine = maps["static"][wanted.flatten(1).sum(1) == count].unique(dim=0)
        assert len(mine) == 1 and torch.equal(mine[0], take_top(
            scores.mean(dim=0, keepdim=True), count[None])[0])
    detail = {arm: scores[grain_map].mean() for arm, grain_map in maps.items()}
    assert scores[wanted].mean() > detail["random"] > detail["inverted"]


def test_maps_by_error_are_fine_where_the_coarse_arm_is_furthest_off():
    pixels = shape_pixels(12)
    model = dvae(changes()["error"], pixels)
    (coarse,), images = model.coarse, pixels.permute(0, 3, 1, 2) / 127.5 - 1
    mean, _ = coarse.moments(images, torch.zeros(12, 4, 4).bool())
    off = (coarse.decoder(mean) - images).square().mean(1)
    by_hand = torch.stack([torch.stack([off[:, 8 * i:8 * i + 8, 8 * j:8 * j + 8].mean((1, 2))
                                        for j in range(4)], dim=1) for i in range(4)], dim=1)
    count = dvae(pixels=pixels).grain_of(pixels).flatten(1).sum(1)
    assert torch.equal(model.grain_of(pixels), take_top(by_hand, count))


def test_a_changed_dvae_begins_like_a_plain_one_and_is_loaded_with_its_change_only(tmp_path):
    pixels, plain = shape_pixels(20), dvae()
    for arm, change in changes().items():
        model, path = dvae(change, pixels), tmp_path / f"{arm}.pt"
        assert all(torch.equal(model.state_dict()[name], value)
                   for name, value in plain.state_dict().items() if name != "limit")
        checkpoint.save(path, {"dvae_config": as_dict(SMALL), "ema": model.state_dict()})
        loaded = DVAE.load(path, change)
        assert torch.equal(loaded.grain_of(pixels), model.grain_of(pixels)), arm
        refused(DVAE.load, path, names=[f"{arm}.pt", "own_maps"])


@pytest.mark.parametrize("arm, plain, file", [
    ("error", "entropy", "dvae.pt"), ("d2it-all", "d2it-4+2", "content.pt")])
def test_what_the_settings_do_not_say_has_changed_what_is_learned(out, arm, plain, file):
    """Equal settings, equal seeds: without what the experiment hands in, they would be one."""
    mine, other = (checkpoint.load(out / "runs" / f"{name}-0" / file) for name in (arm, plain))
    assert mine["settings"] == other["settings"]
    name = "decoder.enter.weight" if file == "dvae.pt" else "embed.weight"
    assert not torch.equal(mine["ema"][name], other["ema"][name])


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
    model = grain.refine_everywhere(model)
    everything, rough = model(z, t, labels, fine), model(z, t, labels, fine, refine=False)
    assert seen == [16, 4 * int(fine.flatten(1).sum(1).max()), 16, 64, 16]
    corrected = (everything != rough).any(dim=1)
    inside = fine.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(corrected, inside) and not torch.allclose(few, everything, atol=1e-4)


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
        model = D2iT.of_run(str(out / "runs" / f"{arm}-0"), torch.device("cpu"),
                            ARMS[ARMS[arm].codes].change, ARMS[arm].change)
        grain_map = torch.ones(1, 4, 4).bool()
        grain_map[:, 2:] = False
        seen = tokens_seen(model.content)
        model.content(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.zeros(1).long(), grain_map)
        codes = 16 + 3 * int(grain_map.sum())
        assert grain.tokens_times_blocks(model, codes) == sum(seen), arm


def test_true_maps_belong_to_their_labels_and_random_ones_have_as_many_fine_cells(words, out):
    args = grain.parse([*map(str, words), "--device", "cpu"])
    shared = grain.Shared(args)
    model = D2iT.of_run(str(out / "runs" / "d2it-4+2-0"), torch.device("cpu"))
    labels, true = grain.asked("true", model, shared.judge, 20)
    again, random = grain.asked("random", model, shared.judge, 20)
    assert torch.equal(labels, again) and not torch.equal(true, random)
    assert torch.equal(true.flatten(1).sum(1), random.flatten(1).sum(1))
    pixels = torch.stack([torch.from_numpy(shared.val.load(i).copy()) for i in range(20)])
    assert torch.equal(true, model.dvae.grain_of(pixels))
    assert labels.tolist() == shared.val.labels[:20].tolist()
    assert grain.asked("predicted", model, shared.judge, 20)[1] is None
    # an arm with one map for all images is given it, and it is no merit to obey it
    for policy, codes in (("coarse", 16), ("fine", 64)):
        model.dvae.cfg = replace(model.dvae.cfg, grain_policy=policy)
        row = grain.sampled("predicted", model, shared.judge, 20, 1, 0)
        assert row["codes"] == codes and row["map_obeyed"] is None and row["n"] == 20


def test_a_second_call_trains_nothing_and_changes_nothing(words, out, monkeypatch, capsys):
    before = contents(out)
    monkeypatch.setattr(train, "main", None)  # whoever calls it fails
    command(*words)
    assert capsys.readouterr().out.count("finished before") == len(TRIED)
    assert contents(out) == before


def test_the_sweep_shows_both_distances_for_every_r_that_has_them(results):
    found = {codes: [results["error"]] for codes, _ in list(SWEEP.values())[:3]}
    found |= {images: [results["d2it-4+2"]] for _, images in list(SWEEP.values())[1:]}
    points = grain_table.sweep(found)
    assert list(points) == [0.25, 0.5]
    fd = grain_table.fd_key(results["error"])
    assert points[0.5] == (results["error"][fd], results["d2it-4+2"]["samples"][0][fd])
    other = {**results["d2it-4+2"], "seed": 7, fd: 1e9}
    found["d2it-4+2"] = [*found["d2it-4+2"], other]
    assert grain_table.sweep(found) == points, "a seed that not all points have would not compare"


# ------------------------------------------------------------------------------------------------
# wrong use

def test_unknown_arms_no_results_and_results_of_other_settings_are_refused(words, out, tmp_path):
    """What order.py refuses too is tried there: the flags are read by one function."""
    refused(grain.parse, ["--arms", "entropie"], names=["entropie", "entropy"])
    refused(command, "--table", "--out", tmp_path, names=["no results"])
    changed = json.loads((out / "error-0.json").read_text())
    changed["settings"]["dvae_steps"] = 99
    (tmp_path / "error-0.json").write_text(json.dumps(changed))
    for name in ("tinycnn.pt", "real.json"):
        shutil.copyfile(out / name, tmp_path / name)
    again = [*words[:words.index("--out")], "--out", tmp_path, "--arms", "error"]
    refused(command, *again, names=["dvae_steps: 99 -> 12", "--out"])
