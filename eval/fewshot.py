"""Few-shot scores of a checkpoint, by EleutherAI's lm-evaluation-harness; all ranks share the work.

    python eval/fewshot.py --run runs/124m_uniform_linupper_seed42                    # the default tasks, 5 examples
    torchrun --nproc_per_node 8 -- eval/fewshot.py --run RUN --tasks sciq,piqa --num_fewshot 0
    python eval/fewshot.py --run RUN --tasks mine --include_path folder_with_yaml     # local tasks
    HF_DATASETS_OFFLINE=1 python eval/fewshot.py --run RUN                            # with a filled cache

Writes RUN/eval/fewshot.json after each task; a second start with the same settings scores what is not there yet. The
harness makes the prompts and counts the points; this file gives it our GPT's log-likelihoods and continuations.

A prompt longer than the context loses its first tokens, and with them some of its examples: of each task's `requests`,
`truncated` lost `tokens_cut` tokens in all. B inputs in a batch, T tokens in the longest, M tokens scored, C channels.
"""

import io
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from traceback import walk_tb

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import distributed
import tokenizer
from configurator import Parser
from distributed import print0
from errors import UserError, nearest, run
from eval import models
from files import write_text
from generate import NOT_FINITE, generate
from model import GPT

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError:  # main says so in one line
    lm_eval, TemplateLM = None, object

TASKS = ("logiqa", "logiqa2", "sciq", "piqa", "copa", "wic", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
         "hellaswag", "lambada_openai", "triviaqa", "nq_open", "webqs", "lambada", "squadv2")
# The first of these that a task has stands for it, else its own first metric. The factor: squadv2 counts in percent.
METRICS = {"acc": 1.0, "exact_match": 1.0, "exact": 0.01}
RESULT = "fewshot.json"
ROWS = 1024  # of logits at a time


