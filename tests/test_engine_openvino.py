"""The engine on the openvino backend: the same promises, and an answer that says where it comes from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_spec import Engine
from edge_spec.cli.status import status_line
from edge_spec.errors import BackendError
from edge_spec.export import RECIPES, export_model
from tests.tiny_models import write_tiny_gguf

pytestmark = pytest.mark.openvino

PROMPTS = ("def merge", "list of the list of the list", "Is it sorted? Is it in order?", "ä é 日 🙂")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "target.gguf", n_vocab=512)
    shutil.copy(folder / "target.gguf", folder / "draft.gguf")
    return folder


@pytest.fixture(autouse=True)
def _home(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(models / "home"))


@pytest.fixture(scope="module")
def engine(models: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_SPEC_HOME", str(models / "home"))
        with Engine.load(
            target=models / "target.gguf",
            draft=models / "draft.gguf",
            backend="openvino",
            recipe="int8",
            threads=1,
        ) as loaded:
            yield loaded


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_the_same_for_every_drafter(engine: Engine, prompt: str) -> None:
    plain = engine.generate(prompt, max_tokens=40, drafter="none")
    for drafter in ("lookup", "model", "auto"):
        result = engine.generate(prompt, max_tokens=40, drafter=drafter)
        assert result.token_ids == plain.token_ids, drafter
        assert result.text == plain.text


def test_the_result_names_the_backends_and_a_draft_runs_on_onnx(engine: Engine) -> None:
    result = engine.generate("def merge", max_tokens=4)
    assert (result.backend, result.draft_backend, result.recipe) == ("openvino", "onnx", "int8")
    assert not any("not padded" in note for note in result.notes)
    assert "openvino + onnx" in status_line(result)


def test_a_draft_can_run_beside_its_target(models: Path, engine: Engine) -> None:
    plain = engine.generate(PROMPTS[0], max_tokens=20, drafter="none")
    with Engine.load(
        target=models / "target.gguf",
        draft=models / "draft.gguf",
        backend="openvino",
        draft_backend="openvino",
        recipe="int8",
        threads=1,
    ) as both:
        drafted = both.generate(PROMPTS[0], max_tokens=20, drafter="model")
    assert drafted.token_ids == plain.token_ids
    assert drafted.accepted > 0
    assert (drafted.backend, drafted.draft_backend) == ("openvino", "openvino")


def test_chats_in_turn_write_what_each_writes_alone_and_share_the_blocks_that_they_begin_with(
    models: Path, engine: Engine
) -> None:
    system = " ".join(PROMPTS) * 3

    def talk(engine: Engine, order: list[int]) -> list[list[int]]:
        chats = [engine.chat(system=system) for _ in range(2)]
        asked = [f"{place} {PROMPTS[number]} " * 4 for place, number in enumerate([0, 1, 0, 1])]
        answers = {place: chats[place % 2].send(asked[place], max_tokens=12).token_ids for place in order}
        return [answers[place] for place in range(4)]

    expected = talk(engine, [0, 2, 1, 3])
    with Engine.load(
        target=models / "target.gguf",
        draft=models / "draft.gguf",
        backend="openvino",
        recipe="int8",
        threads=1,
        parked="16MiB",
    ) as parking:
        assert talk(parking, [0, 1, 2, 3]) == expected
        session = parking._target
        assert session.num_parked == 1
        alone = session._parking._kept[0].parked.length * session.spec.kv_bytes_per_token
        shared = parking.count(system) // 32 * 32 * session.spec.kv_bytes_per_token
        assert 0 < session.parked_bytes < alone - shared // 2


def test_what_the_library_raises_becomes_our_error(
    engine: Engine, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    def refuse(*_: object) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(openvino.Core, "compile_model", refuse)
    with pytest.raises(BackendError, match=r"loading target.*no such device"):
        Engine.load(target=models / "target.gguf", backend="openvino", threads=1)


def test_a_signal_after_models_were_closed_is_only_a_signal(models: Path, tmp_path: Path) -> None:
    """With an alternative stack for signals in place, as under `python -X faulthandler`."""
    export = export_model(models / "target.gguf", RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
    script = f"""
import gc, signal
from pathlib import Path
from edge_spec.backends.openvino import OpenVinoModel
from edge_spec.export import open_export
export = open_export(Path({str(export.path)!r}))
models = [OpenVinoModel(export, name="tiny", n_ctx=64, threads=1) for _ in range(2)]
while models:
    models.pop(0).close()
    gc.collect()
signal.signal(signal.SIGINT, lambda *_: print("handled"))
signal.raise_signal(signal.SIGINT)
"""
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "handled\n"), ran.stderr
