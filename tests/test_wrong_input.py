"""Wrong input, a table per command: one line of error that names it, exit code 2, no traceback.

Other tests of a command have its wrong inputs too. These are what a stranger does: wrong paths,
damaged files, numbers out of all range, nonsense in the environment, a disk that is full or may not
be written.
"""

import errno
import gzip
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, changed, command, expect_error, expect_ok, write_shards

import cli
import data
from cli import UserError
from corpus.manifest import DOMAINS
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
CORPUS = [
    "--source=files",
    "--input={corpus}",
    "--tokenizer=bytes",
    "--out={tmp}/out",
    "--workers=1",
]
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
    "nan": "r = float('nan')\n",
}
SHARD = ("domains", "c4", "train", 0)
DAMAGES = {  # name of the folder -> place in its manifest.json, new value; ... removes it
    "list": ((), [{}]),
    "number": ((), 5),
    "older_schema": (("schema",), 0),
    "tokenizer": (("tokenizer",), ...),
    "tokenizer_is_a_name": (("tokenizer",), "gpt2"),
    "vocabulary_is_text": (("tokenizer", "n_vocab"), "many"),
    "vocabulary_is_huge": (("tokenizer", "n_vocab"), 10**12),
    "domains": (("domains",), ...),
    "no_domain": (("domains",), {}),
    "domains_are_a_list": (("domains",), list(DOMAINS)),
    "shards_are_text": (("domains", "c4", "train"), "train_00000.npy"),
    "no_tokens": ((*SHARD, "tokens"), ...),
    "tokens_are_text": ((*SHARD, "tokens"), "many"),
    "tokens_are_negative": ((*SHARD, "tokens"), -5),
    "more_tokens_than_the_file": ((*SHARD, "tokens"), 10**9),
    "no_file": ((*SHARD, "file"), ...),
    "file_is_a_folder": ((*SHARD, "file"), "c4"),
}
TEXTS = {  # name of the folder -> text of its manifest.json
    "truncated": b'{"schema": 1, "tokenizer": {"name"',
    "binary": b"\xed\xa0\x80\x00",
}


def linked(source: Path, folder: Path) -> Path:
    """A data folder with the files of another. To damage one, delete it first."""
    shutil.copytree(source, folder, copy_function=os.link)
    return folder


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """What the names in the tables stand for."""
    top = tmp_path_factory.mktemp("places")
    names = {"top": top, "file": top / "file"}
    for name in ("empty", "corpus", "bad", "runs"):
        names[name] = top / name
        names[name].mkdir()
    names["file"].write_text("not what you think\n")
    for name, text in CONFIGS.items():
        (top / f"{name}.py").write_text(text)
    (top / "latin.py").write_bytes(b"out_dir = '\xe9'\n")
    (top / "zeros.py").write_bytes(b"\0\0\0")
    (top / "folder.py").mkdir()

    tokens = np.arange(2000) % 250
    splits = {"train": tokens, "val": tokens[:300]}
    names["data"] = write_shards(top / "data", dict.fromkeys(DOMAINS, splits))
    write_data_folders(names["data"], top)
    write_corpora(names["corpus"], names["bad"])
    names["run"] = top / "run"
    flags = [flag.format(data=names["data"], tmp=top) for flag in SMALL]
    flags += ["--out_dir", names["run"], "--record_samples=1", "--log_interval=1"]
    expect_ok(command("train.py", *flags))
    expect_ok(command("eval/perplexity.py", "--run", names["run"]))
    write_runs(names["run"], names["runs"])
    return names


