"""make_test_tokenizers.py: makes what test/tokenizer/ holds, with Hugging Face's tokenizers: small tokenizers, and the
ids that the library gives for texts that are hard to get right. Run from the repository root with the Python of
scripts/make_venv.sh, only when the tokenizers or the texts are to change; the results are committed.

  gpt2.json, encoder.json, vocab.bpe   the form of GPT-2, once as one file and once as GPT-2's own two
  neox.json                            the form of GPT-NeoX: NFC, runs of spaces, no tokens for bytes that UTF-8 lacks
  flags.json                           added tokens with every flag, single and together
  words.json                           ignore_merges, and GPT-2's pattern as a Split of its own
  whole.json                           use_regex false: a text is one word
  ids.json                             {tokenizer: [[text in hexadecimal UTF-8, ids], ...]}
"""

import json
import pathlib
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

OUT = pathlib.Path("test/tokenizer")
EOD = "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Bytes that UTF-8 never has; GPT-NeoX's vocabulary has no tokens for them.
ABSENT = [0xC0, 0xC1, *range(0xF5, 0x100)]
OWN = """Ein kurzer Satz über Flüsse, die größer werden. Une phrase brève, à côté du café où l'été s'achève.
Реки текут к морю, и вода возвращается дождём. 川は海に流れ、雨になって戻ってくる。 강물은 바다로 흐르고 비가 되어 돌아온다.
Τα ποτάμια κυλούν στη θάλασσα. नदी समुद्र की ओर बहती है। The river's current isn't what we'd expect; they're sure it'll
turn, and I'm told we've 12 days, 3.14 metres, 1,000,000 litres left. for (int i = 0; i < n; i++) { total += x[i]; }
""" * 8


def corpus():
    texts = [OWN]
    for path in ["README.md", *sorted(pathlib.Path("docs").glob("*.md"))]:
        texts.append(pathlib.Path(path).read_text(encoding="utf-8"))
    return texts


