"""Continue a prompt with a run's model, and print the text.

    python eval/sample.py --run runs/124m_uniform_linupper_seed42 --prompt "The first law of"
    python eval/sample.py --run RUN --prompt "$(cat start.txt)" --temperature 0         # greedy

A continuation ends with the document or after --max_tokens. It may take up to half of the model's
context; of a longer prompt, only the end that fits is read.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from cli import Parser, UserError, run
from corpus import tokenizer
from eval.generate import generate, likeliest
from eval.models import find_run
from runtime import checkpoint


def sampler(
    temperature: float, top_k: int, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """A `pick` for generate: (B, V) logits -> (B,) ids.

    They are drawn from softmax(logits / temperature) among the top_k; temperature 0 is greedy, and
    top_k 0 means all.
    """
    if temperature == 0:
        return likeliest

    def pick(logits: Tensor) -> Tensor:
        n_vocab = logits.size(-1)
        values, ids = logits.topk(min(top_k, n_vocab) if top_k else n_vocab)
        probabilities = torch.softmax((values - values[:, :1]) / temperature, -1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
        return ids.gather(1, drawn)[:, 0]

    return pick


def parse_args() -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="run folder, or one of its checkpoints")
    parser.add_argument(
        "--prompt", default="", help="text to continue (default: the start of a document)"
    )
    parser.add_argument(
        "--max_tokens", type=int, default=100, help="most tokens of a continuation (default: 100)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="below 1: likely tokens become likelier; 0: always the likeliest (default: 0.8)",
    )
    parser.add_argument(
        "--top_k",
        type=int,
        default=50,
        help="draw among this many of the likeliest tokens; 0: all (default: 50)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (default: 0)")
    parser.add_argument("--n", type=int, default=1, help="number of continuations (default: 1)")
    args = parser.parse_args()
    lowest = {"max_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0, "n": 1}
    for name, least in lowest.items():
        value = getattr(args, name)
        if not least <= value < 2**63:
            raise UserError(f"--{name} {value}: must be {least} or more")
    return args


def main() -> None:
    args = parse_args()
    run_dir, folder = find_run(args.run)
    state = checkpoint.read_json(folder / "state.json")
    tokens = tokenizer.find(state.get("tokenizer_sha256"), run_dir, state.get("data_dir"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoint.load_model(folder).to(device).eval()
    prompt = tokens.encode_to_numpy(args.prompt).tolist() or [tokens.eot_token]
    generator = torch.Generator(device).manual_seed(args.seed)
    continuations = generate(
        model,
        [prompt] * args.n,
        args.max_tokens,
        tokens.n_vocab,
        sampler(args.temperature, args.top_k, generator),
        finished=lambda new: new[-1] == tokens.eot_token,
    )
    for i, new in enumerate(continuations, 1):
        text = tokens.decode([token for token in new if token != tokens.eot_token])
        print(f"== {i} of {args.n}\n{text}")


if __name__ == "__main__":
    run(main)
