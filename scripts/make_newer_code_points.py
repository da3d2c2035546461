#!/usr/bin/env python3
"""Writes src/tokenizer/newer_code_points.h: where the `tokenizers` package and utf8proc 2.8 (Unicode 15.0) disagree.

The package carries four Unicode tables of different age: Oniguruma's (\\p{..} of regular expressions), Rust's standard
library's (Digits, Lowercase), those of Rust's regex crate (\\w around single_word tokens) and those of its
normalization crate (NFC and others), which is older than utf8proc's. This asks the installed package about every code
point through its public classes and writes the differences.

    pip install tokenizers==0.22.2 && python scripts/make_newer_code_points.py
"""
import ctypes
import ctypes.util
import pathlib

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "src/tokenizer/newer_code_points.h"
CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co".split()
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]

utf8proc = ctypes.CDLL(ctypes.util.find_library("utf8proc"))
utf8proc.utf8proc_version.restype = ctypes.c_char_p
utf8proc.utf8proc_unicode_version.restype = ctypes.c_char_p
utf8proc.utf8proc_category_string.restype = ctypes.c_char_p
utf8proc.utf8proc_get_property.restype = ctypes.POINTER(ctypes.c_int16)  # category, combining_class, ...
NULLTERM, STABLE, COMPAT, COMPOSE, DECOMPOSE = 1, 2, 4, 8, 16


def utf8proc_map(text, options):
    out = ctypes.c_void_p()
    data = text.encode()
    size = utf8proc.utf8proc_map(data, ctypes.c_ssize_t(len(data)), ctypes.byref(out), options | STABLE)
    assert size >= 0
    return ctypes.string_at(out, size).decode()


def combining_class(c):
    return utf8proc.utf8proc_get_property(c)[1]


def chunks(code_points, size=20000):
    return [code_points[i : i + size] for i in range(0, len(code_points), size)]


def matching(pattern, code_points):
    """Those of `code_points` that the package's regular expression matches."""
    keep = pre_tokenizers.Split(Regex(f"{pattern}+"), "removed", invert=True)
    return {ord(c) for chunk in chunks(code_points) for piece, _ in keep.pre_tokenize_str("".join(map(chr, chunk))) for c in piece}


def categories():
    """Code point -> category of the package where utf8proc has another."""
    ours = {c: utf8proc.utf8proc_category_string(c).decode() for c in CODE_POINTS}
    theirs = {c: name for name in CATEGORIES for c in matching(rf"\p{{{name}}}", CODE_POINTS)}
    return {c: theirs.get(c, "Cn") for c in CODE_POINTS if theirs.get(c, "Cn") != ours[c]}, {c: theirs.get(c, "Cn") for c in CODE_POINTS}


def digits(category):
    """Code points that the package's Digits takes for numbers though its regular expressions do not."""
    split = pre_tokenizers.Digits(individual_digits=False)
    numeric = set()
    for chunk in chunks(CODE_POINTS):
        for piece, _ in split.pre_tokenize_str("".join(f"a{chr(c)}" for c in chunk)):
            if piece[0] != "a":
                numeric.update(map(ord, piece))
    by_category = {c for c in CODE_POINTS if category[c][0] == "N"}
    assert by_category <= numeric
    return sorted(numeric - by_category)


def check_words(category):
    """That the code points which keep a single_word token beside them from being one are those of CharTable::is_word."""
    tokenizer = Tokenizer(models.BPE({"x": 0}, []))
    tokenizer.add_tokens([AddedToken("<t>", single_word=True, normalized=False)])
    word = set()
    for c in CODE_POINTS:
        if 1 not in tokenizer.encode(f"{chr(c)}<t>", add_special_tokens=False).ids:
            word.add(c)
    circled = [*range(0x24B6, 0x24EA), *range(0x1F130, 0x1F14A), *range(0x1F150, 0x1F16A), *range(0x1F170, 0x1F18A)]
    expected = {c for c in CODE_POINTS if category[c][0] in "LM" or category[c] in ("Nd", "Nl", "Pc")} | {*circled, 0x200C, 0x200D}
    assert expected == word, sorted(map(hex, expected ^ word))


def lowercases():
    """Code point -> lower case of the package where utf8proc has another."""
    lower = normalizers.Lowercase()
    result = {}
    for chunk in chunks(CODE_POINTS):
        for c, theirs in zip(chunk, lower.normalize_str("\x00".join(map(chr, chunk)) if 0 not in chunk else "\x00".join(chr(max(c, 1)) for c in chunk)).split("\x00")):
            if c and theirs != chr(utf8proc.utf8proc_tolower(c)):
                result[c] = theirs
    assert result.pop(0x130) == "i\u0307"  # the one that becomes two
    return {c: ord(lower) for c, lower in result.items()}


