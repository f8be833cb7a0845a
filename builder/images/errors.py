"""What the door says of a picture that it doesn't read."""

from __future__ import annotations

CONVERT = "save it as an 8-bit PNG or JPEG"
REPLACE = "replace it by a sound copy"


class ImageError(ValueError):
    """A picture that isn't read. `reason` says why, `remedy` what to do; the caller knows where the picture lies.

    It is the only exception that this room raises for what a picture holds, whatever the decoder made of it.
    """

    def __init__(self, reason: str, remedy: str = REPLACE) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        """A worker process hands its error to the parent by pickle."""
        return ImageError, (self.reason, self.remedy)


def cut_short(kind: str) -> ImageError:
    return ImageError(f"it is a {kind} that is cut short")


def damaged(kind: str, why: object) -> ImageError:
    return ImageError(f"it is a damaged {kind} ({why})")
