"""A root, as a person names it -> its storage."""

from __future__ import annotations

import os
import re

from aae_batch.errors import OutputError
from aae_batch.store.base import SCHEME, ObjectStorage, Storage, is_url
from aae_batch.store.local import LocalStorage

_USERINFO = re.compile(r"[^/@]*:(?!\d+(?:/|$))[^@]*@")
"""`user:password@`, also with a `/` in the password; `host:8020/` is none."""


def open_storage(root: str | os.PathLike[str], s3_endpoint: str | None = None) -> Storage:
    """The storage of an output root: a folder, `s3://bucket/prefix`, or any scheme of fsspec.

    Args:
        s3_endpoint: URL of an S3-compatible store; default: as the environment says, else AWS.

    Raises:
        OutputError: no backend for such a root, or its package is not installed.
    """
    if is_url(root):
        return open_url(os.fspath(root), s3_endpoint)
    return LocalStorage(os.fspath(root))


def open_url(url: str, s3_endpoint: str | None = None) -> ObjectStorage:
    """The storage behind a URL. Credentials come from the environment, never from the URL.

    Raises:
        OutputError: as for `open_storage`.
    """
    match = SCHEME.match(url)
    assert match is not None
    scheme, rest = match.group(1).lower(), url[match.end() :].rstrip("/")
    if _USERINFO.match(rest) or (scheme == "s3" and re.match("[^/]*[@:]", rest)):
        raise OutputError(
            f"A {scheme}:// URL with credentials in it is not taken, since it would be written down "
            "with the settings: give them in the environment, and write the URL without them."
        )
    if scheme == "s3":
        from aae_batch.store.s3 import S3Storage

        return S3Storage(f"s3://{rest}", s3_endpoint)
    if "?" in rest:
        raise OutputError(
            f"A {scheme}:// URL with options after ? is not taken, since they may hold a key: give "
            "them in the environment, and write the URL without them."
        )
    if scheme == "file":
        raise OutputError(f"Cannot use {url}: give the path of the folder, without file://.")
    from aae_batch.store.fsspec import FsspecStorage

    return FsspecStorage(f"{scheme}://{rest}")
