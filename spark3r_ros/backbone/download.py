"""Weights from the Hugging Face hub into the cache folder, checked; and where to put them by hand without a network."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


class DownloadError(RuntimeError):
    """Weights could not be fetched; the message says how to fetch them by hand."""


@dataclass(frozen=True)
class Weights:
    """One published weights file."""

    repo: str  # on the hub
    file: str
    licence: str
    permissive: bool  # anything else is fetched only when its licence was accepted by name

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo}/resolve/main/{self.file}"


def cache_dir() -> Path:
    """Folder of all weights: SPARK3R_CACHE, or spark3r in the user's cache folder."""
    if "SPARK3R_CACHE" in os.environ:
        return Path(os.environ["SPARK3R_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spark3r"


def cached_path(name: str, weights: Weights) -> Path:
    """Where this model's file belongs, present or not."""
    return cache_dir() / name / weights.file


def by_hand(name: str, weights: Weights) -> str:
    """How to fetch the file on another machine."""
    return f"fetch {weights.url} by hand and put it at {cached_path(name, weights)}"


def download(name: str, weights: Weights) -> Path:
    """Fetch one file: progress on the terminal, an interrupted download goes on where it stopped, checksum verified.

    The hub's own download starts afresh when its process was killed; this one keeps what it has in a ``.part`` file
    named after the version of the file on the hub.

    Raises:
        DownloadError: no network, no access, or a damaged file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    target, url = cached_path(name, weights), hf_hub_url(weights.repo, weights.file)
    try:
        remote = get_hf_file_metadata(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{remote.etag}.part")
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            headers, start = build_hf_headers(), file.tell()
            http_get(
                url, file, headers=headers, resume_size=start, expected_size=remote.size, displayed_filename=target.name
            )
    except GatedRepoError as error:
        raise DownloadError(
            f"{weights.repo} asks for its terms to be accepted: open https://huggingface.co/{weights.repo}, accept, "
            f"run `hf auth login`, try again; or {by_hand(name, weights)}"
        ) from error
    except BlockingIOError as error:
        raise DownloadError(f"{name} is being fetched by another process") from error
    except (HTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DownloadError(f"cannot fetch {name} ({reason}); {by_hand(name, weights)}") from error
    digest = remote.etag or ""
    if len(digest) == 64 and sha256(part) != digest:  # large files are named by their SHA-256
        part.unlink()
        raise DownloadError(f"{name} was damaged on the way (checksum differs) and is deleted; try again")
    part.replace(target)
    log.info("%s is at %s", name, target)
    return target


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
