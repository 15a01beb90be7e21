"""Our GPT-2 against transformers', on the same random weights; what holds for every family."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from families import SIZES, build
from llama import LlamaConfig
from model import ATTENTION, GPT, Cache, GPTConfig, attend, token_losses

SMALL = GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=48, vocab_size=211)
LLAMA = LlamaConfig(
    n_layer=3, n_head=4, n_embd=64, n_kv_head=2, n_ffn=160, block_size=48, vocab_size=211
)
FAMILIES = {"gpt2": SMALL, "llama": LLAMA, "llama, tied": replace(LLAMA, tied=True)}
families = pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
PARAMETERS = {
    "tiny": 7_357_312,
    "124m": 124_439_808,
    "210m": 209_494_272,
    "355m": 354_823_168,
    "684m": 684_181_200,
    "774m": 774_030_080,
    "1.5b": 1_557_611_200,
    "llama_tiny": 9_045_120,
    "llama_1b": 1_235_814_400,
    "llama_1.4b": 1_364_297_728,
    "llama_7b": 6_738_415_616,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=211, n_positions=48, n_embd=64, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():  # also biases and LayerNorm, which start as constants
        torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, folder


def test_logits_and_losses_equal_transformers(reference):
    theirs, folder = reference
    ours = GPT.from_pretrained(str(folder)).eval()
    assert ours.config == SMALL
    idx = torch.randint(0, 211, (5, 49), generator=torch.Generator().manual_seed(1))
    x, y = idx[:, :-1], idx[:, 1:]
    with torch.no_grad():
        expected = theirs(x).logits
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=0)
        losses = torch.nn.functional.cross_entropy(expected.transpose(1, 2), y, reduction="none")
        torch.testing.assert_close(ours(x, y), losses, atol=1e-4, rtol=0)
        assert ours(x, y).shape == (5, 48) and ours(x, y).dtype == torch.float32


def test_gradients_equal_transformers(reference):
    theirs, folder = reference
    ours = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(0, 211, (2, 20), generator=torch.Generator().manual_seed(2))
    theirs.zero_grad()
    theirs(idx, labels=idx).loss.backward()
    ours(idx[:, :-1], idx[:, 1:]).mean().backward()
    expected = theirs.transformer.h[1].attn.c_attn.weight.grad.T
    torch.testing.assert_close(ours.h[1].attn.c_attn.weight.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    with torch.device("meta"):
        assert build(SIZES[name]).n_parameters() == PARAMETERS[name]


@families
def test_biases_start_at_0_and_gains_at_1(shape):
    for name, parameter in build(shape).named_parameters():
        if parameter.dim() == 1:
            expected = 1 if name.endswith("weight") else 0
            assert (parameter == expected).all(), name


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(replace(SMALL, n_embd=128, vocab_size=1000))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in model.h:
        for part in (block.attn, block.mlp):
            assert part.c_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
        assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.h[0].ln_1.weight == 1).all() and (model.h[0].mlp.c_fc.bias == 0).all()


@families
def test_a_token_sees_only_the_past(shape):
    torch.manual_seed(0)
    model = build(shape).eval()
    a = torch.randint(0, 211, (1, 20))
    b = a.clone()
    b[0, 12:] = (b[0, 12:] + 1) % 211
    torch.testing.assert_close(model(a)[:, :12], model(b)[:, :12])
    assert not torch.allclose(model(a)[:, 12:], model(b)[:, 12:])


def test_dropout_works_in_training_only():
    torch.manual_seed(0)
    model = GPT(replace(SMALL, dropout=0.5))
    x = torch.randint(0, 211, (1, 20))
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def share_of_zeros(x):
    return (x == 0).double().mean().item()


def test_dropout_is_at_gpt2s_four_places():
    """After the embeddings, on the attention's weights, and on what either half of a block adds."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL, dropout=0.3)).train()
    idx = torch.randint(0, 211, (8, 20))
    seen = {}
    model.h[0].register_forward_hook(lambda _, inputs, out: seen.update(embedded=inputs[0]))
    model(idx)
    assert share_of_zeros(seen["embedded"]) == pytest.approx(0.3, abs=0.03)

    block, x = model.h[0], torch.randn(8, 20, SMALL.n_embd)
    with torch.no_grad():
        for part in (block.attn, block.mlp):
            added, kept = part(x), part.eval()(x)
            part.train()
            assert share_of_zeros(added) == pytest.approx(0.3, abs=0.03)
            same = torch.isclose(added, kept / 0.7, rtol=1e-4, atol=1e-7) | (added == 0)
            # What is kept of the MLP is scaled up; of attention it has noise of its own.
            assert same.all() if part is block.mlp else same.double().mean() < 0.5


def step(dropout=0.0, bf16=False, compiled=False, n_layer=3, shape=SMALL, **ways):
    """Token losses (4, 20) and all gradients of their weighted sum.

    The weights are known only after the forward pass.
    """
    torch.manual_seed(0)
    model = build(replace(shape, dropout=dropout, n_layer=n_layer))
    with torch.no_grad():
        model.wte.weight.mul_(20)  # far from the uniform prediction of a fresh model
    for name, value in ways.items():
        setattr(model, name, value)
    if compiled:
        torch.compiler.reset()  # forward is compiled for so many models only
        model.compile(fullgraph="loss_chunk" not in ways, backend="aot_eager")
    idx = torch.randint(0, 211, (4, 21))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = model(idx[:, :-1], idx[:, 1:])
    (losses.detach().mean(1).softmax(0) * losses.mean(1)).sum().backward()
    return losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@families
