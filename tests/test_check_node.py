"""scripts/check_node.sh: all stages at tiny shapes, and what becomes of those that go wrong."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, expect_error, expect_ok, free_port
from ranks import Ranks

from scripts import check_node
from scripts.check_node import FAIL, NOT_HERE, PASS, Computed, NotHere, Stage

# In place of the stages' own file: what goes wrong, without torch where it can be.
STAND_IN = """
import json, os, sys, time
name, path = sys.argv[1:]
with open({started!r}, "a") as file:
    print(name, os.getpid(), file=file, flush=True)
if name == "float32" and not {healed}:
    sys.path.insert(0, {root!r})
    from scripts import check_node
    check_node.FLOAT32 = -1.0
    check_node.main()
elif name == "memory" and not {healed}:
    os.kill(os.getpid(), 9)
elif name == "resume" and not {healed}:
    raise ValueError("what is wrong")
elif name == "trace" and not {healed}:
    time.sleep(100)
else:
    json.dump([["check", "pass", "result", {{}}]], open(path, "w"))
"""


def forked(command: list[str], settings: check_node.Settings, name: str, limit_s: float) -> int:
    """check_node.run_process by tests/ranks.py, whose processes have imported torch already."""
    variables = {
        "CHECK": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_CACHE_DIR": str(settings.out / "compiled"),
    }
    n = 2 if "torch.distributed.run" in command else 1
    log = settings.out / f"{name}.log"
    patch = f"os.environ.update({variables})"
    return Ranks(n, command[-3:], free_port(), log, patch=patch).wait_as_torchrun(limit_s)


@pytest.fixture(scope="module")
def all_stages(tmp_path_factory):
    """The folder of a whole run of the script, and what it printed."""
    out = tmp_path_factory.mktemp("node") / "out"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as text:
        patch.setattr(check_node, "run_process", forked)
        assert start(patch, out) == 0, text.getvalue()
    return out, text.getvalue()


def verdicts(report: dict) -> list[str]:
    return [line["verdict"] for stage in report["stages"].values() for line in stage["lines"]]


def test_the_script_itself(tmp_path):
    """As a user starts it, and with torchrun."""
    env = {"VIRTUAL_ENV": sys.prefix, "CHECK": "cpu", "OUT": str(tmp_path), "STAGES": "network"}
    done = subprocess.run(
        ["bash", "scripts/check_node.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | env | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert (tmp_path / "report.md").read_text() in expect_ok(done)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["stages"]) == ["network"] and verdicts(report) == [PASS]


def test_every_stage_passes_at_tiny_shapes(all_stages):
    out, text = all_stages
    report = json.loads((out / "report.json").read_text())
    assert list(report["stages"]) == list(check_node.stages(on_cpu=True))
    assert set(verdicts(report)) == {PASS}
    table = (out / "report.md").read_text()
    assert table in text
    assert f"torch {torch.__version__}" in table.splitlines()[0]
    assert f"CHECK=cpu OUT={out} bash scripts/check_node.sh" in table
    for name, result in report["stages"].items():
        for line in result["lines"]:
            assert f"| {name} | {line['check']} | pass | {line['result']} |" in table


def test_what_the_stages_measure(all_stages):
    out, _ = all_stages
    stages = json.loads((out / "report.json").read_text())["stages"]
    speed, cost = stages["step"]["lines"]
    assert "tokens/s" in speed["result"] and "MFU" in speed["result"]
    assert len(cost["numbers"]["quartiles"]) == 3
    ddp, fsdp = stages["layouts"]["lines"]
    assert "ddp on 2" in ddp["check"] and "fsdp on 2" in fsdp["check"]
    compiled, chunked = (line["numbers"] for line in stages["compile"]["lines"])
    # bfloat16 was really used, the code compiled, and the chunks cut.
    assert compiled["plain_gradient"] > check_node.FLOAT32
    assert compiled["gradient"] != compiled["plain_gradient"]
    assert chunked["gradient"] != chunked["plain_gradient"]
    with gzip.open(out / "trace.json.gz") as file:
        named = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"forward", "backward", "optimizer"} <= named


def test_a_second_start_of_a_whole_run_starts_nothing(all_stages, monkeypatch, capsys):
    out, _ = all_stages
    monkeypatch.setattr(check_node, "run_process", None)
    before = (out / "report.json").read_text()
    assert start(monkeypatch, out) == 0
    assert (out / "report.json").read_text() == before
    assert "==" not in capsys.readouterr().out


def start(monkeypatch, out, **settings) -> int:
    """The exit code of the script's main function, in this process."""
    for name, value in {"CHECK": "cpu", "OUT": out, **settings}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["check_node.py"])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        check_node.main()
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    return 0


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(healed) puts STAND_IN in the stages' place; started() lists what was started."""
    started = tmp_path / "started"
    path = tmp_path / "stand_in.py"
    monkeypatch.setattr(check_node, "SCRIPT", path)
    trace = check_node.CHECKS["trace"]._replace(limit_s=1)
    monkeypatch.setitem(check_node.CHECKS, "trace", trace)

    def put(healed: bool) -> None:
        started.write_text("")
        path.write_text(STAND_IN.format(started=str(started), healed=healed, root=str(ROOT)))

    put.started = lambda: [line.split()[0] for line in started.read_text().splitlines()]
    put.process = lambda: int(started.read_text().split()[1])
    put(False)
    return put


