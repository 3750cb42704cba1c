"""Promises of bench.py: both sides are measured in turn, targets are compared the right way round, waiting is told from working."""
import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from experiments import bench
from experiments.bench import Bench, waiting

ROOT = Path(__file__).parent.parent


def small(**changes) -> Bench:
    return Bench(Namespace(**{"repeats": 3, "device": "cpu", "threads": 0, **changes}))


def test_ways_are_measured_in_turn_after_one_round_and_the_median_counts():
    order, pauses = [], iter([0.2, 0.01, 0.2, 0.01])  # the first is the warm-up

    def slow():
        order.append("a")
        time.sleep(next(pauses))
    a, b = small().seconds(slow, lambda: order.append("b"))
    assert order == ["a", "b"] * 4 and 0.01 <= a < 0.15 and b < 0.005


@pytest.mark.parametrize("value, target, least, met", [(12, 12, True, True), (11.9, 12, True, False), (0.6, 0.6, False, True), (0.61, 0.6, False, False), (5, None, True, None)])
def test_a_row_says_whether_its_target_is_met(value, target, least, met, capsys):
    found = small()
    found.row("speed", value, "x", target, least)
    assert found.rows[0]["met"] is met and set(found.rows[0]) >= {"name", "value", "unit", "target", "met"}
    assert ("NOT MET" in capsys.readouterr().out) == (met is False)


def test_waiting_is_the_share_of_time_outside_the_step():
    def stream():
        while True:
            time.sleep(0.02)
            yield None
    share, seconds = waiting(stream(), lambda batch: time.sleep(0.02), 10)
    assert 0.3 < share < 0.7 and 0.035 < seconds < 0.2


def test_a_row_by_itself_writes_json_with_device_command_and_result(tmp_path):
    done = subprocess.run([sys.executable, "-m", "experiments.bench", "--rows", "help", "--repeats", "1", "--threads", "1", "--json", str(tmp_path / "b.json")],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["rows"][0]["name"] == "python sample.py --help" and "1 threads" in found["device"] and found["torch"] == torch.__version__
    assert "--rows help" in found["command"] and found["rows"][0]["met"] in (True, False)


def test_an_unknown_row_gets_one_line():
    done = subprocess.run([sys.executable, "-m", "experiments.bench", "--rows", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "query_block" in done.stderr and done.stderr.count("\n") == 1


def test_every_row_that_is_listed_exists():
    assert all(callable(getattr(bench, name)) for name in bench.ROWS)
