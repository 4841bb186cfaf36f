"""This package's experts beside those of other libraries, in one run.

python perf/peers.py --workload olmoe --output perf/results/peers

Whatever is installed is measured, the rest is named with the reason. Every participant is given the
same weights, tokens and choice of experts, and is held against the specification in float64 before it
is timed. Turns of ours stand between those of the others, because the speed of a machine drifts; a ratio is
one turn's to the two beside it. docs/performance.md says how to install the others.

Another peer is a subclass of Peer, entered into PEERS.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Libraries have thread pools of their own; NUMBA_NUM_THREADS sets ours, so it sets all of them. Before
# NumPy is imported: its OpenBLAS asks once.
if "NUMBA_NUM_THREADS" in os.environ:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, os.environ["NUMBA_NUM_THREADS"])

# A neighbour of this file has the name of a library, and Python looks beside the script first.
if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))

import numpy as np

# First of our own: it makes moe_numba that of this checkout.
from roofline import add_choices, headline, machine, store, table
from timing import time_calls
from workloads import WORKLOADS, make_inputs, make_layer

import moe_numba
from moe_numba import reference
from moe_numba.config import ACTIVATIONS, DTYPES
from moe_numba.simd.target import has_amx, has_bf16_dot, register_bits

DEFAULT_WORKLOADS = ("olmoe", "qwen3", "mixtral")
TOKENS = (1, 4, 16, 64, 512, 2048)
#: Seconds between two turns, until the last one's threads stop to spin for work (OpenBLAS: 20 ms).
PAUSE = 0.05
#: Largest error, relative to the largest value of the result. bfloat16: tokens, hidden values and the
#: result may all be rounded to 8 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
#: Tokens of a batch that are checked.
CHECKED = 3


class Weights(NamedTuple):
    """Experts in the checkpoint's layout, float32 or bfloat16 (ml_dtypes)."""

    dtype: str
    activation: str  #: a key of config.ACTIVATIONS
    up: np.ndarray  #: (E, F, H), or (E, 2F, H) with the gate's rows first
    down: np.ndarray  #: (E, H, F)
    up_bias: np.ndarray | None  #: (E, F or 2F) float32
    down_bias: np.ndarray | None  #: (E, H) float32
    top_k: int


class Unable(Exception):
    """Why a peer does not take part, in a few words."""


class Peer:
    """One way to compute the experts: y[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t])."""

    name = ""
    dtypes = ("float32",)
    activations = tuple(ACTIVATIONS)
    biases = True
    copies = 0  #: how often it stores the weights beside those that it is given

    def prepare(self, weights):
        """Import what is needed and bring the weights into its own form. Not timed."""

    def convert(self, x, topk_weights, topk_ids):
        """The arguments of `run`, from (T, H) float32, (T, K) float32 and (T, K) int64. Not timed."""
        return x, topk_weights, topk_ids

    def run(self, x, topk_weights, topk_ids):
        """The experts' result (T, H). Timed."""
        raise NotImplementedError

    def to_numpy(self, y):
        """A result of `run` as a float array."""
        return y


class Ours(Peer):
    name = "moe_numba"
    dtypes = DTYPES

    def __init__(self, experts):
        self.experts = experts

    def convert(self, x, topk_weights, topk_ids):
        return x, topk_ids, topk_weights, np.full(len(x), topk_ids.shape[1], np.int64)

    def run(self, x, topk_ids, topk_weights, used):
        return self.experts.forward(x, topk_ids, topk_weights, used)


# ---- NumPy ----


