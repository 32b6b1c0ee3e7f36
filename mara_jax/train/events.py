"""Files of TensorBoard events with scalars, written and cut back by this module alone.

A file is a row of records: length, checksum, message, checksum. A message is an `Event` of TensorFlow's event.proto.
The package tensorboardX writes the same, but wherever torch is installed it imports that, for two seconds and with its
CUDA libraries, into a process that computes with jax.
"""

import pathlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping

PATTERN = "events.out.tfevents.*"
_PART = "part."
_POLYNOMIAL = 0x82F63B78  # of CRC-32C, bits reversed
_LARGEST = 3.4e38  # that a scalar can be


class Events:
    """Appends scalars by steps to a folder.

    What an earlier process wrote of later steps than `steps_done` is removed. The rest stays; a new file begins with
    what tells a TensorBoard that shows the folder already to forget those steps, too.
    """

    def __init__(self, folder: pathlib.Path, steps_done: int) -> None:
        self.folder, self.steps_done, self.file = folder, steps_done, None
        for path in folder.glob(f"{_PART}*"):
            path.unlink()  # which a kill left
        for path in folder.glob(PATTERN):
            _cut(path, steps_done)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event with these values."""
        if self.file is None:
            self.file = self._begin()
        summary = b"".join(_field(1, _field(1, name.encode()) + _float(2, value)) for name, value in values.items())
        self.file.write(_record(_event(step, _field(5, summary))))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _begin(self):
        """A new file, whose name comes last in their order."""
        self.folder.mkdir(exist_ok=True)
        earlier = [int(path.name.split(".")[3]) for path in self.folder.glob(PATTERN)]
        second = max([int(time.time()), *(number + 1 for number in earlier)])
        name = PATTERN.replace("*", f"{second}.{socket.gethostname()}")
        file = (self.folder / name).open("ab", buffering=0)
        file.write(_record(_event(0, _field(3, b"brain.Event:2"))))
        if earlier:
            file.write(_record(_event(self.steps_done + 1, _field(7, b"\x08\x01"))))  # session_log: start
        return file


def messages(path: pathlib.Path) -> Iterator[bytes]:
    """The messages of a file, up to the first that a kill cut short."""
    content, at = path.read_bytes(), 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        message = content[at + 12 : at + 12 + length]
        at += 16 + length
        if at > len(content) or _record(message) != content[at - 16 - length : at]:
            return
        yield message


def _cut(path: pathlib.Path, steps_done: int) -> None:
    """Removes the events of later steps, and a last one that a kill cut short."""
    kept = b"".join(_record(message) for message in messages(path) if _step(message) <= steps_done)
    if len(kept) == path.stat().st_size:
        return
    part = path.with_name(_PART + path.name)
    part.write_bytes(kept)
    part.replace(path)


def _event(step: int, content: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + content


def _step(message: bytes) -> int:
    """The step of an event of this module: behind the time, 7 bits a byte."""
    step, shift = 0, 0
    for byte in message[10:]:
        step |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return step


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _float(number: int, value: float) -> bytes:
    return bytes([number << 3 | 5]) + struct.pack("<f", min(max(value, -_LARGEST), _LARGEST))


def _varint(value: int) -> bytes:
    low = bytearray()
    while value >= 0x80:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*low, value])


def _record(message: bytes) -> bytes:
    length = struct.pack("<Q", len(message))
    return length + struct.pack("<I", _masked_crc(length)) + message + struct.pack("<I", _masked_crc(message))


def _row_of_table(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = [_row_of_table(byte) for byte in range(256)]


def _masked_crc(content: bytes) -> int:
    """CRC-32C, rotated and shifted as TensorFlow's records have it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
