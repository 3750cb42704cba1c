"""What grain.py has measured, as two tables and a figure.

In       OUT/ARM-SEED.json, one per arm and seed, and OUT/real.json. Older files hold more than is
         shown here (errors of the noise by grain and by time)
Makes    OUT/table.md     codes; images drawn in them; mean ± standard deviation over seeds
         OUT/sweep.svg    distances of reconstructions and of samples, by the share of fine cells
Run      python -m experiments.grain --table --out OUT
"""
import os
import statistics
from collections.abc import Iterable

from experiments.order_table import fd_key, read_results, table_of, write_files
from plumbing import checkpoint
from plumbing.plot import COLORS, Curve, svg

TABLES = {  # title: head of its first column, its other columns and their digits
    "Codes": ("codes of", {
        "codes": ".1f", "numbers": ".0f", "PSNR, dB": ".2f", "in fine cells": ".2f",
        "in coarse cells": ".2f", "FD": ".1f"}),
    "Images": ("drawn by", {
        "FD": ".1f", "class seen": ".3f", "map obeyed": ".3f", "bits of a map": ".1f",
        "tokens × blocks": ".0f", "ms an image": ".1f"})}
# share of fine cells: the arm of codes, the arm of images
SWEEP = {0: ("coarse", "d2it-r0"), 0.25: ("r25", "d2it-r25"), 0.5: ("entropy", "d2it-4+2"),
         0.75: ("r75", "d2it-r75"), 1: ("fine", "d2it-r100")}


def of_codes(result: dict) -> dict[str, float]:
    """Columns of an arm of codes."""
    return {"codes": result["codes"], "numbers": result["numbers"], "PSNR, dB": result["psnr"],
            "in fine cells": result["psnr_fine_cells"],
            "in coarse cells": result["psnr_coarse_cells"], "FD": result[fd_key(result)]}


def of_images(result: dict, row: dict) -> dict[str, float | None]:
    """Columns of an arm of images under one kind of maps; None where nothing was measured."""
    return {"FD": row[fd_key(result)], "class seen": row["class_accuracy"],
            "map obeyed": row["map_obeyed"], "bits of a map": result["bits_of_a_map"],
            "tokens × blocks": result["tokens_times_blocks"], "ms an image": row["ms_an_image"]}


def rows_of(results: dict[str, list[dict]]) -> dict[str, dict[str, list[dict]]]:
    """{title: {name of a row: columns, by seed}}. An arm of images has a row for each kind of maps.
    """
    rows = {title: {} for title in TABLES}
    for arm, of_arm in results.items():
        for result in of_arm:
            if "samples" not in result:
                rows["Codes"].setdefault(arm, []).append(of_codes(result))
            for row in result.get("samples", []):
                name = arm if row["name"] == "predicted" else f"{arm}, {row['name']} maps"
                rows["Images"].setdefault(name, []).append(of_images(result, row))
    return rows


def summary(results: dict[str, list[dict]]) -> dict[str, list[str]]:
    """{title: lines of a table}, those for which there are results."""
    return {title: table_of(TABLES[title][0], rows, TABLES[title][1])
            for title, rows in rows_of(results).items() if rows}


def sweep(results: dict[str, list[dict]]) -> dict[float, tuple[float, float]]:
    """{share of fine cells: distance of reconstructions, of samples}.

    Means over the seeds that all points have: those of others would not compare.
    """
    points = {share: arms for share, arms in SWEEP.items() if set(arms) <= set(results)}
    seeds = [{result["seed"] for result in results[arm]}
             for arms in points.values() for arm in arms]
    common = set.intersection(*seeds) if seeds else set()

    def mean(arm: str) -> float:
        return statistics.mean(result[fd_key(result)] for result in results[arm]
                               if result["seed"] in common)
    return {share: (mean(codes), mean(images))
            for share, (codes, images) in points.items() if common}


def note(results: dict[str, list[dict]], floor: dict) -> str:
    """What a reader of the tables has to know. floor: the content of real.json."""
    first = next(iter(results.values()))[0]
    return ("Mean ± standard deviation over seeds. Fine and coarse cells are those of the entropy "
            "map at r = 1/2, in all arms. Map obeyed: are the most detailed cells of a sample "
            f"where its map is fine? 0.5 is chance. FD is {fd_key(first)}, not FID; as many "
            f"training images as samples, {floor['n']}, have {floor[fd_key(floor)]:.1f}.\n\n"
            f"{first['device']}: {first['command']}\n")


def write_tables(out: str, arms: Iterable[str]) -> str:
    """Write table.md and, of two points or more, sweep.svg; -> the text of the first."""
    results, lines = read_results(out, arms), []
    for title, table in summary(results).items():
        lines += [f"## {title}", "", *table, ""]
    text = "\n".join([*lines, note(results, checkpoint.read_json(os.path.join(out, "real.json")))])
    files, points = {"table.md": text}, sweep(results)
    if len(points) > 1:
        rebuilt, drawn = zip(*points.values())
        files["sweep.svg"] = svg([Curve("reconstructions", [*points], [*rebuilt], COLORS[0]),
                                  Curve("samples", [*points], [*drawn], COLORS[1])],
                                 "share of fine cells, r", "Fréchet distance to held-out images")
    write_files(out, files)
    return text
