"""What order.py has measured, as two tables and two figures; and reading the results again.

A file of its own because tables need no training: grain_table.py and record.py read results and
logs by the same functions.

In       OUT/ARM-SEED.json, one per arm and seed, and OUT/pca.json if it is there. Older files hold
         more than is shown here (weak predictors, beginnings of samples, other MaskGIT orders)
Makes    OUT/table.md       two tables, one row per arm, mean ± standard deviation over seeds
         OUT/recovered.svg  swap token i: the dB that later tokens recover, by i
         OUT/bits.svg       AR bits by position
         or, where an arm was trained with several numbers of tokens,
         OUT/psnr.svg       AR bits against PSNR, and a PCA transform code's
         OUT/fd.svg         AR bits against the distance of AR's samples
Run      python -m experiments.order --table --out OUT
"""
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from generator import GENERATORS
from plumbing import checkpoint
from plumbing.flags import need, read_log
from plumbing.plot import COLORS, Curve, svg

# ------------------------------------------------------------------------------------------------
# reading

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
    (key,) = (key for key in row if key.startswith(("fd_tinycnn_", "fd_airbench_")))
    return key


def numbers_in(path: Path) -> tuple[int, ...]:
    """ARM-SEED.json -> (SEED,), ARM-12-SEED.json -> (12, SEED)"""
    return tuple(int(part) for part in path.stem.split("-") if part.isdigit())


def read_results(out: str, arms: Iterable[str]) -> dict[str, list[dict]]:
    """{arm: its results, by seed}, in the order of arms; "arm, 12 tokens" for ARM-12-SEED.json.

    Raises UserError for none, or when they had different judges.
    """
    results = {}
    for arm in arms:
        for path in sorted(Path(out).glob(f"{arm}-[0-9]*.json"), key=numbers_in):
            *tokens, _ = numbers_in(path)
            name = f"{arm}, {tokens[0]} tokens" if tokens else arm
            results.setdefault(name, []).append(checkpoint.read_json(path))
    need(results, f"{out} holds no results yet; leave --table out, or give --out")
    judges = {fd_key(result) for of_arm in results.values() for result in of_arm}
    need(len(judges) == 1, f"{out}: distances of different judges ({', '.join(sorted(judges))}) "
                           "cannot be compared; delete the older results")
    return results


# ------------------------------------------------------------------------------------------------
# one result -> its numbers

def reported(result: dict, kind: str) -> dict:
    """The row of a generator's samples at its best guidance, which was chosen on other samples."""
    fd = fd_key(result)
    best = min((row for row in result["tried"] if row["name"] == kind), key=lambda row: row[fd])
    (row,) = (row for row in result["samples"]
              if all(row.get(name) == best.get(name) for name in ("name", "steps", "cfg_scale")))
    return row


def above_pca(result: dict, points: list[list[float]]) -> float | None:
    """PSNR minus that of a PCA transform code which spends the bits that an AR model needs, in dB.

    points   [bits, PSNR] of the code. Between them PSNR is taken to rise with the logarithm of the
             bits, which it nearly does; outside them: None
    """
    bits, psnr = zip(*points) if points else ((), ())
    if not points or not bits[0] <= result["ar_bits_total"] <= bits[-1]:
        return None
    return result["psnr"] - float(np.interp(np.log(result["ar_bits_total"]), np.log(bits), psnr))


