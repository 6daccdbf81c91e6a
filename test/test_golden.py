"""Does build/test/golden fail when it has to? Spoils copies of the golden files, one thing at a time, and looks at the
exit code.

Run by scripts/run-tests.sh from the repository root; BUILD names the build directory.
"""
import json
import math
import os
import struct
import subprocess
import sys
import tempfile

GOLDEN = os.path.join(os.environ.get("BUILD", "build"), "test", "golden")
SSD, MAMBA, MAMBA2 = "op-ssd.safetensors", "hf-mamba.safetensors", "hf-mamba2.safetensors"
SCAN = "op-selective-scan.safetensors"


def read(name):
    """Header (with __metadata__) and the bytes of each tensor."""
    with open(os.path.join("test", "golden", name), "rb") as file:
        content = file.read()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + size])
    data = {k: bytearray(content[8 + size + v["data_offsets"][0]:8 + size + v["data_offsets"][1]])
            for k, v in header.items() if k != "__metadata__"}
    return header, data


def write(path, header, data):
    offset = 0
    for name in data:
        header[name]["data_offsets"] = [offset, offset + len(data[name])]
        offset += len(data[name])
    text = json.dumps({k: v for k, v in header.items() if k in data or k == "__metadata__"}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(data.values()))


def golden(*arguments):
    run = subprocess.run([GOLDEN, *arguments], capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def put(data, name, index, value):
    form = {"F64": "<d", "F32": "<f"}[HEADERS[name]["dtype"]]
    size = struct.calcsize(form)
    data[name][index * size:(index + 1) * size] = struct.pack(form, value)


def meta(header, change):
    content = json.loads(header["__metadata__"]["meta"])
    change(content)
    header["__metadata__"]["meta"] = json.dumps(content)


def scaled(name, factor):
    """Every value of a tensor times a factor."""
    def change(header, data):
        letter = {"F64": "d", "F32": "f"}[header[name]["dtype"]]
        count = len(data[name]) // struct.calcsize(letter)
        values = struct.unpack(f"<{count}{letter}", data[name])
        data[name] = bytearray(struct.pack(f"<{count}{letter}", *(v * factor for v in values)))
    return change


def nan(name):
    return lambda header, data: put(data, name, 3, math.nan)


def without(name):
    return lambda header, data: data.pop(name)


def extra(header, data):
    header["grad.more"] = {"dtype": "F32", "shape": [2]}
    data["grad.more"] = bytearray(8)


def zeros(name):
    def change(header, data):
        data[name] = bytearray(len(data[name]))
    return change


def config(key, value):
    return lambda header, data: meta(header, lambda m: m["config"].update({key: value}))


def optimizer(key, value):
    return lambda header, data: meta(header, lambda m: m["optimizer"].update({key: value}))


# file, what is spoiled, exit code, words of the output
CASES = [
    (SSD, scaled("y", 1 + 3e-5), 1, "FAIL y "),
    (SSD, nan("grad.A"), 1, "FAIL grad.A"),
    (SSD, nan("in.X"), 1, "FAIL y "),
    (SSD, zeros("grad.S0"), 1, "FAIL grad.S0"),
    (SSD, without("grad.B"), 1, "is not in the file"),
    (SSD, without("in.B"), 2, "has no tensor in.B"),
    (SSD, without("in.S0"), 1, "grad.S0"),
    (SSD, extra, 1, "was not compared"),
    (SCAN, scaled("y", 1 + 3e-5), 1, "FAIL y "),
    (SCAN, scaled("grad.A", 1 + 3e-5), 1, "FAIL grad.A"),
    (SCAN, scaled("in.delta_bias", 1.01), 1, "FAIL grad.delta_bias"),
    (SCAN, nan("in.z"), 1, "FAIL grad.z"),
    (SCAN, without("in.D"), 2, "has no tensor in.D"),
    (SCAN, without("y"), 1, "is not in the file"),
    (SCAN, extra, 1, "was not compared"),
    (MAMBA2, scaled("logits", 1 + 1e-4), 1, "FAIL logits"),
    (MAMBA2, scaled("grad.backbone.layers.1.mixer.A_log", 1 + 1e-4), 1, "FAIL grad.backbone.layers.1.mixer.A_log"),
    (MAMBA2, nan("grad.lm_head.weight"), 1, "FAIL grad.lm_head.weight"),
    (MAMBA2, scaled("losses", 1.001), 1, "FAIL losses"),
    (MAMBA2, scaled("grad_norms", 1.001), 1, "FAIL grad_norms"),
    (MAMBA2, scaled("after.backbone.norm_f.weight", 1.001), 1, "FAIL after.backbone.norm_f.weight"),
    (MAMBA2, without("after.lm_head.weight"), 1, "after.lm_head.weight"),
    (MAMBA2, without("param.lm_head.weight"), 2, "has no tensor param.lm_head.weight"),
    (MAMBA2, extra, 1, "was not compared"),
    (MAMBA2, config("layer_norm_epsilon", 1e-4), 1, "FAIL logits"),
    (MAMBA2, config("hidden_act", "gelu"), 2, "hidden_act"),
    (MAMBA2, config("conv_kernel", 3), 2, "conv1d.weight"),
    (MAMBA2, config("head_dim", 15), 2, "head_dim"),
    (MAMBA2, config("num_heads", 8), 2, "num_heads"),
    (MAMBA2, config("time_step_limit", [0.0, math.inf]), 0, "0 failed"),
    (MAMBA2, config("time_step_limit", [0.0, 0.05]), 1, "FAIL logits"),
    (MAMBA2, optimizer("beta2", 0.9), 1, "FAIL after."),
    (MAMBA2, optimizer("clip", 1e9), 1, "FAIL losses"),
    (MAMBA2, optimizer("decayed", []), 1, "FAIL after."),
    (MAMBA2, optimizer("decayed", ["nothing"]), 2, "decayed"),
    (MAMBA2, config("model_type", "gpt2"), 2, "model_type"),
    (MAMBA, scaled("grad.backbone.layers.0.mixer.dt_proj.bias", 1 + 1e-4), 1,
     "FAIL grad.backbone.layers.0.mixer.dt_proj.bias"),
    (MAMBA, scaled("after.backbone.layers.1.mixer.A_log", 1.001), 1, "FAIL after.backbone.layers.1.mixer.A_log"),
    (MAMBA, without("param.backbone.layers.1.mixer.x_proj.weight"), 2,
     "has no tensor param.backbone.layers.1.mixer.x_proj.weight"),
    (MAMBA, config("time_step_rank", 3), 2, "x_proj.weight"),
    (MAMBA, config("intermediate_size", 49), 2, "intermediate_size"),
]


def main():
    global HEADERS
    failures = 0

    def expect(what, result, code, words):
        nonlocal failures
        good = result[0] == code and words in result[1]
        failures += not good
        why = "" if good else f"expected {code} and '{words}' in:\n{result[1]}"
        print("ok  " if good else "FAIL", what, "->", result[0], why)

    whole = [os.path.join("test", "golden", name) for name in (SSD, SCAN, MAMBA, MAMBA2)]
    for precision in ("fp32", "fp64"):
        expect(f"all files, {precision}", golden("--precision", precision, *whole), 0, "0 failed")
    expect("CUDA", golden("--device", "cuda", whole[0]), 2, "cuda")
    expect("bf16", golden("--precision", "bf16", whole[0]), 2, "bf16")
    expect("an unknown precision", golden("--precision", "fp16", whole[0]), 2, "fp32, fp64, bf16")
    expect("no file", golden(), 2, "usage")
    with tempfile.TemporaryDirectory() as directory:
        for number, (name, spoil, code, words) in enumerate(CASES):
            header, data = read(name)
            HEADERS = header
            spoil(header, data)
            path = os.path.join(directory, name)
            write(path, header, data)
            expect(f"case {number} of {name}", golden(path), code, words)
        with open(whole[0], "rb") as file:
            content = file.read()
        short = os.path.join(directory, "op-ssd-short.safetensors")
        with open(short, "wb") as file:
            file.write(content[:-100])
        expect("a cut file", golden(short), 2, "op-ssd-short")
        other = os.path.join(directory, "op-other.safetensors")
        with open(other, "wb") as file:
            file.write(content)
        expect("an unknown kind", golden(other), 2, "known are names that begin with hf-, op-ssd")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
