"""One optimizer step, and everything that a step changes.

n = G / W sequences of this rank, B of a micro-batch, A = n / B micro-batches, T tokens, D domains;
G is the global batch and W the number of ranks.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Batch
from model import LanguageModel
from recipe import TrainConfig, lr_at, r_at
from reweight import (
    domain_means,
    order_within,
    sample_weights,
    shuffled_order,
    track_domain_losses,
)
from runtime import distributed, parts
from runtime.parts import State, Weights
from runtime.telemetry import StepResult

WINDOW = 100  # the median gradient norm is taken over this many newest steps
SPIKE = 10.0  # report gradient norms above this multiple of the median
DEEP = 24  # layers; a deeper model is compiled block by block
# On a GPU, kernels that do not depend on each other, such as the casts of the weights to bfloat16,
# are launched as one.
GPU_COMPILER = {"combo_kernels": True}
UNFILLED = torch.finfo(torch.float32).max  # a slot of Guard.norms that is not used yet


class View(NamedTuple):
    """What the weights see of the losses of this rank's samples: scale * loss - offset."""

    scale: Tensor | None = None  # (n,); None: 1
    offset: Tensor | None = None  # (n,); None: 0

    def of(self, losses: Tensor, first: int = 0) -> Tensor:
        """(m,) losses of the samples from `first` on -> (m,)."""
        rows = slice(first, first + len(losses))
        if self.scale is not None:
            losses = losses * self.scale[rows]
        if self.offset is not None:
            losses = losses - self.offset[rows]
        return losses

    def minus(self, offset: Tensor) -> "View":
        """With this (n,) offset as well."""
        if self.offset is not None:
            offset = self.offset + offset
        return self._replace(offset=offset)


