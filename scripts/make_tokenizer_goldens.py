#!/usr/bin/env python3
"""Writes tests/data/tokenizer/{tokenizer,goldens}.json: a small byte-level BPE and what the `tokenizers` package makes
of a few hundred strings, with Digits before ByteLevel ("ids") and with ByteLevel alone ("ids_without_digits").

    pip install tokenizers==0.22.2 && python scripts/make_tokenizer_goldens.py
"""
import json
import pathlib
import random
import sys
import unicodedata

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20240601
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests/data/tokenizer"
WORDS = {
    "en": "the quantizer rounds a weight to its nearest step and keeps what it's lost; they'll say we've done it, don't they?",
    "de": "der Block wird größer, weil über die Schwelle hinaus schöne Maße für Äpfel gelten",
    "fr": "l'été où la forêt brûle, ça ne s'oublie pas à côté du château",
    "ru": "весной на берегу реки тихо шумит старый лес и поют птицы",
    "el": "το μικρό πλοίο ταξίδευε μέσα στη νύχτα χωρίς φώτα",
    "ar": "كتب الولد رسالة طويلة الى صديقه البعيد",
    "hi": "नदी के किनारे एक छोटा सा गाँव था",
    "zh": "山 上 的 树 在 风 中 轻 轻 摇 动 天空 很 蓝",
    "ja": "しずかな 海 の そばで ねこ が ねている カタカナ",
    "ko": "작은 새 한 마리가 나무 위에 앉아 있다",
    "code": "for (int i = 0; i < n; ++i) { sum += x[i] * w[i]; } // 1024 3.1415 0x7f",
    "emoji": "😀 🎉 👍🏽 ❤️ 👨‍👩‍👧",
}


def training_text(rng):
    lines = []
    for _ in range(3000):
        words = WORDS[rng.choice(list(WORDS))].split(" ")
        lines.append(" ".join(rng.choice(words) for _ in range(rng.randrange(3, 15))))
    return lines


def make_tokenizer(rng):
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    # Only bytes that the text has get a token, so that the others, which the package drops, are tested too.
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(training_text(rng), trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False))
    tokenizer.add_tokens([
        AddedToken("<|im", normalized=False),
        AddedToken("<pad>", normalized=True),
        AddedToken("<left>", lstrip=True, normalized=False),
        AddedToken("<right>", rstrip=True, normalized=False),
        AddedToken("<both>", lstrip=True, rstrip=True, normalized=True),
        AddedToken("<|im_start|><pad>", normalized=True),
        AddedToken("größe €", normalized=True),
        AddedToken("\n\n\n", normalized=False),
    ])
    return tokenizer


def strings(rng):
    result = [
        "", " ", "  ", "   ", "a", " a", "  a", "a ", "a  ", "a \n b", "a\n\nb", "a \t\r\n", "\u00a0\u00a0x", "\u3000 x", "x\u2028\u2029y", "\x85 \x1c\x1f",
        "it's we've I'll he'd I'm don't they're", "IT'S WE'VE", "'s", "''s", " 's", "'", "''", "'r", "'re", "'v", "'l", "'ll", "'lll", "x'\u00e9", "'\u0455",
        "1", "12", " 12", "1 2", "a1b22c333", "3.14", "\u0663\u0664", "\u00bd\u00b2", "\u2167 \u2460", "\u3007\u4e00", "1   2", "a   1", "   1",
        "e\u0301", "\u0301", " \u0301a", "\u0e19\u0e49\u0e33", "\u200b\u200d\ufeff", "\x00\x01\x7f", "a\x00b",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\ud7ff\ue000\ufffd\uffff\U00010000\U0010ffff",
        # assigned after Unicode 15.0
        "a\u1c89\u1c8a1", "x\U00010d40\U00010d41y", "\U0002ebf0\u4e00", "a\U00011de0b\U00016ff4c",
        "<|endoftext|>", "a<|endoftext|>b", "<|endoftext|", "<|im_start|>user\nhi<|im_end|>\n", "<|im_startx", "<|im<|im_start|>", "<|<|im_end|>",
        "x <left> y", "x  \n<left><left>", "x <right>  y", "<right> \u3000\n\n\n z", "<right>\n\n\n", "x <both> y", "<both> <both>", "<right> <left>", "<left>  <right>  <pad>",
        "<|im_start|><pad>", "<pad><pad>", " <pad> ", "gr\u00f6\u00dfe \u20ac", "Gr\u00f6\u00dfe \u20ac", "gr\u00f6\u00dfe  \u20ac", "a\n\n\n\nb", "\n\n\n\n\n\n", "\n\n<left>", "a \n\n\n <left>",
        "ab" * 300, "the" * 200, " " * 100, "\n" * 50 + "x", "!" * 70, "word " * 40,
    ]
    assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    every_word = " ".join(WORDS.values()).split(" ")
    kinds = [
        lambda: rng.choice(assigned),
        lambda: chr(rng.randrange(0x80)),
        lambda: chr(rng.randrange(0x80, 0x600)),
        lambda: rng.choice(" \t\n\r\v\f\x1c\x85\u00a0\u1680\u2003\u2028\u202f\u205f\u3000") * rng.randrange(1, 4),
        lambda: rng.choice(every_word) + " ",
        lambda: rng.choice(every_word).upper(),
        lambda: rng.choice("0123456789\u00b2\u00bd\u0663\u2167\u2460"),
        lambda: rng.choice(["'s", "'re", "'ll", "'", "'D", "e\u0301", "<pad>", "<left>", "<right>", "<both>", "<|im_end|>"]),
    ]
    while len(result) < 400:
        chosen = rng.sample(kinds, rng.randrange(1, 5))
        result.append("".join(rng.choice(chosen)() for _ in range(rng.randrange(1, 25))))
    return result


def main():
    if not unicodedata.unidata_version.startswith("14."):
        sys.exit(f"Python with Unicode 14 (3.11) is needed for the same strings, this one has {unicodedata.unidata_version}")
    rng = random.Random(SEED)
    FOLDER.mkdir(parents=True, exist_ok=True)
    make_tokenizer(rng).save(str(FOLDER / "tokenizer.json"), pretty=False)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    texts = strings(rng)
    ids = [tokenizer.encode(text).ids for text in texts]
    decoded = [tokenizer.decode(i, skip_special_tokens=False) for i in ids]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    goldens = {
        "written_by": "scripts/make_tokenizer_goldens.py",
        "tokenizers": tokenizers.__version__,
        "seed": SEED,
        "vocab_size": tokenizer.get_vocab_size(),
        "cases": [{"text": t, "ids": i, "ids_without_digits": tokenizer.encode(t).ids, "decoded": d} for t, i, d in zip(texts, ids, decoded)],
    }
    lines = json.dumps(goldens, ensure_ascii=True, separators=(",", ":")).replace('{"text"', '\n{"text"')
    (FOLDER / "goldens.json").write_text(lines + "\n")
    print(f"{len(texts)} strings, {sum(map(len, ids))} ids, {goldens['vocab_size']} tokens")


if __name__ == "__main__":
    main()
