"""Training as a textbook would write it: one process, no FSDP, no packing, nothing of the script.

Each document is run through the model alone, so nothing here has to be masked; the losses of a step
are summed over its targets and divided by their number; AdamW and the schedule are spelled out.
"""

import math

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def documents_of(row, marks) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The documents of one row, cut before each mark of a first token (bit 1): tokens, and whether
    each is to be predicted (bit 2)."""
    cuts = np.flatnonzero(marks & 1).tolist() + [len(row)]
    return [(torch.tensor(row[a:b].astype(np.int64)), torch.tensor(marks[a:b] & 2) > 0)
            for a, b in zip(cuts, cuts[1:], strict=False)]


def train(model_folder, tokens, marks, *, order, lr, warmup, floor=0.1, decay=0.01, clip=1.0):
    """Train on `order`, the row indices of each step; returns losses, norms and the model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.train()
    parameters = dict(model.named_parameters())
    first = {n: torch.zeros_like(p) for n, p in parameters.items()}
    second = {n: torch.zeros_like(p) for n, p in parameters.items()}
    losses, norms = [], []
    for step, rows in enumerate(order):
        total, count = 0.0, 0
        for row in rows:
            for document, wanted in documents_of(tokens[row], marks[row]):
                if wanted[1:].any():
                    logits = model(document[None]).logits[0, :-1]
                    chosen = torch.log_softmax(logits, dim=-1).gather(1, document[1:, None])
                    total = total - chosen[wanted[1:]].sum()
                    count += int(wanted[1:].sum())
        loss = total / count
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())),
                             strict=True))
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
        scale = min(1.0, clip / (norm + 1e-6))
        if step < warmup:
            rate = lr * (step + 1) / warmup
        else:
            angle = math.pi * (step - warmup) / (len(order) - warmup)
            rate = lr * (floor + (1 - floor) * (1 + math.cos(angle)) / 2)
        with torch.no_grad():
            for name, parameter in parameters.items():
                gradient = gradients[name] * scale
                parameter *= 1 - rate * (decay if parameter.ndim > 1 else 0)
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.95 * second[name] + 0.05 * gradient**2
                mean = first[name] / (1 - 0.9 ** (step + 1))
                spread = (second[name] / (1 - 0.95 ** (step + 1))).sqrt()
                parameter -= rate * mean / (spread + 1e-8)
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, model
