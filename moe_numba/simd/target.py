"""Which vector registers the processor that Numba compiles for has."""

import ctypes
import sys
from functools import lru_cache

import llvmlite.binding as llvm
from numba.core import config

_PROBE = """
define <16 x float> @probe(<16 x float> %a, <16 x float> %b) {
  %c = fadd <16 x float> %a, %b
  ret <16 x float> %c
}
"""


def cpu_name() -> str:
    """Name of the processor that Numba compiles for, as LLVM knows it."""
    return config.CPU_NAME or llvm.get_host_cpu_name()


@lru_cache
def cpu_features() -> frozenset[str]:
    """Instruction sets that Numba lets LLVM use; empty when they follow from `cpu_name` alone."""
    if config.CPU_FEATURES is not None:
        return frozenset(f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+"))
    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


@lru_cache
def register_bits() -> int:
    """Width of the widest vector register in bits: 512, 256 or 128.

    Asked of LLVM when the features are implied by a processor's name (NUMBA_CPU_NAME with
    NUMBA_CPU_FEATURES=""), because llvmlite has no query for them.
    """
    features = cpu_features()
    if features:
        return 512 if "avx512f" in features else 256 if "avx2" in features and "fma" in features else 128
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu_name())
    assembly = machine.emit_assembly(llvm.parse_assembly(_PROBE))
    return 512 if "zmm" in assembly else 256 if "ymm" in assembly else 128


def has_32_registers() -> bool:
    """True with 32 vector registers (AVX-512, 64-bit ARM), False with 16 (SSE, AVX2)."""
    return register_bits() == 512 or llvm.get_default_triple().startswith(("aarch64", "arm64"))


def register_constraint() -> str | None:
    """What LLVM calls any vector register in a piece of assembly; None on processors other than x86."""
    if not llvm.get_default_triple().startswith("x86_64"):
        return None
    return "v" if register_bits() == 512 else "x"


#: Processors with AVX512-BF16, for when features follow from the name alone.
_BF16_PROCESSORS = {"cooperlake", "sapphirerapids", "emeraldrapids", "graniterapids", "znver4", "znver5"}


def has_bf16_dot() -> bool:
    """True if a dot product of bfloat16 pairs is one instruction (AVX512-BF16)."""
    return "avx512bf16" in cpu_features() or (not cpu_features() and cpu_name() in _BF16_PROCESSORS)


@lru_cache
def has_amx() -> bool:
    """True if there is a matrix unit for bfloat16 (AMX) that this process may use.

    Linux saves the unit's registers, 8 KiB, only for processes that have asked for it; children inherit the
    permission (Linux kernel documentation, x86/xstate). Not asked for before the first layer that wants it.
    """
    if config.DISABLE_JIT or not sys.platform.startswith("linux"):
        return False
    if not {"amx-bf16", "avx512bf16"} <= cpu_features():
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


#: True on Zen 4, and on Zen 5, which is taken for its like: some distances and sizes differ from those of Intel's
#: processors with AVX-512 (kernels/projection.py).
ZEN4 = cpu_name() in {"znver4", "znver5"}

#: float32 values in one vector.
LANES = register_bits() // 32

#: Activation rows in one vector, 128 bits of each.
GROUP_ROWS = LANES // 4
#: Vectors of activations and weight rows of the largest tile. 4 x 6 accumulators, 4 vectors of activations and one of
#: weights fill 29 of 32 registers; 3 x 4 fill all of 16 (Zen 3, 16 to 128 rows: up to 9 % faster than 2 x 6, which load
#: 8 vectors for 12 products instead of 7).
TILE_VECTORS, TILE_COLUMNS = (4, 6) if has_32_registers() else (3, 4)
#: Weight rows of a tile with a single vector of activations. Twice as many as of the largest fit everywhere (Zen 3, H =
#: 64, F = 128, 1 and 4 tokens: with 8 up to 5 % faster than with 12).
WIDE_COLUMNS = 2 * TILE_COLUMNS
#: Weight rows that a single activation row meets at a time (Zen 4, read from memory, one core: bfloat16 3 to 4 % faster
#: than with 6, float32 the same; with 3 and 8 slower).
ROW_COLUMNS = 4
#: Groups of activation rows and vectors of columns of the largest tile of outer products. 4 rows x 6 vectors of sums,
#: 6 vectors of weights and one value of the activations fill 31 of 32 registers, 6 x 2 with theirs 15 of 16 (4 x 3
#: would, too, but columns should end where cache lines do).
OUTER_GROUPS = max(1, 4 // GROUP_ROWS) if has_32_registers() else TILE_VECTORS
OUTER_VECTORS = min(6, LANES) if has_32_registers() else 2
#: Rows of transposed weights that a single group of rows meets at a time (Zen 4, gpt-oss, one core, one row, float32:
#: with 8 a tenth slower, with 24 and 32 a fifth).
OUTER_ROWS = 16
