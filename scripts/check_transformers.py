#!/usr/bin/env python3
"""check_transformers.py: do Hugging Face transformers and riverrun see the same model in a directory?

    python3 scripts/check_transformers.py DIRECTORY[=OTHER]... --riverrun build/riverrun

For each DIRECTORY (a checkpoint, an export, or what transformers itself saved): AutoModelForCausalLM opens it without
missing, unexpected or mismatching tensors, its logits equal riverrun's (relative Frobenius error at most 5e-5 in fp32),
the most probable continuation of a text, token by token from a state on both sides, is the same,
AutoTokenizer gives riverrun's ids and its texts back. With OTHER, riverrun reads that in place of DIRECTORY: what
`riverrun import` made of it. Prints one line per comparison; exit code 1 if any fails.

riverrun's side comes from the test program `logits` beside the riverrun binary (`make tests` builds it), or --logits.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
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
        plain = AutoModelForCausalLM.from_pretrained(directory)
        wanted = json.loads((directory / "config.json").read_text().replace("Infinity", "1e400"))
        self.report(type(plain).__name__ == wanted["architectures"][0],
                    f"{directory}: opens as {type(plain).__name__}, {plain.dtype}")
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
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
                self.report(False, f"{directory}: logits are {tuple(theirs.shape)} there, {tuple(mine.shape)} in riverrun")
                return model
            error = float((theirs - mine).norm() / theirs.norm())
            worst = max(worst, error) if error == error else float("inf")
        self.report(worst <= LIMIT, f"{directory}: logits differ by {worst:.1e} at most, the limit is {LIMIT:.0e}")
        return model

    def generation(self, directory, ours, model, tokenizer):
        """Without a tokenizer, bytes are ids. Ids beyond the tokenizer's are padding, which riverrun never takes."""
        ids = tokenizer(PROMPT)["input_ids"] if tokenizer else list(PROMPT.encode())
        end, padding = model.config.eos_token_id, len(tokenizer) if tokenizer else 257
        # From a state transformers does not clamp step sizes, unlike in a forward pass; then it goes without one.
        clamped = tuple(getattr(model.config, "time_step_limit", (0, math.inf))) != (0, math.inf)
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=CONTINUATION, do_sample=False, use_cache=not clamped,
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
        self.report(len(set(ids)) == 1 and ids[0] is not None, f"{directory}: the end of a document is id {ids[0]} everywhere")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", metavar="DIRECTORY[=OTHER]")
    parser.add_argument("--riverrun", required=True, type=pathlib.Path, help="the riverrun binary")
    parser.add_argument("--logits", type=pathlib.Path, help="the test program, if it is not test/logits beside the binary")
    arguments = parser.parse_args()
    program = arguments.logits or arguments.riverrun.resolve().parent / "test" / "logits"
    if not os.access(program, os.X_OK):
        parser.error(f"there is no program {program}; `make tests` builds it")
    torch.set_num_threads(2)
    check = Check(str(program), str(arguments.riverrun))
    for argument in arguments.directories:
        directory, _, other = argument.partition("=")
        directory, ours = pathlib.Path(directory), other or directory
        model = check.model(directory, ours)
        tokenizer = AutoTokenizer.from_pretrained(directory) if (directory / "tokenizer.json").exists() else None
        check.generation(directory, ours, model, tokenizer)
        if tokenizer:
            check.tokenizer(directory, ours, model, tokenizer)
    check.report(check.generated > 0, f"{check.generated} tokens were generated in all")
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
