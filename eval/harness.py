"""Our models as one of EleutherAI's lm-evaluation-harness, and the harness's tasks and results.

The harness makes the prompts and counts the points; `Harness` gives it log-likelihoods and
continuations. Importing this file takes seconds and needs requirements-eval.txt.

B inputs in a batch, T tokens in the longest, M tokens scored, C channels.
"""

import io
import logging
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from traceback import walk_tb

import lm_eval
import lm_eval.tasks
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from cli import UserError, nearest
from corpus.tokenizer import Tokenizer
from eval.generate import NOT_FINITE, generate
from model import LanguageModel
from runtime import distributed

VERSION = lm_eval.__version__
# A task's score is the first of these metrics that it has, otherwise its own first metric. It is
# multiplied by the factor: squadv2 counts in percent.
METRICS = {"acc": 1.0, "exact_match": 1.0, "exact": 0.01}
ROWS = 1024  # rows of logits computed at once
DIVERGED = -2  # in place of a token
# Tasks of ours: those of the harness whose data sets are loading scripts, with converted data.
OWN_TASKS = Path(__file__).parent / "tasks"
FILL_CACHE = "python scripts/fetch_tasks.py where there is internet"


class Harness(TemplateLM):
    """Our model as one of the harness, without the padding of its vocabulary.

    The harness runs on every rank as if it were alone: each rank gets all requests, computes every
    W-th batch and receives all answers. The batches, and so the numbers, are the same for any W.

    cut: task -> how many tokens of each of its requests did not fit into the context.
    title: of the progress bars.
    """

    def __init__(
        self, model: LanguageModel, tokens: Tokenizer, batch_size: int, dtype: str = "float32"
    ):
        super().__init__()
        self.model = model.eval()
        self.tokens = tokens
        self.batch_size = batch_size
        self._device = model.wte.weight.device
        self.autocast = partial(
            torch.autocast, self._device.type, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        self.max_length = model.config.block_size
        # New tokens where a task names no number; 256 as in the harness's own hf backend.
        self.max_gen_toks = min(256, self.max_length // 2)
        self.title = ""
        self.cut = defaultdict(list)

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eot_token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        return self.tokens.encode_to_numpy(string).tolist()  # there are no special tokens to add

    def note_cuts(self, requests: list, cuts: list[int]) -> None:
        """Record how many tokens each request lost."""
        for request, cut in zip(requests, cuts, strict=True):
            self.cut[request.task_name].append(cut)

    def batches(self, jobs: list) -> Iterator[list]:
        """This rank's batches of a list that is the same on all ranks."""
        rank, _, world_size = distributed.ranks()
        starts = range(rank * self.batch_size, len(jobs), world_size * self.batch_size)
        for i in tqdm(starts, self.title, unit="batch", disable=rank > 0):
            yield jobs[i : i + self.batch_size]

    def of_all_ranks(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on the CPU: each rank fills in its part and leaves zeros."""
        if distributed.ranks().world_size == 1:  # perhaps on mps, which has no float64
            return values
        return distributed.reduce_sum(values.to(self._device)).cpu()

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding gives it) of each request's continuation."""
        if any(request.args[:2] == ("", "") for request in requests):
            raise UserError(
                "asks for the likelihood of an empty text after an empty text; correct the task"
            )
        answers = super().loglikelihood(requests, disable_tqdm=True)  # encodes, then calls the next
        self.note_cuts(requests, self.last_cuts)
        return answers

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """The same for (texts, context ids, continuation ids); equal ones are computed once."""
        size = self.max_length + 1  # the last token is only a target
        self.last_cuts = []
        jobs = {}  # inputs -> {continuation: its requests}; inputs end before the last token
        for i, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) < size:
                raise UserError(
                    f"has a continuation of {len(continuation)} tokens, {repr(texts[1])[:60]}; "
                    f"1 to {self.max_length}, the model's context, can be scored"
                )
            tokens = context + continuation
            self.last_cuts.append(max(0, len(tokens) - size))
            inputs = tuple(tokens[-size:-1])
            continuations = jobs.setdefault(inputs, {})
            continuations.setdefault(tuple(continuation), []).append(i)

        scored = []  # the requests that each continuation answers
        lengths = []  # of the continuations
        parts = []
        longest_first = sorted(jobs, key=len, reverse=True)
        for batch in self.batches(longest_first):
            pairs = []
            for row, inputs in enumerate(batch):
                for continuation, members in jobs[inputs].items():
                    pairs.append((row, continuation))
                    scored.append(members)
                    lengths.append(len(continuation))
            parts.append(self.score(batch, pairs))
        answers = torch.zeros(len(requests), 2, dtype=torch.float64)
        if parts:
            nats, greedy = torch.cat(parts, dim=1).cpu().double()  # (M,) each
            nats, greedy = nats.split(lengths), greedy.split(lengths)
            for members, own_nats, own_greedy in zip(scored, nats, greedy, strict=True):
                answers[members] = torch.stack([own_nats.sum(), own_greedy.min()])
        answers = self.of_all_ranks(answers)
        if not answers.isfinite().all():
            raise UserError(NOT_FINITE)
        return [(nats, greedy == 1) for nats, greedy in answers.tolist()]

    @torch.inference_mode()
    def score(self, batch: list[tuple], pairs: list[tuple[int, tuple]]) -> Tensor:
        """(2, M) float32: nats of the continuations' tokens, and 1 where a token is the likeliest.

        batch: B inputs, the longest first. pairs: (row of the batch, continuation), which ends one
        token after the row's inputs.
        """
        T = len(batch[0])
        device = self._device
        padded = [inputs + (0,) * (T - len(inputs)) for inputs in batch]
        idx = torch.tensor(padded, device=device)  # (B, T)
        positions = []
        targets = []
        for row, continuation in pairs:
            end = row * T + len(batch[row])
            first = end - len(continuation)
            positions += range(first, end)
            targets += continuation
        positions = torch.tensor(positions, device=device)  # (M,)
        targets = torch.tensor(targets, device=device)  # (M,)
        head = self.model.head[: self.tokens.n_vocab]  # (V, C)
        parts = []
        with self.autocast():
            hidden = self.model.hidden(idx)  # (B, T, C)
            x = hidden.flatten(0, 1)[positions]  # (M, C)
            for rows, y in zip(x.split(ROWS), targets.split(ROWS), strict=True):
                logits = F.linear(rows, head).float()
                nats = -F.cross_entropy(logits, y, reduction="none")
                is_likeliest = logits.argmax(-1) == y
                parts.append(torch.stack([nats, is_likeliest]))
        return torch.cat(parts, dim=1)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, in windows that the harness makes; nothing is cut."""
        windows = []
        counts = []  # windows of each request
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            own = [(("", ""), *make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        nats = [nats for nats, _ in self._loglikelihood_tokens(windows)]
        self.note_cuts(requests, [0] * len(requests))
        sums = []
        first = 0
        for n in counts:
            sums.append(sum(nats[first : first + n]))
            first += n
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each request's text, up to and without a stop string."""
        eot_text = self.tokens.decode([self.eot_token_id])
        groups = {}  # (stop strings, most new tokens) -> [(prompt's ids, index of the request)]
        cuts, stops_of = [], []
        for i, request in enumerate(requests):
            wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            most = wanted["max_gen_toks"]
            room = self.max_length - most
            self.check_generation(wanted["do_sample"], most)
            prompt = self.tok_encode(request.args[0]) or [self.eot_token_id]
            cuts.append(max(0, len(prompt) - room))
            stops = handle_stop_sequences(wanted["until"], eot_text)
            stops_of.append(stops)
            groups.setdefault((tuple(stops), most), []).append((prompt[-room:], i))
        self.note_cuts(requests, cuts)

        # Each token plus 1: 0 means no token, which is what the sum over the ranks needs.
        longest = max(most for _, most in groups)
        ids = torch.zeros(len(requests), longest, dtype=torch.int64)
        for (stops, most), group in groups.items():
            group.sort(key=lambda job: len(job[0]), reverse=True)
            for batch in self.batches(group):
                prompts = [prompt for prompt, _ in batch]
                continuations = self.extend(prompts, most, stops)
                for (_, i), new in zip(batch, continuations, strict=True):
                    ids[i, : len(new)] = torch.tensor(new) + 1
        ids = self.of_all_ranks(ids)
        if ids.min() < 0:
            raise UserError(NOT_FINITE)

        texts = []
        for row, stops in zip(ids.tolist(), stops_of, strict=True):
            new = [value - 1 for value in row if value > 0]
            text = self.tokens.decode([token for token in new if token != self.eot_token_id])
            text = postprocess_generated_text(text, stops, None)
            texts.append(text)
        return texts

    def check_generation(self, do_sample: bool, most: int) -> None:
        """UserError where a task asks for text that we cannot score."""
        if do_sample or most >= self.max_length:
            what = "text drawn at random" if do_sample else f"{most} new tokens"
            raise UserError(
                f"asks for {what}; only greedy text of fewer tokens than the model's context "
                f"({self.max_length}) can be scored"
            )

    def extend(
        self, prompts: list[list[int]], most: int, stops: tuple[str, ...]
    ) -> list[list[int]]:
        """Up to `most` new tokens for each prompt; [DIVERGED] where the output is not finite.

        It does not raise then: that may be so on this rank alone, and the others wait for it.
        """

        def finished(new: list[int]) -> bool:
            if new[-1] == self.eot_token_id:
                return True
            text = self.tokens.decode(new)
            return any(stop in text for stop in stops)

        try:
            with self.autocast():
                return generate(self.model, prompts, most, self.tokens.n_vocab, finished=finished)
        except UserError:
            return [[DIVERGED]] * len(prompts)


@contextmanager
def on_all_ranks(lm: Harness) -> Iterator[None]:
    """Turn what the block raises about a task into a UserError on every rank.

    So the ranks go on together or not at all. The harness's own output is shown on rank 0 alone.
    """
    reason = None
    output = io.StringIO() if distributed.ranks().rank else sys.stderr
    try:
        with redirect_stdout(output), redirect_stderr(output):
            yield
    except UserError as error:
        reason = str(error)
    except Exception as error:  # anything: it comes from the hub, the data or the task's own code
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        if any(frame.f_locals.get("self") is lm for frame in frames):  # raised in our own code
            raise
        reason = what_is_wrong(error)
    failed = torch.tensor([float(reason is not None)])
    if lm.of_all_ranks(failed).item():
        raise UserError(reason or "failed on another rank")


def what_is_wrong(error: Exception) -> str:
    """Why a task cannot be scored, and what to do about it, in one line."""
    message = (str(error).strip() or "no message").splitlines()[0]
    cause = f"{type(error).__name__}: {message[:200].rstrip('.')}"
    if "scripts are no longer supported" in cause:
        return (
            f"its data set is a loading script, which datasets 4 and later do not run ({cause}); "
            "leave the task out, or give converted data as a local task (--include_path)"
        )
    if isinstance(error, OSError):
        return (
            f"its data is not in the cache and cannot be downloaded ({cause}); fill the cache: "
            f"{FILL_CACHE}; or correct the paths of a local task, or leave it out"
        )
    return f"the harness cannot load or count it ({cause}); correct the task or leave it out"


def open_tasks(names: list[str], include_path: Path | None) -> lm_eval.tasks.TaskManager:
    """The harness's index of tasks and ours; UserError if a name is not in it.

    Where two have the same name, a task in include_path comes first, then ours.
    """
    # The index warns of each task of ours that replaces one of the harness.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [OWN_TASKS, include_path] if include_path else [OWN_TASKS]
    manager = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)
    if set(names) <= set(manager.all_subtasks):  # reading the harness's own takes seconds
        return manager
    manager = lm_eval.tasks.TaskManager(include_path=paths)
    local = ""
    if include_path:
        local = f" and {include_path} (YAML files that do not parse are ignored)"
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(
                f"--tasks {name}: not among the {len(manager.all_tasks):,} tasks, groups and "
                f"tags of the harness{local}{nearest(name, manager.all_tasks)}"
            )
    return manager


def evaluate(
    lm: Harness, manager: lm_eval.tasks.TaskManager, name: str, args: Namespace, known: dict
) -> dict[str, dict | None]:
    """Records of the tasks that a name stands for, without those in `known`.

    args: num_fewshot, limit and seed. UserError where the tasks cannot be scored.
    """
    with on_all_ranks(lm):
        loaded = manager.load(name)
    if name in loaded["groups"]:
        tasks = [loaded["groups"][name]]
    else:
        tasks = [task for leaf, task in loaded["tasks"].items() if leaf not in known]
    if not tasks:
        return {}
    lm.title = name
    lm.cut.clear()
    with on_all_ranks(lm):
        results = lm_eval.simple_evaluate(
            lm,
            tasks=tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=args.seed,
            numpy_random_seed=args.seed,
            torch_random_seed=args.seed,
            fewshot_random_seed=args.seed,
        )
    if results is None:  # only the first rank of a node gets results
        return dict.fromkeys([*loaded["tasks"], name])
    records = {}
    for task, values in results["results"].items():
        record = record_of(task, values, results, lm.cut)
        if record:  # a group may have no score of its own
            record["is_group"] = task not in lm.cut
            records[task] = record
    return records


def record_of(task: str, values: dict, results: dict, cut: dict[str, list[int]]) -> dict | None:
    """The record of a task or group from the harness's results; None where it has no score."""
    metrics = {}  # "METRIC,FILTER" or "METRIC_stderr,FILTER" -> value
    for key, value in values.items():
        if "," in key and isinstance(value, int | float):
            metrics[key] = value
    keys = {}  # metric -> its key; with several filters, the first one
    for key in metrics:
        if "_stderr," not in key:
            metric, _ = key.split(",", 1)
            keys.setdefault(metric, key)
    if not keys:
        return None

    name = next((metric for metric in METRICS if metric in keys), next(iter(keys)))
    factor = METRICS.get(name, 1.0)
    key = keys[name]
    _, filter_name = key.split(",", 1)
    stderr = metrics.get(f"{name}_stderr,{filter_name}")
    if task in cut:
        cuts = cut[task]
    else:  # a group: those of all its tasks
        cuts = [n for of_task in cut.values() for n in of_task]
    return {
        "metric": key,
        "score": factor * metrics[key],
        "stderr": None if stderr is None else factor * stderr,
        "requests": len(cuts),
        "truncated": sum(n > 0 for n in cuts),
        "tokens_cut": sum(cuts),
        "num_fewshot": results["n-shot"].get(task),
        "version": results["versions"].get(task),
        "higher_is_better": results["higher_is_better"].get(task, {}).get(name),
        "metrics": metrics,
    }
