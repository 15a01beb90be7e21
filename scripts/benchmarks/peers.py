"""Our step against nanoGPT's, the published way and the Hugging Face Trainer's, on equal terms.

    git clone https://github.com/karpathy/nanoGPT
    python scripts/bench.py peers --nanogpt nanoGPT/model.py --size tiny --micro_batch 32
    python scripts/bench.py peers --nanogpt nanoGPT/model.py --size 124m --block_size 512

All train the same shape on the same random tokens, without dropout, with AdamW and the gradient
clipped to norm 1, and take turns in blocks of --steps. Prints each one's time over ours in the same
round. On a GPU all compute in bfloat16 and, but for the Trainer, compiled.

The published way (Sow et al.) is a Hugging Face model whose own loss is thrown away: the loss of
each sample is computed a second time, from the logits, and weighted. nanoGPT's model.py is run.
"""

import runpy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import UserError
from data import Batch
from hf import import_transformers
from model import GPT, GPTConfig
from recipe import TrainConfig, settle
from reweight import sample_weights
from runtime import distributed
from scripts.benchmarks.common import (
    default_device,
    describe,
    new_parser,
    quartiles,
    table_row,
)
from scripts.benchmarks.train import named_shape
from step import Trainer

LEARNING_RATE = 1e-4
Step = Callable[[Tensor, Tensor], None]  # (B, T) inputs and targets


def main(argv: list[str]) -> None:
    parser = new_parser("peers", __doc__)
    parser.add_argument("--nanogpt", type=Path, required=True, help="nanoGPT's model.py")
    parser.add_argument("--size", default="tiny", help="as for bench.py train (default: tiny)")
    parser.add_argument("--micro_batch", type=int, default=32, help="sequences (default: 32)")
    parser.add_argument("--block_size", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--n_vocab", type=int, default=50304, help="(default: 50304)")
    parser.add_argument("--steps", type=int, default=5, help="of a block (default: 5)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: 10)")
    args = parser.parse_args(argv)
    if not args.nanogpt.is_file():
        raise UserError(f"--nanogpt {args.nanogpt}: no such file; give nanoGPT's model.py")
    shape = replace(
        named_shape(args.size), block_size=args.block_size, vocab_size=args.n_vocab, dropout=0.0
    )
    device = default_device()
    generator = torch.Generator().manual_seed(0)
    size = (args.micro_batch, args.block_size + 1)
    tokens = torch.randint(args.n_vocab, size, generator=generator).to(device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    variants = {}
    for name, step in steps_of_each(shape, args.nanogpt, args.micro_batch, device).items():
        variants[name] = partial(seconds_of, step, x, y, args.steps, device)
    with tempfile.TemporaryDirectory() as folder:
        variants["Hugging Face Trainer"] = hf_trainer(shape, x, args.steps, device, folder)
        for variant in variants.values():  # warms up
            variant()
        seconds = np.zeros((args.rounds, len(variants)))
        for i in range(args.rounds):
            for j in np.roll(range(len(variants)), i):
                seconds[i, j] = list(variants.values())[j]()
    show(list(variants), seconds, f"{args.size}, {x.shape[0]} x {x.shape[1]}, {describe(device)}")


def show(names: list[str], seconds: np.ndarray, title: str) -> None:
    """(rounds, V) seconds per step of the variants; the first is ours."""
    print(f"{title}\n")
    print(table_row(["step", "ms", "over ours (quartiles)"]))
    print(table_row(["---", "--:", "---"]))
    for name, own in zip(names, seconds.T, strict=True):
        low, middle, high = quartiles(own / seconds[:, 0])
        ms = 1e3 * np.median(own)
        print(table_row([name, f"{ms:.1f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]))


def seconds_of(step: Step, x: Tensor, y: Tensor, steps: int, device: torch.device) -> float:
    """Seconds per step."""
    distributed.barrier(device)
    began = time.perf_counter()
    for _ in range(steps):
        step(x, y)
    distributed.barrier(device)
    return (time.perf_counter() - began) / steps


def steps_of_each(shape: GPTConfig, nanogpt: Path, n: int, device: torch.device) -> dict[str, Step]:
    """By name; ours is the first. n: samples of a batch."""
    return {
        "ours, linupper": our_step("linupper", shape, n, device),
        "ours, uniform": our_step("uniform", shape, n, device),
        "nanoGPT, biases": nanogpt_step(nanogpt, shape, device, bias=True),
        "nanoGPT, no biases": nanogpt_step(nanogpt, shape, device, bias=False),
        "nanoGPT, biases, our GELU": nanogpt_step(nanogpt, shape, device, True, "tanh"),
        "nanoGPT, no biases, our GELU": nanogpt_step(nanogpt, shape, device, False, "tanh"),
        "the published way, linupper": published_step(shape, device),
    }


def our_step(strategy: str, shape: GPTConfig, n: int, device: torch.device) -> Step:
    config = TrainConfig(
        reweight=strategy,
        reweight_warmup_steps=0,
        block_size=shape.block_size,
        dropout=0.0,
        global_batch_size=n,
        learning_rate=LEARNING_RATE,
        loss_chunk=0,
        device=device.type,
    )
    trainer = Trainer(GPT(shape), settle(config, 1), 1, device)
    pairs = np.zeros((n, 2), dtype=np.int64)
    domain = torch.zeros(n, dtype=torch.long)
    return lambda x, y: trainer.step(0, Batch(x, y, domain, pairs))


def nanogpt_step(
    path: Path, shape: GPTConfig, device: torch.device, bias: bool, gelu: str = "none"
) -> Step:
    """gelu: "none" for the error function, which is nanoGPT's own, or "tanh"."""
    theirs = runpy.run_path(str(path))
    config = theirs["GPTConfig"](
        block_size=shape.block_size,
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        dropout=0.0,
        bias=bias,
    )
    model = theirs["GPT"](config).to(device)
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = gelu
    optimizer = model.configure_optimizers(0.01, LEARNING_RATE, (0.9, 0.999), device.type)
    return plain_step(model, optimizer, lambda compiled, x, y: compiled(x, y)[1], device)


def published_step(shape: GPTConfig, device: torch.device) -> Step:
    """Both losses, and linupper's weights for the second."""

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(input_ids=x, labels=x).logits[:, :-1]  # with a loss that nobody reads
        targets = x[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        losses = losses.view_as(targets).mean(1)
        return (sample_weights(losses.detach(), "linupper", r=0.4) * losses).sum()

    model = hf_model(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    return plain_step(model, optimizer, loss_of, device)


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    device: torch.device,
) -> Step:
    """nanoGPT's train.py: forward, backward, clip, step."""
    on_gpu = device.type == "cuda"
    compiled = torch.compile(model) if on_gpu else model

    def step(x: Tensor, y: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = loss_of(compiled, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hf_model(shape: GPTConfig) -> nn.Module:
    transformers = import_transformers()
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def hf_trainer(
    shape: GPTConfig, x: Tensor, steps: int, device: torch.device, folder: str
) -> Callable[[], float]:
    """A function that trains from the start and gives the seconds per step after the first."""
    transformers = import_transformers()
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            distributed.barrier(device)
            ends.append(time.perf_counter())

    rows = [{"input_ids": row, "labels": row} for row in x.cpu()]
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=len(rows),
        max_steps=steps + 1,
        learning_rate=LEARNING_RATE,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda",
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = hf_model(shape)

    def train() -> float:
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()])
        ends.clear()
        trainer.train()
        return (ends[-1] - ends[0]) / steps

    return train
