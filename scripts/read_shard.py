#!/usr/bin/env python3
"""read_shard.py: reads riverrun's token shards without riverrun, from docs/formats.md alone.

    python3 scripts/read_shard.py PATH...           one JSON line a shard: its header
    python3 scripts/read_shard.py --tokens PATH...  one line a token: its id, and behind it " -" if it is no target
    python3 scripts/read_shard.py --text PATH...    the text that the shards were made from (tokenizer "bytes" only)

PATH is a shard or a directory of shards. Every checksum is verified. Needs nothing but Python 3.8, and for zstd one of:
the module compression.zstd (Python 3.14), the package zstandard, the program zstd.
"""

import json
import os
import signal
import struct
import subprocess
import sys

HEADER = struct.Struct("<8s6I5Qq6Q64s256s56sQ")
FIELDS = ("magic version header_bytes flags token_bytes frame_tokens reserved_0 tokens documents frames text_bytes "
          "vocab eod tokenizer_identity seek_offset document_offset file_bytes seek_hash document_hash tokenizer_name "
          "separator reserved_1 header_hash").split()
HAS_MASK, PLANES = 1, 2


def xxh64(data):
    try:
        import xxhash
        return xxhash.xxh64_intdigest(data)
    except ImportError:
        return xxh64_plain(data)


def xxh64_plain(data):
    """XXH64 with seed 0, as specified by its author; a few megabytes a second."""
    p1, p2, p3, p4, p5 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                          0x27D4EB2F165667C5)
    mask = (1 << 64) - 1
    rotate = lambda x, r: ((x << r) | (x >> (64 - r))) & mask
    stir = lambda lane, word: rotate((lane + word * p2) & mask, 31) * p1 & mask
    stripes = len(data) // 32 * 32
    if stripes:
        a, b, c, d = (p1 + p2) & mask, p2, 0, -p1 & mask
        for w, x, y, z in struct.iter_unpack("<4Q", data[:stripes]):
            a, b, c, d = stir(a, w), stir(b, x), stir(c, y), stir(d, z)
        h = (rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18)) & mask
        for lane in (a, b, c, d):
            h = ((h ^ stir(0, lane)) * p1 + p4) & mask
    else:
        h = p5
    h = (h + len(data)) & mask
    at = stripes
    while len(data) - at >= 8:
        h = (rotate(h ^ stir(0, int.from_bytes(data[at:at + 8], "little")), 27) * p1 + p4) & mask
        at += 8
    if len(data) - at >= 4:
        h = (rotate(h ^ int.from_bytes(data[at:at + 4], "little") * p1 & mask, 23) * p2 + p3) & mask
        at += 4
    for byte in data[at:]:
        h = rotate(h ^ byte * p5 & mask, 11) * p1 & mask
    h = (h ^ h >> 33) * p2 & mask
    h = (h ^ h >> 29) * p3 & mask
    return h ^ h >> 32


def decompress_all(data, sizes):
    """The contents of zstd frames that lie back to back; `sizes` are their compressed sizes."""
    try:
        from compression import zstd
        one = zstd.decompress
    except ImportError:
        try:
            import zstandard
            one = zstandard.ZstdDecompressor().decompress
        except ImportError:
            return subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout
    contents, at = [], 0
    for size in sizes:
        contents.append(one(data[at:at + size]))
        at += size
    return b"".join(contents)


