"""prepare_hub.py: files of a Hugging Face data set: what there is, and downloads that can be interrupted at any moment.

Called by prepare_data.py. Needs nothing but Python's own library. A file is downloaded to NAME.part, which a later run
continues with a Range request, is compared with the checksum that the hub gives, and then gets its NAME: a file under
its name is complete and right.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte
PATIENCE = 8  # failures one after the other, without a byte in between, until a download is given up
LONGEST_PAUSE = 60  # seconds between two attempts
FOR_A_WHILE = {408, 429, 500, 502, 503, 504}  # answers after which it is worth asking again


class Problem(Exception):
    """What a person is told; `code` is the program's exit code: 2 for what they asked for, 1 for the surroundings."""

    def __init__(self, text, code=1):
        super().__init__(text)
        self.code = code


class Hub:
    """A server with the Hugging Face hub's interface. `pause` is the seconds before the first repeated attempt."""

    def __init__(self, address, log, token=None, pause=1.0):
        self.address = address.rstrip("/")
        self.log = log
        self.token = token
        self.pause = pause
        self.stop = threading.Event()  # set: downloads end as soon as they can

    def open(self, url, start=0):
        headers = {"User-Agent": "riverrun-prepare-data", "Accept-Encoding": "identity"}
        request = urllib.request.Request(url, headers=headers)
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self.token and url.startswith(self.address + "/"):
            # Not kept on a redirect: the storage behind the hub gets no token.
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        return urllib.request.urlopen(request, timeout=TIMEOUT)

    def persist(self, what, attempt):
        """Call attempt() until it succeeds. It raises Problem if that is hopeless, and returns None to be called again
        at once, because it made progress."""
        failures = 0
        while True:
            try:
                result = attempt()
                if result is not None:
                    return result
                failures = 0
                continue
            except urllib.error.HTTPError as error:
                if error.code not in FOR_A_WHILE:
                    raise Problem(f"{what}: the server says {error.code} {error.reason}") from None
                reason, asked = f"{error.code} {error.reason}", error.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException) as error:
                reason, asked = str(getattr(error, "reason", error)) or type(error).__name__, ""
            failures += 1
            if failures >= PATIENCE:
                raise Problem(f"{what}: given up after {failures} attempts: {reason}")
            pause = float(asked) if asked.isdigit() else self.pause * 2 ** (failures - 1)
            pause = min(pause, LONGEST_PAUSE)
            self.log(f"{what}: {reason}; again in {pause:.0f} s")
            if self.stop.wait(pause):
                raise Problem(f"{what}: stopped")

    def get_json(self, url, what):
        def attempt():
            with self.open(url) as answer:
                try:
                    return json.load(answer), answer.headers.get("Link", "")
                except ValueError:
                    raise Problem(f"{what}: the answer is not JSON") from None

        return self.persist(what, attempt)

    def revision(self, repository, name):
        """The commit that a branch or tag stands for now."""
        url = f"{self.address}/api/datasets/{repository}/revision/{urllib.parse.quote(name, safe='')}"
        answer, _ = self.get_json(url, f"{repository}, revision {name}")
        if not isinstance(answer, dict) or not isinstance(answer.get("sha"), str):
            raise Problem(f"{repository}: the hub does not say which commit {name} is")
        return answer["sha"]

    def files(self, repository, commit, directory):
        """All files below a directory, "" for the top: {path: {"size": bytes, "sha256" or "git": checksum}}."""
        tail = "/" + urllib.parse.quote(directory) if directory else ""
        url = f"{self.address}/api/datasets/{repository}/tree/{commit}{tail}?recursive=true&expand=false"
        found = {}
        while url:
            entries, link = self.get_json(url, f"the list of files of {repository}")
            for entry in entries:
                if entry["type"] != "file":
                    continue
                large = entry.get("lfs")
                found[entry["path"]] = (
                    {"size": large["size"], "sha256": large["oid"]}
                    if large
                    else {"size": entry["size"], "git": entry["oid"]}
                )
            following = re.search(r'<([^>]+)>\s*;\s*rel="next"', link)
            url = urllib.parse.urljoin(url, following.group(1)) if following else None
        return found

    def download(self, repository, commit, path, about, target):
        """Make `target` the file `path`, whatever is there of it already. Returns its SHA-256."""
        if os.path.exists(target) and os.path.getsize(target) == about["size"]:
            return about.get("sha256") or checksums(target)["sha256"]
        os.makedirs(os.path.dirname(target), exist_ok=True)
        url = f"{self.address}/datasets/{repository}/resolve/{commit}/{urllib.parse.quote(path)}"
        part = target + ".part"
        for damaged in range(2):
            self.persist(path, lambda: self.continue_download(url, part, about["size"]))
            sums = checksums(part)
            kind = "sha256" if "sha256" in about else "git"
            if sums[kind] == about[kind]:
                os.replace(part, target)
                sync_directory(os.path.dirname(target))
                return sums["sha256"]
            os.remove(part)
            self.log(f"{path}: what came is damaged (checksum {sums[kind]}, the hub says {about[kind]})")
        raise Problem(f"{path}: what came was damaged twice; its checksum is not the {about[kind]} that the hub gives")

    def continue_download(self, url, part, size):
        """One request for what is missing. True: all is there."""
        have = os.path.getsize(part) if os.path.exists(part) else 0
        if have > size:
            os.remove(part)
            have = 0
        if have == size and os.path.exists(part):
            return True
        got = 0
        with self.open(url, have) as answer, writing(part) as write:
            if have and answer.status != 206:
                write(None)  # a server without Range sends everything
                have = 0
            elif have and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise Problem(f"{url}: the server sends another range than it was asked for")
            while have + got <= size:
                if self.stop.is_set():
                    raise Problem(f"{url}: stopped")
                try:
                    piece = answer.read1(CHUNK)
                except (OSError, http.client.HTTPException):
                    if got == 0:
                        raise
                    break
                if not piece:
                    break
                write(piece)
                got += len(piece)
        if have + got > size:
            os.remove(part)
            raise Problem(f"{url}: the server sends more than the {size} bytes that the hub names")
        if have + got == size:
            return True
        if got == 0:
            raise http.client.HTTPException("the connection ended early")
        return None


@contextlib.contextmanager
def writing(path):
    """A function that appends bytes to a file (None: that empties it), which is synced at the end. What fails on the
    disk is a Problem, so that it is not taken for a failure of the network."""

    def failed(error):
        return Problem(f"cannot write {path}: {error.strerror}")

    try:
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise failed(error) from None

    def write(piece):
        try:
            if piece is None:
                file.truncate(0)
            while piece:
                piece = piece[file.write(piece) :]
        except OSError as error:
            raise failed(error) from None

    with file:
        yield write
        try:
            os.fsync(file.fileno())
        except OSError as error:
            raise failed(error) from None


def checksums(path):
    """SHA-256, and Git's checksum of a file's content, which the hub gives for small files."""
    plain, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            plain.update(piece)
            git.update(piece)
    return {"sha256": plain.hexdigest(), "git": git.hexdigest()}


def sync_directory(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
