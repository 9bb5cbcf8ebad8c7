"""Laws of the native kernels' library: compiled once, checked before it is used, built again where it is damaged.

Most of them take a compiler that copies libraries which were compiled before, and writes down that it was called.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec.errors import BackendUnavailableError
from edge_spec.kernels import build
from edge_spec.kernels.build import find_compiler, load_library
from edge_spec.kernels.check import find_fault
from edge_spec.kernels.library import Attention, Kind, Multiply, Pass, Step, Team, open_library

Build = Callable[[Path], Any]

COMPILER = """
import shutil, sys, time
from pathlib import Path
if "--version" in sys.argv:
    sys.exit(print("a copier"))
with Path({log!r}).open("a") as log:
    log.write("called\\n")
time.sleep({takes})
source = {portable!r} if "-DEDGE_SPEC_PORTABLE" in sys.argv else {native!r}
shutil.copyfile(source, sys.argv[sys.argv.index("-o") + 1])
"""
LOAD = """
import sys
from pathlib import Path
from edge_spec.kernels.build import load_library
print(load_library(Path(sys.argv[1])).edge_spec_kernel().decode())
"""


@pytest.fixture(scope="module")
def portable(kernels_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels without any instructions of a processor's own."""
    folder = tmp_path_factory.mktemp("portable")
    made = folder / f"portable{build._suffix()}"
    build._compile(made, folder, (build._PORTABLE,))
    return made


@pytest.fixture(scope="module")
def native(kernels_dir: Path) -> Path:
    """The kernels that this processor gets."""
    load_library(kernels_dir)
    return next(kernels_dir.glob(f"*{build._suffix()}"))


@pytest.fixture
def anew() -> Iterator[Build]:
    """`load_library` as in a new process."""

    def load(folder: Path) -> Any:
        build._loaded.clear()
        return load_library(folder)

    yield load
    build._loaded.clear()


