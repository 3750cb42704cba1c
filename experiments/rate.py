"""Does it pay to charge the encoder for bits while it learns? The rate term of RDVQ.

A finished tokenizer learns on, its codebook frozen, with one more term:

    loss = what it was + price * rate
    rate = the sum over tokens i and codes k of  q_i(k) * -log p(k | tokens before i),  in nats
    q_i  = softmax(z_i . e_k / SOFT): a soft choice in place of the hard one, which has no gradient

p is the run's AR model without a class. It has learned the tokens before this begins, and learns
on with them. The gradient reaches the token that is guessed, through its distances to the codes.
Then a new AR model learns the ids of all training images, and says what they cost now.

Paper    RDVQ, arXiv 2604.10546, from where the order of the stages is; all numbers are ours
Run      python -m experiments.rate --run runs/NAME --bits_a_db 1e9 53 27 --json FILE
         (R bits are worth as much as one dB; 1e9, first: none, the control that learns on for as
         long)
Makes    a table, a row for each R; RUN-rate-R/, a run with the tokenizer and its new AR model;
         --json FILE
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import math
import os

import torch
from torch import Tensor, nn

from config import CONFIGS
from evaluation.intervention import BATCH, errors
from experiments.order import ar_bits
from experiments.search import learn_ar, run_beside
from generator import Generator
from loop import Loop, make_ema, new_optimizer
from losses import reconstruction, to_db
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.batches import ImageStream
from plumbing.flags import DEVICES, Parser, need, number
from plumbing.images import to_float
from plumbing.outputs import JSON, need_places
from plumbing.processes import Processes, need_one_process, provenance
from plumbing.run import held_out, open_run
from quantizer import VectorQuantizer

SOFT = 0.03  # of the soft choice: a code 0.03 nearer in cosine counts e times as much


class Charging(VectorQuantizer):
    """The quantizer, with one more term: what an AR model pays for the tokens, in nats an image."""
    prior: Generator

    def losses(self, z: Tensor, ids: Tensor) -> dict[str, Tensor]:
        terms = super().losses(z, ids)
        if self.training:
            no_class = torch.full((len(ids),), self.prior.num_classes, device=ids.device)
            nats = -self.prior(no_class, ids[:, :-1]).float().log_softmax(dim=-1)  # (B, L, K)
            soft = (z @ self.codes().T / SOFT).softmax(dim=-1)
            terms["rate"] = (soft * nats).sum(dim=(1, 2)).mean()
        return terms


def charged(model: NativeTok, prior: Generator) -> NativeTok:
    """The tokenizer with such a quantizer; the AR model learns with it."""
    plain, model.quantizer = model.quantizer, Charging(model.cfg)
    model.quantizer.load_state_dict(plain.state_dict())
    model.quantizer.prior = prior
    for part in (model, prior):
        part.requires_grad_(True)
    model.quantizer.codebook.requires_grad_(False)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Those of the tokenizer, without the AR model's."""
    return {name: value for name, value in model.state_dict().items()
            if not name.startswith("quantizer.prior.")}


def learn_on(run, model: NativeTok, price: float, steps: int, device: torch.device) -> NativeTok:
    """-> the averaged weights after so many steps."""
    train = run.configs[-1]
    # A third of the rate that it began with: it has been learned already.
    optim = train.optim(steps, train.learning_rate / 3)
    optimizer = new_optimizer(model, train.optimizer, optim.weight_decay, optim.beta2,
                              train.muon_learning_rate / train.learning_rate)
    torch.manual_seed(train.seed)
    loop = Loop(model.to(device), make_ema(model), optimizer, optim, name="rate",
                ema_decay=train.ema_decay, grad_clip=train.grad_clip)
    stream = ImageStream(run.data, run.configs[0].image_size, optim.batch_size,
                         seed=train.seed + 1, flip=train.flip)
    for pixels, _ in loop.over(stream):
        images = to_float(pixels)
        recon, _, terms = model(images)
        pixel = reconstruction(recon, images)
        loss = (pixel + 0.25 * terms["commitment"] + price * terms["rate"]
                + run.configs[0].entropy_weight * terms.get("entropy", 0.0))
        loop.backward(loss, {"pixels": pixel, "rate": terms["rate"]})
    return loop.ema


