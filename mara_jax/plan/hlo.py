"""The collectives of a compiled program, read from its HLO text: their kinds, counts and bytes."""

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
    """Equal collectives of a program: `count` executions among `group` devices, each with `bytes` of result per device.

    sent: bytes that each device sends in all executions together, on a ring; looped: whether they are inside a loop.
    """

    kind: str
    group: int
    count: int
    bytes: int
    sent: int
    looped: bool


class Executed(NamedTuple):
    """One instruction of a program: its line, its number of executions, and where it stands."""

    line: str
    times: int
    looped: bool
    computation: str


def collectives(text: str, trips: Sequence[int] = ()) -> list[Collective]:
    """The collectives of a program, the heaviest first; equal ones are one entry.

    Args:
      text: the HLO of a compiled and partitioned module (`compiled.as_text()`), whose shapes are those of one device.
      trips: iterations of each loop that holds collectives and whose HLO states no trip count, in program order. Such a
        loop inside another such loop counts as one iteration, and so does each that `trips` has no number for.
    """
    bodies, entry = _computations(text)
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    devices = int(partitions[1]) if partitions else 1
    counts: dict[tuple[str, int, int, bool], int] = {}
    for line, times, looped, computation in _walk(bodies, entry, iter(trips), 1, False):
        collective = _collective(line, computation, devices)
        if collective is not None:
            counts[(*collective, looped)] = counts.get((*collective, looped), 0) + times
    entries = [
        Collective(kind, group, count, size, count * _sent(kind, group, size), looped)
        for (kind, group, size, looped), count in counts.items()
    ]
    return sorted(entries, key=lambda entry: (-entry.sent, entry.kind, entry.bytes))


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


def _walk(bodies, name: str, trips: Iterator[int], times: int, looped: bool) -> Iterator[Executed]:
    """Every instruction that a computation executes, those of the computations that it calls included."""
    channels: set[str] = set()  # of the collectives that fusions of this computation have shown already
    for line in bodies.get(name, ()):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        yield Executed(line, times, looped, name)
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        if match[2] == "while":
            yield from _walk_loop(bodies, line, called, trips, times)
        # The computation that an all-reduce applies is an addition and holds no collective.
        elif not match[2].startswith(("all-reduce", "reduce", "scatter", "sort", "map", "select-and", "async-done")):
            for body in called:
                for executed in _walk(bodies, body, trips, times, looped):
                    channel = re.search(r"channel_id=\d+", executed.line)
                    # TPUs spread one collective over several fusions, and the text of each fusion repeats it.
                    if match[2] == "fusion" and channel is not None:
                        if channel[0] in channels:
                            continue
                        channels.add(channel[0])
                    yield executed


def _walk_loop(bodies, line: str, called: list[str], trips: Iterator[int], times: int) -> Iterator[Executed]:
    """The instructions of a while loop's condition and body."""
    stated = _TRIPS.search(line)
    count = int(stated[1]) if stated else _trip_count(bodies, line)
    inner_trips = iter(()) if count is None else trips
    inner = [executed for body in called for executed in _walk(bodies, body, inner_trips, times, True)]
    if count is None:
        count = next(trips, 1) if any(_collective(each.line, each.computation, 1) for each in inner) else 1
    yield from (executed._replace(times=executed.times * count) for executed in inner)


def _trip_count(bodies: dict[str, list[str]], line: str) -> int | None:
    """The iterations of a loop whose condition compares a counter, which starts at 0, with a constant; else None."""
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
    results = re.search(r" tuple\((.*?)\)", root)
    if place is None or results is None:
        return 1
    names = re.findall(r"%([\w.\-]+)", results[1])
    at = int(place[1])
    added = re.search(r" add\(%?[\w.\-]+, %?([\w.\-]+)\)", _defined(body, names[at]) if at < len(names) else "")
    return (added and _constant(body, added[1])) or 1


def _defined(lines: list[str], name: str) -> str:
    """The line that defines a name; empty where none does."""
    pattern = re.compile(rf"\s+(?:ROOT )?%?{re.escape(name)} = ")
    return next((text for text in lines if pattern.match(text)), "")


def _constant(lines: list[str], name: str) -> int | None:
    constant = re.search(r" constant\((\d+)\)", _defined(lines, name))
    return int(constant[1]) if constant else None


def _collective(line: str, computation: str, devices: int) -> tuple[str, int, int] | None:
    """(kind, group size, bytes of the result) of a collective; None for any other instruction."""
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    result, name = match[1], match[2]
    kind = next((kind for kind in KINDS if name in (kind, f"{kind}-start")), None)
    if kind is None:
        return None
    group = _group(line, kind, devices)
    size = _bytes(_async_result(result) if name.endswith("-start") and kind != "all-reduce" else result)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter", group, size // group  # a TPU keeps its own shard of the result
    return kind, group, size


def _async_result(result: str) -> str:
    """The shape of the result in what an asynchronous start returns: (operand, result, ...)."""
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
    """The number of devices in a replica group; all devices if the line names no groups."""
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
    """Bytes that a device sends in one collective on a ring."""
    others = group - 1
    if kind == "all-reduce":
        return 2 * size * others // group
    if kind == "reduce-scatter":
        return size * others  # its operand is `group` times as large
    return size if kind == "collective-permute" else size * others // group
