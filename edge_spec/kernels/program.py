"""A decoder as the steps of a pass: what `pass.c` goes through, with the memory that the steps work in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.graph import HEAD, Weights
from edge_spec.kernels.held import Floats, Held, floats
from edge_spec.kernels.library import CHUNK, Activation, Attention, Pass, Reach, Rows, Top
from edge_spec.kernels.matrices import Matrices
from edge_spec.kernels.steps import Steps
from edge_spec.kernels.team import Threads


class Program:
    """The steps of a decoder, over weights that stay where they are mapped.

    A pass reads `embeddings` [CHUNK, hidden] and writes `logits` [scored, head rows and room for reached tokens], and
    `normed` [scored, hidden], what the head is applied to; with `top_k` also `largest`, `places` and `log_sums`.
    """

    def __init__(
        self,
        library: Any,
        config: DecoderConfig,
        weights: Weights,
        mapped: NDArray[np.uint8],
        *,
        threads: int,
        scored: int,
        room: int = 0,
        top_k: int = 0,
    ) -> None:
        self._config = config
        self._scored, self._room = scored, room
        self._attention: list[Attention] = []
        self._reach: Reach | None = None
        self._top: Top | None = None
        self.head_rows = sum(part.n_rows for part in weights.matrices[HEAD])
        self.embeddings = floats(CHUNK, config.hidden)
        self.normed = floats(scored, config.hidden)
        self.logits = floats(scored, self.head_rows + room)
        self.largest = floats(scored, top_k)
        self.log_sums = floats(scored, 1)
        self.places = np.zeros((scored, top_k), np.int64)
        self._held = Held()
        self._steps = Steps(config, Matrices(library, weights, mapped, self._held), self._held)
        self._add_layers()
        self._add_scores()
        self._made = self._steps.made()
        self._pass = Pass(n_threads=threads)
        self._threads = Threads(library, threads)

    def bind_cache(self, keys: Sequence[NDArray[Any]], values: Sequence[NDArray[Any]], tables: dict[str, Any]) -> None:
        """Work with these from now on: keys and values of each layer [1, n_kv_head, capacity, head_dim], float32 or
        float16, and the rotary tables by name."""
        self._cache = (list(keys), list(values), tables)
        for layer, of in enumerate(self._attention):
            of.keys, of.values = keys[layer].ctypes.data, values[layer].ctypes.data
            of.capacity, of.is_half = keys[layer].shape[2], keys[layer].dtype == np.float16
            if names := self._config.rope_of(layer):
                of.cosines, of.sines = (tables[name].ctypes.data for name in names)

    def bind_reached(self, columns: Floats, bias: Floats) -> None:
        """Score these tokens beside a trimmed head: [hidden, n] and [n], n a multiple of 64; they may change."""
        assert self._reach is not None, "the head is whole"
        self._reached = (columns, bias)
        assert len(bias) <= self._room, "there is room for what can be reached"
        self._reach.columns, self._reach.bias, self._reach.n = columns.ctypes.data, bias.ctypes.data, len(bias)
        if self._top is not None:
            self._top.n = self.head_rows + len(bias)

    def run(self, n: int, past: int, wanted: NDArray[np.int64]) -> None:
        """One pass over the first `n` rows of `embeddings`, behind `past` tokens; `wanted` are scored.

        What interrupts it ends it for all threads.
        """
        assert n <= CHUNK, "a pass has room for no more"
        assert len(wanted) <= self._scored, "nor for more rows of logits"
        self._pass.n_rows, self._pass.past, self._pass.n_wanted = n, past, len(wanted)
        self._pass.wanted = wanted.ctypes.data
        self._threads.run(self._made, self._pass)

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    def _add_layers(self) -> None:
        config, steps = self._config, self._steps
        hidden, heads = config.hidden, config.n_head * config.head_dim
        qkv, attended = floats(CHUNK, config.qkv_rows), floats(CHUNK, heads)
        states = floats(CHUNK, 2 * config.n_head)
        branch, normed = floats(CHUNK, hidden), floats(CHUNK, hidden)
        # What runs through the layers is written anew at each norm that adds to it, never where it is read.
        sums = [floats(CHUNK, hidden) for _ in range(2)]
        wide = config.n_ff * (2 if config.traits.fused_inputs else 1)
        gate = floats(CHUNK, wide)
        up = gate[:, config.n_ff :] if config.traits.fused_inputs else floats(CHUNK, wide)
        activation = {"silu": Activation.SILU, "gelu_tanh": Activation.GELU}[config.traits.activation]
        residual, rows = self.embeddings, Rows.EVERY
        added: Floats | None = None
        for layer in range(config.n_layer):
            block = f"blk.{layer}."
            residual = steps.norm(
                f"{block}attn_norm", residual, added, sums=sums, out=normed, rows=rows, consumers=[f"{block}attn_qkv"]
            )
            steps.multiply([(f"{block}attn_qkv", "normed", qkv)], rows)
            self._attention.append(steps.attend(layer, qkv, attended, states))
            is_last = layer == config.n_layer - 1
            picked = Rows.PICKED if is_last else Rows.EVERY
            rows = Rows.WANTED if is_last else Rows.EVERY  # nothing later needs the others
            steps.gate("attended", attended, rows=picked, consumer=f"{block}attn_output")
            steps.multiply([(f"{block}attn_output", "attended", branch)], rows)
            steps.post_norm(f"{block}post_attention_norm", branch, rows)
            inputs = [f"{block}ffn_up"] if config.traits.fused_inputs else [f"{block}ffn_gate", f"{block}ffn_up"]
            residual = steps.norm(
                f"{block}ffn_norm", residual, branch, sums=sums, out=normed, rows=picked, consumers=inputs
            )
            outputs = [gate] if config.traits.fused_inputs else [gate, up]
            steps.multiply([(name, "normed", out) for name, out in zip(inputs, outputs, strict=True)], rows)
            steps.gate("gated", gate, up, activation=activation, rows=rows, consumer=f"{block}ffn_down")
            steps.multiply([(f"{block}ffn_down", "gated", branch)], rows)
            steps.post_norm(f"{block}post_ffw_norm", branch, rows)
            added = branch
        steps.norm("output_norm", residual, added, sums=sums, out=self.normed, rows=Rows.WANTED, consumers=[HEAD])
        steps.multiply([(HEAD, "normed", self.logits)], Rows.WANTED)

    def _add_scores(self) -> None:
        """What is made of the head's product."""
        self._steps.cap(self.logits, self.head_rows)
        if self._room:
            self._reach = self._steps.reach(self.normed, self.logits[:, self.head_rows :])
        if self.largest.size:
            self._top = self._steps.top(self.logits, self.head_rows, self.largest, self.places, self.log_sums)
