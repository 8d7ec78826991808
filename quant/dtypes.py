"""The code formats of low-bit weights by name, with their bit layouts as tables.

| names                                  | bits    | stored as                                   |
|----------------------------------------|---------|---------------------------------------------|
| `int2`…`int7`, `uint1`…`uint7`         | 1-7     | uint8 words, blocks of LAYOUTS              |
| `int9`…`int15`, `uint9`…`uint15`       | 9-15    | int16 words, blocks of LAYOUTS              |
| `int8` `uint8` `int16` `uint16`        | 8, 16   | raw elements                                |
| `float{n}_e{E}m{M}fn`, `…fnu`          | 1-16    | the words of `uint{n}`; 8 and 16 bits raw   |
| `float8_e4m3fn`, `float16`, …          | 8-32    | raw torch elements (`NATIVE`)               |
| `nf4_bnb`, `fp4_bnb`                   | 4       | uint8, the first of two values in high bits |

Own floats are sign|exponent|mantissa (`fnu`: no sign), bias 2^(E-1)-1, every code finite.
Before sdnq 0.2.2 they had no subnormals: `get_format(name, subnormals=False)`.
Signed integers of fewer than 16 bits other than 8 are stored offset-binary, q + 2^(n-1).
The last two are tables of values (`TABLES`), which only bitsandbytes writes.
"""

from __future__ import annotations

import difflib
import re

import torch

from ..kernels.spec import CodeFormat, Piece
from .errors import LowBitError

__all__ = ["ALIASES", "LAYOUTS", "TABLES", "all_formats", "get_format"]


def _column(values: range, words: range, width: int, word_bit: int = 0) -> list[Piece]:
    """Whole values that stand side by side, each in a word of its own at `word_bit`."""
    return [Piece(v, 0, width, w, word_bit) for v, w in zip(values, words, strict=True)]


def _split(value: int, *parts: tuple[int, int, int, int]) -> list[Piece]:
    """One value cut into (value_bit, width, word, word_bit) parts."""
    return [Piece(value, *part) for part in parts]


# bits -> (values in a block, words in a block, pieces); words are uint8 up to 7 bits, then int16.
LAYOUTS: dict[int, tuple[int, int, tuple[Piece, ...]]] = {
    bits: (values, words, tuple(piece for group in groups for piece in group))
    for bits, (values, words, *groups) in {
        1: (8, 1, [Piece(i, 0, 1, 0, i) for i in range(8)]),
        2: (4, 1, [Piece(i, 0, 2, 0, 2 * i) for i in range(4)]),
        3: (
            8,
            3,
            _column(range(3), range(3), 3),
            _column(range(3, 6), range(3), 3, 3),
            _split(6, (0, 2, 0, 6), (2, 1, 2, 6)),
            _split(7, (0, 2, 1, 6), (2, 1, 2, 7)),
        ),
        4: (2, 1, [Piece(0, 0, 4, 0, 0), Piece(1, 0, 4, 0, 4)]),
        5: (
            8,
            5,
            _column(range(5), range(5), 5),
            _split(5, (0, 3, 0, 5), (3, 2, 3, 5)),
            _split(6, (0, 3, 1, 5), (3, 2, 4, 5)),
            _split(7, (0, 3, 2, 5), (3, 1, 4, 7), (4, 1, 3, 7)),
        ),
        6: (
            4,
            3,
            _column(range(3), range(3), 6),
            _split(3, (0, 2, 2, 6), (2, 2, 1, 6), (4, 2, 0, 6)),
        ),
        7: (
            8,
            7,
            _column(range(7), range(7), 7),
            _split(7, *((j, 1, 6 - j, 7) for j in range(7))),
        ),
        9: (
            16,
            9,
            _column(range(8), range(8), 9),
            *(_split(8 + k, (0, 7, k, 9), (7, 2, 8, 2 * k)) for k in range(8)),
        ),
        10: (
            8,
            5,
            _column(range(5), range(5), 10),
            _split(5, (0, 6, 0, 10), (6, 4, 3, 10)),
            _split(6, (0, 6, 1, 10), (6, 4, 4, 10)),
            _split(7, (0, 6, 2, 10), (6, 2, 4, 14), (8, 2, 3, 14)),
        ),
        11: (
            16,
            11,
            _column(range(8), range(8), 11),
            *(_split(8 + k, (0, 5, k, 11), (5, 6, 8 + k, 0)) for k in range(3)),
            *(_split(11 + k, (0, 5, 3 + k, 11), (5, 6, 8 + k, 6)) for k in range(3)),
            _split(14, (0, 5, 6, 11), (5, 4, 8, 12), (9, 2, 10, 12)),
            _split(15, (0, 5, 7, 11), (5, 4, 9, 12), (9, 2, 10, 14)),
        ),
        12: (
            4,
            3,
            _column(range(3), range(3), 12),
            _split(3, (0, 4, 2, 12), (4, 4, 1, 12), (8, 4, 0, 12)),
        ),
        13: (
            16,
            13,
            _column(range(13), range(13), 13),
            *(
                _split(
                    13 + k,
                    *((3 * j, 3, 3 * j + k, 13) for j in range(4)),
                    (12, 1, 12, 13 + k),
                )
                for k in range(3)
            ),
        ),
        14: (
            8,
            7,
            _column(range(7), range(7), 14),
            _split(7, *((2 * j, 2, 6 - j, 14) for j in range(7))),
        ),
        15: (
            16,
            15,
            _column(range(15), range(15), 15),
            _split(15, *((j, 1, 14 - j, 15) for j in range(15))),
        ),
    }.items()
}

