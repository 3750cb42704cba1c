"""Promises of checkpoint.py about what goes into a checkpoint and lies beside it."""
import pytest
import torch
from helpers import names, same_content
from torch import nn

from plumbing import checkpoint
from plumbing.flags import UserError

# ------------------------------------------------------------------------------------------------
# states

def test_a_strict_load_names_the_keys_and_changes_nothing():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    del state["1.bias"]
    state["2.bias"] = torch.zeros(1)
    state["0.weight"] = torch.zeros(5, 2)
    with pytest.raises(UserError) as error:
        checkpoint.load_strict(module, state, "tokenizer.pt, model")
    assert str(error.value) == (
        "tokenizer.pt, model does not fit this configuration (missing: 1.bias; unexpected: 2.bias; "
        "wrong shape: 0.weight (5, 2), not (3, 2)); use the settings it was trained with")
    assert same_content(dict(module.state_dict()), before)


def test_a_strict_load_counts_what_it_does_not_name():
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(UserError, match=r"missing: 0.weight, 0.bias, 1.weight and 5 more\)"):
        checkpoint.load_strict(module, {}, "x")


def test_a_strict_load_of_fitting_weights_loads_them():
    a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    checkpoint.load_strict(b, dict(a.state_dict()), "x")
    assert same_content(dict(a.state_dict()), dict(b.state_dict()))


def test_random_numbers_go_on_where_the_state_was_saved(tmp_path):
    torch.rand(3)
    checkpoint.save(tmp_path / "x.pt", {"random": checkpoint.random_state()})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = torch.rand(5), torch.randn(5, device=device)
    checkpoint.set_random_state(checkpoint.load(tmp_path / "x.pt")["random"])
    assert same_content(first, (torch.rand(5), torch.randn(5, device=device)))


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
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


def test_a_fingerprint_depends_on_values_and_not_on_order_or_memory():
    weight = torch.arange(6.).view(2, 3)
    a = checkpoint.fingerprint({"x": weight, "y": torch.ones(4)}, {"p": 1, "q": 2})
    other = {"y": torch.ones(1).expand(4), "x": weight.t().contiguous().t()}
    b = checkpoint.fingerprint(other, {"q": 2, "p": 1})
    assert a == b


def test_changed_settings_are_refused_with_every_difference_shown():
    checkpoint.check_same({"lr": 0.1, "seed": 0}, {"seed": 0, "lr": 0.1}, "the configuration")
    with pytest.raises(UserError) as error:
        checkpoint.check_same({"lr": 0.1, "seed": 0, "old": 1}, {"lr": 0.2, "seed": 0, "new": [2]},
                              "the configuration")
    assert str(error.value) == ("the configuration changed "
                                "(lr: 0.1 -> 0.2, old: 1 -> absent, new: absent -> [2]); "
                                "use another --run folder, or the old values")


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


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"step": 1}')
    checkpoint.trim_jsonl(log, lambda row: True)
    assert log.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_log_that_needs_no_trimming_is_not_written_again(tmp_path):
    log = tmp_path / "log.jsonl"
    checkpoint.append_jsonl(log, {"step": 0})
    before = log.stat()
    checkpoint.trim_jsonl(log, lambda row: True)
    assert (log.stat().st_ino, log.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_log_damaged_in_the_middle_is_refused_with_the_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="log.jsonl line 2 is not JSON"):
        checkpoint.trim_jsonl(log, lambda row: True)
    assert log.read_text() == '{"step": 0}\n{"st\n{"step": 2}\n'


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "config.json"
    checkpoint.write_json(file, {"a": [1, 2]})
    with pytest.raises(TypeError):
        checkpoint.write_json(file, {"a": object()})
    assert file.read_text() == '{\n  "a": [\n    1,\n    2\n  ]\n}\n'
    assert names(tmp_path) == ["config.json"]
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.append_jsonl(tmp_path / "absent" / "log.jsonl", {})