def lines_of(out) -> dict[str, tuple[str, str]]:
    """Stage -> verdict and result of its last line."""
    stages = json.loads((out / "report.json").read_text())["stages"]
    last = {name: result["lines"][-1] for name, result in stages.items()}
    return {name: (line["verdict"], line["result"]) for name, line in last.items()}


def test_a_stage_that_goes_wrong_fails_alone_and_only_the_missing_ones_run_again(
    tmp_path, monkeypatch, stand_in
):
    out = tmp_path / "out"
    picked = ["memory", "float32", "resume", "graphs", "trace"]
    assert start(monkeypatch, out, STAGES=",".join(picked)) == 1
    assert stand_in.started() == picked
    lines = lines_of(out)
    assert [lines[name][0] for name in picked] == [FAIL, FAIL, FAIL, PASS, FAIL]
    assert "signal 9" in lines["memory"][1]
    assert "(limit -1e+00)" in lines["float32"][1]
    assert lines["resume"][1].startswith(f"ValueError: what is wrong; see {out}/resume.log")
    assert "no end after 1 s" in lines["trace"][1]
    table = (out / "report.md").read_text()
    assert "1 pass, 4 fail, 0 not here" in table and f"| fail | {lines['trace'][1]} |" in table

    stand_in(True)
    assert start(monkeypatch, out, STAGES="") == 1  # float32 came to a verdict, which stays
    missing = [name for name in check_node.stages(True) if name not in ("float32", "graphs")]
    # torchrun starts its stages twice, and the stand-in does not join it.
    assert sorted(set(stand_in.started())) == sorted(missing)
    verdicts = {name: verdict for name, (verdict, _) in lines_of(out).items()}
    assert verdicts == dict.fromkeys(check_node.stages(True), PASS) | {"float32": FAIL}


def test_what_the_budget_does_not_hold_is_not_here(tmp_path, monkeypatch, stand_in):
    trace = check_node.CHECKS["trace"]._replace(limit_s=3)
    monkeypatch.setitem(check_node.CHECKS, "trace", trace)
    assert start(monkeypatch, tmp_path / "out", STAGES="graphs,trace", BUDGET_S=2) == 0
    assert stand_in.started() == ["trace"]  # graphs may take longer than that
    lines = lines_of(tmp_path / "out")
    assert lines["graphs"] == (NOT_HERE, "time: 2 s of BUDGET_S left")
    assert lines["trace"] == (NOT_HERE, "time: stopped when BUDGET_S was used up")
    stand_in(True)
    assert start(monkeypatch, tmp_path / "out", STAGES="trace", BUDGET_S=520) == 0
    assert stand_in.started() == ["trace"]
    assert [verdict for verdict, _ in lines_of(tmp_path / "out").values()] == [NOT_HERE, PASS]


