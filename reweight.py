"""Per-sample weights from the losses of one global batch (Sow et al., ICLR 2025, arXiv 2502.06733).

    h_i = delta * (2 l_i - l_max - l_min) / (l_max - l_min)      # min-max normalised loss, in [-delta, delta]
    w_i = softmax_i( f(h_i) / r )                                # f: the strategy; r: temperature (the paper's r)

This w maximises sum_i w_i f(h_i) - r KL(w || uniform): r -> infinity gives the plain mean. A sample is one training
sequence, its loss the mean over its tokens in nats. Everything here is a pure function of tensors.

N samples of the global batch, D domains.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# name -> f(h, delta). A new strategy is one entry; flags, tests, plots and tables follow from it.
STRATEGIES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "uniform": lambda h, delta: torch.zeros_like(h),
    "linupper": lambda h, delta: torch.clamp(h + delta, max=delta),     # low losses linearly less, the rest equally
    "quadratic": lambda h, delta: 1 - (h / delta) ** 2,                 # medium losses most
    "extremes": lambda h, delta: h.abs(),                               # lowest and highest losses most
    "upper": lambda h, delta: (h + delta) / 2,                          # high losses linearly more
}


def normalize_losses(losses: Tensor, delta: float = 1.0) -> Tensor:
    """(N,) losses in nats -> (N,) h in [-delta, delta]; all losses equal -> zeros."""
    losses = losses.float()
    low, high = losses.min(), losses.max()
    # Written as the two distances: 2 l - l_max - l_min cancels in float32 when the losses are nearly equal.
    return delta * ((losses - low) - (high - losses)) / (high - low).clamp(min=1e-6)


@torch.no_grad()
def sample_weights(losses: Tensor, strategy: str, r: float, delta: float = 1.0) -> Tensor:
    """(N,) losses in nats -> (N,) float32 weights that sum to 1 and carry no gradient; "uniform" is exactly 1/N."""
    if strategy == "uniform":  # not left to the softmax: the baseline must be the plain mean bit for bit
        return torch.full_like(losses, 1 / len(losses), dtype=torch.float32)
    return torch.softmax(STRATEGIES[strategy](normalize_losses(losses, delta), delta) / r, dim=0)


def weight_statistics(losses: Tensor, weights: Tensor, domain: Tensor, domains: tuple[str, ...]) -> dict:
    """What a log line says of one step's (N,) losses, weights and domain indices; copies to the host once.

    ess: effective sample size 1 / sum w^2 as a fraction of N; max_weight: times N; per domain the share of the
    weight and the plain mean loss, for the domains that the batch holds.
    """
    losses, weights = losses.double(), weights.double()
    sums = torch.zeros(3, len(domains), dtype=torch.float64, device=losses.device)
    sums.index_add_(1, domain.to(losses.device), torch.stack([weights, losses, torch.ones_like(losses)]))
    head = torch.stack([losses.mean(), (weights * losses).sum(), 1 / (weights**2).sum() / len(losses),
                        weights.max() * len(losses)])
    values = torch.cat([head, sums.flatten()]).tolist()
    (loss, weighted_loss, ess, max_weight), rest, n = values[:4], values[4:], len(domains)
    share, loss_sum, count = rest[:n], rest[n:2 * n], rest[2 * n:]
    held = [i for i in range(n) if count[i]]
    return {"loss": loss, "weighted_loss": weighted_loss, "ess": ess, "max_weight": max_weight,
            "weight_by_domain": {domains[i]: share[i] for i in held},
            "loss_by_domain": {domains[i]: loss_sum[i] / count[i] for i in held}}
