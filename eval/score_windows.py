"""A reference model's loss on every window that a run will train on, for --reweight_ref.

    python eval/score_windows.py --run runs/reference --to data/x/reference.npz -- \\
        config/gpt2_124m_linupper.py --data_dir data/x

After -- come the config files and flags of the run that will use the file; they say which windows
it draws. The file then costs nothing in a step. It is 8 bytes per window: 5 MB for the published
124M run.
"""

import io
import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from cli import Parser, UserError, parse
from cli import run as run_command
from corpus.manifest import data_hash
from data import RunData
from eval import models, perplexity
from files import write_bytes
from recipe import TrainConfig
from runtime import distributed
from runtime.plan import open_data
from runtime.reference import check_run, find_folder


def windows_drawn(run_data: RunData, max_steps: int) -> np.ndarray:
    """(M, 2) domain and window of all samples of a run, each once, in order."""
    n_windows = run_data.train.n_windows
    is_drawn = [np.zeros(n, dtype=bool) for n in n_windows]
    for step in range(max_steps):
        pairs = run_data.sampler.draw(step)
        for domain in np.unique(pairs[:, 0]):
            is_drawn[domain][pairs[pairs[:, 0] == domain, 1]] = True
    pairs = []
    for domain, drawn in enumerate(is_drawn):
        windows = np.flatnonzero(drawn)
        pairs.append(np.stack([np.full_like(windows, domain), windows], axis=1))
    return np.concatenate(pairs)


def write(path: Path, about: dict, of_domain: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The file that runtime/reference.py reads; of_domain: windows and losses of each."""
    arrays = {"about": np.array(json.dumps(about))}
    for domain, (windows, losses) in of_domain.items():
        arrays[f"windows/{domain}"] = windows.astype(np.uint32)
        arrays[f"losses/{domain}"] = losses.astype(np.float32)
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_bytes(path, content.getvalue())


def main() -> None:
    own, of_run = sys.argv[1:], []
    if "--" in own:
        place = own.index("--")
        own, of_run = own[:place], own[place + 1 :]
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="run folder or checkpoint of the reference")
    parser.add_argument("--to", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--dtype", help="of the matrix products (default: the reference's own)")
    parser.add_argument(
        "--batch_size", type=int, default=32, help="windows per rank and forward pass (default: 32)"
    )
    parser.set_defaults(hf=None)
    args = parser.parse_args(own)
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be above 0")
    if not of_run:
        raise UserError("give the config files and flags of the run that will use it, after --")

    config = parse(TrainConfig, __doc__, of_run)
    run_data = open_data(config)
    about = check_run(args.run, config.block_size, run_data.train.tokenizer_sha256)
    evaluated = models.open_model(args)
    pairs = windows_drawn(run_data, config.max_steps)
    device = distributed.setup("cuda" if torch.cuda.is_available() else "cpu")
    scores = perplexity.score(
        evaluated.model.to(device),
        run_data.train,
        pairs,
        args.batch_size,
        evaluated.about["dtype"],
        progress=True,
    )
    if distributed.ranks().rank == 0:
        of_domain = {}
        for d, domain in enumerate(run_data.train.domains):
            members = pairs[:, 0] == d
            of_domain[domain] = (pairs[members, 1], scores.windows[members])
        content = {
            **about._asdict(),
            "run": str(find_folder(args.run)),
            "data": data_hash(run_data.manifest),
            "block_size": config.block_size,
            "dtype": evaluated.about["dtype"],
            "domains": list(of_domain),
        }
        write(args.to, content, of_domain)
        print(f"{len(pairs):,} windows scored: {args.to}")
    distributed.cleanup()


if __name__ == "__main__":
    run_command(main)
