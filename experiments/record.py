"""What a run came to, as one small file to keep.

The pages' numbers are held against such files by tests/test_numbers.py. The commit in it is the one
that is checked out now, so record a run before the next change.

In       a finished run of train.py or d2it.train: its settings, each phase's last row of
         RUN/log.jsonl; RUN/summary.json, if eval_fid.py has been there, RUN/explain/answers.json of
         explain.py, and RUN/samples.json of d2it.sample
Run      python -m experiments.record --run runs/demo --by "make demo" --out demo.json
Makes    a JSON with command, commit, seed, device and the numbers
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import os
from pathlib import Path

from config import CONFIGS
from d2it import presets as d2it
from experiments.order_table import costs
from plumbing import checkpoint
from plumbing.flags import Parser, as_dict, read_log, read_run
from plumbing.outputs import JSON, need_places
from plumbing.processes import Processes, need_one_process, provenance
from plumbing.run import PLACES, OpenRun, open_run

CONTENTS = {"evaluation": "summary.json", "intervention": "explain/answers.json",
            "samples": "samples.json"}


def open_either(folder: str) -> OpenRun:
    """A run of either system."""
    if read_run(folder)["preset"] in d2it.PRESETS:
        return open_run(folder, d2it.CONFIGS, "dvae.pt", "-m d2it.train")
    return open_run(folder, CONFIGS)


def settings(run: OpenRun) -> dict:
    """All settings of a run; where its images lie, as seen from here and not from the root."""
    values = {"preset": read_run(run.folder)["preset"], **as_dict(*run.configs)}
    for name in PLACES:
        if os.path.isabs(values[name]):
            values[name] = os.path.relpath(values[name])
    return values


def phases(run: OpenRun) -> list[dict]:
    """One row per finished phase: quality on held-out images, seconds, loss over its tenths."""
    train_config = run.configs[-1]
    cost, rows = costs(run.folder, train_config), []
    for row in read_log(run.folder):
        if "seconds" in row:
            steps = row.pop("step")
            by_tenth = cost[row["phase"]]["loss_by_tenth"]
            rows.append({"steps": steps, **row, "loss_by_tenth": by_tenth})
    return rows


def main() -> None:
    parser = Parser(prog="python -m experiments.record", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a run of train.py or d2it.train")
    parser.add_argument("--by", required=True, metavar="COMMAND", help="what was typed to make it")
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON to write")
    args = parser.parse_args()
    need_one_process("experiments.record")
    need_places({"--out": (args.out, JSON)}, reads={
        "what is recorded": [os.path.join(args.run, name) for name in CONTENTS.values()]})
    run = open_either(args.run)
    values = settings(run)
    record = {**provenance(args.by, Processes("auto").device), "seed": values["seed"],
              "settings": values, "phases": phases(run)}
    contents = [row["phase"] for row in record["phases"]]
    for name, file in CONTENTS.items():
        if Path(args.run, file).exists():
            record[name] = checkpoint.read_json(Path(args.run, file))
            contents.append(name)
    checkpoint.write_json(args.out, record)
    print(f"{args.out}: {', '.join(contents)}")


if __name__ == "__main__":
    main_with_user_errors(main)
