"""What a run came to, as one small file to keep: the README's numbers are held against these by tests/test_numbers.py.

Run      python -m experiments.record --run runs/demo --by "make demo" --out experiments/results/demo.json
Takes    RUN/config.json; of RUN/log.jsonl each phase's last words; RUN/summary.json, if eval_fid.py has been there
Makes    a JSON with command, commit, seed, device and the numbers. The commit is the one that is checked out now, so record
         a run before the next change.
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import json
from pathlib import Path

import config
from config import CONFIGS
from experiments.order_table import costs
from plumbing import checkpoint
from plumbing.flags import Parser, build, read_run
from plumbing.processes import Processes, provenance


def phases(folder: str) -> list[dict]:
    """log.jsonl of a run -> one row per finished phase: quality on held-out images, seconds, loss over its tenths."""
    values = read_run(folder)
    preset = values.pop("preset")
    cost = costs(folder, build(CONFIGS, {**config.PRESETS[preset], **values})[2])
    rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{"steps": row.pop("step"), **row, "loss_by_tenth": cost[row["phase"]]["loss_by_tenth"]} for row in rows if "seconds" in row]


def main() -> None:
    parser = Parser(prog="record.py", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a run of train.py")
    parser.add_argument("--by", required=True, metavar="COMMAND", help="what was typed to make it")
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON to write")
    args = parser.parse_args()
    values, summary = read_run(args.run), Path(args.run, "summary.json")
    made = {**provenance(args.by, Processes("auto").device), "seed": values["seed"], "settings": values, "phases": phases(args.run)}
    if summary.exists():
        made["evaluation"] = checkpoint.read_json(summary)
    checkpoint.write_json(args.out, made)
    print(f"{args.out}: {', '.join(row['phase'] for row in made['phases'])}" + (", evaluation" if summary.exists() else ""))


if __name__ == "__main__":
    main_with_user_errors(main)
