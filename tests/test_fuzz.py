"""Any settings end in a plan (--dry_run, exit code 0) or in one line (exit code 2), no traceback.

The short form tries about a hundred combinations per command, `-m long` more.
"""

import json
import shutil
from collections import Counter
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from conftest import changed, command, expect_error, expect_ok, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.manifest import DOMAINS
from recipe import TrainConfig

TYPES = get_type_hints(TrainConfig)
SMALL_COUNTS = "0 1 2 3 4 7 8 12 16 64 100 1000".split()
ODD_NUMBERS = [
    *"-1 1e3 0.5 1e-9 nan inf -inf 1e400 1e-320 x 0x10 1_000 ٣".split(),
    "",
    " ",
    str(2**31 - 1),
    str(2**31),
    str(2**63 - 1),
    str(2**63),
    str(10**30),
    "9" * 5000,
]
NUMBERS = SMALL_COUNTS * 4 + ODD_NUMBERS  # most examples must get past the parser
TEXTS = ["", " ", *"nowhere /proc/x a/../b %s{} 日本語 - -- \x00 ~ * None".split(" "), "a" * 300]
ALWAYS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def in_two_forms(short: int, full: int):
    """A test with `examples`: `short` in the default form, `full` in the long form."""
    long_form = pytest.param(full, marks=pytest.mark.long)
    return pytest.mark.parametrize("examples", [short, long_form])


def values(kind) -> st.SearchStrategy[str]:
    """Texts that a flag of this type might be given."""
    if get_origin(kind) is Literal:
        return st.sampled_from([*get_args(kind) * 3, "", "x", "None", "AUTO"])
    if kind is bool:
        return st.sampled_from(["true", "false", "True", "1", "", "maybe"])
    if kind in (int, float):
        numbers = st.sampled_from(NUMBERS)
        return numbers | numbers | st.integers().map(str) | st.floats().map(repr)
    return st.sampled_from(TEXTS) | st.text(st.characters(codec="utf-8"), max_size=20)


def some_of(space: dict) -> st.SearchStrategy[dict[str, str]]:
    """A few settings: of all at once, one would be wrong every time."""

    def settings_of(names):
        return st.fixed_dictionaries({name: space[name] for name in names})

    return st.lists(st.sampled_from(sorted(space)), max_size=3, unique=True).flatmap(settings_of)


def outcome(done, *words: str) -> str:
    """ "plan" or "line"; AssertionError where the command ended in neither."""
    if done.returncode == 0:
        assert all(word in done.stdout for word in words), done.stdout
        return "plan"
    expect_error(done)
    return "line"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    tokens = np.arange(2000) % 250
    splits = {"train": tokens, "val": tokens[:500]}
    return write_shards(tmp_path_factory.mktemp("data"), dict.fromkeys(DOMAINS, splits))


NOT_TRIED = ("data_dir", "dry_run", "doctor")
TRAIN = {
    field.name: values(TYPES[field.name])
    for field in fields(TrainConfig)
    if field.name not in NOT_TRIED
}


@in_two_forms(100, 300)
def test_train(small, examples):
    ended = Counter()

    @settings(ALWAYS, max_examples=examples)
    @given(some_of(TRAIN), st.booleans())
    def check(flags, with_file):
        args = ["config/tiny_cpu.py"] if with_file else []
        args += [f"--data_dir={small}", "--device=cpu", "--block_size=16", "--eval_windows=2"]
        args += [] if "model" in flags else ["--model=tiny"]
        args += [f"--{name}={value}" for name, value in flags.items()]
        done = command("train.py", *args, "--dry_run")
        ended[outcome(done, "model ", "reweight ")] += 1

    check()
    print(f"{ended['plan']} plans, {ended['line']} lines")
    assert min(ended["plan"], ended["line"]) > examples / 8


