"""Promises of checkpoint.py: what was saved comes back, whatever happens in between; JSON beside it
is whole or not there."""
import os
import random
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import contents, ended, names, program, refused, same_content, start_program
from muon import Muon
from torch import nn

from plumbing import checkpoint


def content(step: int) -> dict:
    """What a small run might save; every number in it tells the step."""
    return {"step": step, "model": {"weight": torch.full((50, 7), float(step))}}


@pytest.fixture
def path(tmp_path) -> Path:
    """A checkpoint of step 2 and, as the previous one, of step 1."""
    path = tmp_path / "tokenizer.pt"
    checkpoint.save(path, content(1))
    checkpoint.save(path, content(2))
    return path


# ------------------------------------------------------------------------------------------------
# what comes back

def test_what_was_saved_comes_back_with_types_and_bits(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = Muon([dict(params=list(model.parameters()), matrices=0, lr=1e-3)])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    assert type(state) is OrderedDict
    saved = {"model": state, "optimizer": optimizer.state_dict(),
             "half": torch.ones(2, dtype=torch.bfloat16), "empty": torch.zeros(0),
             "scalar": torch.tensor(3), "random": checkpoint.random_state(),
             "plain": ["text", 1, 0.5, True, None, (1, (2,)), {3: "int key"}]}
    checkpoint.save(tmp_path / "x.pt", saved)
    assert same_content(checkpoint.load(tmp_path / "x.pt"), {**saved, "model": dict(state)})


def test_nothing_to_load_is_one_clear_line(tmp_path):
    assert not checkpoint.exists(tmp_path / "x.pt")
    refused(checkpoint.load, tmp_path / "x.pt", names=["x.pt does not exist; train first"])


def test_another_format_is_refused_and_not_replaced_by_the_previous_one(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(path, content(3))
    monkeypatch.undo()
    refused(checkpoint.load, path, names=["format 2, this program reads format 1"])
    for foreign in ({"model": 1}, [1, 2], torch.zeros(2)):  # another program's
        torch.save(foreign, path)
        refused(checkpoint.load, path, names=["format None"])


def test_a_missing_key_is_named(path):
    assert checkpoint.load(path, needs=("step", "model"))["step"] == 2
    refused(lambda: checkpoint.load(path, needs=("step", "ema", "phase")),
            names=["tokenizer.pt has no ema, phase; "])


# ------------------------------------------------------------------------------------------------
# damage

def test_a_torn_newest_falls_back_to_the_previous_with_a_warning(path, capsys):
    whole = path.read_bytes()
    assert same_content(checkpoint.load(path), content(2)) and not capsys.readouterr().err
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert same_content(checkpoint.load(path), content(1))
        warning = capsys.readouterr().err
        assert warning.startswith("warning: tokenizer.pt: ") and warning.count("\n") == 1
        assert warning.endswith("using tokenizer.prev.pt instead\n")


def test_a_flipped_bit_anywhere_gives_a_good_checkpoint_or_the_one_before(path):
    whole = path.read_bytes()
    # 38 bytes into a directory entry are the attributes of the file
    with zipfile.ZipFile(path) as archive:
        entry = whole.index(b"/data/0", archive.start_dir)
        attributes = whole.rindex(b"PK\1\2", archive.start_dir, entry) + 38
    anywhere = random.Random(0)
    weights = whole.index(content(2)["model"]["weight"].numpy().tobytes())
    places = [(attributes + i, bit) for i in range(4) for bit in range(8)]
    places += [(weights + i, i % 8) for i in (0, 1, 700, 50 * 7 * 4 - 1)]
    places += [(anywhere.randrange(len(whole)), anywhere.randrange(8)) for _ in range(150)]
    for position, bit in places:
        data = bytearray(whole)
        data[position] ^= 1 << bit
        path.write_bytes(data)
        found = checkpoint.load(path)
        assert same_content(found, content(1)) or same_content(found, content(2)), (position, bit)


def test_two_damaged_ones_are_both_named(path):
    os.truncate(path, 100)
    os.truncate(checkpoint.previous(path), 0)
    refused(checkpoint.load, path, names=["tokenizer.pt: ", "tokenizer.prev.pt: ", "start again"])


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_a_hostile_pickle_never_runs(path, capsys):
    victim = path.parent / "victim"
    torch.save({"format": checkpoint.FORMAT, "model": Hostile(victim)}, path)
    assert same_content(checkpoint.load(path), content(1))
    assert not victim.exists()
    assert "more than plain data" in capsys.readouterr().err
    torch.load(path, weights_only=False)  # so the file was dangerous
    assert victim.exists()


# ------------------------------------------------------------------------------------------------
# saving that does not come to an end

def snapshots(monkeypatch, folder: Path, act) -> list[Path]:
    """Copies of `folder` around each step of act() that touches the disk: what kills leave."""
    copies = []

    def watch(step):
        def watched(*args, **kwargs):
            copies.append(shutil.copytree(folder, folder.parent / f"snapshot{len(copies)}"))
            result = step(*args, **kwargs)
            copies.append(shutil.copytree(folder, folder.parent / f"snapshot{len(copies)}"))
            return result
        return watched

    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    act()
    monkeypatch.undo()
    return copies


@pytest.mark.parametrize("damaged", [False, True])
def test_at_every_instant_of_a_save_a_good_checkpoint_can_be_loaded_and_two_are_kept(
        tmp_path, monkeypatch, damaged):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "tokenizer.pt"
    checkpoint.save(path, content(1))
    checkpoint.save(path, content(2))
    if damaged:
        os.truncate(path, 100)
    copies = snapshots(monkeypatch, folder, lambda: checkpoint.save(path, content(3)))
    assert len(copies) >= 8
    steps = []
    for copy in copies:
        assert checkpoint.exists(copy / path.name)
        found = checkpoint.load(copy / path.name)
        assert same_content(found, content(found["step"]))
        steps.append(found["step"])
    assert steps == sorted(steps) and steps[0] == (1 if damaged else 2) and steps[-1] == 3
    assert names(folder) == ["tokenizer.prev.pt", "tokenizer.pt"]
    kept = checkpoint.load(checkpoint.previous(path))["step"]
    assert kept == (1 if damaged else 2), "a damaged one never pushes out the good one before it"


FILL = """
import resource, sys, torch
from plumbing import checkpoint
from plumbing.flags import UserError
told, endless = [], resource.RLIM_INFINITY
for limit in (0, 300, 5_000, 100_000, 399_900, 401_000):
    # the kernel refuses to write on
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, endless))
    try:
        checkpoint.save(sys.argv[1], {"step": 3, "weight": torch.ones(100_000)})
    except UserError as error:
        told.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (endless, endless))  # what is printed is a file too
print(*told, sep="\\n", flush=True)
"""


def test_a_full_disk_is_one_clear_line_and_the_old_checkpoints_stay(path):
    before = contents(path.parent)
    filler = program("-c", FILL, path)
    lines = filler.stdout.splitlines()
    assert filler.returncode == 0 and len(lines) == 6, filler.stderr
    for line in lines:
        assert line.startswith(f"cannot write {path}: File too large; is the disk full")
    assert contents(path.parent) == before


def test_a_folder_that_cannot_be_written_is_one_clear_line(path):
    # no such folder, and a file in its place
    for bad in (path.parent / "absent" / "x.pt", path / "x.pt"):
        refused(checkpoint.save, bad, content(1), names=["cannot write", "x.pt", "not writable"])


def test_an_interrupted_save_leaves_no_temporary(path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, content(3))
    assert names(path.parent) == ["tokenizer.prev.pt", "tokenizer.pt"]
    assert checkpoint.load(path)["step"] == 2


def test_sweep_removes_leftovers_of_dead_processes_and_nothing_else(path):
    dead = start_program("-c", "")
    ended(dead)
    living = os.getppid()
    stale = [f".tokenizer.pt.tmp-{dead.pid}", f".log.jsonl.tmp-{os.getpid()}", f".x.tmp-{10**30}"]
    good = [f".tokenizer.pt.tmp-{living}", ".tokenizer.pt.tmp-x", ".hidden", "tmp-1"]
    for name in stale + good:
        (path.parent / name).touch()
    checkpoint.sweep(path.parent)
    assert names(path.parent) == sorted(good + ["tokenizer.pt", "tokenizer.prev.pt"])
    checkpoint.sweep(path.parent / "absent")  # the first start has no folder yet


# ------------------------------------------------------------------------------------------------
# what is never saved

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite_is_ever_saved(path, bad):
    for value in (bad, torch.tensor([0., bad]), torch.tensor(bad, dtype=torch.bfloat16)):
        state = {"step": 3, "optimizer": {"state": {0: {"exp_avg": value}}}}
        refused(checkpoint.save, path, state, names=["optimizer.state.0.exp_avg is not finite"])
    assert checkpoint.load(path)["step"] == 2
    assert names(path.parent) == ["tokenizer.prev.pt", "tokenizer.pt"]


@pytest.mark.parametrize("odd, kind", [(np.float64(1), "numpy.float64"),
                                       (np.zeros(2), "numpy.ndarray"), (Path("x"), "Path"),
                                       (torch.Size([2]), "torch.Size"), ({1, 2}, "set")])
def test_what_load_would_refuse_is_refused_by_save_with_the_way_to_it(path, odd, kind):
    with pytest.raises(TypeError, match=rf"tokenizer\.pt: config\.list\.1 is a .*{kind}"):
        checkpoint.save(path, {"config": {"list": [0, odd]}})
    assert checkpoint.load(path)["step"] == 2


# ------------------------------------------------------------------------------------------------
# fingerprints and settings

def test_a_fingerprint_changes_with_one_bit_one_name_one_shape_one_type_one_setting():
    state = {"b": torch.arange(6.), "a": torch.ones(2, dtype=torch.bfloat16),
             "step": torch.tensor(1)}
    # b[2], the last bit
    one_bit = {**state, "b": torch.nextafter(state["b"], torch.tensor([0., 0., 9., 3., 4., 5.]))}
    prints = [checkpoint.fingerprint(s, *extra) for s, *extra in (
        (state,), (one_bit,), ({**state, "b": state["b"].view(2, 3)},),
        ({**state, "b": state["b"].view(torch.int32)},),
        ({"c": state["b"], "a": state["a"], "step": state["step"]},),
        ({**state, "step": torch.tensor(2)},),
        (state, {"lr": 1}), (state, {"lr": 2}), (state, {"lr": 1}, {}))]
    assert len(set(prints)) == len(prints)
    # and not with the order of names or with how a tensor lies in memory
    weight = torch.arange(6.).view(2, 3)
    assert checkpoint.fingerprint(
        {"x": weight, "y": torch.ones(4)}, {"p": 1, "q": 2}) == checkpoint.fingerprint(
        {"y": torch.ones(1).expand(4), "x": weight.t().contiguous().t()}, {"q": 2, "p": 1})


def test_changed_settings_are_refused_with_every_difference_shown():
    checkpoint.check_same({"lr": 0.1, "seed": 0}, {"seed": 0, "lr": 0.1}, "the configuration")
    refused(checkpoint.check_same, {"lr": 0.1, "seed": 0, "old": 1},
            {"lr": 0.2, "seed": 0, "new": [2]}, "the configuration",
            names=["the configuration changed (lr: 0.1 -> 0.2, old: 1 -> absent, "
                   "new: absent -> [2])", "--run"])


# ------------------------------------------------------------------------------------------------
# JSON

def test_a_log_is_trimmed_to_the_rows_that_are_kept_and_loses_its_torn_line(tmp_path):
    log = tmp_path / "log.jsonl"
    checkpoint.trim_jsonl(log, lambda row: True)  # no log yet
    for step in range(4):
        checkpoint.append_jsonl(log, {"step": step})
    with open(log, "a") as file:
        file.write('{"step": 4, "lo')
    checkpoint.trim_jsonl(log, lambda row: row["step"] < 3)
    checkpoint.append_jsonl(log, {"step": 3, "again": True})
    assert log.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    assert names(tmp_path) == ["log.jsonl"]
    before = log.stat()
    checkpoint.trim_jsonl(log, lambda row: True)
    assert log.stat().st_ino == before.st_ino, "nothing to trim, so nothing is written"


@pytest.mark.parametrize("text, kept", [
    ('{"step": 0}\n{"step": 1}', '{"step": 0}\n{"step": 1}\n'),  # only its end was lost
    ('{"step": 0}\n{"st\n{"step": 2}\n', None)])
def test_a_log_damaged_in_the_middle_is_refused_with_the_line(tmp_path, text, kept):
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    if kept is None:
        refused(checkpoint.trim_jsonl, log, lambda row: True, names=["log.jsonl line 2"])
    else:
        checkpoint.trim_jsonl(log, lambda row: True)
    assert log.read_text() == (kept or text)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "config.json"
    checkpoint.write_json(file, {"a": [1, 2]})
    with pytest.raises(TypeError):
        checkpoint.write_json(file, {"a": object()})
    assert checkpoint.read_json(file) == {"a": [1, 2]}
    assert names(tmp_path) == ["config.json"]
    refused(checkpoint.append_jsonl, tmp_path / "absent" / "log.jsonl", {}, names=["cannot write"])
