"""baseq's tokenizer against the tokenizers package, in the shapes of tokenizer_shapes.py.

BASEQ_TOKENIZER_TEXTS is the number of random texts for each shape, default 2000; a million in all are 72000 each.
"""

import functools
import os
import random
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tokenizer_shapes
import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
NUM_TEXTS = int(os.environ.get("BASEQ_TOKENIZER_TEXTS", 2000))
SEED = int(os.environ.get("BASEQ_TOKENIZER_SEED", 1))
DATA = sorted((ROOT / "data").glob("*.txt"))


@functools.cache
def shape(name: str) -> Tokenizer:
    return tokenizer_shapes.SHAPES[name](tokenizer_shapes.small_training(SEED))


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """records(tokenizer, texts) -> (ids, decoded text) of each, or the message of one that is refused."""
    folder = tmp_path_factory.mktemp("records")
    default = Path(os.environ.get("BASEQ_BINARY", ROOT / "build" / "baseq")).parent / "tests" / "baseq_tokenizer_records"
    program = Path(os.environ.get("BASEQ_TOKENIZER_RECORDS", default))
    assert program.is_file(), f"{program} does not exist; build baseq_tokenizer_records or set BASEQ_TOKENIZER_RECORDS"

    def call(tokenizer: Tokenizer, texts: list, with_ids: bool = True) -> list:
        file, source, target = folder / "tokenizer.json", folder / "in", folder / "out"
        tokenizer.save(str(file))
        texts = [text if isinstance(text, bytes) else text.encode() for text in texts]
        source.write_bytes(b"".join(struct.pack("=i", len(text)) + text for text in texts))
        done = subprocess.run([program, file, source, target], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        data, offset, result = target.read_bytes(), 0, []

        def read_int():
            nonlocal offset
            offset += 4
            return struct.unpack_from("=i", data, offset - 4)[0]

        for _ in texts:
            count = read_int()
            ids = np.frombuffer(data, np.int32, max(count, 0), offset).tolist() if with_ids else None
            offset += 4 * max(count, 0)
            size = read_int()
            text = data[offset : offset + size].decode()
            offset += size
            result.append(text if count < 0 else (ids, text))
        assert offset == len(data)
        return result

    return call


def assert_same(tokenizer, records, texts):
    wrong = []
    for text, got in zip(texts, records(tokenizer, texts), strict=True):
        ids = tokenizer.encode(text).ids
        expected = (ids, tokenizer.decode(ids, skip_special_tokens=False))
        if got != expected:
            wrong.append(f"{ascii(text[:300])}:\n  got {ascii(got)[:600]}\n  not {ascii(expected)[:600]}")
    assert not wrong, f"{len(wrong)} of {len(texts)} texts differ, such as\n" + "\n".join(wrong[:5])


@pytest.mark.parametrize("name", tokenizer_shapes.SHAPES)
def test_random_texts_give_the_same_ids_and_texts(records, name):
    tokenizer = shape(name)
    assert_same(tokenizer, records, tokenizer_shapes.random_texts(NUM_TEXTS, random.Random(f"{SEED} {name}")))


@pytest.mark.parametrize("name", tokenizer_shapes.SHAPES)
def test_data_gives_the_same_ids_and_texts(records, name):
    tokenizer = shape(name)
    size = None if NUM_TEXTS > 2000 else 100_000  # characters of each file; all of them in the long run
    assert_same(tokenizer, records, [path.read_text()[:size] for path in DATA])


def code_points():
    """All where characters are assigned, and some of the private and unassigned planes."""
    dense = [*range(0xD800), *range(0xE000, 0x32000), *range(0xE0000, 0xE1000)]
    return dense + [c for c in range(0x32000, 0x110000, 101) if not 0xE0000 <= c < 0xE1000]


def characters(normalizer=None, pre_tokenizer=None):
    """A tokenizer that gives back what its steps leave: every byte is a token."""
    tokenizer = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def first_difference(got, expected):
    at = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), min(len(got), len(expected)))
    return f"got {ascii(got[max(at - 9, 0) : at + 9])}, not {ascii(expected[max(at - 9, 0) : at + 9])}"


