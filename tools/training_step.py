"""Measure the memory of one real training step, and compare it with the estimate of `edge_spec.memory.training`.

    python tools/training_step.py --hidden 768 --layers 6 --sequence 256

Builds a plain decoder (RMS norms, rotary attention, a gated network) with random weights in PyTorch, runs two steps of
AdamW on the CPU, and takes the peak of anonymous memory over what the process held before the model. Needs torch;
Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from edge_spec.formats.gguf import GGMLType
from edge_spec.memory.checkpoint_families import FAMILIES, Sizes, implied_shapes
from edge_spec.memory.facts import Layer, ModelFacts, Origin
from edge_spec.memory.read_export import shaped_tensor
from edge_spec.memory.training import TrainingSettings, estimate_training

STEPS = 2
"""The optimiser makes its moments in the first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON object; 0 if done, 2 where torch is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name, default in (("hidden", 768), ("layers", 6), ("heads", 12), ("vocab", 8192), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args(arguments)
    try:
        measured = measure_step(options)
    except ModuleNotFoundError as exc:
        print(f"training_step: {exc}; install torch", file=sys.stderr)
        return 2
    settings = TrainingSettings(batch=options.batch, sequence=options.sequence, checkpointing=options.checkpointing)
    counted = estimate_training(facts_of(options), settings)
    print(json.dumps({"measured_bytes": measured, "estimated_bytes": counted.total_bytes}))
    return 0


def facts_of(options: argparse.Namespace) -> ModelFacts:
    """The facts of the decoder that is trained."""
    width = options.hidden // options.heads
    sizes = Sizes(
        options.layers,
        options.hidden,
        options.heads,
        options.heads,
        width,
        4 * options.hidden,
        options.vocab,
        4096,
        False,
    )
    shapes = implied_shapes({}, FAMILIES["llama"], sizes, "decoder")
    return ModelFacts(
        name="decoder",
        origin=Origin.CONFIG,
        architecture="llama",
        hidden=options.hidden,
        n_head=options.heads,
        n_ff=4 * options.hidden,
        n_vocab=options.vocab,
        n_ctx_train=4096,
        layers=(Layer(options.heads, width, width),) * options.layers,
        tensors={name: shaped_tensor(name, shape, GGMLType.F32) for name, shape in shapes.items()},
        config=None,
        marked_ids=np.empty(0, np.int64),
    )


def measure_step(options: argparse.Namespace) -> int:
    """Peak anonymous bytes of two steps, over what was held before the model was made."""
    import torch

    torch.manual_seed(0)
    _train(torch, argparse.Namespace(**{**vars(options), "hidden": 48, "heads": 2, "layers": 1, "vocab": 64}))
    before, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _train(torch, options)
    finally:
        done.set()
        watcher.join()
    return peak - before


def _train(torch: Any, options: argparse.Namespace) -> None:
    model = _decoder(torch, options)
    optimiser = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.randint(0, options.vocab, (options.batch, options.sequence + 1))
    for _ in range(STEPS):
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        del logits, loss
        optimiser.step()
        optimiser.zero_grad()


def _decoder(torch: Any, options: argparse.Namespace) -> Any:
    from torch.utils.checkpoint import checkpoint

    nn: Any = torch.nn
    module: Any = nn.Module
    functional = nn.functional
    hidden, heads = options.hidden, options.heads

    class Norm(module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(hidden))

        def forward(self, x: Any) -> Any:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    class Block(module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([Norm(), Norm()])
            self.inputs = nn.ModuleList([nn.Linear(hidden, hidden, bias=False) for _ in range(3)])
            self.output = nn.Linear(hidden, hidden, bias=False)
            self.gate, self.up = (nn.Linear(hidden, 4 * hidden, bias=False) for _ in range(2))
            self.down = nn.Linear(4 * hidden, hidden, bias=False)

        def forward(self, x: Any) -> Any:
            normed = self.norms[0](x)
            query, key, value = (part(normed).unflatten(-1, (heads, -1)).transpose(1, 2) for part in self.inputs)
            mixed = functional.scaled_dot_product_attention(
                _turned(torch, query), _turned(torch, key), value, is_causal=True
            )
            x = x + self.output(mixed.transpose(1, 2).flatten(2))
            normed = self.norms[1](x)
            return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))

    class Decoder(module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(options.vocab, hidden)
            self.blocks = nn.ModuleList([Block() for _ in range(options.layers)])
            self.norm, self.head = Norm(), nn.Linear(hidden, options.vocab, bias=False)

        def forward(self, ids: Any) -> Any:
            x = self.embedding(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if options.checkpointing else block(x)
            return self.head(self.norm(x))

    return Decoder()


def _turned(torch: Any, x: Any) -> Any:
    """Rotary embedding of [batch, heads, tokens, width]."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[2]).float(), 10000.0 ** (-torch.arange(half).float() / half))
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this system does not tell a process's anonymous memory")


if __name__ == "__main__":
    sys.exit(main())
