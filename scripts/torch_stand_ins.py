#!/usr/bin/env python3
"""torch_stand_ins.py: lets PyPI's torch be imported on a machine without NVIDIA's libraries.

PyPI's torch for Linux is built for CUDA: loading it loads cuBLAS, cuDNN, NCCL and others, 2 GB of wheels of which a
program on the CPU never calls a function. This script makes an empty stand-in for each library that torch's own shared
objects need and that is not installed: it defines the functions which they ask of it, under the symbol versions which
they expect, and each of them ends the program with a line that names it. The C runtime of CUDA is not one of them: it
registers torch's kernels at load time, and its wheel is small.

Called by make_venv.sh with the Python of the virtual environment. Needs a C compiler and readelf.
"""

import collections
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tempfile

OWN = ("libtorch", "libc10", "libshm", "libcaffe2")
NVIDIA = re.compile(r"lib(cu[a-zA-Z]+|nccl|nvrtc|nvshmem\w*|nvJitLink)\.so")
DRIVER = "libcuda.so.1"  # only what is not loaded by `import torch` needs it


def readelf(option, path):
    return subprocess.run(["readelf", "-W", option, path], check=True, capture_output=True, text=True).stdout


class Wanted:
    """What torch's shared objects ask of other libraries."""

    def __init__(self):
        self.libraries = set()
        self.versioned = collections.defaultdict(set)  # version -> names
        self.plain = set()
        self.defined = set()
        self.provider_of = {}  # version -> library

    def read(self, path):
        self.libraries.update(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("-d", path)))
        library = None
        for line in readelf("-V", path).splitlines():
            if found := re.search(r"File: (\S+)", line):
                library = found.group(1)
            elif found := re.search(r"Name: (\S+) +Flags:", line):
                self.provider_of.setdefault(found.group(1), library)
        for line in readelf("--dyn-syms", path).splitlines():
            words = line.split()
            if len(words) < 8 or not words[0].endswith(":"):
                continue
            name, _, version = words[7].partition("@")
            if words[6] != "UND":
                self.defined.add(name)
            elif version:
                self.versioned[version.lstrip("@")].add(name)
            else:
                self.plain.add(name)


def names_for(library, wanted):
    """{version: names} that the stand-in has to define; version "" for none."""
    result = collections.defaultdict(set)
    for version, names in wanted.versioned.items():
        if wanted.provider_of.get(version) == library:
            result[version] |= names
    # A library without versions is recognised by how its functions begin: libcufile has cuFileRead.
    prefix = re.match(r"lib([a-zA-Z]+)", library).group(1).lower()
    unversioned = {n for n in wanted.plain - wanted.defined if n.lower().startswith(prefix)}
    if unversioned:
        result[""] |= unversioned
    return result


def build(library, names, directory):
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch, "stand_in.c")
        script = pathlib.Path(scratch, "versions")
        lines = ["#include <stdio.h>", "#include <stdlib.h>",
                 "static void missing(const char *name) {",
                 f'    fprintf(stderr, "%s: a stand-in for {library}, which is not installed\\n", name);',
                 "    abort();", "}"]
        for name in sorted(set().union(*names.values())):
            lines.append(f'void {name}(void) {{ missing("{name}"); }}')
        source.write_text("\n".join(lines) + "\n")
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{library}", "-o",
                   str(directory / library), str(source)]
        versions = [v for v in names if v]
        if versions:
            script.write_text("".join(f"{v} {{ global: {'; '.join(sorted(names[v]))}; }};\n" for v in versions))
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)


def main():
    site = pathlib.Path(sysconfig.get_path("purelib"))
    directory = site / "torch" / "lib"
    there = {p.name for p in directory.iterdir()} | {p.name for p in site.glob("nvidia/**/*.so*")}
    wanted = Wanted()
    for path in sorted(directory.glob("*.so*")):
        if path.name.startswith(OWN):
            wanted.read(path)
    missing = sorted(l for l in wanted.libraries - there if NVIDIA.match(l) and l != DRIVER)
    for library in missing:
        build(library, names_for(library, wanted), directory)
    print("stand-ins for", " ".join(missing) or "nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