def opaque():
    """Code points that utf8proc decomposes, composes or reorders and the package leaves alone: it does not know them."""
    nfd, nfkd, nfc = normalizers.NFD(), normalizers.NFKD(), normalizers.NFC()
    result = set()
    for c in CODE_POINTS:
        char = chr(c)
        ours, theirs = utf8proc_map(char, DECOMPOSE | COMPAT), nfkd.normalize_str(char)
        if ours != theirs:
            assert theirs == char, hex(c)
            result.add(c)
            decomposed = utf8proc_map(char, DECOMPOSE)
            if len(decomposed) == 2 and nfc.normalize_str(decomposed) == decomposed != utf8proc_map(decomposed, COMPOSE):
                result.add(ord(decomposed[1]))
        assert nfd.normalize_str(char) in (char, utf8proc_map(char, DECOMPOSE)), hex(c)
        # U+0334 has the class 1, U+0345 the class 240: both move past a mark of a class between.
        ours = combining_class(c)
        behind, before = f"a{char}\u0334", f"a\u0345{char}"
        moves = (nfd.normalize_str(behind) != behind, nfd.normalize_str(before) != before)
        if theirs == char and moves != (ours > 1, 0 < ours < 240):
            assert moves == (False, False), hex(c)
            result.add(c)
    return sorted(result)


def ranges(code_points):
    result = []
    for c in code_points:
        if result and result[-1][1] == c - 1:
            result[-1][1] = c
        else:
            result.append([c, c])
    return result


def table(comment, kind, name, items):
    lines = ["", f"// {comment}", "// clang-format off", f"inline constexpr {kind} {name}[] = {{"]
    row = "   "
    for i, item in enumerate(items):
        item += "," if i + 1 < len(items) else ""
        if len(row) + 1 + len(item) > 118:
            lines.append(row)
            row = "   "
        row += " " + item
    return lines + [row + "};", "// clang-format on"]


def main():
    version = utf8proc.utf8proc_unicode_version().decode()
    if version != "15.0.0":
        raise SystemExit(f"utf8proc with Unicode 15.0.0 is needed, this one has {version}")
    changed, category = categories()
    category_ranges = []
    for c, name in sorted(changed.items()):
        if category_ranges and category_ranges[-1][1] == c - 1 and category_ranges[-1][2] == name:
            category_ranges[-1][1] = c
        else:
            category_ranges.append([c, c, name])
    check_words(category)
    digit, lower, unknown = digits(category), lowercases(), opaque()
    plain = lambda code_points: [f"{{0x{a:X}, 0x{b:X}}}" for a, b in ranges(code_points)]
    lines = [
        f"// Written by scripts/make_newer_code_points.py with tokenizers {tokenizers.__version__}, beside utf8proc of Unicode {version}.",
        "#pragma once",
        "",
        "#include <utf8proc.h>",
        "",
        "namespace baseq {",
        "",
        "struct CodePointRange {",
        "  char32_t first, last;",
        "};",
        "struct CategoryRange {",
        "  char32_t first, last;",
        "  utf8proc_category_t category;",
        "};",
        "struct Lowercase {",
        "  char32_t from, to;",
        "};",
    ]
    lines += table(f"General categories of the package's regular expressions: {len(changed)} code points", "CategoryRange", "kNewerCategories",
                   [f"{{0x{a:X}, 0x{b:X}, UTF8PROC_CATEGORY_{name.upper()}}}" for a, b, name in category_ranges])
    lines += table(f"char::is_numeric of the package's Digits, besides \\p{{N}}: {len(digit)} code points", "CodePointRange", "kNewerDigits", plain(digit))
    lines += table(f"char::to_lowercase of the package's Lowercase: {len(lower)} code points", "Lowercase", "kNewerLowercases",
                   [f"{{0x{c:X}, 0x{to:X}}}" for c, to in sorted(lower.items())])
    lines += table(f"Code points that the package's normalization forms do not know: {len(unknown)}", "CodePointRange", "kUnknownToNormalization", plain(unknown))
    OUTPUT.write_text("\n".join(lines + ["", "}  // namespace baseq", ""]))
    print(f"{len(changed)} categories, {len(digit)} digits, {len(lower)} lower cases, {len(unknown)} unknown to normalization")


if __name__ == "__main__":
    main()
