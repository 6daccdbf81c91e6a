"""check_bpe.py RIVERRUN DIRECTORY: byte-level BPE gives the ids of Hugging Face's tokenizers. Called by
test_tokenizer.sh with the Python of make_venv.sh, after it trained a model in DIRECTORY/run on ids of neox.json.

Checked, for each tokenizer of test/tokenizer/: characters by themselves and thousands of random texts, whole and cut
wherever riverrun says that a text may be cut; the project's own files through `riverrun tokenize`; that GPT-2's two
files become the tokenizer.json that the library itself makes of them; that AutoTokenizer opens what a checkpoint holds.
"""

import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import unicodedata

os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

program, directory = sys.argv[1], pathlib.Path(sys.argv[2])
encode_tool = pathlib.Path(program).parent / "test" / "encode"
DATA = pathlib.Path("test/tokenizer")
EOD = "<|endoftext|>"
failures = 0


def check(good, text):
    global failures
    failures += not good
    print(("ok    " if good else "FAIL  ") + text, flush=True)


def riverrun_ids(path, texts, *options):
    records = b"".join(struct.pack("<I", len(b)) + b for b in (t.encode() for t in texts))
    out = subprocess.run([encode_tool, path, *options], input=records, stdout=subprocess.PIPE, check=True).stdout
    return [[int(i) for i in line.split()] for line in out.decode().split("\n")[:-1]]


def compare(path, texts, what):
    library = Tokenizer.from_file(str(path))
    want = [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]
    for options in ((), ("--cut",)):
        got = riverrun_ids(path, texts, *options)
        wrong = [t for t, a, b in zip(texts, want, got) if a != b]
        check(len(got) == len(want) and not wrong, f"{path.name}: {what}, {len(texts)} texts {' '.join(options)}"
              + "".join(f"\n      {ascii(t)}" for t in wrong[:3]))


def known_characters():
    """The characters of Unicode 3.2, which every version of every library knows, and some emoji."""
    old = unicodedata.ucd_3_2_0
    for code in (*range(0xD800), *range(0xE000, 0x3_0000), *range(0xE0000, 0xE0200), 0x10FFFF):
        if old.category(chr(code)) != "Cn" or 0x1F300 <= code < 0x1F650:
            yield chr(code)


def random_texts(characters, added, count):
    def changes(c):
        return len(unicodedata.normalize("NFD", c)) > 1 or unicodedata.normalize("NFC", c) != c

    marks = [c for c in characters if unicodedata.combining(c)]
    unstable = [c for c in characters if changes(c)]
    plain = [*" \n\t\r'stmdrevlaA1,.!-_\u00a0\u2003\u3000\u0085\u200b\u0000", "  ", "'re", "'ll", " the", EOD, *added]
    kinds = [plain, plain, added + [" "], marks, unstable, characters[:0x2000], characters]
    for _ in range(count):
        yield "".join(random.choice(random.choice(kinds)) * random.choice((1, 1, 1, 2, 40))
                      for _ in range(random.randrange(20)))


def own_files():
    """Documents: one that is longer than a block, and the project's pages."""
    paths = [pathlib.Path("README.md"), *sorted(pathlib.Path("docs").glob("*.md"))]
    pages = [path.read_text(encoding="utf-8") for path in paths]
    return [pages[0] * 30, *pages]


def check_shards(name, spec):
    documents = own_files()
    (directory / "own.txt").write_text(f"\n{EOD}\n".join(documents), encoding="utf-8")
    out = directory / f"shards-{name}"
    subprocess.run([program, "tokenize", "--tokenizer", spec, "--out", out, directory / "own.txt"], check=True,
                   stderr=subprocess.DEVNULL)
    tokens = subprocess.run([sys.executable, "scripts/read_shard.py", "--tokens", out], check=True,
                            stdout=subprocess.PIPE).stdout
    library = Tokenizer.from_file(str(out / "tokenizer.json"))
    end = library.token_to_id(EOD)
    want = []
    for i, document in enumerate(documents):
        line_end = "\n" if i + 1 < len(documents) else ""  # the one in front of a separator is the document's
        want += [*library.encode(document + line_end, add_special_tokens=False).ids, end]
    check([int(line) for line in tokens.split()] == want, f"{name}: shards of the project's pages, {len(want)} ids")
    back = subprocess.run([program, "shards", "cat", out], check=True, stdout=subprocess.PIPE).stdout
    text = (directory / "own.txt").read_bytes()
    if library.normalizer:
        text = unicodedata.normalize("NFC", text.decode()).encode()
    check(back == text, f"{name}: their text comes back")


def check_gpt2_files():
    """The library makes this of GPT-2's files; riverrun writes the same bytes beside its shards."""
    vocab = json.loads((DATA / "encoder.json").read_text(encoding="utf-8"))
    lines = (DATA / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    library = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(x.split(" ")) for x in lines if x], fuse_unk=False))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(EOD, special=True, normalized=False)])
    library.save(str(directory / "library.json"))
    want = (directory / "library.json").read_bytes()
    got = (directory / "shards-encoder" / "tokenizer.json").read_bytes()
    check(got == want, "GPT-2's files become the library's file")


def check_checkpoint():
    from transformers import AutoTokenizer
    texts = [" The river's  current", "cafe\u0301 \u00e9t\u00e9", "a" + EOD + "b      c", "\n\n  x = 1\n"]
    opened = AutoTokenizer.from_pretrained(directory / "run" / "latest")
    want = Tokenizer.from_file(str(DATA / "neox.json"))
    same = all(opened(t, add_special_tokens=False)["input_ids"] == want.encode(t, add_special_tokens=False).ids
               for t in texts)
    check(same and opened.eos_token == EOD, "AutoTokenizer opens a checkpoint's tokenizer, with equal ids")


random.seed(1)
characters = list(known_characters())
for path in sorted(DATA.glob("*.json")):
    if path.name in ("ids.json", "encoder.json"):
        continue
    added = [t["content"] for t in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]]
    each = characters[::3 if path.name == "neox.json" else 29]
    compare(path, [f"{c}'s a{c}b {c}1{c}\n {c}{c} '{c}" for c in each], "characters")
    compare(path, list(random_texts(characters, added, 3000)), "random")
for name in ("neox", "flags", "encoder"):
    check_shards(name, DATA / f"{name}.json")
check_gpt2_files()
check_checkpoint()
sys.exit(failures > 0)
