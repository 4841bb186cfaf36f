"""Time every step of a layer, and the start of a process, with pyperf.

python perf/run.py -o result.json

docs/performance.md says what each benchmark means. This script is run again by every worker
process that pyperf starts, once for each benchmark and process, so nothing large is built before
a worker knows that it is needed.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # measure this checkout, whatever is installed

import numba  # noqa: E402
import numpy as np  # noqa: E402
import pyperf  # noqa: E402
from workloads import STEPS, TOKENS, WORKLOADS, prepare  # noqa: E402

import moe_numba  # noqa: E402
from moe_numba.simd import target  # noqa: E402

#: Group of the benchmarks that time a new process; on the command line it is chosen like a workload.
STARTUP = "startup"
GROUPS = (*WORKLOADS, STARTUP)
DEFAULT_GROUPS = tuple(name for name in GROUPS if name not in ("mixtral", "gpt-oss"))  # 5.6 and 3.2 GB of weights

#: Environment that changes what is measured. pyperf's workers start without it unless told.
ENVIRONMENT = ("NUMBA_", "OMP_", "GOMP_", "KMP_", "OPENBLAS_")

#: What a new process runs. 512 tokens are enough work for the parallel kernels.
_FORWARD = "import numpy, moe_numba; moe_numba.MoeLayer().forward(numpy.ones((512, 64), numpy.float32))"
STARTUP_CODE = {
    "import_numba": "import numba",
    "import": "import moe_numba",
    "first_result": _FORWARD,
    "compile": _FORWARD,
}


def main():
    runner = make_runner()
    options = runner.parse_args()
    environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)}
    options.inherit_environ = [*(options.inherit_environ or []), *environment]
    runner.metadata |= metadata(environment)

    groups = GROUPS if options.all else options.workload or DEFAULT_GROUPS
    for name in WORKLOADS:
        if name in groups:
            for tokens, step in itertools.product(dict.fromkeys(options.tokens or TOKENS), STEPS):
                runner.bench_time_func(f"{name}/T={tokens}/{step}", time_step, name, tokens, step)

    if STARTUP in groups:
        # A value is a new process already: one for each of pyperf's, nothing to warm, nothing to repeat.
        options.values, options.warmups, options.loops = 1, 0, 1
        for name in STARTUP_CODE:
            runner.bench_time_func(f"{STARTUP}/{name}", time_startup, name)


def make_runner():
    """A pyperf.Runner that knows the options of this script and hands them on to its workers."""
    runner = pyperf.Runner(processes=3, values=5, min_time=0.05, add_cmdline_args=_worker_options)
    parser = runner.argparser
    parser.description = "Time every step of a MoE layer, and the start of a process. See docs/performance.md."
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--workload",
        action="append",
        choices=GROUPS,
        help=f"may be repeated; default: {', '.join(DEFAULT_GROUPS)}. mixtral and gpt-oss take 5.6 and 3.2 GB of "
        f"memory and run only if named here or with --all. {STARTUP} is import, first result and compilation in a "
        "new process",
    )
    group.add_argument("--all", action="store_true", help="every workload, mixtral and gpt-oss included")
    group.add_argument(
        "--tokens",
        action="append",
        type=_positive,
        metavar="T",
        help=f"tokens per call, may be repeated; default: {', '.join(map(str, TOKENS))}",
    )
    return runner


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"was {text}, but must be an integer of at least 1")
    return int(text)


def _worker_options(command, options):
    """pyperf's workers count the benchmarks to find theirs, so they must be given the same choice."""
    if options.all:
        command.append("--all")
    for name in options.workload or ():
        command += ["--workload", name]
    for tokens in options.tokens or ():
        command += ["--tokens", str(tokens)]


def metadata(environment):
    """What a result depends on beyond what pyperf stores (the processor's name, Python, the system)."""
    threads = moe_numba.get_num_threads()  # starts Numba's threads, after which the layer is known
    return {
        "moe_numba_version": moe_numba.__version__,
        "numba_version": numba.__version__,
        "numpy_version": np.__version__,
        "threads": threads,
        "threading_layer": numba.threading_layer(),
        "compiled_for": f"{target.cpu_name()}, vectors of {target.register_bits()} bits",
        # Where the cache lies is no difference between two results.
        "environment": " ".join(f"{k}={v}" for k, v in environment.items() if k != "NUMBA_CACHE_DIR") or "default",
    }


# ---- in a worker ----


def time_step(loops, name, tokens, step):
    """Seconds that `loops` calls take."""
    function, arguments = _warm(name, tokens, step)
    start = time.perf_counter()
    for args in itertools.islice(arguments, loops):
        function(*args)
    return time.perf_counter() - start


@lru_cache(maxsize=1)
def _warm(name, tokens, step):
    """The function to time, and its arguments as an endless cycle that goes on where the last value ended.

    Called with every input once: the first call compiles, which pyperf would not notice.
    """
    function, arguments = prepare(name, tokens, step)
    for args in arguments:
        function(*args)
    return function, itertools.cycle(arguments)


def time_startup(loops, name):
    """Seconds from the start of `loops` new interpreters, one after the other, to the end of their code."""
    if name != "compile":
        _run_new_process(name)  # writes the byte code and the cache of compiled kernels, if they are not there
    return sum(_run_new_process(name) for _ in range(loops))


def _run_new_process(name):
    code = f"{STARTUP_CODE[name]}; import time; print(time.perf_counter())"
    with tempfile.TemporaryDirectory() as copy:
        root, environment = ROOT, dict(os.environ)
        if name == "compile":  # a package without compiled kernels, which are looked for beside the sources, too
            root, environment["NUMBA_CACHE_DIR"] = copy, str(Path(copy) / "cache")
            shutil.copytree(ROOT / "moe_numba", Path(copy) / "moe_numba", ignore=shutil.ignore_patterns("*.nbc"))
        start = time.perf_counter()
        # cwd, because `python -c` imports from there first.
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    sys.stderr.write(done.stderr)  # for example the warning that nothing can be cached
    done.check_returncode()
    return float(done.stdout) - start  # perf_counter is one clock for all processes


if __name__ == "__main__":
    main()
