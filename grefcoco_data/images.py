"""Image files in a folder, a zip or a repository of the Hub: checked and read.

No file is trusted: names, sizes and checksums are checked before anything is decoded.
"""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_IMAGE_BYTES = 64 << 20
UNSAFE_CHARACTERS = set('\\:*?"<>|')  # in names of files
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not a byte of pixels, a padding or a restart
SEQUENTIAL = (0xC0, 0xC1)  # frames whose pixels come from the top to the bottom, in Huffman codes
ORIENTATION_MARKS = (b"Exif", b"eXIf", b"exif", b"xmp", b"/xap/")  # what files with an orientation tag hold


class ImageFolder:
    """Image files in one folder. `read` returns their bytes unchanged."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self, file_name: str) -> bytes:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is too large for an image, or not a regular file: a pipe or a device could have no end.
        """
        path = self.path / file_name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise ValueError(f"{status.st_size} bytes are too many for an image")
        return path.read_bytes()


class ImageZip:
    """Images in a zip, found by base name and read in place, without extraction.

    Entries are read with `pread` at their offsets. It does not move the file position, so that one handle serves a
    process and its forks. A pickled copy opens its own handle.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path} is neither a folder nor a file of images.")
        self.handle = os.open(self.path, os.O_RDONLY)
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        except Exception as error:  # a broken zip can raise any exception
            raise ValueError(f"{self.path} is not a complete zip file ({error}); download it again.") from error
        self.entries: dict[str, list[zipfile.ZipInfo]] = {}  # by path without its first folders, the base name last
        for entry in entries:
            parts = re.split(r"[/\\]", entry.filename)  # some programs write backslashes
            if not parts[0] or ".." in parts or ":" in parts[0]:
                raise ValueError(f"{self.path}: entry {entry.filename!r} points outside the archive; refused.")
            for start in range(len(parts)):
                self.entries.setdefault("/".join(parts[start:]), []).append(entry)

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)

    def read(self, file_name: str) -> bytes:
        """Bytes of an entry, found by the end of its path.

        Raises:
            FileNotFoundError: there is no such entry.
            ValueError: it is damaged, too large, encrypted or compressed in a rare way, or several entries fit.
        """
        entries = self.entries.get(file_name, [])
        if not entries:
            raise FileNotFoundError(f"no entry {file_name}")
        if len(entries) > 1:
            names = " and ".join(repr(entry.filename) for entry in entries[:2])
            raise ValueError(f"the zip has several entries of this name, {names}")
        entry = entries[0]
        if entry.flag_bits & 1:
            raise ValueError("it is encrypted in the zip; make a zip without a password")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"it is compressed in the zip by method {entry.compress_type}; only stored and deflate work"
            )
        if max(entry.file_size, entry.compress_size) > MAX_IMAGE_BYTES:
            raise ValueError(f"{entry.file_size} bytes are too many for an image")
        # A local header has 30 bytes, then the name and the extra field, whose lengths are its last two numbers.
        header = os.pread(self.handle, 30, entry.header_offset)
        skip = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = os.pread(self.handle, entry.compress_size, entry.header_offset + skip)
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max(1, entry.file_size))
            except zlib.error as error:
                raise ValueError(f"it is damaged in the zip ({error})") from error
        if zlib.crc32(data) != entry.CRC:
            raise ValueError("its checksum in the zip does not match")
        return data


def local_images(path: str) -> str:
    """Local path of the images: `path` itself, or the downloaded copy of `hf://datasets/OWNER/NAME/PATH`.

    Raises:
        ValueError: an `hf://` path that names no data set.
        FileNotFoundError: the data set has no such folder or zip.
    """
    if not path.startswith("hf://datasets/"):
        return path
    owner, _, rest = path.removeprefix("hf://datasets/").partition("/")
    name, _, inner = rest.strip("/").partition("/")
    if not owner or not name:
        raise ValueError(f"{path} names no data set; write hf://datasets/OWNER/NAME/PATH.")
    patterns = [inner, f"{inner}/*"] if inner else None
    folder = os.path.join(snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=patterns), inner)
    if not os.path.exists(folder):
        raise FileNotFoundError(f"{path}: {owner}/{name} has no folder or zip {inner!r}.")
    return folder


def open_images(path: str) -> ImageFolder | ImageZip:
    """Open the folder or zip at `path`; the table of contents of a zip is read once until the file changes.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: neither a folder nor a zip.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path}: no such images folder or zip. gRefCOCO needs COCO train2014, "
            "http://images.cocodataset.org/zips/train2014.zip, extracted or not."
        )
    return ImageFolder(path) if os.path.isdir(path) else _open_zip(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_zip(path: str, mtime_ns: int) -> ImageZip:
    return ImageZip(path)


def read_image(source: ImageFolder | ImageZip, image: dict) -> bytes:
    """Bytes of the image that a record of instances.json names, after a check that they are this image.

    The size in the file's header is compared with the record before anything is decoded, so that a decompression
    bomb costs nothing.

    Raises:
        ValueError: the file is missing, has an unsafe name, is not an image, is truncated or has another size.
    """
    name = image["file_name"]
    if not _is_safe(name):
        raise ValueError(f"unsafe file name {name[:80]!r} of image {image['id']}, refused")
    try:
        data = source.read(name)
    except FileNotFoundError:
        raise ValueError(f"image {name} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"image {name} cannot be read ({error})") from error
    size, fault = image_size(data)
    if not fault and size != (image["width"], image["height"]):
        fault = f"is {size[0]} x {size[1]} but instances.json says {image['width']} x {image['height']}"
    if fault := fault or pixel_fault(data):
        raise ValueError(f"image {name} {fault}")
    return data


def _is_safe(name: str) -> bool:
    """Whether a file name, perhaps with folders before it, stays inside the folder of images on every system."""
    return len(name) <= 1000 and all(
        part and part.isprintable() and part == part.strip() and part[0] != "." and not set(part) & UNSAFE_CHARACTERS
        for part in name.split("/")
    )


def without_orientation(data: bytes) -> bytes | None:
    """The same picture without its orientation tag (EXIF, XMP), pixels untouched; None when it has no such tag.

    Masks are about the pixels as they are stored, and readers that follow the tag would turn the picture. The metadata
    that holds the tag is removed as a whole.
    """
    if not any(mark in data for mark in ORIENTATION_MARKS) or _orientation(data) in (None, 1):
        return None
    parts = _jpeg_parts(data) if data.startswith(b"\xff\xd8") else _png_parts(data)
    return b"".join(parts)


def _orientation(data: bytes) -> int | None:
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(ExifTags.Base.Orientation)


def _jpeg_parts(data: bytes) -> Iterator[bytes]:
    """The parts of a JPEG file without its APP1 segments (EXIF and XMP)."""
    yield data[:2]
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1] != 0xDA:  # before the first scan
        if data[position + 1] == 0xFF:  # padding
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] != 0xE1:
            yield data[position:end]
        position = end
    yield data[position:]