class Shard:
    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            data = file.read()
        self.require(len(data) >= HEADER.size, f"{len(data)} bytes are no header")
        self.h = h = dict(zip(FIELDS, HEADER.unpack_from(data)))
        self.require(h["magic"] == b"\x89RRS\r\n\x1a\n", "not a shard")
        self.require(h["version"] == 1 and h["header_bytes"] == HEADER.size, "not version 1")
        self.require(xxh64(data[:504]) == h["header_hash"], "the header's checksum is wrong")
        known = h["flags"] <= HAS_MASK | PLANES and not h["reserved_0"] and not any(h["reserved_1"])
        self.require(known, "it uses unknown features")
        self.require(h["file_bytes"] == len(data), f"{len(data)} bytes, expected {h['file_bytes']}")
        seek, documents = data[h["seek_offset"]:h["document_offset"]], data[h["document_offset"]:]
        self.require(len(seek) == 24 * h["frames"] and len(documents) == 16 * h["documents"], "tables of a wrong size")
        self.require(xxh64(seek) == h["seek_hash"], "the seek table's checksum is wrong")
        self.require(xxh64(documents) == h["document_hash"], "the document table's checksum is wrong")
        self.frames = list(struct.iter_unpack("<QQQ", seek))
        self.documents = {start: flags for start, flags, _ in struct.iter_unpack("<QII", documents)}
        self.compressed = data[HEADER.size:h["seek_offset"]]
        self.separator = h["separator"].rstrip(b"\0")
        ends = [HEADER.size] + [offset + size for offset, size, _ in self.frames]
        self.require(ends == [frame[0] for frame in self.frames] + [h["seek_offset"]], "frames are not back to back")

    def require(self, condition, problem):
        if not condition:
            sys.exit(f"{self.path}: {problem}")

    def header(self):
        kept = {k: v for k, v in self.h.items() if isinstance(v, int) and not k.startswith("reserved")}
        kept["tokenizer_identity"] = f"{self.h['tokenizer_identity']:016x}"
        kept["tokenizer"] = self.h["tokenizer_name"].rstrip(b"\0").decode()
        kept["separator"] = self.separator.decode("utf-8", "replace")
        return {"path": self.path, **kept}

    def tokens(self):
        """Yields (ids, mask) of every frame; mask holds a truth value a token."""
        h = self.h
        try:
            raw = decompress_all(self.compressed, [size for _, size, _ in self.frames])
        except Exception as problem:  # each way to decompress has its own kind
            self.require(False, f"the frames do not decompress: {problem}")
        at, width = 0, h["token_bytes"]
        for number, (_, _, expected) in enumerate(self.frames):
            count = min(h["frame_tokens"], h["tokens"] - number * h["frame_tokens"])
            mask_bytes = (count + 7) // 8 if h["flags"] & HAS_MASK else 0
            frame = raw[at:at + count * width + mask_bytes]
            at += len(frame)
            self.require(xxh64(frame) == expected, f"the checksum of frame {number} is wrong")
            body = frame[:count * width]
            planes = [body[b * count:(b + 1) * count] if h["flags"] & PLANES else body[b::width] for b in range(width)]
            ids = list(planes[0])
            for b in range(1, width):
                ids = [low | byte << 8 * b for low, byte in zip(ids, planes[b])]
            self.require(max(ids) < h["vocab"], f"frame {number} has an id outside the vocabulary")
            bits = frame[count * width:]
            yield ids, [not mask_bytes or bits[i // 8] >> i % 8 & 1 for i in range(count)]
        self.require(at == len(raw), "the frames hold more than the header says")

    def text(self):
        self.require(self.h["tokenizer_name"].rstrip(b"\0") == b"bytes", "its tokenizer is not 'bytes'")
        position, out = 0, bytearray()
        for ids, _ in self.tokens():
            for id in ids:
                flags = self.documents.get(position, 1)  # 1: nothing stood before the document
                out += b"" if flags == 1 else self.separator + (b"\n" if flags == 0 else b"")
                if id < 256:
                    out.append(id)
                position += 1
        return bytes(out)


def shards(paths):
    for path in paths:
        if os.path.isdir(path):
            names = sorted(os.fsencode(name) for name in os.listdir(path))
            yield from (Shard(os.path.join(path, os.fsdecode(name))) for name in names if name.endswith(b".rrs"))
        else:
            yield Shard(path)


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    mode = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1].startswith("--") else ""
    paths = sys.argv[1 + bool(mode):]
    if not paths or mode not in ("", "--tokens", "--text"):
        sys.exit(__doc__.strip())
    for shard in shards(paths):
        if mode == "--text":
            sys.stdout.buffer.write(shard.text())
        elif mode == "--tokens":
            for ids, mask in shard.tokens():
                sys.stdout.write("".join(f"{id}\n" if m else f"{id} -\n" for id, m in zip(ids, mask)))
        else:
            print(json.dumps(shard.header()))


if __name__ == "__main__":
    main()