def test_stages_of_several_ranks_are_not_here_with_one_gpu(tmp_path):
    settings = check_node.Settings(False, {}, 520, tmp_path)
    machine = {"cards": ["NVIDIA H100 80GB HBM3"]}
    result = check_node.attempt(
        "network", check_node.CHECKS["network"], settings, machine, time.monotonic() + 520
    )
    assert [(line["verdict"], line["result"]) for line in result["lines"]] == [
        (NOT_HERE, "one GPU")
    ]


def test_what_lacks_memory_is_not_here(monkeypatch):
    gpt = check_node.shape_of(check_node.ON_GPU, "124m", 512)
    monkeypatch.setattr(check_node.memory, "device_bytes", lambda device: 80e9)
    assert check_node.micro_batch(gpt, 32, torch.device("cuda")) == 32
    xl = check_node.shape_of(check_node.ON_GPU, "1.5b", 512)
    assert check_node.micro_batch(xl, 48, torch.device("cuda")) in (8, 12, 16, 24)
    monkeypatch.setattr(check_node.memory, "device_bytes", lambda device: 16e9)
    with pytest.raises(NotHere, match="1 x 512 needs .* GB"):
        check_node.micro_batch(xl, 48, torch.device("cuda"))


def test_a_stop_ends_the_stage_too(tmp_path, monkeypatch, stand_in):
    code = (
        "from scripts import check_node; from pathlib import Path; "
        f"check_node.SCRIPT = Path({str(check_node.SCRIPT)!r}); check_node.run(check_node.main)"
    )
    env = {**os.environ, "CHECK": "cpu", "OUT": str(tmp_path / "out"), "STAGES": "trace"}
    script = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env)
    deadline = time.monotonic() + 60
    while not stand_in.started():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    script.send_signal(signal.SIGTERM)
    assert script.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(stand_in.process(), 0)


def computed(losses=(2.0, 3.0), weights=(0.5, 0.5), gradient=(3.0, 4.0)) -> Computed:
    return Computed(torch.tensor(losses), torch.tensor(weights), torch.tensor(gradient))


EXACT = computed()
PLAIN = computed(gradient=(3.0, 4.05))  # 0.01 of the norm away
STEPS = torch.tensor([[2.0, 3.0]]), torch.tensor([5.0])
RUN = {"metrics": torch.tensor([1.0]), "weights": torch.tensor([2.0])}


@pytest.mark.parametrize(
    "line, verdict",
    [
        (check_node.judge_cost((1.009, 1.02, 1.03), 1.01), PASS),
        (check_node.judge_cost((1.011, 1.02, 1.03), 1.01), FAIL),
        (check_node.judge_cost((math.nan, 1.0, 1.0), 1.01), FAIL),
        (check_node.judge_float32("", computed(gradient=(3.0, 4.0004)), EXACT), PASS),
        (check_node.judge_float32("", computed(gradient=(3.0, 4.0006)), EXACT), FAIL),
        (check_node.judge_float32("", computed(gradient=(3.0, math.nan)), EXACT), FAIL),
        (check_node.judge_float32("", computed(losses=(2.0, 3.001)), EXACT), FAIL),
        (check_node.judge_float32("", computed(weights=(0.5, 0.501)), EXACT), FAIL),
        (check_node.judge_bfloat16("", computed(gradient=(3.07, 4.0)), PLAIN, EXACT), PASS),
        (check_node.judge_bfloat16("", computed(gradient=(3.08, 4.0)), PLAIN, EXACT), FAIL),
        (check_node.judge_bfloat16("", computed(losses=(2.0, 3.0007)), PLAIN, EXACT), PASS),
        (check_node.judge_bfloat16("", computed(losses=(2.0, 3.0008)), PLAIN, EXACT), FAIL),
        (check_node.judge_bfloat16("", computed(losses=(2.0, math.nan)), PLAIN, EXACT), FAIL),
        (check_node.judge_memory("", 1.09, 1.0), PASS),
        (check_node.judge_memory("", 0.91, 1.0), PASS),
        (check_node.judge_memory("", 0.89, 1.0), FAIL),
        (check_node.judge_memory("", 1.11, 1.0), FAIL),
        (check_node.judge_resume([RUN, RUN, RUN]), PASS),
        (check_node.judge_resume([RUN, RUN, RUN | {"weights": torch.tensor([2.0001])}]), FAIL),
        (check_node.judge_resume([RUN, RUN | {"metrics": torch.tensor([1.0001])}, RUN]), FAIL),
        (check_node.judge_steps("", STEPS, STEPS, (0.9, 2.0, 3.0)), PASS),
        (check_node.judge_steps("", STEPS, (STEPS[0], 1.1 * STEPS[1]), (1, 1, 1)), FAIL),
        (check_node.judge_steps("", STEPS, (1.1 * STEPS[0], STEPS[1]), (1, 1, 1)), FAIL),
    ],
)
def test_verdicts(line, verdict):
    assert line.verdict == verdict