def _png_parts(data: bytes) -> Iterator[bytes]:
    """The parts of a PNG file without the chunks that can hold EXIF or XMP."""
    yield data[:8]
    position = 8
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] not in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            yield data[position:end]
        position = end


def image_size(data: bytes) -> tuple[tuple[int, int], str | None]:
    """Width and height in the header of an image file; and what is wrong with it, or None. Nothing is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            return image.size, None
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return (0, 0), "is not a JPEG or PNG that can be read"
    except (OSError, SyntaxError, ValueError) as error:
        return (0, 0), f"is truncated or damaged ({error})"


def pixel_fault(data: bytes) -> str | None:
    """What is wrong with the pixels of a JPEG or PNG file; None when all of them are there.

    The JPEG decoder paints grey what is missing before the end marker, without an error.
    """
    num_scans, frame, end = _jpeg_layout(data) if data.startswith(b"\xff\xd8") else (0, 0, None)
    try:
        if end is None:  # a PNG, or a JPEG without an end marker, on which the decoder fails
            _decode(data)
        elif num_scans == 1 and frame in SEQUENTIAL:
            # Without the end marker, the decoder fails where it needs more than the eight bytes that it reads ahead.
            # Ones are no code, so that it makes no pixels of these bytes. A small version takes a third of the time.
            _decode(data[:end] + b"\xff\x00" * 8, small=True)
        else:  # bytes after the last scan change pixels where the scan is not complete
            changed = _decode(data[:end] + bytes(range(1, 255)) + data[end:])
            if _decode(data).tobytes() != changed.tobytes():
                return "is truncated or damaged (its last scan is incomplete)"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"is truncated or damaged ({error})"
    return None


def _jpeg_layout(data: bytes) -> tuple[int, int, int | None]:
    """Number of scans, marker of the frame and position of the end marker (None without one) of a JPEG file."""
    position, frame, num_scans = 2, 0, 0
    while match := JPEG_MARKER.search(data, position):
        position, code = match.start(), data[match.start() + 1]
        if code == 0xD9:
            return num_scans, frame, position
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            frame = code
        num_scans += code == 0xDA
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return num_scans, frame, None


def _decode(data: bytes, small: bool = False) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    if small:
        image.draft("L", (1, 1))
    image.load()
    return image
