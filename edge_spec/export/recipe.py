"""Recipes: how the weights of an export are stored."""

from __future__ import annotations

from dataclasses import dataclass

from edge_spec.errors import UsageError
from edge_spec.formats.gguf import TensorTable

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that MatMulNBits takes, largest first."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the matrices of an export are stored.

    `block` weights share a scale; a matrix whose row length it does not divide takes the largest smaller one that does.
    `exact` carries Q4_0 and Q8_0 tensors over bit for bit (blocks of 32); the others are stored as `bits` and `block`
    say. With `zero_points` a block's levels need not lie evenly around 0. `corrected`: rounding
    makes up for its errors (see `correct`), where the source's tokenizer and template can read the calibration text.
    `head_rows`, if not 0, trims the output head to about as many tokens: for drafts only.
    """

    name: str
    bits: int
    block: int
    exact: bool = False
    zero_points: bool = False
    corrected: bool = False
    head_rows: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"bits={self.bits}: the weights of an export have 4 or 8 bits")
        if self.block not in BLOCKS:
            raise UsageError(f"block={self.block}: choose one of {', '.join(map(str, sorted(BLOCKS)))}")

    def block_for(self, row_length: int) -> int:
        """Largest block, at most the recipe's, that divides a row; UsageError if there is none."""
        for block in BLOCKS:
            if block <= self.block and row_length % block == 0:
                return block
        raise UsageError(f"rows of {row_length} weights do not divide into blocks of {BLOCKS[-1]}")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("int4", bits=4, block=128, zero_points=True),
        # Small blocks: at 8 bits the error is that of the activations, which share the blocks of the weights.
        Recipe("int8", bits=8, block=32),
        Recipe("exact", bits=8, block=32, exact=True),
        Recipe("draft", bits=4, block=128, zero_points=True, head_rows=32768),
        # Closer to its source, but the model has to read a text first: over a minute, where int4 takes half of one.
        Recipe("int4-accurate", bits=4, block=128, zero_points=True, corrected=True),
        # Fewer scales to read and to apply: quicker passes, at a worse perplexity than int4's.
        Recipe("int4-fast", bits=4, block=256, zero_points=True, corrected=True),
        # Round to nearest and no more: what other recipes' passes and quality are measured against.
        Recipe("int4-plain", bits=4, block=128),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; UsageError names the ones there are."""
    try:
        return RECIPES[name]
    except KeyError:
        raise UsageError(f"no recipe {name!r}; there are {', '.join(RECIPES)}") from None


def default_recipe(source: TensorTable) -> Recipe:
    """4 bits for a source of up to 6 bits a weight, else 8, so that a careful quantisation is not thrown away.

    Counted over the layers' matrices: in a small model the embedding, often stored finer, would hide what they are.
    """
    matrices = [t for name, t in source.tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
    bits = 8 * sum(t.n_bytes for t in matrices) / max(1, sum(t.n_elements for t in matrices))
    return RECIPES["int4" if bits <= 6 else "int8"]