def write_data_folders(good: Path, top: Path) -> None:
    """Copies of a data folder, each damaged in its own way."""
    manifest = json.loads((good / "manifest.json").read_text())
    texts = dict(TEXTS)
    for name, (place, value) in DAMAGES.items():
        texts[name] = json.dumps(changed(manifest, place, value)).encode()
    for name, text in texts.items():
        rewrite(linked(good, top / name) / "manifest.json", text)

    shard = np.load(good / "c4" / "train_00000.npy")
    shards = {"float": shard.astype(np.float32), "two": shard.reshape(1, -1), "half": shard[:50]}
    for name, content in shards.items():
        folder = linked(good, top / name)
        path = folder / "c4" / "train_00000.npy"
        path.unlink()
        np.save(path, content)
        if name != "half":  # as long as the manifest says
            size = path.stat().st_size
            text = json.dumps(changed(manifest, (*SHARD, "file_bytes"), size))
            rewrite(folder / "manifest.json", text.encode())
    (linked(good, top / "gone") / "c4" / "val_00000.npy").unlink()
    (linked(good, top / "unfinished") / "manifest.json").unlink()


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
        "array.json": f"[{row}]".encode(),
        "pretty.json": b'{\n "text": "a text"\n}\n',
        "pointer.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "twice/a.jsonl": row.encode(),
        "twice/a.jsonl.gz": gzip.compress(row.encode()),
    }
    (bad / "twice").mkdir()
    for name, content in contents.items():
        (bad / name).write_bytes(content)
    (bad / "gone.jsonl").symlink_to("nowhere")
    (bad / "loop.jsonl").symlink_to("loop.jsonl")
    numbers = pa.table({"text": [1, 2], "meta": [{"redpajama_set_name": 5}] * 2})
    pq.write_table(numbers, bad / "ints.parquet")
    for name, file in (("plan", "plan.json"), ("state", "unit_00000.json")):
        args = [arg.format(corpus=good, tmp=bad) for arg in CORPUS]
        expect_ok(command("prepare_slimpajama.py", *args, f"--out={bad}/{name}", "--part=1/2"))
        (bad / name / "preparing" / file).write_text("{")


STATES = {  # name of the folder -> place in the checkpoint's state.json, new value
    "list": ((), [{}]),
    "null": ((), None),
    "wrong_shape": (("gpt", "n_layer"), 2),
    "text_shape": (("gpt", "n_embd"), "wide"),
    "huge_shape": (("gpt", "n_embd"), 4 * 10**12),
    "tokenizer": (("tokenizer_sha256",), "0"),
}
RUN_FILES = {  # name of the folder -> file, its content from what it was
    "config_list": ("config.json", lambda text: f"[{text}]"),
    "config_truncated": ("config.json", lambda text: text[:50]),
    "config_empty": ("config.json", lambda text: "{}"),
    "result_list": ("eval/perplexity.json", lambda text: f"[{text}]"),
    "result_truncated": ("eval/perplexity.json", lambda text: text[:50]),
    "other_windows": (
        "eval/perplexity.json",
        lambda text: json.dumps({**json.loads(text), "val_hash": "other"}),
    ),
    "metrics_numbers": ("metrics.jsonl", lambda text: "1\n2\n"),
    "metrics_no_step": ("metrics.jsonl", lambda text: text.replace('"step"', '"stop"')),
}


def write_runs(run: Path, top: Path) -> None:
    """Copies of a run, each damaged in its own way."""
    (state_path,) = run.glob("checkpoints/*/state.json")
    state = json.loads(state_path.read_text())
    texts = {"no_state": "", "truncated": state_path.read_text()[:50]}
    for name, (place, value) in STATES.items():
        texts[name] = json.dumps(changed(state, place, value))
    for name, text in texts.items():
        shutil.copytree(run, top / name)
        (top / name / state_path.relative_to(run)).write_text(text)
        (top / name / "eval" / "perplexity.json").unlink()
    for name, (file, change) in RUN_FILES.items():
        shutil.copytree(run, top / name)
        path = top / name / file
        path.write_text(change(path.read_text()))
    for name in ("no_weights", "folder", "garbage"):
        shutil.copytree(run, top / name)
        (weights,) = (top / name).glob("checkpoints/*/model.pt")
        weights.unlink()
        if name == "folder":
            weights.mkdir()
        elif name == "garbage":
            weights.write_bytes(b"garbage")


HUGE = str(10**30)
CONSTANTS = {"huge": HUGE, "long": "x" * 300}


def table(text: str) -> list[tuple[list[str], list[str]]]:
    """Arguments and the words of their error, from lines "ARGUMENTS | WORDS" in a shell's quotes.

    Names in braces are those of `places` and CONSTANTS.
    """
    rows = []
    for line in text.strip().splitlines():
        arguments, _, words = line.partition("|")
        rows.append((shlex.split(arguments), shlex.split(words)))
    return rows


def cases(text: str) -> list[list[str]]:
    """Wrong arguments of a command, between bars or line breaks, in a shell's quotes."""
    cells = [cell for line in text.strip().splitlines() for cell in line.split("|")]
    return [shlex.split(cell) for cell in cells]


