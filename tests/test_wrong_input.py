"""Wrong input, a table per command: each ends with one line that names it and exit code 2, never
with a traceback.

The other tests of a command have its wrong inputs too; here is what a stranger does: wrong paths,
damaged files, numbers out of all range, nonsense in the environment, a disk that is full or may
not be written.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, command, expect_error, expect_ok, write_shards

import cli
import data
from cli import UserError
from corpus.manifest import read_manifest
from runtime.metrics import Metrics, read_lines

SMALL = (
    "config/tiny_cpu.py",
    "--block_size=16",
    "--global_batch_size=4",
    "--eval_windows=2",
    "--max_steps=2",
    "--device=cpu",
    "--data_dir={data}",
    "--out_dir={tmp}/out",
)
CONFIGS = {  # name of the file -> text
    "syntax": "r = 0.4\nseed = = 1\n",
    "indent": "  r = 0.4\n",
    "quote": "model = 'tiny\n",
    "unknown": "lerning_rate = 1\n",
    "text": "max_steps = 'many'\n",
    "none": "seed = None\n",
    "list": "mixture = ['c4']\n",
    "fraction": "max_steps = 1e3\n",
    "boolean": "dry_run = 3\n",
    "raises": "open('/nowhere')\n",
    "import": "import no_such_module\n",
    "exits": "exit(3)\n",
    "choice": "reweight = 'linuper'\n",
    "long": "max_steps = 10**5000\n",
    "function": "def r(): return 1\n",
    "recursion": "def f(): return f()\nf()\n",
    "assert": "assert False\n",
    "class": "class Model: pass\n",
    "bytes": "seed = b'1'\n",
}


def damage(manifest: dict, case: str):
    """What a manifest.json of a wrong folder holds."""
    shard = manifest["domains"]["c4"]["train"][0]
    if case == "list":
        return [manifest]
    if case == "truncated":
        return json.dumps(manifest)[:300]
    if case == "binary":
        return "\ud800\x00"
    if case == "number":
        return 5
    if case == "older schema":
        return {**manifest, "schema": 0}
    if case in ("tokenizer", "domains", "source"):
        return {key: value for key, value in manifest.items() if key != case}
    if case == "domains are a list":
        return {**manifest, "domains": list(manifest["domains"])}
    if case == "tokenizer is a name":
        return {**manifest, "tokenizer": "gpt2"}
    if case == "no domain":
        return {**manifest, "domains": {}}
    if case == "vocabulary is text":
        return {**manifest, "tokenizer": {**manifest["tokenizer"], "n_vocab": "many"}}
    if case == "vocabulary is huge":
        return {**manifest, "tokenizer": {**manifest["tokenizer"], "n_vocab": 10**12}}
    if case == "shards are text":
        manifest["domains"]["c4"]["train"] = "train_00000.npy"
    elif case == "no tokens":
        del shard["tokens"]
    elif case == "tokens are text":
        shard["tokens"] = "many"
    elif case == "tokens are negative":
        shard["tokens"] = -5
    elif case == "more tokens than the file":
        shard["tokens"] = 10**9
    elif case == "no file":
        del shard["file"]
    elif case == "file elsewhere":
        shard["file"] = "/etc/hostname"
    elif case == "file is a folder":
        shard["file"] = "c4"
    elif case == "kinds are a number":
        shard["kinds"] = 3
    elif case == "bytes of no text":
        for info in manifest["domains"]["c4"]["val"]:
            info["bytes"] = 0
    return manifest


MANIFESTS = (
    "list",
    "truncated",
    "binary",
    "number",
    "older schema",
    "tokenizer",
    "domains",
    "source",
    "no domain",
    "domains are a list",
    "tokenizer is a name",
    "vocabulary is text",
    "vocabulary is huge",
    "shards are text",
    "no tokens",
    "tokens are text",
    "tokens are negative",
    "more tokens than the file",
    "no file",
    "file elsewhere",
    "file is a folder",
    "kinds are a number",
    "bytes of no text",
)


def linked(source: Path, folder: Path) -> Path:
    """A data folder with the shards of another, to be damaged: a file that is written anew leaves
    the other alone.
    """
    shutil.copytree(source, folder, copy_function=os.link)
    return folder


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Names in the tables -> what is there."""
    top = tmp_path_factory.mktemp("places")
    tokens = np.arange(2000) % 250
    sample_data = write_shards(
        top / "data", {d: {"train": tokens, "val": tokens[:300]} for d in data.DOMAINS}
    )
    names = {
        "data": sample_data,
        "run": top / "run",
        "file": top / "file",
        "empty": top / "empty",
        "top": top,
    }
    names["file"].write_text("not what you think\n")
    names["empty"].mkdir()
    for name, text in CONFIGS.items():
        (top / f"{name}.py").write_text(text)
    (top / "nan.py").write_text("r = float('nan')\n")
    (top / "latin.py").write_bytes(b"out_dir = '\xe9'\n")
    (top / "zeros.py").write_bytes(b"\0\0\0")
    (top / "folder.py").mkdir()
    flags = [flag.format(data=sample_data, tmp=top) for flag in SMALL]
    expect_ok(
        command(
            "train.py", *flags, "--out_dir", names["run"], "--record_samples=1", "--log_interval=1"
        )
    )
    expect_ok(command("eval/perplexity.py", "--run", names["run"]))
    for case in MANIFESTS:
        folder = linked(sample_data, top / case.replace(" ", "_"))
        content = damage(json.loads((sample_data / "manifest.json").read_text()), case)
        text = content if isinstance(content, str) else json.dumps(content)
        rewrite(folder / "manifest.json", text.encode("utf-8", "surrogatepass"))
    shard = np.load(sample_data / "c4" / "train_00000.npy")
    for name, content in (
        ("float", shard.astype(np.float32)),
        ("two", shard.reshape(1, -1)),
        ("half", shard[:50]),
    ):
        folder = linked(sample_data, top / name)
        (folder / "c4" / "train_00000.npy").unlink()
        np.save(folder / "c4" / "train_00000.npy", content)
        manifest = read_manifest(folder)
        if name != "half":  # as long as the manifest says
            manifest["domains"]["c4"]["train"][0]["file_bytes"] = (
                (folder / "c4" / "train_00000.npy").stat().st_size
            )
        rewrite(folder / "manifest.json", json.dumps(manifest).encode())
    for key, name in (("corpus", "corpus"), ("bad", "bad_corpus"), ("runs", "runs")):
        names[key] = top / name
        names[key].mkdir()
    write_corpora(names["corpus"], names["bad"])
    write_runs(names["run"], names["runs"])
    (linked(sample_data, top / "gone") / "c4" / "val_00000.npy").unlink()
    (linked(sample_data, top / "unfinished") / "manifest.json").unlink()
    return names


