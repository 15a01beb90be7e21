"""Config files and flags into a frozen dataclass, both checked by the same code.

    python train.py config/a.py config/b.py --key=value --key value

A config file holds plain Python assignments; they become flags placed before the user's own, so later files win over
earlier ones and the command line wins over all. The comment behind a field of the dataclass is its text in --help.
"""

import argparse
import inspect
import re
import runpy
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

from errors import UserError, nearest

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError of one line; an unknown flag names the nearest known one."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            what = "flag" if unknown[0].startswith("-") else "argument"
            hint = nearest(unknown[0].split("=")[0], known)
            raise UserError(f"unknown {what} {unknown[0]!r}{hint} (--help lists all)")
        for action in self._actions:  # argparse drops the value "--" of a flag
            if action.nargs is None and getattr(found, action.dest, None) == []:
                self.error(f"{action.option_strings[0]}: '--' is not a value")
        return found

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')} (--help lists all flags)")


def parse(cls: type[Config], doc: str, argv: list[str]) -> Config:
    """The dataclass `cls` from config files (arguments ending in .py) and flags; raises UserError."""
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.MULTILINE))
    types, parser = get_type_hints(cls), Parser(doc)
    for field in fields(cls):
        kind = types[field.name]
        choices = get_args(kind) if get_origin(kind) is Literal else None
        given_bare = {"nargs": "?", "const": True} if kind is bool else {}
        parser.add_argument(f"--{field.name}", choices=choices, default=field.default, **given_bare,
                            type=_boolean if kind is bool else str if choices else kind,
                            metavar=None if choices else kind.__name__.upper(),
                            help=f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%"))
    with_value = {f"--{field.name}" for field in fields(cls) if types[field.name] is not bool}
    is_file = [a.endswith(".py") and not a.startswith("-") and (i == 0 or argv[i - 1] not in with_value)
               for i, a in enumerate(argv)]
    flags = [flag for arg, file in zip(argv, is_file, strict=True) if file for flag in read_file(arg, parser)]
    values = parser.parse_args(flags + [arg for arg, file in zip(argv, is_file, strict=True) if not file])
    return cls(**vars(values))


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")
    return text.lower() == "true"


def read_file(path: str, parser: Parser) -> list[str]:
    """A config file's assignments as flags, checked on their own so that an error can name the file."""
    if not Path(path).is_file():
        raise UserError(f"config file {path} not found")
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is about the file
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: {type(error).__name__}: {reason}") from None
    names = {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, ModuleType)}
    for name, value in names.items():
        if not isinstance(value, str | int | float):
            raise UserError(f"{path}: {name} = {value!r}: must be a string, a number or a boolean")
        if isinstance(value, int) and value.bit_length() > 64:  # Python itself refuses to print 5,000 digits
            raise UserError(f"{path}: {name}: a number of {value.bit_length():,} bits is too large")
    flags = [f"--{name}={value}" for name, value in names.items()]
    try:
        parser.parse_args(flags)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return flags
