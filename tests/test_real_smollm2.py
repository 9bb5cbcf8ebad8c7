"""The whole way on a small real model: what it writes, what it reads, and what the command prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_spec import Engine, GenerationResult, SamplingParams
from edge_spec.backends import llama
from edge_spec.backends.base import CausalLM
from edge_spec.backends.onnx import OnnxModel
from edge_spec.chat_template import ChatTemplate
from edge_spec.export import RECIPES, export_model
from edge_spec.export.requantize import requantize
from edge_spec.formats.ggml import GGMLType
from edge_spec.formats.gguf import GGUFFile
from edge_spec.tokenizer import Tokenizer
from edge_spec.types import Output
from tests.exported_values import exported_values
from tests.gguf_builder import TensorSpec, metadata_of, write_gguf

pytestmark = pytest.mark.real

DRAFTERS = ("lookup", "model", "cascade", "auto")

PROMPTS = (
    "Why is the sky blue?",
    "Name the planets of the solar system.",
    "Write a Python function that adds two numbers.",
    "Give me a recipe for pancakes.",
    "Translate into French: the cat sleeps on the chair.",
    "What is a prime number?",
    "Tell me a short story about a fox and a crow.",
    "List ten animals that live in the sea.",
    "Fix this sentence: he go to school yesterday.",
    "Explain photosynthesis to a child.",
    "Write a haiku about rain.",
    "What are the days of the week?",
    "Repeat this three times: one two three four five six seven.",
    "Summarise: Ada packed her bag, took the early train and was home before the rain began.",
    "Continue the pattern: a1, b2, c3, d4,",
    "Write an SQL query that counts the rows of a table called orders.",
    "Was ist die Hauptstadt von Österreich? 🇦🇹",
    "What is 12 times 12? Show every step.",
    "Write a polite letter that cancels a subscription.",
    "def fibonacci(n):",
)

LONG_ANSWERS = (
    "Explain in detail how a bicycle stays upright.",
    "Write a long story about a lighthouse keeper.",
    "Describe the water cycle step by step.",
    "Write a Python class for a bank account with deposits and withdrawals.",
    "What should a beginner know about growing tomatoes?",
    "Tell me about the history of bread.",
    "Compare trains and aeroplanes for a journey of 500 kilometres.",
    "How does a refrigerator keep food cold?",
    "Give advice to somebody who learns to play the piano.",
    "Write a letter to a friend about a week in the mountains.",
)
"""Questions whose answers are far from their end after 50 tokens."""

FIELDS = [
    "text", "token_ids", "prompt_tokens", "generated_tokens", "finish_reason", "load_s", "ttft_s",
    "decode_tokens_per_s", "total_s", "steps", "drafted", "accepted", "acceptance_rate", "tokens_per_step", "drafters",
    "target", "draft", "backend", "recipe", "threads", "n_ctx", "peak_rss_bytes", "notes",
    "measures",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store of this module's own: the user's keeps no exports that nobody asked for."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("EDGE_SPEC_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def draft(smollm2_path: Path, home: Path) -> Path:
    """The target's file by another name, which tells the two models apart in figures."""
    path = home / "draft.gguf"
    path.symlink_to(smollm2_path)
    return path


@pytest.fixture(scope="module")
def engine(smollm2_path: Path, draft: Path) -> Iterator[Engine]:
    """8 bits, drafted for by its own 4 bits."""
    with Engine.load(target=smollm2_path, draft=draft, recipe="int8") as loaded:
        yield loaded


# The same text


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[GenerationResult]:
    return [engine.generate(prompt, max_tokens=48, drafter="none") for prompt in PROMPTS]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_text_is_bit_for_bit_what_the_target_writes_alone(
    engine: Engine, plain: list[GenerationResult], drafter: str
) -> None:
    results = [engine.generate(prompt, max_tokens=48, drafter=drafter) for prompt in PROMPTS]
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    assert [result.text for result in results] == [result.text for result in plain]
    drafted, accepted = (sum(getattr(result, name) for result in results) for name in ("drafted", "accepted"))
    assert 0 < accepted < drafted, "both outcomes of a draft must occur for the comparison to say something"


def test_the_same_seed_writes_the_same_text_and_another_seed_another(engine: Engine) -> None:
    """Whatever the caches hold: the draft, whose passes are not padded, reads the prompt anew."""
    texts = []
    for seed in (3, 3, 4):
        sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=seed)
        texts.append(engine.generate(PROMPTS[6], max_tokens=32, sampling=sampling, drafter="model").token_ids)
    assert texts[0] == texts[1] != texts[2]


# The same model as the source


def test_8_bits_pick_the_token_that_llama_cpp_picks_at_97_of_100_positions(smollm2_path: Path, tmp_path: Path) -> None:
    """At 500 positions of answers that llama.cpp wrote, both reading the same text.

    llama.cpp has the source's weights as float32, so that it rounds nothing: its own roundings of activations differ
    between processors.
    """
    with GGUFFile(smollm2_path) as gguf:
        tokenizer, template = Tokenizer.from_gguf(gguf), ChatTemplate.from_gguf(gguf)
    requantize(smollm2_path, tmp_path / "f32.gguf", "F32", pure=True, threads=2)
    theirs = llama.load(tmp_path / "f32.gguf", name="llama.cpp", n_ctx=256, threads=2)
    export = export_model(smollm2_path, RECIPES["int8"], tmp_path / "int8", sha256="0" * 64)
    ours = OnnxModel(export, name="int8", n_ctx=256, threads=1)
    same = []
    for prompt in LONG_ANSWERS:
        read = template.render_ids([{"role": "user", "content": prompt}], tokenizer)
        answer = greedy(theirs, read, 50)
        assert not tokenizer.stop_ids & set(answer), f"too short an answer: {prompt}"
        whole = read + answer
        same.append(choices(ours, whole[:-1], 50) == choices(theirs, whole[:-1], 50))
    ours.close()
    theirs.close()
    assert np.size(same) == 500
    assert np.mean(same) >= 0.97, f"the same token at {np.mean(same):.1%} of the positions"


