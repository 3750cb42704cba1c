"""experiments/record.py: records say where they come from."""
import json
import shutil

from helpers import program, rows


def test_a_record_holds_the_last_words_of_each_phase_and_their_origin(small_run, tmp_path):
    path, run = tmp_path / "record.json", shutil.copytree(small_run, tmp_path / "run")
    (run / "explain").mkdir()
    (run / "explain" / "answers.json").write_text('{"images": 250}')
    done = program("-m", "experiments.record", "--run", run, "--by", "make something", "--out",
                   path)
    assert done.returncode == 0, done.stderr
    made = json.loads(path.read_text())
    assert made["command"] == "make something" and made["intervention"] == {"images": 250}
    assert {"commit", "seed", "device", "torch", "settings"} <= set(made)
    assert made["settings"]["preset"] == "tiny" and made["settings"]["base_steps"] == 6
    assert not any(str(value).startswith("/") for value in made["settings"].values())
    logged = [row for row in rows(small_run) if "seconds" in row]
    recorded = [(row["phase"], row["steps"], row.get("psnr")) for row in made["phases"]]
    assert recorded == [(row["phase"], row["step"], row.get("psnr")) for row in logged] != []
    assert all(row["loss_by_tenth"] for row in made["phases"])
