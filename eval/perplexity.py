"""Per-domain loss and perplexity of a checkpoint on fixed validation windows; all ranks share the work.

    python eval/perplexity.py --run runs/124m_uniform_linupper_seed42          # the newest checkpoint, all windows
    torchrun --nproc_per_node 8 -- eval/perplexity.py --run RUN/checkpoints/step_00020000

Writes RUN/eval/perplexity.json. Validation is never weighted: every window counts once, whatever the run trained on.
M windows, T tokens each, D domains.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import checkpoint
import data
import distributed
from configurator import Parser
from distributed import print0
from errors import UserError, run
from files import write_text
from manifest import read_manifest


def validation_windows(split: data.Split, per_domain: int | None) -> np.ndarray:
    """(M, 2) domain and window: all of them, or `per_domain` evenly spaced ones; the same for every run and layout."""
    pairs = []
    for d, n in enumerate(split.n_windows.tolist()):
        m = min(n, per_domain or n)
        pairs += [(d, i * n // m) for i in range(m)]
    if not pairs:
        raise UserError(f"the validation split has no window of {split.block_size} tokens; prepare one (files or "
                        "folders called validation), or use a smaller --block_size")
    return np.array(pairs, dtype=np.int64)


@torch.no_grad()
def evaluate(model: torch.nn.Module, split: data.Split, pairs: np.ndarray, batch_size: int, dtype: str,
             stop: Callable[[], int] = lambda: 0) -> dict:
    """Mean loss in nats per token, perplexity and bits per byte of each domain; the same on every rank.

    mean_loss is the plain average over domains; bits per byte takes bytes per token from the domain's whole split.
    {} if `stop`, which is called after each batch and must say the same on all ranks, ends it early.
    """
    rank, _, W = distributed.ranks()
    device = next(model.parameters()).device
    # Every rank and batch gets the same shape; the rows that fill up the last ones count nothing.
    padded = np.resize(pairs, (-(-len(pairs) // (W * batch_size)) * W * batch_size, 2))
    mine = np.arange(len(padded))[rank::W]
    training = model.training
    model.eval()
    window_nats = []  # of (batch_size,) sums over T

    def read(i: int):
        return data.read_batch(split, padded[mine[i:i + batch_size]], pin=device.type == "cuda")

    for x, y, _ in data.prefetch(read, range(0, len(mine), batch_size)):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            losses = model(x.to(device, non_blocking=True), y.to(device, non_blocking=True))  # (batch_size, T)
        window_nats.append(losses.sum(1))
        if stop():
            break
    model.train(training)
    if len(window_nats) * batch_size < len(mine):
        return {}
    counted = mine < len(pairs)
    nats, domain = torch.cat(window_nats).cpu().double()[counted], torch.from_numpy(padded[mine[counted], 0])
    sums = torch.zeros(2, len(split.domains), dtype=torch.float64)  # nats and windows per domain
    sums.index_add_(1, domain, torch.stack([nats, torch.ones_like(nats)]))
    nats, windows = distributed.reduce_sum(sums.to(device) if W > 1 else sums).tolist()  # W > 1: not on mps
    return summarize(split, pairs, nats, windows)


def summarize(split: data.Split, pairs: np.ndarray, nats: list[float], windows: list[float]) -> dict:
    """Sums per domain -> the record of metrics.jsonl and perplexity.json."""
    domains = {}
    for name, total, count in zip(split.domains, nats, windows, strict=True):
        if count:
            loss = total / (count * split.block_size)
            domains[name] = {"loss": loss, "ppl": perplexity(loss), "tokens": int(count) * split.block_size,
                             "bits_per_byte": loss / math.log(2) * split.tokens[name] / split.bytes[name]}
    content = json.dumps([split.sha256, split.block_size, pairs.tolist()]).encode()
    return {"domains": domains, "mean_loss": sum(d["loss"] for d in domains.values()) / len(domains),
            "worst_domain": max(domains, key=lambda d: domains[d]["loss"]),
            "val_hash": hashlib.sha256(content).hexdigest()[:16]}


def perplexity(loss: float) -> float:
    """exp(loss); inf where that is beyond a double (a diverged model)."""
    return math.exp(loss) if loss < 709 else math.inf


def table(record: dict) -> str:
    """The record as text, a line per domain."""
    lines = [f"{'domain':<14}{'loss (nats)':>12}{'perplexity':>12}{'bits/byte':>11}{'tokens':>12}"]
    lines += [f"{name:<14}{d['loss']:>12.4f}{d['ppl']:>12.3f}{d['bits_per_byte']:>11.4f}{d['tokens']:>12,}"
              for name, d in record["domains"].items()]
    lines += [f"{'average':<14}{record['mean_loss']:>12.4f}{perplexity(record['mean_loss']):>12.3f}",
              f"worst domain: {record['worst_domain']}"]
    return "\n".join(lines)


def find_run(path: str) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) from either one."""
    folder = Path(path)
    if (folder / "state.json").is_file():
        folder = folder.resolve()
        return folder.parents[1] if folder.parent.name == "checkpoints" else folder, folder
    newest = checkpoint.find_latest(folder)
    if newest is None:
        raise UserError(f"--run {path}: no checkpoint there; give a run folder (it has checkpoints/) or a checkpoint")
    return folder, newest


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="run folder, or one of its checkpoints")
    parser.add_argument("--data_dir", help="data folder (default: the one the run was trained on)")
    parser.add_argument("--batch_size", type=int, default=32, help="windows per rank and forward pass (default: 32)")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be above 0")
    run_dir, folder = find_run(args.run)
    state = checkpoint.read_json(folder / "state.json")
    data_dir = args.data_dir or state["data_dir"]
    manifest = read_manifest(data_dir)
    if manifest["tokenizer"]["sha256"] != state["tokenizer_sha256"]:
        raise UserError(f"{data_dir} has tokenizer {manifest['tokenizer']['name']}, the model was trained with another")
    split = data.Split(data_dir, manifest, "val", state["gpt"]["block_size"])
    pairs = validation_windows(split, None)
    device = distributed.setup("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoint.load_model(folder).to(device)
    dtype = state["identity"]["dtype"] if device.type == "cuda" else "float32"
    record = {"step": state["step"], **evaluate(model, split, pairs, args.batch_size, dtype)}
    if distributed.ranks().rank == 0:
        (run_dir / "eval").mkdir(exist_ok=True)
        write_text(run_dir / "eval" / "perplexity.json", json.dumps(record, indent=1))
    print0(table(record))
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
