"""Download of an official release, of a pinned revision with known sha256; upload of a built folder to the Hub."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HTTPError
from tqdm.auto import tqdm

from grefcoco_data.atomic_files import sha256, sync
from grefcoco_data.collections import collection_of


def download(annotations: Path, images: Path, config: str = "grefcoco") -> None:
    """Download what is missing: the annotation files into a folder, the zip of images to `images`.

    Raises:
        ValueError: a configuration without a download; a download that was cut off or whose sha256 differs.
        OSError: network or disk.
    """
    release = collection_of(config).release
    if release is None:
        raise ValueError(f"No download is known for {config}; put its files into {annotations} yourself.")
    annotations.mkdir(parents=True, exist_ok=True)
    for name, digest in release.sha256.items():
        url = hf_hub_url(release.repo, name, repo_type="dataset", revision=release.revision)
        download_file(url, annotations / name, digest)
    if not images.is_dir():
        download_file(release.images, images)


def download_file(url: str, path: Path, digest: str | None = None) -> None:
    """Download `url` to `path` unless it exists; a download that was cut off continues where it stopped.

    Raises:
        ValueError: the download ended early, or the sha256 is not `digest`.
        OSError: network or disk.
    """
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.part")
    try:
        total = _transfer(url, partial)
    except OSError as error:
        raise OSError(f"{url} -> {partial}: {error}. Run again to continue.") from error
    if (size := partial.stat().st_size) != total:
        raise ValueError(f"{url} was cut off after {size} of {total} bytes. Run again to continue.")
    if digest and (actual := sha256(partial)) != digest:
        partial.unlink()
        raise ValueError(f"{url} has sha256 {actual}, not {digest}; it was deleted. Run again.")
    sync(partial)
    partial.replace(path)


def push(folder: str, repo: str) -> None:
    """Upload a built folder as a data set; shards of an earlier build are deleted from the repository."""
    place = {"repo_id": repo, "repo_type": "dataset"}
    try:
        HfApi().create_repo(**place, exist_ok=True)
        HfApi().upload_folder(**place, folder_path=folder, delete_patterns="data/*")
    except (HTTPError, RuntimeError) as error:  # RuntimeError: the client has given up retrying
        raise OSError(f"The upload to {repo} failed: {error} Run again to complete it.") from error


def _transfer(url: str, partial: Path) -> int:
    """Append the missing bytes to `partial`; returns the size of the whole file."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the range is empty: the file is complete
            return have
        raise
    with response:
        length = response.headers["Content-Length"]
        if length is None:
            raise OSError("the server does not send the length of the file")
        if response.status != 206:  # the server ignored the range and sends the whole file
            have = 0
        _copy(response, partial, have, have + int(length))
        return have + int(length)


def _copy(response: BinaryIO, partial: Path, have: int, total: int) -> None:
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=partial.stem, disable=None)
    with bar, partial.open("ab" if have else "wb") as file:
        while block := response.read(1 << 20):
            file.write(block)
            bar.update(len(block))