def fails(script: str, args: list[str], words: list[str], places: dict, tmp_path: Path) -> None:
    """The command ends with one line that has the words; names in braces are filled in."""
    names = {**places, **CONSTANTS, "tmp": tmp_path}
    done = command(script, *(arg.format(**names) for arg in args))
    expect_error(done, *(word.format(**names) for word in words))


def short(value) -> str:
    """A test's parameter in its name."""
    return (" ".join(value) if isinstance(value, list) else str(value))[:60]


TRAIN = table(
    """
    --data_dir={file} | {file}
    --data_dir={empty} | {empty} manifest.json
    --data_dir= | "''"
    --data_dir={top}/unfinished | unfinished "did not finish"
    --data_dir={top}/gone | "c4/val_00000.npy is missing"
    --data_dir={top}/half | c4/train_00000.npy "the manifest says"
    --data_dir={top}/float --mixture=c4cc | c4/train_00000.npy float32
    --data_dir={top}/two --mixture=c4cc | c4/train_00000.npy uint16
    --data_dir={data}/c4 | manifest.json
    --data_dir={data}/manifest.json | manifest.json
    --out_dir={file} | {file}
    --out_dir={file}/run | {file}
    --out_dir=/proc/run | /proc/run
    --out_dir=/sys/run | /sys/run
    --out_dir=/tmp/{long} | xxx
    --init_from={file} | {file}
    --init_from={empty} | {empty}
    --init_from=/nowhere/run | /nowhere/run
    {top}/nan.py | "--r nan"
    {top}/latin.py | latin.py
    {top}/zeros.py | zeros.py
    {top}/folder.py | folder.py
    {top}/nowhere.py | nowhere.py "not found"
    {file} | {file}
    --max_steps={huge} | --max_steps
    --block_size={huge} | --block_size
    --global_batch_size={huge} | --global_batch_size
    --block_size=100000 | --block_size 100000
    --global_batch_size=1000000000000 --micro_batch_size=7 | --global_batch_size
    --seed={huge} | --seed
    --seed=-1 | "--seed -1"
    --seed=1.5 | --seed 1.5
    --learning_rate=nan | "--learning_rate nan"
    --learning_rate=inf | "--learning_rate inf"
    --learning_rate=-1 | "--learning_rate -1"
    --min_lr=nan | "--min_lr nan"
    --r=inf | "--r inf"
    --r=nan | "--r nan"
    --r=0 | "--r 0"
    --delta=inf | "--delta inf"
    --dropout=nan | "--dropout nan"
    --dropout=2 | "--dropout 2"
    --beta1=1 | "--beta1 1"
    --beta2=-0.1 | --beta2
    --grad_clip=-1 | "--grad_clip -1"
    --grad_clip=inf | --grad_clip
    --weight_decay=inf | --weight_decay
    --max_weight=inf | --max_weight
    --eval_interval={huge} | --eval_interval
    --eval_windows=0 | "--eval_windows 0"
    --keep_checkpoints=0 | "--keep_checkpoints 0"
    --log_interval=0 | "--log_interval 0"
    --micro_batch_size=-2 | "--micro_batch_size -2"
    --micro_batch_size=8 | "--global_batch_size 4"
    --record_samples=-1 | "--record_samples -1"
    --max_steps=1e3 | --max_steps 1e3
    --r_start=1 --r_steps=0 | --r_start
    --warmup_steps=-1 | "--warmup_steps -1"
    --max_steps= | --max_steps
    --max_steps | --max_steps
    -max_steps=3 | -max_steps
    --compile=yes | --compile yes
    --dry_run=1 | --dry_run "true or false"
    --wandb=true | --wandb true
    --device=gpu | --device gpu
    --device=cuda | cuda
    --dtype=fp16 | --dtype fp16
    --resume=yes | --resume
    -- |
    --=3 |
    --batch_size=3 | --batch_size "did you mean"
    train | "'train'"
    '' |
    """
)
TRAIN += [([f"{{top}}/{name}.py"], [f"{name}.py"]) for name in CONFIGS if name != "nan"]
TRAIN += [([f"--data_dir={{top}}/{name}"], [name]) for name in (*DAMAGES, *TEXTS)]


@pytest.mark.parametrize("flags, words", TRAIN, ids=short)
def test_train(flags, words, places, tmp_path):
    fails("train.py", [*SMALL, *flags], words, places, tmp_path)
    assert not (tmp_path / "out" / "checkpoints").exists()