def byte_characters():
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def train():
    """[(left, right)] in order: the merges that all the tokenizers share."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return [tuple(m) for m in json.loads(t.to_str())["model"]["merges"]]


def vocabulary(merges, absent, first):
    tokens = first + [c for b, c in sorted(byte_characters().items()) if b not in absent]
    tokens += [a + b for a, b in merges if a + b not in tokens]
    return {token: i for i, token in enumerate(tokens)}


def build(merges, absent=(), first=(), last=(), **model):
    known = vocabulary(merges, absent, list(first))
    kept = [m for m in merges if all(p in known for p in m)]
    known = vocabulary(kept, absent, list(first))
    known.update({token: len(known) + i for i, token in enumerate(last)})
    t = Tokenizer(models.BPE(vocab=known, merges=kept, **model))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    return t, known, kept


def token(content, **flags):
    return AddedToken(content, **{"normalized": True, "special": False, **flags})


def special(content, **flags):
    return AddedToken(content, **{"normalized": False, "special": True, **flags})


def save(t, name):
    """Compact, to be small; the committed file is what the ids are made with."""
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(json.loads(t.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n",
                    encoding="utf-8")
    return Tokenizer.from_file(str(path))


TEXTS = [
    "", "a", " ", "\n", "\0", "a\0b", "Hello world", " leading", "trailing ", "two  spaces", "   three", "x \n y",
    "\n\n\n",
    "a\n b\n\n  c\t\td ", "tab\tand\u00a0no-break\u2003em\u3000wide\u0085next\u2028line",
    "\u200bzero\ufeffwidth\u00adsoft",
    "I'm we've they're it'll he'd can't dog's", "I'M WE'VE 'S 's's ''s '", "x'rex 've' l'l 'll", " 's 't",
    "o\u2019clock",
    "12 345 6.78e9 ½ ⅷ ² ٣٤ १२", "a1b2 c3,d4", "3.14 1,000,000", "naïve café Ångström",
    "cafe\u0301 A\u030angstro\u0308m",
    "a\u0301\u0323 a\u0323\u0301 \u0301x", "\u1100\u1161\u11a8 \uac00\u11a8 각",
    "\u212b \u2126 \u0340 \u0958 \ufb2c \u1d15e",
    "が \u304b\u3099 は\u309a", "漢字かな交じり文。", "Реки текут", "مرحبا بالعالم", "नमस्ते दुनिया", "👩‍👩‍👧 🇫🇷 👍🏽",
    "\U0001f600\U00020000",
    "{\n    int x = 0;\n        return x;\n}", "-- ... !!! ?!", "http://example.org/a_b?c=d&e=f", "\r\n\r\n x\r",
    " \t \n",
    EOD, "a" + EOD + "b", EOD + EOD + " ", " " + EOD + "\n", "<|endoftext", "|endoftext|>", "<|pad|>x", "a<|pad|> b",
    "          ten", "\n          ten\n", "a" * 300, "ab" * 200, " " * 300, "\u0301" * 100, "é" * 90, "the " * 40,
    "\n" * 70,
    "=" * 64, "=" * 65, "aeiou" * 13 + "\u0301",
]
FLAGGED = [
    "x[L]y", "x  [L]  y", "\u3000[L] ", "x[R]y", "x  [R]  y", "[R]   [B]  [L]", "[R]    x", "[R]  ", "a[B]b",
    "  [B]\t\n[B] ",
    "x[S]y", "x [S] y", "[S]", "_[S]", "[S]9", "é[S]", "[S]\u0301", "ⓐ[S]", "-[S]-", "[S][S]", "[S]\u200d",
    "[LS]x  [LS]",
    "wordy", "a wordy", "a  wordy  b", "wordywordy", "café", "cafe\u0301", "xcafe\u0301x", "[C]", "[CC]", "[CCC]",
    "[[CC]]",
    "foo bar", "foo  bar", "xfoo barx", "  [R]    [L]  ",
]


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    merges = train()
    made = {}

    t, known, kept = build(merges, last=[EOD])
    t.add_special_tokens([special(EOD)])
    made["gpt2"] = save(t, "gpt2")
    (OUT / "encoder.json").write_text(json.dumps(known, ensure_ascii=True), encoding="utf-8")
    (OUT / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in kept), encoding="utf-8")

    from tokenizers import normalizers
    t, _, _ = build(merges, absent=ABSENT, first=[EOD, "<|pad|>"])
    t.normalizer = normalizers.NFC()
    t.add_special_tokens([special(EOD), special("<|pad|>")])
    t.add_tokens([token(" " * n) for n in range(8, 1, -1)])
    made["neox"] = save(t, "neox")

    t, _, _ = build(merges, last=[EOD])
    t.normalizer = normalizers.Sequence([normalizers.NFC()])
    t.add_special_tokens([special(EOD), special("[L]", lstrip=True), special("[R]", rstrip=True)])
    t.add_tokens([token("[B]", lstrip=True, rstrip=True), token("[S]", single_word=True),
                  token("[LS]", lstrip=True, single_word=True, normalized=False), token("wordy", single_word=True),
                  token("cafe\u0301"), token("[C"), token("[CC]"), token("[CCC"), token("foo bar")])
    made["flags"] = save(t, "flags")

    t, _, _ = build(merges, last=["Ġriver's", "zzzz", "ĠĠĠ", EOD], ignore_merges=True)
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(__import__("tokenizers").Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.add_special_tokens([special(EOD)])
    made["words"] = save(t, "words")

    t, _, _ = build(merges, last=[EOD])
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.add_special_tokens([special(EOD)])
    made["whole"] = save(t, "whole")

    random.seed(7)
    characters = [*"  \n\t'strvdlmaeio19.,-\u00a0\u3000é", "\u0301", "\u0323", "가", "\u11a8", "漢", "ж", "😀", EOD, "  ",
                  "the ", "'s", "[R]", "[L]", "[S]", "wordy", "river's", "zzzz"]
    mixed = ["".join(random.choices(characters, k=random.randrange(1, 40))) for _ in range(60)]
    ids = {}
    for name, t in made.items():
        own = {"flags": FLAGGED, "words": [" river's zzzz zzzzz   x"]}
        texts = TEXTS + mixed + own.get(name, [])
        ids[name] = [[x.encode().hex(), t.encode(x, add_special_tokens=False).ids] for x in texts]
    lines = [json.dumps(name) + ":[\n" + ",\n".join(json.dumps(x, separators=(",", ":")) for x in rows) + "]"
             for name, rows in ids.items()]
    (OUT / "ids.json").write_text("{\n" + ",\n".join(lines) + "}\n", encoding="utf-8")


main()
