"""Turn errors of boto3 and of S3-compatible stores into one sentence each."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from botocore import exceptions as boto

from aae_batch.errors import OutputError
from aae_batch.store.base import Storage

MISSING = {"NoSuchKey", "404"}
THERE = {"PreconditionFailed", "412"}
AT_ONCE = {"ConditionalRequestConflict", "409"}
NO_CONDITIONS = {"NotImplemented", "InvalidArgument", "InvalidRequest", "501"}

_AGAIN = "run the same command again"

# fmt: off
_REFUSED = {
    "there is no bucket {0.bucket}; create it, or check its name and the endpoint": {"NoSuchBucket"},
    "there is no such object; check the name": MISSING,
    "access is denied; check which credentials are in use, and that the bucket's policy lets them "
    "list, read, write and delete": {"AccessDenied", "AllAccessDisabled", "403"},
    "the store does not accept the AWS credentials in use ({code}); renew them": {
        "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
        "TokenRefreshRequired",
    },
    f"the store asks to slow down, {{0.attempts}} times over; {_AGAIN} later, or with fewer actors": {
        "SlowDown", "503", "ServiceUnavailable", "Throttling", "ThrottlingException",
        "RequestLimitExceeded", "TooManyRequests", "429",
    },
    f"it was overwritten while it was read; {_AGAIN}": THERE,
    "the store does not know something in the request ({code}), such as its checksum; set "
    "AWS_REQUEST_CHECKSUM_CALCULATION=when_required": {*NO_CONDITIONS, "XAmzContentSHA256Mismatch"},
    "the bucket is in another region; set AWS_REGION to it": {
        "PermanentRedirect", "301", "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    },
}
"""Message -> error codes of the store. `{0}` is the `S3Storage`."""

_FAILED: dict[str, tuple[type[Exception], ...]] = {
    "no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile "
    "in AWS_PROFILE, or give the machine a role": (
        boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError,
        boto.ProfileNotFound, boto.SSOError, boto.TokenRetrievalError,
    ),
    "{0.shown_endpoint} cannot be reached; check the network, and the endpoint (--s3-endpoint or "
    "AWS_ENDPOINT_URL)": (boto.HTTPClientError, boto.ConnectionError, boto.ReadTimeoutError),
    "{0.bucket!r} cannot be the name of a bucket; check it": (boto.ParamValidationError,),
}
# fmt: on
"""Message -> exception classes of boto3. `{0}` is the `S3Storage`."""


@contextmanager
def explained(
    storage: Storage, verb: str, name: str, passing: Collection[str] = frozenset()
) -> Iterator[None]:
    """Turn errors of boto3 into OutputError, except those whose code is in `passing`. The original text
    is left out, since it may quote headers.

    Raises:
        OutputError: the operation in the context failed.
    """
    try:
        yield
    except boto.ClientError as error:
        code = code_of(error)
        if code in passing:
            raise
        known = (why for why, codes in _REFUSED.items() if code in codes)
        why = next(known, f"the store answers {{code}}; fix that and {_AGAIN}")
    except (boto.BotoCoreError, Boto3Error) as error:
        code = type(error).__name__
        known = (why for why, kinds in _FAILED.items() if isinstance(error, kinds))
        why = next(known, f"{{code}}; fix that and {_AGAIN}")
    except OSError as error:  # from the local side of a download
        code = error.strerror or type(error).__name__
        why = "{code}"
    else:
        return
    raise OutputError(
        f"Cannot {verb} {storage.place(name)}: {why.format(storage, code=code)}."
    ) from None


def code_of(error: boto.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "an error"))
