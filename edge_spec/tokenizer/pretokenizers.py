"""How byte-level BPE vocabularies cut text into words, by the name in `tokenizer.ggml.pre`.

The expressions are facts of the models (their tokenizer files publish them) in the form in which llama.cpp applies
them, written for Oniguruma. Each of a family's expressions cuts the pieces of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_spec.errors import UnsupportedArchitectureError

_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _modern(digits: str, *, words: str = f"{_CONTRACTION}|{_WORD}", punctuation: str = _PUNCTUATION) -> str:
    """The scheme that most vocabularies since 2023 share, with their own idea of digits."""
    return f"{words}|{digits}|{punctuation}|{_LINES}|{_SPACES}"


def _cased(tail: str) -> str:
    """Words that may change from capitals to small letters once, `tail` after them. Only ASCII has a case here."""
    upper, lower = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    return rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{tail}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{tail}"


_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3 = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_SPACES}"
)
_NOT_A_STOP = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A family of vocabularies: its names in GGUF files and how it cuts words."""

    names: str
    patterns: tuple[str, ...]
    whole_words: bool = False
    """A word that is a token is taken whole, whatever the merges say."""
    add_bos: bool = False
    """Whether the family expects bos where the file does not say."""


FAMILIES = (
    PreTokenizer(
        "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais exaone4 trillion granite-docling",
        (_GPT2,),
    ),
    PreTokenizer(
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        (r"\p{N}", _GPT2),
    ),
    PreTokenizer(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        (_modern(r"\p{N}{1,3}"),),
        whole_words=True,
        add_bos=True,
    ),
    PreTokenizer("dbrx smaug-bpe chatglm-bpe", (_modern(r"\p{N}{1,3}"),)),
    PreTokenizer("glm4 glm5", (_modern(r"\p{N}{1,3}"),), whole_words=True),
    PreTokenizer(
        "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2",
        (_modern(r"\p{N}"),),
    ),
    PreTokenizer(
        "qwen35",
        (
            _modern(
                r"\p{N}",
                words=rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+",
                punctuation=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            ),
        ),
    ),
    PreTokenizer("ufakzeka", (_modern(r"\p{N}", words=_WORD),)),
    PreTokenizer("seed-coder", (_modern(r"\p{N}", punctuation=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", _modern(r"\p{N}+")), whole_words=True),
    PreTokenizer(
        "tekken",
        (_modern(r"\p{N}", words=_cased(""), punctuation=r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),),
        whole_words=True,
        add_bos=True,
    ),
    PreTokenizer(
        "gpt-4o llama4 kanana2 minimax-m2",
        (_modern(r"\p{N}{1,3}", words=_cased(f"(?:{_CONTRACTION})?"), punctuation=r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),),
    ),
    PreTokenizer(
        "deepseek-v3 hunyuan-dense joyai-llm",
        (r"\p{N}{1,3}", r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+", _DEEPSEEK3),
    ),
    PreTokenizer(
        "deepseek-coder",
        (
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}&&[^\s]]+",
            r"\p{N}",
        ),
    ),
    PreTokenizer("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer("poro-chat bloom gpt3-finnish", (_NOT_A_STOP,)),
    PreTokenizer("viking", (_NOT_A_STOP, r"\p{N}")),
    PreTokenizer("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)
_BY_NAME = {name: family for family in FAMILIES for name in family.names.split()}


def find(name: str) -> PreTokenizer:
    """The family of a `tokenizer.ggml.pre`; UnsupportedArchitectureError names those that are known."""
    family = _BY_NAME.get(name)
    if family is None:
        raise UnsupportedArchitectureError(
            f"the pre-tokenizer {name!r} is not supported; these are: {', '.join(sorted(_BY_NAME))}"
        )
    return family
