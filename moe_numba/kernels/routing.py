"""Router scores, softmax, top-k and capacity: steps 1 to 5 of docs/how-it-works.md."""

import numpy as np
from numba import prange

from .._jit import helper, inline, kernel
from ..simd.atomic import take_next
from ..simd.calls import call
from ..simd.target import LANES
from ..simd.vector import load, offset, pointer, store
from .projection import ROW_BLOCK, pack
from .scoring import SPARSEMIXER, normalise, score, softmax, sparsemixer, weigh

#: Tokens per piece of work: enough for full tiles, few enough to share 64 tokens among threads.
TOKEN_BLOCK = 32
#: Experts per piece of work; a multiple of the tile's columns.
EXPERT_BLOCK = 24
assert TOKEN_BLOCK <= ROW_BLOCK
#: Rows of a block of tokens.
_CONSECUTIVE = np.arange(TOKEN_BLOCK)


@inline
def top_k(keys, t, k, indices, weights):
    """The k largest of keys[t], the larger first, ties to the lower index. O(E + inserts * k).

    A row of NaN yields the indices 0 .. k - 1.
    """
    for j in range(k):
        indices[t, j] = j
        weights[t, j] = keys[t, j]
    for j in range(1, k):  # insertion sort of the first k
        _sink(indices, weights, t, j, j, keys[t, j])
    for e in range(k, keys.shape[1]):
        p = keys[t, e]
        if p > weights[t, k - 1]:
            _sink(indices, weights, t, k - 1, e, p)


@inline
def _sink(indices, weights, t, last, e, p):
    """Place expert e before the entries of the sorted row t that are smaller than p."""
    j = last
    while j > 0 and p > weights[t, j - 1]:
        indices[t, j] = indices[t, j - 1]
        weights[t, j] = weights[t, j - 1]
        j -= 1
    indices[t, j] = e
    weights[t, j] = p


@helper
def _weigh(rules, scores, keys, t, n, indices, weights):
    """Turn the keys weights[t, :n] of the chosen into their weights."""
    if rules is None:
        normalise(weights, t, n, 0.0)
    else:
        weigh(rules, scores, keys, t, n, indices, weights)


@helper
def _choose_with_room(rules, scores, keys, t, k, counts, capacity, pass_over, indices, weights):
    """Give token t its experts as `route` says; return how many slots found one."""
    best = indices[t, 0]
    found = 0
    if pass_over:
        for e in range(keys.shape[1]):
            p = keys[t, e]
            if counts[e] < capacity and (found < k or p > weights[t, k - 1]):
                _sink(indices, weights, t, min(found, k - 1), e, p)
                found = min(found + 1, k)
    else:
        for j in range(k):
            e = indices[t, j]
            if counts[e] < capacity:
                indices[t, found] = e
                weights[t, found] = keys[t, e]
                found += 1
    for j in range(found, k):
        indices[t, j] = indices[t, found - 1] if found > 0 else best
        weights[t, j] = 0.0
    _weigh(rules, scores, keys, t, found, indices, weights)
    return found


@helper
def _fill_in_order(rules, scores, keys, capacity, pass_over, indices, weights, used, counts):
    """The capacity pass: tokens in order, each takes what still has room."""
    counts[:] = 0
    k = indices.shape[1]
    for t in range(indices.shape[0]):
        full = False
        for j in range(used[t]):
            full = full or counts[indices[t, j]] >= capacity
        if full:
            used[t] = _choose_with_room(rules, scores, keys, t, k, counts, capacity, pass_over, indices, weights)
        for j in range(used[t]):
            counts[indices[t, j]] += 1


