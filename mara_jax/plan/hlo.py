"""Collectives of a compiled program, read off its HLO text: which, how often, of how many bytes."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?[:=]\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One kind of exchange: among `group` devices, `count` times, `bytes` of result on each device in one of them.

    sent: bytes that each device sends all the times together, on a ring; looped: whether it stands in a loop.
    """

    kind: str
    group: int
    count: int
    bytes: int
    sent: int
    looped: bool


def collectives(text: str, trips: Sequence[int] = ()) -> list[Collective]:
    """The exchanges of a program, the heaviest first; equal ones are one entry.

    Args:
      text: of a compiled and partitioned module (`compiled.as_text()`): shapes are one device's.
      trips: how often each loop with exchanges runs whose text does not tell, in order; one inside it counts once, as
        does each that `trips` has no number for.
    """
    bodies, entry = _computations(text)
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    devices, found = int(partitions[1]) if partitions else 1, {}
    for line, times, looped, inside in _walk(bodies, entry, iter(trips), 1, False):
        one = _of_line(line, inside, devices)
        if one is not None:
            found[(*one, looped)] = found.get((*one, looped), 0) + times
    made = [
        Collective(kind, group, count, size, count * _sent(kind, group, size), looped)
        for (kind, group, size, looped), count in found.items()
    ]
    return sorted(made, key=lambda c: (-c.sent, c.kind, c.bytes))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by its name, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _walk(bodies, name: str, trips: Iterator[int], times: int, looped: bool) -> Iterator[tuple[str, int, bool, str]]:
    """Every instruction as it runs: its line, how often, whether in a loop, and the computation it stands in."""
    under_way: set[str] = set()
    for line in bodies.get(name, ()):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        yield line, times, looped, name
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        if match[2] == "while":
            known = _TRIPS.search(line)
            told = int(known[1]) if known else _counted(bodies, line)
            nested = iter(()) if told is None else trips
            found = [one for body in called for one in _walk(bodies, body, nested, times, True)]
            if told is None:
                told = next(trips, 1) if any(_of_line(one[0], one[3], 1) for one in found) else 1
            yield from ((inner, count * told, True, where) for inner, count, _, where in found)
        # What an all-reduce applies is an addition: nothing in it is an exchange.
        elif not match[2].startswith(("all-reduce", "reduce", "scatter", "sort", "map", "select-and", "async-done")):
            for body in called:
                for found in _walk(bodies, body, trips, times, looped):
                    channel = re.search(r"channel_id=\d+", found[0])
                    # TPUs spread one exchange over several fusions, each of which writes it out again.
                    if match[2] == "fusion" and channel is not None:
                        if channel[0] in under_way:
                            continue
                        under_way.add(channel[0])
                    yield found


def _counted(bodies: dict[str, list[str]], line: str) -> int | None:
    """How often a loop runs whose condition is only that its counter, from 0, lies below a constant."""
    condition, body = (re.search(rf"{role}=%?([\w.\-]+)", line) for role in ("condition", "body"))
    if condition is None or body is None:
        return None
    lines = bodies.get(condition[1], [])
    root = next((text for text in lines if text.lstrip().startswith("ROOT ")), "")
    compared = re.search(r" compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=(LT|GT)", root)
    if compared is None:
        return None
    counter, limit = compared.groups()[:2] if compared[3] == "LT" else compared.groups()[1::-1]
    most = _constant(lines, limit)
    return None if most is None else -(-most // _step(lines, bodies.get(body[1], []), counter))


def _step(condition: list[str], body: list[str], counter: str) -> int:
    """By how much a loop's counter grows: 1 unless its body adds another constant (an unrolled one does)."""
    place = re.search(r"index=(\d+)", _defined(condition, counter))
    root = next((text for text in body if text.lstrip().startswith("ROOT ")), "")
    made = re.search(r" tuple\((.*?)\)", root)
    if place is None or made is None:
        return 1
    names = re.findall(r"%([\w.\-]+)", made[1])
    at = int(place[1])
    added = re.search(r" add\(%?[\w.\-]+, %?([\w.\-]+)\)", _defined(body, names[at]) if at < len(names) else "")
    return (added and _constant(body, added[1])) or 1


def _defined(lines: list[str], name: str) -> str:
    """The line that defines a name; empty where none does."""
    pattern = re.compile(rf"\s+(?:ROOT )?%?{re.escape(name)} = ")
    return next((text for text in lines if pattern.match(text)), "")


def _constant(lines: list[str], name: str) -> int | None:
    found = re.search(r" constant\((\d+)\)", _defined(lines, name))
    return int(found[1]) if found else None


def _of_line(line: str, inside: str, devices: int) -> tuple[str, int, int] | None:
    """(kind, group size, bytes of the result) of a collective; None for any other instruction."""
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    result, name = match[1], match[2]
    kind = next((kind for kind in KINDS if name in (kind, f"{kind}-start")), None)
    if kind is None:
        return None
    group = _group(line, kind, devices)
    size = _bytes(_finished(result) if name.endswith("-start") and kind != "all-reduce" else result)
    if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
        return "reduce-scatter", group, size // group  # TPUs keep the part of it that is theirs
    return kind, group, size


def _finished(result: str) -> str:
    """Of what an asynchronous start returns, (given, made, ...), the part that is made."""
    depth, parts = 0, [""]
    for char in result[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts[1] if len(parts) > 1 else result


def _bytes(shape: str) -> int:
    """Bytes of an array's or a tuple's shape as HLO writes it."""
    return sum(
        _bits(kind) * math.prod(int(d) for d in dims.split(",") if d) // 8 for kind, dims in _ARRAY.findall(shape)
    )


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 0


def _group(line: str, kind: str, devices: int) -> int:
    """Devices of one of the groups that exchange; all of them where none are named."""
    if kind == "collective-permute":
        return 2
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        cut = {name: int(size) for name, size in re.findall(r"'([^']+)':\(\d+\)(\d+)", match[2])}
        return math.prod(cut.get(name, sizes.get(name, 1)) for name in re.findall(r"'([^']+)'", match[2]))
    return devices


def _sent(kind: str, group: int, size: int) -> int:
    """Bytes that a device sends in one exchange on a ring."""
    others = group - 1
    if kind == "all-reduce":
        return 2 * size * others // group
    if kind == "reduce-scatter":
        return size * others  # its operand is `group` times as large
    return size if kind == "collective-permute" else size * others // group
