"""A model of Hugging Face transformers with our experts and with its own, in one run.

python perf/transformers.py --output perf/results/transformers

An OLMoE of random weights with the real widths and a few layers reads a prompt and writes tokens, with each
implementation of its experts in turn, over several rounds, because the speed of a machine drifts; ratios
are taken within a round. Needs torch and transformers: pip install 'moe_numba[transformers]'.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

# This file has the library's name, and Python looks beside the script first.
if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))

from roofline import headline, machine, store, table  # first: it makes moe_numba that of this checkout

OURS = "moe_numba"
OTHERS = ("eager", "grouped_mm")
#: Largest difference of the logits from those of "eager", relative to the largest of them.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 1000,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def main(arguments=None):
    """Measure, print and store; 1 if an implementation computes something else."""
    options = _parser().parse_args(arguments)
    import torch
    import transformers

    from moe_numba.integrations.transformers import register

    register()
    # past_key_values has another name from 5.24, which 5.23 does not know.
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    facts = machine() | {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "layers": options.layers,
        "prompt": options.prompt,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
    }
    print(headline(facts))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.layers} layers of OLMoE\n")
    rows, pools = [], []
    with torch.inference_mode():
        for dtype in options.dtype:
            model = build(options.layers, getattr(torch, dtype))
            if not agree(model, dtype):
                return 1
            rows += measure(model, dtype, options)
            pools += [alternate(model, dtype, count, options.rounds) for count in (1, options.prompt)]
            del model
    show(rows, options)
    show_pools(pools)
    if options.output:
        store(options.output, {"machine": facts, "results": rows, "pools": pools})
    return 0


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, metavar="T", help="tokens read at once (512)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="T", help="tokens written one by one (64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="NAME", help="write NAME.json")
    return parser


def build(layers, dtype):
    """A model whose experts are chosen about evenly, as those of a trained one are."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(num_hidden_layers=layers, **SIZES)
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return OlmoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)


def tokens(count, seed):
    """(1, count) random tokens."""
    import torch

    return torch.randint(3, SIZES["vocab_size"], (1, count), generator=torch.Generator().manual_seed(seed))


def agree(model, dtype):
    """Whether all implementations give about the same logits."""
    logits = {}
    for name in (*OTHERS, OURS):
        model.set_experts_implementation(name)
        logits[name] = model(tokens(32, 0)).logits.float()
    expected = logits["eager"]
    for name, value in logits.items():
        error = float((value - expected).abs().max() / expected.abs().max())
        if not error < TOLERANCE[dtype]:  # NaN too
            print(f"{name} differs from eager by {error:.2g} in {dtype}", file=sys.stderr)
            return False
    return True


class BlockTimer:
    """Seconds spent in the MoE blocks of a model."""

    def __init__(self, model):
        self.seconds = 0.0
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(self._start)
            layer.mlp.register_forward_hook(self._stop)

    def _start(self, *_):
        self._started = time.perf_counter()

    def _stop(self, *_):
        self.seconds += time.perf_counter() - self._started

    def take(self):
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure(model, dtype, options):
    """One row for each phase and implementation: medians over the rounds."""
    timer = BlockTimer(model)
    names = (OURS, *OTHERS)
    turns = {(phase, name): [] for phase in ("prefill", "decode") for name in names}
    for number in range(options.rounds + 1):
        for name in names:
            model.set_experts_implementation(name)
            timings = one_turn(model, timer, options, seed=number)
            if number:  # the first round warms up
                for phase, times in timings.items():
                    turns[phase, name].append(times)
    rows = []
    for (phase, name), times in turns.items():
        ours = turns[phase, OURS]
        row = {"dtype": dtype, "phase": phase, "implementation": name}
        for i, what in enumerate(("blocks", "model")):
            row[f"{what}_seconds"] = statistics.median(t[i] for t in times)
            row[f"{what}_ratio"] = statistics.median(t[i] / o[i] for t, o in zip(times, ours, strict=True))
        rows.append(row)
    return rows


def one_turn(model, timer, options, seed):
    """{phase: (seconds in the blocks, seconds in all)}; decode per token."""
    timer.take()
    start = time.perf_counter()
    output = model(tokens(options.prompt, seed), use_cache=True)
    prefill = timer.take(), time.perf_counter() - start
    start = time.perf_counter()
    for step in range(options.new_tokens):
        # Random tokens, so that each meets other experts whatever was computed before.
        output = model(tokens(1, 1000 * seed + step), past_key_values=output.past_key_values, use_cache=True)
    decode = timer.take(), time.perf_counter() - start
    return {"prefill": prefill, "decode": tuple(seconds / options.new_tokens for seconds in decode)}


def alternate(model, dtype, count, rounds, calls=10):
    """One row: torch's product and our experts in turn, against each alone.

    torch and Numba have a pool of threads each; if they fought for the cores, taking turns would cost more. Two
    products of torch in turn are the control: what either evicts from the caches, both must read again.
    """
    import torch

    layer = model.model.layers[0]
    model.set_experts_implementation(OURS)
    x = torch.randn(1, count, SIZES["hidden_size"]).to(layer.self_attn.q_proj.weight.dtype)
    product, control = (lambda: layer.self_attn.q_proj(x)), (lambda: layer.self_attn.k_proj(x))
    ratios = {"ours": [], "torch": []}
    for number in range(rounds + 1):
        for name, other in (("ours", lambda: layer.mlp(x)), ("torch", control)):
            # In every second round together first: what comes later finds a warmer machine, or a slower one.
            together = seconds(calls, product, other) if number % 2 else None
            alone = seconds(calls, product) + seconds(calls, other)
            together = together or seconds(calls, product, other)
            if number:  # the first round warms up
                ratios[name].append(together / alone)
    return {"dtype": dtype, "tokens": count} | {name: statistics.median(r) for name, r in ratios.items()}


def seconds(calls, *functions):
    """Time of calling functions in turn."""
    start = time.perf_counter()
    for _ in range(calls):
        for function in functions:
            function()
    return time.perf_counter() - start


def show_pools(pools):
    lines = [("dtype", "tokens", "torch, ours", "torch, torch")]
    lines += [(row["dtype"], str(row["tokens"]), f"{row['ours']:.2f}", f"{row['torch']:.2f}") for row in pools]
    print("\nTwo operations in turn, times what they take alone: 1 where nothing is in the other's way.")
    print("\n".join(table(lines)))


def show(rows, options):
    """The table, and what it says."""
    lines = [("dtype", "phase", "blocks", "x ours", "model", "x ours", "experts_implementation")]
    for row in rows:
        times = [
            text
            for what in ("blocks", "model")
            for text in (f"{row[f'{what}_seconds'] * 1e3:.1f} ms", f"{row[f'{what}_ratio']:.2f}")
        ]
        lines.append((row["dtype"], row["phase"], *times, row["implementation"]))
    print("\n".join(table(lines)))
    print(
        f"\nprefill: {options.prompt} tokens; decode: a token, of {options.new_tokens}."
        f" Medians of {options.rounds} rounds."
    )


if __name__ == "__main__":
    sys.exit(main())
