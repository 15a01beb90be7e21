"""Few-shot scores of our GPT against the harness's own hf backend, with local tasks."""

import json
import os
import shutil
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.utils.collect_env
from conftest import ROOT, command, expect_error, expect_ok

import cli
from corpus import tokenizer
from eval import fewshot, harness, models
from families import build
from llama import LlamaConfig
from model import GPT, GPTConfig
from recipe import TrainConfig
from runtime import checkpoint
from scripts import fetch_tasks

TASKS = ROOT / "tests" / "tasks"
NAMES = ("where", "letter", "from_nothing", "last_words", "tell", "whole_text")
# name -> (shape with a padded vocabulary, examples in a prompt)
# Some requests are longer than these contexts.
MODELS = {
    "gpt2": (GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=64, vocab_size=50304), 2),
    "bytes": (GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=128, vocab_size=320), 0),
    "llama": (LlamaConfig(2, 4, 16, n_kv_head=2, n_ffn=40, block_size=64, vocab_size=320), 0),
}


TEACHING_STEPS = 250
REQUESTS = 16  # of each task, of 28


def teach(model, tokens):
    """Stories with the right answers, until it ends answers as they do."""
    lines = (TASKS / "stories_train.jsonl").read_text().splitlines()
    stories = [json.loads(line) for line in lines] * 9
    text = "\n\n".join(f"{s['story'][-90:]}\nQ: {s['question']}\nA: {s['place']}" for s in stories)
    ids = torch.from_numpy(tokens.encode_to_numpy(text).astype("int64"))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=TEACHING_STEPS)
    for _ in range(TEACHING_STEPS):
        batch = torch.stack([ids[i : i + 129] for i in torch.randint(len(ids) - 129, (8,))])
        model(batch[:, :-1], batch[:, 1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder per model, with its export in hf/: bytes is trained, the others are random."""
    made = {}
    for name, (shape, _) in MODELS.items():
        tokens = tokenizer.load("gpt2" if name == "gpt2" else "bytes")
        folder = tmp_path_factory.mktemp(name) / "run"
        torch.manual_seed(1)
        model = build(shape)
        if name == "bytes":
            teach(model, tokens)
        else:
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.3)
        torch.nn.init.normal_(model.head[tokens.n_vocab :], std=2)  # padding that would win
        checkpoint.save(
            folder,
            7,
            (model.state_dict(), {}),
            {
                "gpt": asdict(shape),
                "max_steps": 7,
                "identity": {"dtype": "float32"},
                "data_dir": "gone",
                "tokenizer_sha256": tokens.sha256,
            },
            1,
        )
        settings = TrainConfig(global_batch_size=4, block_size=shape.block_size, data_dir="gone")
        (folder / "config.json").write_text(json.dumps(asdict(settings)))
        expect_ok(command("scripts/export_hf.py", "--run", folder))
        made[name] = folder
    return made


# The harness asks for a report on the machine with every evaluation, which takes a second.
WITHOUT_REPORT = "import torch.utils.collect_env as c; c.get_pretty_env_info = str"


@pytest.fixture(scope="module", autouse=True)
def without_report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.collect_env, "get_pretty_env_info", str)
        yield


def simple_evaluate(lm, tasks, num_fewshot):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    os.environ["DISABLE_MULTIPROC"] = "1"
    return simple_evaluate(
        lm,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=REQUESTS,
        log_samples=True,
        bootstrap_iters=10,
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
    )


def our_model(run_dir, batch_size=8, **changes):
    model, tokens, *_ = models.open_model(Namespace(run=run_dir, hf=None, dtype=None))
    model.config = replace(model.config, **changes)
    return harness.Harness(model, tokens, batch_size)


@pytest.fixture(scope="module")
def theirs(runs):
    """name -> what the hf backend gives on the exported folder."""
    from lm_eval.models.huggingface import HFLM

    found, here = {}, Path.cwd()
    os.chdir(ROOT)  # the tasks name their files from there
    for name, folder in runs.items():
        lm = HFLM(str(folder / "hf"), device="cpu", dtype="float32", batch_size=4)
        found[name] = simple_evaluate(lm, NAMES, MODELS[name][1])
    os.chdir(here)
    return found


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_every_request_and_score_is_that_of_the_hf_backend(
    runs, theirs, name, batch_size, monkeypatch
):
    monkeypatch.chdir(ROOT)
    lm = our_model(runs[name], batch_size)
    ours, theirs = simple_evaluate(lm, NAMES, MODELS[name][1]), theirs[name]
    for task in NAMES:
        assert any(lm.cut[task]) != (
            task in ("from_nothing", "whole_text")
        )  # some requests do not fit
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert a["arguments"] == b["arguments"]
            for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
                if task == "tell":
                    assert x == y
                elif task == "whole_text":
                    assert x == pytest.approx(y, abs=1e-3)
                else:
                    assert x[0] == pytest.approx(y[0], abs=1e-3) and x[1] is y[1]
        for metric, value in theirs["results"][task].items():
            tolerance = (
                1e-5 if "perplexity" in metric or "bits" in metric else 0
            )  # those are no counts
            same = pytest.approx(value, rel=tolerance) if isinstance(value, float) else value
            assert ours["results"][task][metric] == same, metric
    if (
        name == "bytes"
    ):  # it has learned to end its answers: what is compared is not all of one kind
        said = [s["resps"][0][0] for s in ours["samples"]["tell"]]
        assert len(set(said)) > 2 and any(len(text) < 14 for text in said)
        assert {s["resps"][0][0][1] for s in ours["samples"]["last_words"]} == {True, False}


def test_cuts_are_counted(runs, monkeypatch):
    monkeypatch.chdir(ROOT)
    lm, (shape, shots) = our_model(runs["gpt2"]), MODELS["gpt2"]
    done = simple_evaluate(lm, NAMES, shots)
    for task in ("where", "letter", "last_words", "tell"):
        expected = []
        for sample in done["samples"][task]:
            for context, rest in sample["arguments"]:
                # The new tokens that the task asks for must fit; the last token of a choice is
                # only a target.
                text, room = (
                    (context, shape.block_size - 14)
                    if task == "tell"
                    else (context + rest, shape.block_size + 1)
                )
                expected.append(max(0, len(lm.tok_encode(text)) - room))
        assert lm.cut[task] == expected and min(expected) < max(expected)
    assert lm.cut["whole_text"] == [0] * REQUESTS


def score(run_dir, *flags, ranks=1):
    args = ["eval/fewshot.py", "--run", run_dir, "--include_path", TASKS, *flags]
    return command(*args, ranks=ranks, patch=WITHOUT_REPORT)


@pytest.fixture
def run_dir(runs, tmp_path):
    """A copy of the run with bytes that the test may write to."""
    return Path(shutil.copytree(runs["bytes"], tmp_path / "run"))


def test_two_ranks_give_the_numbers_of_one(run_dir, tmp_path):
    """With 11 requests or more of each task, which two ranks cannot share evenly."""
    flags = ("--tasks", ",".join(NAMES), "--num_fewshot", 1, "--batch_size", 5, "--limit", 11)
    expect_ok(score(run_dir, *flags, "--to", tmp_path / "one.json"))
    shown = expect_ok(score(run_dir, *flags, "--to", tmp_path / "two.json", ranks=2))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two and list(one["tasks"]) == list(NAMES)
    assert shown.count("from_nothing") == 1  # rank 0 alone shows it


def test_record_and_table(run_dir):
    shown = expect_ok(
        score(run_dir, "--tasks", "where,whole_text", "--num_fewshot", 1, "--limit", 9)
    )
    record = json.loads((run_dir / "eval" / "fewshot.json").read_text())
    assert (record["step"], record["num_fewshot"], record["limit"], record["failed"]) == (
        7,
        1,
        9,
        {},
    )
    where, whole = record["tasks"]["where"], record["tasks"]["whole_text"]
    assert where["metric"] == "acc,none" and where["requests"] == 27 and where["truncated"] == 27
    correct = where["score"] * 9
    assert correct == pytest.approx(round(correct)) and where["higher_is_better"] is True
    assert where["stderr"] == pytest.approx((where["score"] * (1 - where["score"]) / 8) ** 0.5)
    assert whole["metric"].startswith("word_perplexity") and whole["higher_is_better"] is False
    assert (whole["stderr"], whole["truncated"], whole["tokens_cut"]) == (None, 0, 0)
    row = next(line for line in shown.splitlines() if line.startswith("where")).split()
    assert row == [
        "where",
        "acc",
        f"{where['score']:.4f}",
        f"{where['stderr']:.4f}",
        "1",
        "27",
        "27",
        f"{where['tokens_cut'] / 27:.1f}",
    ]


def test_a_second_start_scores_what_is_missing(run_dir):
    path = run_dir / "eval" / "fewshot.json"
    expect_ok(score(run_dir, "--tasks", "letter", "--limit", 3))
    record = json.loads(path.read_text())
    record["tasks"]["letter"]["score"] = 0.123  # so that scoring again would show
    path.write_text(json.dumps(record))
    assert "scored before with these settings: letter" in expect_ok(
        score(run_dir, "--tasks", "where,letter", "--limit", 3)
    )
    tasks = json.loads(path.read_text())["tasks"]
    assert tasks["letter"]["score"] == 0.123 and "where" in tasks
    assert "is of other settings (limit 3)" in expect_ok(
        score(run_dir, "--tasks", "where", "--limit", 4)
    )
    assert list(json.loads(path.read_text())["tasks"]) == ["where"]


def test_scores_are_kept_for_the_same_model_and_tasks_alone(run_dir, tmp_path):
    path = run_dir / "eval" / "fewshot.json"
    tasks = shutil.copytree(TASKS, tmp_path / "tasks")
    flags = ("eval/fewshot.py", "--run", run_dir, "--include_path", tasks, "--tasks=letter")
    flags += ("--limit=3",)
    expect_ok(command(*flags))
    record = json.loads(path.read_text())
    state = json.loads(next(run_dir.glob("checkpoints/*/state.json")).read_text())
    assert record["model_sha256"] == state["sha256"]["model.pt"]
    assert "scored before" in expect_ok(command(*flags))
    for key in ("model_sha256", "seed", "harness", "dtype", "local_tasks"):
        path.write_text(json.dumps({**record, key: "another"}))
        assert f"is of other settings ({key} another)" in expect_ok(command(*flags))
    with open(tasks / "letter.yaml", "a") as file:
        file.write("# another version\n")
    assert "is of other settings (local_tasks" in expect_ok(command(*flags))


def test_groups_have_a_row_of_their_own(run_dir, harness_index):
    expect_ok(score(run_dir, "--tasks", "choosing,where", "--num_fewshot", 0))
    tasks = json.loads((run_dir / "eval" / "fewshot.json").read_text())["tasks"]
    both = [tasks["where"], tasks["letter"]]
    assert tasks["choosing"]["score"] == pytest.approx(sum(t["score"] for t in both) / 2)
    assert [name for name, task in tasks.items() if task["is_group"]] == ["choosing"]
    for key in ("requests", "truncated", "tokens_cut"):
        assert tasks["choosing"][key] == sum(t[key] for t in both)


def test_a_hugging_face_folder_scores_like_its_run(run_dir, tmp_path):
    flags = (
        "--include_path",
        TASKS,
        "--tasks",
        "where,tell",
        "--num_fewshot",
        0,
        "--to",
        tmp_path / "hf.json",
    )
    expect_ok(command("eval/fewshot.py", "--hf", run_dir / "hf", *flags))
    expect_ok(score(run_dir, *flags[2:-2]))
    ours = json.loads((run_dir / "eval" / "fewshot.json").read_text())["tasks"]
    assert json.loads((tmp_path / "hf.json").read_text())["tasks"] == ours


# Folders of lm_eval/tasks that hold fewshot.TASKS: reading all of them takes half a minute.
FOLDERS = (
    "arc",
    "hellaswag",
    "lambada",
    "logiqa",
    "logiqa2",
    "nq_open",
    "openbookqa",
    "piqa",
    "sciq",
    "squadv2",
    "super_glue",
    "triviaqa",
    "webqs",
    "winogrande",
)


@pytest.fixture(scope="module")
def small_index():
    """An index of the tasks in FOLDERS and of ours, as the harness makes it of all its tasks."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    paths = [TASKS, *(root / name for name in FOLDERS), harness.OWN_TASKS]
    return lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)


@pytest.fixture
def harness_index(small_index, monkeypatch):
    """The small index in place of the harness's own."""
    import lm_eval.tasks

    TaskManager = lm_eval.tasks.TaskManager

    def index(include_path=None, include_defaults=True):
        if include_defaults:
            return small_index
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", index)
    return small_index


def test_the_harness_has_the_default_tasks(harness_index):
    assert set(fewshot.TASKS) <= set(harness_index.all_tasks)


@pytest.mark.long
def test_the_whole_harness_has_the_default_tasks():
    import lm_eval.tasks

    assert set(fewshot.TASKS) <= set(lm_eval.tasks.TaskManager().all_tasks)


# what is given (RUN stands for the run) -> words of the one line
WRONG = [
    (["--tasks", "where"], ["--run", "--hf"]),
    (["--run", "RUN", "--hf", "RUN/hf"], ["--hf", "not allowed with"]),
    (["--run", "nowhere"], ["nowhere", "no checkpoint"]),
    (["--run", "RUN", "--tasks", ","], ["--tasks", "no name"]),
    (["--run", "RUN", "--tasks", "hellaswga"], ["hellaswga", "did you mean 'hellaswag'"]),
    (["--run", "RUN", "--tasks", "where,wheer"], ["wheer", "did you mean 'where'"]),
    (["--run", "RUN", "--num_fewshot", "-1"], ["--num_fewshot -1", "0 or more"]),
    (["--run", "RUN", "--num_fewshot", "five"], ["five", "int"]),
    (["--run", "RUN", "--limit", "0"], ["--limit 0", "1 or more"]),
    (["--run", "RUN", "--limit", "0.1"], ["0.1", "int"]),
    (["--run", "RUN", "--batch_size", "0"], ["--batch_size 0", "1 or more"]),
    (["--run", "RUN", "--seed", "-3"], ["--seed -3", "0 or more"]),
    (["--run", "RUN", "--seed", str(2**32)], ["--seed", "below 2**32"]),
    (["--run", "RUN", "--include_path", "nowhere"], ["--include_path nowhere", "no such folder"]),
    (["--run", "RUN", "--num_fewshots", "2"], ["--num_fewshots", "did you mean '--num_fewshot'"]),
    (["--hf", "nowhere", "--tasks", "where"], ["nowhere", "neither a folder"]),
    (["--hf", "RUN", "--tasks", "where"], ["RUN", "config.json"]),
    (["--run", "RUN", "--tasks", "where", "--to", "RUN"], ["--to", "is a folder"]),
    (
        ["--run", "RUN", "--tasks", "where", "--to", "RUN/config.json/x.json"],
        ["--to", "can be made"],
    ),
]


@pytest.mark.parametrize("flags, words", WRONG, ids=lambda value: " ".join(value))
def test_wrong_flags_are_told_in_one_line(runs, harness_index, flags, words):
    flags, words = (
        [text.replace("RUN", str(runs["bytes"])) for text in texts] for texts in (flags, words)
    )
    path = [] if "--include_path" in flags else ["--include_path", TASKS]
    expect_error(command("eval/fewshot.py", *flags, *path), *words)


# what a task takes over from one in tests/tasks, what it has instead, words of the one line
WRONG_TASKS = {
    "hub": (
        "where",
        "dataset_path: allenai/sciq\ndataset_kwargs: null",
        ["not in the cache", "allenai/sciq"],
    ),
    "file": (
        "where",
        "dataset_kwargs: {data_files: {train: gone.jsonl, test: gone.jsonl}}",
        ["in the cache", "gone.jsonl"],
    ),
    "split": ("where", "test_split: tests", ["KeyError", "tests"]),
    "template": (
        "where",
        "doc_to_text: '{{no_such_name.upper()}}'",
        ["UndefinedError", "no_such_name"],
    ),
    "type": ("where", "output_type: multiple_choices", ["multiple_choices"]),
    "choice": ("where", "doc_to_choice: ['', 'a', 'b']\ntarget_delimiter: ''", ["IndexError"]),
    "empty": (
        "last_words",
        "doc_to_target: ''\ntarget_delimiter: ''",
        ["continuation of 0 tokens", "''"],
    ),
    "nothing": (
        "last_words",
        "doc_to_text: ''\ndoc_to_target: ''\ntarget_delimiter: ''",
        ["empty text"],
    ),
    "long": (
        "where",
        "doc_to_choice: \"{{['x' * 200, 'a', 'b']}}\"",
        ["continuation of 201 tokens", "1 to 128"],
    ),
    "tokens": (
        "tell",
        "generation_kwargs: {until: [x], max_gen_toks: 128}",
        ["128 new tokens", "(128)"],
    ),
    "random": (
        "tell",
        "generation_kwargs: {until: [x], do_sample: true, temperature: 0.5}",
        ["at random", "greedy"],
    ),
}


@pytest.mark.parametrize("name", WRONG_TASKS)
def test_a_task_that_cannot_be_scored_ends_nothing_but_itself(run_dir, tmp_path, name):
    folder = Path(shutil.copytree(TASKS, tmp_path / "tasks"))
    base, lines, words = WRONG_TASKS[name]
    (folder / "bad.yaml").write_text(f"include: {base}.yaml\ntask: bad\n{lines}\n")
    flags = ("--run", run_dir, "--include_path", folder, "--num_fewshot", 0, "--tasks")
    expect_error(command("eval/fewshot.py", *flags, "bad"), "task bad", *words)
    record = json.loads((run_dir / "eval" / "fewshot.json").read_text())
    assert record["tasks"] == {} and words[0] in record["failed"]["bad"]
    if name in ("file", "empty", "tokens"):  # one that fails at each stage
        shown = expect_ok(command("eval/fewshot.py", *flags, "bad,where"))
        record = json.loads((run_dir / "eval" / "fewshot.json").read_text())
        assert list(record["tasks"]) == ["where"] and words[0] in record["failed"]["bad"]
        assert "left out: bad: " in shown


def test_squadv2_counts_in_percent_and_is_told_as_a_fraction():
    found = {"alias": "squadv2", "f1,none": 40.0, "exact,none": 25.0, "exact_stderr,none": "N/A"}
    results = {
        "n-shot": {"squadv2": 5},
        "versions": {"squadv2": 3},
        "higher_is_better": {"squadv2": {"exact": True}},
    }
    record = harness.record_of("squadv2", found, results, {"squadv2": [0, 3, 4]})
    assert (record["metric"], record["score"], record["stderr"]) == ("exact,none", 0.25, None)
    assert (record["requests"], record["truncated"], record["tokens_cut"]) == (3, 2, 7)
    assert record["metrics"] == {"f1,none": 40.0, "exact,none": 25.0}


def test_a_loading_script_is_told_as_such():
    said = harness.what_is_wrong(
        RuntimeError("Dataset scripts are no longer supported, but found logiqa.py")
    )
    assert "loading script" in said and "logiqa.py" in said and "\n" not in said


def test_our_own_errors_keep_their_traceback(run_dir, monkeypatch):
    monkeypatch.setattr(GPT, "hidden", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(run_dir, "--tasks", "where")


def test_damaged_runs_are_told_in_one_line(run_dir, monkeypatch):
    weights, state = (checkpoint.find_latest(run_dir) / name for name in ("model.pt", "state.json"))
    model = torch.load(weights)
    content = json.loads(state.read_text())
    checkpoint.save(
        run_dir, 7, ({**model, "ln_f.bias": model["ln_f.bias"] * float("nan")}, {}), content, 1
    )
    expect_error(score(run_dir, "--tasks", "where"), "task where", "diverged")
    expect_error(score(run_dir, "--tasks", "tell"), "task tell", "diverged")
    (run_dir / "eval" / "fewshot.json").write_text("{")
    expect_error(score(run_dir, "--tasks", "where"), "fewshot.json", "cannot be read")
    weights.write_bytes(b"not tensors")
    expect_error(score(run_dir, "--tasks", "where"), "model.pt", "damaged")
    state.write_text(
        json.dumps({**json.loads(state.read_text()), "tokenizer_sha256": "of another"})
    )
    expect_error(score(run_dir, "--tasks", "where"), "tokenizer", "gpt2, bytes")
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    expect_error(score(run_dir, "--tasks", "where"), "pip install -r requirements-eval.txt")


def test_a_table_says_which_tasks_are_missing_and_why(run_dir, tmp_path):
    """Also where no task at all could be scored."""
    folder = Path(shutil.copytree(TASKS, tmp_path / "tasks"))
    gone = "dataset_kwargs: {data_files: {train: gone.jsonl, test: gone.jsonl}}"
    (folder / "gone.yaml").write_text(f"include: where.yaml\ntask: gone\n{gone}\n")
    flags = ("--include_path", folder, "--num_fewshot", 0, "--limit", 3)
    done = command("eval/fewshot.py", "--run", run_dir, *flags, "--tasks", "gone")
    expect_error(done, "python scripts/fetch_tasks.py")
    missing = "Missing: gone: its data is not in the cache and cannot be downloaded (more in"
    shown = expect_ok(command("eval/tables.py", run_dir, "--what", "fewshot"))
    assert "| gone | missing |" in shown and missing in shown
    expect_ok(command("eval/report.py", run_dir, "--out", tmp_path / "report.html"))
    expect_ok(command("eval/fewshot.py", "--run", run_dir, *flags, "--tasks", "gone,where"))
    shown = expect_ok(command("eval/tables.py", run_dir, "--what", "fewshot"))
    assert "| where (acc) |" in shown and "| gone        |" in shown and missing in shown
    (folder / "gone.yaml").write_text("include: where.yaml\ntask: gone\n")
    expect_ok(command("eval/fewshot.py", "--run", run_dir, *flags, "--tasks", "gone,where"))
    assert "Missing" not in expect_ok(command("eval/tables.py", run_dir, "--what", "fewshot"))


# LogiQA and LogiQA 2.0, in the formats of their authors' files

LOGIQA = """
{label}
Tom is {id}.He has a dog.
Which is true?
A.Tom has a cat.So it is.
B. Tom has a dog.
C.None.
D.All
"""
LOGIQA2 = {
    "id": 7,
    "answer": 2,
    "text": " Ann sings. ",
    "type": {"Categorical reasoning": True},
    "question": "What follows?\n",
    "options": ["She does.", " She does not.", "Both.", "3.5 of it."],
}


@pytest.fixture
def authors_files(tmp_path, monkeypatch):
    """Files as the authors have them, in place of those on the internet; the current folder."""
    folder = tmp_path / "authors"
    folder.mkdir()
    for name in ("Train", "Eval", "Test"):
        blocks = [LOGIQA.format(label=label, id=f"{name} {label}") for label in "cbd"]
        (folder / f"{name}.txt").write_text("".join(blocks), newline="\r\n")
    for name in ("train", "dev", "test"):
        lines = [json.dumps({**LOGIQA2, "id": i}) for i in range(4)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    for name, source in fetch_tasks.SOURCES.items():
        local = source._replace(url=f"{folder.as_uri()}/")
        monkeypatch.setitem(fetch_tasks.SOURCES, name, local)
    monkeypatch.chdir(tmp_path)
    return folder


def test_converted_data_gives_the_prompts_of_the_harness(authors_files):
    for name in fetch_tasks.SOURCES:
        fetch_tasks.convert(name, fetch_tasks.FOLDER)
    loaded = harness.open_tasks(["logiqa", "logiqa2"], None).load(["logiqa", "logiqa2"])["tasks"]
    task = loaded["logiqa"]
    docs = list(task.eval_docs)
    assert [len(list(task.training_docs())), len(list(task.validation_docs())), len(docs)] == [
        3
    ] * 3
    assert task.doc_to_text(docs[1]) == (
        "Passage: Tom is Test b. He has a dog.\nQuestion: Which is true?\nChoices:\n"
        "A. Tom has a cat. So it is.\nB. Tom has a dog.\nC. None.\nD. All\nAnswer:"
    )
    assert [task.doc_to_target(doc) for doc in docs] == [2, 1, 3]
    assert task.doc_to_choice(docs[0])[3] == "All"
    task = loaded["logiqa2"]
    doc = list(task.eval_docs)[2]
    assert task.doc_to_text(doc) == (
        "Passage: Ann sings.\nQuestion: What follows?\n"
        "A. She does.\nB. She does not.\nC. Both.\nD. 3.5 of it.\nAnswer:"
    )
    assert int(task.doc_to_target(doc)) == 2 and len(task.doc_to_choice(doc)) == 4


def test_our_tasks_are_those_of_the_harness_but_for_the_data():
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    for name in fetch_tasks.SOURCES:
        theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / name / f"{name}.yaml")
        ours = load_yaml(harness.OWN_TASKS / f"{name}.yaml")
        for task in (theirs, ours):
            for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
                task.pop(key, None)
        for key in theirs.keys() | ours.keys():
            a, b = theirs[key], ours[key]
            if callable(a):  # the same function, perhaps of a module that is loaded twice
                a, b = ((f.__name__, f.__code__.co_code, f.__code__.co_consts) for f in (a, b))
            assert a == b, key


def fetch(monkeypatch, capsys, tasks):
    """Exit code and output of scripts/fetch_tasks.py."""
    monkeypatch.setattr("sys.argv", ["scripts/fetch_tasks.py", "--tasks", tasks])
    code = 0
    try:
        cli.run(fetch_tasks.main)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_a_line_per_task_that_is_fetched(authors_files, harness_index, monkeypatch, capsys):
    code, said = fetch(monkeypatch, capsys, "logiqa,sciq,logiqa2")
    first, second, third, last = said.out.splitlines()
    assert code == 1 and last.startswith("1 of 3 tasks failed")
    assert first == "logiqa: ok, 3 documents" and third == "logiqa2: ok, 4 documents"
    assert second.startswith("sciq: failed: its data is not in the cache and cannot be downloaded")
    shutil.rmtree(authors_files)  # what is there is not fetched again
    assert fetch(monkeypatch, capsys, "logiqa,logiqa2")[0] == 0
    code, said = fetch(monkeypatch, capsys, "logiqq")
    assert code == 2 and "logiqq" in said.err and "'logiqa'" in said.err


@pytest.mark.parametrize("name, file", [("logiqa", "Eval.txt"), ("logiqa2", "dev.txt")])
def test_a_page_in_place_of_questions_is_refused(
    authors_files, harness_index, monkeypatch, capsys, name, file
):
    (authors_files / file).write_text("<html>\n<body>\nSign in\n</body>\n</html>")
    code, said = fetch(monkeypatch, capsys, name)
    assert code == 1 and said.out.startswith(f"{name}: failed: ")
    assert "1 of its file is not a question: '<html>" in said.out
    assert not (Path("data/tasks") / name / "validation.jsonl").exists()
    code, said = fetch(monkeypatch, capsys, name)  # nothing half-done passes as done
    assert code == 1