PREPARE = table(
    """
    --input={top}/nowhere | nowhere "no such file"
    --input={empty} | {empty} "no .jsonl"
    --input={file} | {file} "no .jsonl"
    --input= | --input
    --input | --input
    --input={top}/*.none | *.none
    --input={bad}/utf16.jsonl --split=train=train | "utf16.jsonl, line 1"
    --input={bad}/number.jsonl --split=train=train | "number.jsonl, line 1"
    --input={bad}/null.jsonl --split=train=train | "null.jsonl, line 1"
    --input={bad}/nul.jsonl --split=train=train | "nul.jsonl, line 1"
    --input={bad}/text.parquet --split=train=train | text.parquet
    --input={bad}/text.jsonl.zst --split=train=train | text.jsonl
    --input={bad}/text.jsonl.gz --split=train=train | text.jsonl.gz
    --input={bad}/blank.jsonl --split=train=train | "no document"
    --input={bad}/ints.parquet --split=train=train | ints.parquet
    --input={bad}/array.json --split=train=train | array.json "a JSON array"
    --input={bad}/pretty.json --split=train=train | pretty.json "not a record per line"
    --input={bad}/pointer.jsonl --split=train=train | pointer.jsonl "git lfs pull"
    --input={bad}/gone.jsonl --split=train=train | gone.jsonl nowhere "not there"
    --input={bad}/loop.jsonl --split=train=train | loop.jsonl "cannot be read"
    --input={bad}/twice | a.jsonl a.jsonl.gz "taken twice"
    --input=/dev/null --split=train=train | /dev/null "a device"
    --split=train=train,val=hsh | hsh val=hash
    --split=val=hash | "--split val=hash" train=NAME
    --split=train=hash,val=validation | "--split train=hash"
    --out={file} | {file}
    --out={file}/x | {file}
    --out=/proc/x | /proc/x
    --out=/tmp/{long} | xxx
    --out= | --out
    --out=/sys/x | /sys/x
    --workers=0 | "--workers 0"
    --shard_tokens=-1 | "--shard_tokens -1"
    --shard_tokens=1e8 | --shard_tokens 1e8
    --max_tokens_per_domain=-1 | --max_tokens_per_domain
    --max_tokens_per_domain=nan | nan
    --skip_bad=x | --skip_bad
    --workers=-3 | "--workers -3"
    --workers={huge} | --workers
    --skip_bad={huge} | --skip_bad
    --shard_tokens={huge} | --shard_tokens
    --max_tokens_per_domain={huge} | --max_tokens_per_domain
    --source=sample | --input
    --source=hub | --input
    --source=web | --source web
    --tokenizer=gpt3 | --tokenizer gpt2
    --split=train=train,train=test | --split
    --split=, | --split
    --split=train= | --split
    --split=test=test | --split
    --domains=, | "--domains ,"
    --domains=C4 | "'C4'" c4
    --holdout=all | "--holdout all"
    --part=1/0 | "--part 1/0"
    --part=-1/2 | "--part -1/2"
    --part=1/2/3 | "--part 1/2/3"
    --part=²/3 | "--part ²/3"
    --part=1/{huge} | --part
    --schema= | --schema
    --schema=text=text | --schema
    --schema=text=,domain=d | --schema
    --schema=text=meta,domain=text | train.jsonl
    --schema=text=a.b.c,constant=web | train.jsonl
    --merge | --merge
    --merge --out={file} | {file}
    --merge --out={empty} | {empty}
    --verify={empty} | manifest.json
    --verify={file} | {file}
    --verify= | manifest.json
    --verify={top}/half | "shards are not as"
    --verify={top}/gone | "shards are not as"
    --verify={top}/truncated | truncated
    --verify={top}/tokenizer | tokenizer
    --verify={top}/no_tokens | no_tokens
    --verify={data} --workers=0 | "--workers 0"
    --out={top}/list | list
    --out={top}/domains | domains
    --out={data} | "holds other data"
    --out={bad}/plan | plan.json
    --out={bad}/plan --merge | plan.json
    --out={bad}/state --part=1/2 | unit_00000.json
    --out={bad}/state --merge | unit_00000.json
    stray | "'stray'"
    --worker=2 | --worker "did you mean '--workers'"
    --dry_run=1 | --dry_run
    """
)