@pytest.mark.parametrize("chunk", [1, 7, 40, 79, 80, 1000])
def test_losses_in_chunks_equal_the_plain_head(shape, chunk):
    (losses, gradient), (expected, plain) = step(shape=shape, loss_chunk=chunk), step(shape=shape)
    assert losses.shape == (4, 20) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    assert relative(gradient, plain) < 1e-5


def test_chunks_in_bfloat16_add_up_in_float32():
    """512 chunks are as near to the float32 gradient as the plain head; added up in bfloat16 they
    would not be.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 16, generator=generator), torch.randn(32, 16, generator=generator)
    targets = torch.randint(0, 32, (512,), generator=generator)

    def gradient(chunk, bf16):
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            token_losses(x, leaf, targets, chunk).sum().backward()
        return leaf.grad

    exact = gradient(0, False)
    assert relative(gradient(1, True), exact) < 1.5 * relative(gradient(0, True), exact)
    (losses, whole), (expected, plain) = step(bf16=True, loss_chunk=7), step(bf16=True)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    assert relative(whole, plain) < 2e-3


@pytest.mark.parametrize("shape, dropout", [(SMALL, 0.0), (SMALL, 0.3), (LLAMA, 0.0)])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute, shape, dropout):
    for bf16 in (False, True):
        plain = step(dropout, bf16, shape=shape)
        assert all(map(torch.equal, step(dropout, bf16, shape=shape, recompute=recompute), plain))


@pytest.mark.parametrize("shape", [SMALL, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_compiled_model_is_one_graph_with_the_same_gradients(recompute, shape):
    """But for the head in chunks, which stays out of it."""
    settings = {"n_layer": 1, "shape": shape}
    expected, plain = step(**settings)
    for chunk in ({}, {"loss_chunk": 16}):
        losses, gradient = step(compiled=True, recompute=recompute, **settings, **chunk)
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
        assert relative(gradient, plain) < 1e-5


@pytest.mark.parametrize("chunk", [0, 7])
def test_losses_are_no_view(chunk):
    """FSDP warns of a view: changed in place, it would lose the hook that starts backward."""
    model = GPT(SMALL)
    model.loss_chunk = chunk
    idx = torch.randint(0, 211, (2, 20))
    assert not model(idx, idx)._is_view()


@families
def test_selective_keeps_matrix_products_and_full_does_them_again(shape):
    def flops(**ways):
        with FlopCounterMode(display=False) as counter:
            step(shape=shape, **ways)
        return counter.get_total_flops()

    assert flops(recompute="selective") == flops()
    assert flops(loss_chunk=40) == flops() + 2 * 80 * 211 * 64  # the logits once more
    assert flops(recompute="full") > 1.1 * flops()


class AttentionCalls(TorchDispatchMode):
    """Counts how often a fused attention runs."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in ATTENTION
        return func(*args, **(kwargs or {}))


@families
@pytest.mark.parametrize("recompute, calls", [("none", 3), ("selective", 3), ("full", 6)])
def test_selective_does_attention_without_dropout_once(shape, recompute, calls):
    with AttentionCalls() as counter:
        step(shape=shape, recompute=recompute)
    assert counter.calls == calls  # of three blocks


def test_losses_of_a_model_in_bfloat16_are_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 32, 16, generator=generator).bfloat16().unbind()
    targets = torch.randint(0, 32, (32,), generator=generator)
    losses = token_losses(x, weight, targets, 0)
    logits = torch.nn.functional.linear(x, weight).double()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=0)


@families
def test_the_cache_works_with_recomputation_set(shape):
    torch.manual_seed(0)
    model, idx = build(shape).eval(), torch.randint(0, 211, (2, 20))
    expected = model.hidden(idx)
    model.recompute = "full"
    caches = [Cache(20) for _ in model.h]
    with torch.inference_mode():
        first, mask = model.hidden(idx[:, :19], caches), torch.ones(2, 1, 1, 20, dtype=torch.bool)
        last = model.hidden(idx[:, 19:], caches, torch.full((2, 1), 19), mask)
    torch.testing.assert_close(torch.cat([first, last], 1), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_padded_head_dimension_changes_nothing(masked):
    """Of 50, as the 684M model has: output and gradients."""
    q, k, v = torch.randn(3, 2, 4, 12, 50, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.ones(12, 12, dtype=torch.bool).tril(2) if masked else None

    def attention(multiple):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, mask, 0.0, multiple)
        return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)

    assert attention(8)[0].shape == q.shape
    for padded, plain in zip(attention(8), attention(1), strict=True):
        torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("D, expected", [(50, 56), (64, 64)])
def test_fused_attention_gets_multiples_of_8(monkeypatch, D, expected):
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def noting(q, k, v, *args, **kwargs):
        seen.extend([q.size(-1), k.size(-1), v.size(-1)])
        return fused(q, k, v, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    q, k, v = torch.randn(3, 1, 2, 5, D).unbind()
    assert attend(q, k, v, None, 0.0, 8).shape == q.shape
    assert seen == [expected] * 3
