"""Promises of checkpoint.py about what goes into a checkpoint and lies beside it."""
import pytest
import torch
from helpers import names, refused, same_content
from torch import nn

from plumbing import checkpoint

# ------------------------------------------------------------------------------------------------
# states

def test_a_strict_load_names_the_keys_and_changes_nothing():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    checkpoint.load_strict(module, state, "x")
    assert same_content(dict(module.state_dict()), state)
    checkpoint.load_strict(module, before, "x")
    del state["1.bias"]
    state["2.bias"] = torch.zeros(1)
    state["0.weight"] = torch.zeros(5, 2)
    refused(checkpoint.load_strict, module, state, "tokenizer.pt, model",
            names=["tokenizer.pt, model does not fit", "missing: 1.bias", "unexpected: 2.bias",
                   "wrong shape: 0.weight (5, 2), not (3, 2)"])
    assert same_content(dict(module.state_dict()), before)
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    refused(checkpoint.load_strict, many, {}, "x",
            names=["missing: 0.weight, 0.bias, 1.weight and 5 more)"])


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
