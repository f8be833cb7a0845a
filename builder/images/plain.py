"""BMP and GIF: formats without EXIF, whose decoders read nothing but pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile

from builder.images.header import Header
from builder.images.source import ByteSource


@dataclass(frozen=True)
class Plain:
    """The codec of a format whose header `plugin` reads without taking memory for pixels."""

    name: str
    plugin: type[ImageFile.ImageFile]

    def header(self, source: ByteSource) -> Header:
        """See Codec."""
        with self.plugin(io.BytesIO(source.all())) as image:
            return Header(self.name, image.size)

    def profile(self, source: ByteSource, header: Header) -> bytes | None:
        """See Codec. These formats have none that anyone writes."""
        return None

    def decode(self, source: ByteSource, header: Header) -> Image.Image:
        """See Codec."""
        image = self.plugin(io.BytesIO(source.all()))
        image.load()
        return image


BMP = Plain("BMP", BmpImagePlugin.BmpImageFile)
GIF = Plain("GIF", GifImagePlugin.GifImageFile)
