"""Runs a function in a fork, and kills it at its nth change of the file system, as the kernel sees them.

ptrace stops the fork, its threads and its children at every system call that a seccomp filter names: what Python, Rust
and C++ write is seen alike. A write is two changes: none of its bytes are written when the first is killed, half of
them when the second is. x86-64 Linux.
"""

import ctypes
import os
import platform
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Place = tuple[int | None, int]
"""Which arguments of a call are a folder's descriptor, if any, and a path."""
_OPENS: dict[int, tuple[str, Place, int | None]] = {
    2: ("open", (None, 0), 1), 257: ("openat", (0, 1), 2), 85: ("creat", (None, 0), None),
}  # fmt: skip
_PATHS: dict[int, tuple[str, tuple[Place, ...]]] = {
    82: ("rename", ((None, 0), (None, 1))), 264: ("renameat", ((0, 1), (2, 3))),
    316: ("renameat2", ((0, 1), (2, 3))), 83: ("mkdir", ((None, 0),)), 258: ("mkdirat", ((0, 1),)),
    84: ("rmdir", ((None, 0),)), 87: ("unlink", ((None, 0),)), 263: ("unlinkat", ((0, 1),)),
    86: ("link", ((None, 0), (None, 1))), 265: ("linkat", ((0, 1), (2, 3))), 88: ("symlink", ((None, 1),)),
    266: ("symlinkat", ((1, 2),)), 76: ("truncate", ((None, 0),)), 90: ("chmod", ((None, 0),)),
    268: ("fchmodat", ((0, 1),)),
}  # fmt: skip
_FILES = {1: ("write", 0), 18: ("pwrite64", 0), 20: ("writev", 0), 77: ("ftruncate", 0), 91: ("fchmod", 0),
          40: ("sendfile", 0), 326: ("copy_file_range", 2), 285: ("fallocate", 0)}  # fmt: skip
_HALVED = (1, 18)
_CREATES = os.O_CREAT | os.O_TRUNC
_ARGUMENTS = (14, 13, 12, 7, 9, 8)
"""Where rdi, rsi, rdx, r10, r8 and r9 are in the registers that ptrace hands out; 15 is the number of the call."""
_TRACEME, _CONT, _GETREGS, _SETREGS, _SYSCALL, _SETOPTIONS = 0, 7, 12, 13, 24, 0x4200
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000
"""Mark stops of calls; follow forks, threads and programs; stop where seccomp says; end with the tracer."""
_SECCOMP_EVENT, _WALL, _CALL_STOP = 7, 0x40000000, signal.SIGTRAP | 0x80
_PATIENCE_S = 300


class Ended(NamedTuple):
    """code: exit code, or minus the signal. changes: how many there were. last: the one where it was killed."""

    code: int
    changes: int
    last: str


def obstacle() -> str:
    """Why nothing can be traced here; empty where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "system calls are named for x86-64 Linux alone"
    child = os.fork()
    if not child:
        os._exit(_ptrace(_TRACEME, 0, 0, 0) != 0)
    return "ptrace is not allowed here" if os.waitpid(child, 0)[1] else ""


def forked(function: Callable[[], int], *, log: Path) -> int:
    """Run a function in a fork to its end; its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(begun(function, log=log), 0)[1])


def begun(function: Callable[[], int], *, log: Path) -> int:
    """A fork that runs a function; its process id."""
    child = os.fork()
    if not child:
        _run(function, log)
    return child


