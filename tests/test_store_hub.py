"""The hub source against a small server on this machine that speaks as much of the hub as a download needs."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge_spec.errors import DownloadError, UsageError
from edge_spec.store import Store, hub
from edge_spec.store.hub import HubSource, parse_reference
from tests.store_fixtures import CONTENT, Scripted, rest, store_with

SOURCE = HubSource(repo="owner/repo", file="tiny.gguf")
REF = "owner/repo:tiny.gguf"
COMMIT = "c" * 40
SHA = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Hub:
    """What the server has and does, and which ranges it was asked for."""

    etag: str = SHA
    content: bytes = CONTENT
    cut_after: list[int] = field(default_factory=list)
    """Each answer is broken off after so many bytes, in turn; then they are whole."""
    takes_ranges: bool = True
    status: int | None = None
    ranges: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def start(self, status: int, length: int, **headers: str) -> None:
            self.send_response(state.status or status)
            self.send_header("ETag", f'"{state.etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(length))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def do_HEAD(self) -> None:
            self.start(200, len(state.content))

        def do_GET(self) -> None:
            if "/resolve/" not in self.path:
                # The library also asks for a list of its own.
                self.send_error(404)
                return
            asked = self.headers["Range"]
            state.ranges.append(asked)
            state.paths.append(self.path)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if state.takes_ranges else 0
            body = state.content[start:]
            total = len(state.content)
            if state.takes_ranges:
                self.start(206, len(body), Content_Range=f"bytes {start}-{total - 1}/{total}")
            else:
                self.start(200, len(body))
            if state.cut_after:
                self.wfile.write(body[: state.cut_after.pop(0)])
                self.close_connection = True
            else:
                self.wfile.write(body)

    return Handler


@contextlib.contextmanager
def serving(state: Hub) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # Retries wait for half a second and more; the server here is back at once.
    monkeypatch.setattr("time.sleep", lambda _: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    state = Hub()
    with serving(state) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield state


def test_a_manifests_hub_file_is_fetched_from_the_pinned_commit(tmp_path: Path, served: Hub) -> None:
    assert store_with(tmp_path, SOURCE).pull("tiny").path.read_bytes() == CONTENT
    assert served.ranges == ["bytes=0-"]
    assert COMMIT in served.paths[0]


def test_a_remainder_is_continued_by_range(tmp_path: Path, served: Hub) -> None:
    partial = tmp_path / "models" / "tiny" / "tiny.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT[:1000])
    assert store_with(tmp_path, SOURCE).pull("tiny").path.read_bytes() == CONTENT
    assert served.ranges == ["bytes=1000-"]


def test_a_cut_connection_is_taken_up_where_it_broke(tmp_path: Path, served: Hub) -> None:
    served.cut_after = [3000, 2000]
    assert store_with(tmp_path, SOURCE).pull("tiny").path.read_bytes() == CONTENT
    assert served.ranges == ["bytes=0-", "bytes=3000-", "bytes=5000-"]


def test_a_hub_that_delivers_nothing_is_given_up_for_the_next_source(tmp_path: Path, served: Hub) -> None:
    served.cut_after = [100] + [0] * 50
    assert store_with(tmp_path, SOURCE, Scripted(rest)).pull("tiny").path.read_bytes() == CONTENT
    assert len(served.ranges) == 1 + hub.RETRIES


def test_a_server_without_ranges_starts_the_file_anew(tmp_path: Path, served: Hub) -> None:
    served.takes_ranges = False
    partial = tmp_path / "models" / "tiny" / "tiny.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT[:1000])
    assert store_with(tmp_path, SOURCE).pull("tiny").path.read_bytes() == CONTENT


def test_a_file_that_was_replaced_on_the_hub_is_not_downloaded(tmp_path: Path, served: Hub) -> None:
    served.etag = "a" * 64
    assert store_with(tmp_path, SOURCE, Scripted(rest)).pull("tiny").sha256 == SHA
    assert served.ranges == []


@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_an_error_of_the_hub_falls_to_the_next_source(tmp_path: Path, served: Hub, status: int) -> None:
    served.status = status
    assert store_with(tmp_path, SOURCE, Scripted(rest)).pull("tiny").sha256 == SHA


def test_a_reference_is_pinned_by_the_hubs_hash_and_works_offline_afterwards(tmp_path: Path, served: Hub) -> None:
    store = Store(tmp_path)
    pulled = store.pull(REF)
    assert (pulled.name, pulled.sha256, pulled.path.name) == (REF, SHA, "tiny.gguf")
    served.status = 500
    assert Store(tmp_path).resolve(REF) == pulled
    assert Store(tmp_path).pull(REF) == pulled
    status = Store(tmp_path).models()[-1]
    assert (status.name, status.known, status.present) == (REF, False, True)
    assert store.remove(REF) >= len(CONTENT)
    assert REF not in [status.name for status in store.models()]


def test_a_reference_without_a_sha256_is_refused(tmp_path: Path, served: Hub) -> None:
    served.etag = "b" * 40
    with pytest.raises(DownloadError, match="sha256"):
        Store(tmp_path).pull(REF)


def test_a_hub_that_refuses_connections_or_is_switched_off_falls_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    store_with(tmp_path / "refused", SOURCE, Scripted(rest)).pull("tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    notes: list[str] = []
    store_with(tmp_path / "offline", SOURCE, Scripted(rest)).pull("tiny", note=notes.append)
    assert "ffline" in notes[0]


def test_a_hub_that_never_answers_is_left_after_the_contact_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "CONTACT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        store_with(tmp_path, SOURCE, Scripted(rest)).pull("tiny")


def test_a_name_resolution_that_hangs_is_left_after_the_contact_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(hub, "CONTACT_S", 0.1)
    monkeypatch.setattr(HubSource, "_metadata", lambda self: released.wait(30))
    began = time.monotonic()
    store_with(tmp_path, SOURCE, Scripted(rest)).pull("tiny")
    released.set()
    assert time.monotonic() - began < 20


def test_a_reference_names_owner_repository_and_file() -> None:
    assert parse_reference("Owner/repo.x:sub/file.Q4.gguf") == HubSource(repo="Owner/repo.x", file="sub/file.Q4.gguf")


@pytest.mark.parametrize("text", ["name", "a/b", "a/b/c.gguf", "a/b:c.bin", "/a/b:c.gguf", "C:/m/x.gguf", "C:\\x.gguf"])
def test_other_texts_are_no_references(text: str) -> None:
    assert parse_reference(text) is None


@pytest.mark.parametrize("text", ["a/b:../c.gguf", "a/b:x/./c.gguf", "a/b:/c.gguf", "a/b:m-00001-of-00003.gguf"])
def test_references_out_of_the_repository_or_to_a_split_file_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)
