"""eval/fewshot.py against the harness's own hf backend: same model, requests and batch size, in turn in one run.

    python scripts/bench_fewshot.py                                      # 6 layers of width 384, on 2 CPU cores
    python scripts/bench_fewshot.py --model 124m --batch_size 32         # a GPU

300 requests of 20 to 300 tokens (75 contexts with 4 choices each) and 30 greedy continuations of 32 tokens. Prints the
hf backend's time over ours of the same round: median and quartiles, of the wall clock and (on a CPU) of the processor's
time, which other programs on the machine disturb less. Random weights, float32.
"""

import io
import logging
import random
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import tokenizer
from configurator import Parser
from distributed import barrier
from errors import UserError, run
from eval import fewshot
from model import GPT, SIZES, GPTConfig
from scripts.export_hf import write_tokenizer

SHAPES = {"small": GPTConfig(n_layer=6, n_head=6, n_embd=384), **SIZES}
WORDS = "the of and to in is that for it with as was on be at by this from or one had not but what all were".split()


def make_requests() -> dict[str, list]:
    """What the harness would ask for, by the name of the method that answers."""
    from lm_eval.api.instance import Instance
    rng, text = random.Random(0), lambda n: " ".join(rng.choices(WORDS, k=n))  # a word is a token
    contexts = [text(rng.randint(14, 290)) for _ in range(75)]
    choices = [(c, f" {text(rng.randint(1, 10))}") for c in contexts for _ in range(4)]
    stop = {"until": ["\n"], "max_gen_toks": 32, "do_sample": False}
    prompts = [(text(rng.randint(20, 200)), stop) for _ in range(30)]
    return {name: [Instance(name, {}, arguments, i) for i, arguments in enumerate(of)]
            for name, of in (("loglikelihood", choices), ("generate_until", prompts))}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="small", help="(default: small)")
    parser.add_argument("--batch_size", type=int, default=8, help="requests per forward pass (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    args = parser.parse_args()
    if args.rounds < 3 or args.batch_size < 1:
        raise UserError(f"--rounds {args.rounds} --batch_size {args.batch_size}: at least 3 and 1")
    if fewshot.lm_eval is None:
        raise UserError("lm-evaluation-harness is not installed: pip install -r requirements-eval.txt")
    from lm_eval.models.huggingface import HFLM
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, requests = tokenizer.load("gpt2"), make_requests()
    torch.manual_seed(0)
    model = GPT(replace(SHAPES[args.model], block_size=512, vocab_size=tokens.n_vocab))
    with tempfile.TemporaryDirectory() as folder:
        model.to_pretrained(tokens.n_vocab, tokens.eot_token).save_pretrained(folder)
        write_tokenizer("gpt2", 512, Path(folder))
        theirs = HFLM(folder, device=device, dtype="float32", batch_size=args.batch_size)
    models = [fewshot.Harness(model.to(device), tokens, args.batch_size), theirs]

    def seconds_of(lm, method: str) -> tuple[float, float]:
        """Wall and processor seconds of all answers."""
        barrier(torch.device(device))
        wall, cpu = time.perf_counter(), time.process_time()
        with redirect_stderr(io.StringIO()):  # their bars
            getattr(lm, method)(requests[method])
        barrier(torch.device(device))
        return time.perf_counter() - wall, time.process_time() - cpu

    what = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, batch size {args.batch_size}, {what}, torch {torch.__version__}; the hf backend's time over "
          "ours:")
    for method in requests:
        for lm in models:  # warm up
            seconds_of(lm, method)
        seconds = np.zeros((args.rounds, 2, 2))
        for i in range(args.rounds):
            for j in (0, 1) if i % 2 else (1, 0):  # neither is always first
                seconds[i, j] = seconds_of(models[j], method)
        for k, clock in enumerate(("wall", "processor") if device == "cpu" else ("wall",)):
            low, middle, high = np.quantile(seconds[:, 1, k] / seconds[:, 0, k], [0.25, 0.5, 0.75])
            print(f"  {method:<16}{clock:<10} {middle:.2f}  (quartiles {low:.2f} to {high:.2f}, {args.rounds} rounds; "
                  f"ours {np.median(seconds[:, 0, k]):.2f} s)")


if __name__ == "__main__":
    run(main)
