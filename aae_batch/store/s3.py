"""Outputs and inputs in S3 or an S3-compatible store.

Credentials, region and profile come from boto3's standard chain, the endpoint also from
`AWS_ENDPOINT_URL`, the number of attempts from `AWS_MAX_ATTEMPTS`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
import time
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto
from botocore.config import Config

from aae_batch.errors import OutputError
from aae_batch.store.base import Entry, ObjectStorage
from aae_batch.store.lease import Seen
from aae_batch.store.lock import NAME
from aae_batch.store.s3_errors import AT_ONCE, MISSING, NO_CONDITIONS, THERE, code_of, explained

CONNECTIONS = 16
"""Connections per process, enough for its upload threads and the threads that commit."""

ATTEMPTS = 10
"""Attempts per request. Between attempts botocore waits up to 20 s, longer each time."""

LOCK_ATTEMPTS = 6
"""Attempts per request for the lock. They last through half a minute of throttling, which is less than
the lock's lifetime."""

PAGE = 1000
"""Objects per page of a listing, S3's maximum."""

TAIL = 1 << 20
"""Bytes fetched from an object's end when it is opened."""

CONTENT_TYPES = {
    ".parquet": "application/vnd.apache.parquet",
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".png": "image/png",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".tar": "application/x-tar",
    ".csv": "text/csv",
    ".html": "text/html",
}
ANY_TYPE = "application/octet-stream"

_BROKEN_BODY = (
    boto.ResponseStreamingError,
    boto.IncompleteReadError,
    boto.ReadTimeoutError,
    boto.FlexibleChecksumError,
)
"""Errors while a response body is read, which botocore does not retry."""


