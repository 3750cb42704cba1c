"""What eval_fid.py prints: a table of results, warnings, and a run's summary.

In       rows of results as judging.judge makes them
Out      text, and the dictionaries that go into summary.json
"""
from evaluation.judging import FeatureNet, Reference
from generator import GENERATORS
from plumbing.flags import read_log
from plumbing.run import OpenRun

COLUMNS = ("psnr", "ssim", "inception_score", "precision", "recall", "class_accuracy")


def table(rows: list[dict], nets: list[FeatureNet]) -> str:
    """The results as text, one row per set of images."""
    columns = [net.key for net in nets] + [c for c in COLUMNS if any(c in row for row in rows)]
    names = [row["name"] + "".join(f" {k}={v:g}" for k, v in row.get("swept", {}).items())
             for row in rows]
    first = max(map(len, names), default=0) + 2
    lines = [f"{'':{first}}{'n':>7}" + "".join(f"{c:>{len(c) + 3}}" for c in columns)]
    for name, row in zip(names, rows):
        cells = [format(row[c], ".4g") if c in row else "-" for c in columns]
        lines.append(f"{name:{first}}{row['n']:>7}" +
                     "".join(f"{cell:>{len(c) + 3}}" for c, cell in zip(columns, cells)))
    return "\n".join(lines)


def headline(rows: list[dict], nets: list[FeatureNet], reference: Reference, size: int) -> str:
    """What was compared with what, and a warning where n is too small for it."""
    count = "n unknown" if reference.n is None else f"n {reference.n}"
    lines = [f"against {reference.name}, {count}, at {size} pixels"]
    for net in nets:
        lines.append(f"{net.key}: {net.title}")
        few = [f"{row['name']} ({row['n']})" for row in rows if row["n"] <= net.features]
        if reference.n is not None and reference.n <= net.features:
            few.append("the reference")
        if few:
            lines.append(f"warning: not more images than the {net.features} features: "
                         f"{', '.join(few)}; such a distance is far too large")
    lines += [f"warning: {row['name']} is of an unfinished training, {row['unfinished']}"
              for row in rows if "unfinished" in row]
    return "\n".join(lines)


def run_summary(run: OpenRun, rows: list[dict], accuracy: float | None, seconds: float) -> dict:
    """What a run has come to: quality and codebook use by length, class accuracy, seconds.

    seconds   that judging has taken
    """
    summary = {"psnr_by_tokens": {}, "codebook_used": {}, "class_accuracy": {}, "seconds": {}}
    # In order of training: the fine-tune overwrites its length's growth step.
    for result in run.saved["results"].values():
        summary["psnr_by_tokens"][str(result["num_tokens"])] = result["psnr"]
        summary["codebook_used"][str(result["num_tokens"])] = result["codebook_used"]
    for row in rows:
        if row["name"] in GENERATORS and "class_accuracy" in row and "swept" not in row:
            summary["class_accuracy"][row["name"]] = row["class_accuracy"]
    unfinished = {row["name"]: row["unfinished"] for row in rows if "unfinished" in row}
    if unfinished:
        summary["unfinished"] = unfinished
    if accuracy is not None:
        summary["class_accuracy"]["classifier_on_real"] = round(accuracy, 4)
    for row in read_log(run.folder):
        if "seconds" in row:
            summary["seconds"][row["phase"]] = row["seconds"]
    summary["seconds"]["eval"] = round(seconds, 1)
    return summary


def phases_table(results: dict) -> str:
    """`results` of a tokenizer's checkpoint as text."""
    lines = [f"{'phase':12}{'tokens':>8}{'PSNR, held out':>16}{'codebook used':>15}"]
    lines += [f"{phase:12}{result['num_tokens']:>8}{result['psnr']:>13.2f} dB"
              f"{result['codebook_used']:>15.0%}" for phase, result in results.items()]
    return "\n".join(lines)
