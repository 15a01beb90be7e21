"""Compiles a model's step for an H100 on a machine without a GPU, and prints what came of it.

    python tests/gpu_compiler.py '[{"n_layer": 2, "n_head": 12, "n_embd": 768}, {"loss_chunk": 64}]'

Each argument has a shape and attributes of the model, and may end with false: then its kernels are
counted but not compiled. The model is traced on the CPU, without values; each graph is then moved
to "cuda" and given to Inductor, which writes code for sm_90, and Triton compiles its kernels.
Nothing is run. Prints JSON: for each argument a list of graphs, with kind, number of Triton kernels
that are launched, other operators that are called, and the size of each kernel's binary.
"""

import contextlib
import copy
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
import torch._inductor.inductor_prims
import torch._inductor.scheduler
import torch._inductor.utils
import torch.utils._triton
import triton
from torch._dynamo import device_interface
from torch._guards import detect_fake_mode
from torch._inductor import async_compile, codecache, config
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llama
import model
from families import build, shape_from
from step import GPU_COMPILER

# A device guard for cuda that does nothing: autograd asks for one, and a build of torch without
# CUDA has none.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""
attend = model.attend
lookup_seed = torch.ops.prims.inductor_lookup_seed
TARGET = GPUTarget("cuda", 90, 32)
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=85 * 10**9,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


class NoGpu(device_interface.CudaInterface):
    """What Inductor asks of cuda, answered without a GPU."""

    get_device_properties = staticmethod(lambda device=None: H100)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_available = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda *args, **kwargs: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_raw_stream = staticmethod(lambda index: 0)
    synchronize = staticmethod(lambda device=None: None)
    device = staticmethod(lambda index: contextlib.nullcontext())

    class Worker:
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: H100)


class Driver:
    """What Triton asks of its driver."""

    get_current_target = staticmethod(lambda: TARGET)
    get_current_device = staticmethod(lambda: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
    get_device_interface = staticmethod(lambda: torch.cuda)


def flash(q, k, v, mask=None, dropout=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What scaled_dot_product_attention becomes on a GPU in bfloat16; on a CPU torch takes another.

    Where it could not be fused, it stays what it is, and the test sees it.
    """
    fits = q.dtype == torch.bfloat16 and mask is None and q.size(-1) % 8 == 0
    assert fits, "no fused attention for these queries"
    if enable_gqa:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    return operator(q, k, v, dropout, is_causal, False, scale=scale)[0]


def seed_without_device(seeds, index):
    """The rule for the shape of a seed of dropout."""
    return torch.empty((), dtype=torch.int64, device=seeds.device)


@contextlib.contextmanager
def as_on_an_h100():
    """Inside, Inductor and Triton find an H100."""
    device_interface.init_device_reg()
    interfaces = {"cuda": NoGpu, "cuda:0": NoGpu}
    settings = {
        "compile_threads": 1,
        "fx_graph_cache": False,
        "fx_graph_remote_cache": False,
        "worker_start_method": "subprocess",
        **GPU_COMPILER,
    }
    no_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(  # noqa: E731
            mock.patch.object(owner, name, value, create=True)
        )
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        stack.enter_context(config.patch(settings))
        stack.enter_context(no_cache)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        patch(torch.cuda, "get_device_properties", lambda device=None: H100)
        patch(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch(torch.cuda, "current_device", lambda: 0)
        patch(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
        for module in (torch.utils._triton, torch._inductor.utils, torch._inductor.scheduler):
            patch(module, "has_triton", lambda *args, **kwargs: True)
        patch(triton_helpers, "set_driver_to_gpu", lambda: None)
        patch(triton.runtime.driver, "_active", Driver())
        patch(torch.nn.functional, "scaled_dot_product_attention", flash)
        for module in (model, llama):  # which pad a head's numbers where they are on cuda
            patch(module, "attend", lambda *inputs, **how: attend(*inputs, **how | {"multiple": 8}))
        for seed in (lookup_seed, lookup_seed.default):  # its own rule asks for a real device
            patch(seed, "prim_meta_impl", seed_without_device)
        yield


class Compiler:
    """A backend of torch.compile that notes what Inductor makes of each graph for an H100."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=self.compile)

    def compile(self, graph, inputs, **how):
        moved = copy.deepcopy(graph)
        kernels, sources = {}, []

        def keep_kernel(self, name, source, device_str="cuda"):
            kernels[name] = source
            return SimpleNamespace(run=None)

        def keep_source(cls, key, path, *args, **kwargs):
            sources.append(Path(path).read_text())
            return load(cls, key, path, *args, **kwargs)

        load = codecache.PyCodeCache.load_by_key_path.__func__
        with (
            mock.patch.object(async_compile.AsyncCompile, "triton", keep_kernel),
            mock.patch.object(codecache.PyCodeCache, "load_by_key_path", classmethod(keep_source)),
        ):
            compile_fx.compile_fx_inner(moved, to_cuda(moved, inputs), **how)
        kind = "backward" if how.get("is_backward") else "forward"
        self.graphs.append({"kind": kind, **calls(sources[-1]), "kernels": kernels})

        def run(args):  # on the CPU, without values: only the shapes matter from here on
            return graph(*args)

        run._boxed_call = True
        return run


def to_cuda(graph, inputs):
    """Move a traced graph to cuda, in place, and give its inputs there."""
    cuda = torch.device("cuda", 0)

    def moved(value):
        return cuda if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args, node.kwargs = tree_map(moved, node.args), tree_map(moved, dict(node.kwargs))
    graph.recompile()
    mode = detect_fake_mode(inputs)
    with mode:
        there = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=cuda)
            if isinstance(x, torch.Tensor)
            else x
            for x in inputs
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*there)
    return there


