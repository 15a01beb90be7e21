"""Per-sample weights from the losses of one global batch (Sow et al., ICLR 2025, arXiv 2502.06733).

    h_i = delta * (2 l_i - l_max - l_min) / (l_max - l_min)      # normalised loss, in [-delta, delta]
    w_i = softmax_i( f(h_i) / r )                                # f: the strategy; r: temperature (the paper's r)

This w maximises sum_i w_i f(h_i) - r KL(w || uniform): r -> infinity gives the plain mean. A sample is one training
sequence, its loss the mean over its tokens in nats. Everything here is a pure function of tensors.

N samples of the global batch, D domains.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# name -> f(h, delta). A new strategy is one entry; flags, tests, plots and tables follow from it.
STRATEGIES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "uniform": lambda h, delta: torch.zeros_like(h),
    "linupper": lambda h, delta: torch.clamp(h + delta, max=delta),     # low losses linearly less, the rest equally
    "quadratic": lambda h, delta: 1 - (h / delta) ** 2,                 # medium losses most
    "extremes": lambda h, delta: h.abs(),                               # lowest and highest losses most
    "upper": lambda h, delta: (h + delta) / 2,                          # high losses linearly more
}

def trimmed_range(losses: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) -> the lowest and the highest loss without a tenth of the samples, but at least one, at each end."""
    k = min(-(-len(losses) // 10), (len(losses) - 2) // 2) if len(losses) > 1 else 0
    ordered = losses.sort().values
    return ordered[k], ordered[-1 - k]


# name -> (l_min, l_max) of (N,) losses; a loss beyond them is clipped
NORMS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "minmax": lambda losses: (losses.min(), losses.max()),              # as published; hangs on two samples
    "quantile": trimmed_range,                                          # no single sample can squeeze the others
    "domain": lambda losses: (losses.min(), losses.max()),              # of losses minus their domain's (train.py)
}
DOMAIN_DECAY = 0.95  # of a domain's running mean loss, per step


def normalize_losses(losses: Tensor, delta: float = 1.0, norm: str = "minmax") -> Tensor:
    """(N,) losses in nats -> (N,) h in [-delta, delta]; all losses equal -> zeros."""
    losses = losses.float()
    low, high = NORMS[norm](losses)
    losses = losses.clamp(low, high)
    # Written as the two distances: 2 l - l_max - l_min cancels in float32 when the losses are nearly equal.
    return delta * ((losses - low) - (high - losses)) / (high - low).clamp(min=1e-6)


@torch.no_grad()
def sample_weights(losses: Tensor, strategy: str, r: float, delta: float = 1.0, norm: str = "minmax",
                   max_weight: float = 0.0) -> Tensor:
    """(N,) losses in nats -> (N,) float32 weights that sum to 1 and carry no gradient; "uniform" is exactly 1/N.

    max_weight caps every weight at max_weight / N (0: no cap).
    """
    if strategy == "uniform":  # not left to the softmax: the baseline must be the plain mean bit for bit
        return torch.full_like(losses, 1 / len(losses), dtype=torch.float32)
    weights = torch.softmax(STRATEGIES[strategy](normalize_losses(losses, delta, norm), delta) / r, dim=0)
    return cap_weights(weights, max_weight / len(losses)) if max_weight else weights


def cap_weights(weights: Tensor, cap: float) -> Tensor:
    """(N,) weights that sum to 1 -> min(cap, scale * weights) that sum to 1; needs cap >= 1/N.

    The maximiser of the module's objective under w_i <= cap: what the capped samples lose goes to the others in
    proportion to their weights.
    """
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)  # a weight of 0 could take nothing
    k = torch.arange(len(weights), device=weights.device)
    rest = weights.sort().values.cumsum(0).flip(0)  # (N,) the sum of all but the k largest
    # With the k largest capped the others are scaled by (1 - k cap) / rest. It grows with k as long as the largest one
    # left would pass the cap, and falls from there on: the greatest is the one that holds.
    scale = ((1 - k * cap) / rest).max()
    return (weights * scale).clamp(max=cap)


def track_domain_losses(state: Tensor, losses: Tensor, domain: Tensor) -> Tensor:
    """(2, D) decayed sums of losses and of counts, (N,) losses, (N,) domain index -> the state after this step."""
    # Sums in a fixed order and in float32 on every device, so that all ranks and a resumed run have the same bits:
    # index_add has no order on a GPU, and a matrix product would round the losses to TF32.
    one_hot = F.one_hot(domain, state.size(1)).to(losses.dtype)  # (N, D)
    return DOMAIN_DECAY * state + torch.stack([(losses[:, None] * one_hot).sum(0), one_hot.sum(0)])


def domain_means(state: Tensor) -> Tensor:
    """(2, D) state of track_domain_losses -> (D,) running mean losses in nats; the mean of all for an unseen domain."""
    losses, counts = state
    return torch.where(counts > 1e-9, losses / counts.clamp(min=1e-9), losses.sum() / counts.sum().clamp(min=1e-9))
