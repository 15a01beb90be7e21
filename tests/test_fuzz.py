"""Any combination of settings ends in a plan (--dry_run, exit code 0) or in one line (exit code
2), no traceback.
"""

import json
import shutil
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from conftest import command, expect_error, expect_ok, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from recipe import TrainConfig

TYPES = get_type_hints(TrainConfig)
NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "7",
    "8",
    "12",
    "16",
    "64",
    "100",
    "1000",
    "-1",
    "1e3",
    "0.5",
    "1e-9",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "",
    " ",
    "x",
    "0x10",
    "1_000",
    "٣",
    str(2**31 - 1),
    str(2**31),
    str(2**63 - 1),
    str(2**63),
    str(10**30),
    "9" * 5000,
    "1e-320",
]
COUNTS = [
    text for text in NUMBERS if text.isdigit() and len(text) < 5
] * 3 + NUMBERS  # most examples shall get further
TEXTS = [
    "",
    " ",
    "nowhere",
    "/proc/x",
    "a/../b",
    "%s{}",
    "日本語",
    "-",
    "--",
    "\x00",
    "a" * 300,
    "~",
    "*",
    "None",
]
ALWAYS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def values(kind) -> st.SearchStrategy[str]:
    """Texts that a flag of this type might be given."""
    if get_origin(kind) is Literal:
        return st.sampled_from([*get_args(kind) * 3, "", "x", "None", "AUTO"])
    if kind is bool:
        return st.sampled_from(["true", "false", "True", "1", "", "maybe"])
    if kind in (int, float):
        return (
            st.sampled_from(COUNTS)
            | st.sampled_from(COUNTS)
            | st.integers().map(str)
            | st.floats().map(repr)
        )
    return st.sampled_from(TEXTS) | st.text(st.characters(codec="utf-8"), max_size=20)


def some_of(space: dict) -> st.SearchStrategy[dict[str, str]]:
    """A few settings: of all at once, one would be wrong every time."""
    names = st.lists(st.sampled_from(sorted(space)), max_size=3, unique=True)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({name: space[name] for name in chosen})
    )


def plan_or_line(done, *words: str) -> bool:
    """Whether it is a plan; an AssertionError where it is neither that nor one line."""
    if done.returncode == 0:
        assert all(word in done.stdout for word in words), done.stdout
        return True
    expect_error(done)
    return False


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    tokens = np.arange(2000) % 250
    splits = {"train": tokens, "val": tokens[:500]}
    return write_shards(tmp_path_factory.mktemp("data"), dict.fromkeys(data.DOMAINS, splits))


SPACE = {
    f.name: values(TYPES[f.name])
    for f in fields(TrainConfig)
    if f.name not in ("data_dir", "dry_run", "doctor")
}


def test_train(small):
    ended = {True: 0, False: 0}

    @settings(ALWAYS, max_examples=300)
    @given(some_of(SPACE), st.booleans())
    def check(flags, with_file):
        given_flags = [f"--{name}={value}" for name, value in flags.items()]
        size = [] if "model" in flags else ["--model=tiny"]
        file = ["config/tiny_cpu.py"] if with_file else []
        done = command(
            "train.py",
            *file,
            f"--data_dir={small}",
            "--device=cpu",
            "--block_size=16",
            "--eval_windows=2",
            *size,
            *given_flags,
            "--dry_run",
        )
        ended[plan_or_line(done, "model ", "reweight ")] += 1

    check()
    print(f"{sum(ended.values())} combinations: {ended[True]} plans, {ended[False]} lines")
    assert min(ended.values()) > 40


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
PREPARE = {
    **{name: st.sampled_from(texts * 2 + TEXTS) for name, texts in TEXT_FLAGS.items()},
    **{
        name: values(int)
        for name in ("max_tokens_per_domain", "skip_bad", "shard_tokens", "seed", "workers")
    },
    "source": st.sampled_from(["files", "files", "files", "sample", "web", ""]),
    "out": values(str),
    "tokenizer": values(Literal[("bytes", "gpt2")]),
    "input": st.sampled_from(
        ["{corpus}", "{corpus}/train.jsonl", "{corpus}/*", "{corpus}/no", "", "**", "\x00", "["]
    ),
    **{name: st.just(None) for name in ("dedup", "overwrite", "merge")},
}


def test_prepare(tmp_path):
    corpus, ended = tmp_path / "corpus", {True: 0, False: 0}
    corpus.mkdir()
    row = json.dumps({"text": "a text", "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n"
    for name in ("train", "val"):
        (corpus / f"{name}.jsonl").write_text(row * 20)

    @settings(ALWAYS, max_examples=200)
    @given(some_of(PREPARE))
    def check(flags):
        given_flags = [
            f"--{name}" if value is None else f"--{name}={value.replace('{corpus}', str(corpus))}"
            for name, value in flags.items()
        ]
        source = {"source": "files", "input": corpus, "out": tmp_path / "out", "tokenizer": "bytes"}
        base = [
            f"--{name}={value}"
            for name, value in source.items()
            if name != "input" or flags.get("source", "files") == "files"
        ]
        done = command("prepare_slimpajama.py", *base, *given_flags, "--dry_run")
        ended[plan_or_line(done)] += 1

    check()
    print(f"{sum(ended.values())} combinations: {ended[True]} plans, {ended[False]} lines")
    assert min(ended.values()) > 40 and not (tmp_path / "out").exists()


ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2**16,
        10**30,
        0.5,
        "",
        "x",
        "/etc/hostname",
        "..",
        [],
        {},
        [[]],
        {"a": 1},
        [None],
        "\ud800",
        1e308,
    ]
)


def paths_in(content, path=()) -> list[tuple]:
    """Every place in nested dictionaries and lists."""
    inside = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    return [path, *(found for key, value in inside for found in paths_in(value, (*path, key)))]


def changed(content, path: tuple, value):
    """The content with another value at a place, or without the place where the value is ..."""
    if not path:
        return {} if value is ... else value
    copy = dict(content) if isinstance(content, dict) else list(content)
    if len(path) == 1 and value is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(content[path[0]], path[1:], value)
    return copy


def test_manifest(small, tmp_path):
    """A manifest.json with a value changed or gone, or bytes of its text."""
    shutil.copytree(small, tmp_path / "d")
    manifest, path, ended = (
        json.loads((small / "manifest.json").read_text()),
        tmp_path / "d" / "manifest.json",
        [0, 0],
    )
    flags = (
        "config/tiny_cpu.py",
        f"--data_dir={tmp_path}/d",
        "--block_size=16",
        "--device=cpu",
        "--dry_run",
    )
    text = path.read_bytes()

    @settings(ALWAYS, max_examples=200)
    @given(
        st.sampled_from(paths_in(manifest)),
        ODD | st.just(...),
        st.integers(0, len(text) - 1),
        st.booleans(),
        st.sampled_from([b"", b"{", b"\xff", b"9", b'"', b"-", b"]"]),
    )
    def check(place, value, at, cut, by):
        other = text[:at] + by + text[at + 1 :]
        path.write_bytes(other if cut else json.dumps(changed(manifest, place, value)).encode())
        ended[plan_or_line(command("train.py", *flags), "model ")] += 1

    check()
    print(f"{sum(ended)} manifests: {ended[1]} plans, {ended[0]} lines")
    assert ended[0] > 100
    path.write_bytes(text)
    expect_ok(command("train.py", *flags))
