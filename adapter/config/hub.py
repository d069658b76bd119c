"""Hub ids: `model.path: Qwen/Qwen2-VL-7B-Instruct` becomes a snapshot directory in Hugging Face's cache.

huggingface_hub does the transfers, so HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean what they
mean everywhere. Weights are taken as safetensors only; code and pickles of a repository are never downloaded.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from policies.errors import UserError

log = logging.getLogger("adapter")
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*"]
SUBFOLDERS = ["*/*"]  # copies for other programs (onnx/, original/), never what Transformers reads
DESCRIBING = {"config.json", "adapter_config.json", "model.safetensors.index.json", "shards.json"}  # for a plan
FIRST_BYTES = 100_000  # holds the header of most safetensors files
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
WAIT_S, SAY_EVERY_S = 6 * 3600.0, 30.0  # for another process of this host that downloads the same model


@cache
def download(repo: str, revision: str | None, key: str) -> Path:
    """Return the snapshot directory of a model, downloaded where the cache does not hold it.

    The ranks of a host call it at the same time: whoever comes first downloads, with a progress bar, and the others
    wait for its lock. `key` is the YAML key that stated the id, for messages. Raises UserError.
    """
    with _explained(repo, revision, key):
        from huggingface_hub import snapshot_download
        from tqdm.auto import tqdm

        class Bar(tqdm):
            """A bar that shows after a second, so that a model in the cache shows none."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{"delay": 1, "mininterval": 1, **kwargs})

            def display(self, *args: Any, **kwargs: Any) -> Any:
                return time.time() < self.start_t + self.delay or super().display(*args, **kwargs)

        with _lock(repo):
            return Path(snapshot_download(repo, revision=revision, allow_patterns=DOWNLOADED,
                                          ignore_patterns=SUBFOLDERS, tqdm_class=Bar))


@contextmanager
def described(path: Path, revision: str | None, key: str = "model.path") -> Iterator[Path]:
    """Give a directory that has what a plan reads of a model, `path` itself where it is one.

    For a hub id that is config.json, and each safetensors file as its header, followed by a hole of the size of its
    data; nothing else is downloaded, and it is gone afterwards. Offline it is the snapshot in the cache. Raises
    UserError.
    """
    repo = str(path)
    if path.is_absolute():
        yield path
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield download(repo, revision, key)
        return
    with TemporaryDirectory(prefix="qwenvl-tp-plan-") as root:
        with _explained(repo, revision, key):
            directory = _describe(repo, revision, Path(root))
        yield directory


def shown(directory: Path) -> str:
    """The name of a model directory in messages: its hub id where it is a snapshot, else its path."""
    snapshots, repository = directory.parent, directory.parent.parent.name
    if snapshots.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return str(directory)


def _describe(repo: str, revision: str | None, root: Path) -> Path:
    from huggingface_hub import HfApi, hf_hub_url

    api = HfApi()
    commit = api.model_info(repo, revision=revision).sha
    directory = root / f"models--{repo.replace('/', '--')}" / "snapshots" / str(commit)
    directory.mkdir(parents=True)
    files = [file for file in api.list_repo_files(repo, revision=commit) if "/" not in file]
    weights = [file for file in files if file.endswith(".safetensors")]
    for file in files:
        (directory / file).touch()  # that it is there may be all that there is to know
    log.info("reading config.json and the headers of %d safetensors files of %s", len(weights), repo)

    def fetch(file: str) -> None:
        url = hf_hub_url(repo, file, revision=commit)
        if file in weights:
            _write_header(url, directory / file)
        else:
            (directory / file).write_bytes(_get(url).content)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch, [*weights, *DESCRIBING.intersection(files)]))
    return directory


def _write_header(url: str, target: Path) -> None:
    """Write the header of a remote safetensors file, and a hole up to the file's size."""
    response = _get(url, f"bytes=0-{FIRST_BYTES - 1}")
    head: bytes = response.content
    size = int(response.headers.get("Content-Range", f"/{len(head)}").rpartition("/")[2])
    end = min(8 + int.from_bytes(head[:8], "little"), size)
    if len(head) < end <= MOST_HEADER_BYTES:
        head += _get(url, f"bytes={len(head)}-{end - 1}").content
    target.write_bytes(head[:end])
    os.truncate(target, size)


def _get(url: str, span: str | None = None) -> Any:
    """A GET of the hub's, with the user's token. Raises what huggingface_hub raises."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": span} if span else {})
    response = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    return response


@contextmanager
def _lock(repo: str) -> Iterator[None]:
    """Hold this host's lock of a model's download; where the cache cannot be written there is nothing to hold."""
    from huggingface_hub import constants

    file = Path(constants.HF_HUB_CACHE).expanduser() / ".locks" / f"models--{repo.replace('/', '--')}" / "snapshot.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = open(file, "w")  # noqa: SIM115
    except OSError:
        yield
        return
    with stream:
        _acquire(stream.fileno(), repo)
        yield


def _acquire(lock: int, repo: str) -> None:
    """Wait for a lock, with a message every SAY_EVERY_S. Raises UserError after WAIT_S."""
    began = reported = time.monotonic()
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)
        now = time.monotonic()
        if now - began > WAIT_S:
            raise UserError(f"{repo}: another process of this host has been downloading it for {WAIT_S / 3600:.0f} "
                            "hours; download it first, with `hf download`, and start again")
        if now - reported > SAY_EVERY_S:
            reported = now
            log.info("%s: waiting for another process of this host to download it (%.0f s)", repo, now - began)


@contextmanager
def _explained(repo: str, revision: str | None, key: str) -> Iterator[None]:
    """Turn whatever huggingface_hub and the network raise into one UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key} = {repo}: {_why(error, repo, revision)}") from None


def _why(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    site, store = constants.ENDPOINT, constants.HF_HUB_CACHE
    local = ("there is no directory of that name either (a relative path in a file counts from that file's directory, "
             "one on the command line from the current directory)")
    version = f" at revision {revision!r}" if revision else ""
    if isinstance(error, errors.GatedRepoError):
        return (f"access is restricted: accept the terms at {site}/{repo}, then set HF_TOKEN to a token of that "
                "account (or run `hf auth login`)")
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"{site} has no such model, or it is private (then set HF_TOKEN, or run `hf auth login`); {local}; "
                "check the spelling")
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{site}/{repo} has no revision {revision!r}: name a branch, a tag or a commit"
    if constants.HF_HUB_OFFLINE:
        return (f"it is not in the cache {store}{version}, and HF_HUB_OFFLINE forbids to download it; {local}; unset "
                "HF_HUB_OFFLINE, or name a directory")
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError) or "Connect" in type(error).__name__:
        return f"{site} cannot be reached, and it is not in the cache {store}{version}; {local}; check the network"
    if isinstance(error, OSError) and error.strerror:
        return f"the cache {store} cannot be written: {error.strerror}; set HF_HOME to a disk with room"
    reason = str(error).strip().partition("\n")[0]
    return f"it cannot be downloaded from {site}: {type(error).__name__}: {reason}"
