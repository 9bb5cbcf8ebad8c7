"""How much a token takes in a model's KV cache, from the file's metadata."""

from __future__ import annotations

from dataclasses import dataclass

from edge_spec.formats.gguf import GGUFArray, GGUFFile


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a token takes in the KV cache: heads of each layer, and their widths in elements."""

    architecture: str
    kv_heads: tuple[int, ...]
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        """Keys and values of one token, over all layers and heads."""
        return sum(self.kv_heads) * (self.key_dim + self.value_dim)

    @classmethod
    def read(cls, file: GGUFFile) -> CacheShape:
        """From a file's metadata; raises ModelFormatError where it lacks what every causal model has."""
        n_layer = file.hparam_int("block_count")
        heads = _by_layer(file, "attention.head_count", n_layer, default=(1,) * n_layer)
        head_dim = file.hparam_int("embedding_length") // max(1, *heads)
        return cls(
            architecture=file.architecture,
            kv_heads=_by_layer(file, "attention.head_count_kv", n_layer, default=heads),
            key_dim=file.hparam_int("attention.key_length", head_dim),
            value_dim=file.hparam_int("attention.value_length", head_dim),
        )


def _by_layer(file: GGUFFile, name: str, n_layer: int, *, default: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter that is one number, or one a layer."""
    value = file.metadata.get(file.hparam(name))
    if value is None:
        return default
    if isinstance(value, GGUFArray):
        return tuple(int(number) for number in file.get_array(file.hparam(name)))
    return (file.hparam_int(name),) * n_layer
