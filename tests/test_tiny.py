"""The whole layer in a few seconds: the one to run while editing."""

import numpy as np
import pytest
from helpers import assert_close, assert_routing, layer_reference, random_array, random_layer

pytestmark = pytest.mark.plain

CONFIG = {"num_experts": 5, "top_k": 2, "input_dim": 20, "hidden_dim": 12}


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "swiglu", "bias": False, "capacity_factor": None},
        {"activation": "relu", "bias": True, "capacity_factor": 0.75, "overflow": "next"},
        {"activation": "gelu", "bias": True, "capacity_factor": 0.75, "overflow": "drop"},
    ],
)
def test_layer_equals_the_specification(rng, options):
    layer = random_layer(**CONFIG, **options)
    x = random_array(rng, 33, 20)
    y, routing = layer(x)
    config = layer.config
    assert y.dtype == np.float32
    assert_routing(routing, config.top_k, config.capacity_factor, config.overflow)
    assert_close(y, layer_reference(layer, x, routing))
