"""Command lines: config files and flags become a dataclass, a user's mistake becomes one line.

    python train.py config/a.py config/b.py --key=value --key value

A config file holds plain Python assignments. They become flags placed before the user's own, so
later files win over earlier ones and the command line wins over all; files and flags are checked
by the same code. In the dataclass, the comment behind a field is its text in --help, and a comment
of the form "Title: a sentence." that begins a block of fields is the title of their group.

Raise `UserError` for a mistake: what was given, what is allowed and what to do. It is printed as
one line and the exit code is 2. The same goes for what the machine refuses (a full disk, a missing
permission). Any other exception is a bug of ours and keeps its traceback; `python -X dev train.py
...` shows the traceback of everything.
"""

import argparse
import errno
import inspect
import os
import re
import runpy
import select
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tqdm import tqdm

Config = TypeVar("Config")

# What to do about each OSError that is the machine's and no bug of ours, by its errno.
NO_ROOM = "what was finished is kept: make room and run the same command again"
NOT_ALLOWED = "give a place that may be read and written"
WRONG_PATH = "give another path"
TOO_MANY_FILES = "allow more open files: ulimit -n"
BAD_DISK = "look at the disk or its mount, then run the same command again"
REMEDIES = {
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: NO_ROOM,
    errno.EFBIG: NO_ROOM,
    errno.EACCES: NOT_ALLOWED,
    errno.EPERM: NOT_ALLOWED,
    errno.EROFS: NOT_ALLOWED,
    errno.ENOENT: WRONG_PATH,
    errno.ENOTDIR: WRONG_PATH,
    errno.EISDIR: WRONG_PATH,
    errno.EEXIST: WRONG_PATH,
    errno.ENOTEMPTY: WRONG_PATH,
    errno.ELOOP: WRONG_PATH,
    errno.ENAMETOOLONG: WRONG_PATH,
    errno.EMFILE: TOO_MANY_FILES,
    errno.ENFILE: TOO_MANY_FILES,
    errno.EIO: BAD_DISK,
    errno.ESTALE: BAD_DISK,
    errno.ENXIO: BAD_DISK,
    errno.ENODEV: BAD_DISK,
    errno.ENOTCONN: BAD_DISK,
}
# Exit codes, as a shell gives them for SIGINT and SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a config file, a data folder, a checkpoint."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """ "; did you mean 'NAME'?" with the allowed name closest to `name`; "" where none is close."""
    match = get_close_matches(name, list(allowed), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


# Parsing


class Parser(argparse.ArgumentParser):
    """argparse that raises a one-line UserError and suggests the nearest known flag."""

    def __init__(self, doc: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=formatter, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known_flags = [flag for action in self._actions for flag in action.option_strings]
            what = "flag" if unknown[0].startswith("-") else "argument"
            hint = nearest(unknown[0].split("=")[0], known_flags)
            if what == "argument" and Path(f"config/{unknown[0]}.py").is_file():
                hint = f"; did you mean 'config/{unknown[0]}.py'?"
            elif unknown[0].split("=")[0] == "--config":
                hint = "; a config file is given without a flag: config/gpt2_124m.py"
            raise UserError(f"unknown {what} {unknown[0]!r}{hint} (--help lists all)")
        for action in self._actions:  # argparse drops the value "--" of a flag
            if action.nargs is None and getattr(values, action.dest, None) == []:
                self.error(f"{action.option_strings[0]}: '--' is not a value")
        for name, value in vars(values).items():
            if name != "prompt":  # the one text of a user that is no path and may begin so
                setattr(values, name, expand_home(value))
        return values

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')} (--help lists all flags)")


def expand_home(value: Any) -> Any:
    """~/x in a flag or config file, where no shell has expanded it, as in --out_dir=~/x."""
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    if isinstance(value, Path) and str(value).startswith("~/"):
        return value.expanduser()
    return value


def parse(cls: type[Config], doc: str, argv: list[str]) -> Config:
    """The dataclass `cls` from config files (arguments ending in .py) and flags."""
    types = get_type_hints(cls)
    parser = Parser(doc)
    add_flags(parser, cls, types)
    flags_with_value = {f"--{name}" for name, kind in types.items() if kind is not bool}
    from_files, from_user = [], []
    before = ""
    for argument in argv:
        is_value = before in flags_with_value
        if argument.endswith(".py") and not argument.startswith("-") and not is_value:
            from_files += read_config_file(argument, parser)
        else:
            from_user.append(argument)
        before = argument
    return cls(**vars(parser.parse_args(from_files + from_user)))


def add_flags(parser: Parser, cls: type, types: dict[str, type]) -> None:
    """A flag for each field of a dataclass, in the groups of its source code."""
    help_texts, groups = read_comments(cls)
    group = parser
    for field in fields(cls):
        if field.name in groups:
            title, sentence = groups[field.name]
            group = parser.add_argument_group(title, sentence)
        add_flag(group, field, types[field.name], help_texts.get(field.name, ""))


def add_flag(group: Any, field: Field, kind: type, help_text: str) -> None:
    text = f"{help_text} (default: {field.default!r})".replace("%", "%%")
    options = {"default": field.default, "help": text}
    if get_origin(kind) is Literal:
        options |= {"type": str, "choices": get_args(kind)}
    elif kind is bool:  # --dry_run, --dry_run true and --dry_run=false
        options |= {"type": boolean, "metavar": "BOOL", "nargs": "?", "const": True}
    else:
        options |= {"type": kind, "metavar": kind.__name__.upper()}
    group.add_argument(f"--{field.name}", **options)


def read_comments(cls: type) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """The help text of each field, and (title, sentence) of each group by its first field."""
    source = inspect.getsource(cls)
    help_texts = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.MULTILINE))
    titles = re.findall(r"^    # ([^:\n]+): (.+)\n    (\w+):", source, re.MULTILINE)
    groups = {first_field: (title, sentence) for title, sentence, first_field in titles}
    return help_texts, groups


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")
    return text.lower() == "true"


