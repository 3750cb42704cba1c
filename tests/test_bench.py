"""Promises of bench.py: every row runs, ways are measured in turn, targets are compared the right
way round."""
import json
import re
import time

import pytest
import torch

import config
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


def test_a_row_says_whether_its_target_is_met(capsys):
    measured = Bench()
    for value, target, least, met in ((12, 12, True, True), (11.9, 12, True, False),
                                      (0.6, 0.6, False, True), (0.61, 0.6, False, False),
                                      (5, None, True, None)):
        measured.row("speed", value, "x", target, least)
        assert measured.rows[-1]["met"] is met, (value, target, least)
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


def test_views_cost_nothing_and_all_else_is_an_operation_of_its_own():
    x = torch.randn(4, 8, requires_grad=True)
    with bench.Operations() as counted:
        made = torch.empty(2, 8), (x.T.unflatten(0, (2, 4))[1] @ x[:, :3]).detach()
    assert len(made) == 2 and (counted.count, counted.products) == (1, 1)
    with bench.Operations() as counted:
        (2 * x).sum().backward()  # 2 x, its sum; a one, its copies times 2
    assert (counted.count, counted.products) == (4, 0)


def test_the_operations_of_a_joint_step_are_so_many_for_each_token():
    counts = {}
    for schedule in ((5,), (6,), (32, 64, 128)):
        forward, backward = bench.operations_of_a_step(*schedule)
        counts[schedule] = forward.count, backward.count
    each = tuple(b - a for a, b in zip(counts[5,], counts[6,]))
    assert each == (52, 15) and counts[32, 64, 128] == (7155, 2680), (each, counts)
    assert sum(counts[32, 64, 128]) <= 10000


def read(*words: str) -> None:
    """In place of starting it: are the flags of this training read?"""
    if words[0] == "train.py":
        assert config.parse_run("", words[1:])


def run(*words: str) -> None:
    """As bench.start, but by a server that has imported torch already."""
    done = program(*words)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("start", (read, pytest.param(run, marks=pytest.mark.faults)))
def test_every_row_runs_and_is_written_with_its_origin(start, tmp_path, monkeypatch, capsys):
    """Those of a GPU too, without the recordings."""
    monkeypatch.setattr(bench, "start", start)
    if start is read:
        monkeypatch.setattr(bench, "halves", lambda measured: (0.2, 0.1))
    path = tmp_path / "b.json"
    bench.main(["--quick", "--device", "cpu", "--json", str(path), "--rows", *bench.ROWS])
    written, said = json.loads(path.read_text()), capsys.readouterr().out
    assert written["torch"] == torch.__version__ and written["commit"] and written["device"]
    assert written["command"].startswith("python -m experiments.bench --quick")
    rows = written["rows"]
    assert all(set(row) >= {"name", "value", "unit", "target", "met"} for row in rows)
    assert all(row["value"] > 0 and row["name"] in said for row in rows if row["unit"] != "%")
    assert f"{len(rows)} rows in" in said
    names = " ".join(row["name"] for row in rows)
    for words in ("of cifar", "of imagenet-128", "Muon", "encoding", "first sample", "AR", "bf16",
                  "MaskGIT", "block", "loop", "operations", "two processes",
                  "base, eager", "finetune, eager", "samples of ar"):
        assert words in names, words
    assert len(re.findall("batch 1|batch 2", names)) == 5, "one sample and several"
    assert bench.table(rows).count("\n") == 1 + len(rows)


def test_an_unknown_row_and_a_program_that_fails_are_one_line():
    refused(bench.parse, ("--rows", "speed"), names=("speed", "encode"))
    refused(bench.start, "-c", "import sys; sys.exit('no such thing')", names=["no such thing"])
