"""Benchmarks: one command for all of them.

    python scripts/bench.py COMMAND [flags]         # COMMAND --help lists its flags

Commands:

    train      how fast a training step is, where its time goes, and what reweighting costs
    options    what each option of reweighting, and the optimizer, costs in a step
    peers      our step against nanoGPT, the published way and the Hugging Face Trainer
    memory     the peak memory of a step, predicted and measured, and what fits on which card
    eval       what an evaluation costs beyond the model's forward passes
    fewshot    few-shot scoring against the harness's own Hugging Face backend
    loader     opening many shards, reading batches from them, and the memory that takes
    prepare    preparing a corpus against tiktoken alone
    prepare_peers    the same against nanoGPT's script and datatrove

What is compared takes turns in one run, so that all variants meet the same machine.
"""

import sys
from importlib import import_module
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import UserError, nearest, run

# Each is a file of scripts/benchmarks/.
COMMANDS = (
    "train",
    "options",
    "peers",
    "memory",
    "eval",
    "fewshot",
    "loader",
    "prepare",
    "prepare_peers",
)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        problem = f"unknown command {name!r}{nearest(name, COMMANDS)}" if name else "no command"
        raise UserError(f"{problem}; give one of {', '.join(COMMANDS)} (--help explains them)")
    import_module(f"scripts.benchmarks.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    run(main)
