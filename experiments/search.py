"""How much better could the same tokens be? Search: other codes are tried in place of each.

An expert emits the code nearest to its output. The nearest code need not give the nearest pixels,
and the later experts' tokens depend on it. So, from the first token to the last, the next nearest
codes are tried in its place, all is decoded, and what comes closest to the image is kept:

    answer   the later experts read the other code and re-encode: only ordered tokens can
    hold     the later tokens stay as they are

It is a greedy search, not the best of all sequences of codes: a floor of what encoding leaves. The
ids are those of the same tokenizer and decode as any others do; only the encoder takes longer, by
L * nearest passes of experts and decoder.

With --bits_a_db R bits have a price: R of them, as the run's AR model counts them without a class,
are worth as much as one dB, and what is cheapest is kept. Then a new AR model learns the searched
ids of all training images, and says what they cost it.

Run      python -m experiments.search --run runs/NAME --nearest 1 3
         python -m experiments.search --run runs/NAME --nearest 1 --bits_a_db 1e9 53 --json FILE
Makes    a table, a line for each way, with PSNR over held-out images; --json FILE; RUN-price-R/,
         a run with the same tokenizer and the new AR model
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import math
import os
import shutil
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
import train
from config import CONFIGS
from evaluation.intervention import BATCH, errors
from experiments.order import ar_bits, handlers_of_its_own
from generator import Generator
from layers import eval_mode
from losses import to_db
from nativetok import NativeTok, as_it_is
from plumbing import checkpoint
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.images import to_float
from plumbing.outputs import JSON, need_places
from plumbing.processes import Processes, need_one_process, provenance
from plumbing.run import held_out, open_run

def others(tokenizer: NativeTok, images: Tensor, answer: bool) -> Callable:
    """-> (ids (B, L), i, k) -> ids in which token i is the k-th next nearest code."""
    L, quantizer = tokenizer.num_tokens, tokenizer.quantizer
    codes = quantizer.codes()

    def next_best(z: Tensor, k: int) -> Tensor:
        return (z @ codes.T).topk(k + 1).indices[:, k]

    if tokenizer.cfg.tokenizer == "nativetok":
        x_latent = tokenizer.mit(images)

        def swapped(ids, i, k):
            force = {j: ids[:, j] for j in range(L) if j < i or (j > i and not answer)}
            force[i] = lambda z: next_best(z, k)
            return tokenizer.mocet(x_latent, quantizer, force)[1]
    else:
        wanted = tokenizer.titok(images, lambda z: z)  # (B, L, d), all at once

        def swapped(ids, i, k):
            ids = ids.clone()
            ids[:, i] = next_best(wanted[:, i], k)
            return ids
    return swapped


def search(tokenizer: NativeTok, images: Tensor, nearest: int, answer: bool = True,
           price: Callable | None = None) -> Tensor:
    """images (B, 3, H, W) -> ids (B, L), each token searched once. No image gets worse.

    nearest   how many codes are tried in a token's place, those next nearest to the expert's output
    answer    the experts after it re-encode; False, or a baseline: their tokens are held
    price     ids (B, L) -> what they cost (B,), to be added to the squared error
    """
    def cost(ids: Tensor) -> Tensor:
        error = errors(tokenizer, ids, images)
        return error + price(ids) if price else error
    ids = tokenizer.encode(images)
    best = cost(ids)
    with eval_mode(tokenizer):
        swapped = others(tokenizer, images, answer)
        for i in range(tokenizer.num_tokens):
            before = ids
            for k in range(1, nearest + 1):
                other = swapped(before, i, k)
                found = cost(other)
                better = found < best
                ids = torch.where(better[:, None], other, ids)
                best = torch.where(better, found, best)
    return ids


# ------------------------------------------------------------------------------------------------
# bits with a price

def price_of_bits(model: Generator, error: float, bits_a_db: float) -> Callable:
    """-> price(): ids (B, L) -> what their bits under `model` are worth, as squared error (B,).

    One dB of the error is 10 log10(e), so that near `error` a bit is worth the error that one dB
    changes it by, over bits_a_db.
    """
    worth = error * math.log(10) / 10 / bits_a_db

    @torch.no_grad()
    def price(ids: Tensor) -> Tensor:
        no_class = torch.full((len(ids),), model.num_classes, device=ids.device)
        logits = model(no_class, ids[:, :-1]).flatten(0, 1).float()
        nats = F.cross_entropy(logits, ids.flatten(), reduction="none").view(ids.shape).sum(dim=1)
        return worth * nats.double() / math.log(2)
    return price


class Searching(nn.Module):
    """A tokenizer whose encoder searches; as train.main's change_tokenizer takes it."""

    def __init__(self, tokenizer: NativeTok, nearest: int, price: Callable, bits_a_db: float):
        super().__init__()
        self.tokenizer, self.num_tokens, self.cfg = tokenizer, tokenizer.num_tokens, tokenizer.cfg
        self.unfinished, self.nearest, self.price = tokenizer.unfinished, nearest, price
        self.fingerprint = checkpoint.fingerprint(
            {}, {"tokenizer": tokenizer.fingerprint, "nearest": nearest, "bits_a_db": bits_a_db})

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([search(self.tokenizer, part, self.nearest, price=self.price)
                          for part in images.split(BATCH)])

    def decode(self, ids: Tensor) -> Tensor:
        return self.tokenizer.decode(ids)


