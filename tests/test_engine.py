"""The engine on tiny random models: from names to text, whatever drafts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_spec import Engine, FinishReason, SamplingParams
from edge_spec.backends.native import NativeModel
from edge_spec.backends.onnx import OnnxModel
from edge_spec.errors import (
    ContextLengthError,
    ModelNotFoundError,
    UnsupportedArchitectureError,
    UsageError,
    VocabMismatchError,
)
from edge_spec.types import Output
from tests.tiny_models import tiny_vocabulary, write_tiny_gguf

PROMPTS = ("def merge", "list of the list of the list", "Is it sorted? Is it in order?", "ä é 日 🙂")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, a draft that mostly agrees with it, and the store that they are exported into."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "target.gguf", n_vocab=512)
    # The same weights, stored with fewer bits: agrees often enough to be worth a test, and not always.
    shutil.copy(folder / "target.gguf", folder / "draft.gguf")
    write_tiny_gguf(folder / "other.gguf", n_vocab=512, seed=1)
    return folder


@pytest.fixture(autouse=True)
def _home(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(models / "home"))


@pytest.fixture(scope="module", params=["native", "onnx"])
def backend(request: pytest.FixtureRequest) -> str:
    """Those that run exports, and need nothing beside what the tests have."""
    return str(request.param)


@pytest.fixture(scope="module")
def engine(models: Path, backend: str) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_SPEC_HOME", str(models / "home"))
        with Engine.load(
            target=models / "target.gguf", draft=models / "draft.gguf", recipe="int8", threads=1, backend=backend
        ) as loaded:
            yield loaded


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every pass of a model, as (its name, tokens read)."""
    passes: list[tuple[str, int]] = []
    for model in (NativeModel, OnnxModel):
        _record(monkeypatch, model, passes)
    return passes


def _record(monkeypatch: pytest.MonkeyPatch, model: Any, passes: list[tuple[str, int]]) -> None:
    original = model.decode

    def record(self: Any, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Any:
        passes.append((self.spec.name, len(tokens)))
        return original(self, tokens, rows=rows, want=want)

    monkeypatch.setattr(model, "decode", record)


# What is written


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_the_same_for_every_drafter(engine: Engine, prompt: str) -> None:
    plain = engine.generate(prompt, max_tokens=40, drafter="none")
    for drafter in ("lookup", "model", "auto"):
        result = engine.generate(prompt, max_tokens=40, drafter=drafter)
        assert result.token_ids == plain.token_ids, drafter
        assert result.text == plain.text


def test_the_draft_saves_passes_of_the_target(engine: Engine) -> None:
    result = engine.generate(PROMPTS[0], max_tokens=40, drafter="model")
    assert result.accepted > 0
    assert result.steps < result.generated_tokens
    assert result.drafters["model"].accepted == result.accepted


def test_the_same_seed_writes_the_same_text(engine: Engine) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5)
    one, two = (engine.generate(PROMPTS[0], max_tokens=30, sampling=sampling) for _ in range(2))
    other = engine.generate(PROMPTS[0], max_tokens=30, sampling=SamplingParams(temperature=1.0, seed=6))
    assert one.token_ids == two.token_ids != other.token_ids