@pytest.mark.parametrize("flags, words", PREPARE, ids=short)
def test_prepare(flags, words, places, tmp_path):
    fails("prepare_slimpajama.py", [*CORPUS, *flags], words, places, tmp_path)
    assert not (tmp_path / "out" / "manifest.json").exists()


# Wrong for every command that takes --run
RUNS = cases(
    """
    | --run={top}/nowhere | --run={file} | --run={empty} | --run | --run={data} | --rum={run}
    --run={run} --seed=x
    """
)
CHECKPOINTS = cases(
    """
    --run={runs}/no_state | --run={runs}/list | --run={runs}/truncated | --run={runs}/no_weights
    --run={runs}/folder | --run={runs}/garbage | --run={runs}/null | --run={runs}/tokenizer
    --run={runs}/wrong_shape | --run={runs}/huge_shape | --run={runs}/text_shape
    """
)
# Arguments that are wrong after --run={run}
OF_A_RUN = {
    "eval/perplexity.py": cases(
        """
        --run= | --data_dir={file} | --data_dir={empty} | --data_dir=/nowhere
        --data_dir={top}/gone | --data_dir={top}/truncated | --data_dir={top}/no_tokens
        --data_dir={top}/tokenizer | --batch_size=0 | --batch_size=x
        """
    ),
    "eval/fewshot.py": cases(
        """
        --tasks= | --tasks=, | --num_fewshot={huge} | --limit=-1 | --seed={huge}
        --include_path={file} | --batch_size=-1
        """
    ),
    "eval/inspect_samples.py": cases(
        """
        --run= | --data_dir={file} | --data_dir=/nowhere | --data_dir={top}/truncated | --top=0
        --chars=-1 | --from_step=99 | --from_step=x | --data_dir={top}/no_tokens
        """
    ),
    "eval/sample.py": cases(
        """
        --run= | --max_tokens=1e3 | --max_tokens={huge} | --n={huge} | --top_k={huge}
        --temperature=inf | --seed={huge} | --temperature= | --prompt
        """
    ),
    "scripts/export_hf.py": cases(
        """
        --run= | --to={file} | --to={file}/x | --to=/proc/x | --to={run} | --to= | --to=/tmp/{long}
        """
    ),
}
READS_NO_CHECKPOINT = ("eval/inspect_samples.py",)


def on_a_run() -> list[tuple[str, list[str]]]:
    """Every command with the arguments that are wrong for it."""
    pairs = []
    for script, own in OF_A_RUN.items():
        rows = RUNS if script in READS_NO_CHECKPOINT else RUNS + CHECKPOINTS
        pairs += [(script, flags) for flags in rows]
        pairs += [(script, ["--run={run}", *flags]) for flags in own]
    return pairs


@pytest.mark.parametrize("script, flags", on_a_run(), ids=short)
def test_commands_on_a_run(script, flags, places, tmp_path):
    if "fewshot" in script:  # the harness's own tasks take seconds
        flags = ["--include_path=tests/tasks", "--tasks=where", *flags]
    fails(script, flags, [], places, tmp_path)


# Runs that no command on several runs accepts
SEVERAL = cases(
    """
    '' | /nowhere | {file} | {empty} | {data} | {runs}/config_list | {runs}/config_truncated
    {runs}/config_empty | {runs}/result_list | {runs}/result_truncated
    {run} {runs}/other_windows | --runs={run}
    """
)
OF_TABLES = cases(
    """
    | {run} --format=html | {run} --metric=accuracy | {run} --out=. | {run} --out=/proc/x
    {run} --out={file}/x | {run} --out= | {run} --form=csv
    """
)
OF_PLOTS = cases(
    """
    --to={tmp}/out {runs}/metrics_numbers | --to={tmp}/out {runs}/metrics_no_step
    {run} --to={tmp}/out --to={file} | {run} --to={tmp}/out --to={file}/x
    {run} --to={tmp}/out --to=/proc/x | {run} --to={tmp}/out --to | {run} --to={tmp}/out --tu=x
    """
)
OF_RUNS = [("eval/tables.py", flags) for flags in SEVERAL + OF_TABLES]
OF_RUNS += [("eval/plots.py", ["--to={tmp}/out", *flags]) for flags in SEVERAL]
OF_RUNS += [("eval/plots.py", flags) for flags in OF_PLOTS]