class Harness(TemplateLM):
    """Our GPT as a model of the harness; the padding of its vocabulary takes no part, as in an exported model.

    The harness sees one process on every rank: each rank gets all requests, computes every W-th batch, and has all
    answers. The batches, and so the numbers, are the same for any W.
    """

    def __init__(self, model: GPT, tokens: tokenizer.Tokenizer, batch_size: int, dtype: str = "float32"):
        super().__init__()
        self.model, self.tokens, self.batch_size = model.eval(), tokens, batch_size
        self._device = model.wte.weight.device
        self.autocast = partial(torch.autocast, self._device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        self.max_length = model.config.block_size
        self.max_gen_toks = min(256, self.max_length // 2)  # where a task names no number; 256 in the hf backend
        self.title, self.cut = "", defaultdict(list)  # of the bars; task -> tokens that each of its requests lost

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eot_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokens.encode_to_numpy(string).tolist()  # we have no special tokens to add

    def note(self, requests: list, cuts: list[int]) -> None:
        """Count what was cut from each request for its task."""
        for request, cut in zip(requests, cuts, strict=True):
            self.cut[request.task_name].append(cut)

    def batches(self, order: list) -> Iterator[list]:
        """This rank's batches of a list that is the same on all ranks."""
        rank, _, W = distributed.ranks()
        starts = range(rank * self.batch_size, len(order), W * self.batch_size)
        for i in tqdm(starts, self.title, unit="batch", disable=rank > 0):
            yield order[i:i + self.batch_size]

    def of_all_ranks(self, values: Tensor) -> Tensor:
        """A tensor in which each rank has filled in its part and left zeros -> the whole, on the CPU."""
        several = distributed.ranks().world_size > 1
        return distributed.reduce_sum(values.to(self._device) if several else values).cpu()  # several: not on mps

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding gives it) of each request's continuation; the harness encodes both texts."""
        if any(request.args[:2] == ("", "") for request in requests):
            raise UserError("asks for the likelihood of an empty text after an empty text; correct the task")
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self.note(requests, self.last_cuts)
        return answers

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """The same for (texts, context, continuation) with the latter two as ids; what is equal is computed once."""
        size = self.max_length + 1  # the last token is only a target
        self.last_cuts = [max(0, len(context) + len(continuation) - size) for _, context, continuation in requests]
        jobs = {}  # inputs -> {continuation: its requests}; inputs end before the continuation's last token
        for i, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) < size:
                raise UserError(f"has a continuation of {len(continuation)} tokens, {repr(texts[1])[:60]}; 1 to "
                                f"{self.max_length}, the model's context, can be scored")
            inputs = tuple((context + continuation)[-size:-1])
            jobs.setdefault(inputs, {}).setdefault(tuple(continuation), []).append(i)
        owners, counts, parts = [], [], []
        for batch in self.batches(sorted(jobs, key=len, reverse=True)):
            parts.append(self.score(batch, [(row, c) for row, inputs in enumerate(batch) for c in jobs[inputs]]))
            owners += [mine for inputs in batch for mine in jobs[inputs].values()]
            counts += [len(c) for inputs in batch for c in jobs[inputs]]
        answers = torch.zeros(len(requests), 2, dtype=torch.float64)
        if parts:
            nats, greedy = torch.cat(parts, dim=1).cpu()
            for mine, n, g in zip(owners, nats.double().split(counts), greedy.split(counts), strict=True):
                answers[mine] = torch.stack([n.sum(), g.min().double()])
        answers = self.of_all_ranks(answers)
        if not answers.isfinite().all():
            raise UserError(NOT_FINITE)
        return [(nats, greedy == 1) for nats, greedy in answers.tolist()]

    @torch.inference_mode()
    def score(self, batch: list[tuple], pairs: list[tuple[int, tuple]]) -> Tensor:
        """B inputs, the longest first, and continuations (row, ids) that end one token after them.

        -> (2, M) float32: nats of each token of the continuations in turn, and 1 where it is the most likely one.
        """
        T, device = len(batch[0]), self._device
        idx = torch.tensor([inputs + (0,) * (T - len(inputs)) for inputs in batch], device=device)  # (B, T)
        place = [row * T + len(batch[row]) - len(c) + j for row, c in pairs for j in range(len(c))]  # (M,)
        target = torch.tensor([token for _, c in pairs for token in c], device=device)  # (M,)
        parts = []
        with self.autocast():
            x = self.model.hidden(idx).flatten(0, 1)[torch.tensor(place, device=device)]  # (M, C)
            for some, y in zip(x.split(ROWS), target.split(ROWS), strict=True):
                logits = F.linear(some, self.model.wte.weight[:self.tokens.n_vocab]).float()
                parts.append(torch.stack([-F.cross_entropy(logits, y, reduction="none"), logits.argmax(-1) == y]))
        return torch.cat(parts, dim=1)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, in windows of the context that the harness makes; nothing is cut."""
        windows = [[make_disjoint_window(w) for w in get_rolling_token_windows(
            self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)] for request in requests]
        answers = iter(self._loglikelihood_tokens([(("", ""), *w) for mine in windows for w in mine]))
        self.note(requests, [0] * len(requests))
        return [sum(next(answers)[0] for _ in mine) for mine in windows]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each request's text up to a stop string, which is left out."""
        groups, cuts, stops_of = {}, [], []  # groups: (stop strings, most new tokens) -> [(prompt's ids, request)]
        for i, request in enumerate(requests):
            wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            room = self.max_length - wanted["max_gen_toks"]
            if wanted["do_sample"] or room < 1:
                what = "text drawn at random" if wanted["do_sample"] else f"{wanted['max_gen_toks']} new tokens"
                raise UserError(f"asks for {what}; only greedy text of fewer tokens than the model's context "
                                f"({self.max_length}) can be scored")
            prompt = self.tok_encode(request.args[0]) or [self.eot_token_id]
            cuts.append(max(0, len(prompt) - room))
            stops_of.append(handle_stop_sequences(wanted["until"], self.tokens.decode([self.eot_token_id])))
            groups.setdefault((tuple(stops_of[i]), wanted["max_gen_toks"]), []).append((prompt[-room:], i))
        self.note(requests, cuts)
        ids = torch.zeros(len(requests), max(most for _, most in groups), dtype=torch.int64)  # plus 1; 0: none
        for (stops, most), group in groups.items():
            for batch in self.batches(sorted(group, key=lambda job: -len(job[0]))):
                prompts, mine = zip(*batch, strict=True)
                try:
                    with self.autocast():
                        new = generate(self.model, list(prompts), most, self.tokens.n_vocab,
                                       finished=partial(self.has_stop, stops))
                except UserError:  # of this rank alone, perhaps: it must still meet the others
                    new = [[-2]] * len(batch)
                for i, tokens in zip(mine, new, strict=True):
                    ids[i, :len(tokens)] = torch.tensor(tokens) + 1
        ids = self.of_all_ranks(ids)
        if ids.min() < 0:
            raise UserError(NOT_FINITE)
        texts = (self.tokens.decode([t - 1 for t in row if t and t - 1 != self.eot_token_id]) for row in ids.tolist())
        return [postprocess_generated_text(text, stops, None) for text, stops in zip(texts, stops_of, strict=True)]

    def has_stop(self, stops: tuple[str, ...], new: list[int]) -> bool:
        return new[-1] == self.eot_token_id or any(stop in self.tokens.decode(new) for stop in stops)