@kernel
def route(x, weight, project, noise, rules, capacity, pass_over, probs, keys, indices, weights, used, counts, scratch):
    """Route tokens to experts.

    x           (T, H) float32 tokens
    weight      (E, H) float32 router weight
    project     address of projection.project, of float32
    noise       (T, E) float32 added to the logits, or (0, 0)
    rules       Rules, or None for a softmax over the logits
    capacity    rows an expert takes; negative: no limit
    pass_over   a full expert is passed over for the next best; otherwise the slot is lost
    Writes
    probs       (T, E) float32 scores of x @ weight.T + noise
    keys        (T, E) float32 by which experts are chosen; without rules `probs` itself
    indices     (T, K) int64 chosen experts, then for unfilled slots the last chosen one
    weights     (T, K) float32 scores of the chosen, summing to 1 or as the rules say; 0 for unfilled slots
    used        (T,) int64 slots that found an expert
    counts      (E,) int64 rows per expert
    scratch     (threads that share the work, rows, EXPERT_BLOCK + at least H) float32: of a block of tokens, in
                whole groups of GROUP_ROWS, the logits, then the packed tokens
    Returns how many tokens found no expert; with no limit none is counted.

    Parallel over blocks of (tokens, experts), then of tokens. The capacity pass runs in token
    order on one thread, and only if an expert is over its limit.
    """
    tokens = x.shape[0]
    experts = weight.shape[0]
    k = indices.shape[1]
    expert_blocks = (experts + EXPERT_BLOCK - 1) // EXPERT_BLOCK
    token_blocks = (tokens + TOKEN_BLOCK - 1) // TOKEN_BLOCK

    counts[0] = 0  # until rows are counted, the number of pieces of work that threads have taken
    for worker in prange(scratch.shape[0]):
        _logits(x, weight, project, probs, token_blocks, expert_blocks, scratch, np.int64(worker), counts)
    for block in prange(token_blocks):
        first = np.int64(block) * TOKEN_BLOCK
        _select(first, min(first + TOKEN_BLOCK, tokens), noise, rules, probs, keys, indices, weights)

    counts[:] = 0
    over = False
    for t in range(tokens):
        # With a limit, a token of NaN probabilities takes no room from the others.
        used[t] = k
        if capacity >= 0 and np.isnan(weights[t, 0]):
            used[t] = 0
            indices[t, :] = 0
        for j in range(used[t]):
            e = indices[t, j]
            counts[e] += 1
            over = over or counts[e] > capacity
    if capacity >= 0 and over:
        _fill_in_order(rules, probs, keys, capacity, pass_over, indices, weights, used, counts)
    dropped = 0
    if capacity >= 0:
        for t in range(tokens):
            if used[t] == 0:
                dropped += 1
    return dropped


@helper
def _logits(x, weight, project, probs, token_blocks, expert_blocks, scratch, worker, counter):
    """Write logits into probs, a block of (tokens, experts) at a time, until none is left. counter[0] counts them."""
    tokens, width = x.shape
    experts = weight.shape[0]
    stride = scratch.shape[2] - EXPERT_BLOCK
    logits = pointer(scratch, worker * scratch.shape[1] * scratch.shape[2])
    packed = offset(logits, scratch.shape[1] * EXPERT_BLOCK)
    packed_token = -1
    while True:
        item = take_next(pointer(counter, 0), 0)
        if item >= token_blocks * expert_blocks:
            break
        t = item // expert_blocks * TOKEN_BLOCK
        e = item % expert_blocks * EXPERT_BLOCK
        rows, columns = min(TOKEN_BLOCK, tokens - t), min(EXPERT_BLOCK, experts - e)
        w = pointer(weight, e * width)
        if t != packed_token:
            # `start` of the type in experts.py: of another, Numba would compile a second `pack`.
            pack(pointer(x, t * width), width, pointer(_CONSECUTIVE, 0), rows, np.int64(0), width, packed, stride, w)
            packed_token = t
        call(project, packed, stride, rows, w, width, columns, width, 0, logits, EXPERT_BLOCK)
        for r in range(rows):
            for i in range(0, columns, LANES):
                n = min(LANES, columns - i)
                store(load(logits, r * EXPERT_BLOCK + i, n), pointer(probs, (t + r) * experts + e), i, n)


@helper
def _select(first, end, noise, rules, probs, keys, indices, weights):
    """Turn the logits of tokens first <= t < end into scores, choices and weights."""
    experts = probs.shape[1]
    k = indices.shape[1]
    noisy = noise.shape[0] > 0
    for t in range(first, end):
        if noisy:
            for e in range(experts):
                probs[t, e] += noise[t, e]
        _select_one(rules, probs, keys, t, k, indices, weights)


@helper
def _select_one(rules, probs, keys, t, k, indices, weights):
    if rules is None:
        softmax(pointer(probs, t * probs.shape[1]), 0, probs.shape[1])
        top_k(probs, t, k, indices, weights)
        normalise(weights, t, k, 0.0)
    elif rules.scoring == SPARSEMIXER:
        sparsemixer(rules.jitter, probs, t, k, indices, weights)
    else:
        score(rules, probs, keys, t)
        top_k(keys, t, k, indices, weights)
        weigh(rules, probs, keys, t, k, indices, weights)


@kernel
def softmax_rows(x):
    """Replace every row of x (T, E) by its softmax."""
    for t in prange(x.shape[0]):
        softmax(pointer(x, 0), np.int64(t) * x.shape[1], x.shape[1])
