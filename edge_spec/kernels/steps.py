"""The steps of a pass, one after the other, as structures of the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Array, Structure, pointer
from typing import Any

from numpy.typing import NDArray

from edge_spec.export.architecture import DecoderConfig
from edge_spec.kernels.held import Floats, Held
from edge_spec.kernels.library import (
    Activation,
    Attention,
    Cap,
    Gate,
    Kind,
    Matrix,
    Multiply,
    Norm,
    Reach,
    Rows,
    Step,
    Top,
)
from edge_spec.kernels.matrices import Matrices


class Steps:
    """The steps of a decoder, in the order in which they are added."""

    def __init__(self, config: DecoderConfig, matrices: Matrices, held: Held) -> None:
        self._config, self._matrices, self._held = config, matrices, held
        self._added: list[tuple[Kind, Structure]] = []

    def made(self) -> Array[Step]:
        """All of them, as the kernels take them."""
        return (Step * len(self._added))(*(Step(kind, ctypes.addressof(of)) for kind, of in self._added))

    def norm(
        self,
        name: str,
        x: Floats,
        branch: Floats | None,
        *,
        sums: Sequence[Floats],
        out: Floats,
        rows: Rows,
        consumers: Sequence[str],
    ) -> Floats:
        """Norm of x + branch, quantised for the matrices that take it; returns the sum, which is in one of `sums`."""
        total = x if branch is None else next(array for array in sums if array is not x)
        of = Norm(
            x=self._held.at(x),
            branch=None if branch is None else self._held.at(branch),
            gain=self._matrices.vector(f"{name}.weight"),
            sum=None if branch is None else self._held.at(total),
            out=self._held.at(out),
            width=self._config.hidden,
            x_stride=x.shape[1],
            rows=rows,
            epsilon=self._config.rms_epsilon,
        )
        self._set_levels(of, "normed", consumers)
        self._add(Kind.NORM, of)
        return total

    def post_norm(self, name: str, branch: Floats, rows: Rows) -> None:
        """RMS norm of a branch before it joins the residual stream, in architectures that have it."""
        if self._config.traits.post_norms:
            place, width = self._held.at(branch), self._config.hidden
            gain, epsilon = self._matrices.vector(f"{name}.weight"), self._config.rms_epsilon
            of = Norm(x=place, gain=gain, out=place, width=width, x_stride=width, rows=rows, epsilon=epsilon)
            self._add(Kind.NORM, of)

    def gate(
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
            gate=self._held.at(gate),
            up=None if up is None else self._held.at(up),
            stride=gate.strides[0] // 4,
            activation=activation,
            rows=rows,
        )
        self._set_levels(of, source, [consumer])
        self._add(Kind.GATE, of)

    def attend(self, layer: int, qkv: Floats, out: Floats, states: Floats) -> Attention:
        """Keys and values into the cache, then attention; the cache's place is still to be filled in."""
        config, block = self._config, f"blk.{layer}."
        norms = config.traits.qk_norm
        of = Attention(
            qkv=self._held.at(qkv),
            query_norm=self._matrices.vector(f"{block}attn_q_norm.weight") if norms else None,
            key_norm=self._matrices.vector(f"{block}attn_k_norm.weight") if norms else None,
            out=self._held.at(out),
            states=self._held.at(states),
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
        self._add(Kind.CACHE, of)
        self._add(Kind.ATTEND, of)
        return of

    def multiply(self, products: Sequence[tuple[str, str, Floats]], rows: Rows) -> None:
        """Products of the same rows: a projection's name, what it is applied to, and where its product goes."""
        made = [matrix for product in products for matrix in self._matrices.of(*product)]
        matrices = self._held.keep((Matrix * len(made))(*made))
        self._add(Kind.MULTIPLY, Multiply(matrices=matrices, n_matrices=len(made), rows=rows))

    def cap(self, logits: Floats, n: int) -> None:
        """Bounds for the first `n` of each row, in architectures that have them."""
        if cap := self._config.logit_softcap:
            self._add(Kind.CAP, Cap(x=self._held.at(logits), n=n, stride=logits.shape[1], cap=cap))

    def reach(self, normed: Floats, out: Floats) -> Reach:
        """Scores of tokens beside a trimmed head; their columns are still to be filled in."""
        cap, stride = self._config.logit_softcap, out.strides[0] // 4
        of = Reach(x=self._held.at(normed), out=self._held.at(out), width=normed.shape[1], stride=stride, cap=cap)
        self._add(Kind.REACH, of)
        return of

    def top(self, logits: Floats, n: int, largest: Floats, places: NDArray[Any], log_sums: Floats) -> Top:
        """The likeliest of the first `n` of each row."""
        of = Top(
            x=self._held.at(logits),
            largest=self._held.at(largest),
            log_sum=self._held.at(log_sums),
            places=self._held.at(places),
            n=n,
            stride=logits.shape[1],
            k=largest.shape[1],
        )
        self._add(Kind.TOP, of)
        return of

    def _set_levels(self, of: Norm | Gate, source: str, consumers: Sequence[str]) -> None:
        """Quantise what a step makes for the projections that take it."""
        levels = self._matrices.levels(source, consumers)
        assert len(levels) <= len(of.levels), "a matrix is stored in at most two ways"
        for i, form in enumerate(levels):
            of.levels[i] = pointer(form)

    def _add(self, kind: Kind, of: Structure) -> None:
        self._added.append((kind, of))
