"""What a file holds, told by its bytes and never by its name: text is unpacked and brought to UTF-8, the rest refused.

Read are UTF-8, and UTF-16 and UTF-32 that begin with a byte order mark, each plain or packed by gzip, bzip2, xz, zstd
or lz4. Marks are dropped, so that one text has one hash however it was saved; plain UTF-8 stays as it is.
"""

from __future__ import annotations

import codecs
import io
import lzma
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rnn_longctx.errors import InputError, one_line

DAMAGED = (OSError, EOFError, lzma.LZMAError)  # (pyarrow's is an OSError)
HEAD = 1024  # bytes that tell what a file is
CHUNK = 2**24  # bytes decoded at once, to see whether they can be
PACKED = {  # pyarrow's name of it, or xz, which it does not read
    "gzip": rb"\x1f\x8b\x08",
    "bz2": rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38)",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "lz4": rb"\x04\x22\x4d\x18",
}
MARKS = {  # UTF-32's before UTF-16's, which it begins with
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_TEXT = "expected text"
_UNPACK = "unpack it and name the text in it"
_MODEL = "a model's weights are loaded, not read as text"
# How a file begins, what it then is, and what helps. The second kind is looked for where there is no plain text alone:
# a text may begin with "MZ" too.
_LIKE_TEXT = [
    (rb"%PDF-\d\.\d\s*[\r\n]", "a PDF", "pdftotext FILE.pdf FILE.txt makes text of it"),
    (rb'\s*\{(?=.{0,400}"truncation")(?=.{0,4000}"added_tokens")', "a tokenizer.json", "that goes to --tokenizer"),
]
_BINARY = [
    (rb".{257}ustar", "a tar archive", _UNPACK),
    (rb"7z\xbc\xaf|Rar!\x1a", "an archive", _UNPACK),
    (rb"\xd0\xcf\x11\xe0", "an old Word or Excel file", "save it as plain text"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0\0\0\0|II\*\0|MM\0\*|RIFF.{4}WEBP", "an image", _TEXT),
    (rb"RIFF|ID3|OggS|fLaC|\xff\xfb|.{4}ftyp", "sound or video", _TEXT),
    (rb"\x7fELF|MZ|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe", "a program", _TEXT),
    (rb"PAR1", "Parquet", "parquet:PATH[:column] reads it"),
    (rb"ARROW1|\xff\xff\xff\xff.{3}\0", "an Arrow table", "hf:FOLDER[:split[:column]] reads what save_to_disk wrote"),
    (rb".{6}\0\0\{", "safetensors", _MODEL),
    (rb"GGUF", "a GGUF model", _MODEL),
    (rb"\x80[\x02-\x05]", "a Python pickle", "nothing in it was run; write its texts to a file"),
    (rb"\x93NUMPY", "a NumPy array", _TEXT),
    (rb"\x89HDF", "HDF5", _TEXT),
    (rb"SQLite format 3\0", "an SQLite database", _TEXT),
]


def read_text(path: Path) -> bytes:
    """Return the text of a file as UTF-8. Raises InputError where it cannot be read or is no text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read text {path}: {error.strerror}") from None
    return as_text(data, str(path))


def as_text(data: bytes, where: str) -> bytes:
    """Return what `data`, which came from `where`, holds as UTF-8. Raises InputError where that is no text: what it
    looks like, the byte that is none, and what helps."""
    packings = []
    while packing := packing_of(data):
        try:
            data = unpacked(io.BytesIO(data), packing).read()
        except DAMAGED as error:
            raise InputError(f"{where}: its {packing} is damaged or cut short ({one_line(error)})") from None
        packings.append(packing)
    inside = f"{where}, unpacked from {' and '.join(packings)}," if packings else where
    encoding = encoding_of(data[:4])
    try:
        if encoding == "utf-8-sig":
            data = data[3:]
        elif encoding:
            data = data.decode(encoding).encode()
    except UnicodeError as error:
        wrong = f"begins as {str(encoding).upper()} text and is none from byte {getattr(error, 'start', 0)} on"
        raise InputError(f"{inside} {wrong}: is it cut short, or no text?") from None
    if reason := refusal(data):
        raise InputError(f"{inside} {reason}")
    return data


def refusal(data: bytes) -> str | None:
    """Return why bytes are no UTF-8 text, to follow the name of where they came from; None where they are."""
    at, nul = not_utf8(data), data.count(b"\0", 0, CHUNK)
    if reason := looks_like(data, at is not None or nul > 0):
        return reason
    if 4 * nul > min(len(data), CHUNK):  # NUL is the end of a document, and none is so short
        return "looks like UTF-16 or UTF-32 without a byte order mark; convert it: iconv -f utf-16le -t utf-8 OLD > NEW"
    if at is None:
        return None
    if _incomplete(data[at:]):
        return f"ends inside a character, at byte {at}; iconv -c -f utf-8 -t utf-8 OLD > NEW leaves it out"
    byte = f"not UTF-8 text at byte {at} (0x{data[at]:02x})"
    return f"is {byte}; if it is text, convert it: iconv -f latin1 -t utf-8 OLD > NEW"


def looks_like(data: bytes, binary: bool | None = None) -> str | None:
    """Return what bytes that begin so are, and what helps; None where they may be text.

    Args:
        binary: whether they are surely no plain text; None: as their beginning says.
    """
    head = data[: 4 * HEAD]
    if binary is None:
        at = not_utf8(head)
        binary = b"\0" in head or (at is not None and not _incomplete(head[at:]))
    if binary and head.startswith((b"PK\3\4", b"PK\5\6")):
        return _zipped(data)
    for pattern, what, helps in [*_LIKE_TEXT, *(_BINARY if binary else [])]:
        if re.match(pattern, head, re.DOTALL):
            return f"looks like {what}; {helps}"
    return None


def packing_of(head: bytes) -> str | None:
    """Return the name of what packed a file that begins so, or None."""
    return next((name for name, pattern in PACKED.items() if re.match(pattern, head)), None)


def encoding_of(head: bytes) -> str | None:
    """Return the encoding that a byte order mark names, or None."""
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), None)


def unpacked(stream: BinaryIO, packing: str) -> Any:
    """Return a stream of what is packed in another. Reading it raises one of DAMAGED where it is damaged or cut off."""
    import pyarrow

    if packing == "xz":
        return lzma.LZMAFile(stream)
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), packing)


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a text file as UTF-8, unpacked as they are read.

    Raises:
        one of DAMAGED: it is damaged or cut short.
        UnicodeError: a line is not in the encoding that the file's mark names.
        InputError: it does not begin like text.
    """
    with path.open("rb") as file:
        stream: Any = file
        while packing := packing_of(stream.peek(HEAD)):
            stream = io.BufferedReader(unpacked(stream, packing), 1 << 16)
        head = stream.peek(HEAD)
        if reason := looks_like(head):
            raise InputError(f"{path} {reason}")
        encoding = encoding_of(head)
        if encoding in (None, "utf-8-sig"):
            stream.read(3 if encoding else 0)
            yield from stream
        else:
            yield from (line.encode() for line in io.TextIOWrapper(stream, encoding, newline="\n"))


def not_utf8(data: bytes) -> int | None:
    """Return the place of the first byte that is not UTF-8, or None. It is read in pieces, for a text of a gigabyte may
    be four as a str."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    while start < len(data):
        before = len(decoder.getstate()[0])
        try:
            decoder.decode(data[start : start + CHUNK], start + CHUNK >= len(data))
        except UnicodeDecodeError as error:
            return start - before + error.start
        start += CHUNK
    return None


def _incomplete(end: bytes) -> bool:
    """Return whether bytes are the beginning of a character, and more would make it whole."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(end)
    except UnicodeDecodeError:
        return False
    return True


def _zipped(data: bytes) -> str:
    """Return what a ZIP archive is, by what is in it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError):  # its beginning alone
        names = []
    pandoc = "pandoc -t plain -o FILE.txt FILE makes text of it"
    for folder, what, helps in (
        ("word/", "a Word document (.docx)", pandoc),
        ("xl/", "an Excel file (.xlsx)", "save it as text"),
        ("ppt/", "a PowerPoint file (.pptx)", pandoc),
        ("META-INF/container.xml", "an EPUB", pandoc),
        ("content.xml", "an OpenDocument file", pandoc),
    ):
        if any(name.startswith(folder) for name in names):
            return f"looks like {what}; {helps}"
    if any(name.endswith("data.pkl") for name in names):
        return f"looks like a PyTorch file; {_MODEL}"
    return f"looks like a ZIP archive; {_UNPACK}"
