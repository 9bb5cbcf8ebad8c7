"""A decoder as the steps of a pass: what `pass.c` goes through, with the memory that the steps work in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from ctypes import Array, Structure, byref, pointer
from threading import Barrier
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends.alignment import round_up
from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.graph import HEAD, StoredMatrix, Weights
from edge_spec.export.quantize import unpack_levels
from edge_spec.kernels.library import (
    CHUNK,
    LANES,
    Activation,
    Activations,
    Attention,
    Cap,
    Gate,
    Kind,
    Matrix,
    Multiply,
    Norm,
    Pass,
    Reach,
    Rows,
    Step,
    Team,
    Top,
)

Floats: TypeAlias = NDArray[np.float32]
_Format = tuple[int, int]
"""How activations are quantised: in blocks of so many, the even ones first in every so many (see `Activations`)."""

_UNPACKED_ROWS = 1024
"""Rows whose zero points are unpacked at a time, so that a head's take no memory to speak of."""


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
        self._library = library
        self._config = config
        self._weights = weights
        self._mapped = mapped
        self._held: list[Any] = []
        """What structures point to."""
        self._quantised: dict[tuple[str, _Format], Any] = {}
        self._steps: list[tuple[Kind, Structure]] = []
        self._attention: list[Attention] = []
        self._reach: Reach | None = None
        self._top: Top | None = None
        self._scored, self._room, self._top_k = scored, room, top_k
        self.head_rows = sum(part.n_rows for part in weights.matrices[HEAD])
        hidden = config.hidden
        self.embeddings = self._floats(CHUNK, hidden)
        self.normed = self._floats(scored, hidden)
        self.logits = self._floats(scored, self.head_rows + room)
        self.largest = self._floats(scored, top_k)
        self.log_sums = self._floats(scored, 1)
        self.places = np.zeros((scored, top_k), np.int64)
        self._build()
        self._made: Array[Step] = (Step * len(self._steps))(
            *(Step(kind, ctypes.addressof(of)) for kind, of in self._steps)
        )
        self._pass = Pass(n_threads=threads)
        self._team = Team(n_threads=threads)
        self._workers = _started(threads - 1) if threads > 1 else None

    def bind_cache(self, keys: Sequence[NDArray[Any]], values: Sequence[NDArray[Any]], tables: dict[str, Any]) -> None:
        """Work with these from now on: keys and values of each layer [1, n_kv_head, capacity, head_dim], float32, and
        the rotary tables by name."""
        self._cache = (list(keys), list(values), tables)
        for layer, of in enumerate(self._attention):
            of.keys, of.values = keys[layer].ctypes.data, values[layer].ctypes.data
            of.capacity = keys[layer].shape[2]
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
        running: list[Future[None]] = []
        try:
            if self._workers is not None:
                running.extend(self._workers.submit(self._take_part) for _ in range(self._team.n_threads - 1))
            self._take_part()
            for other in running:
                other.result()
        except BaseException:
            self._team.abandoned = 1
            if self._workers is not None:
                wait(other for other in running if not other.cancel())
            self._team = Team(n_threads=self._team.n_threads)
            raise

    def _take_part(self) -> None:
        """Go through the steps as one of the team; the interpreter's lock is free in the meantime."""
        self._library.edge_spec_run(byref(self._team), self._made, len(self._made), byref(self._pass))

    def close(self) -> None:
        """End the threads."""
        if self._workers is not None:
            self._workers.shutdown()

    def _build(self) -> None:
        config = self._config
        hidden, heads = config.hidden, config.n_head * config.head_dim
        qkv, attended = self._floats(CHUNK, config.qkv_rows), self._floats(CHUNK, heads)
        states = self._floats(CHUNK, 2 * config.n_head)
        branch, normed = self._floats(CHUNK, hidden), self._floats(CHUNK, hidden)
        # What runs through the layers is written anew at each norm that adds to it, never where it is read.
        sums = [self._floats(CHUNK, hidden) for _ in range(2)]
        wide = config.n_ff * (2 if config.traits.fused_inputs else 1)
        gate = self._floats(CHUNK, wide)
        up = gate[:, config.n_ff :] if config.traits.fused_inputs else self._floats(CHUNK, wide)
        activation = {"silu": Activation.SILU, "gelu_tanh": Activation.GELU}[config.traits.activation]
        residual, rows = self.embeddings, Rows.EVERY
        added: Floats | None = None
        for layer in range(config.n_layer):
            block = f"blk.{layer}."
            residual = self._norm(
                f"{block}attn_norm", residual, added, sums=sums, out=normed, rows=rows, consumers=[f"{block}attn_qkv"]
            )
            self._multiply([(f"{block}attn_qkv", "normed", qkv)], rows)
            self._attend(layer, qkv, attended, states)
            is_last = layer == config.n_layer - 1
            picked = Rows.PICKED if is_last else Rows.EVERY
            rows = Rows.WANTED if is_last else Rows.EVERY  # nothing later needs the others
            self._gate("attended", attended, rows=picked, consumer=f"{block}attn_output")
            self._multiply([(f"{block}attn_output", "attended", branch)], rows)
            self._post_norm(f"{block}post_attention_norm", branch, rows)
            inputs = [f"{block}ffn_up"] if config.traits.fused_inputs else [f"{block}ffn_gate", f"{block}ffn_up"]
            residual = self._norm(
                f"{block}ffn_norm", residual, branch, sums=sums, out=normed, rows=picked, consumers=inputs
            )
            outputs = [gate] if config.traits.fused_inputs else [gate, up]
            self._multiply([(name, "normed", out) for name, out in zip(inputs, outputs, strict=True)], rows)
            self._gate("gated", gate, up, activation=activation, rows=rows, consumer=f"{block}ffn_down")
            self._multiply([(f"{block}ffn_down", "gated", branch)], rows)
            self._post_norm(f"{block}post_ffw_norm", branch, rows)
            added = branch
        self._norm("output_norm", residual, added, sums=sums, out=self.normed, rows=Rows.WANTED, consumers=[HEAD])
        self._multiply([(HEAD, "normed", self.logits)], Rows.WANTED)
        self._score()

    def _score(self) -> None:
        """What is made of the head's product."""
        cap, stride = self._config.logit_softcap, self.logits.shape[1]
        if cap:
            self._add(Kind.CAP, Cap(x=self._at(self.logits), n=self.head_rows, stride=stride, cap=cap))
        if self._room:
            beside = self.logits[:, self.head_rows :]
            out, x = self._at(beside), self._at(self.normed)
            self._reach = Reach(x=x, out=out, width=self._config.hidden, n=0, stride=stride, cap=cap)
            self._add(Kind.REACH, self._reach)
        if self._top_k:
            self._top = Top(
                x=self._at(self.logits),
                largest=self._at(self.largest),
                log_sum=self._at(self.log_sums),
                places=self._at(self.places),
                n=self.head_rows,
                stride=stride,
                k=self._top_k,
            )
            self._add(Kind.TOP, self._top)

    def _norm(
        self,
        name: str,
        x: Floats,
        branch: Floats | None,
        *,
        sums: list[Floats],
        out: Floats,
        rows: Rows,
        consumers: Sequence[str],
    ) -> Floats:
        """Norm of x + branch, quantised for the matrices that take it; returns the sum."""
        total = x if branch is None else next(array for array in sums if array is not x)
        of = Norm(
            x=self._at(x),
            branch=None if branch is None else self._at(branch),
            gain=self._vector(f"{name}.weight"),
            sum=None if branch is None else self._at(total),
            out=self._at(out),
            width=self._config.hidden,
            x_stride=x.shape[1],
            rows=rows,
            epsilon=self._config.rms_epsilon,
        )
        self._set_levels(of, "normed", consumers)
        self._add(Kind.NORM, of)
        return total

    def _post_norm(self, name: str, branch: Floats, rows: Rows) -> None:
        """RMS norm of a branch before it joins the residual stream, in architectures that have it."""
        if self._config.traits.post_norms:
            place, width = self._at(branch), self._config.hidden
            gain, epsilon = self._vector(f"{name}.weight"), self._config.rms_epsilon
            rows = Rows.EVERY if rows is Rows.EVERY else Rows.WANTED
            of = Norm(x=place, gain=gain, out=place, width=width, x_stride=width, rows=rows, epsilon=epsilon)
            self._add(Kind.NORM, of)

    def _gate(
        self,
        source: str,
        gate: Floats,
        up: Floats | None = None,
        *,
        activation: Activation = Activation.NONE,
        rows: Rows,
        consumer: str,
    ) -> None:
        """The activation of `gate` times `up`, or `gate` as it is, quantised for the matrix that takes it."""
        of = Gate(
            gate=self._at(gate),
            up=None if up is None else self._at(up),
            stride=gate.strides[0] // 4,
            activation=activation,
            rows=rows,
        )
        self._set_levels(of, source, [consumer])
        self._add(Kind.GATE, of)

    def _attend(self, layer: int, qkv: Floats, out: Floats, states: Floats) -> None:
        config, block = self._config, f"blk.{layer}."
        norms = config.traits.qk_norm
        of = Attention(
            qkv=self._at(qkv),
            query_norm=self._vector(f"{block}attn_q_norm.weight") if norms else None,
            key_norm=self._vector(f"{block}attn_k_norm.weight") if norms else None,
            out=self._at(out),
            states=self._at(states),
            n_head=config.n_head,
            n_kv_head=config.n_kv_head,
            head_dim=config.head_dim,
            rope_dim=config.rope_dim,
            interleaved=config.rope_interleaved,
            window=config.window(layer),
            epsilon=config.rms_epsilon,
            scale=config.attention_scale or config.head_dim**-0.5,
            softcap=config.attention_softcap,
        )
        self._attention.append(of)
        self._add(Kind.CACHE, of)
        self._add(Kind.ATTEND, of)

    def _multiply(self, products: Sequence[tuple[str, str, Floats]], rows: Rows) -> None:
        """Products of the same rows: a projection's name, what it is applied to, and where its product goes."""
        made = [matrix for product in products for matrix in self._matrices(*product)]
        matrices = self._keep((Matrix * len(made))(*made))
        self._add(Kind.MULTIPLY, Multiply(matrices=matrices, n_matrices=len(made), rows=rows))

    def _matrices(self, name: str, source: str, out: Floats) -> Iterator[Matrix]:
        bias = self._weights.vectors.get(f"{name}.bias")
        first = 0
        for part in self._weights.matrices[name]:
            yield Matrix(
                packed=self._span(part.packed.offset),
                scales=self._span(part.scales.offset),
                lows=self._lows(part),
                bias=None if bias is None else self._at(bias[first:]),
                out=self._at(out[:, first:]),
                input=pointer(self._activations(source, part)),
                n_rows=part.n_rows,
                width=part.row_length,
                block=part.block,
                blocks=part.row_length // part.block,
                bits=part.bits,
                stride=out.strides[0] // 4,
            )
            first += part.n_rows

    def _set_levels(self, of: Norm | Gate, source: str, consumers: Sequence[str]) -> None:
        """Quantise what a step makes in each form that the matrices which take it need."""
        parts = {_format(part): part for name in consumers for part in self._weights.matrices[name]}
        assert len(parts) <= len(of.levels), "a matrix is stored in at most two ways"
        for i, part in enumerate(parts.values()):
            of.levels[i] = pointer(self._activations(source, part))

    def _activations(self, source: str, part: StoredMatrix) -> Activations:
        """What `source` makes, quantised for a matrix; sources that are done with share it."""
        block, paired = _format(part)
        key = (f"{source} {part.row_length}", (block, paired))
        if key not in self._quantised:
            blocks = part.row_length // block
            self._quantised[key] = Activations(
                levels=self._at(np.zeros((CHUNK, part.row_length), np.int8)),
                scales=self._at(self._floats(CHUNK, blocks)),
                shares=self._at(self._floats(CHUNK, round_up(blocks, LANES))),
                width=part.row_length,
                block=block,
                paired=paired,
                blocks=blocks,
                lanes=round_up(blocks, LANES),
            )
        found: Activations = self._quantised[key]
        return found

    def _lows(self, part: StoredMatrix) -> int | None:
        """What a block's level 0 stands for, [n_rows, lanes]; None where the kernels take levels as they are meant."""
        blocks = part.row_length // part.block
        # 8-bit levels are taken as they are by some processors' kernels, and less 128 by others.
        taken_off = 0 if part.bits == 4 else 128 - self._library.edge_spec_zero8()
        middle = (1 << (part.bits - 1)) - taken_off
        if part.zeros is None and not middle:
            return None
        scales = self._mapped[part.scales.offset :][: part.scales.length].view(np.float32).reshape(-1, blocks)
        lows = self._floats(part.n_rows, round_up(blocks, LANES))
        if part.zeros is None:
            np.multiply(scales, np.float32(-middle), out=lows[:, :blocks])
            return self._at(lows)
        packed = self._mapped[part.zeros.offset :][: part.zeros.length].reshape(part.n_rows, -1)
        for first in range(0, part.n_rows, _UNPACKED_ROWS):
            rows = slice(first, first + _UNPACKED_ROWS)
            zeros = unpack_levels(packed[rows], part.bits)[:, :blocks].astype(np.float32) - taken_off
            np.multiply(scales[rows], -zeros, out=lows[rows, :blocks])
        return self._at(lows)

    def _add(self, kind: Kind, of: Structure) -> None:
        self._steps.append((kind, of))

    def _span(self, offset: int) -> int:
        return int(self._mapped.ctypes.data) + offset

    def _vector(self, name: str) -> int:
        return self._at(self._weights.vectors[name])

    def _floats(self, *shape: int) -> Floats:
        return np.zeros(shape, np.float32)

    def _at(self, array: NDArray[Any]) -> int:
        """The address of an array, which is kept alive."""
        self._held.append(array)
        return int(array.ctypes.data)

    def _keep(self, structures: Any) -> Any:
        self._held.append(structures)
        return structures


def _started(threads: int) -> ThreadPoolExecutor:
    """Threads that are there, not ones that may fail to start in a pass. RuntimeError where they cannot be had."""
    pool = ThreadPoolExecutor(threads, "edge_spec")
    together = Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(together.wait)
        together.wait()
    except BaseException:
        together.abort()
        pool.shutdown()
        raise
    return pool


def _format(part: StoredMatrix) -> _Format:
    """What a matrix takes: 4-bit weights lie in pairs, and up to 64 are unpacked at a time."""
    return part.block, 0 if part.bits == 8 else min(part.block, 64)