class S3Storage(ObjectStorage):
    """A bucket, or a prefix in it.

    Args:
        root: `s3://bucket` or `s3://bucket/prefix`.
        endpoint: URL of the store. Default: `AWS_ENDPOINT_URL`, else AWS.
        attempts: per request. Default: `AWS_MAX_ATTEMPTS`, else 10.
    """

    _conditional: bool

    def __init__(
        self,
        root: str,
        endpoint: str | None = None,
        *,
        attempts: int | None = None,
    ) -> None:
        self.root = root.rstrip("/")
        self.bucket, _, self.prefix = root.removeprefix("s3://").rstrip("/").partition("/")
        if not self.bucket:
            raise OutputError("s3:// alone names no bucket; write s3://bucket/prefix.")
        if endpoint is not None:
            _check_endpoint(endpoint)
        self.endpoint = endpoint
        asked = os.environ.get("AWS_MAX_ATTEMPTS", "")
        self.attempts = attempts or (int(asked) if asked.isdigit() else ATTEMPTS)
        self._reset()

    def read_bytes(self, name: str) -> bytes:
        return self._get(name)[0]

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Object(self, name), buffer_size=1 << 16))

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Create the object by a conditional write. If the store has none, check first, then write."""
        self.check_lock()
        for attempt in range(1, self.attempts + 1):
            if not self._conditional:
                break
            passing = THERE | NO_CONDITIONS | (AT_ONCE if attempt < self.attempts else set())
            try:
                with explained(self, "write", name, passing):
                    self._put(name, data, IfNoneMatch="*")
                    return True
            except boto.ClientError as error:
                if code_of(error) in THERE:
                    return False
                if code_of(error) in NO_CONDITIONS:
                    self._conditional = False
                else:  # a concurrent write is in progress, and its outcome is known soon
                    time.sleep(0.1 * attempt)
        if self.exists(name):
            return False
        self.write_bytes(name, data)
        return True

    def write_bytes(self, name: str, data: bytes) -> None:
        self.check_lock()
        with explained(self, "write", name):
            self._put(name, data)

    def _put(self, name: str, data: bytes, **condition: str) -> None:
        kind = CONTENT_TYPES.get(PurePosixPath(name).suffix.lower(), ANY_TYPE)
        where = {"Bucket": self.bucket, "Key": self._key(name)}
        _put(self._client(), data, ContentType=kind, **where, **condition)

    def exists(self, name: str) -> bool:
        with explained(self, "read", name):
            try:
                self._client().head_object(Bucket=self.bucket, Key=self._key(name))
            except boto.ClientError as error:
                if code_of(error) in MISSING:
                    return False
                raise
        return True

    def anything(self, besides: str = "") -> str | None:
        with explained(self, "list", ""):
            answer = self._client().list_objects_v2(
                Bucket=self.bucket, Prefix=self._key(""), MaxKeys=PAGE
            )
        names = (item["Key"].removeprefix(self._key("")) for item in answer.get("Contents", ()))
        return next((name for name in names if _is_object(name) and name != besides), None)

    def entries(self, prefix: str) -> tuple[Entry, ...]:
        start = len(self._key(""))
        with explained(self, "list", prefix):
            pages = self._client().get_paginator("list_objects_v2")
            found = [
                Entry(item["Key"][start:], item["Size"], item["ETag"])
                for page in pages.paginate(
                    Bucket=self.bucket,
                    Prefix=self._key(prefix),
                    PaginationConfig={"PageSize": PAGE},
                )
                for item in page.get("Contents", ())
            ]
        kept = (entry for entry in found if _is_object(entry.name))
        return tuple(sorted(kept, key=lambda entry: entry.name))

    def delete(self, name: str) -> None:
        self.check_lock()
        with explained(self, "delete", name):
            self._client().delete_object(Bucket=self.bucket, Key=self._key(name))

    def download(self, name: str, path: Path) -> None:
        with explained(self, "read", name):
            self._client().download_file(
                self.bucket, self._key(name), str(path), Config=TransferConfig(max_concurrency=4)
            )

    def lock_cell(self) -> _LockObject:
        return _LockObject(self)

    def _get(self, name: str, **part: str) -> tuple[bytes, dict[str, Any]]:
        """Return the bytes of an object, or of a `Range` of it, and the response."""
        for attempt in range(1, self.attempts + 1):
            with explained(self, "read", name):
                answer = self._client().get_object(Bucket=self.bucket, Key=self._key(name), **part)
                try:
                    return answer["Body"].read(), answer
                except _BROKEN_BODY:
                    if attempt == self.attempts:
                        raise
        raise AssertionError("unreachable")

    def _reset(self) -> None:
        super()._reset()
        self._guard = threading.Lock()
        self._made: Any = None
        self._conditional = True

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _client(self):
        with self._guard:
            if self._made is None:
                self._made = self._new_client(self.attempts, "adaptive")
            return self._made

    def _new_client(self, attempts: int, mode: str):
        config = Config(
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": attempts, "mode": mode},
        )
        session = boto3.session.Session()
        try:
            return session.client("s3", endpoint_url=self.endpoint, config=config)
        except ValueError:
            raise OutputError(
                f"Cannot open {self.root}: its endpoint is not a URL; check AWS_ENDPOINT_URL."
            ) from None

    @property
    def shown_endpoint(self) -> str:
        """The endpoint URL without credentials."""
        parts = urlsplit(self._client().meta.endpoint_url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}"


class _Object(io.RawIOBase):
    """An object as a file. The first request fetches its last `TAIL` bytes, because a Parquet reader
    starts there. For a small object that is all of it."""

    def __init__(self, storage: S3Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._place = 0
        self._tail, answer = storage._get(name, Range=f"bytes=-{TAIL}")
        found = answer.get("ContentRange")
        self._size = int(found.rpartition("/")[2]) if found else len(self._tail)
        self._version = answer["ETag"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        count = max(0, stop - self._place)
        if count:
            buffer[:count] = self._part(self._place, stop)
            self._place = stop
        return count

    def _part(self, start: int, stop: int) -> bytes:
        held_from = self._size - len(self._tail)
        if start >= held_from:
            return self._tail[start - held_from : stop - held_from]
        part = f"bytes={start}-{stop - 1}"
        return self._storage._get(self._name, Range=part, IfMatch=self._version)[0]


class _LockObject:
    """The lock's object, written conditionally if the store supports that.

    It has its own client: the storage's client delays requests when the store throttles, and the lock
    would expire meanwhile.
    """

    def __init__(self, storage: S3Storage) -> None:
        self._storage = storage
        self._conditional = True
        self._object = {"Bucket": storage.bucket, "Key": storage._key(NAME)}
        with explained(storage, "write", NAME):
            attempts = min(LOCK_ATTEMPTS, storage.attempts)
            self._client = storage._new_client(attempts, "standard")

    def read(self, aged: bool = False) -> Seen | None:
        with explained(self._storage, "read", NAME):
            try:
                answer = self._client.get_object(**self._object)
                data = answer["Body"].read()
            except boto.ClientError as error:
                if code_of(error) in MISSING:
                    return None
                raise
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        age = date and (parsedate_to_datetime(date) - answer["LastModified"]).total_seconds()
        return Seen(data, answer["ETag"], age if date else None)

    def write(self, data: bytes, over: Seen | None) -> bool:
        with explained(self._storage, "write", NAME):
            if self._conditional:
                condition = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over.version}
                try:
                    self._put(data, **condition)
                    return True
                except boto.ClientError as error:
                    if code_of(error) in THERE | AT_ONCE | MISSING:
                        return True
                    if code_of(error) not in NO_CONDITIONS:
                        raise
                self._conditional = False
            self._put(data)
        return False

    def delete(self) -> None:
        with explained(self._storage, "delete", NAME):
            self._client.delete_object(**self._object)

    def _put(self, data: bytes, **condition: str) -> None:
        _put(self._client, data, ContentType=CONTENT_TYPES[".json"], **self._object, **condition)


def _put(client, data: bytes, **arguments: str) -> None:
    """Send one request with a checksum, which the store verifies before it stores the object.

    It is a header: boto3's own checksum follows the body, which older MinIO, Ceph and others refuse.
    `AWS_REQUEST_CHECKSUM_CALCULATION=when_required` leaves it out.
    """
    if client.meta.config.request_checksum_calculation != "when_required":
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        arguments |= {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": digest}
    client.put_object(Body=data, **arguments)


def _is_object(name: str) -> bool:
    """Return False for the lock and for names that end in a slash, with which some tools mark folders."""
    return name != NAME and name != "" and not name.endswith("/")


def _check_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OutputError("The S3 endpoint is not a URL; write e.g. https://storage.example.com.")
    if "@" in parts.netloc or parts.query:
        raise OutputError(
            "An S3 endpoint must not contain credentials or options: put credentials in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), and leave both out of the URL."
        )
