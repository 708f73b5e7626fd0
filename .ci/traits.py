"""Gives this Python the traits of other systems, as far as msmtpd meets them: nothing here runs on those systems.

    python3 .ci/traits.py freebsd msmtpd.py ARGUMENT...                       starts the program with them
    PYTHONPATH=.ci MSMTPD_TRAITS=freebsd python3 -m pytest -p traits ...      the same for tests in process

TRAITS are single ones, SYSTEMS those of one system; several are joined by commas.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import errno
import functools
import os
import select
import stat
import sys
from typing import Any, Callable

SYSTEMS = {
    "freebsd": "notmpfile nomore noquickack nosetsid devfd3 pipebuf512 noidentity",
    "openbsd": "notmpfile nomore noquickack nosetsid devfd63 pipebuf512 noidentity noacceptconn spawn127",
    "netbsd": "notmpfile nomore noquickack nosetsid devfd63 pipebuf512 noidentity fdset256",
    "dragonfly": "notmpfile nomore noquickack nosetsid devfd3 pipebuf512 noidentity signal32",
    "macos": "notmpfile nomore noquickack pipebuf512 noidentity noacceptconn",
    "pypy": "nospawn",
}


def without(module: Any, *names: str) -> Callable[[], None]:
    def trait() -> None:
        for name in names:
            delattr(module, name)

    return trait


def no_tmpfile() -> None:
    del os.O_TMPFILE
    if "tempfile" in sys.modules:  # pytest's, which has looked for it already
        vars(sys.modules["tempfile"])["_O_TMPFILE_WORKS"] = False


def no_accept_conn() -> None:
    class Socket(_socket.socket):
        __slots__ = ()

        def getsockopt(self, level: int, option: int, *more: int) -> Any:
            if (level, option) == (_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN):
                raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
            return super().getsockopt(level, option, *more)

    _socket.socket = Socket  # type: ignore[misc]


def listed(descriptors: int) -> Callable[[], None]:
    def trait(real: Callable[..., list[str]] = os.listdir) -> None:
        def listdir(path: str = ".") -> list[str]:
            if path != "/dev/fd":
                return real(path)
            if not descriptors:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return [str(number) for number in range(descriptors)]

        os.listdir = listdir  # type: ignore[assignment]

    return trait


def no_identity(real: Callable[..., os.stat_result] = os.fstat) -> None:
    def fstat(fd: int) -> os.stat_result:
        result = real(fd)
        if stat.S_ISSOCK(result.st_mode) or stat.S_ISFIFO(result.st_mode):
            result = os.stat_result((result.st_mode, 0, 0, *result[3:]))
        return result

    os.fstat = fstat


SPAWNS = ("posix_spawn", "posix_spawnp")


def spawn(change: Callable[..., int]) -> Callable[[], None]:
    """A trait of posix_spawn: `change` gets the real one and what it is called with."""

    def trait() -> None:
        for name in SPAWNS:
            setattr(os, name, functools.partial(change, getattr(os, name)))

    return trait


def no_setsid(real: Callable[..., int], *arguments: Any, setsid: bool = False, **options: Any) -> int:
    if setsid:
        raise NotImplementedError("posix_spawn: setsid unavailable on this platform")
    return real(*arguments, **options)


def exec_failure_is_exit_127(real: Callable[..., int], *arguments: Any, setsid: bool = False, **options: Any) -> int:
    if setsid:
        return no_setsid(real, setsid=True)  # OpenBSD, the one system that is so, has none
    try:
        return real(*arguments, **options)
    except OSError:
        return real("/bin/sh", ["sh", "-c", "exit 127"], *arguments[2:], **options)


def no_signal_32(real: Callable[..., int], *arguments: Any, setsigdef: Any = (), **options: Any) -> int:
    if 32 in setsigdef:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real(*arguments, setsigdef=setsigdef, **options)


def signal_32(real: Callable[[], Any] = _signal.valid_signals) -> None:
    _signal.valid_signals = lambda: {*real(), 32}
    spawn(no_signal_32)()


def no_hashlib() -> None:
    sys.modules["_hashlib"] = None  # type: ignore[assignment]
    import hashlib

    vars(hashlib).pop("pbkdf2_hmac", None)


def fd_set_256(real: Callable[..., Any] = select.select) -> None:
    def limited(readers: Any, writers: Any, others: Any, timeout: float | None = None) -> Any:
        if any(isinstance(one, int) and one >= 256 for one in (*readers, *writers, *others)):
            raise ValueError("filedescriptor out of range in select()")
        return real(readers, writers, others, timeout)

    select.select = limited


TRAITS: dict[str, Callable[[], None]] = {
    "notmpfile": no_tmpfile,
    "nomore": without(_socket, "MSG_MORE"),
    "noquickack": without(_socket, "TCP_QUICKACK"),
    "pipebuf512": lambda: setattr(select, "PIPE_BUF", 512),
    "nosetsid": spawn(no_setsid),  # posix_spawn cannot make a session
    "spawn127": spawn(exec_failure_is_exit_127),
    "signal32": signal_32,  # one that is valid, but cannot be reset
    "nospawn": without(os, *SPAWNS),
    "noacceptconn": no_accept_conn,  # SO_ACCEPTCONN cannot be asked for
    "noidentity": no_identity,  # of pipes and sockets by fstat(2)
    "devfd3": listed(3),  # what /dev/fd lists, whatever is open
    "devfd63": listed(64),
    "nodevfd": listed(0),
    "fdset256": fd_set_256,  # select(2) takes descriptors below 256
    "nohashlib": no_hashlib,  # a Python without OpenSSL
}


def apply(names: str) -> None:
    for name in names.split(","):
        for trait in SYSTEMS.get(name, name).split():
            TRAITS[trait]()


if __name__ == "__main__":
    import runpy

    apply(sys.argv[1])
    sys.argv[:2] = []
    runpy.run_path(sys.argv[0], run_name="__main__")
elif "MSMTPD_TRAITS" in os.environ:
    apply(os.environ["MSMTPD_TRAITS"])