@pytest.mark.parametrize("name", ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip"])
def test_every_code_point_is_normalized_the_same(records, name):
    normalizer = getattr(normalizers, name)()
    # Each between marks of the lowest, a middle and the highest class, and behind a letter.
    text = "".join(f"e{chr(c)}\u0334\u0327{chr(c)}\u0345{chr(c)}a{chr(c)}\u0301" for c in code_points())
    ((_, got),) = records(characters(normalizer), [text], with_ids=False)
    expected = normalizer.normalize_str(text)
    assert got == expected, first_difference(got, expected)


CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co L M N P S Z".split()


@pytest.mark.parametrize("pattern", [*(rf"\p{{{name}}}" for name in CATEGORIES), r"\s", r"\S", r"\d", ".", r"\P{L}",
                                     "(?i:s)", "(?i:k)", r"[^\s\p{L}]", r"[\u0250-\u02af\x{1F600}-\x{1F64F}]"])
def test_every_code_point_matches_the_same(records, pattern):
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    text = "".join(map(chr, code_points()))
    ((_, got),) = records(characters(pre_tokenizer=split), [text], with_ids=False)
    expected = "".join(piece for piece, _ in split.pre_tokenize_str(text))
    assert got == expected, first_difference(got, expected)


def test_every_code_point_is_the_same_word_character(records):
    tokenizer = characters()
    tokenizer.add_tokens([tokenizers.AddedToken("word", single_word=True, normalized=False)])
    texts = ["".join(f"{chr(c)}word" for c in code_points()[i : i + 5000]) for i in range(0, len(code_points()), 5000)]
    assert_same(tokenizer, records, texts)


def test_every_code_point_is_the_same_number(records):
    # Two neighbours that stay in one piece merge.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", char) for char in alphabet]
    vocab = {char: i for i, char in enumerate(alphabet)} | {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["".join(f"a{chr(c)}" for c in code_points()[i : i + 5000]) for i in range(0, len(code_points()), 5000)]
    assert_same(tokenizer, records, texts)


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "llama2"])
def test_invalid_utf8_is_refused_at_its_byte(records, name):
    tokenizer = shape(name)
    rng = random.Random(SEED)
    texts, expected = [], []
    for valid in tokenizer_shapes.random_texts(300, rng):
        data = bytearray(valid.encode())
        at = rng.randrange(len(data) + 1)
        data[at:at] = rng.choice([b"\xff", b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf0\x9f\x98", b"\xe2\x82"])
        try:
            data.decode()
        except UnicodeDecodeError as error:
            texts.append(bytes(data))
            expected.append(f"tokenizer: text is not valid UTF-8 at byte {error.start}")
    assert len(texts) > 250
    assert records(tokenizer, texts) == expected


UNITS = ["a", "aB", "中", "e\u0301\u0327", " ", "\t\t", "\t \n", "<|en", "1", "!\r", "▁", " word"]


@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen2", "tekken", "deepseek", "llama2", "mistral", "normalized_first"])
def test_a_megabyte_without_spaces_is_no_quadratic_work(records, name):
    """One quadratic part would take hours; the time limit of `records` is ten minutes. Halves give what the whole gives."""
    tokenizer = shape(name)
    texts = [unit * (1_000_000 // len(unit.encode())) for unit in UNITS]
    for unit, text, (ids, _) in zip(UNITS, texts, records(tokenizer, texts), strict=True):
        assert ids[:2000] == tokenizer.encode(text[:20000]).ids[:2000], ascii(unit)


LENGTHS = [1, 2, 62, 63, 64, 65, 66, 255, 256, 257, 1023, 1024, 1025]  # a search sees 64 characters, then 256, ...


@pytest.mark.parametrize("name", tokenizer_shapes.SHAPES)
def test_runs_longer_than_a_search_sees_at_first(records, name):
    rng = random.Random(f"{SEED} runs {name}")
    texts = ["".join(rng.choice(UNITS) * rng.choice(LENGTHS) for _ in range(rng.randint(1, 8))) for _ in range(100)]
    assert_same(shape(name), records, texts)


@pytest.mark.parametrize("pattern", ["[ab]+|[^ab]+?c", "(?<=ab|c)a", "(?<!b)c+(?=a)", "a+(?!b)|b", "(?>a+|ab)c", "[ab]++c|b",
                                     r"\s+(?!\S)|\s+", "(a|b)+?c|cc", r"a{3,70}|c\z"])
def test_runs_match_the_same(records, pattern):
    rng = random.Random(f"{SEED} {pattern}")
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    texts = ["".join(rng.choice("abc \n") * rng.choice(LENGTHS[:10]) for _ in range(rng.randint(1, 20))) for _ in range(50)]
    expected = ["".join(piece for piece, _ in split.pre_tokenize_str(text)) for text in texts]
    got = [decoded for _, decoded in records(characters(pre_tokenizer=split), texts, with_ids=False)]
    assert got == expected
