"""Every public function that takes a tensor takes it in any layout, with any number of rows.

The models of test_types.py run, and the calls of all public functions are noted. Then each is made
again with the same values, which lie otherwise in memory: transposed, cut out of a larger tensor,
every second one of a longer row, one row for all. Results equal those of contiguous tensors up to
the rounding of another kernel, 1e-5 of their largest number in float32 and 2% in bfloat16; and at
most one id in ten may be another one, where a choice was that close.
"""
import copy
import functools
import importlib
import inspect

import pytest
import test_types
import torch
from test_types import CLASSES, made, some
from torch import Tensor, nn

import flow_decoder
import losses
import nativetok
import quantizer
from d2it import diffusion, grain
from flow_decoder import Decoding, FlowDecoder
from layers import Attention, rotary_table

FILES = ("layers", "mit", "mocet", "titok", "quantizer", "decoder", "nativetok", "generator",
         "losses", "diffusion", "flow_decoder", "d2it.grain", "d2it.dvae", "d2it.diffusion",
         "d2it.content", "d2it.model")
MODULES = [importlib.import_module(file) for file in FILES]
MODELS = [name for name in test_types.MODULES if name not in ("TinyCNN", "FIDInceptionV3")]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.02}
# It is given a function that draws: what it calls, and what calls it, is called here.
LEFT_OUT = {"diffusion.sample"}


# ------------------------------------------------------------------------------------------------
# what calls each public function

def attention(dtype) -> None:
    module, x = Attention(8, 2).to(dtype), some(test_types.B, 4, 8).to(dtype)
    module(x, torch.ones(4, 4, dtype=torch.bool).tril())
    module(x, causal=True, rotary=rotary_table(4, 4))


def tokenizer(dtype) -> None:
    model = test_types.tokenizer(tail_drop=0.5).to(dtype)
    model.train()(test_types.IMAGES)
    z = some(4 * test_types.B, 4).to(dtype)
    model.quantizer.draw_codebook(z)
    ids = model.tokenize(test_types.IMAGES)[1]
    model.encode(test_types.IMAGES, {0: ids[:, 0]})
    quantizer.usage(ids, 8)
    nativetok.sample_batch(
        test_types.generator("ar").to(dtype), Decoding(model), test_types.LABELS, {}, 0, 0)
    net = made("FlowNet").to(dtype)
    FlowDecoder(model.eval(), net).decode(ids, 2, torch.Generator().manual_seed(0))
    z_q = some(test_types.B, 4, 4).to(dtype)
    flow_decoder.loss(net, test_types.IMAGES, z_q, test_types.IMAGES / 2)


def generators(dtype) -> None:
    ar, maskgit = (test_types.generator(kind).to(dtype) for kind in ("ar", "maskgit"))
    for model in (ar.train(), maskgit.train()):
        model.loss(test_types.IDS, test_types.LABELS)
    draw = torch.Generator().manual_seed(0)
    for use_cache in (True, False):
        ar.sample(test_types.LABELS, 2.0, top_k=3, top_p=0.7, generator=draw, use_cache=use_cache)


def judges(dtype) -> None:
    """What reads pictures, and its losses."""
    a, b = (some(test_types.B, 3, 32, 32).to(dtype) * scale for scale in (0.5, -0.5))
    losses.to_db(losses.mse(a, b))
    losses.reconstruction(a, b), losses.psnr(a, b)


def codes(dtype) -> None:
    """d2it in training, and what it shows."""
    model = made("D2iT").to(dtype)
    model.dvae.measure([test_types.PIXELS])
    model.dvae(test_types.IMAGES, test_types.GRAIN)
    z = model.dvae.encode(test_types.PIXELS).z
    for path in ("noise", "flow"):
        diffusion.loss(model.content.train(), z, test_types.LABELS, test_types.GRAIN, path)
        diffusion.sample(model.content, z, test_types.LABELS, test_types.GRAIN, CLASSES, path, 2,
                         2.0, float(path == "noise"), torch.Generator().manual_seed(0))
    model.draw(test_types.LABELS, {"steps": 2}, 0, 0, test_types.GRAIN)
    model.obeyed(test_types.PIXELS, test_types.GRAIN)
    for policy in grain.POLICIES:
        grain.grain_map(test_types.PIXELS, 8, 2.5, policy)
    grain.count_codes(test_types.GRAIN)
    scores = grain.entropy(test_types.PIXELS, 8)
    grain.threshold(scores, 0.5)
    grain.painted(test_types.PIXELS, test_types.GRAIN), grain.heat(scores, 32)


def everything(dtype) -> None:
    for name in MODELS:
        test_types.answers(name, made(name).to(dtype))
    for scene in (attention, tokenizer, generators, judges, codes):
        scene(dtype)


# ------------------------------------------------------------------------------------------------
# noted, and made again

def takes_a_tensor(function) -> bool:
    return any("Tensor" in str(p.annotation) or "Codes" in str(p.annotation)
               for p in inspect.signature(function).parameters.values())


