"""What Python's users hand to a model, looked at before anything is computed with it.

In       a tensor, or whatever was given in its place; a parameter of the model
Out      nothing, or one line that says what was given and what is taken
Differs  torch's own errors come late and name no argument, and some mistakes run: bytes from 0 to
         255 as floats, class C for "no class", a map of whole numbers as an index
"""
import math

import torch
from torch import Tensor

from plumbing.flags import need

# Images lie in [-1, 1], and a decoder's may go a little beyond; 0 to 255, or ImageNet's means and
# deviations taken out, go farther.
LIMIT = 1.5


def described(x) -> str:
    """float32 (2, 3, 32, 32); ndarray uint8 (32, 32, 3); list of 3; str 'disc'."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    kind = type(x).__name__
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{kind} {x.dtype} {tuple(x.shape)}"
    if isinstance(x, (list, tuple, dict, set)):
        return f"{kind} of {len(x)}"
    text = f"{kind} {x!r}"
    return text if len(text) < 40 else kind


def need_here(what: str, x, model: Tensor, takes: str) -> None:
    """Raise UserError unless x is a tensor that lies where `model`, one of its parameters, does."""
    need(isinstance(x, Tensor), f"{what} are {described(x)}, not a tensor; give {takes}")
    need(x.device == model.device, f"{what} are on {x.device}, and the model is on {model.device}; "
         f"give them .to({str(model.device)!r})")


def need_images(images, size: int, model: Tensor) -> None:
    """Raise UserError unless images are finite floats (B, 3, size, size) in about [-1, 1]."""
    takes = (f"(B, 3, {size}, {size}), floats from -1 to 1, as plumbing.images.to_float makes them "
             "of bytes (B, H, W, 3)")
    need_here("images", images, model, takes)
    # TRAP: larger images would give more patches than there are positions, and an error far
    # from here; patches of the same number in another shape would even run.
    need(images.ndim == 4 and len(images) and images.shape[1:] == (3, size, size)
         and images.is_floating_point(),
         f"images are {described(images)}, this tokenizer takes {takes}")
    # TRAP: of nan the nearest code is number 0, and nobody would see it in the ids.
    low, high = (value.item() for value in images.aminmax())
    need(math.isfinite(low) and math.isfinite(high),
         "images to encode are not finite (nan or inf)")
    need(-LIMIT <= low and high <= LIMIT, f"images to encode go from {low:.3g} to {high:.3g}, this "
         f"tokenizer takes {takes}")


def need_pixels(pixels, size: int, model: Tensor) -> None:
    """Raise UserError unless pixels are bytes (B, size, size, 3)."""
    takes = f"(B, {size}, {size}, 3), uint8, as plumbing.images.to_uint8 makes them of floats"
    need_here("images", pixels, model, takes)
    need(pixels.ndim == 4 and len(pixels) and pixels.shape[1:] == (size, size, 3)
         and pixels.dtype == torch.uint8,
         f"images are {described(pixels)}, this DVAE takes {takes}")


def need_whole_numbers(what: str, x, model: Tensor, takes: str) -> None:
    """Raise UserError unless x is a tensor of whole numbers, at least one."""
    need_here(what, x, model, takes)
    whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    need(whole, f"{what} are {described(x)}, not whole numbers; give {takes}")
    need(x.numel(), f"{what} are {described(x)}, none at all; give {takes}")


def need_ids(ids, most: int, codes: int, model: Tensor) -> None:
    """Raise UserError unless ids are whole numbers (B, k) from 0 to codes - 1, 1 <= k <= most."""
    takes = f"ids (B, k), whole numbers from 0 to {codes - 1}, k from 1 to {most}"
    need(not isinstance(ids, Tensor) or ids.ndim == 2,
         f"ids are {described(ids)}; give {takes}")
    k = ids.shape[1] if isinstance(ids, Tensor) else 1
    need(1 <= k <= most, f"{k} tokens cannot be decoded, only 1 to {most}")
    need_whole_numbers("ids", ids, model, takes)
    low, high = (int(value) for value in ids.aminmax())
    need(0 <= low and high < codes, f"ids go from {low} to {high}; give {takes}")


def need_labels(labels, classes: int, model: Tensor) -> None:
    """Raise UserError unless labels are whole numbers (B,) from 0 to classes - 1."""
    takes = f"labels (B,), whole numbers from 0 to {classes - 1}, the numbers of classes"
    need_whole_numbers("labels", labels, model, takes)
    need(labels.ndim == 1, f"labels are {described(labels)}; give {takes}")
    # TRAP: label C would run, as "no class"; so only 0..C-1 may come in from outside.
    for c in labels.tolist():
        need(0 <= c < classes, f"class {c} is unknown; give one from 0 to {classes - 1}")


def need_map(grain, images: int, side: int, model: Tensor) -> None:
    """Raise UserError unless grain is bool (images, side, side)."""
    takes = f"bool ({images}, {side}, {side}), True where a cell is fine, one map for each image"
    need_here("maps", grain, model, takes)
    need(grain.shape == (images, side, side), f"the map has {tuple(grain.shape[1:])} cells, and "
         f"this run has ({side}, {side}): {described(grain)} was given; give {takes}")
    need(grain.dtype == torch.bool, f"maps are {described(grain)}; give {takes}")


def need_number(name: str, value, low: float = 0, high: float = math.inf, whole: bool = False):
    """Raise UserError unless value is a finite number from low to high, and whole if asked."""
    kinds = int if whole else (int, float)
    need(isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
         and low <= value <= high, f"{name} {value!r} is out of range; give a "
         f"{'whole ' if whole else ''}number from {low:g}" +
         (f" to {high:g}" if math.isfinite(high) else " upwards"))


def need_generator(generator) -> None:
    """Raise UserError unless it is a torch.Generator, or None for torch's own."""
    need(generator is None or isinstance(generator, torch.Generator), f"generator is "
         f"{described(generator)}; give torch.Generator().manual_seed(0), or leave it out")
