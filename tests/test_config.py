"""Promises of config.py: one list of settings, and a wrong one is answered with the repair."""
import ast
import dataclasses
import inspect
import json
import re

import pytest

import config
from config import CONFIGS, PRESETS, RUN_ONLY, TokenizerConfig, load_preset, parse_run
from d2it import presets
from helpers import ROOT, refused
from plumbing.flags import Parser, UserError, as_dict, build, read_run

FIELDS = {f.name: cls for cls in CONFIGS for f in dataclasses.fields(cls)}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """runs/tiny of the folder that the tests are started in must not matter."""
    monkeypatch.chdir(tmp_path)


def another(name: str, value):
    """A value other than `value` that is as valid beside the other defaults."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 1
    if isinstance(value, float):
        return value / 2 or 0.5
    if isinstance(value, list):
        return [3, 5, 9]
    choices = {"tokenizer": "titok", "expert": "block", "decoder_reads": "linear",
               "optimizer": "muon", "generators": "ar", "precision": "fp32"}
    return choices.get(name, value + "x")


def as_flag(name: str, value) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


# ------------------------------------------------------------------------------------------------
# flags

def test_every_setting_is_read_somewhere():
    """As an attribute, outside of the checks that each configuration makes of itself."""
    read = set()
    for path in [path for folder in ("", "plumbing/", "evaluation/", "d2it/")
                 for path in ROOT.glob(f"{folder}*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        checks = {node for check in ast.walk(tree) if getattr(check, "name", "") == "__post_init__"
                  for node in ast.walk(check)}
        read |= {node.attr for node in ast.walk(tree)
                 if isinstance(node, ast.Attribute) and node not in checks}
    fields = {f.name for cls in (*CONFIGS, *presets.CONFIGS) for f in dataclasses.fields(cls)}
    assert fields - read == set(), "nothing reads these"


def test_every_field_has_a_flag_that_changes_this_field_alone():
    start = as_dict(*load_preset("imagenet-32"))
    for name in FIELDS:
        value = another(name, start[name])
        args = parse_run("", ["--preset", "imagenet-32", *as_flag(name, value)])
        changed = as_dict(args.tok, args.gen, args.flow, args.train)
        assert changed == {**start, name: value} and type(changed[name]) is type(start[name])


def test_the_comment_behind_each_field_is_its_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit) as stopped:
        parse_run("What it does.", ["--help"])
    assert stopped.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines where it likes
    comments, above = {}, []  # behind the field, or right above it
    for cls in (config.RunConfig, *CONFIGS):
        for line in inspect.getsource(cls).splitlines():
            code, _, comment = line.strip().partition("# ")
            if re.match(r"\w+: ", code):
                comments[code.split(":")[0]] = comment or " ".join(above)
            above = [*above, comment] if comment and not code else []
    for name in FIELDS:
        assert len(comments[name]) > 10 and f"--{name}" in text
        assert "".join(comments[name].split()) in text, name


def test_later_wins_default_then_preset_then_flag():
    default, tiny = TokenizerConfig(), load_preset("tiny")[0]
    assert tiny.codebook_size != default.codebook_size and tiny.code_dim == default.code_dim
    args = parse_run("", ["--codebook_size", "77"])
    assert (args.preset, args.tok) == ("tiny", dataclasses.replace(tiny, codebook_size=77))
    # the order on the line does not matter
    args = parse_run("", ["--codebook_size", "77", "--preset", "imagenet-32"])
    assert args.tok == dataclasses.replace(load_preset("imagenet-32")[0], codebook_size=77)


# argparse alone would take the second and third for encoder_width
@pytest.mark.parametrize("line", ["--colour red", "--encoder_wid 64", "--encoder_w=64", "--no-fli",
                                  "--image_size many", "--image_size", "--image_size 32 64",
                                  "--stage 5", "--device tpu", "images"])
def test_a_wrong_or_shortened_flag_stops_with_one_line_and_exit_code_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_run("", line.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("(see --help)\n")


def test_an_empty_value_is_refused_where_it_is_not_the_default():
    parser = Parser()
    parser.add_argument("--grain")
    parser.add_argument("--classes", nargs="+")
    parser.add_argument("--val_data", default="")
    parser.add_argument("words", nargs="*")
    for words in (["--grain", ""], ["--grain", " "], ["--classes", "disc", ""]):
        refused(parser.parse_args, words, names=[words[0], "empty"])
    assert parser.parse_args(["--val_data", "", "--", ""]).val_data == ""


# ------------------------------------------------------------------------------------------------
# values that cannot work: test_ranges.py has more of them

@pytest.mark.parametrize("image_size, patch_size, repair", [
    (30, 4, "28 or 32"), (250, 16, "240 or 256"), (5, 8, "8")])
def test_a_patch_that_does_not_divide_suggests_sizes_that_do(image_size, patch_size, repair):
    with pytest.raises(UserError, match=f"try {repair}$"):
        TokenizerConfig(image_size=image_size, patch_size=patch_size)
    for size in map(int, repair.split(" or ")):
        TokenizerConfig(image_size=size, patch_size=patch_size)


@pytest.mark.parametrize("wrong", [
    *({"token_schedule": steps} for steps in ((32, 16), (8, 8), (4, 8, 6), (0, 4), (-4,), ())),
    *({f"{part}_width": width, f"{part}_heads": heads} for part, width, heads in (
        ("encoder", 64, 3), ("expert", 64, 3), ("decoder", 64, 3), ("generator", 64, 3),
        ("encoder", 66, 3), ("decoder", 66, 3),  # which hold positions: multiples of 4
        ("generator", 12, 4))),  # rotary pairs
    dict(tokenizer="vqgan"), dict(expert="mlp"), dict(generators="none"), dict(precision="fp16"),
    dict(tail_drop=1.5), dict(batch_size=0), dict(save_every=0),
    dict(beta2=1.0),  # the average would never move
    dict(base_steps=100, continuous_steps=100)])
def test_a_value_out_of_range_is_refused_by_name(wrong):
    refused(build, CONFIGS, wrong, names=[next(iter(wrong))])


def test_lengths_that_grow_and_widths_that_fit_are_taken():
    build(CONFIGS, {"token_schedule": (1, 2, 9)})
    for part in ("encoder", "expert", "decoder", "generator"):
        build(CONFIGS, {f"{part}_width": 64, f"{part}_heads": 4})


def test_a_setting_that_is_a_constant_by_now_is_read_where_it_had_this_value():
    assert build(CONFIGS, {"label_dropout": 0.1, "image_size": 32})[0].image_size == 32
    with pytest.raises(UserError, match="unknown setting label_dropout"):
        build(CONFIGS, {"label_dropout": 0.2})
    same = {"generator_min_learning_rate": 1e-4, "cell_size": 8, "dvae_mults": [1, 2, 2, 4]}
    assert build((*CONFIGS[:-1], presets.DVAEConfig), same)[-1].cell_size == 8


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="unknown setting colour, shape"):
        build(CONFIGS, {"shape": 1, "image_size": 32, "colour": 2})
    with pytest.raises(UserError, match="preset 'huge' is unknown; choose one of tiny"):
        parse_run("", ["--preset", "huge"])


# ------------------------------------------------------------------------------------------------
# presets, and what a run remembers

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_survives_json(name):
    loaded = load_preset(name)
    assert tuple(map(type, loaded)) == CONFIGS
    values = json.loads(json.dumps(as_dict(*loaded)))
    assert build(CONFIGS, values) == loaded
    assert values.items() >= json.loads(json.dumps(PRESETS[name])).items()


def save_run(folder, **changes) -> tuple:
    """What train.py writes into a run folder."""
    saved = build(CONFIGS, {**PRESETS["tiny"], "codebook_size": 99, "batch_size": 7, **changes})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"preset": "tiny", **as_dict(*saved)}))
    return saved


def test_a_saved_run_stands_for_its_preset(tmp_path):
    saved, mine = save_run(tmp_path / "mine"), str(tmp_path / "mine")
    args = parse_run("", ["--run", mine])
    assert (args.tok, args.gen, args.flow, args.train) == saved
    assert (args.run, args.preset) == (mine, "tiny")
    args = parse_run("", ["--run", mine, "--batch_size", "9"])
    assert (args.tok, args.train) == (saved[0], dataclasses.replace(saved[-1], batch_size=9)), (
        "a flag still wins")
    args = parse_run("", ["--run", mine, "--preset", "imagenet-32"])
    assert (args.tok, args.gen, args.flow, args.train) == load_preset("imagenet-32"), (
        "and so does a preset that was asked for")


def test_a_new_run_is_named_after_its_preset_and_found_again(tmp_path):
    assert parse_run("", ["--preset", "cifar"]).run.replace("\\", "/") == "runs/cifar"
    saved = save_run(tmp_path / "runs" / "tiny")
    assert parse_run("", []).tok == saved[0]


def test_a_folder_that_is_no_run_or_is_torn_is_named(tmp_path):
    with pytest.raises(UserError, match="empty is not a run"):
        read_run(str(tmp_path / "empty"))
    save_run(tmp_path / "torn")
    path = tmp_path / "torn" / "config.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match="torn.config.json cannot be read"):
        parse_run("", ["--run", str(tmp_path / "torn")])


def test_settings_puts_each_field_on_one_side_and_those_of_the_run_on_neither():
    everything = as_dict(*load_preset("tiny"))
    tokenizer, generator, flow = (config.settings(kind, *load_preset("tiny"))
                                  for kind in ("tokenizer", "generator", "flow_decoder"))
    assert set(RUN_ONLY) <= everything.keys(), "no misspelt name"
    assert len({**tokenizer, **generator, **flow}) == sum(map(len, (tokenizer, generator, flow)))
    fixed = {k: v for k, v in everything.items() if k not in RUN_ONLY}
    assert {**tokenizer, **generator, **flow} == fixed
    # A finished tokenizer must not be refused because a generator's setting changed, nor the other
    # way round.
    assert {"codebook_size", "batch_size", "learning_rate", "seed"} <= tokenizer.keys()
    assert {"generator_width", "label_smoothing", "generator_steps"} <= generator.keys()
    assert {"flow_decoder_width", "flow_decoder_steps"} <= flow.keys()