def write_corpora(good: Path, bad: Path) -> None:
    """Two small files, and a folder of broken ones."""
    row = json.dumps({"text": "a text", "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n"
    for name in ("train", "val"):
        (good / f"{name}.jsonl").write_text(row * 20)
    contents = {
        "utf16.jsonl": row.encode("utf-16"),
        "number.jsonl": b"5\n",
        "null.jsonl": b"null\n",
        "blank.jsonl": b"\n",
        "nul.jsonl": b"\0\0\0\n",
        "text.parquet": row.encode(),
        "text.jsonl.zst": row.encode(),
        "text.jsonl.gz": row.encode(),
    }
    for name, content in contents.items():
        (bad / name).write_bytes(content)
    pq.write_table(
        pa.table({"text": [1, 2], "meta": [{"redpajama_set_name": 5}] * 2}), bad / "ints.parquet"
    )
    for name, file in (("plan", "plan.json"), ("state", "unit_00000.json")):
        args = [arg.format(corpus=good, tmp=bad) for arg in CORPUS]
        expect_ok(command("prepare_slimpajama.py", *args, f"--out={bad}/{name}", "--part=1/2"))
        (bad / name / "preparing" / file).write_text("{")


def write_runs(run: Path, top: Path) -> None:
    """Copies of a run, each damaged in its own way."""

    def changed(name: str, path: str, change) -> None:
        shutil.copytree(run, top / name)
        for file in (top / name).glob(path):
            text = change(
                json.loads(file.read_text()) if file.suffix == ".json" else file.read_text()
            )
            file.write_text(text if isinstance(text, str) else json.dumps(text))

    state, config, result = "checkpoints/*/state.json", "config.json", "eval/perplexity.json"
    for name, change in {
        "no_state": lambda s: "",
        "list": lambda s: [s],
        "truncated": lambda s: json.dumps(s)[:50],
        "null": lambda s: None,
        "no_shape": lambda s: {k: v for k, v in s.items() if k != "gpt"},
        "wrong_shape": lambda s: {**s, "gpt": {**s["gpt"], "n_layer": 2}},
        "text_shape": lambda s: {**s, "gpt": {**s["gpt"], "n_embd": "wide"}},
        "huge_shape": lambda s: {**s, "gpt": {**s["gpt"], "n_embd": 4 * 10**12}},
        "other_names": lambda s: {**s, "gpt": {"layers": 4}},
        "tokenizer": lambda s: {**s, "tokenizer_sha256": "0"},
    }.items():
        changed(name, state, change)
        (top / name / "eval" / "perplexity.json").unlink()
    for name, path, change in (
        ("config_list", config, lambda c: [c]),
        ("config_truncated", config, lambda c: json.dumps(c)[:50]),
        ("config_empty", config, lambda c: {}),
        ("result_list", result, lambda r: [r]),
        ("result_truncated", result, lambda r: json.dumps(r)[:50]),
        ("other_windows", result, lambda r: {**r, "val_hash": "other"}),
        ("metrics_numbers", "metrics.jsonl", lambda m: "1\n2\n"),
        ("metrics_no_step", "metrics.jsonl", lambda m: m.replace('"step"', '"stop"')),
    ):
        changed(name, path, change)
    for name in ("no_weights", "folder", "garbage"):
        shutil.copytree(run, top / name)
        (weights,) = (top / name).glob("checkpoints/*/model.pt")
        weights.unlink()
        if name == "folder":
            weights.mkdir()
        elif name == "garbage":
            weights.write_bytes(b"garbage")


def fails(script: str, args: list[str], words: list[str], places: dict, tmp_path: Path) -> None:
    """The command with the places' names filled in ends with one line that has the words."""
    names = {**places, "tmp": tmp_path}
    expect_error(
        command(script, *(arg.format(**names) for arg in args)),
        *(word.format(**names) for word in words),
    )


def short(value) -> str:
    """Of a test's parameter, in its name."""
    return (" ".join(value) if isinstance(value, list) else str(value))[:60]


HUGE = str(10**30)
VAL = ["--split=train=train"]
BATCH = {"INPUT": "/in", "OUT": "/out", "PARTS": "2"}
TRAIN = [  # flags, words of the error
    # paths
    (["--data_dir={file}"], ["{file}"]),
    (["--data_dir={empty}"], ["{empty}", "manifest.json"]),
    (["--data_dir="], ["''"]),
    (["--data_dir={top}/unfinished"], ["unfinished", "did not finish"]),
    (["--data_dir={top}/gone"], ["c4/val_00000.npy is missing"]),
    (["--data_dir={top}/half"], ["c4/train_00000.npy", "the manifest says"]),
    (["--data_dir={top}/float", "--mixture=c4cc"], ["c4/train_00000.npy", "float32"]),
    (["--data_dir={top}/two", "--mixture=c4cc"], ["c4/train_00000.npy", "uint16"]),
    (["--data_dir={data}/c4"], ["manifest.json"]),
    (["--data_dir={data}/manifest.json"], ["manifest.json"]),
    (["--out_dir={file}"], ["{file}"]),
    (["--out_dir={file}/run"], ["{file}"]),
    (["--out_dir=/proc/run"], ["/proc/run"]),
    (["--out_dir=/sys/run"], ["/sys/run"]),
    ([f"--out_dir=/tmp/{'x' * 300}"], ["xxx"]),
    (["--init_from={file}"], ["{file}"]),
    (["--init_from={empty}"], ["{empty}"]),
    (["--init_from=/nowhere/run"], ["/nowhere/run"]),
    # config files
    *(([f"{{top}}/{name}.py"], [f"{name}.py"]) for name in (*CONFIGS, "latin", "zeros", "folder")),
    (["{top}/nan.py"], ["--r nan"]),
    (["{top}/nowhere.py"], ["nowhere.py", "not found"]),
    (["{file}"], ["{file}"]),
    # manifests
    *(
        ([f"--data_dir={{top}}/{case.replace(' ', '_')}"], [case.replace(" ", "_")])
        for case in MANIFESTS
        if case not in ("bytes of no text", "source", "kinds are a number", "file elsewhere")
    ),
    # numbers
    ([f"--max_steps={HUGE}"], ["--max_steps"]),
    ([f"--block_size={HUGE}"], ["--block_size"]),
    ([f"--global_batch_size={HUGE}"], ["--global_batch_size"]),
    (["--block_size=100000"], ["--block_size", "100000"]),
    (["--global_batch_size=1000000000000", "--micro_batch_size=7"], ["--global_batch_size"]),
    ([f"--seed={HUGE}"], ["--seed"]),
    (["--seed=-1"], ["--seed -1"]),
    (["--seed=1.5"], ["--seed", "1.5"]),
    (["--learning_rate=nan"], ["--learning_rate nan"]),
    (["--learning_rate=inf"], ["--learning_rate inf"]),
    (["--learning_rate=-1"], ["--learning_rate -1"]),
    (["--min_lr=nan"], ["--min_lr nan"]),
    (["--r=inf"], ["--r inf"]),
    (["--r=nan"], ["--r nan"]),
    (["--r=0"], ["--r 0"]),
    (["--delta=inf"], ["--delta inf"]),
    (["--dropout=nan"], ["--dropout nan"]),
    (["--dropout=2"], ["--dropout 2"]),
    (["--beta1=1"], ["--beta1 1"]),
    (["--beta2=-0.1"], ["--beta2"]),
    (["--grad_clip=-1"], ["--grad_clip -1"]),
    (["--grad_clip=inf"], ["--grad_clip"]),
    (["--weight_decay=inf"], ["--weight_decay"]),
    (["--max_weight=inf"], ["--max_weight"]),
    ([f"--eval_interval={HUGE}"], ["--eval_interval"]),
    (["--eval_windows=0"], ["--eval_windows 0"]),
    (["--keep_checkpoints=0"], ["--keep_checkpoints 0"]),
    (["--log_interval=0"], ["--log_interval 0"]),
    (["--micro_batch_size=-2"], ["--micro_batch_size -2"]),
    (["--micro_batch_size=8"], ["--global_batch_size 4"]),
    (["--record_samples=-1"], ["--record_samples -1"]),
    (["--max_steps=1e3"], ["--max_steps", "1e3"]),
    (["--r_start=1", "--r_steps=0"], ["--r_start"]),
    (["--warmup_steps=-1"], ["--warmup_steps -1"]),
    # flags
    (["--max_steps="], ["--max_steps"]),
    (["--max_steps"], ["--max_steps"]),
    (["-max_steps=3"], ["-max_steps"]),
    (["--compile=yes"], ["--compile", "yes"]),
    (["--dry_run=1"], ["--dry_run", "true or false"]),
    (["--wandb=true"], ["--wandb", "true"]),
    (["--device=gpu"], ["--device", "gpu"]),
    (["--device=cuda"], ["cuda"]),
    (["--dtype=fp16"], ["--dtype", "fp16"]),
    (["--resume=yes"], ["--resume"]),
    (["--"], []),
    (["--=3"], []),
    (["--batch_size=3"], ["--batch_size", "did you mean"]),
    (["train"], ["'train'"]),
    ([""], []),
]


@pytest.mark.parametrize("flags, words", TRAIN, ids=short)
def test_train(flags, words, places, tmp_path):
    fails("train.py", [*SMALL, *flags], words, places, tmp_path)
    assert not (tmp_path / "out" / "checkpoints").exists()


CORPUS = [
    "--source=files",
    "--input={corpus}",
    "--tokenizer=bytes",
    "--out={tmp}/out",
    "--workers=1",
]
PREPARE = [  # flags after CORPUS, words of the error
    (["--input={top}/nowhere"], ["nowhere", "no such file"]),
    (["--input={empty}"], ["{empty}", "no .jsonl"]),
    (["--input={file}"], ["{file}", "no .jsonl"]),
    (["--input="], ["--input"]),
    (["--input"], ["--input"]),
    (["--input={top}/*.none"], ["*.none"]),
    (["--input={bad}/utf16.jsonl", *VAL], ["utf16.jsonl, line 1"]),
    (["--input={bad}/number.jsonl", *VAL], ["number.jsonl, line 1"]),
    (["--input={bad}/null.jsonl", *VAL], ["null.jsonl, line 1"]),
    (["--input={bad}/nul.jsonl", *VAL], ["nul.jsonl, line 1"]),
    (["--input={bad}/text.parquet", *VAL], ["text.parquet"]),
    (["--input={bad}/text.jsonl.zst", *VAL], ["text.jsonl"]),
    (["--input={bad}/text.jsonl.gz", *VAL], ["text.jsonl.gz"]),
    (["--input={bad}/blank.jsonl", *VAL], ["no document"]),
    (["--input={bad}/ints.parquet", *VAL], ["ints.parquet"]),
    (["--out={file}"], ["{file}"]),
    (["--out={file}/x"], ["{file}"]),
    (["--out=/proc/x"], ["/proc/x"]),
    ([f"--out=/tmp/{'x' * 300}"], ["xxx"]),
    (["--out="], ["--out"]),
    (["--out=/sys/x"], ["/sys/x"]),
    (["--workers=0"], ["--workers 0"]),
    (["--shard_tokens=-1"], ["--shard_tokens -1"]),
    (["--shard_tokens=1e8"], ["--shard_tokens", "1e8"]),
    (["--max_tokens_per_domain=-1"], ["--max_tokens_per_domain"]),
    (["--max_tokens_per_domain=nan"], ["nan"]),
    (["--skip_bad=x"], ["--skip_bad"]),
    (["--workers=-3"], ["--workers -3"]),
    ([f"--workers={HUGE}"], ["--workers"]),
    ([f"--skip_bad={HUGE}"], ["--skip_bad"]),
    ([f"--shard_tokens={HUGE}"], ["--shard_tokens"]),
    ([f"--max_tokens_per_domain={HUGE}"], ["--max_tokens_per_domain"]),
    (["--source=sample"], ["--input"]),
    (["--source=hub"], ["--input"]),
    (["--source=web"], ["--source", "web"]),
    (["--tokenizer=gpt3"], ["--tokenizer", "gpt2"]),
    (["--split=train=train,train=test"], ["--split"]),
    (["--split=,"], ["--split"]),
    (["--split=train="], ["--split"]),
    (["--split=test=test"], ["--split"]),
    (["--domains=,"], ["--domains ,"]),
    (["--domains=C4"], ["'C4'", "c4"]),
    (["--holdout=all"], ["--holdout all"]),
    (["--part=1/0"], ["--part 1/0"]),
    (["--part=-1/2"], ["--part -1/2"]),
    (["--part=1/2/3"], ["--part 1/2/3"]),
    (["--part=²/3"], ["--part ²/3"]),
    ([f"--part=1/{HUGE}"], ["--part"]),
    (["--schema="], ["--schema"]),
    (["--schema=text=text"], ["--schema"]),
    (["--schema=text=,domain=d"], ["--schema"]),
    (["--schema=text=meta,domain=text"], ["train.jsonl"]),
    (["--schema=text=a.b.c,constant=web"], ["train.jsonl"]),
    (["--merge"], ["--merge"]),
    (["--merge", "--out={file}"], ["{file}"]),
    (["--merge", "--out={empty}"], ["{empty}"]),
    (["--verify={empty}"], ["manifest.json"]),
    (["--verify={file}"], ["{file}"]),
    (["--verify="], ["manifest.json"]),
    (["--verify={top}/half"], ["shards are not as"]),
    (["--verify={top}/gone"], ["shards are not as"]),
    (["--verify={top}/truncated"], ["truncated"]),
    (["--verify={top}/tokenizer"], ["tokenizer"]),
    (["--verify={top}/no_tokens"], ["no_tokens"]),
    (["--verify={data}", "--workers=0"], ["--workers 0"]),
    (["--out={top}/list"], ["list"]),
    (["--out={top}/domains"], ["domains"]),
    (["--out={data}"], ["holds other data"]),
    (["--out={bad}/plan"], ["plan.json"]),
    (["--out={bad}/plan", "--merge"], ["plan.json"]),
    (["--out={bad}/state", "--part=1/2"], ["unit_00000.json"]),
    (["--out={bad}/state", "--merge"], ["unit_00000.json"]),
    (["stray"], ["'stray'"]),
    (["--worker=2"], ["--worker", "did you mean '--workers'"]),
    (["--dry_run=1"], ["--dry_run"]),
]


@pytest.mark.parametrize("flags, words", PREPARE, ids=short)
def test_prepare(flags, words, places, tmp_path):
    fails("prepare_slimpajama.py", [*CORPUS, *flags], words, places, tmp_path)
    assert not (tmp_path / "out" / "manifest.json").exists()


RUNS = [  # wrong --run of every command that takes one
    ["--run={top}/nowhere"],
    ["--run={file}"],
    ["--run={empty}"],
    ["--run"],
    ["--run={data}"],
    ["--rum={run}"],
    ["--run={run}", "--seed=x"],
    [],
]
CHECKPOINTS = [
    ["--run={runs}/no_state"],
    ["--run={runs}/list"],
    ["--run={runs}/truncated"],
    ["--run={runs}/no_weights"],
    ["--run={runs}/folder"],
    ["--run={runs}/garbage"],
    ["--run={runs}/null"],
    ["--run={runs}/tokenizer"],
    ["--run={runs}/wrong_shape"],
    ["--run={runs}/huge_shape"],
    ["--run={runs}/text_shape"],
]
SAMPLE = [
    ["--run="],
    ["--max_tokens=1e3"],
    [f"--max_tokens={HUGE}"],
    [f"--n={HUGE}"],
    [f"--top_k={HUGE}"],
    ["--temperature=inf"],
    [f"--seed={HUGE}"],
    ["--temperature="],
    ["--prompt"],
]
PERPLEXITY = [
    ["--run="],
    ["--data_dir={file}"],
    ["--data_dir={empty}"],
    ["--data_dir=/nowhere"],
    ["--data_dir={top}/gone"],
    ["--data_dir={top}/truncated"],
    ["--data_dir={top}/no_tokens"],
    ["--data_dir={top}/tokenizer"],
    ["--batch_size=0"],
    ["--batch_size=x"],
]
FEWSHOT = [
    ["--tasks="],
    ["--tasks=,"],
    [f"--num_fewshot={HUGE}"],
    ["--limit=-1"],
    [f"--seed={HUGE}"],
    ["--include_path={file}"],
    ["--batch_size=-1"],
]
EXPORT = [
    ["--run="],
    ["--to={file}"],
    ["--to={file}/x"],
    ["--to=/proc/x"],
    ["--to={run}"],
    ["--to="],
    [f"--to=/tmp/{'x' * 300}"],
]
INSPECT = [
    ["--run="],
    ["--data_dir={file}"],
    ["--data_dir=/nowhere"],
    ["--data_dir={top}/truncated"],
    ["--top=0"],
    ["--chars=-1"],
    ["--from_step=99"],
    ["--from_step=x"],
    ["--data_dir={top}/no_tokens"],
]
NOT_READ = {"eval/inspect_samples.py": []}
OF_A_RUN = {
    "eval/perplexity.py": PERPLEXITY,
    "eval/fewshot.py": FEWSHOT,
    "eval/inspect_samples.py": INSPECT,
    "eval/sample.py": SAMPLE,
    "scripts/export_hf.py": EXPORT,
}


ON_A_RUN = [
    (script, flags)
    for script, own in OF_A_RUN.items()
    for flags in (
        *RUNS,
        *NOT_READ.get(script, CHECKPOINTS),
        *(["--run={run}", *flags] for flags in own),
    )
]


@pytest.mark.parametrize("script, flags", ON_A_RUN, ids=short)
def test_commands_on_a_run(script, flags, places, tmp_path):
    if "fewshot" in script:  # the harness's own tasks take seconds
        flags = ["--include_path=tests/tasks", "--tasks=where", *flags]
    fails(script, flags, [], places, tmp_path)


TABLES = [
    [],
    [""],
    ["/nowhere"],
    ["{file}"],
    ["{empty}"],
    ["{data}"],
    ["{runs}/config_list"],
    ["{runs}/config_truncated"],
    ["{runs}/config_empty"],
    ["{runs}/result_list"],
    ["{runs}/result_truncated"],
    ["{run}", "{runs}/other_windows"],
    ["--runs={run}"],
]
TABLES_FLAGS = [
    ["--format=html"],
    ["--metric=accuracy"],
    ["--out=."],
    ["--out=/proc/x"],
    ["--out={file}/x"],
    ["--out="],
    ["--form=csv"],
]
PLOTS_FLAGS = [["--to={file}"], ["--to={file}/x"], ["--to=/proc/x"], ["--to"], ["--tu=x"]]
OF_RUNS = [
    ("eval/tables.py", flags) for flags in (*TABLES, *(["{run}", *flags] for flags in TABLES_FLAGS))
] + [
    ("eval/plots.py", ["--to={tmp}/out", *flags])
    for flags in (
        *TABLES[1:],
        ["{runs}/metrics_numbers"],
        ["{runs}/metrics_no_step"],
        *(["{run}", *flags] for flags in PLOTS_FLAGS),
    )
]


@pytest.mark.parametrize("script, flags", OF_RUNS, ids=short)
def test_commands_on_several_runs(script, flags, places, tmp_path):
    fails(script, flags, [], places, tmp_path)


OTHERS = {
    "scripts/bench.py train": [
        ["--sizes=125m"],
        ["--sizes"],
        ["--sizes=1x3x32"],
        ["--sizes=0x1x8"],
        ["--micro_batch=0"],
        ["--micro_batch=x"],
        ["--micro_batch_size=4"],
        ["--model=tiny"],
        ["--data=/nowhere"],
        ["--data={file}"],
        ["--block_size=0"],
        [f"--block_size={HUGE}"],
        ["--reweight=upward"],
        ["--rounds=0"],
        ["--rounds=x"],
        ["--round=9"],
        ["9"],
    ],
    "scripts/bench.py prepare": [
        [],
        ["--input"],
        ["--input={file}"],
        ["--input={empty}"],
        ["--input=/nowhere"],
        ["--input={corpus}", "--repeat=x"],
        ["--input={corpus}", "--rounds=0"],
        ["--input={corpus}", "--rounds=-1"],
        ["--input={corpus}", "--repeat=-1"],
        ["--input={corpus}", "--repeat=0"],
        ["--input={corpus}", "--workers=0"],
        ["--input={corpus}", "--workers"],
        ["--input={corpus}", "--workers=-1"],
        ["--input={corpus}", "--workers=two"],
        ["--inputs={corpus}"],
        ["{corpus}"],
    ],
    "scripts/bench.py loader": [
        ["--shards=0"],
        ["--shards=-1"],
        ["--shards=99"],
        ["--shards=x"],
        ["--shards"],
        ["--shards="],
        ["--shards=1e4"],
        ["--batches=0"],
        ["--batches=-1"],
        ["--batches=99"],
        ["--batches=x"],
        ["--batches"],
        ["--batch=100"],
        ["100"],
        [f"--shards={HUGE}"],
    ],
    "scripts/bench.py fewshot": [
        ["--model=125m"],
        ["--model"],
        ["--model="],
        ["--batch_size=0"],
        ["--batch_size=-1"],
        ["--batch_size=x"],
        ["--batch_size"],
        ["--batch_size=1e1"],
        ["--rounds=2"],
        ["--rounds=0"],
        ["--rounds=-5"],
        ["--rounds=x"],
        ["--rounds"],
        ["--round=9"],
        ["small"],
    ],
    "scripts/study_regime.py": [
        [],
        ["--data_dir"],
        ["--data_dir=/nowhere"],
        ["--data_dir={file}"],
        ["--data_dir={empty}"],
        ["--data_dir={top}/truncated"],
        ["--data_dir={top}/tokenizer"],
        ["--data_dir={data}", "--steps=1"],
        ["--data_dir={data}", "--steps=x"],
        ["--data_dir={data}", "--jobs=0"],
        ["--data_dir={data}", "--jobs=-1"],
        ["--data_dir={data}", "--to={file}"],
        ["--data_dir={data}", "--to=/proc/x"],
        ["--data={data}"],
        ["{data}"],
        ["--data_dir={top}/gpt2"],
    ],
}


@pytest.mark.parametrize(
    "script, flags",
    [(script, flags) for script, some in OTHERS.items() for flags in some],
    ids=short,
)
def test_other_commands(script, flags, places, tmp_path):
    path, *subcommand = script.split()
    fails(path, [*subcommand, *flags], [], places, tmp_path)


SHELL = [  # script, variables, arguments, words of the error
    *(
        ("quickstart.sh", {"STEPS": steps}, [], [f"STEPS={steps}"])
        for steps in ("0", "-1", "abc", "1e3", "1.5", "٣", " ", "10 20", "$(id)", HUGE)
    ),
    ("quickstart.sh", {}, ["--help"], ["--help"]),
    ("quickstart.sh", {}, ["500"], ["500", "STEPS"]),
    *(
        (script, {"PYTHON": python}, [], ["PYTHON", "3.10 or later"])
        for script in ("quickstart.sh", "test.sh")
        for python in (
            "/nowhere/python",
            "/bin/true",
            "/bin/false",
            "/tmp",
            "/etc/hostname",
            "no such python",
        )
    ),
    ("quickstart.sh", {"PIP": "1"}, [], ["pip could not install requirements.txt"]),
    ("test.sh", {"PIP": "1"}, [], ["pip could not install requirements-dev.txt"]),
    ("environment.sh", {}, [], ["requirements"]),
    ("environment.sh", {}, ["absent.txt"], ["absent.txt"]),
    ("environment.sh", {}, ["scripts"], ["scripts"]),
    *(
        ("slurm/prepare.sbatch", {**BATCH, **env}, [], words)
        for env, words in (
            ({"INPUT": ""}, ["set INPUT"]),
            ({"OUT": ""}, ["set OUT"]),
            ({"PARTS": "0"}, ["PARTS=0"]),
            ({"PARTS": "-3"}, ["PARTS=-3"]),
            ({"PARTS": "many"}, ["PARTS=many"]),
            ({"PARTS": "1.5"}, ["PARTS=1.5"]),
            ({"PARTS": HUGE}, ["PARTS"]),
            ({"PARTS": "1-8"}, ["PARTS=1-8"]),
            ({"SLURM_ARRAY_TASK_ID": "x"}, ["TASK_ID=x"]),
            ({}, ["no sbatch here"]),
        )
    ),
]


@pytest.mark.parametrize("script, variables, args, words", SHELL, ids=short)
def test_shell_scripts(script, variables, args, words, tmp_path):
    """In a copy whose .venv has a python that does nothing, or fails where PIP is set."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text('python() { [ -z "${PIP:-}" ]; }\n')
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables}
    done = subprocess.run(
        ["bash", f"scripts/{script}", *args], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    expect_error(done, *words)


ENVIRONMENTS = [  # variables, words of the error
    ({"RANK": "first"}, ["RANK=first"]),
    ({"WORLD_SIZE": "two"}, ["WORLD_SIZE=two"]),
    ({"WORLD_SIZE": ""}, ["WORLD_SIZE="]),
    ({"WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
    ({"WORLD_SIZE": "-1"}, ["WORLD_SIZE=-1"]),
    ({"WORLD_SIZE": HUGE}, ["WORLD"]),
    ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2", "WORLD_SIZE=2", "torchrun"]),
    ({"RANK": "-1"}, ["RANK=-1"]),
    ({"LOCAL_RANK": "1.0"}, ["LOCAL_RANK=1.0"]),
    ({"LOCAL_WORLD_SIZE": "x"}, ["LOCAL_WORLD_SIZE=x"]),
    ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "no RANK", "torchrun"]),
    ({"RANK": "1"}, ["RANK=1", "WORLD_SIZE=1"]),
    ({"WORLD_SIZE": "2", "RANK": "0"}, ["no MASTER_ADDR"]),
    ({"WORLD_SIZE": "8"}, ["a multiple of 8"]),
]


@pytest.mark.parametrize("variables, words", ENVIRONMENTS, ids=str)
def test_environments(variables, words, places, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    done = command("train.py", *(flag.format(**places, tmp=tmp_path) for flag in SMALL))
    done.stderr = re.sub(r"error \(rank [^)]*\): ", "error: ", done.stderr)
    expect_error(done, *words)


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    """A folder that root may not write either."""
    folder = tmp_path_factory.mktemp("read_only")
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "none", folder], capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):
            pytest.skip("mounting takes more rights")
    yield folder
    subprocess.run(["umount", "-l", folder], check=mounted)


@pytest.mark.parametrize(
    "script, args",
    [
        ("train.py", [*SMALL, "--out_dir={read_only}/x"]),
        ("prepare_slimpajama.py", [*CORPUS, "--out={read_only}/x"]),
        ("scripts/export_hf.py", ["--run={run}", "--to={read_only}/x"]),
        ("eval/plots.py", ["{run}", "--to={read_only}/x"]),
        ("eval/tables.py", ["{run}", "--out={read_only}/x"]),
        ("scripts/study_regime.py", ["--data_dir={data}", "--to={read_only}/x"]),
    ],
    ids=short,
)
def test_a_folder_that_may_only_be_read(script, args, places, read_only, tmp_path):
    names = {**places, "tmp": tmp_path, "read_only": read_only}
    expect_error(
        command(script, *(arg.format(**names) for arg in args)),
        str(read_only),
        "Read-only file system",
    )


def process(*args, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, args)], cwd=ROOT, stderr=subprocess.PIPE, **kwargs
    )


@pytest.mark.parametrize("args", [["--help"], ["--verify", "{data}"]], ids=" ".join)
def test_a_reader_that_goes_away(args, places):
    """As `| head -1` does: nothing is said, and no traceback at the interpreter's end."""
    read, write = os.pipe()
    os.close(read)
    command = process(
        "prepare_slimpajama.py", *(arg.format(**places) for arg in args), stdout=write
    )
    os.close(write)
    said = command.communicate()[1].decode()
    assert command.returncode in (0, 141) and "Traceback" not in said and "BrokenPipe" not in said


def test_output_that_does_not_fit_on_the_disk():
    with open("/dev/full", "w") as full:
        command = process(
            "prepare_slimpajama.py",
            "--source=sample",
            "--tokenizer=bytes",
            "--out=/none/x",
            "--dry_run",
            stdout=full,
        )
        said = command.communicate()[1].decode()
    expect_error(
        subprocess.CompletedProcess([], command.returncode, "", said),
        "No space left on device",
        "make room",
    )


def test_ctrl_c(places, tmp_path):
    """The terminal sends it to the command and its workers alike."""
    row = (
        json.dumps({"text": "words " * 200_000, "meta": {"redpajama_set_name": "RedPajamaC4"}})
        + "\n"
    )
    for name in ("train_a", "train_b", "val"):
        (tmp_path / f"{name}.jsonl").write_text(row * 60)
    args = [arg.format(corpus=tmp_path, tmp=tmp_path) for arg in CORPUS]
    command = process(
        "prepare_slimpajama.py",
        *args,
        "--tokenizer=gpt2",
        "--workers=2",
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell's & ignores it
    while not (tmp_path / "out" / "preparing" / "plan.json").exists():
        assert command.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(command.pid, signal.SIGINT)
    said = command.communicate()[1].decode()
    assert (
        command.returncode == 130
        and "Traceback" not in said
        and said.rstrip().endswith("interrupted")
    )


def test_paths_with_spaces_and_letters_of_any_kind(places, tmp_path):
    out = tmp_path / "a run, 日本語 %s {x} é"
    shutil.copytree(places["data"], tmp_path / "with space = ü")
    flags = (flag.format(**places, tmp=tmp_path) for flag in SMALL)
    expect_ok(
        command("train.py", *flags, f"--data_dir={tmp_path}/with space = ü", "--out_dir", out)
    )
    for args in (
        ["eval/perplexity.py", "--run", out],
        ["eval/sample.py", "--run", out, "--max_tokens=2"],
        ["eval/tables.py", out],
    ):
        expect_ok(command(*args))


def test_paths_that_are_no_text(places, tmp_path):
    """A name of bytes that are no UTF-8, printed and written to JSON."""
    args = [
        "--source=sample",
        "--tokenizer=bytes",
        "--out",
        os.fsdecode(os.fsencode(tmp_path) + b"/\xff"),
    ]
    command = process("prepare_slimpajama.py", *args, stdout=subprocess.PIPE)
    shown, said = command.communicate()
    assert command.returncode == 0 and b"written to" in shown and b"Traceback" not in said


def test_a_disk_that_is_full_keeps_the_lines_before(tmp_path):
    config = {"wandb": "off"}
    metrics = Metrics(tmp_path, config, 0, 9)
    line = {"kind": "train", "step": 1, "loss": 2.5, "tokens_per_s": 1.0}
    metrics.log(line)
    size = metrics.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))  # the next line fits in part
    try:
        metrics.log({**line, "step": 2})
        assert re.search("metrics.jsonl cannot be written .*make room", metrics.failure)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_lines(metrics.path) == [line] and metrics.path.stat().st_size == size
    metrics.log({**line, "step": 2})
    metrics.close()
    assert [record["step"] for record in read_lines(metrics.path)] == [1, 2]


def ended(error: BaseException, capsys) -> tuple[int, str]:
    """Exit code and standard error of a command that raises this."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("--r 0: must be above 0"), "error: --r 0: must be above 0"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            "error: /a/b: Permission denied; give",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "error: No space left on device; what was finished",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", b"/a"),
            "error: /a: Read-only file system; give",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"),
            "error: /x: No such file or directory; give",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "error: Too many open files; allow more"),
        (OSError(errno.EIO, "Input/output error"), "error: Input/output error; look at the disk"),
        (
            OSError(errno.ESTALE, "Stale file handle", "/nfs"),
            "error: /nfs: Stale file handle; look at",
        ),
        (MemoryError("8 TiB"), "error: out of memory (8 TiB)"),
    ],
    ids=repr,
)
def test_what_the_machine_refuses_is_one_line(error, line, capsys):
    code, said = ended(error, capsys)
    assert code == 2 and said.startswith(line) and said.count("\n") == 1


def test_ctrl_c_is_one_word(capsys):
    assert ended(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("loss"),
        ValueError("x"),
        TypeError("x"),
        OSError(errno.EBADF, "Bad file descriptor"),
        OSError("x"),
        OSError(errno.EINVAL, "Invalid argument"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        RuntimeError("x"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
    ],
    ids=repr,
)
def test_bugs_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        cli.run(main)


def test_a_permission_that_is_missing(places, tmp_path, monkeypatch):
    """Root may read everything, so open itself refuses."""
    real = open
    flags = [flag.format(**places, tmp=tmp_path) for flag in SMALL]
    for path in (places["data"] / "manifest.json", places["data"] / "c4" / "val_00000.npy"):

        def refusing(file, *args, path=path, **kwargs):
            if str(file) == str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return real(file, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", refusing)
            patch.setattr("io.open", refusing)
            expect_error(command("train.py", *flags), str(path), "Permission denied")