@contextmanager
def on_all_ranks(lm: Harness) -> Iterator[None]:
    """What the block raises about a task, as a UserError on every rank: the ranks go on together or not at all."""
    wrong, chatter = None, io.StringIO() if distributed.ranks().rank else sys.stderr  # the harness's bars and remarks
    try:
        with redirect_stdout(chatter), redirect_stderr(chatter):
            yield
    except UserError as error:
        wrong = str(error)
    except Exception as error:  # of the hub, the data or the task's own code: whatever it is, it is about the task
        if any(frame.f_locals.get("self") is lm for frame, _ in walk_tb(error.__traceback__)):  # but this is ours
            raise
        wrong = what_is_wrong(error)
    if lm.of_all_ranks(torch.tensor([float(wrong is not None)])).item():
        raise UserError(wrong or "failed on another rank")


def what_is_wrong(error: Exception) -> str:
    """What to tell of a task that cannot be loaded or counted."""
    first = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200].rstrip('.')}"
    if "scripts are no longer supported" in first:
        return (f"its data set is a loading script, which datasets 4 and later do not run ({first}); leave the task "
                "out, or give converted data as a local task (--include_path)")
    if isinstance(error, OSError):
        return (f"its data is neither in the cache nor to be had ({first}); fill the cache where there is internet, "
                "correct the paths of a local task, or leave it out")
    return f"the harness cannot load or count it ({first}); correct the task or leave it out"


def evaluate(lm: Harness, manager, name: str, args, known: dict) -> dict[str, dict | None]:
    """Records of the tasks that a name stands for, less those in `known`; UserError where they cannot be scored."""
    with on_all_ranks(lm):
        loaded = manager.load(name)
    group = loaded["groups"].get(name)
    tasks = [group] if group else [task for leaf, task in loaded["tasks"].items() if leaf not in known]
    if not tasks:
        return {}
    lm.title = name
    lm.cut.clear()
    with on_all_ranks(lm):
        results = lm_eval.simple_evaluate(
            lm, tasks=tasks, num_fewshot=args.num_fewshot, limit=args.limit, task_manager=manager, log_samples=False,
            bootstrap_iters=1000, random_seed=args.seed, numpy_random_seed=args.seed, torch_random_seed=args.seed,
            fewshot_random_seed=args.seed)
    if results is None:  # it returns them to the first rank of a node alone
        return dict.fromkeys([*loaded["tasks"], name])
    scored = {task: record_of(task, found, results, lm.cut) for task, found in results["results"].items()}
    return {task: record for task, record in scored.items() if record}  # a group may have no score of its own


def record_of(task: str, found: dict, results: dict, cut: dict[str, list[int]]) -> dict | None:
    """A task's (group's) record from the harness's results, or None where it has no score."""
    metrics = {key: value for key, value in found.items() if "," in key and isinstance(value, int | float)}
    named = {key.split(",")[0]: key for key in reversed(metrics) if "_stderr," not in key}  # of filters, the first
    if not named:
        return None
    first = next((name for name in METRICS if name in named), list(named)[-1])
    factor, filtered = METRICS.get(first, 1.0), named[first].split(",")[1]
    stderr = metrics.get(f"{first}_stderr,{filtered}")
    lost = cut[task] if task in cut else [n for mine in cut.values() for n in mine]
    return {"metric": named[first], "score": factor * metrics[named[first]],
            "stderr": None if stderr is None else factor * stderr, "requests": len(lost),
            "truncated": sum(n > 0 for n in lost), "tokens_cut": sum(lost),
            "num_fewshot": results["n-shot"].get(task), "version": results["versions"].get(task),
            "higher_is_better": results["higher_is_better"].get(task, {}).get(first), "metrics": metrics}


def table(record: dict) -> str:
    """The record as text, a line per task, then what was left out."""
    width = max(map(len, ("task", *record["tasks"])))
    lines = [f"{'task':<{width}}  {'metric':<16}{'score':>11}{'± s.e.':>9}{'examples':>10}{'requests':>10}"
             f"{'cut on the left':>17}{'tokens each':>13}"]
    for name, t in record["tasks"].items():
        error = "" if t["stderr"] is None else f"{t['stderr']:.4f}"
        each = f"{t['tokens_cut'] / t['truncated']:.1f}" if t["truncated"] else ""
        shots = "" if t["num_fewshot"] is None else t["num_fewshot"]
        lines.append(f"{name:<{width}}  {t['metric'].split(',')[0]:<16}{t['score']:>11.4f}{error:>9}{shots:>10}"
                     f"{t['requests']:>10,}{t['truncated']:>17,}{each:>13}")
    return "\n".join([*lines, *(f"left out: {name}: {why}" for name, why in record["failed"].items())])