class NumpyLoop(Peer):
    """What one writes first: for each expert its tokens, two products, and the sum."""

    name = "NumPy loop"
    activations = ("relu", "swiglu")

    def prepare(self, weights):
        self.weights = weights

    def run(self, x, topk_weights, topk_ids):
        y = np.zeros_like(x)
        for e in np.unique(topk_ids):
            tokens, slots = np.nonzero(topk_ids == e)
            hidden = x[tokens] @ self.weights.up[e].T
            if self.weights.up_bias is not None:
                hidden += self.weights.up_bias[e]
            if self.weights.activation == "swiglu":
                gate, up = np.split(hidden, 2, axis=1)
                hidden = gate / (1 + np.exp(-gate)) * up
            else:
                hidden = np.maximum(hidden, 0)
            out = hidden @ self.weights.down[e].T
            if self.weights.down_bias is not None:
                out += self.weights.down_bias[e]
            y[tokens] += out * topk_weights[tokens, slots, None]  # an expert has a token once
        return y


# ---- torch ----


class TorchPeer(Peer):
    """What all peers on torch share."""

    dtypes = ("float32", "bfloat16")
    ids_dtype = "int64"

    def prepare(self, weights):
        import torch

        torch.set_num_threads(moe_numba.get_num_threads())
        self.torch = torch
        self.dtype = getattr(torch, weights.dtype)
        self.weights = weights
        self.up, self.down = (self.tensor(w) for w in (weights.up, weights.down))
        biases = (weights.up_bias, weights.down_bias)
        self.up_bias, self.down_bias = (None if b is None else self.tensor(b).to(self.dtype) for b in biases)

    def tensor(self, array):
        """The array's own memory as a tensor; torch does not know NumPy's bfloat16, but its bits."""
        if array.dtype.itemsize == 2:
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def convert(self, x, topk_weights, topk_ids):
        ids = self.tensor(topk_ids).to(getattr(self.torch, self.ids_dtype))
        return self.tensor(x).to(self.dtype), self.tensor(topk_weights), ids

    def to_numpy(self, y):
        return y.detach().float().numpy()


class TorchLoop(TorchPeer):
    name = "torch loop, F.linear"
    activations = ("relu", "swiglu")

    def linear(self, x, projection, e):
        """x @ weights.T + bias of expert e; projection "up" or "down"."""
        bias = getattr(self, f"{projection}_bias")
        return self.torch.nn.functional.linear(x, getattr(self, projection)[e], None if bias is None else bias[e])

    def run(self, x, topk_weights, topk_ids):
        torch = self.torch
        with torch.inference_mode():
            y = torch.zeros_like(x)
            for e in torch.unique(topk_ids).tolist():
                tokens, slots = torch.where(topk_ids == e)
                hidden = self.linear(x[tokens], "up", e)
                if self.weights.activation == "swiglu":
                    gate, up = hidden.chunk(2, dim=1)
                    hidden = torch.nn.functional.silu(gate) * up
                else:
                    hidden = torch.relu(hidden)
                out = self.linear(hidden, "down", e) * topk_weights[tokens, slots, None]
                y.index_add_(0, tokens, out.to(y.dtype))
            return y


class TorchPrepacked(TorchLoop):
    """The same loop on weights that oneDNN has reordered for its kernels, as torch.compile's freezing does."""

    name = "torch loop, oneDNN prepacked"
    copies = 1

    def prepare(self, weights):
        super().prepare(weights)
        reorder = self.torch.ops.mkldnn._reorder_linear_weight
        with self.torch.inference_mode():
            self.up, self.down = ([reorder(w) for w in stack] for stack in (self.up, self.down))

    def linear(self, x, projection, e):
        bias = getattr(self, f"{projection}_bias")
        bias = None if bias is None else bias[e]
        weight = getattr(self, projection)[e]
        return self.torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Transformers(TorchPeer):
    """The experts' module of OLMoE, which all its models with such experts share."""

    activations = ("swiglu",)
    biases = False

    def __init__(self, implementation):
        self.name = f"transformers {implementation}"
        self.implementation = implementation

    def prepare(self, weights):
        super().prepare(weights)
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        experts, hidden_size, intermediate_size = weights.down.shape
        config = OlmoeConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_local_experts=experts,
            num_experts=experts,
            num_experts_per_tok=weights.top_k,
        )
        config._experts_implementation = self.implementation
        with self.torch.device("meta"):
            self.module = OlmoeExperts(config)
        self.module.gate_up_proj = self.torch.nn.Parameter(self.up, requires_grad=False)
        self.module.down_proj = self.torch.nn.Parameter(self.down, requires_grad=False)

    def run(self, x, topk_weights, topk_ids):
        with self.torch.inference_mode():
            return self.module(x, topk_ids, topk_weights)