@pytest.mark.parametrize("script, flags", OF_RUNS, ids=short)
def test_commands_on_several_runs(script, flags, places, tmp_path):
    fails(script, flags, [], places, tmp_path)


OTHERS = {
    "scripts/bench.py train": cases(
        """
        --sizes=125m | --sizes | --sizes=1x3x32 | --sizes=0x1x8 | --micro_batch=0 | --micro_batch=x
        --micro_batch_size=4 | --model=tiny | --data=/nowhere | --data={file} | --block_size=0
        --block_size={huge} | --reweight=upward | --rounds=0 | --rounds=x | --round=9 | 9
        """
    ),
    "scripts/bench.py prepare": cases(
        """
        | --input | --input={file} | --input={empty} | --input=/nowhere
        --input={corpus} --repeat=x | --input={corpus} --rounds=0 | --input={corpus} --rounds=-1
        --input={corpus} --repeat=-1 | --input={corpus} --repeat=0 | --input={corpus} --workers=0
        --input={corpus} --workers | --input={corpus} --workers=-1 | --input={corpus} --workers=two
        --inputs={corpus} | {corpus}
        """
    ),
    "scripts/bench.py loader": cases(
        """
        --shards=0 | --shards=-1 | --shards=99 | --shards=x | --shards | --shards= | --shards=1e4
        --batches=0 | --batches=-1 | --batches=99 | --batches=x | --batches | --batch=100 | 100
        --shards={huge}
        """
    ),
    "scripts/bench.py fewshot": cases(
        """
        --model=125m | --model | --model= | --batch_size=0 | --batch_size=-1 | --batch_size=x
        --batch_size | --batch_size=1e1 | --rounds=2 | --rounds=0 | --rounds=-5 | --rounds=x
        --rounds | --round=9 | small
        """
    ),
    "scripts/study_when.py": cases(
        """
        | --input | --input={corpus} | --to={tmp}/x | --input={corpus} --to
        --input={corpus} --to={tmp}/x --plan=gpu | --input={corpus} --to={tmp}/x --seeds=0
        --input={corpus} --to={tmp}/x --seeds=x | --input={corpus} --to={tmp}/x --jobs=-1
        --input={corpus} --to={tmp}/x --minutes=0 | --input={corpus} --to={tmp}/x --minutes=x
        --input=/nowhere --to={tmp}/x | --input={corpus} --to={file} | --input={empty} --to={tmp}/x
        --input={corpus} --to=/proc/x | --inputs={corpus} --to={tmp}/x
        """
    ),
    "scripts/probe_utility.py": cases(
        """
        | --run | --run=/nowhere | --run={empty} | --run={file} | --run={run} --batches=0
        --run={run} --batches=-1 | --run={run} --batches=x | --run={run} --r=0 | --run={run} --r=-1
        --run={run} --r=nan | --run={run} --r=x | --run={run} --reweight_ref=/nowhere
        --run={run} --reweight_ref={empty} | --run={run} --data_dir=/nowhere | {run}
        --run={run} --data_dir={top}/gpt2 | --runs={run}
        """
    ),
}


@pytest.mark.parametrize(
    "script, flags",
    [(script, flags) for script, rows in OTHERS.items() for flags in rows],
    ids=short,
)
def test_other_commands(script, flags, places, tmp_path):
    path, *subcommand = script.split()
    fails(path, [*subcommand, *flags], [], places, tmp_path)


