"""Random multilingual strings that tokenizers trip over; the same for the same seed."""

from __future__ import annotations

import random
import unicodedata

_RANGES = [
    (0x20, 0x7E), (0xA1, 0xFF), (0x100, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x531, 0x556), (0x5D0, 0x5EA),
    (0x620, 0x64A), (0x660, 0x669), (0x904, 0x939), (0x93E, 0x94D), (0x966, 0x96F), (0x985, 0x9B9), (0xE01, 0xE3A),
    (0xE40, 0xE4E), (0x10A0, 0x10FF), (0x1780, 0x17DD), (0x1E00, 0x1EFF), (0x1F00, 0x1FFE), (0x2010, 0x2027),
    (0x2070, 0x209C), (0x20A0, 0x20BF), (0x2100, 0x214F), (0x2150, 0x218B), (0x2190, 0x21FF), (0x2200, 0x22FF),
    (0x2460, 0x24FF), (0x2500, 0x257F), (0x3001, 0x303F), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3), (0xFB00, 0xFB06), (0xFF01, 0xFF5E), (0x10330, 0x1034A), (0x1D400, 0x1D454), (0x1F300, 0x1F5FF),
    (0x1F600, 0x1F64F), (0x20000, 0x2A6D6),
]  # fmt: skip
_MARKS = [*map(chr, range(0x300, 0x36F)), "\u200d", "\ufe0f", "\u20e3", "\U0001f3fd", "\u200b", "\u0e31", "\u094d"]
_SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\u00a0", "\u3000", "\u2003", "\u0085", "\v", "\f"]
_EMOJI = [
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f1eb\U0001f1f7",
    "1\ufe0f\u20e3", "\u2764\ufe0f", "\U0001f44d\U0001f3fe",
]  # fmt: skip
_CODE = [
    "def f(x):\n    return x + 1\n", "for (int i = 0; i < n; ++i) {", "\t\tif a != b && c->d {", "'''doc'''", "=>",
    "x['key']=\"v\"", "https://example.org/a?b=c&d=%20", "#include <stdio.h>\n", "</div>\n\n</body>", "0x1F,0b10,1e-9",
    "I'm you're WE'LL they'd 'Tis don'T", "camelCaseHTTPServer snake_case_2", "$HOME/*.py", "<s></s><unk>", "...!?",
]  # fmt: skip
SPECIAL_LOOKING = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<s>", "</s>", "<unk>", "<|im_", "|>",
    "<|", "<0x0A>", "<fim_prefix>", "<|user|>", "<|assistant|>\n", "[PAD]", "<|im_start|><|im_end|>",
]  # fmt: skip


def random_texts(count: int, seed: int) -> list[str]:
    """`count` strings of one to forty pieces each."""
    source = random.Random(seed)
    return ["", " ", *("".join(_piece(source) for _ in range(source.randint(1, 40))) for _ in range(count - 2))]


def _piece(source: random.Random) -> str:
    return source.choice([_word, _word, _char, _digits, _space, _mark, _listed, _listed, _listed, _any])(source)


def _word(source: random.Random) -> str:
    low, high = source.choice(_RANGES)
    return source.choice(["", " "]) + "".join(chr(source.randint(low, high)) for _ in range(source.randint(1, 8)))


def _char(source: random.Random) -> str:
    return chr(source.randint(*source.choice(_RANGES)))


def _digits(source: random.Random) -> str:
    return "".join(source.choice("0123456789") for _ in range(source.randint(1, 9)))


def _space(source: random.Random) -> str:
    return source.choice(_SPACES) * source.randint(1, 3)


def _mark(source: random.Random) -> str:
    return source.choice("aeiouกक") + source.choice(_MARKS)


def _listed(source: random.Random) -> str:
    return source.choice(source.choice([_EMOJI, _CODE, SPECIAL_LOOKING]))


def _any(source: random.Random) -> str:
    # Tokenizers disagree about letters that Unicode gained lately; those of version 3.2 they all know.
    while True:
        char = chr(source.randrange(1, 0x30000))
        if unicodedata.ucd_3_2_0.category(char) not in ("Cn", "Cs"):
            return char