class VllmPeer(TorchPeer):
    """Kernels of vLLM for the CPU, called directly: only its compiled extension is loaded."""

    activations = ("swiglu",)
    biases = False
    copies = 1
    ids_dtype = "int32"
    #: What `packed` calls.
    packing = ""

    def prepare(self, weights):
        super().prepare(weights)
        from importlib.util import find_spec

        found = find_spec("vllm")
        if found is None:
            raise Unable("vllm is not installed")
        # It has one for each instruction set, all with the same namespace.
        extension = "_C" if has_bf16_dot() else "_C_AVX512" if register_bits() == 512 else "_C_AVX2"
        self.torch.ops.load_library(str(Path(found.origin).with_name(f"{extension}.abi3.so")))
        self.ops = self.torch.ops._C
        if not hasattr(self.ops, self.packing):
            raise Unable(f"not for this processor ({extension} has no {self.packing})")
        self.up, self.down = self.packed(self.up), self.packed(self.down)


class VllmVec(VllmPeer):
    name = 'vLLM CPU, "vec"'
    packing = "prepack_moe_weight"
    #: The instruction set that it is told to use.
    isa = "vec"

    def packed(self, weight):
        packed = self.torch.empty_like(weight)
        self.ops.prepack_moe_weight(weight, packed, self.isa)
        return packed

    def run(self, x, topk_weights, topk_ids):
        y = self.torch.empty_like(x)
        args = (self.up, self.down, None, None, topk_weights, topk_ids)
        self.ops.cpu_fused_moe(y, x, *args, False, "silu", self.isa)
        return y


class VllmAmx(VllmVec):
    """What vLLM itself chooses for bfloat16 where there is a matrix unit."""

    name = 'vLLM CPU, "amx"'
    isa = "amx"
    dtypes = ("bfloat16",)

    def prepare(self, weights):
        if not has_amx():
            raise Unable("not without a matrix unit (AMX)")
        super().prepare(weights)


class VllmFused(VllmPeer):
    """The kernel that it has from sglang."""

    name = "vLLM CPU, fused_experts_cpu"
    packing = "convert_weight_packed"
    dtypes = ("bfloat16",)

    def packed(self, weight):
        return self.ops.convert_weight_packed(weight)

    def run(self, x, topk_weights, topk_ids):
        y = self.torch.empty_like(x)
        unquantized, no_scales, packed = 0, [None] * 10, True
        args = (self.up, self.down, topk_weights, topk_ids, unquantized)
        self.ops.fused_experts_cpu(y, x, *args, *no_scales, packed)
        return y


# ---- ONNX Runtime ----


