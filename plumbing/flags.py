"""Dataclasses as command lines: one field, one flag, and one line for a person's mistake.

In       dataclasses of settings, such as the three of config.py, and sys.argv
Out      their instances; UserError and need for everything that the person at the keyboard can mend
Differs  from argparse alone: the comment behind a field is its help text, no flag can be shortened,
         and a wrong one gets one line. The standard library is enough
"""
import argparse
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import shlex
import sys

DEVICES = ("auto", "cpu", "cuda", "mps")  # values of --device


class UserError(Exception):
    """Something that the person at the keyboard can mend; shown as one line, exit code 2."""


def need(condition, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def at_least_one(cfg, *names: str) -> None:
    for name in names:
        need(getattr(cfg, name) >= 1, f"{name} {getattr(cfg, name)} must be at least 1")


def sizes(cfg, *names: str, most: int = 2 ** 20) -> None:
    """Of a network: beyond `most` nothing fits into a memory, and torch's sums overflow."""
    at_least_one(cfg, *names)
    for name in names:
        value = getattr(cfg, name)
        need(value <= most, f"{name} {value} is out of range; give 1 to {most:,}")


def shares(cfg, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        need(0 <= value <= 1, f"{name} {value} is a share; give a number from 0 to 1")


def below_one(cfg, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        need(0 <= value < 1, f"{name} {value} must be 0 or above, and below 1")


def not_negative(cfg, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        need(0 <= value < math.inf, f"{name} {value} must be 0 or above")


def need_seed(seed: int, name: str = "seed") -> None:
    need(0 <= seed < 2 ** 32, f"{name} {seed} must be 0 or above, and below {2 ** 32}")


def choose(name: str, value: str, options) -> None:
    need(value in options, f"{name} {value!r} is unknown; choose one of {', '.join(options)}")


# Settings of older versions that are constants by now. A file that still names one means the same.
CONSTANTS = {"commitment_weight": 0.25, "generator_beta2": 0.95, "generator_weight_decay": 0.05,
             "generator_min_learning_rate": 1e-4,
             "label_dropout": 0.1, "perceptual_weight": 0.0, "adversarial_weight": 0.0,
             "adversarial_start": 20000, "adversarial_warmup": 1000}


def without_constants(values: dict) -> dict:
    """Field values by name, without those that no other value of was ever wanted, and without
    cell_size, which follows from dvae_mults and always had to agree with it."""
    return {name: value for name, value in values.items()
            if CONSTANTS.get(name) != value and name != "cell_size"}


def build(configs: tuple[type, ...], values: dict) -> tuple:
    """Field values by name, any subset -> one instance of each dataclass.

    Raises UserError for an unknown name or a value of another type.
    """
    values = without_constants(values)
    known = {f.name for config in configs for f in dataclasses.fields(config)}
    unknown = sorted(set(values) - known)
    need(not unknown, f"unknown setting {', '.join(unknown)}")
    # JSON has no tuples, so a list that comes back from a file becomes one again.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for config in configs:
        for f in dataclasses.fields(config):
            given = values.get(f.name, f.default)
            kind = type(f.default)
            fits = type(given) is kind or (type(given) is int and kind is float)
            need(fits, f"{f.name} {given!r} is not a {kind.__name__}")
            # Far beyond any setting, and below what timers and torch's sums can hold.
            for value in given if kind is tuple else (given,):
                need(kind is str or abs(value) < 2 ** 32 or value != value,
                     f"{f.name} {value} is out of range; it must be below {2 ** 32}")
    instances = []
    for config in configs:
        names = [f.name for f in dataclasses.fields(config) if f.name in values]
        instances.append(config(**{name: values[name] for name in names}))
    return tuple(instances)


def as_dict(*configs) -> dict:
    """Configurations -> one flat dictionary of plain values, for JSON and checkpoints."""
    values = {}
    for config in configs:
        values.update(dataclasses.asdict(config))
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()}


def as_flags(values: dict) -> list[str]:
    """Field values by name -> the command-line words that set them: the way back from add_flags."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


@functools.cache  # finding a class in its file takes longer than all else that a Parser does
def help_lines(config) -> dict:
    """{field name: the comment behind the field, or the one right above it where it is long}."""
    found, above = {}, []
    sources = [inspect.getsource(cls) for cls in config.__mro__ if dataclasses.is_dataclass(cls)]
    for line in "\n".join(sources).splitlines():
        field = re.match(r"    (\w+): [^#]*(?:  # (.*))?$", line)
        comment = re.match(r"    # (.*)$", line)
        if field:
            found[field[1]] = field[2] or " ".join(above)
        above = [*above, comment[1]] if comment else []
    return found


def number(kind: type, low: float = 0, high: float = 1e9):
    """For argparse: text -> a `kind` from `low` to `high`. Neither nan nor inf passes."""
    def read(text: str):
        value = kind(text)
        if not low <= value <= high:
            limits = f"give {kind(low)} to {high:.10g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; {limits}")
        return value
    # argparse then says: invalid int value: 'x'
    read.__name__ = kind.__name__
    return read


class Parser(argparse.ArgumentParser):
    """argparse that takes no shortened flags; a wrong one gets one line and exit code 2.

    prog is what one types, such as "python train.py"; .command of what it parses is the whole line.

    Nor does it take an empty value, which a shell makes of a variable that is not set: read as
    "not given" it would do something else than was asked for. Flags that are empty by default may
    be given so.
    """

    def __init__(self, **kwargs):
        self.may_be_empty = set()  # flags that add_flags has made
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        words = sys.argv[1:] if args is None else args
        parsed.command = f"{self.prog} {shlex.join(map(str, words))}"
        for action in self._actions:
            if not action.option_strings:  # words for another program
                continue
            given = getattr(parsed, action.dest, None)
            for value in given if isinstance(given, list) else [given]:
                empty = isinstance(value, str) and not value.strip()
                need(not empty or action.default == "" or action.dest in self.may_be_empty,
                     f"--{action.dest} is empty; give a value or leave it out "
                     "(is a variable of the shell not set?)")
        return parsed

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def add_flags(parser: Parser, configs: tuple[type, ...]) -> None:
    """One flag per field of the dataclasses; flags that are not given stay out of the namespace."""
    for config in configs:
        group, lines = parser.add_argument_group(config.__name__), help_lines(config)
        for f in dataclasses.fields(config):
            help_text = f"{lines[f.name]} (default: {f.default})".replace("%", "%%")
            if isinstance(f.default, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(f.default, tuple):
                kind = dict(type=int, nargs="+", metavar="N")
            else:
                kind = dict(type=type(f.default), metavar=type(f.default).__name__.upper())
            group.add_argument(f"--{f.name}", help=help_text, default=argparse.SUPPRESS, **kind)
            if f.default == "":
                parser.may_be_empty.add(f.name)


def read_run(folder: str) -> dict:
    """config.json of a run -> its flat dictionary, "preset" included.

    Raises UserError when it is missing or torn.
    """
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        if not isinstance(values, dict) or "preset" not in values:
            raise ValueError("it names no preset")
        return values
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run: it has no config.json; "
                        "give a folder that train.py has made") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; "
                        "restore it or repeat train.py with --preset") from None


def parse_command(parser: Parser, presets: dict, default: str, configs: tuple[type, ...],
                  stages: tuple[int, ...], argv=None) -> tuple[argparse.Namespace, tuple]:
    """The command line of a training program -> .run .preset .stage .device, and its settings.

    Later wins: default, preset, flag. A run folder that exists stands for the preset it was made
    with, and for the settings that were given then.
    """
    add = parser.add_argument
    add("--preset",
        help=f"settings to start from (default: those of an existing --run, else {default})")
    add("--run", help="folder of this run (default: runs/PRESET)")
    add("--stage", type=int, choices=stages,
        help="only this stage (default: all that are not finished yet)")
    add("--device", choices=DEVICES, default="auto",
        help="where to compute (default: a GPU if there is one)")
    add_flags(parser, configs)
    flags = vars(parser.parse_args(argv))
    del flags["command"]
    args = argparse.Namespace(**{name: flags.pop(name)
                                 for name in ("run", "preset", "stage", "device")})
    args.run = args.run or os.path.join("runs", args.preset or default)
    values, found = {"preset": args.preset or default}, None
    if os.path.exists(os.path.join(args.run, "config.json")):
        try:
            found = read_run(args.run)
        except UserError:
            if args.preset is None:
                raise
            # else a torn config.json is written anew
    if found:
        need(found["preset"] in presets, f"{args.run} has preset {found['preset']}, which this "
             f"program does not know ({', '.join(presets)}); give another folder with --run")
        values = values if args.preset else found
    args.preset = values.pop("preset")
    choose("preset", args.preset, presets)
    return args, build(configs, {**presets[args.preset], **values, **flags})


def read_log(folder: str) -> list[dict]:
    """The rows of a run's log.jsonl, without those that a kill has torn; none without a log."""
    try:
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and "phase" in row]
