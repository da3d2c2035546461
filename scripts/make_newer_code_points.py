#!/usr/bin/env python3
"""Writes src/tokenizer/newer_code_points.h: code points that utf8proc 2.8 (Unicode 15.0) does not know yet.

The `tokenizers` package compiles in Oniguruma (\\p{L}, \\p{N} of its regular expressions) and Rust's char tables (Digits),
both newer than the utf8proc of Debian 12. This asks the installed package about every code point, through its public
pre-tokenizers, and writes those that it takes for letters or numbers and utf8proc calls unassigned.

    pip install tokenizers==0.22.2 && python scripts/make_newer_code_points.py
"""
import ctypes
import ctypes.util
import pathlib

import tokenizers
from tokenizers import pre_tokenizers

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "src/tokenizer/newer_code_points.h"


def ranges(code_points):
    result = []
    for c in code_points:
        if result and result[-1][1] == c - 1:
            result[-1][1] = c
        else:
            result.append([c, c])
    return result


def main():
    utf8proc = ctypes.CDLL(ctypes.util.find_library("utf8proc"))
    utf8proc.utf8proc_unicode_version.restype = ctypes.c_char_p
    version = utf8proc.utf8proc_unicode_version().decode()
    if version != "15.0.0":
        raise SystemExit(f"utf8proc with Unicode 15.0.0 is needed, this one has {version}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)

    tables = {"kNewerLetters": [], "kNewerNumbers": [], "kNewerDigits": []}
    for c in range(0x110000):
        if 0xD800 <= c < 0xE000 or utf8proc.utf8proc_category(c) != 0:
            continue
        if len(byte_level.pre_tokenize_str("a" + chr(c))) == 1:
            tables["kNewerLetters"].append(c)
        if len(byte_level.pre_tokenize_str("1" + chr(c))) == 1:
            tables["kNewerNumbers"].append(c)
        if len(digits.pre_tokenize_str("a" + chr(c))) == 2:
            tables["kNewerDigits"].append(c)

    comments = {
        "kNewerLetters": r"\p{L} of the package's regular expressions",
        "kNewerNumbers": r"\p{N} of the package's regular expressions",
        "kNewerDigits": "char::is_numeric of the package's Digits",
    }
    lines = [
        f"// Written by scripts/make_newer_code_points.py with tokenizers {tokenizers.__version__}, beside utf8proc of Unicode {version}.",
        "#pragma once",
        "",
        "namespace baseq {",
        "",
        "struct CodePointRange {",
        "  char32_t first, last;",
        "};",
    ]
    for name, code_points in tables.items():
        body = ", ".join(f"{{0x{a:X}, 0x{b:X}}}" for a, b in ranges(code_points))
        lines += ["", f"// {comments[name]}: {len(code_points)} code points", "// clang-format off"]
        lines += [f"inline constexpr CodePointRange {name}[] = {{"]
        row = "   "
        for item in body.replace("}, ", "},\n").split("\n"):
            if len(row) + len(item) > 118:
                lines.append(row)
                row = "   "
            row += " " + item
        lines += [row + "};", "// clang-format on"]
    lines += ["", "}  // namespace baseq", ""]
    OUTPUT.write_text("\n".join(lines))
    print({name: len(code_points) for name, code_points in tables.items()})


if __name__ == "__main__":
    main()