def test_a_stream_gives_the_text_of_the_result_in_pieces(engine: Engine) -> None:
    stream = engine.stream(PROMPTS[1], max_tokens=30)
    with pytest.raises(UsageError, match="has not ended"):
        _ = stream.result
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == stream.result.text
    assert [token for piece in pieces for token in piece.token_ids] == stream.result.token_ids


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    whole = engine.generate(PROMPTS[1], max_tokens=40)
    stop = whole.text[len(whole.text) // 2 :][:3]
    result = engine.generate(PROMPTS[1], max_tokens=40, stop=[stop])
    assert result.finish_reason is FinishReason.STOP_STRING
    assert result.text == whole.text[: whole.text.index(stop)]


def test_the_figures_add_up(engine: Engine, backend: str) -> None:
    result = engine.generate(PROMPTS[0], max_tokens=25, drafter="model")
    assert result.finish_reason is FinishReason.LENGTH
    assert result.generated_tokens == len(result.token_ids) == 25
    assert result.steps + result.accepted == 25
    assert result.drafted >= result.accepted
    assert result.acceptance_rate == pytest.approx(result.accepted / result.drafted)
    assert result.tokens_per_step == pytest.approx(25 / result.steps)
    assert sum(stats.steps for stats in result.drafters.values()) == result.steps
    assert 0 < result.ttft_s <= result.total_s
    assert result.peak_rss_bytes > 1 << 20
    assert (result.target, result.draft, result.backend, result.recipe) == ("target", "draft", backend, "int8")


def test_a_raw_prompt_is_continued_without_a_template(engine: Engine) -> None:
    raw, chat = engine.generate("def", raw=True, max_tokens=4), engine.generate("def", max_tokens=4)
    assert raw.prompt_tokens == engine.count("def") < chat.prompt_tokens
    with pytest.raises(UsageError, match="raw"):
        engine.stream("def", raw=True, system="Be brief")


# The window


def test_a_full_window_ends_the_text_and_says_so(models: Path) -> None:
    with Engine.load(target=models / "target.gguf", drafter="lookup", n_ctx=48, threads=1) as engine:
        result = engine.generate("def", raw=True)
    assert result.finish_reason in (FinishReason.CONTEXT_FULL, FinishReason.STOP)
    if result.finish_reason is FinishReason.CONTEXT_FULL:
        assert result.prompt_tokens + result.generated_tokens == 48


def test_a_prompt_that_does_not_fit_is_refused(models: Path) -> None:
    with (
        Engine.load(target=models / "target.gguf", drafter="none", n_ctx=32, threads=1) as engine,
        pytest.raises(ContextLengthError, match="a window of 32"),
    ):
        engine.generate("word " * 40)


# Cancelling


def test_a_cancelled_stream_keeps_its_text_and_the_engine(engine: Engine) -> None:
    whole = engine.generate(PROMPTS[0], max_tokens=40)
    stream = engine.stream(PROMPTS[0], max_tokens=40)
    for piece in stream:
        if piece.token_ids:
            stream.cancel()
    assert stream.result.finish_reason is FinishReason.CANCELLED
    assert whole.text.startswith(stream.result.text)
    assert engine.generate(PROMPTS[0], max_tokens=40).token_ids == whole.token_ids


def test_cancelling_while_the_prompt_is_read_gives_no_tokens(engine: Engine) -> None:
    stream = engine.stream("word " * 70, max_tokens=5, drafter="none", on_progress=lambda _done, _total: False)
    assert list(stream) == [] or not stream.result.token_ids
    assert stream.result.finish_reason is FinishReason.CANCELLED


def test_an_abandoned_stream_leaves_a_usable_engine(engine: Engine) -> None:
    expected = engine.generate(PROMPTS[2], max_tokens=20).token_ids
    for _ in engine.stream(PROMPTS[1], max_tokens=40):
        break
    assert engine.generate(PROMPTS[2], max_tokens=20).token_ids == expected


def test_unpadded_passes_are_as_wide_as_their_rows_and_leave_nothing_behind(models: Path, backend: str) -> None:
    loading: dict[str, Any] = {"target": models / "target.gguf", "recipe": "int8", "backend": backend}
    with Engine.load(**loading, drafter="lookup", threads=1) as engine:
        model: Any = engine._target._model
        model.align_rows(4)  # whatever this machine would need
        padded = engine.generate(PROMPTS[1], max_tokens=12)
        with engine.unpadded():
            assert model.spec.row_alignment is None
            assert engine._target.count_unread([1, 2]) == 2, "what padded passes left is not used"
            assert engine.generate(PROMPTS[1], max_tokens=12, drafter="none").steps == 12
        assert model.spec.row_alignment == 4
        again = engine.stream(PROMPTS[1], max_tokens=12)
        assert engine._target.count_unread([1, 2]) == 2, "nor the other way round"
        assert [token for piece in again for token in piece.token_ids] == padded.token_ids

        with pytest.raises(KeyError), engine.unpadded():
            raise KeyError
        assert model.spec.row_alignment == 4


def test_a_model_that_does_not_pad_keeps_its_cache_when_told_not_to(models: Path) -> None:
    with Engine.load(target=models / "target.gguf", drafter="none", pad_rows=False, threads=1) as engine:
        ids = engine.generate(PROMPTS[1], max_tokens=5, raw=True).token_ids
        prompt = engine._source.tokenizer.encode(PROMPTS[1], add_bos=engine._source.tokenizer.add_bos)
        with engine.unpadded():
            assert engine._target.count_unread([*prompt, *ids[:-1]]) == 0


def test_the_passes_of_the_draft_are_told_from_what_drafting_costs_besides(engine: Engine) -> None:
    stream = engine.stream(PROMPTS[1], max_tokens=30, drafter="model")
    for _ in stream:
        pass
    assert 0 < stream.stats.draft_model_s < stream.stats.draft_s
    lookup = engine.stream(PROMPTS[1], max_tokens=30, drafter="lookup")
    for _ in lookup:
        pass
    assert lookup.stats.draft_model_s == 0 < lookup.stats.draft_s


def test_each_turn_of_a_chat_may_choose_its_drafter(engine: Engine) -> None:
    chat = engine.chat()
    assert set(chat.send(PROMPTS[0], max_tokens=8, drafter="none").drafters) == {"none"}
    assert "model" in chat.send(PROMPTS[1], max_tokens=8, drafter="model").drafters


# References


def test_a_reference_changes_the_passes_and_not_the_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engine.generate(PROMPTS[2], max_tokens=40, drafter="none")
    assert engine.generate(PROMPTS[2], max_tokens=40, reference=["is it sorted?", ""]).token_ids == plain.token_ids

    # Random models write what is no text, so a text would not be tokenised into what they write.
    monkeypatch.setattr(engine._references, "ids", lambda texts: (tuple(plain.token_ids),) if texts else ())
    # What "auto" makes of it depends on the clock, its text does not.
    assert engine.generate(PROMPTS[2], max_tokens=40, reference=["that text"]).token_ids == plain.token_ids
    helped = engine.generate(PROMPTS[2], max_tokens=40, drafter="reference", reference=["that text"])
    assert helped.token_ids == plain.token_ids
    assert helped.drafters["reference"].accepted > 0
    assert helped.steps < plain.steps
    chat = engine.chat()
    chat.send(PROMPTS[2], max_tokens=8, drafter="reference", reference=["that text"])
    assert "reference" not in chat.send(PROMPTS[2], max_tokens=8).drafters, "it was given for one turn"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reference": "a text"}, "a list of texts"),
        ({"reference": [b"bytes"]}, "a list of texts"),
        ({"reference": ["a"], "drafter": "lookup"}, "use reference or auto"),
        ({"reference": ["a"], "drafter": "none"}, "use reference or auto"),
        ({"drafter": "reference"}, "needs texts to copy from"),
    ],
)
def test_references_that_nobody_would_copy_from_are_refused(engine: Engine, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        engine.stream(PROMPTS[0], **options)


# History


def test_answers_of_the_past_save_passes_now_and_after_a_restart(models: Path) -> None:
    def load(**options: Any) -> Engine:
        return Engine.load(target=models / "target.gguf", recipe="int8", threads=1, **options)

    folder = models / "home" / "history"
    with load(drafter="lookup") as without:
        plain = without.generate(PROMPTS[2], max_tokens=40, drafter="none")
        with pytest.raises(UsageError, match="history=True"):
            without.stream("x", drafter="history")
    assert not folder.exists(), "nothing is kept unless it was asked for"
    with load(drafter="history", history=True) as first:
        assert "history" not in first.generate(PROMPTS[2], max_tokens=40).drafters
        again = first.generate(PROMPTS[2], max_tokens=40)
    with load(drafter="auto", history=True) as second:
        later = second.generate(PROMPTS[2], max_tokens=40, drafter="history")
        assert second.generate(PROMPTS[2], max_tokens=40).token_ids == plain.token_ids
    for result in (again, later):
        assert result.token_ids == plain.token_ids
        assert result.drafters["history"].accepted > 0
        assert result.steps < plain.steps
    (file,) = folder.glob("*.ids")
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_used_costs_no_answer_and_is_noted(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "home", tmp_path / "home", ignore=shutil.ignore_patterns("history"))
    (tmp_path / "home" / "history").write_text("in the way")
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    with Engine.load(target=models / "target.gguf", recipe="int8", threads=1, history=True) as engine:
        result = engine.generate(PROMPTS[2], max_tokens=20)
    assert result.generated_tokens
    assert any("was not kept for later drafts" in note for note in result.notes)


def test_the_drafter_history_needs_a_history(models: Path) -> None:
    with pytest.raises(UsageError, match="history=True"):
        Engine.load(target=models / "target.gguf", drafter="history")


# Conversations


def test_a_turn_reads_only_what_is_new(engine: Engine, decoded: list[tuple[str, int]]) -> None:
    engine.reset()
    chat = engine.chat(system="the list of the list")
    first = chat.send("is it sorted?", max_tokens=12)
    decoded.clear()
    second = chat.send("and the list?", max_tokens=1)
    read = sum(count for name, count in decoded if name == "target")
    assert second.prompt_tokens > first.prompt_tokens + first.generated_tokens
    # The new question, its marks, and the last token of the answer, which no pass has read yet.
    assert read <= second.prompt_tokens - first.prompt_tokens - first.generated_tokens + 2


def talk(engine: Engine, asked: Sequence[tuple[int, str]], **options: Any) -> list[list[int]]:
    """What is answered in several chats, each question by the number of its chat."""
    chats = [engine.chat(system="the list of the list") for _ in range(3)]
    return [chats[number].send(question, max_tokens=12, **options).token_ids for number, question in asked]


IN_TURN = [(turn % 3, f"{turn} {PROMPTS[turn % 3]} " * 5) for turn in range(9)]


@pytest.mark.parametrize("drafter", ["none", "model", "auto"])
def test_chats_in_turn_read_only_what_is_new_and_write_what_each_writes_alone(
    models: Path, engine: Engine, backend: str, decoded: list[tuple[str, int]], drafter: str
) -> None:
    alone = talk(engine, sorted(IN_TURN, key=lambda asked: asked[0]), drafter=drafter)
    expected = [alone[3 * (turn % 3) + turn // 3] for turn in range(9)]

    def count(name: str) -> int:
        return sum(count for who, count in decoded if who == name)

    with Engine.load(
        target=models / "target.gguf",
        draft=models / "draft.gguf",
        recipe="int8",
        threads=1,
        parked="64MiB",
        backend=backend,
    ) as parking:
        decoded.clear()
        assert talk(parking, IN_TURN, drafter=drafter) == expected
        read = count("target"), count("draft")
        assert parking._target.num_parked == 2
        parking.reset()
        assert parking._target.num_parked == 0
    decoded.clear()
    assert talk(engine, IN_TURN, drafter=drafter) == expected
    assert count("target") - read[0] > 500, "of six changes of chat, each some hundred tokens"
    if drafter == "model":
        assert count("draft") - read[1] > 500


@pytest.mark.parametrize("drafter", ["none", "model"])
def test_a_chat_that_drops_old_turns_parks_nothing_of_its_own(models: Path, drafter: str) -> None:
    question = "def the list of the list return "
    with Engine.load(
        target=models / "target.gguf",
        draft=models / "draft.gguf",
        recipe="int8",
        threads=1,
        n_ctx=512,
        parked="64MiB",
        drafter="model",
    ) as engine:
        sessions = [engine._target, engine._drafters["model"].session]  # type: ignore[attr-defined]
        chat, dropped = engine.chat(system="the list"), 0
        for turn in range(8):
            dropped += len(chat.send(f"{turn} {question * 3}", max_tokens=8, drafter=drafter).dropped)
            assert [session.num_parked for session in sessions] == [0, 0], turn
        assert dropped
        other = engine.chat(system="return def of other " * 8)
        other.send(question * 3, max_tokens=8, drafter=drafter)
        unread = other.prompt("more").ids
        for turn in range(8, 12):
            chat.send(f"{turn} {question * 3}", max_tokens=8, drafter=drafter)
            assert engine._target.num_parked == 1
        assert engine._target.count_unread(unread) < 40


def test_a_seed_costs_no_parked_chat_of_the_draft(models: Path) -> None:
    with Engine.load(
        target=models / "target.gguf",
        draft=models / "draft.gguf",
        recipe="int8",
        threads=1,
        parked="64MiB",
        drafter="model",
    ) as engine:
        draft = engine._drafters["model"].session  # type: ignore[attr-defined]
        chats = [engine.chat(system="the list") for _ in range(3)]
        for number, chat in enumerate(chats):
            chat.send(f"{number} {PROMPTS[number]} " * 8, max_tokens=8)
        parked = draft.num_parked
        assert parked == 2
        seeded = SamplingParams(temperature=0.7, seed=1)
        texts = [engine.generate("def the list " * 30, raw=True, max_tokens=12, sampling=seeded).text for _ in range(3)]
        assert len(set(texts)) == 1
        assert draft.num_parked >= parked


@pytest.mark.parametrize("parked", ["much", "", -1, True, 1.5])
def test_a_size_that_is_none_is_refused(models: Path, parked: Any) -> None:
    with pytest.raises(UsageError, match=r"256MiB|no size"):
        Engine.load(target=models / "target.gguf", parked=parked)


def test_a_conversation_is_what_the_template_makes_of_it(engine: Engine) -> None:
    """The kept ids stand for the same text as a fresh rendering of all the turns."""
    chat = engine.chat(system="the list")
    chat.send("is it?", max_tokens=6)
    chat.send("<|im_end|> in a question is plain text", max_tokens=6)
    prompt = chat._keeper.ask("and?", n_ctx=512, max_tokens=1).prompt.ids
    tokenizer, template = engine._source.tokenizer, engine._source.template
    fresh = template.render_ids([*chat.messages, {"role": "user", "content": "and?"}], tokenizer)
    kept, anew = (tokenizer.decode(ids, skip_special=False) for ids in (prompt, fresh))
    assert kept.replace("\ufffd", "") == anew.replace("\ufffd", "")
    end = tokenizer.encode("<|im_end|>", special=True)[0]
    assert prompt.count(end) == 1 + 3 + 2, "system, three questions and two answers end, the user's text does not"


def test_messages_hold_the_conversation_and_reset_keeps_the_system_prompt(engine: Engine) -> None:
    chat = engine.chat(system="Be brief")
    answer = chat.send("hello", max_tokens=4).text
    assert chat.messages == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": answer},
    ]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief"}]


def test_an_answer_that_was_left_stays_as_far_as_it_got(engine: Engine) -> None:
    chat = engine.chat()
    left = chat.stream(PROMPTS[0], max_tokens=30)
    first = next(iter(left))
    chat.send(PROMPTS[1], max_tokens=5)
    said = [message["content"] for message in chat.messages if message["role"] != "system"]
    assert said[:3] == [PROMPTS[0], left.result.text, PROMPTS[1]]
    assert left.result.text.startswith(first.text)
    assert left.result.finish_reason is FinishReason.CANCELLED

    again = chat.stream(PROMPTS[2], max_tokens=30)
    next(iter(again))
    chat.reset()
    again.close()
    assert [message for message in chat.messages if message["role"] != "system"] == []


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(models: Path) -> None:
    with Engine.load(target=models / "target.gguf", drafter="none", n_ctx=64, threads=1) as engine:
        chat = engine.chat()
        chat.send("hi", max_tokens=2)
        before = list(chat.messages)
        with pytest.raises(ContextLengthError):
            chat.send("word " * 60)
        assert chat.messages == before
        assert chat.send("hi", max_tokens=2).generated_tokens


# Loading


def test_a_draft_of_another_vocabulary_is_refused(models: Path, tmp_path: Path) -> None:
    tokens, _, _ = tiny_vocabulary()
    tokens[97], tokens[98] = tokens[98], tokens[97]
    path = write_tiny_gguf(tmp_path / "swapped.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    with pytest.raises(VocabMismatchError, match="token 97 is"):
        Engine.load(target=models / "target.gguf", draft=path)


def test_a_padded_tail_does_not_matter(models: Path, tmp_path: Path) -> None:
    draft = write_tiny_gguf(tmp_path / "longer.gguf", n_vocab=544)
    with Engine.load(target=models / "target.gguf", draft=draft, threads=1) as engine:
        plain = engine.generate(PROMPTS[0], max_tokens=20, drafter="none")
        assert engine.generate(PROMPTS[0], max_tokens=20, drafter="model").token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "cuda"}, "onnx, native, openvino, llama"),
        ({"drafter": "magic"}, "none, lookup, reference, history, model, cascade, auto"),
        ({"drafter": "model"}, "needs a draft model"),
        ({"drafter": "none", "draft": "draft.gguf"}, "no use for a draft"),
        ({"pair": "qwen2.5-coder"}, "not both"),
        ({"threads": 0}, "threads=0"),
        ({"n_ctx": 100_000}, "takes from 2 to 512"),
        ({"recipe": "int3"}, "int4, int8, exact"),
        ({"backend": "llama", "recipe": "int4"}, "drop the recipe"),
        ({"backend": "llama", "pad_rows": False}, "never pads"),
        ({"draft_tokens": 0}, "draft_tokens=0"),
        ({"drafter": "lookup", "draft_tokens": 3}, "no draft model"),
        ({"drafter": "lookup", "draft_backend": "onnx"}, "draft_backend is for the draft"),
        ({"draft": "draft.gguf", "draft_backend": "cuda"}, "onnx, native, openvino, llama"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(models: Path, options: dict[str, object], says: str) -> None:
    if "draft" in options:
        options = {**options, "draft": models / str(options["draft"])}
    with pytest.raises(UsageError, match=says):
        Engine.load(**{"target": models / "target.gguf", **options})  # type: ignore[arg-type]


def test_a_model_that_is_not_here_is_named_with_the_command_that_fetches_it() -> None:
    with pytest.raises(ModelNotFoundError, match=r"edge-spec pull qwen2\.5-coder-1\.5b"):
        Engine.load()


def test_an_export_loads_from_its_folder_alone(models: Path, engine: Engine, tmp_path: Path) -> None:
    from edge_spec.export import RECIPES, export_model

    folder = export_model(models / "target.gguf", RECIPES["int8"], tmp_path / "alone", sha256="0" * 64).path
    expected = engine.generate(PROMPTS[0], max_tokens=20, drafter="none")
    with Engine.load(target=folder, drafter="none", backend=engine.info.backend, threads=1) as alone:
        assert alone.generate(PROMPTS[0], max_tokens=20).token_ids == expected.token_ids
    with pytest.raises(UsageError, match="with the recipe int8, not int4"):
        Engine.load(target=folder, recipe="int4")


# llama.cpp loads what the exporter refuses.
UNKNOWN_SCALING = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5}


def test_an_architecture_that_the_exporter_does_not_know_runs_on_llama_cpp_and_says_so(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "yarn.gguf", metadata=UNKNOWN_SCALING)
    with Engine.load(target=path, drafter="lookup", threads=1) as engine:
        result = engine.generate("def", max_tokens=4)
    assert result.backend == "llama"
    assert any("YaRN" in note and "llama backend" in note for note in result.notes)


def test_an_unknown_architecture_without_llama_cpp_names_both_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    path = write_tiny_gguf(tmp_path / "yarn.gguf", metadata=UNKNOWN_SCALING)
    with pytest.raises(UnsupportedArchitectureError, match=r"edge-spec\[llama\].*known architecture"):
        Engine.load(target=path, drafter="none")


def test_both_backends_answer_through_the_same_engine(models: Path) -> None:
    with Engine.load(target=models / "target.gguf", draft=models / "draft.gguf", backend="llama", threads=1) as engine:
        plain = engine.generate(PROMPTS[0], max_tokens=20, drafter="none")
        drafted = engine.generate(PROMPTS[0], max_tokens=20, drafter="model")
    assert plain.token_ids == drafted.token_ids
    assert drafted.accepted == drafted.drafted, "a model that drafts for itself is always right"
    assert (drafted.backend, drafted.recipe) == ("llama", "gguf"), "the file does not say how it is quantised"


def test_a_draft_may_run_on_another_backend_and_both_are_named(models: Path) -> None:
    target, draft = models / "target.gguf", models / "draft.gguf"
    loading: dict[str, Any] = {"backend": "onnx", "draft_backend": "llama", "recipe": "int8"}
    with Engine.load(target=target, draft=draft, threads=1, **loading) as engine:
        plain = engine.generate(PROMPTS[0], max_tokens=20, drafter="none")
        drafted = engine.generate(PROMPTS[0], max_tokens=20, drafter="model")
    assert plain.token_ids == drafted.token_ids
    assert drafted.accepted > 0
    assert (drafted.backend, drafted.draft_backend) == ("onnx", "llama")


def test_the_package_imports_quickly_and_without_its_heavy_libraries() -> None:
    code = (
        "import sys, edge_spec\n"
        "heavy = {'onnxruntime', 'onnx', 'gguf', 'tokenizers', 'llama_cpp', 'torch', 'huggingface_hub', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_target_never_loses_tokens_to_a_recipe_for_drafts(models: Path) -> None:
    with pytest.raises(UsageError, match="for drafts, not for a target"):
        Engine.load(target=models / "target.gguf", recipe="draft", drafter="none")