@pytest.fixture
def compiler(native: Path, portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the copying compiler writes to when it is called."""
    log = tmp_path / "log"
    log.touch()
    use_compiler(COMPILER.format(log=str(log), takes=0.3, native=str(native), portable=str(portable)), log, monkeypatch)
    return log


def use_compiler(program: str, beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = beside.with_name("compiler.py")
    script.write_text(program)
    monkeypatch.setenv("CC", f"{sys.executable} {script}")


def calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def kernel(library: Any) -> str:
    return str(library.edge_spec_kernel().decode())


# Products


def test_the_kernels_multiply_as_numpy_does(native: Path) -> None:
    assert find_fault(open_library(native)) is None


def test_the_portable_kernels_multiply_as_numpy_does(portable: Path) -> None:
    library = open_library(portable)
    assert kernel(library) == "portable"
    assert find_fault(library) is None


class Faulty:
    """A library that goes wrong in one kind of pass: the first product is off by the last bit."""

    def __init__(self, library: Any, rows: int) -> None:
        self._library, self._rows = library, rows

    def edge_spec_run(self, team: Any, steps: Any, n_steps: int, about: Any) -> None:
        self._library.edge_spec_run(team, steps, n_steps, about)
        if about._obj.n_rows == self._rows:
            out = Multiply.from_address(steps[0].of).matrices[0].out
            first = np.ctypeslib.as_array(ctypes.cast(out, ctypes.POINTER(ctypes.c_float)), (1,))
            first[...] = np.nextafter(first, np.float32(np.inf))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_last_bit_that_depends_on_the_pass_is_a_fault(native: Path, rows: int) -> None:
    fault = find_fault(Faulty(open_library(native), rows))
    assert fault is not None
    assert f"differ in passes of {rows} rows" in fault


def test_wrong_products_are_a_fault(native: Path) -> None:
    library = open_library(native)
    right = library.edge_spec_zero8()
    library.edge_spec_zero8 = lambda: 128 - right
    fault = find_fault(library)
    assert fault is not None
    assert "8 bits in blocks of 256 are not what they should be" in fault


# Attention


@pytest.mark.parametrize("form", ["native", "portable"])
def test_what_is_cached_in_halves_is_rounded_as_numpy_does(form: str, request: pytest.FixtureRequest) -> None:
    """To the nearest, halfway to the even one, also what is too small for all of its bits; what is too large is the
    largest then."""
    library = open_library(request.getfixturevalue(form))
    rng, dim = np.random.default_rng(0), 20
    magnitudes = np.float32(2) ** rng.integers(-27, 18, 4000).astype(np.float32)
    edges = np.array([0, -0.0, 65504, 65519, 65520, -1e9, np.inf], np.float32)
    halfway = np.arange(1, 2000, dtype=np.float32) * np.float32(2**-25)
    values = np.concatenate([magnitudes * rng.normal(size=4000).astype(np.float32), edges, halfway])
    values = np.resize(values, (len(values) // dim + 1, dim))
    expected = np.clip(values, -65504, 65504).astype(np.float16)
    # Each token attends to itself alone, so that what comes out is what was cached.
    qkv = np.concatenate([np.zeros((len(values), 2 * dim), np.float32), values], axis=1)
    out, cached = attended(library, qkv, n_head=1, dim=dim, kind=np.float16, window=1)
    np.testing.assert_array_equal(cached.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(out, expected.astype(np.float32))


@pytest.mark.parametrize("form", ["native", "portable"])
@pytest.mark.parametrize("n_head", [1, 2, 3, 5])
@pytest.mark.parametrize("dim", [16, 20, 44])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_attention_is_numpys(
    form: str, n_head: int, dim: int, kind: type[np.floating[Any]], request: pytest.FixtureRequest
) -> None:
    """Of any number of heads that share their keys, of whole vectors and a rest, over several stretches of keys."""
    rng, n = np.random.default_rng(0), 150
    qkv = rng.normal(size=(n, (n_head + 2) * dim)).astype(np.float32)
    queries = qkv[:, : n_head * dim].reshape(n, n_head, dim).astype(np.float64)
    keys, values = (qkv[:, first * dim :][:, :dim].astype(kind).astype(np.float64) for first in (n_head, n_head + 1))
    scores = np.einsum("qhd,kd->hqk", queries, keys)
    weights = np.where(np.tri(n, dtype=bool), np.exp(scores - scores.max(axis=2, keepdims=True)), 0)
    expected = np.einsum("hqk,kd->qhd", weights / weights.sum(axis=2, keepdims=True), values)
    out, _ = attended(open_library(request.getfixturevalue(form)), qkv, n_head=n_head, dim=dim, kind=kind)
    np.testing.assert_allclose(out.reshape(n, n_head, dim), expected, rtol=0, atol=2e-5)


def attended(
    library: Any, qkv: Any, *, n_head: int, dim: int, kind: type[np.floating[Any]], window: int = 0
) -> tuple[Any, Any]:
    """What the kernels' attention makes of rows of one head of keys and values, and the values as they are cached."""
    n = len(qkv)
    keys, values = np.zeros((n, dim), kind), np.zeros((n, dim), kind)
    out, states = np.zeros((n, n_head * dim), np.float32), np.zeros((n, n_head, 2), np.float32)
    attention = Attention(
        qkv=qkv.ctypes.data,
        keys=keys.ctypes.data,
        values=values.ctypes.data,
        out=out.ctypes.data,
        states=states.ctypes.data,
        n_head=n_head,
        n_kv_head=1,
        head_dim=dim,
        capacity=n,
        window=window,
        is_half=kind is np.float16,
        scale=1,
    )
    steps = (Step * 2)(*(Step(kind, ctypes.addressof(attention)) for kind in (Kind.CACHE, Kind.ATTEND)))
    library.edge_spec_run(ctypes.byref(Team(n_threads=1)), steps, 2, ctypes.byref(Pass(n_rows=n, n_threads=1)))
    return out, values


# What is built


def test_instructions_with_other_results_are_done_without(
    compiler: Path, anew: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_fault", lambda library: None if kernel(library) == "portable" else "off by one")
    assert kernel(anew(tmp_path / "kept")) == "portable"
    assert calls(compiler) == 2
    monkeypatch.setattr(build, "find_fault", find_fault)
    assert kernel(anew(tmp_path / "kept")) == "portable"
    assert calls(compiler) == 2


def test_kernels_that_are_wrong_in_every_form_are_an_error_that_tells_of_each(
    compiler: Path, anew: Build, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "find_fault", lambda library: f"{kernel(library)} is off")
    with pytest.raises(BackendUnavailableError, match=f"{kernel(open_library(native))} is off; portable is off"):
        anew(tmp_path / "kept")
    assert not list((tmp_path / "kept").glob(f"*{build._suffix()}")), "what is wrong is not kept"


def test_what_is_kept_is_not_compiled_again(compiler: Path, anew: Build, native: Path, tmp_path: Path) -> None:
    for _ in range(3):
        assert kernel(anew(tmp_path / "kept")) == kernel(open_library(native))
    assert calls(compiler) == 1
    assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {build._suffix(), ".lock"}


def test_another_processor_has_a_library_of_its_own(
    compiler: Path, anew: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for processor in ("one", "another", "one"):
        monkeypatch.setattr(build, "cpu_key", lambda processor=processor: processor)
        anew(tmp_path / "kept")
    assert calls(compiler) == 2


@pytest.mark.parametrize("kept", [0, 1, 100, 8000, -1])
def test_a_kept_library_that_is_cut_short_is_built_again(
    compiler: Path, anew: Build, tmp_path: Path, kept: int
) -> None:
    """In the loader it could end the process."""
    anew(tmp_path / "kept")
    (path,) = (tmp_path / "kept").glob(f"*{build._suffix()}")
    whole = path.read_bytes()
    path.unlink()  # what is open stays as it is
    path.write_bytes(whole[:kept])
    assert find_fault(anew(tmp_path / "kept")) is None
    assert calls(compiler) == 2
    assert path.read_bytes() == whole


def test_a_kept_library_that_cannot_be_opened_is_built_again(compiler: Path, anew: Build, tmp_path: Path) -> None:
    anew(tmp_path / "kept")
    (path,) = (tmp_path / "kept").glob(f"*{build._suffix()}")
    path.unlink()  # what is open stays as it is: its pages, cut off, would end this process at its exit
    path.write_bytes(b"of another system")
    path.rename(path.with_stem(f"{path.stem.partition('-')[0]}-{build._sum(path)}"))
    assert find_fault(anew(tmp_path / "kept")) is None
    assert calls(compiler) == 2
    assert len(list((tmp_path / "kept").glob(f"*{build._suffix()}"))) == 1


def test_two_processes_that_want_the_kernels_at_once_build_them_once(
    compiler: Path, native: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "kept")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    assert [child.communicate(timeout=60)[0].strip() for child in both] == [kernel(open_library(native))] * 2
    assert calls(compiler) == 1


# What cannot be built


def test_without_a_compiler_the_error_has_the_command_that_installs_one(
    anew: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r'pip install "edge-spec\[native\]"'):
        anew(tmp_path)


def test_the_compiler_that_is_named_comes_first_and_any_that_is_there_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "ccache 'my cc' -v")
    assert find_compiler() == ["ccache", "my cc", "-v"]
    monkeypatch.delenv("CC")
    monkeypatch.setattr(build, "find_spec", lambda name: object())
    assert find_compiler() == [sys.executable, "-m", "ziglang", "cc"]
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/gcc" if name == "gcc" else None)
    assert find_compiler() == ["/bin/gcc"]
    monkeypatch.setenv("CC", "'cc")
    with pytest.raises(BackendUnavailableError, match="is no command"):
        find_compiler()


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import sys; sys.exit('pass.c:1: out of cheese')", "out of cheese.*pip install"),
        ("import sys; sys.exit(3)", "says 'nothing'.*pip install"),
        ("", r"kernels0.*cannot open|kernels0.*no such file"),
        ("import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('text')", "kernels0"),
    ],
    ids=["complains", "fails", "does nothing", "writes something else"],
)
def test_a_compiler_that_fails_is_quoted(
    program: str, says: str, anew: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(program, tmp_path / "log", monkeypatch)
    with pytest.raises(BackendUnavailableError, match=f"(?i){says}"):
        anew(tmp_path / "kept")
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".lock"], "nothing half-made is left behind"


def test_a_compiler_that_is_not_there_is_an_error_with_a_remedy(
    anew: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(BackendUnavailableError, match="pip install"):
        anew(tmp_path / "kept")


def test_a_compiler_that_never_ends_is_given_up(anew: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler("import time; time.sleep(60)", tmp_path / "log", monkeypatch)
    monkeypatch.setattr(build, "_PATIENCE_S", 0.2)
    with pytest.raises(BackendUnavailableError, match="timed out"):
        anew(tmp_path / "kept")


def test_a_library_without_the_kernels_is_not_taken(compiler: Path, anew: Build, tmp_path: Path) -> None:
    import _ctypes

    log = tmp_path / "log"
    with pytest.MonkeyPatch.context() as patched:
        program = COMPILER.format(log=str(log), takes=0, native=_ctypes.__file__, portable=_ctypes.__file__)
        use_compiler(program, log, patched)
        with pytest.raises(BackendUnavailableError, match="has no edge_spec_run"):
            anew(tmp_path / "kept")


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(compiler: Path, anew: Build, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendUnavailableError, match=r"cannot be kept in .*file"):
        anew(tmp_path / "file" / "kept")
