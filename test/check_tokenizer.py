"""check_tokenizer.py RIVERRUN DIRECTORY: Hugging Face's tokenizers reads the tokenizer.json that `riverrun tokenize`
writes as riverrun means it. Called by test_tokenizer.sh with the Python of make_venv.sh. DIRECTORY is for scratch.

Checked: every character of the Basic Multilingual Plane and random strings of all planes encode to the bytes of their
UTF-8 and decode to themselves; the ids in shards are those of the library; loading and saving gives the same bytes; the
one difference that is meant, the characters <|endoftext|> in a text.
"""

import pathlib
import random
import subprocess
import sys

from tokenizers import Tokenizer

program, directory = sys.argv[1], pathlib.Path(sys.argv[2])
failures = 0


def check(good, text):
    global failures
    failures += not good
    print(("ok    " if good else "FAIL  ") + text)


def is_character(code):
    return not 0xD800 <= code < 0xE000


def tokenize(name, text):
    """The ids that riverrun puts into shards for `text` as one document."""
    (directory / f"{name}.txt").write_bytes(text.encode())
    out = directory / name
    subprocess.run([program, "tokenize", "--separator=", "--out", out, directory / f"{name}.txt"], check=True,
                   stderr=subprocess.DEVNULL)
    tokens = subprocess.run([sys.executable, "scripts/read_shard.py", "--tokens", out], check=True,
                            stdout=subprocess.PIPE).stdout
    return [int(line) for line in tokens.split()]


def agrees(text):
    encoding = tokenizer.encode(text)
    return encoding.ids == list(text.encode()) and tokenizer.decode(encoding.ids) == text


plane = "".join(chr(code) for code in range(0x10000) if is_character(code))
ids = tokenize("plane", plane)
tokenizer = Tokenizer.from_file(str(directory / "plane" / "tokenizer.json"))
check(tokenizer.get_vocab_size() == 257, "257 ids")
check(ids == tokenizer.encode(plane).ids + [256], "shards hold the library's ids, then 256")
check(all(agrees(c) for c in plane), "every character of the first plane by itself")
check(agrees(plane), "all of them as one text")

random.seed(1)
for limit, name in ((0x80, "ASCII"), (0x800, "two bytes"), (0x10000, "three bytes"), (0x110000, "all planes")):
    characters = [chr(code) for code in range(limit) if is_character(code)]
    texts = ["".join(random.choices(characters, k=random.randrange(60))) for _ in range(500)]
    check(all(map(agrees, texts)), f"500 random texts, {name}")
check(all(map(agrees, (" ", "  a  ", "\n\n \t\r\n", "a , b . c 's n't", "e\u0301", "\ufeffx", ""))), "blanks and marks")

tokenizer.save(str(directory / "saved.json"))
same = (directory / "saved.json").read_bytes() == (directory / "plane" / "tokenizer.json").read_bytes()
check(same, "saved again, the file has the same bytes")

marked = "a<|endoftext|>b"
check(tokenizer.encode(marked).ids == [97, 256, 98], "the library takes <|endoftext|> in a text for id 256")
check(tokenize("marked", marked) == list(marked.encode()) + [256], "riverrun takes it for text")
check(tokenizer.decode([97, 256, 98]) == "ab", "decoding passes over the special token")
sys.exit(failures > 0)
