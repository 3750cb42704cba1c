"""What order.py has measured, told: tables for people and for programs, and a figure.

In       OUT/ARM-SEED.json, one per arm and seed, and OUT/pca.json when it is there
Makes    OUT/table.md     a summary, then one table after the other, one row per arm, mean ± standard deviation over seeds
         OUT/table.csv    the same numbers, one line per arm and seed
         OUT/order.png    bits by position; samples against reconstruction; reconstruction against bits (with matplotlib)
Try      python -m experiments.order --table --out OUT
"""
import csv
import io
import json
import os
import statistics
from pathlib import Path

import numpy as np

from nativetok import doubling
from plumbing import checkpoint
from plumbing.flags import need


def costs(folder: str, settings) -> dict:
    """log.jsonl of a run -> {phase: steps, seconds, peak_mb, loss_by_tenth: has it flattened?}.

    Seconds follow from the logged rates, since the clock of a resumed phase starts anew; loss is that of the pixels or ids.
    """
    found = {}
    rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for phase in dict.fromkeys(row["phase"] for row in rows):
        mine = [row for row in rows if row["phase"] == phase]
        steps = [(row["step"], row["per_second"], row.get("pixels", row.get("loss"))) for row in mine if "per_second" in row]
        size = settings.generator_batch_size if phase in ("ar", "maskgit") else settings.batch_size
        seconds = sum(size * (step - before) / rate for (step, rate, _), before in zip(steps, [0, *(step for step, *_ in steps)]))
        found[phase] = {"steps": steps[-1][0], "seconds": round(seconds, 3), "peak_mb": max(row.get("peak_mb", 0) for row in mine),
                        "loss_by_tenth": [round(float(part.mean()), 5) for part in np.array_split([loss for *_, loss in steps], 10) if len(part)]}
    return found


def fd_key(row: dict) -> str:
    (key,) = (key for key in row if key.startswith("fd_tinycnn_"))
    return key


def read_results(out: str, arms) -> dict[str, list[dict]]:
    """{arm: its results, by seed}, in the order of arms. Raises UserError for none, or when they had different judges."""
    found = {arm: [checkpoint.read_json(path) for path in sorted(Path(out).glob(f"{arm}-[0-9]*.json"))] for arm in arms}
    found = {arm: results for arm, results in found.items() if results}
    need(found, f"{out} holds no results yet; leave --table out, or give --out")
    judges = {fd_key(result) for results in found.values() for result in results}
    need(len(judges) == 1, f"{out}: distances of different judges ({', '.join(sorted(judges))}) cannot be compared; delete the older results")
    return found


def columns(result: dict) -> dict[str, dict[str, float]]:
    """One result -> {table: {column: number}}. Guidance 1 is none; "best" is the best of the sweep."""
    fd, rows, training = fd_key(result), result["samples"], result["costs"]
    ar = [row for row in rows if row["name"] == "ar"]
    maskgit = {n: [row for row in rows if row["name"] == "maskgit" and row["steps"] == n] for n in doubling(len(result["order"]))}
    best, best_ar = {n: min(some, key=lambda row: row[fd]) for n, some in maskgit.items()}, min(ar, key=lambda row: row[fd])
    eight = max(n for n in maskgit if n <= 8)
    tokenizer = {phase: cost for phase, cost in training.items() if phase not in ("ar", "maskgit")}
    return {
        "Reconstruction and bits": {
            "encoder, M": result["encoder_parameters"] / 1e6, "PSNR": result["psnr"], "FD": result[fd], "codes used": result["codebook_used"],
            "perplexity": statistics.mean(result["perplexity"]), "marginal bits": result["marginal_bits_total"], "AR bits": result["ar_bits_total"],
            "bits explained": 1 - result["ar_bits_total"] / max(result["marginal_bits_total"], 1e-9)},
        "Samples": {
            "real FD": result["real"][fd], "AR FD": ar[0][fd], "AR accuracy": ar[0]["class_accuracy"], "AR best FD": best_ar[fd],
            "AR best accuracy": best_ar["class_accuracy"], "AR best guidance": best_ar["cfg_scale"],
            "MaskGIT best FD": best[eight][fd], "MaskGIT best accuracy": best[eight]["class_accuracy"], "MaskGIT best guidance": best[eight]["cfg_scale"]},
        "FD of MaskGIT samples by steps": {
            **{f"{n} steps": next(row[fd] for row in some if row["cfg_scale"] == 1) for n, some in maskgit.items()},
            **{f"{n} steps, best": best[n][fd] for n in maskgit}},
        "PSNR of the first k tokens": {f"{k} tokens": value for k, value in result["prefix_psnr"].items()},
        "Cost of training": {
            "tokenizer s": sum(cost["seconds"] for cost in tokenizer.values()), "AR s": training["ar"]["seconds"], "MaskGIT s": training["maskgit"]["seconds"],
            **{f"{phase} ms a step": 1000 * cost["seconds"] / cost["steps"] for phase, cost in tokenizer.items()},
            **{f"{phase} peak MB": cost["peak_mb"] for phase, cost in tokenizer.items() if cost["peak_mb"]}},
    }


