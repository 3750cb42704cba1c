"""Promises of bench.py: every row runs, ways are measured in turn, targets are compared the right
way round."""
import json
import re
import time

import pytest
import torch

from experiments import bench
from experiments.bench import Bench, flops_of
from helpers import program, refused


def test_ways_are_measured_in_turn_after_one_round_and_the_median_counts():
    order, pauses = [], iter([0.2, 0.01, 0.2, 0.01])  # the first is the warm-up

    def slow():
        order.append("a")
        time.sleep(next(pauses))
    a, b = Bench().seconds(slow, lambda: order.append("b"))
    assert order == ["a", "b"] * 4 and 0.01 <= a < 0.15 and b < 0.005


@pytest.mark.parametrize("value, target, least, met", [
    (12, 12, True, True), (11.9, 12, True, False), (0.6, 0.6, False, True),
    (0.61, 0.6, False, False), (5, None, True, None)])
def test_a_row_says_whether_its_target_is_met(value, target, least, met, capsys):
    measured = Bench()
    measured.row("speed", value, "x", target, least)
    assert measured.rows[0]["met"] is met
    assert set(measured.rows[0]) >= {"name", "value", "unit", "target", "met"}
    assert ("NOT MET" in capsys.readouterr().out) == (met is False)


def test_the_target_of_a_time_is_so_many_times_what_its_operations_take_at_the_peak():
    measured = Bench()
    measured.peaks[torch.float32] = 1e3
    weight = torch.randn(10, 5)
    measured.seconds(lambda: torch.randn(3, 10) @ weight)
    measured.against_peak("a product", 0.7, 2)
    row, = measured.rows
    assert row["floor"] == 0.3 and row["target"] == "<= 0.6" and row["met"] is False


def test_operations_are_counted_with_those_of_the_gradient():
    weight, x = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8)
    product = 2 * 2 * 4 * 8
    assert flops_of(lambda: x @ weight.T) == product
    assert flops_of(lambda: (x @ weight.T).sum().backward()) == 2 * product


def test_every_row_runs_and_is_written_with_its_origin(tmp_path, monkeypatch, capsys):
    """Those of a GPU too, without the recordings. Programs are started by a server, which has
    imported torch already."""
    def start(*words):
        done = program(*words)
        assert done.returncode == 0, done.stderr
    monkeypatch.setattr(bench, "start", start)
    path = tmp_path / "b.json"
    bench.main(["--quick", "--repeats", "1", "--device", "cpu", "--json", str(path), "--rows",
                *bench.ROWS])
    written, said = json.loads(path.read_text()), capsys.readouterr().out
    assert written["torch"] == torch.__version__ and written["commit"] and written["device"]
    assert written["command"].startswith("python -m experiments.bench --quick")
    rows = written["rows"]
    assert all(row["value"] > 0 and row["name"] in said for row in rows if row["unit"] != "%")
    assert f"{len(rows)} rows in" in said
    names = " ".join(row["name"] for row in rows)
    for words in ("of cifar", "of imagenet-128", "Muon", "encoding", "first sample", "AR", "bf16",
                  "MaskGIT", "block", "loop", "base, eager", "finetune, eager", "samples of ar"):
        assert words in names, words
    assert len(re.findall("batch 1|batch 2", names)) == 5, "one sample and several"
    assert bench.table(rows).count("\n") == 1 + len(rows)


@pytest.mark.parametrize("wrong, says", [
    (("--rows", "speed"), ("speed", "encode")), (("--json", "none/x.json"), ("none/x.json",)),
    (("--json", "."), ("--json .",))])
def test_wrong_use_gets_one_line_before_anything_is_measured(wrong, says):
    refused(bench.parse, wrong, names=says)


def test_help_names_every_row(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, (_, text) in bench.ROWS.items():
        assert f"{name}: {text.split()[0]}" in said


def test_a_program_that_fails_is_one_line_with_its_last_words():
    refused(bench.start, "-c", "import sys; sys.exit('no such thing')", names=["no such thing"])
