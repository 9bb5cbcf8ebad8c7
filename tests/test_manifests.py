from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_spec.errors import ModelFormatError
from edge_spec.store import DEFAULT_PAIR
from edge_spec.store.hub import HubSource
from edge_spec.store.manifest import Weights, load_catalogue, manifest_folder
from edge_spec.store.wheels import WheelSource

SHA = "0" * 64
WEIGHTS = f"""
name = "m"
title = "M"
architecture = "llama"
licence = "MIT"
file = "m.gguf"
bytes = 10
sha256 = "{SHA}"
sources = []
"""
PAIR = """
name = "p"
target = "m"
draft = "m"
"""


def folder_of(tmp_path: Path, weights: str = WEIGHTS, pair: str = PAIR) -> Path:
    for kind, stem, text in (("weights", "m", weights), ("pairs", "p", pair)):
        path = tmp_path / kind / f"{stem}.toml"
        path.parent.mkdir()
        path.write_text(text)
    return tmp_path


def test_the_shipped_models_and_the_default_pair_are_known() -> None:
    catalogue = load_catalogue(manifest_folder())
    assert {"qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "smollm2-135m"} <= catalogue.weights.keys()
    pair = catalogue.pairs[DEFAULT_PAIR]
    assert (pair.target, pair.draft) == ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b")
    assert pair.sampling.temperature == 0


@pytest.mark.parametrize("weights", load_catalogue(manifest_folder()).weights.values(), ids=lambda w: w.name)
def test_every_shipped_model_has_a_licence_and_sources_that_add_up(weights: Weights) -> None:
    assert weights.licence
    assert weights.file.endswith(".gguf")
    assert weights.sources
    kinds = [type(source) for source in weights.sources]
    assert kinds == sorted(kinds, key=[HubSource, WheelSource].index), "the hub comes first"
    for source in weights.sources:
        if isinstance(source, WheelSource):
            last = weights.n_bytes - source.part_bytes * (source.parts - 1)
            assert 0 < last <= source.part_bytes


def test_no_manifest_names_a_host() -> None:
    for path in manifest_folder().rglob("*.toml"):
        assert not re.search(r"://|\.(org|com|co|io)\b", path.read_text()), path


def test_a_well_formed_folder_is_read(tmp_path: Path) -> None:
    catalogue = load_catalogue(folder_of(tmp_path, pair=PAIR + "system = 'Be brief.'\n[sampling]\ntop_k = 5\n"))
    assert catalogue.weights["m"].n_bytes == 10
    assert catalogue.pairs["p"].system == "Be brief."
    assert catalogue.pairs["p"].sampling.top_k == 5


@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS.replace("bytes = 10", "bytes = 0"),
        WEIGHTS.replace("bytes = 10", "bytes = 'ten'"),
        WEIGHTS.replace(SHA, "abc"),
        WEIGHTS.replace("m.gguf", "../m.gguf"),
        WEIGHTS.replace('name = "m"', 'name = "other"'),
        WEIGHTS.replace('licence = "MIT"', ""),
        WEIGHTS + "surprise = 1",
        WEIGHTS.replace("sources = []", "[[sources]]\nkind = 'carrier pigeon'"),
        WEIGHTS.replace("sources = []", "[[sources]]\nkind = 'hub'\nrepo = 'a/b'\nfile = 'f'\nspeed = 1"),
        "not toml",
    ],
)
def test_a_malformed_manifest_is_refused_by_its_path(tmp_path: Path, weights: str) -> None:
    with pytest.raises(ModelFormatError, match=r"m\.toml"):
        load_catalogue(folder_of(tmp_path, weights))


@pytest.mark.parametrize("pair", [PAIR.replace('draft = "m"', 'draft = "nobody"'), PAIR + "[sampling]\ntop_q = 1"])
def test_a_pair_of_unknown_models_or_options_is_refused(tmp_path: Path, pair: str) -> None:
    with pytest.raises(ModelFormatError):
        load_catalogue(folder_of(tmp_path, pair=pair))
