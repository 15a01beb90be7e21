"""Few-shot scoring: eval/fewshot.py against the harness's own `hf` backend.

    python scripts/bench.py fewshot                                 # 6 layers, 384 wide: for a CPU
    python scripts/bench.py fewshot --model 124m --batch_size 32    # for a GPU

Both answer the same requests with the same model and batch size: 300 scores of 20 to 300 tokens (75
contexts with 4 choices each), then 30 greedy continuations of 32 tokens. Prints the hf backend's
time over ours in the same round, by the wall clock and, on a CPU, in processor time, which other
programs on the machine disturb less. Random weights, float32.
"""

import io
import logging
import random
import tempfile
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from cli import UserError
from corpus import tokenizer
from families import SIZES, Shape, build
from model import GPTConfig
from scripts.benchmarks.common import (
    default_device,
    describe,
    new_parser,
    take_turns,
    with_quartiles,
)
from scripts.export_hf import write_tokenizer

SHAPES = {"small": GPTConfig(n_layer=6, n_head=6, n_embd=384), **SIZES}
CONTEXT = 512  # tokens
# With the space before it, each is one token of GPT-2's.
WORDS = (
    "the of and to in is that for it with as was on be at by this from or one had not but what all"
)
WORDS = [*WORDS.split(), "were"]


def main(argv: list[str]) -> None:
    parser = new_parser("fewshot", __doc__)
    parser.add_argument("--model", choices=SHAPES, default="small", help="(default: small)")
    parser.add_argument("--batch_size", type=int, default=8, help="requests (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    args = parser.parse_args(argv)
    if args.rounds < 3 or args.batch_size < 1:
        raise UserError(f"--rounds {args.rounds} --batch_size {args.batch_size}: at least 3 and 1")
    if find_spec("lm_eval") is None:
        raise UserError(
            "lm-evaluation-harness is not installed: pip install -r requirements-eval.txt"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = default_device()
    ours, theirs = make_backends(SHAPES[args.model], args.batch_size, device)
    print(f"{args.model}, batch size {args.batch_size}, {describe(device)}")
    print("time of the hf backend over ours:")
    for method, requests in make_requests().items():
        variants = [partial(answer, backend, method, requests) for backend in (ours, theirs)]
        for variant in variants:
            variant()
        seconds = take_turns(variants, args.rounds, device)
        clocks = ("wall", "processor") if device.type == "cpu" else ("wall",)
        for k, clock in enumerate(clocks):
            our_seconds, their_seconds = seconds[:, :, k].T
            ratio = with_quartiles(their_seconds / our_seconds, digits=2)
            print(f"  {method:<16}{clock:<10} {ratio}; ours {np.median(our_seconds):.2f} s")


def make_backends(shape: Shape, batch_size: int, device: torch.device) -> tuple:
    """The same random model behind eval/fewshot.py and behind the harness's hf backend."""
    from lm_eval.models.huggingface import HFLM

    from eval.harness import Harness  # takes seconds and is optional

    tokens = tokenizer.load("gpt2")
    torch.manual_seed(0)
    model = build(replace(shape, block_size=CONTEXT, vocab_size=tokens.n_vocab))
    with tempfile.TemporaryDirectory() as folder:
        model.to_pretrained(tokens.n_vocab, tokens.eot_token).save_pretrained(folder)
        write_tokenizer(tokens, CONTEXT, Path(folder))
        theirs = HFLM(folder, device=str(device), dtype="float32", batch_size=batch_size)
    ours = Harness(model.to(device), tokens, batch_size)
    return ours, theirs


def make_requests() -> dict[str, list]:
    """What the harness would ask for, by the name of the method that answers."""
    from lm_eval.api.instance import Instance

    rng = random.Random(0)

    def text(n_tokens: int) -> str:
        return " ".join(rng.choices(WORDS, k=n_tokens))

    contexts = [text(rng.randint(14, 290)) for _ in range(75)]
    choices = []
    for context in contexts:
        for _ in range(4):
            choices.append((context, f" {text(rng.randint(1, 10))}"))
    stop = {"until": ["\n"], "max_gen_toks": 32, "do_sample": False}
    prompts = [(text(rng.randint(20, 200)), stop) for _ in range(30)]
    return {
        "loglikelihood": [Instance("loglikelihood", {}, a, i) for i, a in enumerate(choices)],
        "generate_until": [Instance("generate_until", {}, a, i) for i, a in enumerate(prompts)],
    }


def answer(backend, method: str, requests: list) -> None:
    """Let a backend answer all requests, without its progress bars."""
    with redirect_stderr(io.StringIO()):
        getattr(backend, method)(requests)