TEXT_FLAGS = {
    "split": ["train=train,val=val", "train=train", "train", "=", ",", "val=train,train=val"],
    "schema": [
        "text=text,constant=web",
        "text=text,domain=meta.redpajama_set_name",
        "text",
        "text=a.b",
    ],
    "domains": ["c4", "c4,cc", "", ",", "C4", " c4 , cc "],
    "holdout": ["c4", "cc", "x"],
    "part": ["1/1", "1/2", "2/2", "2/1", "0/0", "/", "1/x"],
    "revision": ["main"],
}
INPUTS = ["{corpus}", "{corpus}/train.jsonl", "{corpus}/*", "{corpus}/no", "", "**", "\x00", "["]
INTEGERS = ("max_tokens_per_domain", "skip_bad", "shard_tokens", "seed", "workers")
PREPARE = {
    "source": st.sampled_from(["files", "files", "files", "sample", "web", ""]),
    "out": values(str),
    "tokenizer": values(Literal[("bytes", "gpt2")]),
    "input": st.sampled_from(INPUTS),
}
PREPARE |= {name: st.sampled_from(texts * 2 + TEXTS) for name, texts in TEXT_FLAGS.items()}
PREPARE |= {name: values(int) for name in INTEGERS}
PREPARE |= {name: st.just(None) for name in ("dedup", "overwrite", "merge")}  # without a value


@in_two_forms(100, 200)
def test_prepare(tmp_path, examples):
    corpus, ended = tmp_path / "corpus", Counter()
    corpus.mkdir()
    row = json.dumps({"text": "a text", "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n"
    for name in ("train", "val"):
        (corpus / f"{name}.jsonl").write_text(row * 20)

    @settings(ALWAYS, max_examples=examples)
    @given(some_of(PREPARE))
    def check(flags):
        args = ["--source=files", f"--out={tmp_path}/out", "--tokenizer=bytes"]
        if flags.get("source", "files") == "files":
            args.append(f"--input={corpus}")
        for name, value in flags.items():
            if value is None:
                args.append(f"--{name}")
            else:
                args.append(f"--{name}={value.replace('{corpus}', str(corpus))}")
        ended[outcome(command("prepare_slimpajama.py", *args, "--dry_run"))] += 1

    check()
    print(f"{ended['plan']} plans, {ended['line']} lines")
    assert min(ended["plan"], ended["line"]) > examples / 8
    assert not (tmp_path / "out").exists()


ODD_VALUES = [
    *(None, True, -1, 0, 1, 2**16, 10**30, 0.5, 1e308),
    *("", "x", "/etc/hostname", "..", "\ud800"),
    *([], {}, [[]], {"a": 1}, [None]),
    ...,  # removed
]


def places_in(content, place=()) -> list[tuple]:
    """Every place in nested dictionaries and lists."""
    if isinstance(content, dict):
        inside = content.items()
    elif isinstance(content, list):
        inside = enumerate(content)
    else:
        inside = ()
    places = [place]
    for key, value in inside:
        places += places_in(value, (*place, key))
    return places


@in_two_forms(100, 200)
def test_manifest(small, tmp_path, examples):
    """A manifest.json with a value changed or removed, or with bytes of its text replaced."""
    shutil.copytree(small, tmp_path / "d")
    path, ended = tmp_path / "d" / "manifest.json", Counter()
    whole = path.read_bytes()
    manifest = json.loads(whole)
    args = ["config/tiny_cpu.py", f"--data_dir={tmp_path}/d", "--block_size=16", "--device=cpu"]
    args.append("--dry_run")

    @settings(ALWAYS, max_examples=examples)
    @given(
        st.sampled_from(places_in(manifest)),
        st.sampled_from(ODD_VALUES),
        st.integers(0, len(whole) - 1),
        st.booleans(),
        st.sampled_from([b"", b"{", b"\xff", b"9", b'"', b"-", b"]"]),
    )
    def check(place, value, at, cut, by):
        if cut:
            path.write_bytes(whole[:at] + by + whole[at + 1 :])
        else:
            path.write_text(json.dumps(changed(manifest, place, value)))
        ended[outcome(command("train.py", *args), "model ")] += 1

    check()
    print(f"{ended['plan']} plans, {ended['line']} lines")
    assert ended["line"] > examples / 2
    path.write_bytes(whole)
    expect_ok(command("train.py", *args))
