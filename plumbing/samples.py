"""What programs that draw samples share: which class is meant, and the file that judges read.

In       the words behind --classes; samples as uint8 images
Out      numbers of classes; an .npz as ADM's evaluator and eval_fid.py read it
"""
import difflib
import os

import numpy as np
from torch import Tensor

from plumbing import checkpoint
from plumbing.archives import kind_of
from plumbing.flags import UserError


def class_number(text: str, names: list[str]) -> int:
    """A name or a number as text -> the class's number. What is both is taken as a name.

    Raises UserError that says which names are close.
    """
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    close = [name for name in names if text.lower() in name.lower()]
    close = close or difflib.get_close_matches(text, names)
    if close:
        hint = f"did you mean {' or '.join(map(repr, close[:3]))}?"
    else:
        few = ", ".join(f"{k} {name}" for k, name in enumerate(names[:5]))
        hint = f"the run has {len(names)} classes: {few}" + (", ..." if len(names) > 5 else "")
    raise UserError(f"class {text!r} is unknown; {hint}")


def write_npz(path: str, images: np.ndarray, labels: Tensor, names: list[str],
              unfinished: str = "") -> list[str]:
    """Write uint8 (n, H, W, 3) and labels (n,) under ADM's names -> what to say of them.

    names        of the classes; with them a judge of another run knows which class was asked for
    unfinished   how far the training of a network had come that was not at its end
    """
    more = {"unfinished": np.array(unfinished)} if unfinished else {}
    with checkpoint.replacing(path) as file:
        np.savez(file, arr_0=images, arr_1=labels.numpy(), classes=np.array(names), **more)
    return [f"{path}: arr_0 {images.dtype} {images.shape}, arr_1 their labels, "
            f"{len(labels.unique())} classes"]


def unfinished_maker(path: str) -> str:
    """What write_npz() was told of an unfinished training; "" of other files and of folders."""
    if not (os.path.isfile(path) and kind_of(path) == "npz"):
        return ""
    with np.load(path, allow_pickle=False) as arrays:
        return str(arrays["unfinished"]) if "unfinished" in arrays else ""
