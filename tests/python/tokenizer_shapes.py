"""Tokenizers in the shapes that published models have, trained here on a little multilingual text, and random texts.

Each shape is a function of what it is trained on; SHAPES names them. The texts are made of kinds of characters that
tokenizers treat differently, so that a few thousand meet most pairs of neighbours.
"""

import dataclasses
import json
import random
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = """the quantizer rounds a weight to its nearest step and keeps what it's lost; they'll say we've done it don't
der Block wird größer weil über die Schwelle hinaus schöne Maße für Äpfel gelten l'été où la forêt brûle ça château
весной на берегу реки тихо шумит старый лес и поют птицы το μικρό πλοίο ταξίδευε μέσα στη νύχτα χωρίς φώτα
كتب الولد رسالة طويلة الى صديقه नदी के किनारे एक छोटा सा गाँव था 山上的树在风中轻轻摇动 天空很蓝 しずかな海のそばで カタカナ
작은 새 한 마리가 나무 위에 앉아 있다 ในน้ำมีปลา for (int i = 0; i < n; ++i) { sum += x[i] * w[i]; } // 1024 3.1415 0x7f
😀 🎉 👍🏽 ❤️ 👨‍👩‍👧 CamelCase HTTPServer iPhone LaTeX""".split()

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclasses.dataclass
class Training:
    lines: list
    vocab_size: int = 700  # without special and byte tokens


def small_training(seed):
    rng = random.Random(seed)
    return Training([" ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 15))) for _ in range(1500)])


def train(tokenizer, training, special, alphabet=(), fallback=False):
    tokens = special + ([f"<0x{byte:02X}>" for byte in range(256)] if fallback else [])
    trainer = trainers.BpeTrainer(vocab_size=training.vocab_size + len(tokens), special_tokens=tokens, show_progress=False,
                                  initial_alphabet=list(alphabet), limit_alphabet=250, max_token_length=12)
    tokenizer.train_from_iterator(training.lines, trainer)
    return tokenizer


def only_special(tokenizer, special):
    """Without the byte tokens among the added ones, which training made special."""
    file = json.loads(tokenizer.to_str())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(file))


def add_tokens(tokenizer):
    """Tokens with every flag, some that are parts of others or of white space."""
    tokenizer.add_special_tokens([AddedToken("<|end|>"), AddedToken("<|en", normalized=True)])
    tokenizer.add_tokens([
        AddedToken("<left>", lstrip=True, normalized=False),
        AddedToken("<right>", rstrip=True, normalized=False),
        AddedToken("<both>", lstrip=True, rstrip=True, normalized=True),
        AddedToken("word", single_word=True, normalized=True),
        AddedToken("wordy", single_word=True, normalized=False),
        AddedToken("größe €", normalized=True),
        AddedToken("e\u0301 x", normalized=True),
        AddedToken("\n\n\n", normalized=False),
        AddedToken("\t\t", normalized=False, rstrip=True, lstrip=True),
        AddedToken("Ab", normalized=True),
    ])
    return tokenizer


def byte_level(training, pre_tokenizer, normalizer=None, ignore_merges=False, template=None, alphabet=True):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, training, ["<|begin|>"], alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else ())
    if template:
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(template, special_tokens=[("<|begin|>", 0)])])
    return add_tokens(tokenizer)


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(training, normalizer, pre_tokenizer, decoder, fuse_unk=True, fallback=True, template="<s> $A"):
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=fuse_unk, byte_fallback=fallback))
    # Trained word by word, as SentencePiece does, whatever the published file has for a pre-tokenizer.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    train(tokenizer, training, special, fallback=fallback)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is None:
        file = json.loads(tokenizer.to_str())
        file["pre_tokenizer"] = None
        tokenizer = Tokenizer.from_str(json.dumps(file))
    else:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return add_tokens(only_special(tokenizer, special))


def metaspace_decoder():
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                              decoders.Strip(" ", 1, 0)])


def smollm2(training):
    return byte_level(training, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                    pre_tokenizers.ByteLevel(add_prefix_space=False)]), alphabet=False)


def gpt2_with_prefix_space(training):
    return byte_level(training, pre_tokenizers.ByteLevel(add_prefix_space=True))


def llama3(training):
    return byte_level(training, split_then_bytes(LLAMA3), ignore_merges=True, template="<|begin|> $A")


def qwen2(training):
    return byte_level(training, split_then_bytes(QWEN2), normalizer=normalizers.NFC())


def tekken(training):
    return byte_level(training, split_then_bytes(TEKKEN), ignore_merges=True, template="<|begin|> $A <|begin|>")


def o200k(training):
    return byte_level(training, split_then_bytes(O200K))


