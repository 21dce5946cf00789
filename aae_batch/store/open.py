"""Open the storage of a path or URL."""

from __future__ import annotations

import os
import re

from aae_batch.errors import OutputError
from aae_batch.store.base import SCHEME, ObjectStorage, Storage, is_url
from aae_batch.store.local import LocalStorage

_USERINFO = re.compile(r"[^/@]*:(?!\d+(?:/|$))[^@]*@")
"""`user:password@`, also with a `/` in the password; does not match `host:8020/`."""


_S3 = ("s3", "s3a", "s3n")
"""S3, and what Hadoop and Spark call it."""


def open_storage(root: str | os.PathLike[str], s3_endpoint: str | None = None) -> Storage:
    """Return the storage of an output root: a folder, `s3://bucket/prefix`, or any fsspec scheme.

    Args:
        s3_endpoint: URL of an S3-compatible store. Default: `AWS_ENDPOINT_URL`, else AWS.

    Raises:
        OutputError: the scheme is unknown, its package is not installed, or the URL contains
            credentials or options.
    """
    if is_url(root):
        return open_url(os.fspath(root), s3_endpoint)
    return LocalStorage(os.fspath(root))


def open_url(url: str, s3_endpoint: str | None = None) -> ObjectStorage:
    """Return the storage behind a URL. Credentials come from the environment, never from the URL.

    Raises:
        OutputError: as for `open_storage`.
    """
    match = SCHEME.match(url)
    assert match is not None
    scheme, rest = match.group(1).lower(), url[match.end() :].rstrip("/")
    if _USERINFO.match(rest) or (scheme in _S3 and re.match("[^/]*[@:]", rest)):
        raise OutputError(
            f"A {scheme}:// URL must not contain credentials, since URLs are stored with the settings: "
            "put the credentials in the environment, and leave them out of the URL."
        )
    if scheme in _S3[1:]:
        raise OutputError(f"Cannot use {scheme}://{rest}: write s3:// in place of {scheme}://.")
    if scheme == "s3":
        from aae_batch.store.s3 import S3Storage

        return S3Storage(f"s3://{rest}", s3_endpoint)
    if "?" in rest:
        raise OutputError(
            f"A {scheme}:// URL must not contain options after ?, since they may hold a key: put them "
            "in the environment, and leave them out of the URL."
        )
    if scheme == "file":
        raise OutputError(f"Cannot use {url}: give the path of the folder, without file://.")
    from aae_batch.store.fsspec import FsspecStorage

    return FsspecStorage(f"{scheme}://{rest}")