def read_config_file(path: str, parser: Parser) -> list[str]:
    """A config file's assignments as flags, checked so that an error names the file."""
    if not Path(path).is_file():
        others = [str(other) for other in Path(path).parent.glob("*.py")]
        raise UserError(f"config file {path} not found{nearest(path, others)}")
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # user code may raise anything
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: {type(error).__name__}: {reason}") from None
    flags = []
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, ModuleType):
            continue
        if not isinstance(value, str | int | float):
            raise UserError(f"{path}: {name} = {value!r}: must be a string, a number or a boolean")
        # Python itself refuses to print an integer of 5,000 digits.
        if isinstance(value, int) and value.bit_length() > 64:
            raise UserError(f"{path}: {name}: a number of {value.bit_length():,} bits is too large")
        flags.append(f"--{name}={value}")
    try:
        parser.parse_args(flags)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return flags


# Running


def run(main: Callable[[], None]) -> None:
    """Run a script's main function; a UserError becomes one line and exit code 2.

    torchrun ends all processes soon after one has ended. So rank 0 reports at once, and another
    rank only if it is still alive after three seconds: then that rank alone has seen the mistake.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # A path may hold bytes that are not text, and a terminal may lack a letter.
        sys.stdout.reconfigure(errors="backslashreplace")
    rank = os.environ.get("RANK", "0")
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()  # report a failing write here, not at the interpreter's exit
    except KeyboardInterrupt:
        if rank == "0":  # every rank receives it
            print_error("interrupted")
        sys.exit(INTERRUPTED)
    except (UserError, MemoryError, OSError) as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            sys.exit(BROKEN_PIPE)
        text = one_line(error)
        if text is None or sys.flags.dev_mode:
            raise
        if rank == "0":
            print_error(f"error: {text}")
        else:
            time.sleep(3)
            print_error(f"error (rank {rank}): {text}")
        sys.exit(2)
    finally:
        flush_or_discard()


def one_line(error: Exception) -> str | None:
    """What to print instead of a traceback; None for an OSError that may be a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        reason = str(error) or "no more available"
        return f"out of memory ({reason}); make the batch, the model or --workers smaller"
    if error.errno not in REMEDIES:
        return None
    if error.errno == errno.ENOENT and not error.filename:
        return None
    where = ""
    if isinstance(error.filename, str | bytes | os.PathLike):
        where = f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror}; {REMEDIES[error.errno]}"


class Progress(tqdm):
    """tqdm's bar on a terminal; in a log file a line every LINE_S seconds, no carriage returns."""

    LINE_S = 10.0

    def __init__(self, *args, **options):
        if not sys.stderr or not sys.stderr.isatty():
            options["mininterval"] = options["maxinterval"] = self.LINE_S
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What tqdm prints its bar with."""
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(text: str) -> None:
            if text.strip():
                print(text.strip(), file=file, flush=True)

        return print_line


def print_error(line: str) -> None:
    """A line of its own on standard error, even while a progress bar is drawn."""
    try:
        tqdm.write(line, file=sys.stderr)
        if sys.stderr:
            sys.stderr.flush()
    except OSError:  # nobody reads standard error
        pass


def reader_is_gone() -> bool:
    """Whether the program that our output is piped into has ended, as `head` does."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        try:
            poll.register(stream, 0)
        except (ValueError, OSError, TypeError):  # the stream is closed, or absent
            continue
    closed = select.POLLERR | select.POLLHUP
    return any(event & closed for _, event in poll.poll(0))


def flush_or_discard() -> None:
    """Flush the output streams; where the reader is gone, avoid Python's traceback at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
