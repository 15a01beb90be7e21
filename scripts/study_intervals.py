"""How often the 95 % intervals of eval/perplexity.py hold the truth, on the documents of a result.

    python scripts/study_intervals.py RUN/eval/perplexity.json
    python scripts/study_intervals.py RUN/eval/perplexity.json --minus OTHER/eval/perplexity.json

The documents of the result are taken for all that there are, and their mean for the truth. Many
small validation sets are drawn from them, with replacement; each gets its interval. A hundred times
as many documents as in a set are enough; --split train=validation,val=train makes such a result.
"""

import math
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from cli import Parser, UserError, run
from eval.compare import estimate, mean_of_documents
from eval.perplexity import windows_path

PREFIX = "documents/"


def read(result: str) -> dict[str, np.ndarray]:
    """Domain -> (K, 2) nats and targets of its documents."""
    path = windows_path(Path(result))
    try:
        with np.load(path) as saved:
            documents = {
                name.removeprefix(PREFIX): saved[name] for name in saved if name.startswith(PREFIX)
            }
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run eval/perplexity.py") from None
    if not documents:
        raise UserError(f"{path} has no documents; run eval/perplexity.py again")
    return documents


def coverage(documents: np.ndarray, n: int, sets: int, seed: int) -> tuple[float, float]:
    """Of `sets` validation sets of n documents: share that holds the truth, share with too few."""
    truth, _, _ = mean_of_documents(documents)
    rng = np.random.default_rng(seed)
    held, too_few = 0, 0
    for _ in range(sets):
        found = estimate([documents[rng.integers(len(documents), size=n)]])
        if math.isnan(found.low):
            too_few += 1
        else:
            held += found.low <= truth <= found.high
    told = sets - too_few
    return (held / told if told else math.nan), too_few / sets


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("result", help="JSON file of eval/perplexity.py")
    parser.add_argument("--minus", metavar="RESULT", help="cover the difference to this result")
    parser.add_argument(
        "--documents", default="7,30,120", help="in a validation set, several with commas"
    )
    parser.add_argument("--sets", type=int, default=1000, help="drawn per domain (default: 1000)")
    args = parser.parse_args()
    try:
        sizes = [int(text) for text in args.documents.split(",")]
    except ValueError:
        raise UserError(f"--documents {args.documents}: expected numbers such as 7,30") from None
    if min(sizes) < 2 or args.sets < 1:
        raise UserError(f"--documents {args.documents} --sets {args.sets}: at least 2 and 1")
    documents = read(args.result)
    if args.minus:
        for domain, other in read(args.minus).items():
            if domain not in documents or not np.array_equal(other[:, 1], documents[domain][:, 1]):
                raise UserError(f"--minus {args.minus} is of other validation documents")
            documents[domain] = documents[domain] - other * [1, 0]

    columns = [f"{n} documents (too few)" for n in sizes]
    print(f"| domain | documents there | {' | '.join(columns)} |")
    print("|---|--:|" + "--:|" * len(sizes))
    for domain, of_domain in documents.items():
        cells = []
        for n in sizes:
            held, too_few = coverage(of_domain, n, args.sets, seed=n)
            cells.append(f"{held:.3f} ({too_few:.0%})")
        print(f"| {domain} | {len(of_domain):,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)