# name -> (bits, exponent, mantissa, largest); the torch dtype has the same name, and a torch that
# lacks it lacks the format. The producer scales bfloat16, float32 and e8m0 to a maximum of six
# digits, and the scales in files were computed from that.
NATIVE: dict[str, tuple[int, int, int, float]] = {
    name: row
    for name, row in {
        "float8_e4m3fn": (8, 4, 3, 448.0),
        "float8_e5m2": (8, 5, 2, 57344.0),
        "float8_e4m3fnuz": (8, 4, 3, 240.0),
        "float8_e5m2fnuz": (8, 5, 2, 57344.0),
        "float8_e8m0fnu": (8, 8, 0, 1.70141e38),
        "float16": (16, 5, 10, 65504.0),
        "bfloat16": (16, 8, 7, 3.38953e38),
        "float32": (32, 8, 23, 3.40282e38),
    }.items()
    if hasattr(torch, name)
}

ALIASES: dict[str, str] = {
    "bool": "uint1",
    "int1": "uint1",
    "fp1": "float1_e1m0fnu",
    "fp8": "float8_e4m3fn",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
}
for _bits, _exponent in {
    2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 3, 9: 4, 10: 5, 11: 5, 12: 5, 13: 5, 14: 5, 15: 5,
}.items():  # fmt: skip
    ALIASES[f"fp{_bits}"] = f"float{_bits}_e{_exponent}m{_bits - 1 - _exponent}fn"
for _bits in range(1, 17):
    _exponent = 1 if _bits <= 3 else 2 if _bits <= 5 else 3 if _bits <= 7 else 4
    _exponent = 5 if _bits >= 10 else _exponent
    ALIASES[f"ufp{_bits}"] = f"float{_bits}_e{_exponent}m{_bits - _exponent}fnu"

