"""Model files from a hub repository, through huggingface_hub, resumed by byte range."""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edge_spec.errors import DownloadError, UsageError
from edge_spec.store.partial import Partial, SourceError, WrongBytesError

CONTACT_S = 8.0
"""Longest wait for the hub's first answer, name resolution included."""
READ_S = 30.0
"""Longest silence in the middle of a download."""
RETRIES = 3
"""Attempts in a row that may bring no byte before the source is given up."""
CHUNK_BYTES = 1 << 16

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[^\\:]+\.gguf)", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubFile:
    """What the hub says of a file. Size and hash are None where it does not say them."""

    commit: str
    n_bytes: int | None
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A file in a hub repository."""

    repo: str
    file: str
    revision: str = "main"

    @property
    def title(self) -> str:
        """The hub and its repository."""
        return f"hub {self.repo}"

    @property
    def scratch_bytes(self) -> int:
        """Nothing: bytes go straight into the file."""
        return 0

    def lookup(self) -> HubFile:
        """Ask the hub for the file's revision, size and sha256.

        Raises SourceError if the hub does not answer within CONTACT_S or does not have the file.
        """
        metadata = _within(CONTACT_S, self._metadata)
        # Large files have their sha256 as the etag; small ones a git hash, which pins nothing that we can check.
        etag = metadata.etag if re.fullmatch("[0-9a-f]{64}", metadata.etag or "") else None
        return HubFile(commit=metadata.commit_hash or self.revision, n_bytes=metadata.size, sha256=etag)

    def fetch(self, partial: Partial) -> None:
        """Append what is missing by range requests; a cut connection is taken up again where it broke."""
        found = self.lookup()
        if found.n_bytes not in {None, partial.n_bytes} or found.sha256 not in {None, partial.sha256}:
            raise WrongBytesError("it has another file under this name now")
        failures = 0
        while partial.missing:
            before = partial.size
            try:
                self._read_range(partial, found.commit)
            except WrongBytesError:
                raise
            except SourceError:
                failures = 0 if partial.size > before else failures + 1
                if failures >= RETRIES:
                    raise
                partial.report()
                time.sleep(0.25 * 2**failures)

    def read(self, commit: str, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` of the file from `offset` on, at a revision that `lookup` gave; SourceError if they do not come."""
        data = bytearray()
        if not n_bytes:
            return b""
        with _get(self._url(commit), offset, offset + n_bytes - 1) as (status, headers, chunks):
            if status != 206 or not headers.get("content-range", "").startswith(f"bytes {offset}-"):
                raise SourceError(f"the hub answered a request for the bytes from {offset} with status {status}")
            for chunk in chunks:
                data += chunk
                if len(data) >= n_bytes:
                    break
        if len(data) < n_bytes:
            raise SourceError(f"the connection ended {n_bytes - len(data)} bytes early")
        return bytes(data[:n_bytes])

    def _read_range(self, partial: Partial, commit: str) -> None:
        offset = partial.size
        with _get(self._url(commit), offset) as (status, headers, chunks):
            if status == 200:
                # The server takes no ranges: what it sends begins at the start.
                partial.truncate(0)
            elif status != 206 or not headers.get("content-range", "").startswith(f"bytes {offset}-"):
                raise SourceError(f"the hub answered a request for the bytes from {offset} with status {status}")
            for chunk in chunks:
                partial.append(chunk)
        if partial.missing:
            raise SourceError(f"the connection ended {partial.missing} bytes early")

    def _url(self, revision: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, self.file, revision=revision, endpoint=_endpoint())

    def _metadata(self) -> Any:
        from huggingface_hub import get_hf_file_metadata

        return get_hf_file_metadata(self._url(self.revision), timeout=CONTACT_S)


def parse_reference(ref: str) -> HubSource | None:
    """The source that `owner/repo:file.gguf` names; None if `ref` is not of that form.

    Raises UsageError for a file that cannot be used by itself.
    """
    match = _REFERENCE.fullmatch(ref)
    if match is None:
        return None
    file = match["file"]
    if any(part in {"", ".", ".."} for part in file.split("/")):
        raise UsageError(f"{ref!r}: the file has to be named by its path in the repository")
    if _SHARD.search(file):
        raise UsageError(f"{ref!r} is one piece of a split model; choose a quantisation that is a single file")
    return HubSource(repo=match["repo"], file=file)


def _endpoint() -> str | None:
    # huggingface_hub reads HF_ENDPOINT once, when it is imported; an application may set it later.
    return os.environ.get("HF_ENDPOINT") or None


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns, or SourceError once `seconds` have passed.

    A thread, since no HTTP timeout covers a name resolution that hangs; a daemon, so that it never delays the exit.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with _translated():
                outcome.append(call())
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run, name="hub-lookup", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise SourceError(f"no answer within {seconds:.0f} s")
    return outcome[0]


@contextmanager
def _get(url: str, offset: int, last: int | None = None) -> Iterator[tuple[int, Mapping[str, str], Iterator[bytes]]]:
    """Status, headers (names in lower case) and body of a GET of the bytes from `offset` on, up to `last`."""
    with _translated():
        # Public names, which the library does not mark as exported for type checkers.
        library: Any = importlib.import_module("huggingface_hub.utils")
        session = library.get_session()
        headers = library.build_hf_headers() | {
            "Range": f"bytes={offset}-{'' if last is None else last}",
            "Accept-Encoding": "identity",
        }
        # The library's session is one of requests before 1.0, and one of httpx or its successor since.
        if callable(session.stream):
            timeout = (CONTACT_S, READ_S, READ_S, CONTACT_S)
            opened = session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
        else:
            opened = session.get(url, headers=headers, timeout=(CONTACT_S, READ_S), stream=True)
        response = opened.__enter__()
    try:
        lowered = {name.lower(): value for name, value in response.headers.items()}
        yield response.status_code, lowered, _body(response)
    finally:
        opened.__exit__(None, None, None)


def _body(response: Any) -> Iterator[bytes]:
    with _translated():
        if hasattr(response, "iter_raw"):
            # In the pieces that arrive: collecting larger ones would lose what came before a cut.
            yield from response.iter_raw()
        else:
            yield from response.raw.stream(CHUNK_BYTES, decode_content=False)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn whatever the hub library raises into SourceError.

    Its HTTP client, and with it the tree of exceptions, changes between its major versions, so all are caught;
    nothing of ours runs inside.
    """
    try:
        yield
    except (SourceError, DownloadError):
        raise
    except Exception as exc:
        reason = str(exc).strip().splitlines()
        raise SourceError(f"{type(exc).__name__}: {reason[0] if reason else 'no reason given'}") from exc
