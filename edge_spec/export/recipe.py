"""Recipes: how the weights of an export are stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from edge_spec.errors import UsageError
from edge_spec.formats.gguf import TensorTable

FINE_BITS = 8
"""Bits of the projections that a recipe stores finer."""

PROJECTIONS = ("attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output")
"""Kinds of projections, as the graph names them; `output` makes logits."""

FINE_IN_LAYERS = ("ffn_up", "ffn_down")
"""What is stored finer in the layers that a recipe names: the gates' bytes bring half as much."""

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that MatMulNBits takes, largest first."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the matrices of an export are stored.

    `block` weights share a scale; a matrix whose row length it does not divide takes the largest smaller one that does.
    `exact` carries Q4_0 and Q8_0 tensors over bit for bit (blocks of 32); the others are stored as `bits` and `block`
    say. With `zero_points` a block's levels need not lie evenly around 0.
    `fine` names kinds of projections (`attn_qkv`, `output`, ...) that get 8 bits in all layers; in `fine_layers`, where
    negative ones count from the last, FINE_IN_LAYERS get them too. They are rounded to nearest, in the same blocks, and
    have no zero points: there is next to nothing to shift.
    `head_rows`, if not 0, trims the output head to about as many tokens: for drafts only.
    """

    name: str
    bits: int
    block: int
    exact: bool = False
    zero_points: bool = False
    head_rows: int = 0
    fine: tuple[str, ...] = ()
    fine_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"bits={self.bits}: the weights of an export have 4 or 8 bits")
        if self.block not in BLOCKS:
            raise UsageError(f"block={self.block}: choose one of {', '.join(map(str, sorted(BLOCKS)))}")
        if unknown := set(self.fine) - set(PROJECTIONS):
            raise UsageError(f"fine={', '.join(sorted(unknown))}: there are the projections {', '.join(PROJECTIONS)}")

    def to_json(self) -> dict[str, Any]:
        """Plain values for an export's metadata and its key, which stays what it was before anything was fine."""
        return {name: value for name, value in asdict(self).items() if value or not name.startswith("fine")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of `to_json`; TypeError if fields are missing or unknown."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        plain.pop("corrected", None)  # of recipes that spread a weight's error over others: the exports are as good
        return cls(**plain)

    def is_fine(self, projection: str, n_layer: int) -> bool:
        """Whether a projection of a model of `n_layer` layers (`blk.3.ffn_down`, `output`) gets 8 bits."""
        block, _, kind = projection.rpartition(".")
        fine_layers = {layer % n_layer for layer in self.fine_layers if -n_layer <= layer < n_layer}
        return kind in self.fine or (kind in FINE_IN_LAYERS and int(block.removeprefix("blk.")) in fine_layers)

    def throughout(self) -> Recipe:
        """The same for a graph whose projections have no names that are known: all alike, in blocks of at most 128,
        since long ones need the finer parts."""
        unnamed = bool(self.fine or self.fine_layers)
        return replace(self, block=min(self.block, 128), fine=(), fine_layers=()) if unnamed else self

    def block_for(self, row_length: int) -> int:
        """Largest block, at most the recipe's, that divides a row; UsageError if there is none."""
        for block in BLOCKS:
            if block <= self.block and row_length % block == 0:
                return block
        raise UsageError(f"rows of {row_length} weights do not divide into blocks of {BLOCKS[-1]}")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # Long blocks make passes quick, and 8 bits in attention more than make up for what they lose: docs/quality.md.
        Recipe("int4", bits=4, block=256, zero_points=True, fine=("attn_qkv", "attn_output")),
        # Small blocks: at 8 bits the error is that of the activations, which share the blocks of the weights.
        Recipe("int8", bits=8, block=32),
        Recipe("exact", bits=8, block=32, exact=True),
        # What its token costs and how often it is right, by block and by head: docs/performance.md.
        Recipe("draft", bits=4, block=256, zero_points=True, head_rows=12288),
        # Closer to its source, for a quarter more bytes and time. What has 8 bits won most a byte in Qwen2.5-Coder
        # 1.5B: see docs/quality.md.
        Recipe(
            "int4-accurate",
            bits=4,
            block=128,
            zero_points=True,
            fine=("attn_qkv", "attn_output", "output"),
            fine_layers=(2, 3, 4, 5, -2, -1),
        ),
        # The fewest bytes and the quickest passes, at a worse agreement and perplexity than int4's.
        Recipe("int4-fast", bits=4, block=256, zero_points=True),
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
