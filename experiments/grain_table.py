"""What grain.py has measured, as tables for people and for programs, and as a figure.

In       OUT/ARM-SEED.json, one per arm and seed, and OUT/real.json
Makes    OUT/table.md     codes; images drawn in them; the sweep of r; mean ± deviation over seeds
         OUT/table.csv    the same numbers and more, one line per arm and seed
         OUT/sweep.svg    distances of reconstructions and of samples against r
Run      python -m experiments.grain --table --out OUT
"""
import csv
import io
import os
import statistics

from experiments.grain_arms import CODES, IMAGES, SWEEP
from experiments.order_table import cell, fd_key, line_of, read_results
from plumbing import checkpoint
from plumbing.plot import COLORS, Curve, svg


def ms_a_step(result: dict, phase: str) -> float:
    return 1000 * result["costs"][phase]["seconds"] / result["costs"][phase]["steps"]


def of_codes(result: dict) -> dict[str, float]:
    """Columns of an arm of stage 1."""
    return {"codes": result["codes"], "numbers": result["numbers"], "PSNR, dB": result["psnr"],
            "in fine cells": result["psnr_fine_cells"],
            "in coarse cells": result["psnr_coarse_cells"], "FD": result[fd_key(result)],
            "class seen": result["reconstruction"]["class_accuracy"],
            "ms a step": ms_a_step(result, "dvae")}


def of_images(result: dict, row: dict) -> dict[str, float | None]:
    """Columns of an arm of stage 2, under one kind of maps; None where there is nothing to say."""
    loss = result["loss"]
    return {"FD": row[fd_key(result)], "class seen": row["class_accuracy"],
            "map obeyed": row["map_obeyed"], "bits of a map": result["bits_of_a_map"],
            "loss, fine": loss.get("fine"), "coarse": loss.get("coarse"),
            **{f"quarter {q}": loss.get(f"quarter_{q}") for q in range(1, 5)},
            "tokens × blocks": result["tokens_times_blocks"],
            "ms a step": ms_a_step(result, "content"), "ms an image": row["ms_an_image"]}


DIGITS = {"codes": ".1f", "numbers": ".0f", "PSNR, dB": ".2f", "in fine cells": ".2f",
          "in coarse cells": ".2f", "FD": ".1f", "class seen": ".3f", "map obeyed": ".3f",
          "bits of a map": ".1f", "tokens × blocks": ".0f", "ms a step": ".0f",
          "ms an image": ".1f"}


def rows_of(results: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """{name of a row: columns, by seed}. An arm of stage 2 has a row for each kind of maps."""
    rows = {}
    for arm, of_arm in results.items():
        for result in of_arm:
            if arm in CODES:
                rows.setdefault(arm, []).append(of_codes(result))
            for row in result.get("samples", []):
                name = arm if row["name"] == "predicted" else f"{arm}, {row['name']} maps"
                rows.setdefault(name, []).append(of_images(result, row))
    return rows


def table_of(results: dict[str, list[dict]], first: str) -> list[str]:
    """The lines of a table with a row for each arm; first: head of the first column."""
    rows = rows_of(results)
    heads = next(iter(rows.values()))[0]
    lines = [line_of([first, "seeds", *heads]), "|---" * (2 + len(heads)) + "|"]
    for name, by_seed in rows.items():
        cells = [cell([columns[head] for columns in by_seed if columns[head] is not None],
                      DIGITS.get(head, ".4f")) or "-" for head in heads]
        lines.append(line_of([name, str(len(by_seed)), *cells]))
    return lines


def sweep(results: dict[str, list[dict]]) -> dict[float, list[float]]:
    """r -> codes, PSNR, distance of reconstructions, distance of samples, class seen.

    Means over the seeds that all points have: those of others would not compare.
    """
    points = {r: arms for r, arms in SWEEP.items() if all(arm in results for arm in arms)}
    seeds = [{result["seed"] for result in results[arm]}
             for arms in points.values() for arm in arms]
    common = set.intersection(*seeds) if seeds else set()
    found = {}
    for r, (codes, images) in points.items() if common else ():
        rebuilt = [of_codes(result) for result in results[codes] if result["seed"] in common]
        drawn = [of_images(result, result["samples"][0]) for result in results[images]
                 if result["seed"] in common]
        found[r] = [statistics.mean(columns[head] for columns in rebuilt)
                    for head in ("codes", "PSNR, dB", "FD")]
        found[r] += [statistics.mean(columns[head] for columns in drawn)
                     for head in ("FD", "class seen")]
    return found


def summary(out: str) -> dict[str, list[str]]:
    """{title: lines of a table}, those for which there are results."""
    results = read_results(out, [*CODES, *IMAGES])
    codes, images = ({arm: results[arm] for arm in arms if arm in results}
                     for arms in (CODES, IMAGES))
    tables = {}
    if codes:
        tables["Codes"] = table_of(codes, "codes of")
    if images:
        tables["Images"] = table_of(images, "drawn by")
    points = sweep(results)
    if len(points) > 1:
        heads = ("r", "codes", "PSNR, dB", "FD, rebuilt", "FD, drawn", "class seen")
        tables["Sweep"] = [line_of(heads), "|---" * len(heads) + "|"] + [
            line_of([f"{r:g}", f"{n:.1f}", f"{dB:.2f}", f"{rebuilt:.1f}", f"{drawn:.1f}",
                     f"{seen:.3f}"]) for r, (n, dB, rebuilt, drawn, seen) in points.items()]
    return tables


def write_tables(out: str) -> str:
    """table.md, table.csv and sweep.svg; -> the text of the first."""
    tables, results = summary(out), read_results(out, [*CODES, *IMAGES])
    lines = []
    for title, table in tables.items():
        lines += [f"## {title}", "", *table, ""]
    first = next(iter(results.values()))[0]
    real = checkpoint.read_json(os.path.join(out, "real.json"))
    lines.append(f"Mean ± standard deviation over seeds. FD is {fd_key(first)}, not FID; "
                 f"{real['n']} training images have {real[fd_key(real)]:.1f}. {first['device']}: "
                 f"{first['command']}")
    text = "\n".join(lines) + "\n"
    for name, content in (("table.md", text), ("table.csv", csv_of(results)),
                          ("sweep.svg", figure(sweep(results)))):
        with checkpoint.replacing(os.path.join(out, name)) as file:
            file.write(content.encode())
    return text


def csv_of(results: dict[str, list[dict]]) -> str:
    """A line for each arm, kind of maps and seed."""
    lines = []
    for arm, of_arm in results.items():
        seeds = [result["seed"] for result in of_arm]
        for name, by_seed in rows_of({arm: of_arm}).items():
            lines += [{"arm": name, "seed": seed, **columns}
                      for seed, columns in zip(seeds, by_seed)]
    return csv_text(lines)


def csv_text(lines: list[dict]) -> str:
    """Dictionaries as lines of a CSV; a column for each name that any of them has."""
    heads = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def figure(points: dict[float, list[float]]) -> str:
    """Distances against r, as a file of SVG."""
    shares = list(points)
    curves = [Curve(label, shares, [point[k] for point in points.values()], color)
              for label, k, color in (("reconstructions", 2, COLORS[0]), ("samples", 3, COLORS[1]))]
    return svg(curves, "share of fine cells, r", "Fréchet distance to held-out images")
