"""Promises of bench.py and timing.py: both sides are measured in turn, targets are compared the
right way round, waiting is told from working."""
import json
import time
from argparse import Namespace

import pytest
import torch

from experiments import bench
from experiments.bench_rows import waiting
from experiments.timing import Bench, Operations, flops_of, in_child
from helpers import program, refused


def small(**changes) -> Bench:
    return Bench(Namespace(**{"repeats": 3, "device": "cpu", "threads": 0, **changes}))


def test_ways_are_measured_in_turn_after_one_round_and_the_median_counts():
    order, pauses = [], iter([0.2, 0.01, 0.2, 0.01])  # the first is the warm-up

    def slow():
        order.append("a")
        time.sleep(next(pauses))
    a, b = small().seconds(slow, lambda: order.append("b"))
    assert order == ["a", "b"] * 4 and 0.01 <= a < 0.15 and b < 0.005


@pytest.mark.parametrize("value, target, least, met", [
    (12, 12, True, True), (11.9, 12, True, False), (0.6, 0.6, False, True),
    (0.61, 0.6, False, False), (5, None, True, None)])
def test_a_row_says_whether_its_target_is_met(value, target, least, met, capsys):
    measured = small()
    measured.row("speed", value, "x", target, least)
    assert measured.rows[0]["met"] is met
    assert set(measured.rows[0]) >= {"name", "value", "unit", "target", "met"}
    assert ("NOT MET" in capsys.readouterr().out) == (met is False)


@pytest.mark.parametrize("value, floor, least, target, met", [
    (10.9, 10, False, "<= 11", True), (11.1, 10, False, "<= 11", False),
    (10.1, 11, True, ">= 10", True), (9.9, 11, True, ">= 10", False)])
def test_without_a_target_a_row_has_to_be_a_tenth_from_its_floor(value, floor, least, target, met):
    measured = small()
    measured.row("speed", value, "x", least=least, floor=floor)
    row, = measured.rows
    assert (row["floor"], row["target"], row["met"]) == (floor, target, met)


def test_operations_are_counted_with_attention_and_gradients():
    q, k, v = torch.randn(3, 2, 4, 6, 8, requires_grad=True)  # (B, heads, T, D/heads) each
    weight = torch.randn(8, 16, requires_grad=True)
    product, attention = 2 * 2 * 4 * 6 * 8 * 16, 2 * 2 * 2 * 4 * 6 * 6 * 8

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) @ weight
    measured = small()
    measured.seconds(forward, lambda: forward().sum().backward())
    # Backward: two products for one; for attention's two five, since it computes one anew.
    assert measured.flops == [product + attention, 3 * product + attention * 7 / 2]
    assert flops_of(forward) == measured.flops[0]


def test_a_view_is_no_kernel():
    x = torch.randn(4, 6)
    with Operations() as done:
        (x.T[1:].reshape(2, 10).transpose(0, 1).unbind()[0] + 1).exp_()
    names = {operation.overloadpacket.__name__ for operation in done.calls}
    assert {"slice", "transpose", "unbind"} <= names
    assert done.kernels == 3, "one copy by reshape, the sum, and exp in place"


def test_waiting_is_the_share_of_time_outside_the_step():
    def stream():
        while True:
            time.sleep(0.02)
            yield None
    share, seconds = waiting(stream(), lambda batch: time.sleep(0.02), 10)
    assert 0.3 < share < 0.7 and 0.035 < seconds < 0.2


def test_waiting_does_not_count_the_first_three_batches():
    def stream():
        for number in range(13):
            time.sleep(0.2 if number < 3 else 0.001)
            yield None
    share, _ = waiting(stream(), lambda batch: time.sleep(0.02), 10)
    assert share < 0.4


def test_a_row_by_itself_writes_json_with_device_command_and_result(tmp_path, monkeypatch):
    def sleeping(measured):
        measured.row("a short sleep", *measured.seconds(lambda: time.sleep(0.01)), "s", 5)
    monkeypatch.setattr(bench, "ROWS", {**bench.ROWS, "sleep": (sleeping, "nothing at all")})
    path, flags = tmp_path / "b.json", ["--rows", "sleep", "--repeats", "1", "--threads", "1"]
    bench.main([*flags, "--device", "cpu", "--json", str(path)])
    written = json.loads(path.read_text())
    (row,) = written["rows"]
    assert row["name"] == "a short sleep" and 0.01 <= row["value"] < 1 and row["met"] is False
    assert "1 threads" in written["device"] and written["torch"] == torch.__version__
    assert "python -m experiments.bench --rows sleep" in written["command"]


def test_an_unknown_row_gets_one_line():
    done = program("-m", "experiments.bench", "--rows", "speed")
    assert done.returncode == 2
    assert "query_block" in done.stderr and done.stderr.count("\n") == 1


def test_help_names_every_row_and_every_row_can_be_called(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--help"])
    said = capsys.readouterr().out
    for name, (measure, text) in bench.ROWS.items():
        assert callable(measure) and f"{name}: {text.split()[0]}" in " ".join(said.split())


def test_a_child_that_fails_is_one_line_with_its_last_words():
    refused(in_child, small(), "experiments.bench", "nothing", names=["nothing failed", "joint"])
