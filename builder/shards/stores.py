"""Object stores behind fsspec: how they are opened, how often a request is tried, and what their errors mean to a user.

Requests that fail for a moment (5xx, throttling, a dropped connection) are tried again by the store's own client, with
exponential backoff and jitter: botocore's standard mode for s3://, gcsfs's own for gs://.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from builder.display import printable
from builder.errors import BuilderError

TRIES = 10  # of a request; at a failure rate of 20 % one request in ten million fails them all, after a minute or so
S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {"retries": {"mode": "standard", "max_attempts": TRIES}},
    "use_listings_cache": False,  # others write at the same time
    "default_cache_type": "none",  # reads are of known ranges
}
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": S3_OPTIONS,
    "s3a": S3_OPTIONS,
    "gs": {"use_listings_cache": False},
    "gcs": {"use_listings_cache": False},
}
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
EXTRAS = {"s3fs": "s3", "gcsfs": "gs"}
LOCAL = ("file", "local")
SUPPORTED = (*LOCAL, *OPTIONS, "memory")  # schemes of URLs; the last lives in this process, and is for trying out
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and AWS_ENDPOINT_URL if it is not AWS",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}


def connect(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an output root, and its path there. BuilderError for an unknown or uninstalled one."""
    scheme = root.partition("://")[0] if "://" in root else ""
    if scheme and scheme not in SUPPORTED:
        raise BuilderError(
            f"'{printable(root)}': {printable(scheme)}:// is not supported",
            "give a folder, or a URL with s3:// or gs:// (file:// is a folder)",
        )
    if "\0" in root:
        raise BuilderError(f"'{printable(root)}' is no path", "give a folder, s3://BUCKET/PREFIX or gs://...")
    try:
        fs, path = fsspec.core.url_to_fs(root, **OPTIONS.get(scheme, {}))
    except ImportError:
        package = PACKAGES.get(scheme, f"the fsspec package for {scheme}")
        remedy = f"pip install 'builder[{EXTRAS[package]}]'" if package in EXTRAS else "install it"
        raise BuilderError(f"cannot open '{root}': {package} is not installed", remedy) from None
    except ValueError as error:
        raise BuilderError(f"cannot open '{root}': {error}", "give a folder, s3://BUCKET/PREFIX or gs://...") from None
    if scheme in ("s3", "s3a"):
        from s3fs.core import set_custom_error_handler

        set_custom_error_handler(_of_two_writers)
    return fs, str(path)


def _of_two_writers(error: Exception) -> bool:
    """Whether S3 asks to try again because two conditional writes of one object met (409)."""
    return "ConditionalRequestConflict" in str(error)


@contextmanager
def explained(root: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what a store's client raises into a BuilderError with the remedy.

    FileNotFoundError passes when reading (the caller knows what it means), FileExistsError always.
    """
    scheme = root.partition("://")[0].replace("s3a", "s3").replace("gcs", "gs")
    try:
        yield
    except (BuilderError, FileExistsError):
        raise
    except FileNotFoundError as error:
        if not writing:
            raise
        remedy = "make the bucket first, or mend the name in --out"
        raise BuilderError(f"cannot write to {root}: {_short(error)}", remedy) from error
    except NotImplementedError:
        raise
    except Exception as error:
        what = f"cannot {'write to' if writing else 'read from'} {root}: {_short(error)}"
        said = f"{type(error).__name__} {error}".lower()
        if isinstance(error, PermissionError) or "credential" in said or "forbidden" in said:  # the last: gcsfs
            remedy = CREDENTIALS.get(scheme, "check your credentials")
            raise BuilderError(what, f"{remedy}; you must be allowed to list, read, write and delete there") from error
        raise BuilderError(
            what, "check the address and the network; what was committed is safe, and the same command continues"
        ) from error


def _short(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said[:300] or type(error).__name__
