"""Generation with the key-value cache against a loop without one, and eval/sample.py."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import command, expect_error, expect_ok

from corpus import tokenizer
from eval.generate import generate
from eval.sample import sampler
from families import build
from llama import LlamaConfig
from model import GPT, GPTConfig
from runtime import checkpoint

SHAPE = GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=48, vocab_size=320)
LLAMA = LlamaConfig(3, 4, 64, n_kv_head=2, n_ffn=160, block_size=48, vocab_size=320)
V = 257


@pytest.fixture(scope="module", params=[SHAPE, LLAMA], ids=["gpt2", "llama"])
def model(request):
    """Random weights, with padding rows that would win.

    In double precision, so that no two logits are nearly equal.
    """
    torch.manual_seed(0)
    model = build(request.param).double().eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1 if name.endswith("bias") else 0.5)
    torch.nn.init.normal_(model.head[V:], std=2)
    torch.nn.init.zeros_(model.head[V - 1])  # no text ends soon
    return model


def prompts(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model, prompt, n):
    """n greedy tokens after a prompt, each from a forward pass over all before it."""
    row = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            row.append(model(torch.tensor([row]))[0, -1, :V].argmax().item())
    return row[len(prompt) :]


def test_prompts_of_any_lengths_go_on_as_alone(model):
    rows = prompts(1, 5, 17, 17, 30)
    assert generate(model, rows, 19, V) == [
        one_by_one(model, row, 19) for row in rows
    ]  # 30 + 19 - 1 = 48 positions
    assert len({tuple(new) for new in generate(model, rows, 19, V)}) == 5


def test_a_prompt_ends_where_it_is_finished(model):
    rows = prompts(3, 9, 14)
    whole = generate(model, rows, 19, V)
    ends = {new[i] for new, i in zip(whole, (0, 4, 11), strict=True)}
    until = [next(i for i, token in enumerate(new) if token in ends) + 1 for new in whole]
    found = generate(model, rows, 19, V, finished=lambda new: new[-1] in ends)
    assert found == [new[:n] for new, n in zip(whole, until, strict=True)] and len(set(until)) > 1


def test_beyond_the_context_it_goes_on_from_the_second_half(model):
    long, short = prompts(100, 4)
    new = generate(model, [long], 10, V)[0]
    assert new == one_by_one(
        model, long[-39:], 10
    )  # the last of the ten needs none of the 48 positions
    new = generate(model, [short], 100, V)[0]
    assert len(new) == 100 and new[:45] == one_by_one(model, short, 45)  # 4 + 45 - 1 positions
    row = short + new[:45]
    assert new[45:69] == one_by_one(model, row[-25:], 24)


def test_the_forward_pass_without_a_cache_is_one_graph():
    model = GPT(replace(SHAPE, n_layer=2)).train()
    x = torch.randint(0, V, (2, 12))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x), model(x, x))


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4)
    pick = sampler(0.5, 3, torch.Generator().manual_seed(0))
    expected = torch.softmax(torch.tensor([4.0, 2.0, 0.0]), 0)
    shares = pick(logits).bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares[:3], expected, atol=0.01, rtol=0)
    assert shares[3] == 0
    assert (sampler(0.0, 0, torch.Generator())(logits) == 0).all()
    assert sampler(9.0, 0, torch.Generator().manual_seed(0))(logits).unique().tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.fixture
def run_dir(tmp_path, model):
    """A run whose model writes bytes that are no UTF-8."""
    checkpoint.save(
        tmp_path,
        5,
        (model.float().state_dict(), {}),
        {"gpt": asdict(model.config), "tokenizer_sha256": tokenizer.load("bytes").sha256},
        1,
    )
    model.double()
    return tmp_path


def sample(run_dir, *flags):
    return command("eval/sample.py", "--run", run_dir, *flags)


def test_continuations_are_printed(run_dir):
    flags = ("--prompt", "The king", "--max_tokens", 30, "--n", 3)
    shown = expect_ok(sample(run_dir, *flags))
    assert [line for line in shown.splitlines() if line.startswith("== ")] == [
        f"== {i} of 3" for i in (1, 2, 3)
    ]
    assert "�" in shown and len(set(shown.split("== ")[1:])) == 3
    assert (
        shown
        == expect_ok(sample(run_dir, *flags))
        != expect_ok(sample(run_dir, *flags, "--seed", 1))
    )
    greedy = expect_ok(
        sample(run_dir, "--prompt", "é" * 60, "--max_tokens", 60, "--temperature", 0, "--n", 2)
    )
    first, second = (text.split("\n", 1)[1] for text in greedy.split("== ")[1:])
    assert first == second
    expect_ok(sample(run_dir))  # no prompt: the start of a document


def test_greedy_text_is_that_of_the_model(run_dir, model):
    prompt = tokenizer.load("bytes").encode_to_numpy("The king").tolist()
    new = one_by_one(model.float(), prompt, 12)
    model.double()
    shown = expect_ok(
        sample(run_dir, "--prompt", "The king", "--temperature", 0, "--max_tokens", 12)
    )
    assert 256 not in new and shown == f"== 1 of 1\n{tokenizer.load('bytes').decode(new)}\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--run", "required"]),
        (["--run", "nowhere"], ["nowhere", "no checkpoint"]),
        (["--run", "RUN", "--max_tokens", "0"], ["--max_tokens 0", "1 or more"]),
        (["--run", "RUN", "--n", "0"], ["--n 0", "1 or more"]),
        (["--run", "RUN", "--temperature", "-1"], ["--temperature", "0 or more"]),
        (["--run", "RUN", "--temperature", "nan"], ["--temperature", "0 or more"]),
        (["--run", "RUN", "--temperature", "warm"], ["warm", "float"]),
        (["--run", "RUN", "--top_k", "-2"], ["--top_k -2", "0 or more"]),
        (["--run", "RUN", "--seed", "-1"], ["--seed -1", "0 or more"]),
        (["--run", "RUN", "--promt", "x"], ["--promt", "did you mean '--prompt'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_flags_are_told_in_one_line(run_dir, flags, words):
    expect_error(
        command("eval/sample.py", *(str(run_dir) if flag == "RUN" else flag for flag in flags)),
        *words,
    )


def test_damaged_runs_are_told_in_one_line(run_dir):
    weights, state = (checkpoint.find_latest(run_dir) / name for name in ("model.pt", "state.json"))
    model = torch.load(weights)
    content = json.loads(state.read_text())
    checkpoint.save(
        run_dir, 5, ({**model, "ln_f.weight": model["ln_f.weight"] * float("nan")}, {}), content, 1
    )
    expect_error(sample(run_dir), "diverged")
    state.write_text(json.dumps({**content, "tokenizer_sha256": "of another"}))
    expect_error(sample(run_dir), "tokenizer", "gpt2, bytes")
