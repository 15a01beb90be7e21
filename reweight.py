"""Per-sample weights from the losses of one global batch (Sow et al., ICLR 2025, arXiv 2502.06733).

    h_i = delta * (2 l_i - l_max - l_min) / (l_max - l_min)    # normalized loss in [-delta, delta]
    w_i = softmax_i( f(h_i) / r )                              # f: the strategy, r: temperature

This w maximises sum_i w_i f(h_i) - r KL(w || uniform): r -> infinity gives the plain mean. A
sample is one training sequence, its loss the mean over its tokens in nats. Everything here is a
pure function of tensors.

N samples of the global batch, D domains.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def band(h: Tensor, delta: float) -> Tensor:
    """linupper that falls to 0 again over the highest third of the losses, which may be noise.

    A relative of the MidRanking of IR-DRO (arXiv 2402.14270), and not from the paper.
    """
    top = h.sort().values[2 * (len(h) - 1) // 3]
    beyond = (h - top).clamp(min=0) / (delta - top).clamp(min=1e-6)  # 0 below, 1 at the highest
    return torch.clamp(h + delta, max=delta) * (1 - beyond)


# name -> f(h, delta). A new strategy is one entry; flags, tests, plots and tables follow from it.
STRATEGIES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "uniform": lambda h, delta: torch.zeros_like(h),
    # low losses linearly less, the others equally
    "linupper": lambda h, delta: torch.clamp(h + delta, max=delta),
    # medium losses most
    "quadratic": lambda h, delta: 1 - (h / delta) ** 2,
    # lowest and highest losses most
    "extremes": lambda h, delta: h.abs(),
    # high losses linearly more
    "upper": lambda h, delta: (h + delta) / 2,
    # high losses, but not the highest third
    "band": band,
}


def full_range(losses: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) -> lowest and highest loss."""
    return losses.min(), losses.max()


def trimmed_range(losses: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) -> lowest and highest loss without a tenth of the samples (at least one) at each end."""
    N = len(losses)
    k = 0
    if N > 1:
        k = min(math.ceil(N / 10), (N - 2) // 2)
    ordered = losses.sort().values
    return ordered[k], ordered[-1 - k]


# name -> (l_min, l_max) of (N,) losses; a loss beyond them is clipped.
NORMS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    # as published; two samples decide
    "minmax": full_range,
    # no single sample can squeeze the others
    "quantile": trimmed_range,
    # of losses minus the running mean loss of their domain (step.py)
    "domain": full_range,
}
DOMAIN_DECAY = 0.95  # of a domain's running mean loss, per step


def normalize_losses(losses: Tensor, delta: float = 1.0, norm: str = "minmax") -> Tensor:
    """(N,) losses in nats -> (N,) h in [-delta, delta]; all losses equal -> zeros."""
    losses = losses.float()
    low, high = NORMS[norm](losses)
    losses = losses.clamp(low, high)
    # Written as the two distances: 2 l - l_max - l_min cancels in float32 when the losses are
    # nearly equal.
    return delta * ((losses - low) - (high - losses)) / (high - low).clamp(min=1e-6)


@torch.no_grad()
def sample_weights(
    losses: Tensor,
    strategy: str,
    r: float,
    delta: float = 1.0,
    norm: str = "minmax",
    max_weight: float = 0.0,
) -> Tensor:
    """(N,) losses in nats -> (N,) float32 weights that sum to 1 and carry no gradient.

    "uniform" is exactly 1/N. max_weight caps every weight at max_weight / N (0: no cap).
    """
    N = len(losses)
    if strategy == "uniform":
        # Not left to the softmax: the baseline must be the plain mean bit for bit.
        return torch.full_like(losses, 1 / N, dtype=torch.float32)
    h = normalize_losses(losses, delta, norm)
    weights = torch.softmax(STRATEGIES[strategy](h, delta) / r, dim=0)
    if max_weight:
        weights = cap_weights(weights, max_weight / N)
    return weights


def shuffled_order(n: int, *key: int) -> np.ndarray:
    """(n,) a pseudo-random order that depends on the key alone, whatever the version of NumPy."""
    words = np.random.SeedSequence(key).generate_state(n, np.uint64)
    return np.argsort(words, kind="stable")


def order_within(order: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(n,) an order of samples -> an order in which each place holds a sample of its own group.

    group: (n,) int of each sample. The samples of a group come in the order they had.
    """
    within = np.empty_like(order)
    within[np.argsort(group, kind="stable")] = order[np.argsort(group[order], kind="stable")]
    return within


def cap_weights(weights: Tensor, cap: float) -> Tensor:
    """(N,) weights that sum to 1 -> min(cap, scale * weights) that sum to 1; needs cap >= 1/N.

    This maximizes the module's objective under w_i <= cap: what the capped samples lose goes to the
    others in proportion to their weights.
    """
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)  # 0 could not be scaled up
    k = torch.arange(len(weights), device=weights.device)
    rest = weights.sort().values.cumsum(0).flip(0)  # (N,) the sum of all but the k largest
    # With the k largest capped, the others are scaled by (1 - k cap) / rest. This grows with k as
    # long as the largest one left would exceed the cap, and falls from then on: so the maximum over
    # k is the right scale.
    scale = ((1 - k * cap) / rest).max()
    return (weights * scale).clamp(max=cap)


def track_domain_losses(state: Tensor, losses: Tensor, domain: Tensor) -> Tensor:
    """(2, D) decayed sums of losses and of counts -> the state after a step.

    losses: (N,) of its samples; domain: (N,) their domain indices.
    """
    # Sums in a fixed order and in float32 on every device, so that all ranks and a resumed run
    # have the same bits: index_add has no order on a GPU, and a matrix product would round the
    # losses to TF32.
    one_hot = F.one_hot(domain, state.size(1)).to(losses.dtype)  # (N, D)
    sums, counts = (losses[:, None] * one_hot).sum(0), one_hot.sum(0)  # (D,) each
    return DOMAIN_DECAY * state + torch.stack([sums, counts])


def domain_means(state: Tensor) -> Tensor:
    """(2, D) state of track_domain_losses -> (D,) running mean losses in nats.

    A domain that was not drawn yet gets the mean of all.
    """
    sums, counts = state
    means = sums / counts.clamp(min=1e-9)
    mean_of_all = sums.sum() / counts.sum().clamp(min=1e-9)
    return torch.where(counts > 1e-9, means, mean_of_all)