class OnnxRuntime(Peer):
    """One node, com.microsoft MoE. It routes by itself, so it is given logits whose softmax is our weights."""

    name = "ONNX Runtime MoE"
    activations = ("relu", "swiglu")
    copies = 1

    def prepare(self, weights):
        import onnxruntime as ort
        from onnx import TensorProto, helper

        e, h, f = weights.down.shape
        gated = weights.activation == "swiglu"
        up, up_bias = weights.up, weights.up_bias
        attributes = {"activation_type": weights.activation}
        if gated:  # gate and up in turn, the only order that its CPU kernel knows
            up = np.ascontiguousarray(up.reshape(e, 2, f, h).swapaxes(1, 2)).reshape(e, 2 * f, h)
            up_bias = None if up_bias is None else up_bias.reshape(e, 2, f).swapaxes(1, 2).reshape(e, 2 * f)
            attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        arrays = {"up": up, "up_bias": up_bias, "down": weights.down, "down_bias": weights.down_bias}
        arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items() if a is not None}
        names = [name if name in arrays else "" for name in ("up", "up_bias", "down", "down_bias")]
        node = helper.make_node(
            "MoE",
            ["x", "logits", *names],
            ["y"],
            domain="com.microsoft",
            k=weights.top_k,
            normalize_routing_weights=1,
            **attributes,
        )
        tokens = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", width])
            for name, width in (("x", h), ("logits", e), ("y", h))
        ]
        graph = helper.make_graph([node], "moe", tokens[:2], tokens[2:], [_outside(n, a) for n, a in arrays.items()])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)

        options = ort.SessionOptions()
        options.intra_op_num_threads = moe_numba.get_num_threads()
        self.values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        options.add_external_initializers(list(arrays), self.values)
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.num_experts = e

    def convert(self, x, topk_weights, topk_ids):
        logits = np.full((len(x), self.num_experts), -1e4, np.float32)
        np.put_along_axis(logits, topk_ids, np.log(topk_weights), axis=1)
        return x, logits

    def run(self, x, logits):
        return self.session.run(None, {"x": x, "logits": logits})[0]


