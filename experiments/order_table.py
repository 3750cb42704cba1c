"""What order.py has measured, as tables for people and for programs, and as a figure.

In       OUT/ARM-SEED.json, one per arm and seed, and OUT/pca.json when it is there
Makes    OUT/table.md     a summary by question, then a table for each kind of number, one row per
                          arm, mean ± standard deviation over seeds
         OUT/table.csv    the same numbers, one line per arm and seed
         OUT/order.png    by position: dB that later tokens repair, bits; samples against
                          reconstruction; reconstruction against bits (with matplotlib)
Run      python -m experiments.order --table --out OUT
"""
import csv
import io
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from generator import GENERATORS
from nativetok import doubling
from plumbing import checkpoint
from plumbing.flags import need, read_log

# ------------------------------------------------------------------------------------------------
# from result files to numbers

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


def chosen_scale(rows: list[dict], kind: str) -> float:
    """The guidance at which this generator's samples are nearest: MaskGIT's in 8 steps, or fewer
    where there are fewer tokens."""
    rows = [row for row in rows if row["name"] == kind and row.get("steps", 0) <= 8]
    most = max(row.get("steps", 0) for row in rows)
    at_most = [row for row in rows if row.get("steps", 0) == most]
    return min(at_most, key=lambda row: row[fd_key(row)])["cfg_scale"]


def columns(result: dict) -> dict[str, dict[str, float]]:
    """One result -> {table: {column: number}}.

    Guidance 1 is none. A control whose tokens have no prefix lacks columns, and so does a result
    from before there was such a measure.
    """
    fd, num_tokens = fd_key(result), len(result["order"])
    # Results from before lack `tried`: there guidance was chosen on the samples that are reported.
    tried = result.get("tried", result["samples"])
    scale = {kind: chosen_scale(tried, kind) for kind in GENERATORS}
    samples = {(row["name"], row.get("steps"), row["cfg_scale"]): row for row in result["samples"]}
    plain = samples["ar", None, 1.0]
    ar, maskgit = samples["ar", None, scale["ar"]], {
        steps: samples["maskgit", steps, scale["maskgit"]] for steps in doubling(num_tokens)}
    surest = maskgit[max(steps for steps in maskgit if steps <= 8)]
    training = {phase: cost for phase, cost in result["costs"].items() if phase not in GENERATORS}
    ar_bits, marginal_bits = result["ar_bits_total"], result["marginal_bits_total"]

    intervention = {}
    for row in result.get("intervention", []):
        token = f"token {row['position']}"
        intervention |= {f"{token} broken": row["broken"], f"{token} answered": row["answered"],
                         f"{token} repaired": row["repaired"],
                         f"{token} ids changed": row["later_ids_changed"]}
    first_tokens, best_of = {}, {}
    for row in result.get("first_tokens", []):
        first_tokens |= {f"{row['tokens']} tokens FD": row[fd],
                         f"{row['tokens']} tokens class": row["class_accuracy"]}
    for row in result.get("best_of", []):
        # The first of the four is what there was without a choice.
        gain = row["class_accuracy"] - result["first_tokens"][-1]["class_accuracy"]
        best_of |= {f"after {row['after']} FD": row[fd],
                    f"after {row['after']} class": row["class_accuracy"],
                    f"after {row['after']} gain": gain}
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
        "PSNR of the first k tokens": {
            f"{k} tokens": psnr for k, psnr in result["prefix_psnr"].items()},
        "Token i is another image's": intervention,
        "Bits under weak predictors": {
            f"{predictor}, {order}": bits for order, row in result.get("predictors", {}).items()
            for predictor, bits in row.items()},
        "Samples": {
            "real FD": result["real"][fd],
            "AR FD": plain[fd],
            "AR accuracy": plain["class_accuracy"],
            "AR best FD": ar[fd],
            "AR best accuracy": ar["class_accuracy"],
            "AR best guidance": scale["ar"],
            "MaskGIT best FD": surest[fd],
            "MaskGIT best accuracy": surest["class_accuracy"],
            "MaskGIT best guidance": scale["maskgit"]},
        "The first k tokens that AR writes": first_tokens,
        "Best of four beginnings of k tokens": best_of,
        "MaskGIT": {
            **{f"{row['order']} FD": row[fd] for row in result.get("revealed", [])},
            **{f"{row['order']} accuracy": row["class_accuracy"]
               for row in result.get("revealed", [])},
            **{f"{steps} steps, plain FD": samples["maskgit", steps, 1.0][fd] for steps in maskgit},
            **{f"{steps} steps FD": row[fd] for steps, row in maskgit.items()}},
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


