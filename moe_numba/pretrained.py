"""The MoE block of a published model, from its checkpoint: config and arrays for MoeLayer.from_weights."""

import re
from contextlib import contextmanager

import numpy as np

from ._aligned import aligned_empty
from ._check import choice
from .checkpoint import Checkpoint
from .config import ACTIVATIONS, DTYPES, MoeConfig
from .errors import CheckpointError, MoeValueError
from .families import FAMILIES, PREFIXES, Key, activation_of
from .formats import FORMATS


def list_moe_layers(path) -> list[int | str]:
    """Numbers of the layers of a checkpoint that are Mixture-of-Experts, as `MoeLayer.from_pretrained` takes them.

    path: a directory in Hugging Face format. Where a model has an encoder and a decoder, strings such as
    "encoder.1". Raises CheckpointError.
    """
    checkpoint = Checkpoint(path)
    family, _ = _family(checkpoint)
    names = {block: _full(block, family.router).split("{layer}") for block in _blocks(family)}
    # All at once: there are a dozen names, and hundreds of thousands of tensors in an index at its limit.
    ends = tuple(after for _, after in names.values())
    routers = [tensor for tensor in checkpoint if tensor.endswith(ends)]
    found = []
    for block, (before, after) in names.items():
        name = re.compile(f"{re.escape(before)}([0-9]{{1,9}}){re.escape(after)}")
        numbers = sorted(int(match[1]) for tensor in routers if (match := name.fullmatch(tensor)))
        found += [f"{_stack(block)}.{n}" if _stack(block) else n for n in numbers]
    return found


@np.errstate(over="ignore")  # float64 beyond float32 becomes infinite
def read_block(path, layer, dtype=None) -> tuple[MoeConfig, dict[str, np.ndarray]]:
    """(config, arrays by the names of MoeLayer.from_weights) of one MoE layer of a checkpoint.

    Tensors that are stored as they are used are mapped from the file, others are gathered once. dtype: one of
    config.DTYPES; None: bfloat16 if the checkpoint's is, else float32. Raises CheckpointError, and for another dtype
    MoeValueError.
    """
    if dtype is not None:
        choice("dtype", dtype, DTYPES)
    checkpoint = Checkpoint(path)
    family, values = _family(checkpoint)
    if family.check:
        family.check(values)
    reader = _Reader(checkpoint, _find_block(checkpoint, family, layer))

    def value(key):
        found = key.read(values) if isinstance(key, Key) else key(values) if callable(key) else key
        if isinstance(found, list) and str(layer).isdecimal():  # one value for each layer
            return found[int(layer)] if int(layer) < len(found) else None
        return found

    with _config_errors(checkpoint):
        input_dim = value(family.input_dim)
    stored = _find_stored(reader, family.experts, input_dim)
    if dtype is None:
        is_bfloat16 = reader.tensor(stored.down.format(e=0)).dtype == FORMATS["bfloat16"].values
        dtype = "bfloat16" if is_bfloat16 else "float32"

    shared = None
    with _config_errors(checkpoint):
        fields = {"capacity_factor": None} | {name: value(key) for name, key in family.routing.items()}
        fields |= {
            "num_experts": value(family.num_experts),
            "top_k": value(family.top_k),
            "input_dim": input_dim,
            "hidden_dim": value(family.hidden_dim),
            "activation": activation_of(family, values),
            "bias": stored.up_bias is not None,
            "dtype": dtype,
            "transposed": stored.transposed,
            "interleaved": stored.interleaved,
            "router_bias": family.router_bias is not None,
            "selection_bias": bool(family.selection_bias) and bool(value(family.biased)),
            "shared_gate": family.shared_gate is not None,
        }
        if family.shared and value(family.num_shared):
            shared = _find_stored(reader, family.shared, input_dim)
            fields["shared_hidden_dim"] = _width(reader, shared.down, input_dim)
        config = MoeConfig(**fields)
    arrays = _router_arrays(reader, family, config) | _expert_arrays(reader, stored, config)
    if shared is not None:
        arrays |= _shared_arrays(reader, shared, family.shared_gate, config)
    reader.check_all_used()
    return config, arrays