def calls(source: str) -> dict:
    """What the code of a graph launches: its Triton kernels, and other operators by name."""
    body = source.split("def call(", 1)[-1]
    triton_calls = re.findall(r"^\s+triton_\w+\.run\(", body, re.MULTILINE)
    others = r"^\s+(?:\w+ = )?(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\("
    return {"triton": len(triton_calls), "others": re.findall(others, body, re.MULTILINE)}


def binary_size(name: str, source: str) -> int:
    """Compile a kernel for sm_90 -> bytes of the binary."""
    kernel = getattr(codecache.PyCodeCache.load(source), name)
    first, meta = kernel.configs[0], kernel.triton_meta
    constants = {**meta["constants"], **first.kwargs}
    signature = dict(meta["signature"])
    for argument in kernel.fn.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
    places = {}
    for argument, value in constants.items():
        place = (kernel.fn.arg_names.index(argument),) if isinstance(argument, str) else argument
        places[place] = value
    attributes = meta["configs"][0]
    if not isinstance(attributes, dict):
        attributes = {}
    options = {"num_warps": first.num_warps, "num_stages": first.num_stages}
    ast = ASTSource(kernel.fn, signature, places, attributes)
    return len(triton.compile(ast, target=TARGET, options=options).asm["cubin"])


def load_guard() -> None:
    folder = Path(tempfile.mkdtemp())
    source, library, torch_folder = folder / "guard.cpp", folder / "guard.so", Path(torch.__file__)
    source.write_text(GUARD)
    torch_folder = Path(torch.__file__).parent
    flags = ["-shared", "-fPIC", "-std=c++17", f"-I{torch_folder}/include"]
    link = [f"-L{torch_folder}/lib", "-lc10"]
    subprocess.run(["g++", *flags, source, "-o", library, *link], check=True)
    ctypes.CDLL(str(library))


def compiled(shape: dict, attributes: dict, with_kernels: bool = True) -> list[dict]:
    """The graphs of a step on 8 sequences: the sample losses and their gradients."""
    torch._dynamo.reset()
    compiler = Compiler()
    with as_on_an_h100():
        with FakeTensorMode():
            net = build(shape_from(shape))
            for name, value in attributes.items():
                setattr(net, name, value)
            net.compile(backend=compiler, fullgraph=net.loss_chunk == 0)
            tokens = torch.zeros(8, net.config.block_size, dtype=torch.long)
            with torch.autocast("cpu", torch.bfloat16):
                losses = net(tokens, tokens).mean(1)
            (losses.detach() * losses).sum().backward()
        for graph in compiler.graphs:
            kernels = graph["kernels"] if with_kernels else {}
            graph["kernels"] = {name: binary_size(name, kernels[name]) for name in kernels}
    return compiler.graphs


if __name__ == "__main__":
    load_guard()
    print(json.dumps([compiled(*json.loads(argument)) for argument in sys.argv[1:]]))