def columns(result: dict, points: list[list[float]]) -> dict[str, float | None]:
    """{column: number} of one arm and seed; None where nothing was measured."""
    fd, L = fd_key(result), len(result["order"])
    quarter, first = str(max(1, L // 4)), result["intervention"][0]
    samples = {}
    for kind, title in (("ar", "AR"), ("maskgit", "MaskGIT")):
        learned = any(row["name"] == kind for row in result["samples"])
        row = reported(result, kind) if learned else {}
        samples |= {f"{title}: FD": row.get(fd), f"{title}: class seen": row.get("class_accuracy")}
    return {
        "PSNR, dB": result["psnr"],
        "of a quarter of the tokens": result["prefix_psnr"].get(quarter),
        "AR bits": result["ar_bits_total"],
        "above PCA, dB": above_pca(result, points),
        "token 1 swapped, dB": first["broken"],
        "recovered, dB": first["repaired"],
        "reconstructions: FD": result[fd],
        "their class seen": result["reconstruction"]["class_accuracy"], **samples}


# ------------------------------------------------------------------------------------------------
# tables

TABLES = {  # title: its columns and their digits
    "Tokens": {"PSNR, dB": ".2f", "of a quarter of the tokens": ".2f", "AR bits": ".1f",
               "above PCA, dB": "+.2f", "token 1 swapped, dB": ".2f", "recovered, dB": ".2f"},
    "Images": {"reconstructions: FD": ".1f", "their class seen": ".3f", "AR: FD": ".1f",
               "AR: class seen": ".3f", "MaskGIT: FD": ".1f", "MaskGIT: class seen": ".3f"}}


def cell(values: list[float], digits: str = ".4g") -> str:
    """Their mean, and with several of them ± their standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{spread}"


def line_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_of(first: str, rows: dict[str, list[dict]], digits: dict[str, str]) -> list[str]:
    """The lines of a table. first: head of the first column; rows: {name: columns, by seed}. A
    column that nothing was measured for is left out."""
    measured = {head for by_seed in rows.values() for row in by_seed for head in digits
                if row[head] is not None}
    digits = {head: form for head, form in digits.items() if head in measured}
    lines = [line_of([first, "seeds", *digits]), "|---" * (2 + len(digits)) + "|"]
    for name, by_seed in rows.items():
        cells = [cell([row[head] for row in by_seed if row[head] is not None], digits[head])
                 for head in digits]
        lines.append(line_of([name, str(len(by_seed)), *cells]))
    return lines


def pca_points(out: str) -> list[list[float]]:
    """[bits, PSNR in dB] of the transform code, by rising bits; none before it was measured."""
    path = os.path.join(out, "pca.json")
    return checkpoint.read_json(path)["bits_and_psnr"] if os.path.exists(path) else []


def summary(results: dict[str, list[dict]], points: list[list[float]]) -> dict[str, list[str]]:
    """{title: the lines of a table}: what the pages show."""
    numbers = {arm: [columns(result, points) for result in of_arm]
               for arm, of_arm in results.items()}
    return {title: table_of("arm", numbers, digits) for title, digits in TABLES.items()}


def note(results: dict[str, list[dict]]) -> str:
    """What a reader of the tables has to know."""
    first = next(iter(results.values()))[0]
    return ("Mean ± standard deviation over seeds. AR bits are those of a held-out image. Above "
            "PCA: the PSNR beyond that of a PCA transform code of so many bits. Swapped: the PSNR "
            "when token 1 is that of another image; recovered: what it gains when the later tokens "
            f"are chosen anew. FD is {fd_key(first)}, not FID, by a classifier that is right on "
            f"{first['judge_accuracy']:.1%} of them, to held-out images: of all "
            f"{first['reconstruction']['n']} reconstructions, and of {first['real']['n']} samples "
            "at the guidance that was best on other samples. As many training images have "
            f"{first['real'][fd_key(first)]:.1f}.\n\n"
            f"{first['device']}: {first['command']}\n")


# ------------------------------------------------------------------------------------------------
# figures

def by_position(results: dict[str, list[dict]], field: str) -> list[Curve]:
    """A curve for each arm, the mean over its seeds: "repaired" in dB, or "ar_bits"."""
    curves = []
    for k, (arm, of_arm) in enumerate(results.items()):
        if field == "ar_bits":
            places = range(1, 1 + len(of_arm[0][field]))
            values = [result[field] for result in of_arm]
        else:
            places = [row["position"] for row in of_arm[0]["intervention"]]
            values = [[row[field] for row in result["intervention"]] for result in of_arm]
        means = np.mean(values, axis=0).tolist()
        curves.append(Curve(arm, list(places), means, COLORS[k % len(COLORS)],
                            dashed=k >= len(COLORS)))
    return curves


def by_price(results: dict[str, list[dict]], column: str, points: list[list[float]]
             ) -> list[Curve]:
    """A curve for each arm, a point for each number of tokens: AR bits, and a column of TABLES.
    Bars: ± the standard deviation over seeds."""
    found = {}
    for name, of_arm in results.items():
        rows = [columns(result, points) for result in of_arm]
        values = [row[column] for row in rows]
        found.setdefault(name.split(",")[0], []).append(
            (statistics.mean(row["AR bits"] for row in rows), statistics.mean(values),
             statistics.stdev(values) if len(values) > 1 else 0.0))
    curves = []
    for k, (arm, of_arm) in enumerate(found.items()):
        bits, means, spread = map(list, zip(*sorted(of_arm)))
        curves.append(Curve(arm, bits, means, COLORS[k % len(COLORS)], spread=spread))
    return curves


def write_tables(results: dict[str, list[dict]], out: str) -> str:
    """Write tables and figures into the folder; -> the text of table.md."""
    points = pca_points(out)
    lines = []
    for title, table in summary(results, points).items():
        lines += [f"## {title}", "", *table, ""]
    text = "\n".join([*lines, note(results)])
    if any("," in name for name in results):
        price = "bits an image costs an AR model"
        quality = by_price(results, "PSNR, dB", points)
        least = min(x for curve in quality for x in curve.x)
        near = [point for point in points if point[0] > 0.7 * least]
        if near:
            bits, psnr = map(list, zip(*near))
            quality.append(Curve("PCA transform code", bits, psnr, "#222222", dashed=True))
        distances = by_price(results, "AR: FD", points)
        write_files(out, {"table.md": text,
                          "psnr.svg": svg(quality, price, "PSNR, dB", zero=False),
                          "fd.svg": svg(distances, price, "FD of AR samples", zero=False)})
        return text
    write_files(out, {
        "table.md": text,
        "recovered.svg": svg(by_position(results, "repaired"), "position of the token that is "
                             "swapped", "dB that later tokens recover"),
        "bits.svg": svg(by_position(results, "ar_bits"), "position", "bits under AR")})
    return text


def write_files(out: str, contents: dict[str, str]) -> None:
    """Write {name: text} into the folder."""
    for name, content in contents.items():
        with checkpoint.replacing(os.path.join(out, name)) as file:
            file.write(content.encode())
