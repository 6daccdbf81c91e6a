#!/usr/bin/env python3
"""check_transformers.py: do Hugging Face transformers and riverrun see the same model in a directory?

    python3 scripts/check_transformers.py DIRECTORY[=OTHER]... --riverrun build/riverrun

For each DIRECTORY (a checkpoint, an export, or what transformers itself saved): AutoModelForCausalLM opens it without
missing, unexpected or mismatching tensors, its logits equal riverrun's (relative Frobenius error at most 5e-5 in fp32),
the most probable continuation of a text, token by token from a state on both sides, is the same,
AutoTokenizer gives riverrun's ids and its texts back. With OTHER, riverrun reads that in place of DIRECTORY: what
`riverrun import` made of it. Prints one line per comparison; exit code 1 if any fails.

A model that opens by Python files of its own is also read in pieces from a state, in rows of a batch, with padding and
by beam search, and saved from transformers and opened again, there and in riverrun. Those files are run: give
directories that you trust.

riverrun's side comes from the test program `logits` beside the riverrun binary (`make tests` builds it), or --logits.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

LIMIT = 5e-5
LENGTHS = (1, 2, 3, 64, 131, 300)  # below, at and beyond the chunks of either side (64 and 256)

TEXTS = (
    "",
    "a",
    "int main(void) {\n\treturn 0;\n}\n",
    "  two leading spaces, a trailing one ",
    "tabs\tand\r\nline ends\n\n\n",
    "Größe, naïve café, Ελληνικά, русский, עברית, العربية, 中文, 日本語, 한국어",
    "emoji \U0001f600 and \U0001f468\u200d\U0001f469\u200d\U0001f467, combining e\u0301, no-break\u00a0space",
    "".join(map(chr, range(1, 256))),
    "\u0000 a zero byte",
)


PROMPT = "static int "
CONTINUATION = 48  # tokens
PIECES = (50, 1, 1, 30, 1, 48)  # of a text of 131 tokens


def read_config(directory):
    return json.loads((directory / "config.json").read_text().replace("Infinity", "1e400"))


def has_own_code(directory):
    return "auto_map" in read_config(directory)


class Check:
    def __init__(self, program, riverrun):
        self.program = program
        self.binary = riverrun
        self.failures = 0
        self.generated = 0

    def report(self, good, text):
        print(("ok    " if good else "FAIL  ") + text, flush=True)
        self.failures += not good

    def riverrun(self, arguments, data):
        done = subprocess.run([self.program, *arguments], input=data, capture_output=True)
        if done.returncode != 0:
            raise RuntimeError(f"{self.program} {' '.join(arguments)}: {done.stderr.decode().strip()}")
        return done.stdout

    def logits_of_riverrun(self, directory, ids):
        raw = self.riverrun([str(directory)], " ".join(map(str, ids)).encode())
        return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(len(ids), -1)

    def model(self, directory, ours):
        """Opens it as it is, and in fp32; compares logits."""
        wanted, own = read_config(directory), {"trust_remote_code": True} if has_own_code(directory) else {}
        plain = AutoModelForCausalLM.from_pretrained(directory, **own)
        self.report(type(plain).__name__ == wanted["architectures"][0],
                    f"{directory}: opens as {type(plain).__name__}, {plain.dtype}")
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, **own)
        trouble = {k: v for k, v in info.items() if v}
        self.report(not trouble, f"{directory}: every tensor has its place{' but ' + str(trouble) if trouble else ''}")
        model.eval()
        generator = torch.Generator().manual_seed(1)
        worst = 0.0
        for length in LENGTHS:
            ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
            with torch.no_grad():
                theirs = model(ids).logits[0].double()
            mine = self.logits_of_riverrun(ours, ids[0].tolist()).double()
            if theirs.shape != mine.shape:
                shapes = f"{tuple(theirs.shape)} there, {tuple(mine.shape)} in riverrun"
                self.report(False, f"{directory}: logits are {shapes}")
                return model
            error = float((theirs - mine).norm() / theirs.norm())
            worst = max(worst, error) if error == error else float("inf")
        self.report(worst <= LIMIT, f"{directory}: logits differ by {worst:.1e} at most, the limit is {LIMIT:.0e}")
        if own:
            if plain.dtype != torch.float32:
                self.rounded(directory, plain, model, ids)
            self.own(directory, model, wanted)
        return model

    def rounded(self, directory, plain, model, ids):
        """In its own narrower type it computes about the same."""
        with torch.no_grad():
            coarse, fine = plain(ids).logits.double(), model(ids).logits.double()
        error = float((coarse - fine).norm() / fine.norm())
        with safe_open(directory / "model.safetensors", "pt") as file:
            kept = {name: file.get_tensor(name).dtype for name in file.keys()}
        other = [name for name, tensor in plain.named_parameters() if name in kept and tensor.dtype != kept[name]]
        but = f", but not {other}" if other else ""
        self.report(not other, f"{directory}: every tensor has its type there{but}")
        self.report(error < 0.1, f"{directory}: in {plain.dtype} logits differ by {error:.1e} from those in float32")

    def own(self, directory, model, wanted):
        """A model that came with Python files: states, batches, beams, and saving it from there."""
        ids = torch.randint(0, model.config.vocab_size, (2, sum(PIECES)), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            whole = model(ids).logits
            rows = torch.cat([model(row[None]).logits for row in ids])
            self.equal(whole, rows, f"{directory}: rows of a batch are as if alone")
            room = min((s.get("context", 1 << 30) for s in wanted["settings"].values()), default=0)
            if room >= ids.shape[1]:
                cache, parts = None, []
                for piece in ids.split(PIECES, 1):
                    out = model(piece, past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    parts.append(out.logits)
                self.equal(whole, torch.cat(parts, 1), f"{directory}: {len(PIECES)} pieces are as the whole")
                beams = [model.generate(ids[:, :20], max_new_tokens=12, num_beams=3, do_sample=False, use_cache=use,
                                        eos_token_id=None).tolist() for use in (True, False)]
                self.report(beams[0] == beams[1], f"{directory}: beam search is the same with and without a state")
            self.padding(directory, model, ids, whole)
            with tempfile.TemporaryDirectory() as again:
                model.save_pretrained(again)
                saved = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
                same = torch.equal(saved(ids).logits, whole)
                self.report(same, f"{directory}: saved and opened again it is the same")
                mine = self.logits_of_riverrun(again, ids[0].tolist())
                self.equal(whole[0], mine, f"{directory}: riverrun reads what transformers saved")

    def padding(self, directory, model, ids, whole):
        """A text of 20 tokens beside one of 13, with padding in front or behind: both go on as if alone."""
        ids, mask = ids[:, :20].clone(), torch.ones_like(ids[:, :20])
        behind = model(ids, attention_mask=mask.index_fill(1, torch.arange(13, 20), 0), use_cache=False).logits
        short = ids[1:, :13].clone()
        ids[1] = torch.cat([ids[1, 13:], ids[1, :13]])
        mask[1, :7] = 0
        front = model(ids, attention_mask=mask).logits[1, 7:]
        self.equal(whole[:, :13], torch.stack([behind[0, :13], front]), f"{directory}: padding changes nothing")
        for beams in (1, 2):
            rules = {"max_new_tokens": 9, "num_beams": beams, "do_sample": False, "eos_token_id": None}
            both = model.generate(ids, attention_mask=mask, **rules)
            alone = [model.generate(ids[:1], **rules)[0], model.generate(short, **rules)[0]]
            same = torch.equal(both[0], alone[0]) and torch.equal(both[1, 7:], alone[1])
            self.report(same, f"{directory}: with padding in front {beams} beams give the texts without")

    def equal(self, wanted, got, text):
        error = float((wanted.double() - got.double()).norm() / wanted.double().norm())
        self.report(error <= LIMIT, f"{text}: {error:.1e}")

    def generation(self, directory, ours, model, tokenizer):
        """Without a tokenizer, bytes are ids. Ids beyond the tokenizer's are padding, which riverrun never takes."""
        ids = tokenizer(PROMPT)["input_ids"] if tokenizer else list(PROMPT.encode())
        end, padding = model.config.eos_token_id, len(tokenizer) if tokenizer else 257
        # From a state transformers does not clamp step sizes, unlike in a forward pass; then it goes without one.
        clamped = tuple(getattr(model.config, "time_step_limit", (0, math.inf))) != (0, math.inf)
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=CONTINUATION, do_sample=False,
                                 use_cache=not clamped,
                                 eos_token_id=end, pad_token_id=end,
                                 suppress_tokens=list(range(padding, model.config.vocab_size)) or None)
        new = [id for id in out[0, len(ids):].tolist() if id != end]
        theirs = tokenizer.decode(new) if tokenizer else bytes(new).decode(errors="replace")
        mine = subprocess.run([self.binary, "generate", str(ours), "--prompt", PROMPT, "--temperature", "0",
                               "--tokens", str(CONTINUATION)], capture_output=True)
        if mine.returncode != 0:
            raise RuntimeError(f"generate {ours}: {mine.stderr.decode().strip()}")
        mine = mine.stdout.decode(errors="replace")
        self.generated += len(new)
        self.report(theirs == mine, f"{directory}: {len(new)} generated tokens are the same" if theirs == mine else
                    f"{directory}: generated {theirs!r} there, {mine!r} in riverrun")

    def tokenizer(self, directory, ours, model, tokenizer):
        equal, back = True, True
        for text in TEXTS:
            theirs = tokenizer(text)["input_ids"]
            mine = list(map(int, self.riverrun(["--ids", str(ours)], text.encode()).split()))
            if theirs != mine:
                equal = False
                print(f"      {text!r}: {theirs} there, {mine} in riverrun")
            if tokenizer.decode(theirs) != text:
                back = False
                print(f"      {text!r} comes back as {tokenizer.decode(theirs)!r}")
        self.report(equal, f"{directory}: {type(tokenizer).__name__} gives riverrun's ids for {len(TEXTS)} texts")
        self.report(back, f"{directory}: decoding gives every text back")
        ids = (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id)
        agree = len(set(ids)) == 1 and ids[0] is not None
        self.report(agree, f"{directory}: the end of a document is id {ids[0]} everywhere")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", metavar="DIRECTORY[=OTHER]")
    parser.add_argument("--riverrun", required=True, type=pathlib.Path, help="the riverrun binary")
    parser.add_argument("--logits", type=pathlib.Path,
                        help="the test program, if it is not test/logits beside the binary")
    arguments = parser.parse_args()
    program = arguments.logits or arguments.riverrun.resolve().parent / "test" / "logits"
    if not os.access(program, os.X_OK):
        parser.error(f"there is no program {program}; `make tests` builds it")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    check = Check(str(program), str(arguments.riverrun))
    for argument in arguments.directories:
        directory, _, other = argument.partition("=")
        directory, ours = pathlib.Path(directory), other or directory
        model = check.model(directory, ours)
        tokenizer = None
        if (directory / "tokenizer.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=has_own_code(directory))
        check.generation(directory, ours, model, tokenizer)
        if tokenizer:
            check.tokenizer(directory, ours, model, tokenizer)
    check.report(check.generated > 0, f"{check.generated} tokens were generated in all")
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
