"""What order.py has measured, as tables for people and for programs, and as a figure.

In       OUT/ARM-SEED.json, one per arm and seed, and OUT/pca.json when it is there
Makes    OUT/table.md     a summary, then a table for each kind of number, one row per arm,
                          mean ± standard deviation over seeds
         OUT/table.csv    the same numbers, one line per arm and seed
         OUT/order.png    bits by position; samples against reconstruction; reconstruction against
                          bits (with matplotlib)
Run      python -m experiments.order --table --out OUT
"""
import csv
import io
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from generator import GENERATORS
from nativetok import doubling
from plumbing import checkpoint
from plumbing.flags import need

# ------------------------------------------------------------------------------------------------
# from result files to numbers

def read_log(folder: str) -> list[dict]:
    """The rows of a run's log.jsonl."""
    text = Path(folder, "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def costs(folder: str, train_config) -> dict:
    """log.jsonl of a run -> {phase: steps, seconds, peak_mb, loss_by_tenth: has it flattened?}.

    Seconds follow from the logged rates, since the clock of a resumed phase starts anew; loss is
    that of the pixels or ids.
    """
    phases = {}
    for row in read_log(folder):
        phases.setdefault(row["phase"], []).append(row)
    result = {}
    for phase, rows in phases.items():
        size = train_config.batch_size
        if phase in GENERATORS:
            size = train_config.generator_batch_size
        step, seconds, losses = 0, 0.0, []
        for row in rows:
            if "per_second" in row:
                seconds += size * (row["step"] - step) / row["per_second"]
                step = row["step"]
                losses.append(row.get("pixels", row.get("loss")))
        tenths = [part for part in np.array_split(losses, 10) if len(part)]
        result[phase] = {"steps": step, "seconds": round(seconds, 3),
                         "peak_mb": max(row.get("peak_mb", 0) for row in rows),
                         "loss_by_tenth": [round(float(part.mean()), 5) for part in tenths]}
    return result


def fd_key(row: dict) -> str:
    """The name of the Fréchet distance in a row: it holds the judge's fingerprint."""
    (key,) = (key for key in row if key.startswith("fd_tinycnn_"))
    return key


def read_results(out: str, arms: Iterable[str]) -> dict[str, list[dict]]:
    """{arm: its results, by seed}, in the order of arms.

    Raises UserError for none, or when they had different judges.
    """
    results = {}
    for arm in arms:
        paths = sorted(Path(out).glob(f"{arm}-[0-9]*.json"))
        if paths:
            results[arm] = [checkpoint.read_json(path) for path in paths]
    need(results, f"{out} holds no results yet; leave --table out, or give --out")
    judges = {fd_key(result) for of_arm in results.values() for result in of_arm}
    need(len(judges) == 1, f"{out}: distances of different judges ({', '.join(sorted(judges))}) "
                           "cannot be compared; delete the older results")
    return results


def columns(result: dict) -> dict[str, dict[str, float]]:
    """One result -> {table: {column: number}}. Guidance 1 is none; "best" is best of the sweep."""
    fd = fd_key(result)

    def best_of(rows: list[dict]) -> dict:
        return min(rows, key=lambda row: row[fd])

    ar = [row for row in result["samples"] if row["name"] == "ar"]
    maskgit = {steps: [] for steps in doubling(len(result["order"]))}
    for row in result["samples"]:
        if row["name"] == "maskgit":
            maskgit[row["steps"]].append(row)
    plain = {steps: row for steps, rows in maskgit.items() for row in rows if row["cfg_scale"] == 1}
    best = {steps: best_of(rows) for steps, rows in maskgit.items()}
    best_ar, best_maskgit = best_of(ar), best[max(steps for steps in maskgit if steps <= 8)]
    training = {phase: cost for phase, cost in result["costs"].items() if phase not in GENERATORS}
    ar_bits, marginal_bits = result["ar_bits_total"], result["marginal_bits_total"]
    return {
        "Reconstruction and bits": {
            "encoder, M": result["encoder_parameters"] / 1e6,
            "PSNR": result["psnr"],
            "FD": result[fd],
            "codes used": result["codebook_used"],
            "perplexity": statistics.mean(result["perplexity"]),
            "marginal bits": marginal_bits,
            "AR bits": ar_bits,
            "bits explained": 1 - ar_bits / max(marginal_bits, 1e-9)},
        "Samples": {
            "real FD": result["real"][fd],
            "AR FD": ar[0][fd],
            "AR accuracy": ar[0]["class_accuracy"],
            "AR best FD": best_ar[fd],
            "AR best accuracy": best_ar["class_accuracy"],
            "AR best guidance": best_ar["cfg_scale"],
            "MaskGIT best FD": best_maskgit[fd],
            "MaskGIT best accuracy": best_maskgit["class_accuracy"],
            "MaskGIT best guidance": best_maskgit["cfg_scale"]},
        "FD of MaskGIT samples by steps": {
            **{f"{steps} steps": row[fd] for steps, row in plain.items()},
            **{f"{steps} steps, best": row[fd] for steps, row in best.items()}},
        "PSNR of the first k tokens": {
            f"{k} tokens": psnr for k, psnr in result["prefix_psnr"].items()},
        "Cost of training": {
            "tokenizer s": sum(cost["seconds"] for cost in training.values()),
            "AR s": result["costs"]["ar"]["seconds"],
            "MaskGIT s": result["costs"]["maskgit"]["seconds"],
            **{f"{phase} ms a step": 1000 * cost["seconds"] / cost["steps"]
               for phase, cost in training.items()},
            **{f"{phase} peak MB": cost["peak_mb"]
               for phase, cost in training.items() if cost["peak_mb"]}},
    }


# ------------------------------------------------------------------------------------------------
# tables

def cell(values: list[float], digits: str = ".4g") -> str:
    """Their mean, and with several of them ± their standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{spread}"


def line_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def summary(results: dict[str, list[dict]]) -> list[str]:
    """The lines of the one table that the pages show: what the question turns on."""
    half = f"{len(next(iter(results.values()))[0]['order']) // 2} tokens"
    shown = (  # head, table and column of columns(), digits
        ("PSNR, dB", "Reconstruction and bits", "PSNR", ".2f"),
        ("FD, rebuilt", "Reconstruction and bits", "FD", ".1f"),
        ("marginal bits", "Reconstruction and bits", "marginal bits", ".1f"),
        ("AR bits", "Reconstruction and bits", "AR bits", ".1f"),
        ("AR: FD", "Samples", "AR best FD", ".1f"),
        ("class seen", "Samples", "AR best accuracy", ".3f"),
        ("MaskGIT: FD", "Samples", "MaskGIT best FD", ".1f"),
        ("class seen", "Samples", "MaskGIT best accuracy", ".3f"),
        (f"PSNR of {half}", "PSNR of the first k tokens", half, ".2f"))
    lines = [line_of(["arm", "seeds", *(head for head, *_ in shown)]),
             "|---" * (2 + len(shown)) + "|"]
    for arm, of_arm in results.items():
        tables = [columns(result) for result in of_arm]
        cells = [cell([table[title][name] for table in tables], digits)
                 for _, title, name, digits in shown]
        lines.append(line_of([arm, str(len(of_arm)), *cells]))
    return lines


def write_tables(results: dict[str, list[dict]], out: str) -> str:
    """table.md, one table after the other, one row per arm; -> its text. And table.csv."""
    tables_of = {arm: [columns(result) for result in of_arm] for arm, of_arm in results.items()}
    lines = ["## Summary", "", *summary(results), ""]
    for title in next(iter(tables_of.values()))[0]:
        heads = dict.fromkeys(name for tables in tables_of.values() for name in tables[0][title])
        lines += [f"## {title}", "", line_of(["arm", *heads]), "|---" * (1 + len(heads)) + "|"]
        for arm, tables in tables_of.items():
            # an arm may lack a column, as joint training has no growth phases
            cells = [cell([table[title][name] for table in tables if name in table[title]])
                     for name in heads]
            lines.append(line_of([arm, *cells]))
        lines.append("")
    first = next(iter(results.values()))[0]
    seeds = ", ".join(f"{arm}: {len(of_arm)}" for arm, of_arm in results.items())
    lines.append(f"Mean ± standard deviation over seeds ({seeds}). FD is {fd_key(first)}, not FID, "
                 f"of {first['real']['n']} samples, and of all {first['reconstruction']['n']} "
                 f"reconstructions, against held-out images. {first['device']}: "
                 f"{first['command']}")
    with checkpoint.replacing(os.path.join(out, "table.md")) as file:
        file.write(("\n".join(lines) + "\n").encode())
    write_csv(results, out)
    return "\n".join(lines)


def write_csv(results: dict[str, list[dict]], out: str) -> None:
    """table.csv: a line for each arm and seed; a column is named "table: column"."""
    lines = []
    for arm, of_arm in results.items():
        for result in of_arm:
            line = {"arm": arm, "seed": result["seed"]}
            for title, row in columns(result).items():
                line |= {f"{title}: {name}": value for name, value in row.items()}
            lines.append(line)
    with checkpoint.replacing(os.path.join(out, "table.csv")) as file:
        file.write(csv_text(lines).encode())


def csv_text(lines: list[dict]) -> str:
    """Dictionaries as lines of a CSV; a column for each name that any of them has."""
    heads = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


# ------------------------------------------------------------------------------------------------
# a figure

def scatter(axis, x: list[float], y: list[float], colour, marker: str, label: str) -> None:
    """Each seed small, their mean large."""
    axis.scatter(x, y, s=12, color=colour, alpha=0.5, marker=marker)
    axis.scatter(np.mean(x), np.mean(y), s=60, color=colour, marker=marker, label=label)


def draw_figure(results: dict[str, list[dict]], out: str) -> None:
    """order.png: bits by position; sample quality against reconstruction; that against bits."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figure: it takes matplotlib (pip install matplotlib), then repeat with --table")
        return
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), constrained_layout=True)
    left, middle, right = axes
    for colour, (arm, of_arm) in zip(plt.get_cmap("tab10").colors, results.items()):
        ar_bits = np.mean([result["ar_bits"] for result in of_arm], axis=0)
        marginal = np.mean([result["marginal_bits"] for result in of_arm], axis=0)
        places = np.arange(1, len(ar_bits) + 1)
        left.plot(places, ar_bits, color=colour, label=arm)
        left.plot(places, marginal, "--", color=colour, linewidth=0.9)

        tables = [columns(result) for result in of_arm]
        psnr = [table["Reconstruction and bits"]["PSNR"] for table in tables]
        bits = [table["Reconstruction and bits"]["AR bits"] for table in tables]
        ar = [table["Samples"]["AR best FD"] for table in tables]
        maskgit = [table["Samples"]["MaskGIT best FD"] for table in tables]
        scatter(middle, psnr, ar, colour, "o", arm)
        scatter(middle, psnr, maskgit, colour, "^", arm)
        scatter(right, bits, psnr, colour, "o", arm)
    pca = os.path.join(out, "pca.json")
    if os.path.exists(pca):
        bits, psnr = zip(*checkpoint.read_json(pca)["bits_and_psnr"])
        right.plot(bits, psnr, "k.--", label="PCA transform code")

    left.set(title="solid: AR, dashed: marginal", xlabel="position", ylabel="bits")
    middle.set(title="samples against reconstruction; ● AR, ▲ MaskGIT",
               xlabel="held-out PSNR, dB", ylabel="FD of samples, best guidance")
    right.set(title="reconstruction against AR bits", xlabel="bits of an image",
              ylabel="held-out PSNR, dB")
    for axis in axes:
        axis.grid(alpha=0.3)
    right.legend(fontsize=8)
    with checkpoint.replacing(os.path.join(out, "order.png")) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