def _outside(name, array):
    """A tensor of the model whose values are handed over in memory: a model itself may have 2 GB."""
    from onnx import TensorProto

    tensor = TensorProto(name=name, dims=array.shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given")
    return tensor


#: Makers of every peer, in the order of the table.
PEERS = (
    NumpyLoop,
    TorchLoop,
    TorchPrepacked,
    lambda: Transformers("grouped_mm"),
    lambda: Transformers("eager"),
    VllmVec,
    VllmAmx,
    VllmFused,
    OnnxRuntime,
)


# ---- measuring ----


def main(arguments=None):
    options = _parser().parse_args(arguments)
    facts = machine()
    print(headline(facts))
    results = []
    for name, dtype in itertools.product(options.workload or DEFAULT_WORKLOADS, options.dtype or DTYPES):
        print(f"\n{name}, weights {dtype}", flush=True)
        workload = Workload(name, dtype, options.tokens or TOKENS)
        entrants = gather(workload, options.peer)
        rows = [row for tokens in workload.calls for row in measure(workload, entrants, tokens, options.rounds)]
        print("\n" + "\n".join(show(rows)), flush=True)
        results += rows
    if options.output:
        facts["libraries"] = libraries()
        store(options.output, {"machine": facts, "options": vars(options), "results": results})
    return 0


def _parser():
    parser = argparse.ArgumentParser(description="Other libraries' experts beside this package's.")
    add_choices(parser, DEFAULT_WORKLOADS, TOKENS)
    parser.add_argument("--rounds", type=int, default=7, help="turns of every peer (default: 7)")
    parser.add_argument("--peer", nargs="+", metavar="TEXT", help="only peers with one of these texts in the name")
    return parser


class Workload:
    """A layer's experts, and calls of it: (x, topk_weights, topk_ids) lists by number of tokens."""

    def __init__(self, name, dtype, tokens):
        self.name = name
        layer = make_layer(WORKLOADS[name])
        if dtype != layer.config.dtype:
            layer = layer.astype(dtype)
        experts = layer.experts
        arrays = experts.up, experts.down, experts.up_bias, experts.down_bias
        self.weights = Weights(dtype, experts.activation, *arrays, layer.config.top_k)
        self.ours = Ours(experts)
        self.calls = {}
        for t in dict.fromkeys(tokens):
            inputs = make_inputs(layer.router, t)
            routed = [(x, layer.router.route(x)) for x in inputs]
            self.calls[t] = [(x, r.expert_weights, r.expert_indices) for x, r in routed]


def gather(workload, chosen=None):
    """Ours and every peer that can take part, prepared and found right. Says in one line why another is not."""
    entrants = []
    for peer in (workload.ours, *(make() for make in PEERS)):
        if chosen and peer is not workload.ours and not any(text in peer.name for text in chosen):
            continue
        try:
            check_able(peer, workload.weights)
            peer.prepare(workload.weights)
            errors = [check(peer, workload.weights, calls[0]) for calls in workload.calls.values()]
        except Exception as error:  # whatever another library raises; ours must not fail
            if peer is workload.ours:
                raise
            print(f"  without {peer.name}: {' '.join((str(error) or type(error).__name__).split())[:150]}")
            continue
        print(f"  {peer.name}: largest error {max(errors):.1e}", flush=True)
        entrants.append(peer)
    return entrants


def check_able(peer, weights):
    """Raise Unable if the peer is not made for such experts, or the memory is too small for its copies."""
    if weights.dtype not in peer.dtypes:
        raise Unable(f"not for {weights.dtype}")
    if weights.activation not in peer.activations:
        raise Unable(f"not for {weights.activation}")
    if weights.up_bias is not None and not peer.biases:
        raise Unable("not with biases")
    # Half as much again: copies are made from copies.
    needed, free = 1.5 * peer.copies * (weights.up.nbytes + weights.down.nbytes), free_memory()
    if needed > free:
        raise Unable(
            f"its copy of the weights takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free (--peer)"
        )


def free_memory():
    """Bytes that programs may still take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def check(peer, weights, call):
    """Error against the specification, over the largest value. Raises Unable if it is too large."""
    x, topk_weights, topk_ids = call
    actual = np.asarray(peer.to_numpy(peer.run(*peer.convert(*call))), np.float64)
    some = np.unique(np.linspace(0, len(x) - 1, CHECKED).astype(int))
    used = np.full(len(some), topk_ids.shape[1])
    arrays = weights.up, weights.down, weights.up_bias, weights.down_bias
    args = x[some], topk_ids[some], topk_weights[some], used, weights.activation, *arrays
    expected = reference.experts_forward(*args)
    error = np.abs(actual[some] - expected).max() / np.abs(expected).max()
    if not error < TOLERANCE[weights.dtype]:  # NaN too
        raise Unable(f"wrong result, error {error:.1e} of the largest value")
    return float(error)


def measure(workload, entrants, tokens, rounds):
    """A dict of results for each entrant. In every round each peer has its turn, between two turns of ours."""
    calls = workload.calls[tokens]
    arguments = {peer: itertools.cycle([peer.convert(*call) for call in calls]) for peer in entrants}
    turns, ratios = {peer: [] for peer in entrants}, {peer: [] for peer in entrants}

    def take_turn(peer):
        time.sleep(PAUSE)
        peer.run(*next(arguments[peer]))  # wakes its threads
        seconds = time_calls(lambda args: peer.run(*args), arguments[peer], len(calls))
        turns[peer].append(seconds)
        return seconds

    before = take_turn(workload.ours)
    for _ in range(rounds):
        for peer in entrants[1:] or entrants:
            theirs, after = take_turn(peer), take_turn(workload.ours)
            ratios[peer].append(theirs / statistics.mean((before, after)))
            before = after
    ratios[workload.ours] = [1.0]
    return [
        {
            "workload": workload.name,
            "dtype": workload.weights.dtype,
            "tokens": tokens,
            "peer": peer.name,
            "seconds": statistics.median(turns[peer]),
            "ratio": statistics.median(ratios[peer]),
            "turns": turns[peer],
            "ratios": ratios[peer],
        }
        for peer in entrants
    ]


def show(rows):
    """The results of one workload: milliseconds, and in brackets how many times ours."""
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    lines = [[*(f"T={t}" for t in tokens), "ms (times ours)"]]
    for name in dict.fromkeys(row["peer"] for row in rows):
        own = [row for row in rows if row["peer"] == name]
        lines.append([*(f"{row['seconds'] * 1e3:.4g} ({row['ratio']:.2f})" for row in own), name])
    yield from table(lines)


def libraries():
    """Versions of what was imported."""
    names = ("torch", "transformers", "onnxruntime")
    return {name: sys.modules[name].__version__ for name in names if name in sys.modules}


if __name__ == "__main__":
    sys.exit(main())
