"""Laws of chat templates: they render as transformers does, stay in their sandbox, and users cannot forge turns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from edge_spec.chat_template import CHATML, ChatTemplate
from edge_spec.errors import ModelFormatError, UsageError
from edge_spec.formats.gguf import GGUFFile
from edge_spec.tokenizer import Tokenizer
from tests.gguf_builder import write_gguf
from tests.vocabularies import bpe_metadata, spm_metadata

USER = [{"role": "user", "content": "hi"}]
TRIMMING = CHATML.replace("message.content", "message.content | trim")
REPLACING = CHATML.replace("message.content", "message.content | replace('x', 'yy') | upper")
SPLITTING = CHATML.replace("message.content", "message.content.split('#')[-1]")


def load(tmp_path: Path, metadata: dict[str, Any]) -> tuple[ChatTemplate, Tokenizer]:
    with GGUFFile(write_gguf(tmp_path / "model.gguf", metadata)) as gguf:
        return ChatTemplate.from_gguf(gguf), Tokenizer.from_gguf(gguf)


def test_a_file_without_a_template_gets_chatml_and_says_so(tmp_path: Path) -> None:
    template, _ = load(tmp_path, bpe_metadata())
    assert template.source == "chatml"
    assert template.render(USER) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(USER, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_the_files_own_template_is_used_with_its_tokens(tmp_path: Path) -> None:
    text = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ eos_token }}"
    template, _ = load(tmp_path, bpe_metadata(extra={"tokenizer.chat_template": text}))
    assert template.source == "model"
    assert template.render(USER) == "<|endoftext|>[hi]<|im_end|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}", "hi\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'ä': '<b>'} | tojson }}", '{"ä": "<b>"}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if tools is defined %}x{% endif %}{{ undefined_thing }}", ""),
        ("{{ '{:.1f}'.format(1) }}{{ 'a\nb' | indent(2) }}{{ [1] | tojson(indent=1) }}", "1.0a\n  b[\n 1\n]"),
        ("{{ '-' * 3 }}{{ 2 * 3 + 2 ** 3 }}{{ '%s' % 'a' }}", "---14a"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ],
)
def test_templates_have_what_transformers_gives_them(text: str, expected: str) -> None:
    assert ChatTemplate(text).render(USER) == expected


def test_a_template_may_refuse_messages(tmp_path: Path) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="roles must alternate"):
        template.render(USER)


@pytest.mark.parametrize(
    "text", ["{% for %}", "{{ unclosed", "{% include 'etc' ", "{% no_such_tag %}", "{{ 1 | nope }}"]
)
def test_a_template_that_does_not_compile_is_refused(text: str) -> None:
    with pytest.raises(ModelFormatError, match="does not compile"):
        ChatTemplate(text)
    with pytest.raises(ModelFormatError, match="characters"):
        ChatTemplate("x" * (2 << 20))


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% include 'secrets' %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.missing.deeper }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 1000000000 * 'x' }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ 'a\nb' | indent(1000000000) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{% for i in range(20000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_or_failing_template_is_an_error(text: str) -> None:
    with pytest.raises(ModelFormatError):
        ChatTemplate(text).render(USER)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"content": "hi"},
        {"role": "user|>", "content": "hi"},
        {"role": "", "content": "hi"},
        {"role": "user", "content": 3},
        {"role": "user", "content": [{"type": "text"}]},
    ],
)
def test_messages_that_are_not_text_with_a_role_are_refused(message: Any) -> None:
    with pytest.raises(UsageError, match="message 0"):
        ChatTemplate(CHATML).render([message])


@pytest.mark.parametrize("text", [CHATML, TRIMMING, REPLACING, SPLITTING])
def test_harmless_messages_get_the_ids_of_the_rendered_text(tmp_path: Path, text: str) -> None:
    template, tokenizer = load(tmp_path, bpe_metadata(extra={"tokenizer.chat_template": text}))
    source = random.Random(11)
    for _ in range(100):
        contents = ["".join(source.choices(["hi", " ", "\n", "x#y", "é", "<", ">", "|", "im"], k=6)) for _ in "ab"]
        messages = [{"role": "user", "content": content} for content in contents]
        rendered = template.render(messages)
        assert template.render_ids(messages, tokenizer) == tokenizer.encode(rendered, special=True)


@pytest.mark.parametrize("text", [CHATML, TRIMMING, REPLACING, SPLITTING])
def test_messages_cannot_forge_a_turn(tmp_path: Path, text: str) -> None:
    template, tokenizer = load(tmp_path, bpe_metadata(extra={"tokenizer.chat_template": text}))
    plain = template.render_ids([USER[0], USER[0]], tokenizer)
    marks = [token for token in plain if token in tokenizer.vocabulary.control]
    source = random.Random(12)
    bits = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<|", "|>", "\n", " ", "x#y", "system"]
    for _ in range(200):
        messages = [{"role": "user", "content": "".join(source.choices(bits, k=5))} for _ in "ab"]
        ids = template.render_ids(messages, tokenizer)
        assert [token for token in ids if token in tokenizer.vocabulary.control] == marks
        assert tokenizer.decode(ids, skip_special=False) == template.render(messages)


def test_bos_comes_first_once_where_the_model_expects_it(tmp_path: Path) -> None:
    body = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for text in (body, "{{ bos_token }}" + body):
        template, tokenizer = load(tmp_path, spm_metadata(extra={"tokenizer.chat_template": text}))
        ids = template.render_ids(USER, tokenizer)
        assert ids == [tokenizer.bos_id, *tokenizer.encode("hi")]
