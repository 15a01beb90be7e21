"""What starting, saving and resuming take of a rank's memory; each rank writes OUT.RANK.json.

Bytes beyond what was there before: the most that torch's allocator had handed out at a time.
tests/test_parts.py starts this file with several ranks and the arguments OUT and PARALLEL.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from layout_worker import batch_of

from families import build_empty
from llama import LlamaConfig
from recipe import TrainConfig, settle
from runtime import checkpoint, distributed, init_from, parts
from scripts.benchmarks.memory import peak_bytes
from step import Trainer

SHAPE = LlamaConfig(8, 4, 256, n_kv_head=2, n_ffn=512, block_size=24, vocab_size=64)


def main() -> None:
    out, parallel = sys.argv[1:]
    rank, _, world_size = distributed.ranks()
    distributed.setup("cpu")
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # two nodes
    settings = {"parallel": parallel, "global_batch_size": 16, "device": "cpu", "loss_chunk": 0}
    config = settle(TrainConfig(**settings), world_size)
    trainers = []

    def make() -> None:
        trainers.append(Trainer(build_empty(SHAPE), config, 3, torch.device("cpu")))

    def start() -> None:
        make()
        trainers[0].set_weights(init_from.starting_weights(config, SHAPE))

    def save() -> None:
        tensors, numbers = trainers[0].state_dict()
        hashes = {}
        if rank < trainers[0].share.n:
            hashes = checkpoint.write_part(out, 1, tensors, trainers[0].share)
        of_all = distributed.gather_objects(hashes)
        if rank == 0:
            merged = {name: digest for own in of_all for name, digest in own.items()}
            state = {"gpt": vars(SHAPE), **numbers}
            checkpoint.complete(out, 1, merged, state, keep=1, every=0)
        distributed.wait_for_all()

    def resume() -> None:
        folder = checkpoint.checkpoint_folder(out, 1)
        make()
        trainers[1].load_state(
            checkpoint.read_parts(folder, SHAPE), checkpoint.read_json(folder / "state.json")
        )

    if rank == 0:
        checkpoint.begin(out, 1)
    peaks = {"start": peak_bytes(start)}
    trainers[0].step(0, batch_of(0))
    peaks["save"], peaks["resume"] = peak_bytes(save), peak_bytes(resume)
    states = [parts.own_state(trainer.raw, trainer.optimizer)[0] for trainer in trainers]
    peaks["equal"] = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    peaks["share"] = sum(tensor.nbytes for tensor in states[0].values())
    peaks["model"] = 4 * build_empty(SHAPE).n_parameters()
    peaks["block"] = sum(4 * p.numel() for p in build_empty(SHAPE).h[0].parameters())
    Path(f"{out}.{rank}.json").write_text(json.dumps(peaks))
    distributed.cleanup()


if __name__ == "__main__":
    main()