def public_functions():
    """(owner, name, function): of modules and of their classes, if a tensor is an argument.

    Without LEFT_OUT.
    """
    for module in MODULES:
        own = [thing for thing in vars(module).values()
               if getattr(thing, "__module__", "") == module.__name__]
        for owner in (module, *filter(inspect.isclass, own)):
            for name, part in vars(owner).items():
                function = getattr(part, "__func__", part)
                if (inspect.isfunction(function) and not name.startswith("_")
                        and function.__module__ == module.__name__ and takes_a_tensor(function)
                        and title(function) not in LEFT_OUT):
                    yield owner, name, function


def title(function) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def noted(function, calls: dict):
    """The function, which keeps its arguments: once for each way in which it is called."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        switches = [x for x in (*args, *kwargs.values()) if isinstance(x, (bool, str))]
        key = (title(function), str([len(args), *kwargs, *switches]))
        if key not in calls:
            calls[key] = (function, *copy.deepcopy((args, kwargs)))
        return function(*args, **kwargs)
    return call


def all_calls(dtype) -> dict:
    calls = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for owner, name, function in list(public_functions()):
            call = noted(function, calls)
            is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
            patch.setattr(owner, name, staticmethod(call) if is_static else call)
            for module in (*MODULES, test_types):          # from layers import patchify
                for other, thing in list(vars(module).items()):
                    if thing is function:
                        patch.setattr(module, other, call)
        torch.manual_seed(0)
        everything(dtype)
    return calls


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def cut_out(x: Tensor) -> Tensor:
    larger = torch.cat([x[..., :1], x, x[..., :1]], dim=-1)
    return larger[1:-1] if x.ndim == 1 else torch.cat([larger, larger])[len(x):, ..., 1:-1]


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def first_row_for_all(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def first_column_for_all(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x)


LAYOUTS = (transposed, cut_out, every_second, first_row_for_all, first_column_for_all)


def laid(thing, layout):
    """The same, with all tensors in it in this layout."""
    if isinstance(thing, Tensor):
        return layout(thing) if thing.ndim and thing.numel() else thing
    if isinstance(thing, dict):
        return {key: laid(part, layout) for key, part in thing.items()}
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(laid(part, layout) for part in thing))
    if isinstance(thing, (list, tuple)):
        return type(thing)(laid(part, layout) for part in thing)
    return copy.deepcopy(thing)


def leaves(thing) -> list[Tensor]:
    """The tensors in a result, or in the object that was changed, one after the other."""
    if isinstance(thing, nn.Module):
        return leaves([*thing.state_dict().values(), *vars(thing).values()])
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        return [leaf for part in thing for leaf in leaves(part)]
    return [torch.as_tensor(thing)] if isinstance(thing, (Tensor, int, float)) else []


def answers(function, args, kwargs) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        result = function(*args, **kwargs)
    holder = [] if not args or isinstance(args[0], Tensor) else args[0]
    return leaves(result) + leaves(holder if isinstance(holder, nn.Module) else
                                   getattr(holder, "__dict__", {}))


def alike(told: Tensor, expected: Tensor, rounding: float) -> bool:
    if not expected.is_floating_point():
        return (told != expected).sum() <= expected.numel() / 10
    finite = expected.isfinite()
    off, most = (told - expected)[finite].abs(), expected[finite].abs()
    return (torch.equal(told[~finite].nan_to_num(), expected[~finite].nan_to_num())
            and (not len(off) or off.max() <= rounding * most.max()))


@pytest.mark.parametrize("rows, dtype", [
    (2, torch.bfloat16), (5, torch.float32),
    *(pytest.param(rows, dtype, marks=pytest.mark.faults) for rows, dtype in (
        (1, torch.float32), (1, torch.bfloat16), (2, torch.float32), (3, torch.float32)))],
    ids=str)
def test_any_layout_and_number_of_rows_gives_the_same(rows, dtype, monkeypatch):
    monkeypatch.setattr(test_types, "B", rows)
    for tensor in ("IMAGES", "PIXELS", "LABELS", "GRAIN", "IDS"):
        monkeypatch.setattr(test_types, tensor, getattr(test_types, tensor)[:rows].clone())
    calls = all_calls(dtype)
    wanted = {title(function) for _, _, function in public_functions()}
    assert {name for name, _ in calls} == wanted, "each public function is called"
    for (name, how), (function, args, kwargs) in calls.items():
        for layout in LAYOUTS:
            plain = laid((args, kwargs), lambda x, layout=layout: layout(x).contiguous())
            for expected, told in zip(answers(function, *plain),
                                      answers(function, *laid((args, kwargs), layout)),
                                      strict=True):
                where = f"{name} of {how}, {layout.__name__}"
                assert told.shape == expected.shape and told.dtype == expected.dtype, where
                assert torch.equal(told, expected) or alike(told, expected, ROUNDING[dtype]), where