def deepseek(training):
    steps = [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
             pre_tokenizers.Split(Regex("[一-龥\u3040-ゟ゠-ヿ]+"), "isolated"),
             pre_tokenizers.Split(Regex(DEEPSEEK), "isolated"),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return byte_level(training, pre_tokenizers.Sequence(steps))


def llama2(training):
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece(training, normalizer, None, metaspace_decoder())


def phi3(training):
    """Llama-2's with rstrip tokens, which add_tokens brings, and no special tokens around."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece(training, normalizer, None, metaspace_decoder(), fuse_unk=False, template=None)


def mistral(training):
    return sentencepiece(training, None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), metaspace_decoder())


def metaspace_always(training):
    return sentencepiece(training, normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="always"),
                         decoders.Metaspace(prepend_scheme="always"), fallback=False)


def metaspace_never(training):
    return sentencepiece(training, normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()]),
                         pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
                         decoders.Metaspace(prepend_scheme="never"), fallback=False, fuse_unk=False)


def normalized_first(training):
    """Every normalizer before a Metaspace that asks where the original text begins."""
    normalizer = normalizers.Sequence([
        normalizers.Strip(left=True, right=True), normalizers.Lowercase(), normalizers.NFKD(),
        normalizers.Replace(Regex(r"\s{2,}|[\u0300-\u0302]"), " "), normalizers.Replace("ab", "b "), normalizers.NFC()])
    return sentencepiece(training, normalizer, pre_tokenizers.Metaspace(prepend_scheme="first"), metaspace_decoder())


def splits(training):
    """Each behaviour of Split, inverted or not, in a chain with whole numbers."""
    steps = [pre_tokenizers.Split(Regex(r"[.,;!]"), "merged_with_previous"),
             pre_tokenizers.Split(Regex(r"\p{Lu}"), "merged_with_next"),
             pre_tokenizers.Split(Regex(r"\p{S}"), "contiguous"),
             pre_tokenizers.Split("-", "removed"),
             pre_tokenizers.Split(Regex(r"[\p{L}\p{M}]+|[^\p{L}]"), "removed", invert=True),
             pre_tokenizers.Digits(individual_digits=False),
             pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    return byte_level(training, pre_tokenizers.Sequence(steps))


SHAPES = {shape.__name__: shape for shape in (
    smollm2, gpt2_with_prefix_space, llama3, qwen2, tekken, o200k, deepseek, llama2, phi3, mistral, metaspace_always,
    metaspace_never, normalized_first, splits)}

ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
MARKS = [c for c in ASSIGNED if unicodedata.combining(c)]
DECOMPOSING = [c for c in ASSIGNED if unicodedata.normalize("NFKD", c) != c]
ADDED = ["<|end|>", "<|en", "<left>", "<right>", "<both>", "word", "wordy", "größe €", "e\u0301 x", "\u00e9 x", "\n\n\n",
         "\t\t", "Ab", "ab"]


def random_texts(count, rng):
    any_char = lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    kinds = [
        any_char,
        lambda: rng.choice(ASSIGNED),
        lambda: chr(rng.randrange(0x80)),
        lambda: chr(rng.randrange(0x20)),
        lambda: rng.choice(" \t\n\r\v\f\x1c\x85\xa0\u1680\u180e\u2000\u200b\u2028\u202f\u205f\u3000\ufeff") * rng.randrange(1, 5),
        lambda: " " * rng.randrange(1, 12),
        lambda: rng.choice(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'ſ", "'Ll", "'r", "'", "''", "'L"]),
        lambda: rng.choice("0123456789\u00b2\u00bd\u0663\u0be7\u2167\u2460\u3007\u4e00") * rng.randrange(1, 6),
        lambda: "e" + "".join(rng.choice(MARKS) for _ in range(rng.randrange(5))),
        lambda: rng.choice(DECOMPOSING),
        lambda: rng.choice(["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f44d\U0001f3fd"]),
        lambda: "".join(chr(rng.randrange(0x61, 0x7B)) for _ in range(rng.randrange(1, 30))),
        lambda: chr(rng.randrange(0x61, 0x65)) * rng.randrange(1, 80),
        lambda: rng.choice(["A", "aB", "Bc", "ABC", "ǅ", "ʰ", "İ", "ß"]),
        lambda: chr(rng.randrange(0x400, 0x600)),
        lambda: chr(rng.randrange(0x3040, 0x3100)),
        lambda: chr(rng.randrange(0x4E00, 0xA000)),
        lambda: chr(rng.randrange(0xAC00, 0xD7A4)) + rng.choice(["", "\u11a8"]),
        lambda: chr(rng.choice([rng.randrange(0x1100, 0x1200), rng.randrange(0x900, 0xE00)])),
        lambda: rng.choice(".,;!-+=/▁_") * rng.randrange(1, 4),
        lambda: rng.choice(["", " "]) + rng.choice(WORDS),
        lambda: rng.choice(ADDED),
        lambda: rng.choice(ADDED)[: rng.randrange(1, 9)],
        lambda: f"<0x{rng.randrange(256):02X}>",
    ]
    texts = []
    for _ in range(count):
        chosen = rng.sample(kinds, rng.randrange(1, 6))
        texts.append("".join(rng.choice(chosen)() for _ in range(rng.randrange(30))))
    return texts
