"""Arrays that begin on a cache line."""

import ml_dtypes
import numpy as np
import pytest

from moe_numba import MoeConfig, MoeLayer
from moe_numba._aligned import CACHE_LINE, aligned_empty, converted

DTYPES = [np.float32, np.uint16, ml_dtypes.bfloat16]


def begins_on_a_line(array):
    return array.ctypes.data % CACHE_LINE == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [0, (1,), (7,), (3, 5), (2, 3, 4), (1000, 33)])
def test_aligned_empty(shape, dtype):
    for _ in range(5):
        array = aligned_empty(shape, dtype)
        assert array.shape == (shape if shape else (0,))
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert begins_on_a_line(array) or not array.size


def test_converted_leaves_alone_what_fits():
    array = np.ones((3, 5), np.float32)
    assert converted(array, np.dtype(np.float32)) is array


@pytest.mark.parametrize(
    "array",
    [
        np.arange(15.0).reshape(3, 5),
        np.arange(15, dtype=np.float32).reshape(5, 3).T,
        np.frombuffer(b"?" + np.arange(15, dtype=np.float32).tobytes(), np.float32, offset=1).reshape(3, 5),
    ],
    ids=["float64", "Fortran order", "unaligned"],
)
def test_converted_copies_what_does_not(array):
    copy = converted(array, np.dtype(np.float32))
    np.testing.assert_array_equal(copy, array)
    assert copy.dtype == np.float32
    assert copy.flags.c_contiguous
    assert begins_on_a_line(copy)


def test_the_weights_of_a_layer_begin_on_a_line(tmp_path):
    layer = MoeLayer(MoeConfig(activation="swiglu"))
    layer.save(tmp_path / "layer.safetensors")
    for made in (layer, layer.astype("bfloat16"), MoeLayer.load(tmp_path / "layer.safetensors")):
        assert begins_on_a_line(made.experts.up)
        assert begins_on_a_line(made.experts.down)
