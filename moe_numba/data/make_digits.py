"""Make digits.npy and digits_layer.safetensors anew. Needs scikit-learn and torch, which moe_numba does not.

python -m moe_numba.data.make_digits DIRECTORY

The layer is a denoiser: trained to give back an image to which Gaussian noise of standard
deviation 0.3 was added, with the Switch Transformer balance loss at weight 0.01.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import moe_numba

STEPS, BATCH, LEARNING_RATE, NOISE_STD, BALANCE_WEIGHT = 4000, 256, 2e-3, 0.3, 0.01


def forward(x, gate, w1, b1, w2, b2, top_k):
    """Dropless MoE layer, all experts computed densely; returns (y, balance loss)."""
    probs = torch.softmax(x @ gate, dim=1)
    chosen = probs.topk(top_k, dim=1)
    weights = torch.zeros_like(probs).scatter(1, chosen.indices, chosen.values / chosen.values.sum(1, keepdim=True))
    hidden = torch.relu(torch.einsum("th,ehf->tef", x, w1) + b1)
    outputs = torch.einsum("tef,efh->teh", hidden, w2) + b2
    fractions = (weights > 0).float().mean(0) / top_k
    balance = probs.shape[1] * (fractions * probs.mean(0)).sum()
    return torch.einsum("te,teh->th", weights, outputs), balance


def main(directory):
    images = (load_digits().data / 16).astype(np.float16)  # pixels 0 .. 16: exact in float16
    np.save(directory / "digits.npy", images)

    torch.manual_seed(0)
    layer = moe_numba.MoeLayer(moe_numba.MoeConfig(), seed=0)
    stacked = [np.stack([getattr(expert, name) for expert in layer.experts]) for name in ("w1", "b1", "w2", "b2")]
    parameters = [torch.tensor(a, requires_grad=True) for a in (layer.router.gate_weight, *stacked)]
    x = torch.tensor(images.astype(np.float32))
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        clean = x[torch.randint(len(x), (BATCH,))]
        y, balance = forward(clean + NOISE_STD * torch.randn_like(clean), *parameters, layer.config.top_k)
        error = ((y - clean) ** 2).mean()
        optimizer.zero_grad()
        (error + BALANCE_WEIGHT * balance).backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == STEPS - 1:
            print(f"step {step}: squared error {error:.5f}, balance loss {balance:.3f}")

    gate, w1, b1, w2, b2 = (p.detach().numpy() for p in parameters)
    layer.router.gate_weight = gate
    for e, expert in enumerate(layer.experts):
        expert.w1, expert.b1, expert.w2, expert.b2 = w1[e], b1[e], w2[e], b2[e]
    layer.save(directory / "digits_layer.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