class Trainer:
    """Owns what a step changes: model, optimizer, running domain losses and recent gradient norms.

    raw: the model itself; `model` is the same one, wrapped for several ranks. On "meta" it gets its
        memory here, and its numbers from set_weights or load_state.
    byte_lengths: (V,) bytes of each token, for reweight_unit = "byte".
    reference: gives the (n,) losses of a reference model on a batch, for reweight_ref.
    domain_losses: (2, D), for reweight_norm = "domain".
    """

    def __init__(
        self,
        raw: LanguageModel,
        config: TrainConfig,
        n_domains: int,
        device: torch.device,
        byte_lengths: Tensor | None = None,
        reference: Callable[[Batch, Tensor, Tensor], Tensor] | None = None,
    ):
        self.config, self.device, self.reference = config, device, reference
        self.byte_lengths = None if byte_lengths is None else byte_lengths.to(device)
        self.raw = raw
        self.raw.loss_chunk, self.raw.recompute = config.loss_chunk, config.recompute
        if config.compile != "off":
            if config.compile == "on" and config.recompute != "none" and config.dropout:
                let_recomputed_noise_repeat()
            compile_model(self.raw, config.compile, device)
        self.model = distributed.data_parallel(
            self.raw, self.raw.h, device, config.parallel, config.dtype
        )
        if config.compile == "graphs":
            # Gradients keep memory of their own: the graph would write the next micro-step's over
            # them.
            for parameter in self.raw.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self.share = parts.share_of_rank(config.parallel)
        self.optimizer = make_optimizer(self.raw, config)
        self.domain_losses = torch.zeros(2, n_domains, device=device)
        self.guard = Guard(device, config.skip_grad_norm, config.on_nonfinite)
        if config.compile != "off":
            self.compile_first_pass()

    def compile_first_pass(self) -> None:
        """Compile accumulation's pass without gradients, if there is one.

        Otherwise that would happen in the first weighted step, and count as time of training.
        """
        config, B = self.config, self.config.micro_batch_size
        n = config.global_batch_size // distributed.ranks().world_size
        if n > B and config.reweight != "uniform" and config.reweight_scope == "global":
            tokens = torch.zeros(
                B, self.raw.config.block_size, dtype=torch.long, device=self.device
            )
            with torch.no_grad():
                self.sample_losses(0, tokens, tokens, first=0)

    def step(self, step: int, batch: Batch) -> StepResult:
        """One optimizer step on the global batch; nothing waits for the device.

        Where the gradient's norm is not finite or above Guard's limit, the step is skipped.
        """
        x = batch.x.to(self.device, non_blocking=True)  # (n, T)
        y = batch.y.to(self.device, non_blocking=True)  # (n, T)
        view = own_view = self.view(batch, x, y)
        if self.config.reweight_norm == "domain":
            domain = batch.domain.to(self.device, non_blocking=True)  # (G,)
            view = view.minus(self.expected_losses(domain, len(x)))
        limits = self.guard.limits(step)
        losses, weights = self.backward(step, x, y, view, batch.pairs)

        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = distributed.full(torch.nn.utils.get_total_norm(gradients))
        taken = grad_norm.isfinite() & (grad_norm <= limits[0])
        # The optimizer reads both on the device: found_inf = 1 makes it change nothing, and it
        # divides the gradients by grad_scale, which clips them without a pass of its own.
        self.optimizer.found_inf = (~taken).float()
        self.optimizer.grad_scale = (grad_norm / (self.config.grad_clip or math.inf)).clamp(min=1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.config.compile != "graphs")

        self.guard.add(step, grad_norm, taken)
        if self.config.reweight_norm == "domain":
            losses_of_all = distributed.gather(own_view.of(losses))  # (G,)
            updated = track_domain_losses(self.domain_losses, losses_of_all, domain)
            self.domain_losses = torch.where(taken, updated, self.domain_losses)
        return StepResult(losses, weights, grad_norm, limits, taken)

    def view(self, batch: Batch, x: Tensor, y: Tensor) -> View:
        """What the weights see of this batch's losses: their unit, and the reference's losses."""
        scale = None
        if self.config.reweight_unit == "byte":
            n_bytes = self.byte_lengths[y].sum(1)
            scale = y.size(1) / n_bytes.clamp(min=1)  # tokens per byte
        view = View(scale)
        if self.reference:
            view = view.minus(view.of(self.reference(batch, x, y)))
        return view

    def expected_losses(self, domain: Tensor, n: int) -> Tensor:
        """(G,) domains -> (n,) running mean loss of the domain of each sample of this rank."""
        first = distributed.ranks().rank * n
        return domain_means(self.domain_losses)[domain[first : first + n]]

    def backward(
        self, step: int, x: Tensor, y: Tensor, view: View, pairs: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Gradients of sum_i w_i l_i over the global batch -> (n,) losses and (n,) weights.

        pairs: (G, 2) domain and window of the global batch, for reweight_control = "within".
        """
        config, world_size = self.config, distributed.ranks().world_size
        n, B = len(x), config.micro_batch_size
        starts = range(0, n, B)  # of the micro-batches
        strategy = config.reweight if step >= config.reweight_warmup_steps else "uniform"

        weights = None  # not known before a micro-batch's forward pass
        if strategy == "uniform":
            weights = torch.full((n,), 1 / (world_size * n), device=x.device)
        elif config.reweight_scope == "global" and len(starts) > 1:
            # A pass of its own: the weights need all G losses before the first backward.
            with torch.no_grad():
                losses = torch.cat([self.sample_losses(step, x, y, i) for i in starts])
            weights = self.own_weights(step, strategy, view.of(losses), pairs)

        results = []
        for i in starts:
            with distributed.no_sync(self.model, skip=i != starts[-1]):
                losses = self.sample_losses(step, x, y, i)
                if weights is not None:
                    w = weights[i : i + B]
                else:
                    w = self.own_weights(step, strategy, view.of(losses.detach(), i), pairs, i)
                    w = w / len(starts)
                # 0 * loss is NaN for a loss that is not finite, so that the gradient's average is
                # NaN on every rank. This is the one place for the factor W: gradients are averaged
                # over the ranks, and we want the sum of their parts.
                objective = world_size * ((w + 0 * losses.detach()) * losses).sum()
                objective.backward()
            results.append(torch.stack([losses.detach(), w]))
        losses, weights = torch.cat(results, dim=1)
        return losses, weights

    def sample_losses(self, step: int, x: Tensor, y: Tensor, first: int) -> Tensor:
        """(B,) losses of the micro-batch that begins with this rank's sample `first`."""
        config = self.config
        # Dropout noise depends on the step and the micro-batch's first sample alone: both passes,
        # any layout and a resumed run see the same.
        first_of_all = distributed.ranks().rank * len(x) + first
        seed = ((config.seed * 1_000_003 + step) * 1_000_003 + first_of_all) % 2**63
        seed_noise(self.device, seed)
        rows = slice(first, first + config.micro_batch_size)
        bf16 = config.dtype == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return self.model(x[rows], y[rows]).mean(1)

    def own_weights(
        self, step: int, strategy: str, losses: Tensor, pairs: np.ndarray, first: int = 0
    ) -> Tensor:
        """(m,) what the weights see of this rank's losses -> (m,) weights among those of all ranks.

        pairs: (G, 2) domain and window of the global batch.
        first: the first sample of the micro-batch, if the weights are those of a micro-step.
        """
        config, rank, m = self.config, distributed.ranks().rank, len(losses)
        weights = sample_weights(
            distributed.gather(losses),
            strategy,
            r_at(step, config),
            config.delta,
            config.reweight_norm,
            config.max_weight,
        )
        if config.reweight_control != "none":
            # The same weights on other samples: all that they do, but for their direction.
            order = shuffled_order(len(weights), config.seed, step, first)
            if config.reweight_control == "within":
                domain = pairs[:, 0].reshape(distributed.ranks().world_size, -1)
                order = order_within(order, domain[:, first : first + m].reshape(-1))
            order = torch.from_numpy(order).to(self.device, non_blocking=True)
            weights = weights[order]
        return weights[rank * m : (rank + 1) * m]

    def set_weights(self, weights: Weights) -> None:
        """Start with these weights; all parameters must be among them."""
        parts.fill(self.raw, weights, self.share)

    def state_dict(self) -> tuple[State, dict]:
        """What a checkpoint holds: a copy of this rank's tensors on the CPU, and numbers."""
        tensors = parts.copy_to_host(parts.own_state(self.raw, self.optimizer))
        numbers = {
            "domain_losses": self.domain_losses.tolist(),
            "grad_norms": self.guard.norms.tolist(),
        }
        return tensors, numbers

    def load_state(self, tensors: list[State], numbers: dict) -> None:
        """Continue from all parts of what state_dict gave, whatever their number."""
        parts.load(self.raw, self.optimizer, tensors, self.share)
        self.domain_losses.copy_(torch.tensor(numbers["domain_losses"]))
        self.guard.norms.copy_(torch.tensor(numbers["grad_norms"]))


def seed_noise(device: torch.device, seed: int) -> None:
    """torch.manual_seed for the CPU and one device: for all backends it takes 0.2 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def compile_model(model: LanguageModel, how: str, device: torch.device) -> None:
    """how: "on", or "graphs" for CUDA graphs as well.

    A deep model is compiled block by block: the blocks share one graph, where the whole would be
    compiled with each of them written out. CUDA graphs are of the whole model.
    """
    options = {"triton.cudagraphs": how == "graphs"}
    if device.type == "cuda":
        options |= GPU_COMPILER
    if len(model.h) <= DEEP or how == "graphs":
        model.compile(dynamic=False, options=options)
        return
    for block in model.h:
        block.compile(dynamic=False, options=options)
    model.token_losses = torch.compile(model.token_losses, dynamic=False, options=options)


def let_recomputed_noise_repeat() -> None:
    """Let compiled attention that is recomputed on cuda draw its dropout from the seeded generator.

    By default it has generators of its own, which no seed reaches, so a resumed run would draw
    other noise. Not for CUDA graphs: the generator's state is then kept on the host.
    """
    torch._functorch.config.graphsafe_rng_functionalization = False


class Guard:
    """Decides on the device, without asking the host, whether a step is taken.

    norms: (WINDOW,) gradient norms of the newest taken steps, that of step s at s % WINDOW.
    """

    def __init__(self, device: torch.device, skip_grad_norm: float, on_nonfinite: str):
        self.skip_grad_norm = skip_grad_norm
        self.stops = on_nonfinite == "stop"
        self.norms = torch.full((WINDOW,), UNFILLED, device=device)
        self.halted = torch.zeros((), dtype=torch.bool, device=device)

    def limits(self, step: int) -> Tensor:
        """(2,): the largest norm with which `step` is taken, and the largest that is no spike.

        With on_nonfinite = "stop", no norm is small enough once one was not finite.
        """
        spike = torch.full((), math.inf, device=self.norms.device)
        if step >= WINDOW // 2:
            # The step tells how many slots are filled; to ask the device would wait for it.
            median = self.norms.sort().values[(min(step, WINDOW) - 1) // 2]
            spike = (self.skip_grad_norm or SPIKE) * median
        limit = spike if self.skip_grad_norm else torch.full_like(spike, math.inf)
        return torch.stack([limit.masked_fill(self.halted, -1.0), spike])

    def add(self, step: int, norm: Tensor, taken: Tensor) -> None:
        """Record the norm of `step` if it was taken."""
        slot = step % WINDOW
        self.norms[slot] = torch.where(taken, norm, self.norms[slot])
        if self.stops:
            self.halted |= ~norm.isfinite()


class MuonAndAdamW:
    """Muon for the matrices of the blocks and AdamW for all other parameters, used as one.

    found_inf: 1 makes step() change nothing, without asking the host. grad_scale: the gradients are
    divided by it. AdamW(fused=True) reads both. torch's Muon does not: its gradients are divided
    before, and the matrices and their momentum are put back as they were.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        for matrix in muon.param_groups[0]["params"]:  # torch makes them in the first step
            muon.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        """Both: what torch's get_state_dict and set_state_dict take."""
        return iter((self.muon, self.adamw))

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Both updates, or none where found_inf is 1."""
        self.adamw.found_inf, self.adamw.grad_scale = self.found_inf, self.grad_scale
        self.adamw.step()
        momenta = [state["momentum_buffer"] for state in self.muon.state.values()]
        tensors = self.muon.param_groups[0]["params"] + momenta
        before = [tensor.clone() for tensor in tensors]
        torch._foreach_div_([p.grad for p in self.muon.state], self.grad_scale)
        self.muon.step()
        is_skipped = self.found_inf.bool()
        for tensor, old in zip(tensors, before, strict=True):
            torch.where(is_skipped, old, tensor, out=tensor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self:
            optimizer.zero_grad(set_to_none)


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW | MuonAndAdamW:
    """The config's optimizer, with weight decay on matrices, none on biases and LayerNorm.

    Muon's step is scaled to the size of AdamW's (Moonlight, arXiv 2502.16982), so that one learning
    rate serves both.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    by_muon = []
    if config.optimizer == "muon":
        in_blocks = set(model.h.parameters())
        by_muon = [p for p in matrices if p in in_blocks]
        matrices = [p for p in matrices if p not in in_blocks]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    lr, betas = config.learning_rate, (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr, betas, fused=True)
    if not by_muon:
        return adamw
    muon = torch.optim.Muon(by_muon, lr, config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonAndAdamW(muon, adamw)