def traced(function: Callable[[], int], *, under: Path, log: Path, kill_at: int = 0) -> Ended:
    """The same, killed at its nth change of what lies under a folder; logs in it do not count.

    under: absolute, without links. kill_at: from 1; 0 kills nothing and counts.
    """
    child = os.fork()
    if not child:
        _ptrace(_TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        _filter()
        _run(function, log)
    os.waitpid(child, 0)
    _ptrace(_SETOPTIONS, child, 0, _OPTIONS)
    _ptrace(_CONT, child, 0, 0)
    return _Tracer(child, os.fsencode(under), kill_at).watch()


def _run(function: Callable[[], int], log: Path) -> None:
    """In a fork: what it says goes to a file, and nothing of the caller's is run at its end."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.alarm(_PATIENCE_S)
        code = function()
    finally:
        if code:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Tracer:
    """Counts the changes of a traced process and of those that it starts."""

    def __init__(self, child: int, under: bytes, kill_at: int) -> None:
        self._child, self._under, self._kill_at = child, under, kill_at
        self._changes, self._last, self._known = 0, "", {child}
        self._halved = 0
        """The thread that is in the middle of a write of which only half is done."""

    def watch(self) -> Ended:
        """To the end of the first process; others are ended with it."""
        while True:
            pid, status = os.waitpid(-1, _WALL)
            if not os.WIFSTOPPED(status):
                self._known.discard(pid)
                if pid == self._child:
                    for other in self._known:
                        _kill(other)
                    return Ended(os.waitstatus_to_exitcode(status), self._changes, self._last)
                continue
            number, event = os.WSTOPSIG(status), status >> 16
            is_new, _ = pid not in self._known, self._known.add(pid)
            if number == _CALL_STOP and pid == self._halved:
                self._end(pid)
            elif event == _SECCOMP_EVENT:
                self._at_call(pid)
            else:
                quiet = event or number in (_CALL_STOP, signal.SIGTRAP) or (is_new and number == signal.SIGSTOP)
                _ptrace(_CONT, pid, 0, 0 if quiet else number)

    def _at_call(self, pid: int) -> None:
        registers = (ctypes.c_ulonglong * 27)()
        _LIBC.ptrace(_GETREGS, pid, 0, ctypes.addressof(registers))
        said = _change(pid, registers, self._under)
        if said:
            halves = registers[15] in _HALVED and registers[12] > 1
            self._changes += 1
            if self._changes == self._kill_at:
                self._last = f"before {said}"
                self._end(pid)
                return
            self._changes += halves
            if halves and self._changes == self._kill_at:
                registers[12] //= 2
                _LIBC.ptrace(_SETREGS, pid, 0, ctypes.addressof(registers))
                self._last, self._halved = f"half of {said}", pid
                _ptrace(_SYSCALL, pid, 0, 0)
                return
        _ptrace(_CONT, pid, 0, 0)

    def _end(self, pid: int) -> None:
        """The whole command at once, as an operator or the kernel ends it."""
        for known in (self._child, *self._known):
            _kill(known)


def _change(pid: int, registers: "ctypes.Array[ctypes.c_ulonglong]", under: bytes) -> str:
    """'rename a b' of a call that changes what is under a folder; empty for another."""
    number, arguments = registers[15], [registers[place] for place in _ARGUMENTS]
    if number in _OPENS:
        name, place, flags = _OPENS[number]
        paths = [_path(pid, arguments, place)] if flags is None or arguments[flags] & _CREATES else []
    elif number in _PATHS:
        name, places = _PATHS[number]
        paths = [_path(pid, arguments, place) for place in places]
    else:
        name, file = _FILES[number]
        paths = [_descriptor(pid, arguments[file])]
    ours = [path for path in paths if path.startswith(under + b"/") and b"/logs/" not in path]
    return " ".join([name, *(os.fsdecode(path[len(under) + 1 :]) for path in ours)]) if ours else ""


def _path(pid: int, arguments: list[int], place: Place) -> bytes:
    folder, text = place
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(arguments[text])
        path = _string(memory.read, arguments[text])
    if path.startswith(b"/"):
        return path
    number = -1 if folder is None else ctypes.c_int(arguments[folder]).value
    parent = _link(f"/proc/{pid}/cwd") if number < 0 else _descriptor(pid, number)
    return os.path.normpath(parent + b"/" + path)


def _string(read: Callable[[int], bytes], start: int) -> bytes:
    """Up to the NUL; page by page, for the next page may not be there."""
    found = b""
    while b"\0" not in found and len(found) < 8192:
        found += read(4096 - (start + len(found)) % 4096)
    return found.partition(b"\0")[0]


def _descriptor(pid: int, number: int) -> bytes:
    return _link(f"/proc/{pid}/fd/{number}")


def _link(path: str) -> bytes:
    return os.fsencode(os.readlink(path)) if os.path.lexists(path) else b""


def _filter() -> None:
    """From now on, stop for the tracer at the calls above and at no other. (linux/filter.h, linux/seccomp.h)"""
    numbers = [*_OPENS, *_PATHS, *_FILES]
    program = struct.pack("HBBI", 0x20, 0, 0, 0)
    for place, number in enumerate(numbers):
        program += struct.pack("HBBI", 0x15, len(numbers) - place, 0, number)
    program += struct.pack("HBBI", 6, 0, 0, 0x7FFF0000) + struct.pack("HBBI", 6, 0, 0, 0x7FF00000)
    content = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(content))
    _LIBC.prctl(38, 1, 0, 0, 0)
    if _LIBC.prctl(22, 2, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def _kill(pid: int) -> None:
    if os.path.exists(f"/proc/{pid}"):
        os.kill(pid, signal.SIGKILL)


def _ptrace(request: int, pid: int, address: int, data: int) -> int:
    return int(_LIBC.ptrace(request, pid, address, data))


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long
