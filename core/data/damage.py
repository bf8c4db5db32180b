"""Files whose pixels are whole and whose rest is not: what Pillow refuses, and a viewer shows."""

import re
import struct
import zlib

END_OF_JPEG = b"\xff\xd9"
WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")


def without_metadata(data):
    """The bytes of a PNG, WebP or AVIF file without metadata that can't be read; None for another kind.

    Of a PNG all goes that isn't pixels, save an EXIF chunk whose checksum is right: it may turn the picture.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[:8] + b"".join(_png_chunks(data))
    if data[:4] + data[8:12] == b"RIFFWEBP":
        chunks = b"WEBP" + b"".join(_webp_chunks(data))
        return b"RIFF" + struct.pack("<I", len(chunks)) + chunks
    if data[4:8] == b"ftyp":
        return data.replace(b"Exif", b"free")  # the kind of an item, by which it is found
    return None


def _png_chunks(data):
    start = 8
    while start + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[start : start + 8])
        end = start + 12 + length
        is_sound = data[end - 4 : end] == struct.pack(">I", zlib.crc32(data[start + 4 : end - 4]))
        if kind[:1].isupper() or kind == b"tRNS" or kind == b"eXIf" and is_sound:
            yield data[start:end]
        start = end


def _webp_chunks(data):
    start = 12
    while start + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[start : start + 8])
        end = start + 8 + length
        if end <= len(data) or kind in WEBP_PIXELS:
            yield data[start : end + length % 2]
        start = end + length % 2


def has_all_scans(data):
    """Whether a JPEG has, or has begun, the last of its scans: with them each of its components has all 64 frequencies,
    to the last bit (a progressive one brings them in turn)."""
    try:
        start, components = 2, 0
        while data[start + 1] != 0xDA:  # segments, each with its length; here that of a scan begins
            if 0xC0 <= data[start + 1] <= 0xC2:  # frame: baseline, extended, progressive
                components = data[start + 9]
            start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        settled = set()
        for match in re.finditer(b"\xff\xda", data[start:]):
            scan = data[start + match.start() + 4 :][:16]
            first, last, bits = scan[1 + 2 * scan[0] :][:3]
            if bits % 16 == 0:  # the lowest bit is in it
                settled |= {
                    (component, place) for component in scan[1::2][: scan[0]] for place in range(first, last + 1)
                }
        return len(settled) == 64 * components
    except (IndexError, ValueError):
        return False