def shown(num_tokens: int) -> dict[str, tuple]:
    """What the pages show, {question: its columns}: head, table and column of columns(), digits."""
    k = max(k for k in doubling(num_tokens) if k <= max(1, num_tokens // 4))  # a beginning
    bits, other, weak, samples, maskgit = (
        "Reconstruction and bits", "Token i is another image's", "Bits under weak predictors",
        "Samples", "MaskGIT")
    return {
        "What do the first tokens say?": (
            ("tokenizer, s", "Cost of training", "tokenizer s", ".0f"),
            *((f"PSNR of {n}, dB", "PSNR of the first k tokens", f"{n} tokens", ".2f")
              for n in doubling(num_tokens)),
            ("FD, rebuilt", bits, "FD", ".1f")),
        "Do later tokens know of earlier ones?": (
            ("token 1 broken, dB", other, "token 1 broken", ".2f"),
            ("answered, dB", other, "token 1 answered", ".2f"),
            ("ids changed", other, "token 1 ids changed", ".2f"),
            (f"token {k} repaired, dB", other, f"token {k} repaired", ".2f"),
            ("marginal bits", bits, "marginal bits", ".1f"),
            ("AR bits", bits, "AR bits", ".1f"),
            *((f"weak AR, {order}", weak, f"one layer, {order}", ".1f")
              for order in ("native", "reversed", "shuffled"))),
        "Are they easier to write?": (
            ("AR: FD", samples, "AR best FD", ".1f"),
            ("class seen", samples, "AR best accuracy", ".3f"),
            (f"in {k} tokens", "The first k tokens that AR writes", f"{k} tokens class", ".3f"),
            (f"best of 4 after {k}", "Best of four beginnings of k tokens", f"after {k} gain",
             "+.3f"),
            ("MaskGIT: FD", samples, "MaskGIT best FD", ".1f"),
            ("class seen", samples, "MaskGIT best accuracy", ".3f"),
            ("left to right: FD", maskgit, "left to right FD", ".1f"),
            ("right to left: FD", maskgit, "right to left FD", ".1f"))}


def summary(results: dict[str, list[dict]]) -> list[str]:
    """The lines of the tables that the pages show, one for each question.

    A column that no arm has is left out.
    """
    num_tokens = len(next(iter(results.values()))[0]["order"])
    tables_of = {arm: [columns(result) for result in of_arm] for arm, of_arm in results.items()}
    lines = []
    for question, wanted in shown(num_tokens).items():
        cells = {column: [cell([table[title][name] for table in tables if name in table[title]],
                               digits) for tables in tables_of.values()]
                 for column in wanted for _, title, name, digits in [column]}
        cells = {column: values for column, values in cells.items() if any(values)}
        lines += [f"*{question}*", "",
                  line_of(["arm", "seeds", *(head for head, *_ in cells)]),
                  "|---" * (2 + len(cells)) + "|"]
        for arm, values in zip(results, zip(*cells.values())):
            lines.append(line_of([arm, str(len(results[arm])), *values]))
        lines.append("")
    return lines[:-1]


def write_tables(results: dict[str, list[dict]], out: str) -> str:
    """table.md, one table after the other, one row per arm; -> its text. And table.csv."""
    tables_of = {arm: [columns(result) for result in of_arm] for arm, of_arm in results.items()}
    lines = ["## Summary", "", *summary(results), ""]
    for title in next(iter(tables_of.values()))[0]:
        heads = dict.fromkeys(name for tables in tables_of.values() for name in tables[0][title])
        if not heads:
            continue
        lines += [f"## {title}", "", line_of(["arm", *heads]), "|---" * (1 + len(heads)) + "|"]
        for arm, tables in tables_of.items():
            # an arm may lack a column, as joint training has no growth phases
            cells = [cell([table[title][name] for table in tables if name in table[title]])
                     for name in heads]
            lines.append(line_of([arm, *cells]))
        lines.append("")
    lines.append(note(results))
    with checkpoint.replacing(os.path.join(out, "table.md")) as file:
        file.write(("\n".join(lines) + "\n").encode())
    write_csv(results, out)
    return "\n".join(lines)


def note(results: dict[str, list[dict]]) -> str:
    """What has to be known of all these numbers."""
    first = next(iter(results.values()))[0]
    seeds = ", ".join(f"{arm}: {len(of_arm)}" for arm, of_arm in results.items())
    others = all("tried" in result for of_arm in results.values() for result in of_arm)
    return (f"Mean ± standard deviation over seeds ({seeds}). FD is {fd_key(first)}, not FID, of "
            f"{first['real']['n']} samples, and of all {first['reconstruction']['n']} "
            "reconstructions, against held-out images.\n\n"
            "Broken: PSNR when token i is that of another image; answered: when the experts after "
            "it have read it and chosen anew; ids changed: how many of theirs are others then. "
            "Bits are those of a held-out image; a weak AR model has one layer and a fifth of the "
            "steps, and gets the tokens from the first, from the last, or shuffled.\n\n"
            "The guidance of \"best\" and of MaskGIT's columns was chosen by FD on "
            f"{'other' if others else 'the same'} samples. The first k tokens and the best of four "
            "are those of samples without guidance: of four beginnings of k tokens the judge keeps "
            "the one that looks most like its class, and the gain is how much more often that "
            "class is seen in the finished image. That judge is the one that says what is seen, "
            "so the best of four after all tokens is its own choice.\n\n"
            f"{first['device']}: {first['command']}")


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
    """order.png: what is answered and bits, by position; samples against reconstruction, and that
    against bits."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figure: it takes matplotlib (pip install matplotlib), then repeat with --table")
        return
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), constrained_layout=True)
    (answer, left), (middle, right) = axes
    for colour, (arm, of_arm) in zip(plt.get_cmap("tab10").colors, results.items()):
        ar_bits = np.mean([result["ar_bits"] for result in of_arm], axis=0)
        marginal = np.mean([result["marginal_bits"] for result in of_arm], axis=0)
        places = np.arange(1, len(ar_bits) + 1)
        left.plot(places, ar_bits, color=colour, label=arm)
        left.plot(places, marginal, "--", color=colour, linewidth=0.9)

        rows = [result["intervention"] for result in of_arm if "intervention" in result]
        if rows:
            answer.plot([row["position"] for row in rows[0]],
                        np.mean([[row["repaired"] for row in seed] for seed in rows], axis=0),
                        ".-", color=colour, label=arm)

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

    answer.set(title="token i is another image's: what later tokens repair", xlabel="position i",
               ylabel="dB")
    left.set(title="solid: AR, dashed: marginal", xlabel="position", ylabel="bits")
    middle.set(title="samples against reconstruction; ● AR, ▲ MaskGIT",
               xlabel="held-out PSNR, dB", ylabel="FD of samples, best guidance")
    right.set(title="reconstruction against AR bits", xlabel="bits of an image",
              ylabel="held-out PSNR, dB")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    right.legend(fontsize=8)
    with checkpoint.replacing(os.path.join(out, "order.png")) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