@pytest.mark.parametrize(
    "log, reason",
    [
        ("Traceback\ntorch.OutOfMemoryError: CUDA out\n", "torch.OutOfMemoryError: CUDA out"),
        ("[rank1]: ValueError: a\nChildFailedError: b\n", "ValueError: a"),
        ("error: --sizes x\n", "error: --sizes x"),
        ("UserWarning: no error\n", "exit code 3"),
    ],
)
def test_the_reason_of_a_failure(tmp_path, log, reason):
    (tmp_path / "log").write_text(log)
    assert check_node.why(3, tmp_path / "log") == reason


def test_a_name_picks_its_stages():
    known = check_node.stages(on_cpu=False)
    assert list(check_node.pick(known, "")) == list(known)
    assert list(check_node.pick(known, "memory, step")) == ["step", "memory"]
    assert list(check_node.pick(known, "speed_1.5b")) == ["speed_1.5b", "speed_1.5b_large"]
    assert len(check_node.pick(known, "speed")) == 7
    assert all(isinstance(stage, Stage) for stage in known.values())


@pytest.mark.parametrize(
    "settings, arguments, words",
    [
        ({"CHECK": "gpu"}, [], ["CHECK=gpu", "cpu"]),
        ({"CHECK": ""}, [], ["no GPU", "CHECK=cpu"]),
        ({"BUDGET_S": "0"}, [], ["BUDGET_S=0", "520"]),
        ({"BUDGET_S": "1e3"}, [], ["BUDGET_S=1e3"]),
        ({"STAGES": "trian"}, [], ["'trian'", "versions, step"]),
        ({"STAGES": "comple"}, [], ["did you mean 'compile'"]),
        ({}, ["cpu"], ["cpu", "--help"]),
    ],
)
def test_wrong_settings(monkeypatch, tmp_path, settings, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"CHECK": "cpu", "OUT": str(tmp_path), **settings}.items():
        monkeypatch.setenv(name, value)
    expect_error(command("scripts/check_node.py", *arguments), *words)


def test_results_of_another_machine_are_not_mixed_in(monkeypatch, tmp_path, stand_in):
    stand_in(True)
    assert start(monkeypatch, tmp_path / "out", STAGES="graphs") == 0
    path = tmp_path / "out" / "graphs.json"
    result = json.loads(path.read_text())
    result["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(result))
    expect_error(command("scripts/check_node.py"), str(path), "torch 1.0", "OUT=")


def test_help_is_the_scripts_header():
    text = expect_ok(command("scripts/check_node.py", "--help"))
    for word in ("CHECK=cpu", "STAGES=", "BUDGET_S=", "OUT="):
        assert word in text
