"""check_prepare.py RIVERRUN DIRECTORY: scripts/prepare_data.py against a hub of its own.

The hub serves small data sets in the form of the public ones: lists of files in pages, downloads behind a redirect,
Range requests. It can be told to fail, to cut connections, to damage what it sends and to fall silent. What comes out
is compared with shards made by riverrun directly from the texts. Called by test_prepare.sh.
"""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import pyarrow
import pyarrow.parquet

sys.path.insert(0, "scripts")
import read_shard  # noqa: E402

COMMIT = "c0ffee" * 6 + "c0de"
TOKEN = "hf_sample"


# ---- the hub --------------------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """repositories: name -> {path: bytes}. Faults are kept by path: how many more times to fail, to cut, to damage;
    paths at which to fall silent in the middle; what lists say wrongly of a file. requests: (path, offset) of every
    download."""

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.forget()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def forget(self):
        self.requests, self.lists, self.leaks = [], 0, 0
        self.fail, self.cut, self.damage, self.no_range, self.silent, self.claim = {}, {}, {}, set(), set(), {}

    def takes(self, faults, path):
        faults[path] = faults.get(path, 0) - 1
        return faults[path] >= 0

    def handle_error(self, request, client_address):
        pass  # clients that are killed break connections


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *arguments):
        pass

    def send(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/revision/(main|v1)", path):
            known = found[1] in self.server.repositories
            self.send(200 if known else 404, json.dumps({"id": found[1], "sha": COMMIT}).encode())
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/(\w+)/?(.*)", path):
            self.send_list(found[1], found[3], dict(urllib.parse.parse_qsl(url.query)))
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.*)", path):
            assert found[2] == COMMIT and self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.send(302, Location="/storage/" + found[1] + "/" + urllib.parse.quote(found[3]))
        elif found := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.*)", path):
            self.server.leaks += "Authorization" in self.headers
            self.send_file(found[1], found[2])
        else:
            self.send(404)

    def send_list(self, repository, directory, query):
        """Two entries a page; the lists of directories come between those of files, as on the hub."""
        self.server.lists += 1
        if self.server.takes(self.server.fail, "list"):
            return self.send(503, Retry_After="0")
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": directory or "x"}]
        for path, content in self.server.repositories[repository].items():
            if not path.startswith(directory and directory + "/"):
                continue
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "oid": git, "size": len(content), "path": path}
            if not path.endswith(".small.jsonl.zst"):
                large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 133}
                entry |= {"oid": "1" * 40, "lfs": large | self.server.claim.get(path, {})}
            entries.append(entry)
        at = int(query.get("cursor", 0))
        link = {}
        if at + 2 < len(entries):
            link = {"Link": f'<{self.server.address}{self.path.split("?")[0]}?cursor={at + 2}>; rel="next"'}
        self.send(200, json.dumps(entries[at : at + 2]).encode(), **link)

    def send_file(self, repository, path):
        hub, content = self.server, self.server.repositories[repository][path]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and path not in hub.no_range else 0
        hub.requests.append((path, int(wanted[1]) if wanted else 0))
        if hub.takes(hub.fail, path):
            return self.send(500)
        if hub.takes(hub.damage, path):
            content = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if path in hub.silent or hub.takes(hub.cut, path):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            while path in hub.silent:
                time.sleep(0.02)
            self.close_connection = True
            return None
        self.wfile.write(body)
        return None


# ---- small data sets of the same form -------------------------------------------------------------------------------

WORDS = "the and of river run past eve from swerve bend bay é ü 漢字 \U0001f600 \" \\ \t".split(" ")


def text_of(random_numbers, words):
    return "".join(random_numbers.choice(WORDS) + random_numbers.choice([" ", " ", "\n"]) for _ in range(words))


def parquet(texts, row_groups, large=False):
    """Several row groups, other columns, nested ones among them."""
    kind = pyarrow.large_string() if large else pyarrow.string()
    table = pyarrow.table(
        {
            "id": list(range(len(texts))),
            "meta": [{"url": f"u{i}", "tags": ["a"] * (i % 3)} for i in range(len(texts))],
            "text": pyarrow.array(texts, kind),
        }
    )
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=max(1, len(texts) // row_groups), compression="zstd")
    return file.getvalue()


def jsonl(texts):
    """The name says .zst and the content is gzip in two members: riverrun goes by content."""
    lines = [json.dumps({"text": t, "meta": {"set": "x"}}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    half = len(lines) // 2
    return b"".join(gzip.compress("".join(l + "\n" for l in part).encode()) for part in (lines[:half], lines[half:]))


def wikitext_lines(seed):
    r = random.Random(seed)
    lines = []
    for n in range(5):
        lines += [" \n", f" = Title {n} = \n", " \n", f" Text of {n} = it . \n", f" = {n} no title = \n", " \n"]
        lines += [" = = Part = = \n", " \n", " " + text_of(r, 40).replace("\n", " ") + " \n"]
    return lines


def make_sets():
    """(repositories, texts): texts[set][split] is the list of documents that its shards should hold."""
    r = random.Random(7)
    repositories, texts = {}, {}
    wiki = {split: wikitext_lines(split) for split in ("train", "validation", "test")}
    files = {}
    for split, lines in wiki.items():
        halves = (lines[:17], lines[17:]) if split == "train" else (lines,)
        for i, half in enumerate(halves):
            rows = ["" if line == " \n" else line for line in half]
            files[f"wikitext-2-raw-v1/{split}-{i:05}-of-{len(halves):05}.parquet"] = parquet(rows, 3)
    files["wikitext-103-raw-v1/train-00000-of-00001.parquet"] = b"another set"
    repositories["Salesforce/wikitext"] = files
    texts["wikitext-2"] = {s: ["".join(wiki[f])] for s, f in zip(("train", "valid", "test"), wiki)}
    texts["articles"] = {}
    for split, lines in texts["wikitext-2"].items():
        cut = [m.start() for m in re.finditer(r" = Title", lines[0])]
        ends = cut[1:] + [len(lines[0])]
        texts["articles"][split] = [lines[0][0 if i == 0 else a : b] for i, (a, b) in enumerate(zip(cut, ends))]
    documents = [text_of(r, 3 + i % 7) for i in range(4500)]
    cuts = [0, 1500, 1501, 3900, 4500]
    edu = {"data/CC-MAIN-2013-20/train-0.parquet": b"not asked for"}
    for i, (a, b) in enumerate(zip(cuts, cuts[1:])):
        edu[f"sample/10BT/{i:03}_00000.parquet"] = parquet(documents[a:b], 4, i % 2)
    repositories["HuggingFaceFW/fineweb-edu"] = edu
    held = [1999, 3999]
    texts["fineweb-edu"] = {
        "train": [d for i, d in enumerate(documents) if i not in held],
        "valid": [documents[i] for i in held],
    }
    slim = {f"train/chunk1/example_train_{i}.jsonl.zst": [text_of(r, 300) for _ in range(40)] for i in (0, 1, 10, 2)}
    slim["train/chunk2/example_train_0.jsonl.zst"] = [text_of(r, 50)] * 9
    slim["validation/chunk1/example_holdout_0.jsonl.zst"] = ["valid", "", "ation"]
    slim["test/chunk1/example_holdout_0.small.jsonl.zst"] = ["test " * 30, text_of(r, 100)]
    repositories["cerebras/SlimPajama-627B"] = {path: jsonl(part) for path, part in slim.items()}
    texts["slimpajama"] = {
        "train": [d for path in sorted(slim) if path.startswith("train/chunk1") for d in slim[path]],
        "valid": slim["validation/chunk1/example_holdout_0.jsonl.zst"],
        "test": slim["test/chunk1/example_holdout_0.small.jsonl.zst"],
    }
    pile = {f"train/{i:02}.jsonl.zst": [text_of(r, 20) for _ in range(5)] for i in range(3)}
    pile |= {"val.jsonl.zst": ["v"] * 3, "test.jsonl.zst": ["t", "tt"], "README.md": [""]}
    repositories["monology/pile-uncopyrighted"] = {path: jsonl(part) for path, part in pile.items()}
    texts["pile"] = {
        "train": pile["train/00.jsonl.zst"] + pile["train/01.jsonl.zst"],
        "valid": ["v"] * 3,
        "test": ["t", "tt"],
    }
    return repositories, texts


# ---- running and comparing ------------------------------------------------------------------------------------------


class Check:
    def __init__(self, riverrun, work):
        self.riverrun, self.work = os.path.abspath(riverrun), work
        repositories, self.texts = make_sets()
        self.hub = Hub(repositories)
        self.environment = os.environ | {"HF_TOKEN": TOKEN, "PREPARE_DATA_PAUSE": "0.01"}
        self.failures = 0
        self.count = 0

    def expect(self, condition, text):
        if not condition:
            self.failures += 1
            print("FAIL:", text)

    def out(self):
        self.count += 1
        return os.path.join(self.work, f"out{self.count}")

    def command(self, name, out, *more, python=sys.executable):
        program = [python, "scripts/prepare_data.py", name, "--out", out]
        return program + ["--hub", self.hub.address, "--riverrun", self.riverrun, *more]

    def run(self, name, out, *more, code=0, says="", python=sys.executable, file_limit=None):
        """file_limit: bytes that a file may have, as on a disk that is full."""
        command = self.command(name, out, *more, python=python)
        limit = [] if file_limit is None else ["prlimit", f"--fsize={file_limit}"]
        result = subprocess.run(limit + command, env=self.environment, capture_output=True, text=True, timeout=300)
        got = result.returncode
        self.expect(got == code, f"exit code {got}, not {code}: {name} {more}: {result.stderr}")
        self.expect(says in result.stderr, f"{name} {more} does not say '{says}': {result.stderr}")
        self.expect("Traceback" not in result.stderr, result.stderr)
        return result.stderr

    def start(self, name, out, *more):
        return subprocess.Popen(self.command(name, out, *more), env=self.environment, stderr=subprocess.PIPE, text=True)

    def await_that(self, condition, what):
        for _ in range(6000):
            if condition():
                return
            time.sleep(0.02)
        self.expect(False, f"waited in vain for {what}")

    @functools.cache
    def direct(self, texts):
        """The tokens that riverrun makes of these documents, given as one file of JSON lines."""
        lines = os.path.join(self.work, "direct.jsonl")
        with open(lines, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        out = os.path.join(self.work, "direct")
        shutil.rmtree(out, ignore_errors=True)
        command = [self.riverrun, "tokenize", "--out", out, "--jsonl-key", "text", lines]
        subprocess.run(command, check=True, capture_output=True)
        return self.tokens(out)

    def tokens(self, data):
        """All token ids of a data set, ends of documents included; its shards are verified on the way."""
        subprocess.run([self.riverrun, "shards", "verify", data], check=True, capture_output=True)
        return [id for shard in read_shard.shards([data]) for ids, _ in shard.tokens() for id in ids]

    def compare(self, out, expected):
        for split, texts in expected.items():
            same = self.tokens(os.path.join(out, split)) == self.direct(tuple(texts))
            self.expect(same, f"{out}/{split} holds other tokens than a direct tokenization")
        with open(os.path.join(out, "manifest.json"), encoding="utf-8") as file:
            manifest = json.load(file)
        recorded = {}
        for part in manifest["parts"]:
            recorded |= part["shards"]
            for path, digest in part["sha256"].items():
                content = self.hub.repositories[manifest["repository"]][path]
                self.expect(digest == hashlib.sha256(content).hexdigest(), f"manifest: {path}")
        there = {f"{s}/{n}" for s in expected for n in os.listdir(os.path.join(out, s)) if n.endswith(".rrs")}
        self.expect(set(recorded) == there, f"manifest: {sorted(recorded)} and not {sorted(there)}")
        for name, about in recorded.items():
            with open(os.path.join(out, name), "rb") as file:
                self.expect(hashlib.sha256(file.read()).hexdigest() == about["sha256"], f"manifest: {name}")
        extra = set(os.listdir(out)) - set(expected) - {"manifest.json", ".lock", "downloads"}
        self.expect(not extra, f"{out} also holds {extra}")
        self.expect(self.hub.leaks == 0, "the token went to the storage")


def working_on(out):
    """Is there a process with this directory among its arguments?"""
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline", "rb") as file:
                if os.fsencode(out) in file.read():
                    return True
        except OSError:
            pass  # it is gone, or someone else's
    return False


# ---- the tests ------------------------------------------------------------------------------------------------------


def every_set(c):
    """Each kind of set, in parts of one and of several files, equals a direct tokenization. The second time all is
    there."""
    out = c.out()
    c.hub.fail = {"list": 2}
    c.run("wikitext-2", out, says="wikitext-2 is in")
    c.compare(out, c.texts["wikitext-2"])
    c.expect(not os.path.exists(os.path.join(out, "downloads")), "downloads are left")
    before = list(c.hub.requests), c.hub.lists
    c.run("wikitext-2", out, says="3 parts, 3 done", python=os.environ.get("PYTHON", "python3"))
    c.expect(before == (c.hub.requests, c.hub.lists), "what was finished is asked for again")
    c.run("wikitext-2", out, "--articles", code=2, says="was begun with --articles False, not True")
    c.run("pile", out, code=2, says="was begun with the set wikitext-2, not pile")
    os.remove(os.path.join(out, "manifest.json"))
    c.run("wikitext-2", out, code=2, says="train is there already, without a manifest.json beside it")
    out = c.out()
    c.run("wikitext-2", out, "--articles", "--keep")
    c.compare(out, c.texts["articles"])
    c.expect(len(os.listdir(os.path.join(out, "downloads/wikitext-2-raw-v1"))) == 4, "downloads are not kept")
    out = c.out()
    c.run("fineweb-edu", out, "--part-bytes", "1", "--jobs", "1")
    c.compare(out, c.texts["fineweb-edu"])
    out = c.out()
    c.run("slimpajama", out, "--subset", "chunk1", "--revision", "v1", "--shard-tokens", "20000")
    c.compare(out, c.texts["slimpajama"])
    out = c.out()
    c.run("pile", out, "--train-files", "2")
    c.compare(out, c.texts["pile"])


def interrupted_download(c):
    """Killed in the middle of a file, then of another by SIGTERM: what is there is not asked for again."""
    out, first = c.out(), "train/chunk1/example_train_1.jsonl.zst"
    part = os.path.join(out, "downloads", first + ".part")
    size = len(c.hub.repositories["cerebras/SlimPajama-627B"][first])
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 1)):
        c.hub.silent = {first}
        seen = os.path.getsize(part) if os.path.exists(part) else 0
        process = c.start("slimpajama", out, "--subset", "chunk1", "--jobs", "2")
        c.await_that(lambda: os.path.exists(part) and os.path.getsize(part) > seen, "half a file")
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
        c.expect(process.returncode == code, f"exit code {process.returncode} after {number}: {said}")
        c.expect(os.listdir(out).count("train") == 0, "a split appears before it is complete")
        c.hub.silent = set()
    have = os.path.getsize(part)
    c.expect(size // 2 < have < size, f"{have} of {size} bytes after two interruptions")
    c.hub.forget()
    c.run("slimpajama", out, "--subset", "chunk1")
    c.expect((first, have) in c.hub.requests, f"the download does not go on at byte {have}: {c.hub.requests}")
    validation = [path for path, _ in c.hub.requests if path.startswith(("validation", "test"))]
    c.expect(not validation, f"asked for again: {validation}")
    c.compare(out, c.texts["slimpajama"])


def bad_servers(c):
    """Errors that pass, cut connections, damage, a server without Range, and what does not pass."""
    files = sorted(p for p in c.hub.repositories["cerebras/SlimPajama-627B"] if p.startswith("train/chunk1"))
    out = c.out()
    c.hub.fail, c.hub.cut, c.hub.damage = {files[0]: 3}, {files[1]: 4}, {files[2]: 1}
    c.hub.damage["test/chunk1/example_holdout_0.small.jsonl.zst"] = 1
    c.hub.no_range, c.hub.cut[files[3]] = {files[3]}, 1
    said = c.run("slimpajama", out, "--subset", "chunk1", "--jobs", "1", says=f"{files[0]}: 500 ")
    c.expect(said.count("what came is damaged") == 2, said)
    c.compare(out, c.texts["slimpajama"])
    out = c.out()
    c.hub.forget()
    c.hub.damage = {files[2]: 2}
    c.run("slimpajama", out, "--subset", "chunk1", code=1, says=f"{files[2]}: what came was damaged twice; its check")
    c.expect(not os.path.exists(os.path.join(out, "train")), "a damaged file is used")
    c.hub.forget()
    c.hub.fail = {files[2]: 100}
    c.run("slimpajama", out, "--subset", "chunk1", code=1, says=f"{files[2]}: given up after 8 attempts: 500 ")
    c.hub.forget()
    c.run("slimpajama", out, "--subset", "chunk1")
    c.compare(out, c.texts["slimpajama"])
    del c.hub.repositories["monology/pile-uncopyrighted"]
    c.run("pile", c.out(), code=1, says="monology/pile-uncopyrighted, revision main: the server says 404")


def interrupted_tokenization(c):
    """riverrun killed while it writes; prepare_data.py stopped and killed while riverrun works."""
    out = c.out()
    wrapper, flag = os.path.join(c.work, "riverrun.sh"), os.path.join(c.work, "flag")
    with open(wrapper, "w", encoding="ascii") as file:
        file.write(
            f"#!/bin/sh\n"
            f"case $* in *part-*) [ -e '{flag}' ] && {{ . '{flag}'; }} ;; esac\n"
            f"exec '{c.riverrun}' \"$@\"\n"
        )
    os.chmod(wrapper, 0o755)
    more = ("--part-bytes", "30000", "--riverrun", wrapper)
    for operation in (3, 12):  # of the file layer: while shards are written, while they are put into place
        with open(flag, "w", encoding="ascii") as file:
            file.write(f"export RIVERRUN_TEST_FAULT=kill:{operation}\n")
        c.run("fineweb-edu", out, *more, code=1, says="riverrun tokenize was ended by signal 9")
    for number in (signal.SIGTERM, signal.SIGKILL):
        with open(flag, "w", encoding="ascii") as file:
            file.write(f"rm '{flag}'; touch '{flag}.met'; sleep 0.5\n")
        process = c.start("fineweb-edu", out, *more)
        c.await_that(lambda: os.path.exists(flag + ".met"), "riverrun")
        process.send_signal(number)
        process.communicate(timeout=300)
        os.remove(flag + ".met")
        c.expect(process.returncode in (1, -9), f"exit code {process.returncode}")
        c.expect(not os.path.exists(os.path.join(out, "train")), "a split appears before it is complete")
    c.await_that(lambda: not working_on(out), "the end of the riverrun that lost its parent")
    c.hub.forget()
    c.run("fineweb-edu", out, *more)
    fetched = {path for path, _ in c.hub.requests}
    c.expect("sample/10BT/000_00000.parquet" not in fetched, "a finished download is repeated")
    c.compare(out, c.texts["fineweb-edu"])


def refusals(c):
    out = c.out()
    c.run("fineweb-edu", out, "--subset", "sample-1T", code=2, says="there is no subset 'sample-1T'")
    c.run("pile", out, "--articles", code=2, says="--articles is for the wikitext sets")
    c.run("tinystories", out, code=2, says="invalid choice")
    c.run("fineweb-edu", out, "--tokenizer", "gpt5", code=2, says="there is no tokenizer 'gpt5'")
    c.run("fineweb-edu", out, "--riverrun", "/nowhere/riverrun", code=2, says="cannot run /nowhere/riverrun")
    c.expect(not os.path.exists(os.path.join(out, "manifest.json")), "a refusal leaves a manifest")
    files = c.hub.repositories["HuggingFaceFW/fineweb-edu"]
    name, kept = "sample/10BT/002_00000.parquet", files["sample/10BT/002_00000.parquet"]
    c.hub.requests.clear()
    c.run("fineweb-edu", out, "--plan", says="4 files, ")
    c.hub.claim = {name: {"size": 10**17}}
    c.run("fineweb-edu", c.out(), code=1, says="has too little space; free some, give another --out, or --ignore-space")
    c.hub.claim = {}
    c.expect(not c.hub.requests, "--plan, or an attempt without space, downloads")
    out, path = c.out(), "train/chunk1/example_train_0.jsonl.zst"
    limit = len(c.hub.repositories["cerebras/SlimPajama-627B"][path]) - 1
    if shutil.which("prlimit"):
        c.run("slimpajama", out, "--subset", "chunk1", code=1, says=f"{path}.part: File too large", file_limit=limit)
    c.run("slimpajama", out, "--subset", "chunk1")
    c.compare(out, c.texts["slimpajama"])
    cases = {
        "can't be read as parquet": b"PAR1" * 40,
        "has no column 'text'; it has words": None,
        "row 2 has no 'text'": parquet(["a", "b", None, "d"], 2),
    }
    other = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"] * 99}), other)
    cases["has no column 'text'; it has words"] = other.getvalue()
    for says, content in cases.items():
        out, files[name] = c.out(), content
        c.run("fineweb-edu", out, code=1, says=says)
        c.expect(not os.path.exists(os.path.join(out, "train")), "a bad file is used")
        c.expect(not os.path.exists(os.path.join(out, "unfinished", "train")), "half a part is left")
    files[name] = kept
    out, bad = c.out(), jsonl(["a", "b"])[:-9]
    c.hub.repositories["cerebras/SlimPajama-627B"]["train/chunk1/example_train_1.jsonl.zst"] = bad
    c.run("slimpajama", out, "--subset", "chunk1", code=2, says="is cut off: it ends inside gzip data")
    c.expect(not os.path.exists(os.path.join(out, "train")), "a cut file is used")


def main():
    c = Check(*sys.argv[1:3])
    for test in (every_set, interrupted_download, interrupted_tokenization, bad_servers, refusals):
        c.hub.forget()
        start = time.monotonic()
        test(c)
        print(f"{test.__name__}: {time.monotonic() - start:.1f} s")
    if c.failures:
        print(f"{c.failures} failures")
        return 1
    print("all as expected")
    return 0


if __name__ == "__main__":
    sys.exit(main())