def greedy(model: CausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens, each the most likely one after those before."""
    model.rollback(0)
    tokens = [int(model.decode(prompt).logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(model.decode(tokens[-1:]).logits.argmax()))
    return tokens


def choices(model: CausalLM, tokens: Sequence[int], count: int) -> NDArray[np.intp]:
    """The most likely token after each of the last `count` of `tokens`."""
    model.rollback(0)
    model.decode(tokens[:-count], rows=0)
    rest, width = tokens[-count:], model.spec.max_rows
    chunks = [rest[start : start + width] for start in range(0, count, width)]
    return np.concatenate([model.decode(chunk, rows=len(chunk)).logits.argmax(-1) for chunk in chunks])


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q8_0], ids=lambda kind: kind.name)
def test_an_exact_export_holds_the_values_of_real_tensors_bit_for_bit(
    smollm2_path: Path, kind: GGMLType, tmp_path: Path
) -> None:
    path = tmp_path / "one_layer.gguf"
    expected = write_first_layer(smollm2_path, path, kind)
    export = export_model(path, RECIPES["exact"], tmp_path / "out", sha256="0" * 64)
    assert export.requantized == ()
    found = dict(exported_values(export, path))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert np.array_equal(values.view(np.uint32), expected[name].view(np.uint32)), name


def write_first_layer(source: Path, path: Path, kind: GGMLType) -> Mapping[str, NDArray[np.float32]]:
    """Write the model's first layer with matrices of type `kind`; returns the values that its matrices then have.

    The embedding stays as it is, in Q8_0.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    tensors, values = [], {}
    with GGUFFile(source) as gguf:
        for name, tensor in gguf.tensors.items():
            if name.startswith("blk.") and not name.startswith("blk.0."):
                continue
            stored, raw = tensor.type, gguf.raw(name)
            if len(tensor.shape) == 2:
                if name.startswith("blk."):
                    stored, raw = kind, quantize(gguf.dequantize(name), GGMLQuantizationType(int(kind)))
                values[name] = dequantize(raw, GGMLQuantizationType(int(stored)))
            tensors.append(TensorSpec(name, tensor.shape[::-1], int(stored), raw.tobytes()))
        write_gguf(path, metadata_of(gguf) | {"llama.block_count": 1}, tensors)
    return values


# Conversations


def test_a_chat_of_three_turns_reads_only_what_is_new(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    read = dict.fromkeys((engine.info.target, "draft"), 0)
    model: Any = type(engine._target._model)
    original = model.decode

    def count(self: CausalLM, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Any:
        read[self.spec.name] += len(tokens)
        return original(self, tokens, rows=rows, want=want)

    monkeypatch.setattr(model, "decode", count)
    engine.reset()
    chat = engine.chat(system="You answer in one sentence.")
    known = drafted = 0
    for question in ("What is a fox?", "Where does it live?", "And what does it eat?"):
        read[engine.info.target] = 0
        turn = chat.send(question, max_tokens=24)
        # A later turn may have to read the last token of an answer, and the end of turn that the template writes.
        beyond = read[engine.info.target] - (turn.prompt_tokens - known + turn.drafted + turn.steps - 1)
        assert 0 <= beyond <= (2 if known else 0)
        known, drafted = turn.prompt_tokens + turn.generated_tokens, drafted + turn.drafted
    assert read["draft"] <= known + drafted, "what it reads, it reads once; where it does not pay, it reads nothing"


# The command


def test_generate_json_prints_one_object_with_the_documented_fields(
    smollm2_path: Path, draft: Path, home: Path
) -> None:
    command = [str(Path(sys.executable).with_name("edge-spec")), "generate", PROMPTS[0], "--json", "--max-tokens", "12"]
    models = ["--target", str(smollm2_path), "--draft", str(draft), "--recipe", "int8", "--backend", "onnx"]
    done = subprocess.run(
        [*command, *models],
        env={**os.environ, "EDGE_SPEC_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == FIELDS
    assert done.stdout.count("\n") == 1
    assert len(result["token_ids"]) == result["generated_tokens"] == 12
    assert (result["finish_reason"], result["backend"], result["recipe"]) == ("length", "onnx", "int8")
    assert (result["target"], result["draft"]) == (smollm2_path.stem, "draft")
    assert sum(stats["steps"] for stats in result["drafters"].values()) == result["steps"]
    assert all(stats.keys() == {"steps", "drafted", "accepted"} for stats in result["drafters"].values())
    assert result["acceptance_rate"] == pytest.approx(result["accepted"] / max(1, result["drafted"]))
    assert 0 < result["ttft_s"] < result["total_s"]
