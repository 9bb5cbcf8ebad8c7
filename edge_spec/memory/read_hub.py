"""Facts from a GGUF on a hub, of which only the header is fetched, by range requests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from edge_spec.errors import DownloadError
from edge_spec.export.rope import ROPE_TENSORS
from edge_spec.formats.gguf import GGUFFile
from edge_spec.formats.gguf_header import HeaderError, read_header_of
from edge_spec.memory.facts import ModelFacts
from edge_spec.memory.read_gguf import read_facts
from edge_spec.store.hub import HubSource
from edge_spec.store.partial import SourceError

FIRST_BYTES = 8 << 20
"""What is fetched at first: the header of most models, whose largest part is the vocabulary."""
MOST_BYTES = 128 << 20


def facts_of_hub(source: HubSource, *, name: str) -> ModelFacts:
    """Facts of a file on the hub. DownloadError if the hub does not deliver, else what `read_facts` raises.

    The header is put where it belongs in an otherwise empty file of the model's size, which takes no room on the disk,
    together with the small tables of rotary factors that belong to a decoder's description.
    """
    try:
        found = source.lookup()
        if not found.n_bytes:
            raise DownloadError(f"{name}: the hub does not say how large the file is")
        with tempfile.TemporaryDirectory(prefix="edge-spec-") as folder:
            path = Path(folder) / "header.gguf"
            _write_header(source, found.commit, found.n_bytes, path)
            os.truncate(path, found.n_bytes)
            with GGUFFile(path) as gguf, path.open("r+b") as file:
                for table in ROPE_TENSORS:
                    if (tensor := gguf.tensors.get(table)) is not None:
                        file.seek(tensor.offset)
                        file.write(source.read(found.commit, tensor.offset, tensor.n_bytes))
            with GGUFFile(path) as gguf:
                return read_facts(gguf, name=name, sha256=found.sha256)
    except SourceError as exc:
        raise DownloadError(
            f"{name}: its header could not be fetched ({exc}); pull the model, or give the path of a file"
        ) from exc


def _write_header(source: HubSource, commit: str, n_bytes: int, path: Path) -> None:
    """Fetch the start of the file, twice as much each time, until the header is whole."""
    data = b""
    wanted = min(FIRST_BYTES, n_bytes)
    while True:
        data += source.read(commit, len(data), wanted - len(data))
        try:
            read_header_of(data, n_bytes)
        except HeaderError:
            if wanted in (n_bytes, MOST_BYTES):
                break  # whatever is wrong, opening the file will say it
            wanted = min(2 * wanted, n_bytes, MOST_BYTES)
        else:
            break
    path.write_bytes(data)
