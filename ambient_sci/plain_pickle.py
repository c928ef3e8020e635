"""What a pickle says, without doing what it says: data sets and checkpoints of others, read and never run.

A pickle is a program: names of Python functions, and what to call them with. Here names stay names. The
program is read instruction by instruction (`pickletools`, which parses and nothing else); numbers, texts,
bytes and plain containers become themselves, and whatever is to be called becomes a `Record`: the name, the
arguments, what was to be set afterwards. Nothing is imported and nothing called, so a hostile file can do no
more than be refused. Who reads a format says which names belong to it; any other ends in an error that
names it.

Sizes are those of the file: nothing is allocated for what a file merely claims to hold.
"""

from __future__ import annotations

import mmap
import os
import pickletools
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambient_sci.errors import InputError

#: The name of an identifier of something outside the pickle (a persistent id), where a format has such.
PERSISTENT = "<persistent id>"


@dataclass(frozen=True)
class Global:
    """A name, "module.attribute", of something that a pickle refers to."""

    name: str


@dataclass(eq=False)
class Record:
    """Something that would have been made by a call.

    Attributes:
        name: of what would have been called.
        args: with which arguments.
        state: what would have been set on the result, None if nothing.
        items: what would have been appended or added to it.
        pairs: keys and values that would have been set in it.
    """

    name: str
    args: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


def read_plain(
    source: str | os.PathLike[str] | bytes,
    allowed: Collection[str],
    *,
    what: str = "pickle",
    label: str | None = None,
) -> Any:
    """The content of a pickle, with a `Record` for everything that would have been called.

    Args:
        source: a file, or the bytes of a pickle.
        allowed: names that the format may refer to, "module.attribute", or "module.*" for all in and below a
            module; names stay names, whatever is allowed. `PERSISTENT` allows identifiers of things outside.
        what: names the format in errors.
        label: names the source in errors; default: its path.

    Raises:
        InputError: no such file, a damaged pickle, or one that refers to anything else, by name.
    """
    if isinstance(source, bytes):
        return _run(_Bytes(source), allowed, what, label or what)
    path, label = Path(source), label or str(source)
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or os.fstat(file.fileno()).st_size == 0:
                raise InputError(f"{label}: expected a {what}, got an empty file or no file at all")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _run(content, allowed, what, label)
    except OSError as error:
        raise InputError(f"{label}: cannot be opened ({error.strerror or error})") from None


def plain_sequence(
    data: bytes, count: int, allowed: Collection[str], *, what: str = "pickle", label: str = "pickle"
) -> tuple[list[Any], bytes]:
    """What ``count`` pickles say that follow one another, and the bytes behind them; see `read_plain`."""
    content = _Bytes(data)
    found = [_run(content, allowed, what, label) for _ in range(count)]
    return found, data[content.tell() :]


class _Bytes:
    """Bytes as the file that `pickletools.genops` wants; unlike a file's, its reads end where they end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        self._at += len(found)
        return found

    def readline(self) -> bytes:
        end = self._data.find(b"\n", self._at)
        return self.read((len(self._data) if end < 0 else end + 1) - self._at)

    def tell(self) -> int:
        return self._at


def _run(content: Any, allowed: Collection[str], what: str, label: str) -> Any:
    machine = _Machine(frozenset(allowed), what, label)
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except InputError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{label}: not a readable {what} ({reason})") from None
    raise InputError(f"{label}: not a readable {what} (it has no end)")


_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_MARK = object()


class _Machine:
    """The stack of a pickle's program, one instruction at a time."""

    def __init__(self, allowed: frozenset[str], what: str, label: str) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.allowed, self.what, self.label = allowed, what, label
        self.packages = tuple(name[:-1] for name in allowed if name.endswith(".*"))

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        else:
            act = getattr(self, f"_{name.lower()}", None)
            if act is None:
                raise InputError(
                    f"{self.label}: expected a {self.what}, got a pickle with the instruction {name}, which "
                    "none has"
                )
            act(argument)

    def _marked(self) -> list[Any]:
        """What lies above the last mark, taken off with it."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    # -- the stack and the memo ------------------------------------------------------------------------------

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binget = _long_binget = _get

    # -- containers ------------------------------------------------------------------------------------------

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._marked()))

    def _tuple_of(self, count: int) -> None:
        found = tuple(self.stack[-count:])
        if len(found) < count:
            raise ValueError("the stack is empty")
        self.stack[-count:] = [found]

    def _tuple1(self, _: Any) -> None:
        self._tuple_of(1)

    def _tuple2(self, _: Any) -> None:
        self._tuple_of(2)

    def _tuple3(self, _: Any) -> None:
        self._tuple_of(3)

    def _list(self, _: Any) -> None:
        self.stack.append(self._marked())

    def _dict(self, _: Any) -> None:
        found = self._marked()
        self.stack.append(dict(zip(map(_key, found[::2]), found[1::2], strict=True)))

    def _frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(map(_key, self._marked())))

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        goal = self.stack[-1]
        (goal.items if isinstance(goal, Record) else _as(goal, list)).extend(items)

    def _additems(self, _: Any) -> None:
        items = self._marked()
        goal = self.stack[-1]
        goal.items.extend(items) if isinstance(goal, Record) else _as(goal, set).update(map(_key, items))

    def _setitem(self, _: Any) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set([(key, value)])

    def _setitems(self, _: Any) -> None:
        found = self._marked()
        self._set(list(zip(found[::2], found[1::2], strict=True)))

    def _set(self, pairs: list[tuple[Any, Any]]) -> None:
        goal = self.stack[-1]
        if isinstance(goal, Record):
            goal.pairs.extend(pairs)
        else:
            _as(goal, dict).update((_key(key), value) for key, value in pairs)

    # -- names, and what would be called ---------------------------------------------------------------------

    def _refer(self, name: str) -> None:
        if name not in self.allowed and not name.startswith(self.packages):
            raise InputError(
                f"{self.label}: expected a {self.what}, got a pickle that refers to {name!r:.120}, which no "
                f"{self.what} does; refused (nothing of it was run)"
            )
        self.stack.append(Global(name))

    def _global(self, name: str) -> None:
        self._refer(name.replace(" ", ".", 1))

    def _stack_global(self, _: Any) -> None:
        attribute = _as(self.stack.pop(), str)
        self._refer(f"{_as(self.stack.pop(), str)}.{attribute}")

    def _reduce(self, _: Any) -> None:
        args = _as(self.stack.pop(), tuple)
        name = _as(self.stack.pop(), Global).name
        if name == "_codecs.encode" and args[1:] == ("latin1",):  # how bytes are written up to protocol 2
            self.stack.append(_as(args[0], str).encode("latin1"))
        else:
            self.stack.append(Record(name, args))

    _newobj = _reduce

    def _binpersid(self, _: Any) -> None:
        if PERSISTENT not in self.allowed:
            raise ValueError("it refers to things outside")
        self.stack.append(Record(PERSISTENT, (self.stack.pop(),)))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        _as(self.stack[-1], Record).state = state


def _key(value: Any) -> Any:
    """A key of a dictionary; nested ones are refused, because hashing them recurses as deep as they are."""
    if value is not None and not isinstance(value, (str, int, float, bytes, Global)):
        raise ValueError(f"expected a plain key, got a {type(value).__name__}")
    return value


def _as(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected a {kind.__name__}, got a {type(value).__name__}")
    return value