def cell(values: list[float], digits: str = ".4g") -> str:
    return "" if not values else f"{statistics.mean(values):{digits}}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def summary(found: dict[str, list[dict]]) -> list[str]:
    """The lines of the one table that the README shows: the numbers that the question turns on, out of columns()."""
    half = f"{len(next(iter(found.values()))[0]['order']) // 2} tokens"
    told = {"PSNR, dB": ("Reconstruction and bits", "PSNR", ".2f"), "FD, rebuilt": ("Reconstruction and bits", "FD", ".1f"),
            "marginal bits": ("Reconstruction and bits", "marginal bits", ".1f"), "AR bits": ("Reconstruction and bits", "AR bits", ".1f"),
            "AR: FD": ("Samples", "AR best FD", ".1f"), "class seen": ("Samples", "AR best accuracy", ".3f"),
            "MaskGIT: FD": ("Samples", "MaskGIT best FD", ".1f"), "class seen ": ("Samples", "MaskGIT best accuracy", ".3f"),
            f"PSNR of {half}": ("PSNR of the first k tokens", half, ".2f")}
    lines = [f"| arm | seeds | {' | '.join(name.strip() for name in told)} |", "|---" * (2 + len(told)) + "|"]
    for arm, results in found.items():
        tables = [columns(result) for result in results]
        lines.append(f"| {arm} | {len(results)} | " + " | ".join(cell([t[title][name] for t in tables], digits) for title, name, digits in told.values()) + " |")
    return lines


def write_tables(found: dict[str, list[dict]], out: str) -> str:
    """table.md, one table after the other, one row per arm; -> its text."""
    each, lines = {arm: [columns(result) for result in results] for arm, results in found.items()}, ["## Summary", "", *summary(found), ""]
    for title in next(iter(each.values()))[0]:
        names = list(dict.fromkeys(name for tables in each.values() for name in tables[0][title]))
        lines += [f"## {title}", "", f"| arm | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        lines += [f"| {arm} | " + " | ".join(cell([t[title][name] for t in tables if name in t[title]]) for name in names) + " |" for arm, tables in each.items()]
        lines.append("")
    first = next(iter(found.values()))[0]
    lines.append(f"Mean ± standard deviation over seeds ({', '.join(f'{arm}: {len(results)}' for arm, results in found.items())}). FD is {fd_key(first)}, not FID, "
                 f"of {first['real']['n']} samples, and of all {first['reconstruction']['n']} reconstructions, against held-out images. {first['device']}: {first['command']}")
    with checkpoint.replacing(os.path.join(out, "table.md")) as file:
        file.write(("\n".join(lines) + "\n").encode())
    write_csv(found, out)
    return "\n".join(lines)


def write_csv(found: dict[str, list[dict]], out: str) -> None:
    """table.csv: a line for each arm and seed; a column is named "table: column"."""
    lines = [{"arm": arm, "seed": result["seed"], **{f"{title}: {name}": value for title, row in columns(result).items() for name, value in row.items()}}
             for arm, results in found.items() for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), restval="", lineterminator="\n")
    writer.writeheader(), writer.writerows(lines)
    with checkpoint.replacing(os.path.join(out, "table.csv")) as file:
        file.write(text.getvalue().encode())


def draw_figure(found: dict[str, list[dict]], out: str) -> None:
    """order.png: bits by position; sample quality against reconstruction; reconstruction against bits."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figure: it takes matplotlib (pip install matplotlib), then repeat with --table")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), constrained_layout=True)
    for colour, (arm, results) in zip(plt.get_cmap("tab10").colors, found.items()):
        places = np.arange(1, len(results[0]["ar_bits"]) + 1)
        left.plot(places, np.mean([r["ar_bits"] for r in results], axis=0), color=colour, label=arm)
        left.plot(places, np.mean([r["marginal_bits"] for r in results], axis=0), "--", color=colour, linewidth=0.9)
        tables = [columns(r) for r in results]
        quality, bits, ar, maskgit = ([t[title][name] for t in tables] for title, name in (
            ("Reconstruction and bits", "PSNR"), ("Reconstruction and bits", "AR bits"), ("Samples", "AR best FD"), ("Samples", "MaskGIT best FD")))
        for axis, x, y, marker in ((middle, quality, ar, "o"), (middle, quality, maskgit, "^"), (right, bits, quality, "o")):
            # each seed, and their mean
            axis.scatter(x, y, s=12, color=colour, alpha=0.5, marker=marker)
            axis.scatter(np.mean(x), np.mean(y), s=60, color=colour, marker=marker, label=arm)
    if os.path.exists(os.path.join(out, "pca.json")):
        right.plot(*zip(*checkpoint.read_json(os.path.join(out, "pca.json"))["bits_and_psnr"]), "k.--", label="PCA transform code")
    for axis, title, x, y in ((left, "solid: AR, dashed: marginal", "position", "bits"), (middle, "samples against reconstruction; ● AR, ▲ MaskGIT", "held-out PSNR, dB", "FD of samples, best guidance"),
                              (right, "reconstruction against AR bits", "bits of an image", "held-out PSNR, dB")):
        axis.set(title=title, xlabel=x, ylabel=y), axis.grid(alpha=0.3)
    right.legend(fontsize=8)
    with checkpoint.replacing(os.path.join(out, "order.png")) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
