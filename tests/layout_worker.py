"""One step of every strategy on this rank, as train.py does it; rank 0 saves gradients, losses, weights.

    torchrun --nproc_per_node W tests/layout_worker.py OUT.pt MICRO_BATCH_SIZE SCOPE DROPOUT
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import distributed
import train
from model import GPT, GPTConfig
from reweight import STRATEGIES

G, T, V = 16, 24, 64


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its last step and changes nothing."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def global_batch() -> torch.Tensor:
    """(G, T + 1) tokens; rows of different entropy, so that their losses differ."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([rng.integers(0, 2 + 60 * i // G, T + 1) for i in range(G)]))


def small_model(dropout: float) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=V, dropout=dropout))
    with torch.no_grad():
        model.wte.weight.mul_(20)  # far from the uniform prediction of a fresh model
    return model


def main() -> None:
    out, B, scope, dropout = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    rank, _, W = distributed.ranks()
    device = distributed.setup("cpu")
    model = distributed.data_parallel(small_model(dropout), device)
    rows = global_batch()[rank * G // W:(rank + 1) * G // W]
    results = {}
    for strategy in STRATEGIES:
        config = replace(train.settle(train.TrainConfig(device="cpu", global_batch_size=G, micro_batch_size=B), W),
                         reweight=strategy, reweight_scope=scope, reweight_warmup_steps=0, grad_clip=0.0)
        optimizer = Recorder(model.parameters(), lr=1.0)
        losses, weights, norm = train.train_step(model, optimizer, rows[:, :-1], rows[:, 1:], 3, config)
        results[strategy] = {"gradient": torch.cat([g.flatten() for g in optimizer.gradients]), "norm": norm,
                             "losses": distributed.gather(losses), "weights": distributed.gather(weights)}
    if rank == 0:
        torch.save(results, out)
    del model
    distributed.cleanup()


if __name__ == "__main__":
    main()