@contextmanager
def _config_errors(checkpoint):
    """What a config that is not as its model_type says leads to, as a CheckpointError."""
    try:
        yield
    except (MoeValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = error if isinstance(error, MoeValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: {reason!s:.500}") from None


def _family(checkpoint):
    """The family of a checkpoint, and the part of its config that describes the language model."""
    values = checkpoint.config
    for part in ("thinker_config", "text_config"):
        if isinstance(values.get(part), dict):
            values = values | values[part]
    known = values.get("model_type")
    if not isinstance(known, str) or known not in FAMILIES:
        names = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: model_type is {known!r}, but must be one of {names}")
    return FAMILIES[known], values


def _blocks(family):
    """Names that a family's block may have, with `{layer}` for its number."""
    return [prefix + block for prefix in PREFIXES for block in family.blocks]


def _full(block, name):
    """The name in the checkpoint of a tensor of a block. A name that begins with / is beside the block."""
    return f"{block.rpartition('.')[0]}.{name[1:]}" if name.startswith("/") else f"{block}.{name}"


def _stack(block):
    """Which of several stacks of layers a block is in: "encoder", "decoder", or "" where there is one."""
    return next((name for name in ("encoder", "decoder") if name in block.split(".")), "")


def _find_block(checkpoint, family, layer):
    """The beginning of the names of a layer's tensors."""
    names = []
    for block in _blocks(family):
        number = str(layer)
        if _stack(block):
            stack, _, number = number.partition(".")
            if stack != _stack(block):
                continue
        names.append(block.format(layer=number))
        if _full(names[-1], family.router) in checkpoint:
            return names[-1]
    message = (
        f"{checkpoint.path}: layer {layer!r} is no Mixture of Experts; those are {list_moe_layers(checkpoint.path)}"
    )
    begun = next((name for name in names if any(tensor.startswith(f"{name}.experts.") for tensor in checkpoint)), None)
    if begun is not None:
        message += f". It has experts, but no tensor {_full(begun, family.router)}"
    raise CheckpointError(message)


def _find_stored(reader, ways, input_dim):
    """The first of several ways of storing experts of which the tensors are there, and of their orientation."""
    found = [stored for stored in ways if reader.has(stored.up.format(e=0))]
    if not found:
        raise CheckpointError(f"{reader.path}: has no tensor {reader.full(ways[0].up.format(e=0))}")
    return next((stored for stored in found if _is_oriented(reader, stored, input_dim)), found[0])


def _is_oriented(reader, stored, input_dim):
    up, down = (reader.tensor(name.format(e=0)).shape for name in (stored.up, stored.down))
    if stored.transposed:
        up, down = ((*shape[:-2], *shape[:-3:-1]) for shape in (up, down))
    return up[-1:] == (input_dim,) and down[-2:-1] == (input_dim,)


class _Reader:
    """Tensors of one block by the names of the family's table."""

    def __init__(self, checkpoint, block):
        self.path = checkpoint.path
        self._checkpoint = checkpoint
        self._block = block
        self._used = set()

    def full(self, name):
        """The name in the checkpoint."""
        return _full(self._block, name)

    def has(self, name):
        return self.full(name) in self._checkpoint

    def tensor(self, name, shape=None):
        """The tensor, mapped from its file. Raises CheckpointError if it is missing or has another shape."""
        name = self.full(name)
        if name not in self._checkpoint:
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        self._used.add(name)
        array = self._checkpoint.tensor(name)
        if shape is not None and array.shape != shape:
            raise CheckpointError(f"{self.path}: tensor {name} has shape {array.shape}, but must have {shape}")
        return array

    def leave(self, name):
        """Say of a tensor that it may be there though nothing reads it."""
        self._used.add(self.full(name))

    def check_all_used(self):
        """Tensors that nobody asked for would change what the block computes."""
        for name in self._checkpoint:
            if name.startswith(f"{self._block}.") and name not in self._used:
                raise CheckpointError(f"{self.path}: tensor {name} is not known for this model_type")


def _vector(reader, name, size):
    """(size,) float32; a leading axis of one is left out."""
    tensor = reader.tensor(name)
    if tensor.shape not in ((size,), (1, size)):
        raise CheckpointError(
            f"{reader.path}: tensor {reader.full(name)} has shape {tensor.shape}, but must have ({size},)"
        )
    return np.array(tensor, np.float32).reshape(size)


def _width(reader, name, rows):
    """Columns of a matrix with so many rows; at least one."""
    shape = reader.tensor(name).shape
    if len(shape) != 2 or shape[0] != rows or shape[1] == 0:
        raise CheckpointError(f"{reader.path}: tensor {reader.full(name)} has shape {shape}, but must have ({rows}, S)")
    return shape[1]


def _router_arrays(reader, family, config):
    logits = config.num_experts + config.num_identity_experts
    arrays = {"router_weight": np.array(reader.tensor(family.router, (logits, config.input_dim)), np.float32)}
    if config.router_bias:
        arrays["router_bias"] = _vector(reader, family.router_bias, logits)
    if config.selection_bias:
        name = next(filter(reader.has, family.selection_bias), family.selection_bias[0])
        arrays["e_score_correction_bias"] = _vector(reader, name, logits)
    return arrays


def _expert_arrays(reader, stored, config):
    """up, down and their biases, in the layout of the config."""
    experts, h, f = config.num_experts, config.input_dim, config.hidden_dim
    activation = ACTIVATIONS[config.activation]
    rows = f * activation.projections
    dtype = FORMATS[config.dtype].values
    up_shape, down_shape = (rows, h), (h, f)
    if config.transposed:
        up_shape, down_shape = up_shape[::-1], down_shape[::-1]
    if "{e}" in stored.up:
        arrays = _gather(reader, stored, experts, up_shape, down_shape, dtype)
        _leave_identity_experts(reader, stored, config)
    else:
        arrays = [
            _stacked(reader, name, (experts, *shape), dtype)
            for name, shape in ((stored.up, up_shape), (stored.down, down_shape))
        ]
    arrays = {f"{activation.up_name}_proj": arrays[0], "down_proj": arrays[1]}
    if config.bias:
        arrays[f"{activation.up_name}_bias"] = np.array(reader.tensor(stored.up_bias, (experts, rows)), np.float32)
        arrays["down_bias"] = np.array(reader.tensor(stored.down_bias, (experts, h)), np.float32)
    return arrays


def _gather(reader, stored, experts, up_shape, down_shape, dtype):
    """[up (E, F or 2F, H), down (E, H, F)] from a tensor for each expert, without a second copy of any two."""
    for e in range(experts):  # before memory is taken for what may not be there
        _parts_of_expert(reader, stored, e, up_shape, down_shape)
    up, down = (aligned_empty((experts, *shape), dtype) for shape in (up_shape, down_shape))
    for e in range(experts):
        _copy_expert(reader, stored, e, up[e], down[e])
    return [up, down]


def _leave_identity_experts(reader, stored, config):
    """transformers writes first projections of identity experts too (LongCat)."""
    for e in range(config.num_experts, config.num_experts + config.num_identity_experts):
        for name in (stored.gate, stored.up):
            if name is not None:
                reader.leave(name.format(e=e))


def _copy_expert(reader, stored, e, up, down):
    *parts, last = _parts_of_expert(reader, stored, e, up.shape, down.shape)
    for target, part in zip(np.split(up, len(parts)), parts, strict=True):
        target[...] = part
    down[...] = last


def _parts_of_expert(reader, stored, e, up_shape, down_shape):
    """The tensors of one expert, mapped: gate and up or only up, and down."""
    rows, width = up_shape
    names = [stored.up] if stored.gate is None else [stored.gate, stored.up]
    parts = [reader.tensor(name.format(e=e), (rows // len(names), width)) for name in names]
    return [*parts, reader.tensor(stored.down.format(e=e), down_shape)]


def _stacked(reader, name, shape, dtype):
    """The mapped tensor itself, or a copy in another dtype."""
    if reader.tensor(name, shape).dtype == dtype:
        return reader.tensor(name)
    copy = aligned_empty(shape, dtype)
    for e in range(len(copy)):
        # Mapped anew for each expert: what was read of a mapping counts as the process's memory while it lasts.
        copy[e] = reader.tensor(name)[e]
    return copy


def _shared_arrays(reader, stored, gate, config):
    """The shared expert's up and down in the layout of the config, and its gate's weight."""
    activation = ACTIVATIONS[config.activation]
    rows = activation.projections * config.shared_hidden_dim
    dtype = FORMATS[config.dtype].values
    up = aligned_empty((rows, config.input_dim), dtype)
    down = aligned_empty((config.input_dim, config.shared_hidden_dim), dtype)
    _copy_expert(reader, stored, 0, up, down)
    arrays = {f"shared_{activation.up_name}_proj": up, "shared_down_proj": down}
    if config.shared_gate:
        arrays["shared_gate_weight"] = np.array(reader.tensor(gate, (1, config.input_dim)), np.float32)
    return arrays