def run_beside(folder: str, name: str) -> str:
    """FOLDER-NAME, made if it is not there yet: a run with the same tokenizer and no generator."""
    other = f"{folder.rstrip(os.sep)}-{name}"
    if not os.path.exists(os.path.join(other, "tokenizer.pt")):
        os.makedirs(other, exist_ok=True)
        for file in ("config.json", "tokenizer.pt"):
            shutil.copy(os.path.join(folder, file), other)
    return other


def learn_ar(folder: str, run, device: str, change_tokenizer: Callable = as_it_is) -> None:
    """Train the AR model of this folder for as many steps as that of `run` has taken."""
    flags = ["--run", folder, "--stage", "3", "--generators", "ar", "--device", device,
             "--generator_steps", str(run.configs[-1].generator_steps)]
    with handlers_of_its_own():
        train.main(config.parse_run("", flags), change_tokenizer=change_tokenizer)


def priced(args, run, tokenizer: NativeTok, images: list[Tensor], labels: Tensor,
           bits_a_db: float) -> dict:
    """Search with this price, let a new AR model learn the ids of all training images -> a row."""
    device = labels.device
    before = Generator.of_run(args.run, "ar", tokenizer, device)
    plain = torch.cat([errors(tokenizer, tokenizer.encode(part), part) for part in images]).mean()
    searching = Searching(tokenizer, max(args.nearest), price_of_bits(before, plain, bits_a_db),
                          bits_a_db)
    ids = torch.cat([searching.encode(part) for part in images])
    error = torch.cat([errors(tokenizer, part, x) for part, x in zip(ids.split(BATCH), images)])
    folder = run_beside(args.run, f"price-{bits_a_db:g}")
    learn_ar(folder, run, args.device, lambda _: searching)
    after = Generator.of_run(folder, "ar", searching, device)
    return {"bits_a_db": bits_a_db, "nearest": max(args.nearest),
            "psnr": round(to_db(error.mean()).item(), 3),
            "bits_before": round(sum(ar_bits(before, ids, labels)), 2),
            "bits_after": round(sum(ar_bits(after, ids, labels)), 2)}


# ------------------------------------------------------------------------------------------------
# measuring