# SCRIPT | VARIABLES | ARGUMENTS | WORDS of the error
SHELL = """
quickstart.sh | STEPS=0 | | STEPS=0
quickstart.sh | STEPS=-1 | | STEPS=-1
quickstart.sh | STEPS=abc | | STEPS=abc
quickstart.sh | STEPS=1e3 | | STEPS=1e3
quickstart.sh | STEPS=1.5 | | STEPS=1.5
quickstart.sh | STEPS=٣ | | STEPS=٣
quickstart.sh | "STEPS= " | | "STEPS= "
quickstart.sh | "STEPS=10 20" | | "STEPS=10 20"
quickstart.sh | STEPS=$(id) | | STEPS=$(id)
quickstart.sh | STEPS={huge} | | STEPS={huge}
quickstart.sh | | --help | --help
quickstart.sh | | 500 | 500 STEPS
quickstart.sh | PIP=1 | | "pip could not install requirements.txt"
test.sh | PIP=1 | | "pip could not install requirements-dev.txt"
environment.sh | | | requirements
environment.sh | | absent.txt | absent.txt
environment.sh | | scripts | scripts
slurm/prepare.sbatch | INPUT= | | "set INPUT"
slurm/prepare.sbatch | OUT= | | "set OUT"
slurm/prepare.sbatch | PARTS=0 | | PARTS=0
slurm/prepare.sbatch | PARTS=-3 | | PARTS=-3
slurm/prepare.sbatch | PARTS=many | | PARTS=many
slurm/prepare.sbatch | PARTS=1.5 | | PARTS=1.5
slurm/prepare.sbatch | PARTS={huge} | | PARTS
slurm/prepare.sbatch | PARTS=1-8 | | PARTS=1-8
slurm/prepare.sbatch | SLURM_ARRAY_TASK_ID=x | | TASK_ID=x
slurm/prepare.sbatch | | | "no sbatch here"
slurm/train.sbatch | GPUS=0 | | GPUS=0
slurm/train.sbatch | GPUS=all | | GPUS=all
slurm/train.sbatch | NODES=0 | | NODES=0
slurm/train.sbatch | NODES=1-2 | | NODES=1-2
slurm/train.sbatch | | config/tiny_cpu.py | "no sbatch here"
"""
PYTHONS = ("/nowhere/python", "/bin/true", "/bin/false", "/tmp", "/etc/hostname", "no such python")
BATCH = {"INPUT": "/in", "OUT": "/out", "PARTS": "2"}  # for slurm/prepare.sbatch


def shell_cases() -> list[tuple[str, dict[str, str], list[str], list[str]]]:
    rows = []
    for line in SHELL.strip().format(**CONSTANTS).splitlines():
        script, variables, args, words = (shlex.split(column) for column in line.split("|"))
        variables = dict(variable.split("=", 1) for variable in variables)
        rows.append((script[0], variables, args, words))
    for script in ("quickstart.sh", "test.sh"):
        for python in PYTHONS:
            rows.append((script, {"PYTHON": python}, [], ["PYTHON", "3.10 or later"]))
    return rows


@pytest.mark.parametrize("script, variables, args, words", shell_cases(), ids=short)
def test_shell_scripts(script, variables, args, words, tmp_path):
    """In a copy whose .venv has a python that does nothing, or fails where PIP is set."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text('python() { [ -z "${PIP:-}" ]; }\n')
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **BATCH, **variables}
    process = ["bash", f"scripts/{script}", *args]
    done = subprocess.run(process, cwd=tmp_path, env=env, capture_output=True, text=True)
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
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", folder]
    is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    if not is_mounted:
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):
            pytest.skip("mounting takes more rights")
    yield folder
    subprocess.run(["umount", "-l", folder], check=is_mounted)


@pytest.mark.parametrize(
    "script, args",
    [
        ("train.py", [*SMALL, "--out_dir={read_only}/x"]),
        ("prepare_slimpajama.py", [*CORPUS, "--out={read_only}/x"]),
        ("scripts/export_hf.py", ["--run={run}", "--to={read_only}/x"]),
        ("eval/plots.py", ["{run}", "--to={read_only}/x"]),
        ("eval/tables.py", ["{run}", "--out={read_only}/x"]),
        ("scripts/study_when.py", ["--input={data}", "--to={read_only}/x"]),
    ],
    ids=short,
)
def test_a_folder_that_may_only_be_read(script, args, places, read_only, tmp_path):
    names = {**places, "read_only": read_only}
    fails(script, args, ["{read_only}", "Read-only file system"], names, tmp_path)


def start(*args, **kwargs) -> subprocess.Popen:
    """A command as a process of its own; its standard error is a pipe."""
    process = [sys.executable, *map(str, args)]
    return subprocess.Popen(process, cwd=ROOT, stderr=subprocess.PIPE, **kwargs)


@pytest.mark.parametrize("args", [["--help"], ["--verify", "{data}"]], ids=" ".join)
def test_a_reader_that_goes_away(args, places):
    """As `| head -1` does: the command is silent, without a traceback at the interpreter's end."""
    read, write = os.pipe()
    os.close(read)
    args = [arg.format(**places) for arg in args]
    process = start("prepare_slimpajama.py", *args, stdout=write)
    os.close(write)
    said = process.communicate()[1].decode()
    assert process.returncode in (0, 141)
    assert "Traceback" not in said and "BrokenPipe" not in said


