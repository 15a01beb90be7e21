"""What a bug report needs, and what is wrong here: python train.py --doctor [config files and flags].

A line each: ok, warning (it may work, but look at it) or wrong (a run would stop there). Exit code 1 if one is wrong.
"""

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import data
import distributed
import tokenizer
from errors import UserError
from manifest import data_hash, read_manifest
from metrics import versions
from model import GPT, SIZES

ROOT = Path(__file__).parent
Line = tuple[str, str, str]  # "ok", "warning" or "wrong"; of what; what there is


def examine(config: Any) -> None:
    """Print all lines for a TrainConfig; exit code 1 where one is wrong."""
    marks = []
    for check in (code, packages, ranks, devices, memory, limits, folder, tokenizers, tokens):
        try:
            for mark, what, text in check(config):
                marks.append(mark)
                print(f"{mark:<9}{what:<16}{text}", flush=True)
        except (UserError, OSError) as error:
            marks.append("wrong")
            print(f"{'wrong':<9}{check.__name__:<16}{error}", flush=True)
    print(f"{marks.count('wrong')} wrong, {marks.count('warning')} warnings")
    if "wrong" in marks:
        sys.exit(1)


def code(config: Any) -> Iterator[Line]:
    yield "ok", "command", versions()["command"]
    yield "ok", "system", f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    commit = versions()["git_commit"]
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True,
                             text=True).stdout.splitlines() if commit else []
    yield ("warning" if changed or not commit else "ok", "commit", f"{commit or 'unknown: no git, or not a clone'}"
           f"{f', {len(changed)} files differ from it' if changed else ''}")


def packages(config: Any) -> Iterator[Line]:
    """Those of requirements.txt must be there; the others are for evaluation, export and tests."""
    yield "ok" if sys.version_info >= (3, 10) else "wrong", "python", f"{sys.version.split()[0]}, {sys.executable}"
    for file in sorted(ROOT.glob("requirements*.txt"), key=lambda path: len(path.name)):
        for name in re.findall(r"^[A-Za-z][\w.-]*", file.read_text(), re.MULTILINE):
            try:
                yield "ok", name, version(name)
            except PackageNotFoundError:
                needed = file.name == "requirements.txt"
                yield "wrong" if needed else "ok", name, f"not installed: pip install -r {file.name}"


def ranks(config: Any) -> Iterator[Line]:
    rank, local_rank, world_size = distributed.ranks()
    yield "ok", "ranks", f"rank {rank} of {world_size}, local rank {local_rank}"


def devices(config: Any) -> Iterator[Line]:
    """GPUs as torch sees them; where it sees none, whether the driver does."""
    cuda = torch.cuda.is_available()
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                            text=True).stdout.split("\n")[0] if shutil.which("nvidia-smi") else ""
    if not cuda:
        there = f"none, though the driver ({driver}) is there: torch {torch.__version__} may be built for another CUDA"
        mark = "wrong" if config.device == "cuda" else "warning" if driver else "ok"
        yield mark, "GPUs", there if driver else f"none{'; --device cuda needs one' if mark == 'wrong' else ''}"
        return
    yield "ok", "CUDA", f"{torch.version.cuda}, driver {driver or 'unknown'}, cuDNN {torch.backends.cudnn.version()}"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
    yield "ok" if nccl else "wrong", "NCCL", nccl or "not in this build of torch; several GPUs need it"
    for i in range(torch.cuda.device_count()):
        (free, total), (major, minor) = torch.cuda.mem_get_info(i), torch.cuda.get_device_capability(i)
        yield ("ok" if free > 0.9 * total else "warning", f"GPU {i}", f"{torch.cuda.get_device_name(i)}, capability "
               f"{major}.{minor}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield "ok" if bf16 else "warning", "bfloat16", "yes" if bf16 else "no: float32 is used, at a fraction of the speed"
    flash = torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)
    yield "ok" if flash else "warning", "flash attention", "yes" if flash else "no: attention takes more memory"


def memory(config: Any) -> Iterator[Line]:
    found = re.findall(r"^(MemTotal|MemAvailable): *(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE) if (
        Path("/proc/meminfo").exists()) else []
    total, free = (int(dict(found).get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
    if total:
        yield "ok" if free > 2e9 else "warning", "memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def limits(config: Any) -> Iterator[Line]:
    """Open files: 64 shards a split, sockets to all ranks. Locked memory: what InfiniBand registers."""
    for what, name, least in (("open files", "NOFILE", 1024),
                              ("locked memory", "MEMLOCK", 2**26 if torch.cuda.is_available() else 0)):
        soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        shown = ["unlimited" if x == resource.RLIM_INFINITY else f"{x:,}" for x in (soft, hard)]
        low = soft != resource.RLIM_INFINITY and soft < least
        yield "warning" if low else "ok", what, f"{shown[0]}{f', at most {shown[1]}' if hard != soft else ''}"


def folder(config: Any) -> Iterator[Line]:
    """out_dir, or where it would be made: may it be written, and is there room for the checkpoints?"""
    wanted = Path(config.out_dir or "runs").absolute()
    there = next(path for path in (wanted, *wanted.parents) if path.exists())
    with torch.device("meta"):
        n = GPT(replace(SIZES.get(config.model, SIZES["124m"]), block_size=config.block_size)).n_parameters()
    needed = 12 * n * (config.keep_checkpoints + 1)  # float32: weights and two moments
    free = shutil.disk_usage(there).free
    writable = there.is_dir() and os.access(there, os.W_OK)
    text = f"{wanted}, {free / 1e9:.1f} GB free, checkpoints take up to {needed / 1e9:.1f} GB"
    yield "ok" if writable and free > needed else "wrong", "out_dir", text + ("" if writable else f"; {there} is no "
                                                                              "folder that may be written")


def tokenizers(config: Any) -> Iterator[Line]:
    for name in tokenizer.NAMES:
        yield "ok", f"tokenizer {name}", tokenizer.load(name).sha256[:16]


def tokens(config: Any) -> Iterator[Line]:
    """The data folder: every shard is there and as long as the manifest says."""
    manifest = read_manifest(config.data_dir)
    made_by = manifest["tokenizer"]
    known = made_by["name"] in tokenizer.NAMES and tokenizer.load(made_by["name"]).sha256 == made_by["sha256"]
    splits = {split: data.Split(config.data_dir, manifest, split, config.block_size) for split in ("train", "val")}
    yield "ok", "data_dir", f"{config.data_dir}, fingerprint {data_hash(manifest)}"
    yield ("ok" if known else "warning", "its tokenizer", f"{made_by['name']}, {made_by['sha256'][:16]}"
           f"{'' if known else ', none of the tokenizers here'}")
    for name, split in splits.items():
        held = ", ".join(f"{domain} {n:,}" for domain, n in split.tokens.items())
        yield "ok" if split.tokens else "wrong", f"{name} tokens", held or "none"
    data.mixture_weights(config.mixture, splits["train"])
    yield "ok", "mixture", config.mixture