def row_of(args, run, batches: list[Tensor], labels: Tensor, bits_a_db: float) -> dict:
    """Learn on at this price, let a new AR model learn the ids -> a row."""
    device = labels.device
    folder = run_beside(args.run, f"rate-{bits_a_db:g}")
    path = os.path.join(folder, "tokenizer.pt")
    model = NativeTok.of_run(args.run, device)
    before = torch.cat([errors(model, model.encode(images), images) for images in batches]).mean()
    saved, charge = checkpoint.load(path), {"bits_a_db": bits_a_db, "steps": args.steps}
    need(saved.get("charged") in (None, charge), f"{folder} has learned on for another number of "
         "steps; delete it, or give --steps as then")
    if "charged" not in saved:
        prior = Generator.of_run(args.run, "ar", model, device)
        price = before.item() * math.log(10) / 10 / bits_a_db / math.log(2)  # of a nat
        model = learn_on(run, charged(model, prior), price, args.steps, device)
        weights = weights_of(model)
        checkpoint.save(path, {**saved, "model": weights, "ema": weights, "charged": charge})
    model = NativeTok.of_run(folder, device)
    learn_ar(folder, run, args.device)
    ids = torch.cat([model.encode(images) for images in batches])
    error = torch.cat([errors(model, *pair) for pair in zip(ids.split(BATCH), batches)])
    bits = ar_bits(Generator.of_run(folder, "ar", model, device), ids, labels)
    return {"bits_a_db": bits_a_db, "steps": args.steps,
            "psnr": round(to_db(error.mean()).item(), 3), "bits": round(sum(bits), 2)}


def table(rows: list[dict]) -> str:
    """Markdown. The first row is the control; what the others save and lose is against it."""
    free, *priced = rows
    lines = ["| a dB is worth | PSNR | AR bits | bits saved | dB lost | saved for each dB |",
             "|---|---|---|---|---|---|",
             f"| no price | {free['psnr']:.2f} dB | {free['bits']:.1f} | | | |"]
    for row in priced:
        saved, lost = free["bits"] - row["bits"], free["psnr"] - row["psnr"]
        lines.append(f"| {row['bits_a_db']:g} bits | {row['psnr']:.2f} dB | {row['bits']:.1f} | "
                     f"{saved:.1f} | {lost:.2f} | {saved / lost if lost else math.inf:.0f} |")
    return "\n".join(lines) + "\n"


def parse(argv=None):
    parser = Parser(prog="python -m experiments.rate", description=__doc__)
    add = parser.add_argument
    add("--run", required=True, help="folder of a run of train.py with an AR model")
    add("--bits_a_db", type=number(float, 0.001), nargs="+", required=True, metavar="R",
        help="so many bits are worth one dB; the first must be 1e9, no price")
    add("--steps", type=number(int, 1), default=400, help="to learn on for (default: 400)")
    add("--num_images", type=number(int, 1), default=10000, metavar="N",
        help="held-out images (default: 10000)")
    add("--device", choices=DEVICES, default="auto")
    add("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args(argv)
    need(args.bits_a_db[0] >= 1e9, "--bits_a_db begins with 1e9, no price: the control that all "
         "others are held against")
    return args


def main(args) -> None:
    need_one_process("experiments.rate")
    device = Processes(args.device).device
    need_places({"--json": (args.json, JSON)})
    run = open_run(args.run, CONFIGS)
    pixels, labels = held_out(run, args.num_images)
    batches = [to_float(part.to(device)) for part in pixels.split(BATCH)]
    rows = []
    for bits_a_db in args.bits_a_db:
        rows.append(row_of(args, run, batches, torch.as_tensor(labels, device=device), bits_a_db))
        print(rows[-1], flush=True)
        if args.json:
            checkpoint.write_json(args.json, {**provenance(args.command, device),
                                              "seed": run.configs[-1].seed,
                                              "images": len(labels), "rows": rows})
    print(table(rows), end="")


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