def parse_args():
    parser = Parser(__doc__)
    models.add_flags(parser, RESULT)
    parser.add_argument("--tasks", default=",".join(TASKS), help="names of tasks, groups or tags of the harness, with "
                        f"commas between them (default: {', '.join(TASKS)})")
    parser.add_argument("--num_fewshot", type=int, default=5,
                        help="examples in a prompt, but none where a task itself says none (default: 5)")
    parser.add_argument("--include_path", type=Path, metavar="DIR", help="folder with YAML files of local tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task only, for a trial")
    parser.add_argument("--batch_size", type=int, default=32, help="requests per rank and forward pass (default: 32)")
    parser.add_argument("--seed", type=int, default=1234,
                        help="of the choice of examples (default: 1234, as the harness has it)")
    args = parser.parse_args()
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed}: must be below 2**32")
    args.tasks = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
    if not args.tasks:
        raise UserError("--tasks: no name given; such as --tasks sciq,piqa")
    if args.include_path and not args.include_path.is_dir():
        raise UserError(f"--include_path {args.include_path}: no such folder; give one with YAML files of tasks")
    if lm_eval is None:
        raise UserError("lm-evaluation-harness is not installed: pip install -r requirements-eval.txt")
    return args


def open_tasks(args):
    """The harness's index of tasks; UserError if one of --tasks is not in it."""
    from lm_eval.tasks import TaskManager
    if args.include_path:
        manager = TaskManager(include_path=args.include_path, include_defaults=False)
        if set(args.tasks) <= set(manager.all_subtasks):  # the harness's own need seconds to read
            return manager
    manager = TaskManager(include_path=args.include_path)
    for name in args.tasks:
        if name not in manager.all_tasks:
            here = f" and {args.include_path} (whose YAML files that do not parse are passed over)"
            raise UserError(f"--tasks {name}: not among the {len(manager.all_tasks):,} tasks, groups and tags of the "
                            f"harness{here if args.include_path else ''}{nearest(name, manager.all_tasks)}")
    return manager


def open_record(path: Path | None, settings: dict) -> dict:
    """The record to add to: that in the file if it has the same settings, else an empty one."""
    if path is None or not path.is_file():
        return {**settings, "tasks": {}, "failed": {}}
    there = checkpoint.read_json(path)
    differ = [f"{key} {there.get(key)}" for key, value in settings.items() if there.get(key) != value]
    if differ or not isinstance(there.get("tasks"), dict):
        print0(f"{path} is of other settings ({', '.join(differ)}): what is scored now replaces it")
        return {**settings, "tasks": {}, "failed": {}}
    return {**there, "failed": {}}


def main() -> None:
    args = parse_args()
    manager = open_tasks(args)
    model, tokens, about, _ = models.open_model(args)
    result = models.result_path(args, RESULT)
    record = open_record(result, {**about, "num_fewshot": args.num_fewshot, "limit": args.limit, "seed": args.seed,
                                   "harness": lm_eval.__version__})
    if kept := [name for name in args.tasks if name in record["tasks"]]:
        print0(f"scored before with these settings: {', '.join(kept)} (remove {result} to score again)")
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness's bootstrap would start a process per core, on every rank
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = Harness(model.to(distributed.setup("cuda" if torch.cuda.is_available() else "cpu")), tokens, args.batch_size,
                 about["dtype"])
    for name in args.tasks:
        if name in record["tasks"]:
            continue
        try:
            record["tasks"].update(evaluate(lm, manager, name, args, record["tasks"]))
        except UserError as error:
            record["failed"][name] = str(error)
        except torch.OutOfMemoryError:
            raise UserError(f"--batch_size {args.batch_size}: does not fit in the GPU's memory; give a smaller one"
                            ) from None
        if result and record["tasks"] and distributed.ranks().rank == 0:
            write_text(result, json.dumps(record, indent=1))
    if not record["tasks"]:
        (name, why), *others = record["failed"].items()
        raise UserError(f"task {name}: {why}" + (f" ({len(others)} more failed as well)" if others else ""))
    if distributed.ranks().rank == 0:
        print(table(record))
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
