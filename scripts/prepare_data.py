#!/usr/bin/env python3
"""prepare_data.py: a public data set, downloaded from the Hugging Face hub and turned into shards, in one command.

    python3 scripts/prepare_data.py wikitext-103 --out data/wikitext-103
    python3 scripts/prepare_data.py fineweb-edu --subset sample-10BT --tokenizer gpt2/tokenizer.json --out data/edu

Afterwards DIR holds train, valid and (where the set has one) test, each a data set for riverrun, and manifest.json:
where everything came from, with checksums. docs/data.md has the sets, their sizes and splits.

The work is cut into parts: some files are downloaded, checked and tokenized, the part is written down in the manifest,
and its downloads are removed. So the disk holds the downloads of one part at a time, and the same command after an
interruption of any kind continues where it was: in the middle of a file, at the file, at the part. Shards are made in
DIR/unfinished and move to their place when the last one of the split is there.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import prepare_hub
import prepare_sets
from prepare_hub import Problem
from prepare_sets import SETS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PART_FILES = 2000  # in a part at the most: they are arguments of a command
SHARDS_PER_BYTE = 1.5  # of a download, at the most: by this the space for shards is estimated
TEXT_KEY = "text"


def log(text):
    print(f"prepare_data: {text}", file=sys.stderr, flush=True)


def size_text(size):
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            break
        size /= 1000
    else:
        unit = "TB"
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


# ---- the manifest ---------------------------------------------------------------------------------------------------


class Manifest:
    """DIR/manifest.json, replaced as a whole whenever something was finished."""

    def __init__(self, out):
        self.path = os.path.join(out, "manifest.json")
        self.content = None
        try:
            with open(self.path, encoding="utf-8") as file:
                self.content = json.load(file)
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise Problem(f"{self.path} is not JSON: {error}; give another --out, or remove it", 2) from None

    def save(self):
        temporary = self.path + ".tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(self.content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        prepare_hub.sync_directory(os.path.dirname(self.path))


def begin(manifest, options, hub, data_set, revision):
    """A new manifest: what there is at this moment, and how it is cut into parts."""
    commit = hub.revision(data_set.repository, revision)
    patterns = data_set.patterns(data_set.subset(options["subset"]))
    listed = {d: None for d in map(prepare_sets.directory_of, patterns.values())}
    for directory in listed:
        listed[directory] = hub.files(data_set.repository, commit, directory)
    files, parts = {}, []
    for split in ("valid", "test", "train"):
        if split not in patterns:
            continue
        there = listed[prepare_sets.directory_of(patterns[split])]
        names = sorted(name for name in there if fnmatch.fnmatchcase(name, patterns[split]))
        if not names:
            raise Problem(f"{data_set.repository} at {commit} has no files {patterns[split]}")
        if split == "train" and options["train_files"]:
            names = names[: options["train_files"]]
        files |= {name: there[name] for name in names}
        parts += cut_into_parts(split, names, files, options["part_bytes"], data_set.kind == "lines")
    manifest.content = {
        "set": options["set"],
        "repository": data_set.repository,
        "commit": commit,
        "options": options,
        "files": files,
        "parts": parts,
    }
    manifest.save()


def cut_into_parts(split, names, files, part_bytes, whole):
    """Neighbouring files until they have part_bytes; `whole`: all of them, because text goes on from file to file."""
    parts, size = [], 0
    for name in names:
        full = not whole and parts and (size >= part_bytes or len(parts[-1]["files"]) == PART_FILES)
        if not parts or full:
            parts.append({"name": f"part-{len(parts):05}", "split": split, "files": []})
            size = 0
        parts[-1]["files"].append(name)
        size += files[name]["size"]
    return parts


def resume(manifest, options):
    before = manifest.content["options"]
    for key, value in options.items():
        if before.get(key) != value:
            if key == "tokenizer":
                raise Problem(f"{manifest.path} was begun with another tokenizer; give that, or another --out", 2)
            flag = "--" + key.replace("_", "-") if key != "set" else "the set"
            text = f"{manifest.path} was begun with {flag} {before.get(key)}, not {value}; give that, or another --out"
            raise Problem(text, 2)


# ---- space ----------------------------------------------------------------------------------------------------------


def survey(manifest, downloads, keep):
    """Bytes that are still to come: (downloads that lie on the disk at the same time, shards)."""
    most = total = 0
    for part in manifest.content["parts"]:
        if part.get("done"):
            continue
        missing = part_bytes = 0
        for name in part["files"]:
            size = manifest.content["files"][name]["size"]
            there = 0
            for path in (os.path.join(downloads, name), os.path.join(downloads, name) + ".part"):
                there = max(there, os.path.getsize(path) if os.path.exists(path) else 0)
            missing += max(size - there, 0)
            part_bytes += size
        most = most + missing if keep else max(most, missing)
        total += part_bytes
    return most, int(total * SHARDS_PER_BYTE)


def tell_plan(manifest, out, need):
    content = manifest.content
    done = sum(1 for part in content["parts"] if part.get("done"))
    size = sum(about["size"] for about in content["files"].values())
    free = shutil.disk_usage(out).free
    log(
        f"{content['set']}: {content['repository']} at {content['commit'][:12]}, {len(content['files'])} files, "
        f"{size_text(size)}; {len(content['parts'])} parts, {done} done"
    )
    log(
        f"still needed in {out}: {size_text(need[0])} for downloads at a time and up to {size_text(need[1])} "
        f"for shards; {size_text(free)} are free"
    )
    return sum(need) <= free


# ---- one part -------------------------------------------------------------------------------------------------------


def download(hub, manifest, part, downloads, jobs):
    content = manifest.content

    def one(name):
        target = os.path.join(downloads, name)
        return hub.download(content["repository"], content["commit"], name, content["files"][name], target)

    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        return dict(zip(part["files"], pool.map(one, part["files"])))
    except BaseException:
        hub.stop.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def tokenize(riverrun, tokenizer, out, prefix, inputs, feed=None, shard_tokens=None):
    """Run `riverrun tokenize`. `feed`: bytes for its standard input. If giving them fails, it is stopped before it
    could take the end of what it got for the end of the text."""
    command = [riverrun, "tokenize", "--out", out, "--prefix", prefix, "--overwrite", "--tokenizer", tokenizer]
    command += ["--shard-tokens", str(shard_tokens)] if shard_tokens else []
    process = subprocess.Popen(command + inputs, stdin=subprocess.DEVNULL if feed is None else subprocess.PIPE)
    try:
        if feed is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended early, and has said why
                for piece in feed:
                    process.stdin.write(piece)
                process.stdin.close()
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        if process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()
    if code < 0:
        raise Problem(f"riverrun tokenize was ended by signal {-code}")
    if code:
        raise Problem(f"riverrun tokenize failed with exit code {code}", code)


def outputs(data_set, part, paths, first, by_article):
    """What a part is turned into: (split, arguments that name the inputs, what goes to standard input)."""
    split = part["split"]
    if data_set.kind == "jsonl":
        yield split, ["--jsonl-key", TEXT_KEY, "--", *paths], None
    elif data_set.kind == "lines" and by_article:
        yield split, ["--jsonl-key", TEXT_KEY, "-"], prepare_sets.articles(paths, TEXT_KEY)
    elif data_set.kind == "lines":
        yield split, ["--separator=", "-"], (line.encode() for line in prepare_sets.lines(paths, TEXT_KEY))
    elif not data_set.held_out:
        yield split, ["--jsonl-key", TEXT_KEY, "-"], prepare_sets.documents(paths, TEXT_KEY, first, "all")
    else:
        for name, which in ((split, "kept"), ("valid", "held")):
            yield name, ["--jsonl-key", TEXT_KEY, "-"], prepare_sets.documents(paths, TEXT_KEY, first, which)


def do_part(manifest, part, data_set, hub, args, unfinished, downloads):
    options = manifest.content["options"]
    log(f"{part['split']} {part['name']}: {len(part['files'])} files")
    sums = download(hub, manifest, part, downloads, args.jobs)
    paths = [os.path.join(downloads, name) for name in part["files"]]
    first = sum(p.get("rows", 0) for p in manifest.content["parts"] if p is not part and p["split"] == part["split"])
    if data_set.kind != "jsonl":
        part["rows"] = sum(map(prepare_sets.count_rows, paths))
    part["shards"] = {}
    for split, inputs, feed in outputs(data_set, part, paths, first, options["articles"]):
        out = os.path.join(unfinished, split)
        tokenize(args.riverrun, args.tokenizer, out, part["name"], inputs, feed, options["shard_tokens"])
        for name in sorted(os.listdir(out)):
            if name.startswith(part["name"] + "-") and name.endswith(".rrs"):
                path = os.path.join(out, name)
                about = {"bytes": os.path.getsize(path), "sha256": prepare_hub.checksums(path)["sha256"]}
                part["shards"][f"{split}/{name}"] = about
    part["sha256"] = sums
    part["done"] = True
    manifest.save()
    if not args.keep:
        for path in paths:
            os.remove(path)


# ---- the whole ------------------------------------------------------------------------------------------------------


def finish(manifest, data_set, out, unfinished, downloads, keep):
    """Every part is done: the splits move to their places."""
    splits = set(part["split"] for part in manifest.content["parts"]) | ({"valid"} if data_set.held_out else set())
    for split in sorted(splits):
        made, place = os.path.join(unfinished, split), os.path.join(out, split)
        if os.path.exists(made):
            os.rename(made, place)
            prepare_hub.sync_directory(out)
        elif not os.path.exists(place):
            raise Problem(f"{place} is gone, though {manifest.path} says it was made; start anew with another --out", 2)
    shutil.rmtree(unfinished, ignore_errors=True)
    if not keep:
        shutil.rmtree(downloads, ignore_errors=True)
    log(f"{manifest.content['set']} is in {out}: {', '.join(sorted(splits))}")


def try_tokenizer(args, out):
    """SHA-256 of the tokenizer.json that shards will have; what is wrong with the program or the tokenizer comes out
    here, before anything is downloaded."""
    with tempfile.TemporaryDirectory(prefix=".try-", dir=out) as directory:
        made = os.path.join(directory, "shards")
        command = [args.riverrun, "tokenize", "--out", made, "--tokenizer", args.tokenizer, os.devnull]
        try:
            result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        except OSError as error:
            text = f"cannot run {args.riverrun}: {error.strerror}; build it with make, or give --riverrun"
            raise Problem(text, 2) from None
        if result.returncode:
            raise Problem(result.stderr.strip().splitlines()[-1].removeprefix("riverrun: "), 2)
        return prepare_hub.checksums(os.path.join(made, "tokenizer.json"))["sha256"]


def need_pyarrow():
    """Parquet needs pyarrow. Where this Python lacks it, the program is started again with the one of make_venv.sh."""
    try:
        import pyarrow.parquet  # noqa: F401

        return
    except ImportError as error:
        if os.environ.get("PREPARE_DATA_RESTARTED"):
            raise Problem(f"pyarrow does not load: {error}") from None
    command = ["sh", "scripts/make_venv.sh", "data"]
    made = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    last = made.stdout.strip().rpartition("\n")[2]
    if made.returncode:
        raise Problem(f"this set comes as parquet, which needs pyarrow: {last}")
    python = os.path.join(ROOT, last)
    os.environ["PREPARE_DATA_RESTARTED"] = "1"
    sys.stderr.flush()
    os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:]])


def parse():
    def positive(text):
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text} is not at least 1")
        return value

    there = os.path.join(ROOT, "build", "riverrun")
    found = os.environ.get("RIVERRUN") or (there if os.path.exists(there) else shutil.which("riverrun") or there)
    p = argparse.ArgumentParser(description="A public data set to shards. docs/data.md says more.")
    p.add_argument("set", choices=list(SETS), help="the data set")
    p.add_argument("--out", required=True, metavar="DIR", help="where train, valid and test go")
    p.add_argument("--tokenizer", default="bytes", help="as for riverrun tokenize (bytes)")
    p.add_argument("--subset", metavar="NAME", help="a part of fineweb-edu (sample-10BT) or of slimpajama (all)")
    p.add_argument("--train-files", type=positive, metavar="N", help="only the first N files of the training split")
    p.add_argument("--articles", action="store_true", help="wikitext: every article is a document, not every split")
    p.add_argument("--shard-tokens", type=positive, metavar="N", help="tokens in a shard (riverrun's default)")
    p.add_argument("--part-bytes", type=positive, default=4 * 10**9, metavar="N", help="downloads at a time (4e9)")
    p.add_argument("--revision", default="main", help="branch, tag or commit of the data set (main as it is now)")
    p.add_argument("--jobs", type=positive, default=4, metavar="N", help="downloads side by side (4)")
    p.add_argument("--keep", action="store_true", help="keep what was downloaded, in DIR/downloads")
    p.add_argument("--plan", action="store_true", help="say how much there is to do, and end")
    p.add_argument("--ignore-space", action="store_true", help="begin even if the disk may not hold everything")
    p.add_argument("--riverrun", default=found, metavar="PATH", help="the program")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    p.add_argument("--hub", default=hub, metavar="URL", help=f"the server ({hub})")
    args = p.parse_args()
    if args.articles and SETS[args.set].kind != "lines":
        p.error("--articles is for the wikitext sets")
    return args


def prepare(args, hub):
    data_set = SETS[args.set]
    data_set.subset(args.subset)
    if data_set.kind != "jsonl" and not args.plan:
        need_pyarrow()
    os.makedirs(args.out, exist_ok=True)
    lock = open(os.path.join(args.out, ".lock"), "w", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"another prepare_data.py is at work in {args.out}", 2) from None
    kept = ("set", "subset", "train_files", "articles", "shard_tokens", "part_bytes", "revision")
    options = {key: getattr(args, key) for key in kept}
    options["tokenizer"] = try_tokenizer(args, args.out)  # its checksum: what a path holds may change
    manifest = Manifest(args.out)
    if manifest.content is None:
        for split in ("train", "valid", "test"):
            place = os.path.join(args.out, split)
            if os.path.exists(place):
                raise Problem(f"{place} is there already, without a manifest.json beside it; give another --out", 2)
        begin(manifest, options, hub, data_set, args.revision)
    else:
        resume(manifest, options)
    unfinished, downloads = os.path.join(args.out, "unfinished"), os.path.join(args.out, "downloads")
    fits = tell_plan(manifest, args.out, survey(manifest, downloads, args.keep))
    if args.plan:
        return
    if not fits and not args.ignore_space:
        raise Problem(f"{args.out} has too little space; free some, give another --out, or --ignore-space")
    for part in manifest.content["parts"]:
        if not part.get("done"):
            do_part(manifest, part, data_set, hub, args, unfinished, downloads)
    finish(manifest, data_set, args.out, unfinished, downloads, args.keep)


def main():
    args = parse()

    def stop(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    pause = float(os.environ.get("PREPARE_DATA_PAUSE", "1"))  # tests have less patience
    hub = prepare_hub.Hub(args.hub, log, os.environ.get("HF_TOKEN"), pause)
    try:
        prepare(args, hub)
    except Problem as problem:
        log(problem)
        return problem.code
    except OSError as error:
        log(f"{error.filename or 'the disk'}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        log("stopped; the same command continues")
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # without waiting for downloads that hang on a silent server
