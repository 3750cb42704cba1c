"""experiments/record.py: records say where they come from."""
import json
import shutil
from pathlib import Path

import pytest

from helpers import program



def call(name: str, *flags):
    return program("-m", f"experiments.{name}", *flags)


@pytest.mark.parametrize("file, wrong, says", [
    ("record", ("--run", "nowhere", "--by", "me", "--out", "x.json"), "nowhere"),
])
def test_wrong_use_gets_one_line(file, wrong, says):
    done = call(file, *wrong)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ------------------------------------------------------------------------------------------------
# record.py

def test_a_record_holds_the_last_words_of_each_phase_and_their_origin(small_run, tmp_path):
    path, run = tmp_path / "record.json", tmp_path / "run"
    shutil.copytree(small_run, run)
    (run / "explain").mkdir()
    (run / "explain" / "answers.json").write_text('{"images": 250}')
    done = call("record", "--run", run, "--by", "make something", "--out", path)
    assert done.returncode == 0, done.stderr
    made = json.loads(path.read_text())
    assert made["command"] == "make something" and made["intervention"] == {"images": 250}
    assert {"commit", "seed", "device", "torch", "settings"} <= set(made)
    assert made["settings"]["preset"] == "tiny" and made["settings"]["base_steps"] == 6
    assert not any(str(value).startswith("/") for value in made["settings"].values())
    lines = (Path(small_run) / "log.jsonl").read_text().splitlines()
    logged = [row for row in map(json.loads, lines) if "seconds" in row]
    recorded = [(row["phase"], row["steps"], row.get("psnr")) for row in made["phases"]]
    assert recorded == [(row["phase"], row["step"], row.get("psnr")) for row in logged] != []
    assert all(row["loss_by_tenth"] for row in made["phases"])
