"""prepare_sets.py: the data sets that prepare_data.py knows, and what `riverrun tokenize` is fed from each.

A set is a repository on the Hugging Face hub and, for each of its splits, the files that make it up. Where the set
has no validation split, documents are held out of the training split: of every HELD_OUT_EVERY in the order of the
files the last.
"""

import fnmatch
import json
import re

from prepare_hub import Problem

HELD_OUT_EVERY = 2000
BATCH_ROWS = 1024


class Set:
    """kind: "jsonl", files of JSON lines that riverrun reads by itself; "documents", parquet with a document in each
    row; "lines", parquet with a line in each row. splits: split -> pattern of paths, {} is where the subset goes.
    subsets: name -> what goes there; a pattern ("CC-MAIN-*") stands for its own name."""

    def __init__(self, repository, kind, splits, subsets=None, held_out=False):
        self.repository = repository
        self.kind = kind
        self.splits = splits
        self.subsets = subsets or {"all": ""}
        self.held_out = held_out

    def subset(self, name):
        """What a subset's name puts into the patterns; None: the first subset."""
        if name is None:
            return next(iter(self.subsets.values()))
        for known, value in self.subsets.items():
            if fnmatch.fnmatchcase(name, known):
                return value.format(name)
        known = ", ".join(self.subsets)
        raise Problem(f"there is no subset '{name}' of this data set; there are {known}", 2)

    def patterns(self, subset):
        return {split: pattern.format(subset) for split, pattern in self.splits.items()}


def directory_of(pattern):
    """The directory that holds all files of a pattern."""
    literal = re.split(r"[*?\[]", pattern)[0]
    return literal.rpartition("/")[0]


def wikitext(config):
    return Set(
        "Salesforce/wikitext",
        "lines",
        {
            "train": f"{config}/train-*.parquet",
            "valid": f"{config}/validation-*.parquet",
            "test": f"{config}/test-*.parquet",
        },
    )


SETS = {
    "wikitext-2": wikitext("wikitext-2-raw-v1"),
    "wikitext-103": wikitext("wikitext-103-raw-v1"),
    "wikitext-2-words": wikitext("wikitext-2-v1"),
    "wikitext-103-words": wikitext("wikitext-103-v1"),
    "fineweb-edu": Set(
        "HuggingFaceFW/fineweb-edu",
        "documents",
        {"train": "{}/*.parquet"},
        {
            "sample-10BT": "sample/10BT",
            "sample-100BT": "sample/100BT",
            "sample-350BT": "sample/350BT",
            "CC-MAIN-*": "data/{}",
            "all": "data",
        },
        held_out=True,
    ),
    "slimpajama": Set(
        "cerebras/SlimPajama-627B",
        "jsonl",
        {"train": "train/{}*.jsonl.zst", "valid": "validation/*.jsonl.zst", "test": "test/*.jsonl.zst"},
        {"all": "", "chunk[1-9]": "{}/", "chunk10": "{}/"},
    ),
    "pile": Set(
        "monology/pile-uncopyrighted",
        "jsonl",
        {"train": "train/*.jsonl.zst", "valid": "val.jsonl.zst", "test": "test.jsonl.zst"},
    ),
    "pile-deduplicated": Set(
        "EleutherAI/the_pile_deduplicated", "documents", {"train": "data/train-*.parquet"}, held_out=True
    ),
}


def rows(path, key):
    """The strings of a parquet file's column, row group by row group."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if key not in file.schema_arrow.names:
            raise Problem(f"{path} has no column '{key}'; it has {', '.join(file.schema_arrow.names)}")
        kind = file.schema_arrow.field(key).type
        if not pyarrow.types.is_string(kind) and not pyarrow.types.is_large_string(kind):
            raise Problem(f"{path}: the column '{key}' holds {kind}, not strings")
        at = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[key]):
            for text in batch.column(0).to_pylist():
                if text is None:
                    raise Problem(f"{path}: row {at} has no '{key}'")
                yield text
                at += 1
    except pyarrow.ArrowException as error:
        raise Problem(f"{path} can't be read as parquet: {error}") from None


def documents(paths, key, first, part):
    """JSON lines for tokenize. first: number in the set of the first row. part: "kept" leaves out the documents that
    are held out, "held" gives only these, "all" gives all."""
    number = first
    for path in paths:
        for text in rows(path, key):
            number += 1
            if part == "all" or (number % HELD_OUT_EVERY == 0) == (part == "held"):
                yield json.dumps({"text": text}).encode() + b"\n"


def count_rows(path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    except pyarrow.ArrowException as error:
        raise Problem(f"{path} can't be read as parquet: {error}") from None


def lines(paths, key):
    """WikiText's lines as they were in its files: on the hub they are the same, but "" stands for " \\n"."""
    for path in paths:
        for text in rows(path, key):
            yield text if text else " \n"


def articles(paths, key):
    """WikiText as JSON lines, an article each. An article begins with a line " = Title = " between blank lines."""

    def article():
        return json.dumps({"text": "".join(text)}).encode() + b"\n"

    text, blank, title = [], True, None
    for line in lines(paths, key):
        if title is not None:
            if line.isspace() and not all(map(str.isspace, text)):
                yield article()
                text = []
            text.append(title)
            title = None
        if blank and re.fullmatch(r" = [^=].* = \n", line):
            title = line  # if what follows is blank, too
        else:
            text.append(line)
        blank = line.isspace()
    text += [title] if title is not None else []
    if text:
        yield article()
