#!/usr/bin/env python3
"""Compares ids and speed of build/benchmarks/tokenizer_speed with the `tokenizers` package, on one thread.

    python benchmarks/compare_tokenizer.py PROGRAM TOKENIZER.JSON TEXT... [--random 200000] [--seed 0]
    python benchmarks/compare_tokenizer.py PROGRAM llama3 TEXT...

The second form trains a tokenizer of that shape of tests/python/tokenizer_shapes.py on the first text. Every text is encoded in one call and, as a second run, line by line. Then come random Unicode strings.
Exits with 1 when an id differs.
"""
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import argparse
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
import unicodedata

import numpy
import tokenizers


def random_strings(count, seed, added_tokens):
    rng = random.Random(seed)
    any_char = lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    newer = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) == "Cn"]
    kinds = [
        any_char,
        lambda: rng.choice(assigned),
        lambda: rng.choice(newer),
        lambda: chr(rng.randrange(0x80)),
        lambda: chr(rng.randrange(0x20)),
        lambda: rng.choice(" \t\n\r\v\f\x1c\x85\xa0\u1680\u2000\u200b\u2028\u202f\u205f\u3000\ufeff") * rng.randrange(1, 5),
        lambda: " " * rng.randrange(1, 12),
        lambda: rng.choice(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'r", "'", "''", "'L"]),
        lambda: rng.choice("0123456789\u00b2\u00bd\u0663\u0be7\u2167\u2460\u3007\u4e00"),
        lambda: "e" + "".join(chr(rng.randrange(0x300, 0x370)) for _ in range(rng.randrange(4))),
        lambda: rng.choice(["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f44d\U0001f3fd"]),
        lambda: "".join(chr(rng.randrange(0x61, 0x7B)) for _ in range(rng.randrange(1, 30))),
        lambda: chr(rng.randrange(0x61, 0x65)) * rng.randrange(1, 80),
        lambda: chr(rng.randrange(0x400, 0x600)),
        lambda: chr(rng.randrange(0x4E00, 0xA000)),
        lambda: rng.choice(added_tokens) if added_tokens else "<",
        lambda: rng.choice(added_tokens)[: rng.randrange(1, 9)] if added_tokens else ">",
    ]
    result = []
    for _ in range(count):
        chosen = rng.sample(kinds, rng.randrange(1, 6))
        result.append("".join(rng.choice(chosen)() for _ in range(rng.randrange(30))))
    return result


def our_ids(program, tokenizer_json, records, repetitions):
    with tempfile.TemporaryDirectory() as folder:
        text, ids = pathlib.Path(folder, "text"), pathlib.Path(folder, "ids")
        text.write_bytes(b"\xff".join(record.encode() for record in records))
        run = subprocess.run([program, tokenizer_json, text, str(repetitions), ids], check=True, capture_output=True, text=True)
        flat = numpy.fromfile(ids, dtype=numpy.int32)
    ends = numpy.flatnonzero(flat == -1)
    begins = numpy.concatenate([[0], ends[:-1] + 1])
    speeds = [float(s) for s in re.findall(r"([\d.]+) MB/s", run.stdout)]
    return [flat[b:e].tolist() for b, e in zip(begins, ends)], speeds


def compare(name, args, tokenizer, records):
    num_bytes = sum(len(record.encode()) for record in records) + len(records) - 1
    ours, our_speeds = our_ids(args.program, args.tokenizer, records, args.repetitions)
    their_speeds = []
    for _ in range(args.repetitions):
        start = time.perf_counter()
        theirs = [tokenizer.encode(record).ids for record in records]
        their_speeds.append(num_bytes / 1e6 / (time.perf_counter() - start))
    wrong = [i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b] + ([-1] if len(ours) != len(theirs) else [])
    show = lambda speeds: f"{sorted(speeds)[len(speeds) // 2]:.2f} (best {max(speeds):.2f})"
    print(f"{name}: {num_bytes} bytes, {len(records)} records, {sum(map(len, theirs))} ids, {len(wrong)} records differ, "
          f"median MB/s: baseq {show(our_speeds)}, tokenizers {show(their_speeds)}", flush=True)
    for i in wrong[:10]:
        print("  ", i, ascii(records[i])[:300], ours[i][:40], theirs[i][:40])
    return not wrong


def train(shape, text, vocab_size, folder):
    """Returns the tokenizer.json of a shape trained on the lines of a file."""
    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests/python"))
    import tokenizer_shapes
    lines = pathlib.Path(text).read_text().splitlines()
    path = pathlib.Path(folder, f"{shape}.json")
    tokenizer_shapes.SHAPES[shape](tokenizer_shapes.Training(lines, vocab_size)).save(str(path))
    return str(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("tokenizer")
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--random", type=int, default=200000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=16000, help="of a tokenizer that is trained here")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    if not pathlib.Path(args.tokenizer).exists():
        args.tokenizer = train(args.tokenizer, args.texts[0], args.vocab_size, folder.name)
    tokenizer = tokenizers.Tokenizer.from_file(args.tokenizer)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    print(f"tokenizers {tokenizers.__version__}, Python's Unicode {unicodedata.unidata_version}, seed {args.seed}")
    same = True
    for path in args.texts:
        text = pathlib.Path(path).read_bytes().decode()
        name = pathlib.Path(path).name
        same &= compare(name, args, tokenizer, [text])
        same &= compare(name + " by line", args, tokenizer, text.splitlines(keepends=True))
    if args.random:
        args.repetitions = 1
        same &= compare("random", args, tokenizer, random_strings(args.random, args.seed, added))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
