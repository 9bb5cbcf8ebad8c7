"""Turn a conversation into a prompt with the Jinja template that the model's file carries.

Templates come from strangers. They run in jinja2's immutable sandbox, without access to Python objects, files or the
network; loops over `range`, repetition and formatting are bounded, and so is the text that comes out. A template can
still waste time in ways that the sandbox does not see, such as doubling a string over and over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from edge_spec.errors import EdgeSpecError, ModelFormatError, UsageError
from edge_spec.formats.gguf import GGUFArray, GGUFFile

if TYPE_CHECKING:
    from edge_spec.chat_sandbox import ChatSandbox
    from edge_spec.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Stands in where a file has no template: the format that most instruction-tuned models were taught."""

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OVERHEAD_CHARS = 1 << 20
"""What a rendered prompt may be longer than four times its messages."""


class ChatTemplate:
    """A compiled chat template. `source` is "model", or "chatml" where the file has none and CHATML stands in."""

    def __init__(self, text: str, *, bos_token: str = "", eos_token: str = "", source: str = "model") -> None:
        """Compile `text`; ModelFormatError if it is no valid template."""
        from jinja2 import TemplateError

        if len(text) > MAX_TEMPLATE_CHARS:
            raise ModelFormatError(f"the chat template has {len(text)} characters, more than {MAX_TEMPLATE_CHARS}")
        self.text = text
        self.source = source
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(text)
        except (TemplateError, RecursionError, ValueError, SyntaxError, OverflowError) as exc:
            raise ModelFormatError(f"the chat template does not compile: {exc}") from exc

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> ChatTemplate:
        """The file's own template, else CHATML. ModelFormatError if it does not compile."""
        text = gguf.get_str("tokenizer.chat_template", "")
        return cls(
            text or CHATML,
            bos_token=_token(gguf, "bos"),
            eos_token=_token(gguf, "eos"),
            source="model" if text else "chatml",
        )

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt as text. Each message has a `role` and a `content`.

        UsageError if the template refuses these messages (a role it does not know, an order it does not want),
        ModelFormatError if it fails.
        """
        from edge_spec.chat_sandbox import bounded_range

        _check(messages)
        ceiling = 4 * sum(len(text) for message in messages for text in message.values()) + MAX_OVERHEAD_CHARS
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                range=bounded_range(),
                **self._variables,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > ceiling:
                    break
        except EdgeSpecError:
            raise
        # The template is foreign code: whatever it makes Python raise is the template's fault.
        except Exception as exc:
            raise ModelFormatError(f"the chat template fails: {type(exc).__name__}: {exc}") from exc
        if length > ceiling:
            raise ModelFormatError(f"the chat template writes more than {ceiling} characters")
        return "".join(pieces)

    def render_ids(
        self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, add_generation_prompt: bool = True
    ) -> list[int]:
        """The prompt as token ids, in which the template's own marks are special tokens and the messages' are not.

        For messages that hold no such marks this is `tokenizer.encode(render(...), special=True)`; bos comes first
        where the model expects it, once. A message that holds marks is shielded (see `Shield`), which templates that
        trim, cut or replace let through. Not covered: a template that builds a mark out of a message's inner parts.
        """
        _check(messages)
        everything = "".join([self.text, *(text for message in messages for text in message.values())])
        shield = tokenizer.shield(everything)
        guarded = [
            {key: value if key == "role" else shield.protect(value) for key, value in message.items()}
            for message in messages
        ]
        text, shielded = shield.remove(self.render(guarded, add_generation_prompt))
        ids = tokenizer.encode(text, special=True, shielded=shielded)
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids


def _check(messages: Sequence[Mapping[str, str]]) -> None:
    for i, message in enumerate(messages):
        if not all(isinstance(value, str) for value in message.values()):
            raise UsageError(f"message {i}: only text is supported")
        role = message.get("role", "")
        if not role.replace("_", "").replace("-", "").isalnum():
            raise UsageError(f"message {i}: the role {role!r} is not a plain word")
        if "content" not in message:
            raise UsageError(f"message {i} has no content")


def _token(gguf: GGUFFile, name: str) -> str:
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    number = gguf.get_int(f"tokenizer.ggml.{name}_token_id", -1)
    if not isinstance(tokens, GGUFArray) or not 0 <= number < len(tokens):
        return ""
    return str(tokens[number])


@cache
def _environment() -> ChatSandbox:
    # Here and not at the top, because it imports jinja2.
    from edge_spec.chat_sandbox import ChatSandbox

    return ChatSandbox()