# name -> what its 16 codes stand for, the largest 1.
TABLES: dict[str, tuple[float, ...]] = {
    # quantiles of a normal distribution, with an exact zero
    "nf4_bnb": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # sign, then an index into twelfths; no exponent and mantissa could say it
    "fp4_bnb": tuple(
        sign * twelfths / 12
        for sign in (1, -1)
        for twelfths in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}

_RAW_WORDS = {8: torch.uint8, 16: torch.uint16}


def _storage(bits: int) -> dict:
    """The layout fields of a format whose codes are packed as unsigned integers of `bits` bits."""
    if bits in _RAW_WORDS:
        return {
            "packed": False, "word": _RAW_WORDS[bits], "block_values": 1, "block_words": 1,
        }  # fmt: skip
    values, words, pieces = LAYOUTS[bits]
    return {
        "packed": True,
        "word": torch.uint8 if bits < 8 else torch.int16,
        "block_values": values,
        "block_words": words,
        "pieces": pieces,
    }


def _integer(bits: int, signed: bool) -> CodeFormat:
    storage = _storage(bits)
    if signed and not storage["packed"]:
        storage["word"] = {8: torch.int8, 16: torch.int16}[bits]
    return CodeFormat(
        name=f"{'' if signed else 'u'}int{bits}",
        bits=bits,
        kind="int" if signed else "uint",
        exponent=0,
        mantissa=bits - signed,
        signed=signed,
        subnormals=False,
        largest=(1 << (bits - signed)) - 1,
        **storage,
    )


def _own_float(name: str, bits: int, exponent: int, signed: bool, subnormals: bool) -> CodeFormat:
    mantissa = bits - exponent - signed
    return CodeFormat(
        name=name,
        bits=bits,
        kind="float",
        exponent=exponent,
        mantissa=mantissa,
        signed=signed,
        subnormals=subnormals,
        largest=(2.0 - 2.0**-mantissa) * 2.0 ** (1 << (exponent - 1)),
        **_storage(bits),
    )


def _build(subnormals: bool) -> dict[str, CodeFormat]:
    formats: dict[str, CodeFormat] = {}
    for bits in range(1, 17):
        formats[f"uint{bits}"] = _integer(bits, False)
        if bits > 1:
            formats[f"int{bits}"] = _integer(bits, True)
        for exponent in range(1, 6):
            for signed in (True, False):
                mantissa = bits - exponent - signed
                if mantissa < 0:
                    continue
                name = f"float{bits}_e{exponent}m{mantissa}fn{'' if signed else 'u'}"
                # The native dtype has the plain name; the all-finite one is called apart.
                if name in NATIVE:
                    name += "_sdnq"
                formats[name] = _own_float(name, bits, exponent, signed, subnormals)
    for name, (bits, exponent, mantissa, largest) in NATIVE.items():
        formats[name] = CodeFormat(
            name=name,
            bits=bits,
            kind="native",
            exponent=exponent,
            mantissa=mantissa,
            signed=True,
            subnormals=True,
            packed=False,
            word=getattr(torch, name),
            block_values=1,
            block_words=1,
            largest=largest,
        )
    return formats


def _table(name: str, values: tuple[float, ...]) -> CodeFormat:
    return CodeFormat(
        name=name,
        bits=4,
        kind="table",
        exponent=0,
        mantissa=0,
        signed=True,
        subnormals=True,
        packed=True,
        word=torch.uint8,
        block_values=2,
        block_words=1,
        largest=1.0,
        pieces=(Piece(0, 0, 4, 0, 4), Piece(1, 0, 4, 0, 0)),
        values=values,
    )


_FORMATS = {era: _build(era) for era in (True, False)}
_TABLE_FORMATS = {name: _table(name, values) for name, values in TABLES.items()}


def all_formats(*, subnormals: bool = True) -> tuple[CodeFormat, ...]:
    """Every format but the tables once, by its canonical name."""
    return tuple(_FORMATS[subnormals].values())


def get_format(name: str, *, subnormals: bool = True) -> CodeFormat:
    """The format called `name`, which may be an alias such as `fp4`, `int1` or `torch.float16`.

    Args:
        name: A name as checkpoints spell it.
        subnormals: False for own floats of files written before sdnq 0.2.2.

    Raises:
        LowBitError: no format has that name; close ones are named.
    """
    formats = _FORMATS[subnormals]
    plain = re.sub(r"^torch\.", "", str(name).strip())
    found = formats.get(ALIASES.get(plain, plain)) or _TABLE_FORMATS.get(plain)
    if found is None:
        known = [*formats, *ALIASES]
        close = difflib.get_close_matches(plain.lower(), known, n=4, cutoff=0.5)
        raise LowBitError(
            "The weight format has a name that is not known.",
            found=repr(name),
            expected="one of " + ", ".join(close or ["int8", "uint4", "float8_e4m3fn", "…"]),
            remedy="Update this pack, or correct the name in the checkpoint's configuration.",
        )
    return found
