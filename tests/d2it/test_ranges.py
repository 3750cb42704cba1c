"""Every setting of both systems, with values that nobody can mean: one line, or it works."""
import dataclasses

import pytest
import torch

import config
from d2it import presets
from d2it.dvae import DVAE
from loop import learning_rate
from plumbing.flags import UserError

SYSTEMS = {"train.py": config, "d2it.train": presets}
ABSURD = {int: ("-1", "0", "99999999999999", "18446744073709551616", "1.5", "many"),
          float: ("-1", "nan", "inf", "-inf", "1e300", "many"),
          tuple: ("0", "-3", "99999999999999", "1.5"), str: ("absurd", "\0"), bool: ()}
# What both have is tried in one of them: it is one class, with one set of checks.
FIELDS = [(system, field) for system, module in SYSTEMS.items() for c in module.CONFIGS
          for field in dataclasses.fields(c)
          if module is config or field not in dataclasses.fields(config.RunConfig)]


def refusal(module, *words) -> str | None:
    """Why the command line is refused, None if it is not; any other error is the test's."""
    try:
        module.parse_run("", list(words))
    except (UserError, SystemExit) as error:
        assert not isinstance(error, SystemExit) or error.code == 2
        return str(error)
    return None


@pytest.mark.parametrize("system, field", FIELDS, ids=[f"{s}-{f.name}" for s, f in FIELDS])
def test_an_absurd_value_is_refused_or_taken_never_an_error_of_python(system, field, capsys):
    kind = type(field.default)
    for value in ABSURD[kind]:
        said = refusal(SYSTEMS[system], f"--{field.name}", value) or "taken"
        said = capsys.readouterr().err or said
        assert said.count("\n") <= 1 and "Traceback" not in said
        if value in ("nan", "inf", "-inf", "many", "1e300", "99999999999999",
                     "18446744073709551616", "1.5") or (value == "-1" and kind is float):
            assert field.name in said, f"--{field.name} {value}: {said}"


def test_both_systems_say_the_same_of_what_they_share():
    for name, value in (
            ("seed", "4294967296"), ("beta2", "1"), ("beta2", "-0.1"), ("ema_decay", "1.1"),
            ("batch_size", "0"), ("workers", "5000"), ("precision", "fp8"), ("optimizer", "sgd"),
            ("timeout", "0"), ("warmup_steps", "-1"), ("holdout", "0"), ("grad_clip", "nan")):
        first, second = (refusal(module, f"--{name}", value) for module in SYSTEMS.values())
        assert first == second is not None and name in first


@pytest.mark.parametrize("width, mults, near", (
    (36, (1, 2, 2, 4), 40), (132, (1, 2, 2, 4), 160), (48, (1, 2, 3, 4), 64), (6, (1, 1, 1, 1), 8),
    (44, (1, 3, 4, 5), 64), (40, (1, 2, 2, 4), None), (4, (2, 2, 2, 2), None)))
def test_a_width_that_cannot_be_normed_is_refused_with_one_that_can(width, mults, near):
    words = ["--dvae_mults", *map(str, mults), "--dvae_width"]
    said = refusal(presets, *words, str(width))
    assert said is None if near is None else said.endswith(f"try --dvae_width {near}")
    with torch.device("meta"):  # GroupNorm refuses what is not equal
        DVAE(presets.parse_run("", [*words, str(near or width)]).dvae)


@pytest.mark.parametrize("peak", (0, 1e-6, 1e-4, 1.0))
def test_no_rate_is_above_its_peak(peak):
    rates = [learning_rate(step, 40, peak, 1e-5, 10) for step in range(40)]
    assert max(rates) <= peak and rates[-1] >= min(peak, 1e-5)
