"""Print what a run's model makes of a prompt.

    python scripts/sample.py --run runs/124m_uniform_linupper_seed42 --prompt "The first law of"
    python scripts/sample.py --run RUN --prompt "$(cat start.txt)" --temperature 0         # greedy

A continuation ends with the document or after --max_tokens. It sees at most the model's context, of which it may use up
to half for itself: of a longer prompt, the end.
"""

import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import checkpoint
import tokenizer
from configurator import Parser
from errors import UserError, run
from eval.models import find_run
from generate import generate


def sampler(temperature: float, top_k: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """pick of generate: (B, V) logits -> (B,) ids, drawn from softmax(logits / temperature) among the top_k."""
    def pick(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        values, ids = logits.topk(min(top_k, logits.size(-1)) if top_k else logits.size(-1))
        drawn = torch.multinomial(torch.softmax((values - values[:, :1]) / temperature, -1), 1, generator=generator)
        return ids.gather(1, drawn)[:, 0]
    return pick


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="run folder, or one of its checkpoints")
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--max_tokens", type=int, default=100, help="of a continuation (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="below 1: likely tokens become likelier; 0: always the likeliest (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="draw among so many tokens; 0: all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--n", type=int, default=1, help="continuations (default: 1)")
    args = parser.parse_args()
    for name, least in (("max_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0), ("n", 1)):
        if not least <= getattr(args, name) < 2**63:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
    _, folder = find_run(args.run)
    tokens = tokenizer.find(checkpoint.read_json(folder / "state.json").get("tokenizer_sha256"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoint.load_model(folder).to(device).eval()
    prompt = tokens.encode_to_numpy(args.prompt).tolist() or [tokens.eot_token]
    pick = sampler(args.temperature, args.top_k, torch.Generator(device).manual_seed(args.seed))
    found = generate(model, [prompt] * args.n, args.max_tokens, tokens.n_vocab, pick,
                     finished=lambda new: new[-1] == tokens.eot_token)
    for i, new in enumerate(found, 1):
        print(f"== {i} of {args.n}\n{tokens.decode([t for t in new if t != tokens.eot_token])}")


if __name__ == "__main__":
    run(main)