def test_output_that_does_not_fit_on_the_disk():
    args = ["--source=sample", "--tokenizer=bytes", "--out=/none/x", "--dry_run"]
    with open("/dev/full", "w") as full:
        process = start("prepare_slimpajama.py", *args, stdout=full)
        said = process.communicate()[1].decode()
    done = subprocess.CompletedProcess([], process.returncode, "", said)
    expect_error(done, "No space left on device", "make room")


def test_ctrl_c(places, tmp_path):
    """The terminal sends it to the command and its workers alike."""
    record = {"text": "words " * 200_000, "meta": {"redpajama_set_name": "RedPajamaC4"}}
    for name in ("train_a", "train_b", "val"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 60)
    args = [arg.format(corpus=tmp_path, tmp=tmp_path) for arg in CORPUS]
    process = start(
        "prepare_slimpajama.py",
        *args,
        "--tokenizer=gpt2",
        "--workers=2",
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        # A shell's & makes commands ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "out" / "preparing" / "plan.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in said and said.rstrip().endswith("interrupted")


def test_paths_with_spaces_and_letters_of_any_kind(places, tmp_path):
    out = tmp_path / "a run, 日本語 %s {x} é"
    data_dir = shutil.copytree(places["data"], tmp_path / "with space = ü")
    flags = [flag.format(**places, tmp=tmp_path) for flag in SMALL]
    expect_ok(command("train.py", *flags, f"--data_dir={data_dir}", "--out_dir", out))
    expect_ok(command("eval/perplexity.py", "--run", out))
    expect_ok(command("eval/sample.py", "--run", out, "--max_tokens=2"))
    expect_ok(command("eval/tables.py", out))


def test_paths_that_are_no_text(places, tmp_path):
    """A name of bytes that are not UTF-8, printed and written to JSON."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    args = ["--source=sample", "--tokenizer=bytes", "--out", out]
    process = start("prepare_slimpajama.py", *args, stdout=subprocess.PIPE)
    shown, said = process.communicate()
    assert process.returncode == 0
    assert b"written to" in shown and b"Traceback" not in said


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


REFUSED = [  # what the machine raises, how the line begins
    (UserError("--r 0: must be above 0"), "--r 0: must be above 0"),
    (OSError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied; give"),
    (OSError(errno.ENOSPC, "No space left"), "No space left; what was finished"),
    (OSError(errno.EROFS, "Read-only file system", b"/a"), "/a: Read-only file system; give"),
    (OSError(errno.ENOENT, "No such file", "/x"), "/x: No such file; give"),
    (OSError(errno.EMFILE, "Too many open files"), "Too many open files; allow more"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error; look at the disk"),
    (OSError(errno.ESTALE, "Stale file handle", "/nfs"), "/nfs: Stale file handle; look at"),
    (MemoryError("8 TiB"), "out of memory (8 TiB)"),
]


@pytest.mark.parametrize("error, line", REFUSED, ids=repr)
def test_what_the_machine_refuses_is_one_line(error, line, capsys):
    code, said = ended(error, capsys)
    assert code == 2 and said.startswith(f"error: {line}") and said.count("\n") == 1


def test_ctrl_c_is_one_word(capsys):
    assert ended(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


BUGS = [
    KeyError("loss"),
    ValueError("x"),
    TypeError("x"),
    RuntimeError("x"),
    OSError("x"),
    OSError(errno.EBADF, "Bad file descriptor"),
    OSError(errno.EINVAL, "Invalid argument"),
    OSError(errno.EPIPE, "Broken pipe"),
    OSError(errno.ENOENT, "No such file or directory"),  # without a file's name
]


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_bugs_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        cli.run(main)


def test_a_permission_that_is_missing(places, tmp_path, monkeypatch):
    """Root may read everything, so open itself refuses."""
    real, real_shard = open, data.ShardFile
    flags = [flag.format(**places, tmp=tmp_path) for flag in SMALL]
    for path in (places["data"] / "manifest.json", places["data"] / "c4" / "val_00000.npy"):

        def refusing(file, *args, path=path, of=real, **kwargs):
            if str(file) == str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return of(file, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", refusing)
            patch.setattr("io.open", refusing)
            patch.setattr("data.ShardFile", partial(refusing, of=real_shard))
            expect_error(command("train.py", *flags), str(path), "Permission denied")