def measured(tokenizer: NativeTok, batches: list[Tensor], nearest: int, answer: bool) -> dict:
    """What search() does to images, (b, 3, H, W) each."""
    began, L = time.perf_counter(), tokenizer.num_tokens
    found = [search(tokenizer, images, nearest, answer) for images in batches]
    seconds = time.perf_counter() - began
    error = torch.cat([errors(tokenizer, *pair) for pair in zip(found, batches)])
    plain = torch.cat([tokenizer.encode(images) for images in batches])
    changed = (torch.cat(found) != plain).double().mean().item()
    return {"nearest": nearest, "later_tokens": "answer" if answer else "hold",
            "passes": 1 + L * nearest, "psnr": round(to_db(error.mean()).item(), 3),
            "ids_changed": round(changed, 3),
            "ms_per_image": round(1000 * seconds / len(error), 2)}


HEAD = ("codes tried", "later tokens", "PSNR", "ids changed", "passes", "ms an image")


def cells(row: dict) -> str:
    if not row["nearest"]:
        return f"| none: as encoded | | {row['psnr']:.2f} dB | | 1 | |"
    return (f"| {row['nearest']} | {row['later_tokens']} | {row['psnr']:.2f} dB | "
            f"{row['ids_changed']:.0%} | {row['passes']} | {row['ms_per_image']:.0f} |")


def table(rows: list[dict]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD), *map(cells, rows)]
    return "\n".join(lines) + "\n"


def parse(argv=None):
    parser = Parser(prog="python -m experiments.search", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a run of train.py")
    parser.add_argument("--nearest", type=number(int, 1), nargs="+", default=[1], metavar="N",
                        help="codes tried in each token's place (default: 1)")
    parser.add_argument("--bits_a_db", type=number(float, 0.001), nargs="+", metavar="R",
                        default=[],
                        help="let bits have a price: so many are worth one dB; 1e9: none")
    parser.add_argument("--num_images", type=number(int, 1), default=1000, metavar="N",
                        help="held-out images, chosen with seed 0 (default: 1000)")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    return parser.parse_args(argv)


def main(args) -> None:
    need_one_process("experiments.search")
    device = Processes(args.device).device
    need_places({"--json": (args.json, JSON)})
    run = open_run(args.run, CONFIGS)
    tokenizer = NativeTok.of_run(args.run, device)
    cfg = tokenizer.cfg
    ordered = cfg.tokenizer == "nativetok"  # else nobody reads a token
    need(max(args.nearest) < cfg.codebook_size, f"--nearest {max(args.nearest)}: beside the one "
         f"that is emitted there are {cfg.codebook_size - 1} codes")
    pixels, labels = held_out(run, args.num_images)
    batches = [to_float(part.to(device)) for part in pixels.split(BATCH)]
    plain = torch.cat([errors(tokenizer, tokenizer.encode(images), images) for images in batches])
    rows = [{"nearest": 0, "passes": 1, "psnr": round(to_db(plain.mean()).item(), 3)}]
    print(f"{len(plain):,} held-out images\n{table(rows)}", end="", flush=True)
    if args.bits_a_db:
        labels = torch.as_tensor(labels, device=device)
        ids = torch.cat([tokenizer.encode(images) for images in batches])
        model = Generator.of_run(args.run, "ar", tokenizer, device)
        rows[0] |= {"bits": round(sum(ar_bits(model, ids, labels)), 2)}
        for bits_a_db in args.bits_a_db:
            rows.append(priced(args, run, tokenizer, batches, labels, bits_a_db))
            print(rows[-1], flush=True)
            write(args, rows, len(plain), device)
    for nearest in () if args.bits_a_db else sorted(args.nearest):
        for answer in (False, True)[:1 + ordered]:
            rows.append(measured(tokenizer, batches, nearest, answer))
            print(cells(rows[-1]), flush=True)
            write(args, rows, len(plain), device)


def write(args, rows: list[dict], images: int, device: torch.device) -> None:
    """After each row, since the next one may take as long and be broken off."""
    if args.json:
        checkpoint.write_json(args.json, {**provenance(args.command, device), "seed": 0,
                                          "images": images, "rows": rows})


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
