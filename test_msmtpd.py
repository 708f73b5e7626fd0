"""Tests of msmtpd, in the order of its sections, then as a user starts it.

The protocol core is tested without sockets.  Dialogues are written as
dialogues: `C:` is a line from the client (ended by CRLF), `C|` are octets as
they stand (with Python's escapes), `C.` is the end of its input, `S:` is a
reply line (a trailing `...` stands for any text) and may stand behind `->` on
the line of its command, `D:` is a delivery with its envelope and, behind `|`,
its content, `X:` the end of the session.  Lines that begin with `+` are left
out where the server wants no login, what stands in «» is sent in base64, and
what many say has a name in TURNS.
Each is fed line by line with every reply checked at its place, then whole,
byte by byte and split at every place.

What a user starts is started as a process.  Nothing here needs more than
Python and a POSIX system; the programs that msmtpd works with are in
.ci/test_components.py, and .ci/run installs them and runs both.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import itertools
import os
import pty
import random
import re
import resource
import select
import shlex
import signal
import socket
import subprocess
import sys
import termios
import textwrap
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

import msmtpd

PROGRAM = Path(msmtpd.__file__).resolve()
# How the program is started; .ci/run does so with the installed one, too.
RUN = shlex.split(os.environ.get("MSMTPD_RUN", "")) or [sys.executable, "-I", "-S", str(PROGRAM)]


# ---- Helpers ---------------------------------------------------------------


def wait_until(condition: Callable[[], Any]) -> Any:
    """Wait for what announces itself by no event, in another process; return the first true value."""
    end = time.monotonic() + 15
    while not (value := condition()):
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.005)
    return value


def proc(of: object = "self") -> Path:
    """Return where Linux tells of a process; elsewhere the test is skipped."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("what this test looks at is told by Linux only")
    return Path(f"/proc/{of}")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def cells(text: str) -> list[str]:
    """Split a table whose cells have three blanks or a line end between them."""
    return [cell.replace(r"\n", "\n") for cell in re.split(r"\s{3,}", text.strip())]


def spooled(spool: msmtpd.Spool) -> bytes:
    with os.fdopen(spool.open(), "rb") as file:
        content = file.read()
    spool.close()
    return content


class Peer:
    """A Session with a client's and a command's part played by the test."""

    def __init__(self, policy: msmtpd.Policy | None = None, outcome: bytes = msmtpd.DELIVERED) -> None:
        self.events: list[str] = []
        self.mails: list[msmtpd.Deliver] = []
        self.notes: list[str] = []
        self.pauses: list[bool] = []
        self.protocols: list[tuple[bytes, str]] = []
        self.closed: bool | None = None
        self.outcome = outcome
        self.session = msmtpd.Session(policy or msmtpd.Policy(), self._open_spool)

    def _open_spool(self, name: bytes, protocol: str) -> msmtpd.Spool:
        self.protocols.append((name, protocol))
        return msmtpd.Spool()

    def feed(self, data: bytes) -> None:
        """Take input, b"" for its end."""
        self.session.receive(data)
        while actions := self.session.step():
            for action in actions:
                self._perform(action)

    def _perform(self, action: Any) -> None:
        if isinstance(action, bytes):
            assert action.endswith(b"\r\n") and max(map(len, action.splitlines(True))) <= 512
            self.events += ["S: " + line.decode() for line in action.splitlines()]
        elif isinstance(action, msmtpd.Deliver):
            self.mails.append(action)
            paths = " ".join(f"<{path.decode()}>" for path in (action.envelope.sender, *action.envelope.recipients))
            content = spooled(action.spool).decode("latin-1").encode("unicode_escape").decode()
            self.events.append(f"D: {paths} | {content}".rstrip(" "))
            for reply in self.session.conclude(self.outcome[:1] == b"2", self.outcome):
                self._perform(reply)
        elif isinstance(action, msmtpd.AuthResult):
            self.pauses.append(action.failed)
            for held_back in action.then:
                self._perform(held_back)
        elif isinstance(action, msmtpd.Note):
            self.notes.append(action.text)
        else:
            self.closed = action.orderly
            self.events.append("X:")


JOE = "AUTH PLAIN AGpvZQBzZWNyZXQ="
AUTH_POLICY = msmtpd.Policy(credentials=msmtpd.Credentials("joe", b"secret"))

TURNS = {
    "HELO": "C: HELO x -> 250 localhost",
    "EHLO": "C: EHLO x\nOFFERS",
    "OFFERS": """
        S: 250-localhost
        S: 250-PIPELINING
        S: 250-SIZE 104857600
        S: 250-8BITMIME
        S: 250-SMTPUTF8
        +S: 250-AUTH PLAIN LOGIN CRAM-MD5 SCRAM-SHA-256
        S: 250 ENHANCEDSTATUSCODES
        """,
    "LOGIN": f"+C: {JOE} -> 235 2.7.0 Authentication succeeded",
    "MAIL": "C: MAIL FROM:<a@b> -> 250 2.1.0 Ok",
    "RCPT": "C: RCPT TO:<c@d> -> 250 2.1.5 Ok",
    "DATA": "C: DATA -> 354 Send data",
    "PIPED": "S: 250 2.0.0 Ok, mail was piped",
    "NOOP": "C: NOOP -> 250 2.0.0 Ok",
    "RSET": "C: RSET -> 250 2.0.0 Ok",
    "QUIT": "C: QUIT\nBYE",
    "BYE": "S: 221 2.0.0 Bye\nX:",
    "TEXT": "C|Gr\\xc3\\xbc\\xc3\\x9fe\\r\\n..dot\\r\\n\\r\\n.\\r\\n\nSENT",
    "SENT": "D: <a@b> <c@d> | Gr\\xc3\\xbc\\xc3\\x9fe\\n.dot\\n\\n\nPIPED",
    "EMPTY": "C: .\nD: <a@b> <c@d> |\nPIPED",
}


def client_octets(line: str) -> bytes:
    if line[:2] == "C:":
        return line[3:].encode() + b"\r\n"
    return line[2:].encode().decode("unicode_escape").encode("latin-1")


def script(text: str, login: bool = False) -> list[str]:
    """Spell a dialogue out, for a server that wants a login or does not."""
    lines: list[str] = []
    for line in textwrap.dedent(text).strip("\n").splitlines():
        if line and TURNS.keys() >= {*line.split()}:
            for turn in line.split():
                lines += script(TURNS[turn], login)
        elif line[:1] != "+" or login:
            line = re.sub("«(.*?)»", lambda match: b64(match[1].encode()), line.lstrip("+"))
            said, arrow, reply = line.partition(" -> ")
            lines += [said, f"S: {reply}"] if arrow else [said]
    return lines


def matches(expected: list[str], events: list[str]) -> bool:
    """Compare; `...` at the end of an expected line stands for anything."""
    pairs = list(itertools.zip_longest(expected, events, fillvalue=""))
    return all(e == a or (e.endswith("...") and a.startswith(e[:-3])) for e, a in pairs)


def play(text: str, policy: msmtpd.Policy | None = None, outcome: bytes = msmtpd.DELIVERED) -> Peer:
    """Play a dialogue line by line, then in all other pieces; return the first peer."""
    lines = script(text, policy is not None and policy.credentials is not None)
    peer = Peer(policy, outcome)
    expected: list[str] = []
    for line in lines:
        if line[:1] != "C":
            expected.append(line)
            continue
        assert matches(expected, peer.events), f"before {line!r}: {peer.events} is not {expected}"
        peer.feed(client_octets(line))
    assert matches(expected, peer.events), f"{peer.events} is not {expected}"

    octets = b"".join(client_octets(line) for line in lines if line[:1] == "C")
    splits = [[octets[:i], octets[i:]] for i in range(1, len(octets))]
    for pieces in [[octets], [octets[i : i + 1] for i in range(len(octets))], *splits]:
        other = Peer(policy, outcome)
        for piece in [*pieces, *[b""] * ("C." in lines)]:
            other.feed(piece)
        assert matches(expected, other.events), f"in pieces: {other.events} is not {expected}"
        assert (other.notes, other.pauses) == (peer.notes, peer.pauses)
    return peer


# ---- Paths -----------------------------------------------------------------

PATHS = {  # the sender that the command gets, or the reply; arguments of MAIL
    "": "FROM:<>",
    "root": 'FROM:root   FROM:<"root">',
    "a@b": """
        FROM:<a@b>   from:<a@b> SIZE=1 AUTH=<>   FROM: <a@b>   FROM:\t<a@b>   FROM:a@b   FROM: a@b SIZE=1
        FROM:<@x,@y:a@b>   FROM:<@x:"a"@b>   FROM:<"a"@b>""",
    "a..b@c": 'FROM:<@x:"a..b"@c>   FROM:<"a..b"@c>',
    "a.@x": 'FROM:"a."@x SIZE=104857600',
    "jörg@x": "FROM:<jörg@x> SMTPUTF8",
    "501 5.5.4": "FROM:   FROM   <a@b>   TO:<a@b>",
    "501 5.1.3": """
        FROM: <   FROM:<a@b   FROM:a@b>   FROM:<a@b>>   FROM:<<a@b>   FROM:<a@b>, <c@d>   FROM:Some Name <a@b>
        FROM:<Some Name <a@b>>   FROM:"Name" <a@b>   FROM:"Some Name" <a@b>   FROM:<"Name" <a@b>>   FROM:<"a>b"@c>""",
    "555 5.5.4": "FROM:<a@b> RET=HDRS   FROM:<a@b> X-Y",
    "552 5.3.4": "FROM:<a@b> SIZE=104857601",
    "553 5.6.7": 'FROM:<jörg@x>   FROM:<"jörg"@y>',
    "553 5.1.3": r"""
        FROM:<@x:>   FROM:<@x>   FROM:<@x:@/etc/hostname>   FROM:<@x:"">   FROM:"a.@x"   FROM:<"a b"@c>   FROM:<"a@b"@c>
        FROM:<"@x:a"@c>   FROM:<"$(x)"@c>   FROM:<"a\.b"@c>   FROM:<"-x"@y>   FROM:<"/x"@y>   FROM:<"">   FROM:<""@c>
        FROM:<"root>   FROM:<root">   FROM:<"a"b@c>   FROM:<"a"."b"@c>""",
}


@pytest.mark.parametrize("outcome, argument", [(key, cell) for key, text in PATHS.items() for cell in cells(text)])
def test_a_path_gives_a_sender_or_a_reason(outcome: str, argument: str) -> None:
    mail = f"250 2.1.0 Ok\nRCPT DATA\nC: .\nD: <{outcome}> <c@d> |\nPIPED"
    play(f"HELO\nC: MAIL {argument} -> {outcome + '...' if re.match('5.. ', outcome) else mail}")


GOOD_ADDRESSES = ["a", "root", "a@b", "a@b@c", "a.b.@c.", "o'brien@x", "a+b=c/d@x", "u%v@x", "x!y", "?#*{}~^[]@x"]
GOOD_ADDRESSES += ["a,b:c@x", "a@[127.0.0.1]", "x" * 254, "a..b@x", ".a@x", "a.@x", "..a/b..@x", "+a@x", "a+b", "a/b@x"]
BAD_ADDRESSES = ["", "-a@b", "--", "#a@b", "~root", "x" * 255, "a b@c", "a\tb", "a\0b", "a\rb", "a\x7fb"]
BAD_ADDRESSES += ["$(touch x)@b", "`x`@b", "@", "@b", "b@"]
BAD_ADDRESSES += ["/etc/x@b", "../x@b", "a/../x@b", "a/..", "..", "a@b/../c", "a@b/..", "+a", "a/b", "/"]
BAD_ADDRESSES += ["a;b", "a|b", "a&b", "a<b", "a>b", "a(b", "a)b", 'a"b', "a\\b", "$HOME", '"a b"@c']
UTF8_ADDRESSES = ["jörg@bücher.example", "用户@例子"]
# A blank, a line separator, one that writes from right to left from here, a control, no UTF-8.
BAD_UTF8 = [*map(str.encode, ("a\u00a0b", "a\u2028b", "a\u202eb", "a\x85b")), b"latin-\xe9@x"]


def refusal(address: bytes, utf8: bool = False) -> bytes | None:
    try:
        msmtpd.check_address(address, utf8)
    except msmtpd.Refused as refused:
        return refused.reply
    return None


def test_addresses_pass_or_are_refused() -> None:
    for address in GOOD_ADDRESSES:
        assert refusal(address.encode()) is None, address
    for address, utf8 in itertools.product(BAD_ADDRESSES, (False, True)):
        assert refusal(address.encode(), utf8) == msmtpd.BAD_ADDRESS, address
    for address in UTF8_ADDRESSES:
        assert (refusal(address.encode()), refusal(address.encode(), True)) == (msmtpd.NEEDS_SMTPUTF8, None), address
    for octets in BAD_UTF8:
        assert refusal(octets, True) is not None, octets


def test_every_single_octet_is_allowed_or_refused_as_designed() -> None:
    allowed = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.@_+-/=!#%'*?^{}~,:[]")
    for octet in range(256):
        refused = msmtpd.NEEDS_SMTPUTF8 if octet > 127 else msmtpd.BAD_ADDRESS
        assert refusal(b"a%ca@b" % octet) == (None if octet in allowed else refused), octet


MAIL_PARAMETERS: dict[tuple[int, bool] | str, str] = {  # size and SMTPUTF8, or the code of the refusal
    (0, False): "AUTH=<>   AUTH=e+3Dmc2@example.com",
    (1, False): "SIZE=1   size=1   SIZE=1  BODY=8bitmime",
    (0, True): "BODY=7BIT SMTPUTF8",
    (99999999999999999999, False): "SIZE=99999999999999999999",
    "501": """
        SIZE=999999999999999999999   SIZE=   SIZE   SIZE=x   SIZE=-1   BODY=BINARYMIME   BODY   AUTH=   SMTPUTF8=1""",
    "555": "RET=HDRS   =   X",
}


@pytest.mark.parametrize("expected", MAIL_PARAMETERS)
def test_parameters_of_mail(expected: tuple[int, bool] | str) -> None:
    for text in cells(MAIL_PARAMETERS[expected]):
        try:
            assert msmtpd.mail_parameters(text.encode()) == expected, text
        except msmtpd.Refused as refused:
            assert refused.reply[:3].decode() == expected, text


# ---- Mail data -------------------------------------------------------------


def decode(octets: bytes, line_end: bytes, pieces: Iterable[int] = ()) -> tuple[bytes, bytes] | None:
    """Feed octets, cut at the given places: (content, what follows the end), None without an end."""
    spool = msmtpd.Spool()
    data = msmtpd.MailData(spool, 10**6, line_end)
    cuts = [0, *pieces, len(octets)]
    for begin, end in zip(cuts, cuts[1:]):
        if begin < end:
            left = data.feed(octets[begin:end])
            if left >= 0:
                return spooled(spool), octets[end - left :]
    spool.close()
    return None


MAIL_DATA = {  # by the end of the line that said DATA: octets behind it, what the command gets, what follows the end
    b"\r\n": [
        (b".\r\n", b"", b""),
        (b"a\r\n.\r\n", b"a\n", b""),
        (b"a\r\nb\r\n.\r\nQUIT\r\n", b"a\nb\n", b"QUIT\r\n"),
        (b"..\r\n.\r\n", b".\n", b""),
        (b".x\r\n.\r\n", b"x\n", b""),
        (b"...\r\n..a\r\n.\r\n", b"..\n.a\n", b""),
        (b"\r\n.\r\n", b"\n", b""),
        (b"\r\n\r\n.\r\n", b"\n\n", b""),
        (b"a\nb\r\n.\r\n", b"a\nb\n", b""),
        (b"a\rb\r\n.\r\n", b"a\rb\n", b""),
        (b"a\r\r\n.\r\n", b"a\r\n", b""),
        (b"\0\xff\x80\r\n.\r\n", b"\0\xff\x80\n", b""),
        (b"x" * 5000 + b"\r\n.\r\n", b"x" * 5000 + b"\n", b""),
        (b"a.\r\n.b\r\n.\r\n", b"a.\nb\n", b""),
    ],
    b"\n": [
        (b".\n", b"", b""),
        (b"a\n.\nQUIT\n", b"a\n", b"QUIT\n"),
        (b"..\n.\n", b".\n", b""),
        (b"a\r\n.\r\nQUIT\r\n", b"a\n", b"QUIT\r\n"),
        (b"a\r\n.\n", b"a\n", b""),
        (b"a\n.\r\n", b"a\n", b""),
        (b"a\n.b\n.\n", b"a\nb\n", b""),
    ],
    b"\r\r\n": [
        (b".\r\r\n", b"", b""),
        (b"a\r\r\n..\r\r\n.\r\r\nQUIT\r\r\n", b"a\r\n.\r\n", b"QUIT\r\r\n"),
        (b"a\n.\nb\r\n.\n\r.\r\n.\r\n", b"a\n.\nb\n\n\r.\n", b""),
    ],
}


@pytest.mark.parametrize("eol, octets, content, rest", [(eol, *row) for eol, rows in MAIL_DATA.items() for row in rows])
def test_mail_data_is_decoded_however_it_is_cut(eol: bytes, octets: bytes, content: bytes, rest: bytes) -> None:
    end = len(octets) - len(rest)
    for pieces in [range(1, end), *((place,) for place in range(end))]:
        assert decode(octets, eol, pieces) == (content, rest)


# What has been taken for the end of data by one server and for content by
# another (SMTP smuggling): every sequence of these around a dot, but the one
# real end, and its stuffed variants which no client means.
LINE_ENDS = [b"", b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\n\r", b"\r\r\n", b"\r\n\0", b"\0", b"\r\0\n", b"\0\r\n"]
FAKE_ENDS = [
    b"a" + before + b"." + after + b"b"
    for before, after in itertools.product(LINE_ENDS, LINE_ENDS)
    if not (before.endswith(b"\r\n") and after.startswith(b"\r\n"))
]


@pytest.mark.parametrize("fake", FAKE_ENDS, ids=repr)
def test_only_crlf_dot_crlf_ends_the_data_of_a_crlf_session(fake: bytes) -> None:
    octets = fake + b"\r\nMAIL FROM:<evil@x>\r\n.\r\nNOOP\r\n"
    content = fake.replace(b"\r\n.", b"\r\n").replace(b"\r\n", b"\n") + b"\nMAIL FROM:<evil@x>\n"
    for place in range(len(octets) - 6):
        assert decode(octets[:-6], b"\r\n", (place,)) == (content, b"")
    assert decode(octets, b"\r\n") == (content, b"NOOP\r\n")


def test_a_cut_anywhere_changes_nothing() -> None:
    """Every sequence of up to four of these octets, whole against cut at every place."""
    for line_end, length in itertools.product(msmtpd.ENDS_OF_DATA, range(1, 5)):
        for letters in itertools.product(b"\r\n.x", repeat=length):
            octets = bytes(letters) + b"\r\n.\r\n"
            whole = decode(octets, line_end)
            assert whole is not None
            for place in range(1, len(octets)):
                cut = decode(octets, line_end, (place,))
                assert cut is not None and cut[0] == whole[0]


def test_the_size_limit_is_found_while_reading_and_the_data_are_read_to_their_end() -> None:
    spool = msmtpd.Spool()
    data = msmtpd.MailData(spool, 10, b"\r\n")
    assert data.feed(b"12345678\r\n") == -1 and data.failure is None
    assert data.feed(b"9\r\n.\r\n") == 0
    assert data.failure == msmtpd.MAIL_TOO_BIG
    assert not spool._memory


@pytest.mark.parametrize("eol", [b"\r\n", b"\n"])
def test_a_mail_that_has_passed_too_often_is_a_loop_however_it_is_cut(eol: bytes) -> None:
    """Its header tells; msmtpd may not become short of commands before."""
    field = msmtpd.received_field(b"x", "::1", "::1", "ESMTP", 0).replace(b"\n", eol)
    often, head = field * msmtpd.MAX_HOPS, b"A: b" + eol
    mails = {head + often + field + eol: msmtpd.MAIL_LOOP, often + eol + field: None, eol + often + field: None}
    for mail, failure in mails.items():
        for cut in range(len(mail)):
            data = msmtpd.MailData(msmtpd.Spool(), 10**6, eol)
            assert data.feed(mail[:cut]) == -1 and data.feed(mail[cut:] + b"." + eol) == 0
            assert data.failure == failure
    assert msmtpd.MAX_HOPS < msmtpd.MAX_COMMANDS


def test_a_spool_stays_in_memory_while_it_is_small_and_is_then_an_unlinked_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for size in (0, 1, msmtpd.SPOOL_MEMORY, msmtpd.SPOOL_MEMORY + 1, 300_000):
        spool = msmtpd.Spool()
        content = random.Random(size).getrandbits(8 * size + 1).to_bytes(size + 1, "big")[1:]
        for begin in range(0, size, 7000):
            spool.write(content[begin : begin + 7000])
        assert (spool._file >= 0) == (size > msmtpd.SPOOL_MEMORY)
        assert list(tmp_path.iterdir()) == []
        assert spooled(spool) == content


def test_a_spool_that_is_closed_twice_closes_nobody_elses_file() -> None:
    spool = msmtpd.Spool()
    spool.write(b"x" * (msmtpd.SPOOL_MEMORY + 1))
    spool.close()
    with open(os.devnull) as file:  # has the same descriptor now
        spool.close()
        assert os.fstat(file.fileno())


@pytest.mark.parametrize("known", [True, False])
def test_a_file_has_no_name_from_the_start_where_the_system_knows_how(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if known and hasattr(os, "O_TMPFILE"):
        monkeypatch.setattr(os, "unlink", fail_with(AssertionError("it has a name")))
    else:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY, raising=False)  # EISDIR, as where it is not known
    with os.fdopen(msmtpd.unlinked_file(str(tmp_path)), "wb") as file:
        file.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_spool_finds_a_way_where_pipes_are_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And where a file takes less than it is given."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4096]))
    spool = msmtpd.Spool()
    spool.write(b"x" * 20_000)
    assert spooled(spool) == b"x" * 20_000


def test_a_spool_that_cannot_be_written_fails_the_mail_and_only_the_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    data = msmtpd.MailData(msmtpd.Spool(), 10**6, b"\r\n")
    assert data.feed(b"x" * 40_000) == -1
    assert data.feed(b"x" * 40_000 + b"\r\n.\r\nNOOP\r\n") == 6
    assert data.failure == msmtpd.SPOOL_FAILED
    assert "No such file" in data.trouble


RECEIVED = [
    ((b"x.example", "127.0.0.1", "127.0.0.1", "ESMTP"), "from x.example ([127.0.0.1])", "[127.0.0.1]"),
    ((b"x", "::1", "::1", "SMTP"), "from x ([IPv6:::1])", "[IPv6:::1]"),
    ((b"x", "", "", "ESMTPA"), "from x", "localhost"),
    ((b"[127.0.0.1]", "fe80::1%eth0", "", "SMTP"), "from [127.0.0.1] ([IPv6:fe80::1])", "localhost"),
    ((b"x" * 4000, "", "", "SMTP"), "from " + "x" * 255, "localhost"),
    ((b"a b\r\n\xc3\xa9;(x)", "", "", "SMTP"), "from a?b??????x?", "localhost"),
]


@pytest.mark.parametrize("arguments, source, by", RECEIVED)
def test_received_field(
    arguments: tuple[bytes, str, str, str], source: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    field = msmtpd.received_field(*arguments, 1795338000.0).decode()
    monkeypatch.undo()
    time.tzset()
    assert field == f"Received: {source}\n\tby {by} (msmtpd) with {arguments[3]};\n\tSun, 22 Nov 2026 10:00:00 +0100\n"


# ---- Authentication --------------------------------------------------------


NAME, PASSWORD = "S: 334 «Username:»\n", "S: 334 «Password:»\n"
SCRAM_FIRST = "C: AUTH SCRAM-SHA-256 «n,,n=joe,r=abc»\nS: 334 ...\n"
EXCHANGES = {
    "235 2.7.0": [
        "C: AUTH PLAIN «\0joe\0secret»",
        "C: auth plain «\0joe\0secret»",
        "C: AUTH PLAIN «joe\0joe\0secret»",
        "C: AUTH PLAIN «root\0joe\0secret»",
        "C: AUTH PLAIN -> 334 \nC: «\0joe\0secret»",
        f"C: AUTH LOGIN\n{NAME}C: «joe»\n{PASSWORD}C: «secret»",
        f"C: AUTH LOGIN «joe»\n{PASSWORD}C: «secret»",
        f"C: AUTH LOGIN \n{NAME}C: «joe» \t\n{PASSWORD}C: «secret» ",
    ],
    "535 5.7.8": [
        *[f"C: AUTH PLAIN «{wrong}»" for wrong in ("\0joe\0Secret", "\0jane\0secret", "joe\0\0secret", "\0joe\0")],
        f"C: AUTH LOGIN «joe»\n{PASSWORD}C: «joe»",
        f"C: AUTH LOGIN =\n{PASSWORD}C: «secret»",
        f"C: AUTH LOGIN\n{NAME}C: \n{PASSWORD}C: ",
        f"C: AUTH CRAM-MD5 -> 334 ...\nC: «joe {'0' * 32}»",
        "C: AUTH CRAM-MD5 -> 334 ...\nC: ",
    ],
    "501 5": [
        *cells("C: AUTH   C: AUTH PLAIN a b   C: AUTH CRAM-MD5 AA==   C: AUTH SCRAM-SHA-256 ="),
        *[f"C: AUTH PLAIN {bad}" for bad in ("=", "joe", "«joe»", "AGpv*ZQBzZWNyZXQ=", "«\0\0joe\0secret»")],
        *[f"C: AUTH PLAIN {padding}" for padding in ("AGpvZQBzZWNyZXQ", "AGpvZQBzZWNyZXQ==")],
        *[f"C: AUTH PLAIN -> 334 \nC: {bad}" for bad in "!*"],
        *[f"C: AUTH LOGIN\n{NAME}C: {bad}" for bad in "*="],
        *[f"C: AUTH SCRAM-SHA-256 «n,,{bad}»" for bad in ("n=joe", "m=x,n=joe,r=abc", "n=joe,r=")],
        *[f"C: AUTH SCRAM-SHA-256 «{bad},n=joe,r=abc»" for bad in ("p=tls-unique,", "n,x")],
        *[f"{SCRAM_FIRST}C: {bad}" for bad in ("=", "«c=biws,r=abc,p=AAAA»")],
    ],
}


@pytest.mark.parametrize("code, exchange", [(code, one) for code, all_ in EXCHANGES.items() for one in all_])
def test_an_exchange_succeeds_fails_or_is_malformed(code: str, exchange: str) -> None:
    """A failure is delayed and logged, a malformed exchange is no failure, and both leave another try.

    What the client sends behind either may have been meant for it: nothing of that is logged.
    """
    meant = "C: c2VjcmV0 -> 500 ...\nC: joe -> 500 ...\n"
    behind = f"{meant}C: MAIL FROM:<a@b> -> 530 ...\nLOGIN\n" if code[0] == "5" else ""
    peer = play(f"EHLO\n{exchange}\nS: {code}...\n{behind}C: {JOE} -> 503 5.5.1 Already...", AUTH_POLICY)
    failed, unknown = code[:3] == "535", "refused with 500 5.5.2 Command not recognized: AUTH ..."
    assert peer.pauses == [True] * failed + [False]
    if behind:
        assert re.fullmatch("authentication failed" if failed else "refused with 50[14] .*: AUTH ...", peer.notes[0])
        assert peer.notes[1:3] == [unknown] * 2 and len(peer.notes) == 5


def test_the_third_failure_ends_the_session() -> None:
    wrong = "C: AUTH PLAIN AGEAYQ== ->"
    peer = play(f"EHLO\n{wrong} 535 ...\n{wrong} 535 ...\n{wrong} 421 4.7.0 ...\nX:", AUTH_POLICY)
    assert peer.closed is False
    assert peer.notes == ["authentication failed"] * 3


def test_authentication_belongs_between_ehlo_and_the_mails() -> None:
    play(f"C: {JOE} -> 503 5.5.1 Send EHLO...\nEHLO\nC: AUTH X -> 504...", AUTH_POLICY)
    play(f"EHLO\nC: {JOE} -> 502 5.5.1 ...")
    play(f"EHLO LOGIN RSET MAIL EHLO MAIL\nC: {JOE} -> 503 5.5.1 Already authenticated", AUTH_POLICY)


def test_an_overlong_response_ends_the_exchange() -> None:
    peer = Peer(AUTH_POLICY)
    peer.feed(b"EHLO x\r\nAUTH PLAIN\r\n" + b"A" * 20000 + b"\r\nNOOP\r\n")
    assert peer.events[-2:] == ["S: 500 5.5.2 Line too long", "S: 250 2.0.0 Ok"]
    peer.feed(b"AUTH PLAIN " + b"A" * 12000 + b"\r\n")
    assert peer.events[-1] == "S: 501 5.5.2 Authentication exchange is malformed"


def test_user_and_password_may_be_long_and_no_utf8() -> None:
    password = "pässwörd ∂ ".encode() * 400 + b"\xe9"
    peer = Peer(msmtpd.Policy(credentials=msmtpd.Credentials("j\udcf6rg", password)))
    peer.feed(b"EHLO x\r\nAUTH PLAIN " + b64(b"\0j\xf6rg\0" + password).encode() + b"\r\n")
    assert peer.events[-1] == "S: 235 2.7.0 Authentication succeeded"


def test_a_cram_md5_challenge_has_the_form_of_a_message_id_and_its_digest_is_hexadecimal() -> None:
    exchange = msmtpd.auth_cram_md5(msmtpd.Credentials("tim", b"tanstaaftanstaaf"))
    challenge = next(exchange)
    assert re.fullmatch(rb"<[0-9a-f]{32}\.[0-9]+@localhost>", challenge)
    with pytest.raises(StopIteration) as end:
        exchange.send(b"tim " + hmac.new(b"tanstaaftanstaaf", challenge, "md5").hexdigest().upper().encode())
    assert end.value.value is True


def test_scram_sha_256_holds_the_example_of_rfc_7677(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda size: base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="))
    monkeypatch.setattr(msmtpd, "fresh_nonce", lambda: b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
    exchange = msmtpd.auth_scram_sha_256(msmtpd.Credentials("user", b"pencil"))
    assert next(exchange) == b""
    nonce = b"rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    proof = b"dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    first = exchange.send(b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO")
    assert first == b"r=%s,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096" % nonce
    assert exchange.send(b"c=biws,r=%s,p=%s" % (nonce, proof)) == b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    with pytest.raises(StopIteration) as end:
        exchange.send(b"")
    assert end.value.value is True


@pytest.fixture
def foreseeable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nonces, salts and the time are known, and iterations fast."""
    monkeypatch.setattr(os, "urandom", bytes)
    monkeypatch.setattr(time, "time", lambda: 1.5)
    monkeypatch.setattr(msmtpd, "SCRAM_ITERATIONS", 1)


CHALLENGE = f"r=fyko+d2lbbFgONRv9qkxdawL{'0' * 32},s={b64(bytes(16))},i=1"  # where all is foreseeable


def scram(user: str, password: str, gs2: str = "n,,", challenge: str = CHALLENGE) -> list[str]:
    """Return what is said in an exchange up to the client's proof, written from RFC 5802 for these tests."""
    nonce, salt, iterations = challenge.split(",")
    bare = f"n={user.replace('=', '=3D').replace(',', '=2C')},r=fyko+d2lbbFgONRv9qkxdawL"
    without = f"c={b64(gs2.encode())},{nonce}"
    message = ",".join((bare, challenge, without)).encode()
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(salt[2:]), int(iterations[2:]))
    key = hmac.new(salted, b"Client Key", "sha256").digest()
    signature = hmac.new(hashlib.sha256(key).digest(), message, "sha256").digest()
    return [gs2 + bare, challenge, f"{without},p={b64(bytes(a ^ b for a, b in zip(key, signature)))}"]


SCRAM = [  # user, password, GS2 header, what is changed in the final message, the last response, the reply
    ("a,b=c", "secret", "n,,", ("", ""), "", "235"),
    ("a,b=c", "secret", "y,,", ("", ""), "", "235"),
    ("a,b=c", "secret", "n,a=root,", ("", ""), "", "235"),
    ("a,b=c", "secret", "n,,", ("", ""), "surplus", "501"),
    ("a,b=c", "Secret", "n,,", ("", ""), "", "535"),
    ("jane", "secret", "n,,", ("", ""), "", "535"),
    ("a,b=c", "secret", "n,,", ("r=", "r=x"), "", "501"),
    ("a,b=c", "secret", "n,,", ("c=biws", "c=eSws"), "", "501"),
    ("a,b=c", "secret", "n,,", (",p=", ",q="), "", "501"),
    ("a,b=c", "secret", "n,,", (",p=", ",x=extension,p="), "", "535"),  # which is not in the proof
]


@pytest.mark.parametrize("user, password, gs2, change, last, code", SCRAM)
def test_scram_against_a_client_of_our_own(
    user: str, password: str, gs2: str, change: tuple[str, str], last: str, code: str, foreseeable: None
) -> None:
    first, challenge, proof = scram(user, password, gs2)
    text = f"EHLO\nC: AUTH SCRAM-SHA-256 «{first}»\nS: 334 «{challenge}»\nC: «{proof.replace(*change)}»\n"
    if code == "235" or last:
        text += f"S: 334 ...\nC: «{last}»\n"
    peer = play(f"{text}S: {code}...", msmtpd.Policy(credentials=msmtpd.Credentials("a,b=c", b"secret")))
    # The 334 with our signature tells the client, too.
    assert peer.pauses == {"235": [False, False], "535": [True], "501": [False] * bool(last)}[code]


PREPARED = {  # what RFC 4013 makes of what
    "I\u00adX": "IX",
    "\u2168": "IX",
    "\u00aa": "a",
    "user": "user",
    "e\u0301": "é",
    "\u212b": "å".upper(),
    "a\u00a0b\u1680c": "a b c",
    "\u2764\ufe0f\u200d\u200b\U0001f525": "\u2764\U0001f525",
}


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "CRAM-MD5", "SCRAM-SHA-256"])
@pytest.mark.parametrize("raw", PREPARED)
def test_user_and_password_may_be_written_in_more_ways_than_one(raw: str, mechanism: str, foreseeable: None) -> None:
    """Configured raw or prepared, sent raw or prepared; but a SCRAM client has to prepare the password."""
    prepared, stamp = PREPARED[raw], f"<{'0' * 32}.1@localhost>"
    for ours, user, password in itertools.product((raw, prepared), (raw, prepared), (raw, prepared, raw + "x")):
        steps = {
            "PLAIN": ["", f"\0{user}\0{password}"],
            "LOGIN": ["Username:", user, "Password:", password],
            "CRAM-MD5": [stamp, f"{user} {hmac.new(password.encode(), stamp.encode(), 'md5').hexdigest()}"],
            "SCRAM-SHA-256": ["", *scram(user, PREPARED.get(password, password))],
        }[mechanism]
        exchange = "".join(f"S: 334 «{ask}»\nC: «{answer}»\n" for ask, answer in zip(steps[::2], steps[1::2]))
        wrong = password == raw + "x" or (mechanism == "CRAM-MD5" and password == raw and ours != raw)
        end = "S: 535 ..." if wrong else "S: 334 ...\nC: \n" * (mechanism[0] == "S") + "S: 235 ..."
        policy = msmtpd.Policy(credentials=msmtpd.Credentials(ours, ours.encode()))
        play(f"EHLO\nC: AUTH {mechanism}\n{exchange}{end}", policy)


def test_nobody_gets_in_with_an_empty_password() -> None:
    policy = msmtpd.Policy(credentials=msmtpd.Credentials("joe", "\u00ad".encode()))
    for password, code in (("", "535"), ("\u200d", "535"), ("\u00ad", "235")):
        play(f"EHLO\nC: AUTH PLAIN «\0joe\0{password}» -> {code}...", policy)


def test_scram_is_not_offered_by_a_python_without_openssl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hashlib, "pbkdf2_hmac")
    policy = msmtpd.Policy(credentials=msmtpd.Credentials("joe", b"secret"))
    offers = "S: 250...\n" * 5 + "S: 250-AUTH PLAIN LOGIN CRAM-MD5\nS: 250...\n"
    play(f"C: EHLO x\n{offers}C: AUTH SCRAM-SHA-256\nS: 504...\nC: {JOE}\nS: 235...", policy)


def test_user_and_password_are_always_both_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def equal(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", equal)
    assert not msmtpd.Credentials("joe", b"secret").match(b"jane", b"wrong", b"secret")
    assert compared == [(b"jane", b"joe"), (b"wrong", b"secret")]


def test_the_throttle_delays_every_outcome_for_a_minute_after_a_failure() -> None:
    outcomes = [(100.0, False), (100.0, True), (100.1, False), (159.0, True), (218.9, False), (219.1, False)]
    throttle = msmtpd.Throttle()
    assert [throttle.delay(now, failed) for now, failed in outcomes] == [0, 0, 1, 1, 1, 0]
    assert msmtpd.Throttle(always=True).delay(0.0, failed=False) == 1


# ---- Session ---------------------------------------------------------------

START = b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n"
DIALOGUES = {
    "a mail": """
        EHLO MAIL RCPT
        C: RCPT TO:<e@f> -> 250 2.1.5 Ok
        DATA
        C: Subject: x
        C:
        C: ..dot
        C: .
        D: <a@b> <c@d> <e@f> | Subject: x\\n\\n.dot\\n
        PIPED QUIT
        """,
    "several mails, with everything in between": """
        C: helo x -> 250 localhost
        C: mail from:<> -> 250 2.1.0 Ok
        C: rcpt to:<root> -> 250 2.1.5 Ok
        C: data -> 354 Send data
        C: .
        D: <> <root> |
        PIPED RSET NOOP EHLO
        C|MAIL FROM: a@b SIZE=100 BODY=8BITMIME   \\r\\n -> 250 2.1.0 Ok
        C: RCPT TO: <c@d> -> 250 2.1.5 Ok
        DATA
        C|x\\xe9\\0\\r\\n.\\r\\n
        D: <a@b> <c@d> | x\\xe9\\x00\\n
        PIPED
        """,
    "every mistake in the order of commands": """
        C: MAIL FROM:<a@b> -> 503 5.5.1 Send EHLO first
        C: RCPT TO:<a@b> -> 503 5.5.1 Send EHLO first
        C: DATA -> 503 5.5.1 Send EHLO first
        C: EHLO -> 501 Say your name: EHLO name
        HELO
        C: RCPT TO:<a@b> -> 503 5.5.1 Send MAIL first
        C: DATA -> 503 5.5.1 Send MAIL first
        MAIL
        C: MAIL FROM:<a@b> -> 503 5.5.1 Sender is already given
        C: DATA -> 503 5.5.1 Send RCPT first
        C: RCPT TO:<a b> -> 553 5.1.3 ...
        C: DATA -> 554 5.5.1 No valid recipients
        C: RCPT TO:<> -> 553 5.1.3 ...
        C: RCPT TO:<-x@y> -> 553 5.1.3 ...
        C: RCPT TO:<good@x> NOTIFY=NEVER -> 555 5.5.4 ...
        RCPT
        C: DATA now -> 501 5.5.4 No argument allowed
        DATA EMPTY
        C: DATA -> 503 5.5.1 Send MAIL first
        """,
    "RSET, HELO and EHLO drop the transaction": """
        HELO MAIL RSET
        C: RCPT TO:<c@d> -> 503 5.5.1 Send MAIL first
        MAIL HELO
        C: RCPT TO:<c@d> -> 503 5.5.1 Send MAIL first
        """,
    "what is answered at any time, with arguments, in a transaction too": """
        C: NOOP before EHLO -> 250 2.0.0 Ok
        C: HELP me -> 214 2.0.0 ...
        C: VRFY root -> 252 2.5.0 ...
        C: EXPN list -> 502 5.5.1 Command not implemented
        C: STARTTLS -> 502 5.5.1 Command not implemented
        RSET
        C: -> 500 5.5.2 Command not recognized
        C: BDAT 10 LAST -> 500 5.5.2 Command not recognized
        HELO MAIL
        C: VRFY root -> 252 2.5.0 ...
        C: EHLO -> 501 Say your name: EHLO name
        NOOP RCPT QUIT
        C: NOOP
        """,
    "a person with nc": """
        C|HELO me\\n -> 250 localhost
        C|MAIL FROM:me@x\\n -> 250 2.1.0 Ok
        C|RCPT TO:you@x\\n -> 250 2.1.5 Ok
        C|DATA\\n -> 354 Send data
        C|hello\\n..\\n.\\n
        D: <me@x> <you@x> | hello\\n.\\n
        PIPED
        C|QUIT\\n
        BYE
        """,
    "a program whose CR LF is translated to CR CR LF, or even once more": """
        C|HELO x\\r\\r\\n -> 250 localhost
        C|NOOP\\r\\r\\n -> 250 2.0.0 Ok
        C|\\r\\r\\n -> 500 5.5.2 Command not recognized
        C|MAIL FROM:<a@b>\\r\\r\\n -> 250 2.1.0 Ok
        C|RCPT TO:<c@d>\\r\\r\\n -> 250 2.1.5 Ok
        C|DATA\\r\\r\\r\\n -> 354 Send data
        C|x\\r\\r\\n.\\r\\r\\n
        D: <a@b> <c@d> | x\\r\\n
        PIPED
        MAIL RCPT DATA
        C|x\\r\\r\\n.\\r\\r\\n
        C: .
        D: <a@b> <c@d> | x\\r\\n\\r\\n
        PIPED
        C|QUIT\\r\\r\\n
        BYE
        """,
    "recipients with SMTPUTF8": """
        HELO
        C: MAIL FROM:<jörg@x> SMTPUTF8 -> 250 2.1.0 Ok
        C: RCPT TO:<å@x> -> 250 2.1.5 Ok
        RSET MAIL
        C: RCPT TO:<å@x> -> 553 5.6.7 Address needs SMTPUTF8
        """,
    "blanks": """
        C|HELO\\tx \\t\\r\\n -> 250 localhost
        C|MAIL\\tFROM: <a@b>\\t\\r\\n -> 250 2.1.0 Ok
        C|RCPT  TO: c@d \\r\\n -> 250 2.1.5 Ok
        C|RSET \\t\\r\\n -> 250 2.0.0 Ok
        """,
    "a form that a browser sends in the middle of a session": """
        NOOP
        C: -> 500 5.5.2 Command not recognized
        C: POST / HTTP/1.1
        X:
        C: NOOP
        """,
}

CLIENTS = {  # that have an order of commands of their own, open and with a login
    "JavaMail, with an authzid; it goes on after a refused recipient": """
        EHLO
        +C: AUTH PLAIN «joe\0joe\0secret» -> 235 2.7.0 ...
        MAIL
        C: RCPT TO:<"c d"@e> -> 553 5.1.3 ...
        RSET MAIL RCPT DATA TEXT NOOP QUIT
        """,
    "go-mail": """
        EHLO LOGIN NOOP
        C: MAIL FROM:<a@b> BODY=8BITMIME SMTPUTF8 -> 250 2.1.0 Ok
        RCPT DATA TEXT RSET NOOP MAIL RCPT DATA TEXT RSET QUIT
        """,
    "PHPMailer, with a response of its own and kept alive": """
        EHLO
        +C: AUTH PLAIN -> 334\x20
        +C: «\0joe\0secret» -> 235 2.7.0 ...
        MAIL RCPT DATA TEXT RSET MAIL RCPT DATA TEXT QUIT
        """,
    "qBittorrent": "EHLO HELO LOGIN MAIL RCPT DATA TEXT QUIT",
    "Exim, which pipelines": """
        EHLO LOGIN
        C|MAIL FROM:<a@b> SIZE=1054\\r\\nRCPT TO:<c@d>\\r\\nDATA\\r\\n
        S: 250 2.1.0 Ok
        S: 250 2.1.5 Ok
        S: 354 Send data
        C|Gr\\xc3\\xbc\\xc3\\x9fe\\r\\n..dot\\r\\n\\r\\n.\\r\\nQUIT\\r\\n
        SENT BYE
        """,
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_dialogue(name: str) -> None:
    play(DIALOGUES[name])


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("policy", [None, AUTH_POLICY], ids=["open", "login"])
def test_dialogue_of_a_client(name: str, policy: msmtpd.Policy | None) -> None:
    play(CLIENTS[name], policy)


ENDS = [  # how a session ends, whether it is an orderly end; "C." is the end of input
    ("QUIT", True),
    ("HELO MAIL QUIT", True),
    ("QUIT\nC.", True),
    ("C.\nX:", True),
    ("HELO\nC.\nX:", True),
    ("HELO\nC|NOO\nC.\nX:", True),
    ("EHLO\n+C: AUTH PLAIN -> 334 \nC.\nX:", True),
    ("HELO MAIL\nC.\nX:", False),
    ("HELO MAIL\nC|RCP\nC.\nX:", False),
    ("HELO MAIL RCPT DATA\nC: x\nC.\nX:", False),
    ("HELO MAIL RCPT DATA TEXT\nC.\nX:", True),
]


@pytest.mark.parametrize("text, orderly", ENDS)
def test_the_end_of_input_is_the_end_of_the_session(text: str, orderly: bool) -> None:
    peer = play(text.replace("HELO", "EHLO LOGIN"), AUTH_POLICY)
    assert peer.closed is orderly
    assert peer.notes == ["client left in the middle of a mail"] * (not orderly)


def test_the_end_of_input_waits_for_the_reply_to_a_mail() -> None:
    session = msmtpd.Session(msmtpd.Policy(), lambda name, protocol: msmtpd.Spool())
    session.receive(START + b".\r\nNOOP\r\n")
    actions = [action for _ in range(5) for action in session.step()]
    session.receive(b"")
    assert isinstance(actions[-1], msmtpd.Deliver) and session.step() == []
    assert session.conclude(True, msmtpd.DELIVERED) == [msmtpd.DELIVERED]
    assert session.step() == [msmtpd.OK]
    (end,) = session.step()
    assert isinstance(end, msmtpd.Close) and end.orderly and session.step() == []


def test_protocol_of_the_received_field() -> None:
    mail = b"MAIL FROM:<a@b>%s\r\nRCPT TO:<c@d>\r\nDATA\r\n.\r\n"
    peer = Peer()
    peer.feed(b"HELO one\r\n" + mail % b"" + b"EHLO two\r\n" + mail % b"" + mail % b" SMTPUTF8")
    login = Peer(AUTH_POLICY)
    login.feed(b"EHLO x\r\n" + JOE.encode() + b"\r\n" + mail % b"" + b"HELO x\r\n" + mail % b"" + mail % b" SMTPUTF8")
    assert [p for _, p in peer.protocols] == ["SMTP", "ESMTP", "UTF8SMTP"]
    assert [n for n, _ in peer.protocols] == [b"one", b"two", b"two"]
    assert [p for _, p in login.protocols] == ["ESMTPA", "ESMTPA", "UTF8SMTPA"]


def test_a_mail_over_the_limit_is_refused_behind_its_end_and_the_session_goes_on() -> None:
    again, content = "MAIL RCPT DATA\nC: 0123456789\n", "0123456789\\n012345\\n"
    text = f"HELO\n{again}C: 0123456789\nC: .\nS: 552 5.3.4 Mail is too big\n"
    text += f"{again}C: 012345\nC: .\nD: <a@b> <c@d> | {content}\nPIPED"
    assert play(text, msmtpd.Policy(max_size=20)).notes == [
        "mail from=<a@b> to=<c@d> count=1 size=24 reply=552 result=Mail is over the limit of 20 octets"
    ]


def test_a_refused_mail_ends_its_transaction_only() -> None:
    text = "HELO MAIL RCPT DATA\nC: .\nD: <a@b> <c@d> |\nS: 554 5.3.0 no\nC: RCPT TO:<c@d> -> 503 5.5.1 ...\nMAIL"
    play(text, outcome=b"554 5.3.0 no\r\n")


def test_a_thousand_recipients_and_no_more() -> None:
    peer = Peer()
    peer.feed(b"HELO x\r\nMAIL FROM:<a@b>\r\n" + b"".join(b"RCPT TO:<r%d@x>\r\n" % i for i in range(1030)))
    assert peer.events[-31:] == ["S: 250 2.1.5 Ok"] + ["S: " + msmtpd.TOO_MANY_RECIPIENTS.decode().strip()] * 30
    assert peer.notes == [
        f"refused with 452 {msmtpd.TOO_MANY_RECIPIENTS[4:-2].decode()}: RCPT TO:<r{i}@x>" for i in range(1000, 1020)
    ]
    peer.feed(b"DATA\r\n.\r\n")
    assert len(peer.mails[0].envelope.recipients) == 1000


@pytest.mark.parametrize("length, reply", [(4096, "250"), (4097, "500"), (100_000, "500")])
def test_line_length(length: int, reply: str) -> None:
    line = b"NOOP " + b"x" * (length - 7) + b"\r\n"
    for piece in (len(line), 1000, 4096):
        peer = Peer()
        for begin in range(0, len(line), piece):
            peer.feed(line[begin : begin + piece])
            assert len(peer.session._input) < 4096 + piece + 1
        peer.feed(b"NOOP\r\n")
        assert [event[3:6] for event in peer.events] == [reply, "250"]


def test_the_rest_of_an_overlong_line_may_be_anything() -> None:
    peer = Peer()
    for piece in (b"x" * 5000, b"\x16\x03\xff\0", b"AUTH " + b"y" * 5000, b"GET / HTTP/1.1\r\n", b"NOOP\r\n"):
        peer.feed(piece)
    assert peer.events == ["S: 500 5.5.2 Line too long", "S: 250 2.0.0 Ok"]


def test_twenty_errors_without_a_mail_end_the_session() -> None:
    error, end = "C: FOO -> 500 5.5.2 Command not recognized\n", "S: 421 4.7.0 Too many errors, closing connection\nX:"
    peer = play(f"{error * 19}HELO MAIL RCPT DATA EMPTY\n{error * 20}{end}\nC: NOOP")
    assert peer.closed is False
    assert peer.notes == ["refused with 500 5.5.2 Command not recognized: FOO"] * 39 + ["too many errors"]


def test_twenty_refused_mails_end_the_session_too() -> None:
    peer = Peer(outcome=b"554 5.3.0 no\r\n")
    peer.feed((START + b".\r\n") * 30)
    assert len(peer.mails) == 20 and peer.closed is False


SMUGGLED = r"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nspam\r\n.\r\nQUIT\r\n"
NOT_SMTP = {  # what the log says of clients, and how they begin
    "HTTP": r"""
        GET / HTTP/1.1   POST / HTTP/1.1   PUT / HTTP/1.0   post /   OPTIONS * HTTP/1.1   PROPFIND / HTTP/1.1
        PRI * HTTP/2.0   CONNECT localhost:25 HTTP/1.1   \xef\xbb\xbfGET / HTTP/1.1""",
    "sends header lines": r"Host: localhost   Subject: \x1b[2J",
    "PROXY protocol": "PROXY TCP4 192.0.2.1 192.0.2.2 4711 25",
    "STUN": r"\x00\x01\x00P!\x12\xa4Babc",
    "TLS": r"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03   \x16\x03",
}


@pytest.mark.parametrize("what, line", [(what, line) for what, lines in NOT_SMTP.items() for line in cells(lines)])
@pytest.mark.parametrize("before", ["", "NOOP", "HELO LOGIN MAIL RCPT"])
def test_what_is_not_smtp_is_closed_at_once_without_a_word(before: str, what: str, line: str) -> None:
    peer = play(f"{before}\nC|{line}\\r\\n{SMUGGLED}\nX:", AUTH_POLICY)
    assert peer.notes == [f"client does not speak SMTP but {what}: " + (line if what != "TLS" else r"\x16\x03")]


def test_the_binary_proxy_protocol_is_known_by_its_third_line() -> None:
    text = "C:\nS: 500 5.5.2 ...\nC:\nS: 500 5.5.2 ...\nC|\\0\\r\\nQUIT\\n\\x21\\x11\\0\\x0c\nX:"
    assert play(text).notes[-1] == "client does not speak SMTP but PROXY protocol: \\x00"
    play("C: FOO -> 500 ...\nC: BAR -> 500 ...\nC|\\0\\r\\n\nS: 500 5.5.2 ...\nNOOP")


def test_nothing_of_a_tls_record_is_obeyed_in_an_authentication_either() -> None:
    play(f"EHLO\nC: AUTH LOGIN -> 334 ...\nC|\\x16\\x03\\x01\\r\\n{JOE}\\r\\n\nX:", AUTH_POLICY)


ODD_OCTETS = [" ", *cells(r"\xef\xbb\xbf   \xd6   \0   \x08   \xff\xfd\x18   \x16   \x05\x01\0   \x80.\x01\x03\x01")]


@pytest.mark.parametrize("octets", ODD_OCTETS)
@pytest.mark.parametrize("command", ["", "NOOP", "EHLO x", "MAIL FROM:<x@y>"])
def test_an_odd_octet_spoils_its_line_and_nothing_else(octets: str, command: str) -> None:
    odd = f"C|{octets}{command}\\r\\n\nS: 500 5.5.2 Command not recognized\n"
    peer = play(f"{odd}HELO\n{odd}MAIL\n{odd}RCPT\n{odd}DATA EMPTY\n{odd}")
    assert len(peer.notes) == 5


REFUSED = {  # what a client says after HELO, and what the log has of it
    "FOO\\tbar ": r"500 5.5.2 Command not recognized: FOO\x09bar ",
    r"\x1b[31m\xe9\x5c~": r"500 5.5.2 Command not recognized: \x1b[31m\xe9\x5c~",
    "x" * 600: "500 5.5.2 Command not recognized: " + "x" * 512 + "...",
    r"\x00" * 200: "500 5.5.2 Command not recognized: " + r"\x00" * 128 + "...",
    "NOOP " + "x" * 4096: "500 5.5.2 Line too long: NOOP " + "x" * 507 + "...",
    "STARTTLS": "502 5.5.1 Command not implemented: STARTTLS",
    "mail from:<a b@c>": msmtpd.BAD_ADDRESS.decode().strip() + ": mail from:<a b@c>",
    "MAIL FROM:<a@b> SIZE=999999999 AUTH=<>": "552 5.3.4 Mail is too big: MAIL FROM:<a@b> SIZE=999999999 AUTH=<>",
    "RCPT TO:<c@d>": "503 5.5.1 Send MAIL first: RCPT TO:<c@d>",
    "DATA": "503 5.5.1 Send MAIL first: DATA",
    "AUTH PLAIN c2VjcmV0": "502 5.5.1 Command not implemented: AUTH ...",
    "AUTH X\\r\\nc2VjcmV0": "502 5.5.1 Command not implemented: AUTH ...|500 5.5.2 Command not recognized: AUTH ...",
    "auth login\\r\\nc2VjcmV0:": "502 5.5.1 Command not implemented: AUTH ...|sends header lines: AUTH ...",
    r"\0AUTH PLAIN c2VjcmV0": "500 5.5.2 Command not recognized: AUTH ...",
    " auth plain c2VjcmV0": "500 5.5.2 Command not recognized: AUTH ...",
    "AUTH\\r\\nNOOP\\r\\nFOO": "502 5.5.1 Command not implemented: AUTH ...|500 5.5.2 Command not recognized: FOO",
}


@pytest.mark.parametrize("said", REFUSED, ids=range(len(REFUSED)))
@pytest.mark.parametrize("before", [b"", START + b".\r\n"], ids=["first", "later"])
def test_a_refusal_is_one_log_line_with_the_command_but_nothing_secret(before: bytes, said: str) -> None:
    octets = client_octets(f"C|HELO x\\r\\n{said}\\r\\n")
    for cut in range(0, len(octets), 1 + len(octets) // 200):
        peer = Peer()
        for piece in filter(None, (before, octets[:cut], octets[cut:])):
            peer.feed(piece)
        kinds = ("refused with ", "client does not speak SMTP but ")
        assert "|".join(note.replace(kinds[0], "").replace(kinds[1], "") for note in peer.notes) == REFUSED[said]


def test_addresses_that_the_command_cannot_take_are_refused() -> None:
    text = "HELO\nC: MAIL FROM:<r@x> -> 553 5.1.7 ...\nC: MAIL FROM:<s@x> -> 250 2.1.0 Ok\n"
    text += "C: RCPT TO:<s@x> -> 553 5.1.7 ...\nC: RCPT TO:<r@x> -> 250 2.1.5 Ok"
    play(text, msmtpd.Policy(takes=lambda address, is_sender: (address == b"s@x") == is_sender))


def test_replies_have_the_form_of_the_rfcs() -> None:
    """RFC 5321 4.2, and enhanced codes of the same class where they belong."""
    replies = {name: value for name, value in vars(msmtpd).items() if isinstance(value, bytes) and name[0] != "_"}
    assert len(replies) > 40
    for name, reply in replies.items():
        assert re.fullmatch(rb"[2-5][0-9]{2} [ -~]+\r\n", reply) and len(reply) <= 512
        without = name in ("GREETING", "HELO_OK", "NAME_MISSING", "START_MAIL")
        enhanced = re.match(rb"([245])[0-9]{2} ([245])\.[0-9]\.[0-9]+ ", reply)
        assert without or (enhanced and enhanced[1] == enhanced[2]), name


# Fuzzing: the session against random input made of real pieces

PIECES = [client_octets(line) for text in DIALOGUES.values() for line in script(text) if line[:1] == "C"]
PIECES += [b"\r\n", b"\n", b"\r", b".", b".\r\n", b"\r\n.\r\n", b"\0", b"<", b">", b" ", b"=", b"*\r\n"]
PIECES += [b"x" * 5000] * 3
PIECES += [JOE.encode() + b"\r\n", b"AUTH LOGIN\r\n", b"AUTH CRAM-MD5\r\n", b"AUTH SCRAM-SHA-256\r\n", b"am9l\r\n"]
PIECES += [b"GET / HTTP/1.1\r\n", b"Host: x\r\n", b"DATA\r\n", b"DATA\n", b"QUIT\r\n", b"\xff\xfe", b"MAIL FROM:<>\r\n"]


def random_input(rng: random.Random) -> bytes:
    pieces = rng.choices(PIECES, k=rng.randrange(1, 40))
    if rng.random() < 0.7:
        pieces.insert(rng.randrange(min(3, len(pieces))), START)
    octets = bytearray(b"".join(pieces))
    for _ in range(rng.choice((0, 0, 1, 5))):
        place = rng.randrange(len(octets) + 1)
        octets[place : place + rng.randrange(3)] = bytes(rng.choices(range(256), k=rng.randrange(3)))
    return bytes(octets)


def random_cuts(rng: random.Random, octets: bytes) -> list[bytes]:
    places = sorted(rng.choices(range(len(octets) + 1), k=rng.choice((0, 1, 5, 30))))
    return [octets[begin:end] for begin, end in zip([0, *places], [*places, len(octets)]) if begin < end]


def fuzz_once(rng: random.Random) -> None:
    """One input in two different cuts: the same events, sane replies, bounded memory."""
    policy = rng.choice((msmtpd.Policy(), AUTH_POLICY, msmtpd.Policy(max_size=300)))
    octets = random_input(rng)
    outcomes = []
    for _ in range(2):
        peer = Peer(policy)
        for piece in random_cuts(rng, octets):
            if peer.closed is not None:
                break  # a connection feeds no more then
            peer.feed(piece)
            assert len(peer.session._input) - peer.session._at <= msmtpd.MAX_AUTH_LINE + len(piece)
        replies = [re.sub("^S: 334 .*", "S: 334", event) for event in peer.events]
        assert all(re.match(r"S: [2-5]\d\d[ -]|S: 334|D: |X:$", reply) for reply in replies)
        accepted = sum(event == "S: 250 2.0.0 Ok, mail was piped" for event in replies)
        assert accepted == len(peer.mails) <= sum(event.startswith("S: 354") for event in replies)
        for mail in peer.mails:
            assert mail.envelope.recipients and mail.size <= policy.max_size
        outcomes.append((replies, peer.notes))
    assert outcomes[0] == outcomes[1], octets


def test_fuzz_the_session() -> None:
    """With a fixed seed; MSMTPD_FUZZ_SECONDS makes it go on from another one."""
    rng = random.Random(5321)
    for _ in range(2000):
        fuzz_once(rng)
    seconds = float(os.environ.get("MSMTPD_FUZZ_SECONDS", "0"))
    end, rng = time.monotonic() + seconds, random.Random()
    while time.monotonic() < end:
        fuzz_once(rng)


# ---- Delivery --------------------------------------------------------------

HOSTILE = ["o'brien@x", "a'b'c@x", "*@x", "?", "{a,b}@x", "r~oot@x", "x#@y", "a=b@x", "x!y@z", "[a-z]*@x", "%F@x", "^a"]


class Run:
    """What a command printed, and its exit status."""

    def __init__(
        self, text: str, sender: str = "a@b", recipients: Iterable[str] = ("c@d",), stdin: bytes = b""
    ) -> None:
        command = msmtpd.Command(text, os.environb)
        source, sink = os.pipe()
        os.write(sink, stdin)
        os.close(sink)
        reader, writer = os.pipe()
        pid = command.start(sender.encode(), [r.encode() for r in recipients], source, writer)
        os.close(source)
        os.close(writer)
        with os.fdopen(reader, "rb") as output:
            self.output = output.read().decode()
        self.status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


PRINTF = "/usr/bin/printf"
SHOW = f"{PRINTF} <%s>"  # needs no shell but for its brackets

COMMANDS = [  # command, what it prints for sender a@b and recipients c@d e@f
    (f"{PRINTF} %s, -f %F --", "-f,a@b,--,c@d,e@f,"),
    (f"{PRINTF} %s, --from=%F", "--from=a@b,c@d,e@f,"),
    (f"{PRINTF} %s, %F %F", "a@b,%F,c@d,e@f,"),
    (f"{PRINTF} %s, %F%F", "a@b%F,c@d,e@f,"),
    (f"{PRINTF} %s,", "c@d,e@f,"),
    ("printf %s, -f %F --", "-f,a@b,--,c@d,e@f,"),
    ("  printf   %s,\t%F ", "a@b,c@d,e@f,"),
    ("printf '%s,' %F", "a@b,c@d,e@f,"),
    ("printf '%s,' %F --\n", "a@b,--,c@d,e@f,"),
    ("printf '%s,' \"%F\"", "a@b,c@d,e@f,"),
    ("'printf' '%s,' \"%F\"", "a@b,c@d,e@f,"),
    ("printf '%s,' '%F'", "a@b,c@d,e@f,"),
    ("printf '%s,' x%Fy 'x%Fy'", "xa@by,x%Fy,c@d,e@f,"),
    ("printf '%s,' \"x%Fy\"", "xa@by,c@d,e@f,"),
    ("printf '%s,' \\' %F", "',a@b,c@d,e@f,"),
    ("printf '%s,' %F \\;", "a@b,;,c@d,e@f,"),
    ("printf '%s,' \"'\" %F", "',a@b,c@d,e@f,"),
    ("printf '%s,' \"$MSMTPD_SENDER\" -- ", "a@b,--,c@d,e@f,"),
    ("env printf %s, %F; echo", "a@b,c@d e@f\n"),
    ("exec printf %s, %F", "a@b,c@d,e@f,"),
    ("echo $0 $1; :", "sh c@d\n"),
    ("X=1 printf %s, %F", "a@b,c@d,e@f,"),
    ("sh -c 'printf %%s, %F \"$@\"' sh", "a@b,c@d,e@f,"),
    ('sh -c "printf %%s, %F"', "a@b,"),
    ("for i in 1 2; do echo $i; done; echo", "1\n2\nc@d e@f\n"),
]


@pytest.mark.parametrize("text, expected", COMMANDS)
def test_command_line(text: str, expected: str) -> None:
    assert Run(text.replace("%%", "%"), "a@b", ("c@d", "e@f")).output == expected


def takes(text: str, address: str) -> str:
    command = msmtpd.Command(text, {})
    return "".join("-+"[command.takes(address.encode(), is_sender)] for is_sender in (True, False))


RULES = [  # commands, and whether their sender and their recipients may be any address (+) or must be plain (-)
    # rule 1
    ("++", """
        msmtp -f %F --   msmtp -f '%F' --   msmtp -f "%F" --   msmtp --from=%F --   msmtp -f%F --   rec -x=%F
        FROM=%F rec   x=%F; rec "$y"   (rec %F); :   rec %F>log   rec $x \\; %F 'a b'   case %F in a) b;; esac; :
        env x='%F' rec   cat > $f && rec %F   rec %F `date` it\\'s   /usr/bin/rec --x-y=%F   # a\\nrec %F   rec %F|tee
        rec < in %F   rec <%F   rec >%F   x=%F; rec x   2> $log rec %F   a;x=%F rec   a|x=%F rec   a&x=%F rec"""),
    # rule 2
    ("-+", """
        rec x%F   rec %Fx   rec a/%F   rec a=b=%F   rec a,%F   rec \\%F   rec '%F   rec \\'%F'   rec '--from=%F'
        sed s/@SENDER@/%F/ > mails && :   mail -s 'from %F' --   logger "from %F"; msmtp --   cat > from.%F && :
        sed 's|X|%F|'
        # don't touch\\nmsmtp -f %F --   rec $'it\\'s' %F   rec "$(x "it's")" %F   rec "\\%F"   rec "$%F"
        x="$(rec %F)"; rec "$x"   rec $(echo %F)   rec `echo %F`   rec $((1<<2)) %F   rec -o "<<mail>>" %F
        x=%F; rec $x   x=%F; rec "$x"   x=%F; rec "$x"$x   rec <<EOF && :\\n<%F>\\nEOF\\n:   rec %%F   rec ${x:-%F}"""),
    # rule 3
    ("--", """
        bash -c 'msmtp -f '"%F"' -- "$@"' bash   bash -c "rec $*" && :   bash -c 'cat>box/%F' sh && :
        msmtpq -f %F --   parallel -j1 msmtp -f %F -- :::   rec | xargs -I{} rec {}   /usr/bin/ssh host msmtp --
        slogin h rec   autossh h rec   dbclient h rec   su joe -c rec   S=x; $S h rec %F   timeout 5 "$S" h rec
        timeout 5 ssh h   env A=1 ssh h   >log ssh h   s\\sh h   ss\\\\nh h   "ssh" h   (ssh h) && :   rec|ssh h
        eval rec %F   msmtp-enqueue.sh -f %F   x=$($S h); rec   { ${S} h; }   if $S h; then rec   env "ssh h" rec
        busybox rec   find   ksh93 x   make   sem rec   plink h   runuser rec   sg x   sshpass rec   watch rec   zsh x
        case a in a) $S h;; esac; :   f() { $S h; }; f   `$S h` rec   rec && a=1 "$S"   exec>x $S   >x $S"""),
    # none of them
    ("++", """
        cat > $f && echo > $f.to   deliver.sh   rec -C $HOME/x --   awk '{print $1}' | rec   rec >&2 2>> "$log" $x"""),
]  # fmt: skip


@pytest.mark.parametrize("expected, texts", RULES)
def test_who_may_be_any_address_and_who_must_be_plain(expected: str, texts: str) -> None:
    for text in cells(texts):
        assert {takes(text, address) for address in HOSTILE if address != "a=b@x"} == {expected}, text
        for address in ("a@b", "ü@x" if "<<" in text else "root", "a.b_c+d-e@x-y.example.org", "ü@x"):
            assert takes(text, address) == "++", (text, address)


NOT_AS_TEXT = [  # a command that has the sender as text, and plain ones that it cannot have
    ("sed s+X+%F+", "a+e@x"),
    ("sed 's+X+ %F +'", "a+w@x"),
    ("sed -es-X-%F-", "a-e@x"),
    ("sed /x/Is.X.%F.", "a@x.y"),
    ("sed s@X@%F@", "a@e"),
    ("sed y-X-%F-", "a-e@x"),
    ("perl -e 'm-%F-'", "a-e@x"),
    ("perl -e 'print q-%F-'", "a-e@x"),
    ("perl -e 'print tr-%F-'", "a-e@x"),
    ("perl -e 'print qw-%F-'", "a-e@x"),
    ("ruby -e 'puts %-%F-'", "a-e@x"),
    ("perl -ne 'print q=%F='", "a=b@x"),
    ("ruby -e 'puts %w_%F_'", "a_b@x"),
    ("rec <<EOF && :\n%F\nEOF\n:", "EOF"),
    ("rec <<'E'OF && :\n%F\nEOF\n:", "EOF"),
    ('case "$x" in a) rec;; %F) rec;; esac; :', "esac"),
    ('rec "x" %F>log', "2"),
    ("rec x%F", "=a@x"),
    ("x=%F; re=c $x", "evil"),
    ("x=%F; if $x; then rec", "evil"),
    ("rec $(echo= %F) 2>&1", "evil"),
    ("rec | ${x:-%F} && :", "evil"),
    ("re=c `echo %F`", "evil"),
    ("sed -n '\\+%F+p'", "a+w@x"),
]


@pytest.mark.parametrize("text, address", NOT_AS_TEXT)
def test_plain_addresses_that_would_be_more_than_text(text: str, address: str) -> None:
    assert takes(text, address)[0] == "-" and takes(text, "user1@example")[0] == "-+"["s@" not in text]


BAD_ENDS = """
    rec;   rec &   rec |   rec \\\\;   rec &&   rec; rc=$?   rec; >> log   rec\\nA=2   rec; A='b c' 2>x   rec; x=$(y; z)
    x="$(rec %F)"   rec; !   exec   rec; exec >x   if a; then   env -i A=1   nice -n 5   rec | xargs -n 1   /bin/sudo -n
    timeout 1.5m   cat <<EOF\\n%F\\nEOF   cat <<- 'E' && rec\\nx\\n\tE   rec &> log
    rec; 2>&1   rec; >|x   rec; exec>x   rec; exec<x   rec; a+=1   rec; x=`date -u`   rec; {   rec; if
    rec; then   rec; elif   rec; else   rec; while   rec; until   rec; do
    rec; time   rec; command   rec; builtin   rec; eval   rec; nohup   rec; setsid"""
GOOD_ENDS = """
    rec \\;   rec ';'   rec "a; b=1"   rec > log 2>&1   rec >| log   nice -n 5 rec   sudo -n -- rec   7z x   rec # x;y
    cat <<EOF && rec\\nx\\nEOF\\n:   exec 3>&1; rec 5   ! rec   a=b exec rec   rec $(date)   rec ${x}
    cat <<E && rec\\nx\\nE\\nrec E   :; a=$x rec $(y)   a=1;rec   a=1|rec   a=1&rec"""


@pytest.mark.parametrize("piece", ["<<E\n", "2>x ", "1=a ", "x=/env ", "2/env ", "> a ", "x=$(((", "!", "-/env "])
def test_a_command_is_read_in_no_time_however_often_something_stands_in_it(piece: str) -> None:
    """It would be years, with the pieces read in two ways each."""
    with contextlib.suppress(msmtpd.StartupError):
        msmtpd.Command(f"cat {piece * 99}| x && rec", {})


def test_recipients_are_not_run_as_a_command() -> None:
    for text in cells(BAD_ENDS):
        with pytest.raises(msmtpd.StartupError, match="would be a command or input"):
            msmtpd.Command(text, {})
    for text in cells(GOOD_ENDS):
        msmtpd.Command(text, {})


WARNINGS = {
    "--wait": "setsid cat -f %F --   /usr/bin/setsid cat   setsid cat --help",
    "no command no-such-program": "no-such-program   no-such-program %F",
    "": """setsid --wait cat   setsid -w cat   cat setsid   cat %F   exit 3   no-such-program; :
        case "$x" in a) cat;; %F) exit 1;; esac; :   cat <<E && :\\n%F\\nE\\n:""",
}


@pytest.mark.parametrize("warning", WARNINGS)
def test_a_command_that_may_not_do_is_warned_of(warning: str) -> None:
    for text in cells(WARNINGS[warning]):
        said = msmtpd.Command(text, {}).check()
        assert warning in said and bool(warning) == bool(said), text


def test_a_shell_runs_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program reads the same from both, but for $0 and the parent's name."""
    started: list[bytes] = []
    monkeypatch.setattr(msmtpd, "spawn", lambda arguments, *_: started.append(arguments[0]))
    for text in ("cat", f"{PRINTF} %s %F", "/bin/cat", "cat\t--x=%F a:b,c"):
        msmtpd.Command(text, {}).start(b"a@b", [b"c@d"], 0, 1)
    assert started == [b"cat", PRINTF.encode(), b"/bin/cat", b"cat"]
    for text in ("cat > x", "cat; echo", "a | b", "'cat'", "X=1 cat", "~/cat", "cat $X"):
        msmtpd.Command(text, {}).start(b"a@b", [b"c@d"], 0, 1)
    assert set(started[4:]) == {b"/bin/sh"}


def test_a_process_that_cannot_be_had_is_not_asked_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[bytes]] = []

    def spawn(arguments: list[bytes], *_: object) -> int:
        tried.append(arguments)
        raise OSError(errno.EAGAIN, "no process")

    monkeypatch.setattr(msmtpd, "spawn", spawn)
    with pytest.raises(OSError, match="no process"):
        msmtpd.Command("cat", {}).start(b"a@b", [b"c@d"], 0, 1)
    assert tried == [[b"cat", b"c@d"]]


def test_the_null_sender_is_mailer_daemon_for_the_command() -> None:
    assert Run(f"{PRINTF} %s, %F", "").output == "MAILER-DAEMON,c@d,"
    assert Run("echo $MSMTPD_SENDER").output == "MAILER-DAEMON c@d\n".replace("MAILER-DAEMON", "a@b")


@pytest.fixture(params=["as it is", "makes no session", "missing"])
def posix_spawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this system has, what the BSDs have, what PyPy has."""
    real = os.posix_spawnp

    def without_sessions(*arguments: Any, setsid: bool = False, **options: Any) -> int:
        if setsid:
            raise NotImplementedError
        return real(*arguments, **options)

    if request.param == "makes no session":
        monkeypatch.setattr(os, "posix_spawnp", without_sessions)
    elif request.param == "missing":
        monkeypatch.delattr(os, "posix_spawnp")


def test_the_command_gets_its_input_and_a_clean_place_to_run_in(posix_spawn: None) -> None:
    previous = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGPIPE, signal.SIGHUP)]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        assert Run("cat; :", stdin=b"mail").output == "mail"
        masks = [int(word, 16) for word in Run(f"grep -E 'SigBlk|SigIgn' {proc()}/status; :").output.split()[1::2]]
        assert [number for number in signal.valid_signals() for mask in masks if mask >> (number - 1) & 1] == []
        # its own session and process group
        stat = "read -r pid name state parent group session rest < /proc/$$/stat"
        pid, pgid, sid = Run(f"{stat}; echo $pid $group $session; :").output.split()
        assert pid == pgid == sid != str(os.getsid(0))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        for number, handler in zip((signal.SIGPIPE, signal.SIGHUP), previous):
            signal.signal(number, handler)


def test_a_script_without_interpreter_line_is_run_by_the_shell(posix_spawn: None, tmp_path: Path) -> None:
    program = tmp_path / "script"
    program.write_text("echo ran $*\n")
    program.chmod(0o755)
    assert Run(f"{program} %F %F").output == "ran a@b %F c@d\n"


def test_a_program_that_is_not_there_is_for_the_shell_to_judge(posix_spawn: None) -> None:
    assert [Run(text).status for text in ("/nonexistent/program %F", "exit 3", "/etc/passwd")] == [127, 3, 126]


def test_the_reply_says_what_happened_and_what_the_command_said() -> None:
    output = b"msmtp: recipient address x@y not accepted by the server\nmsmtp: server message: 550 no\n"
    output += b"\nmsmtp: could not send mail\n"
    assert msmtpd.failure_reply(b"554 5.3.0", "Command failed with exit status 65 (EX_DATAERR)", output, False) == (
        b"554-5.3.0 Command failed with exit status 65 (EX_DATAERR)\r\n"
        b"554-5.3.0 msmtp: recipient address x@y not accepted by the server\r\n"
        b"554-5.3.0 msmtp: server message: 550 no\r\n"
        b"554 5.3.0 msmtp: could not send mail\r\n"
    )


OUTPUTS = [  # what the command printed, the lines of the reply, with SMTPUTF8 or without
    (b"", [], False),
    (b"one", ["one"], False),
    (b"1\n2\n3\n4\n5\n6\n7\n", ["3", "4", "5", "6", "7"], False),
    (b"a\tb \r\n\r\n\x1b[31mred\x07", ["a b", "?[31mred?"], False),
    ("grün\n".encode(), ["gr?n"], False),
    ("grün \u202e\n".encode(), ["grün ?"], True),
    (b"\xff\xfe\n", ["??"], False),
    (b"250 Ok\r\n250 2.0.0 Ok\r\n", ["250 Ok", "250 2.0.0 Ok"], False),
]


@pytest.mark.parametrize("output, lines, utf8", OUTPUTS)
def test_output_is_cleaned_for_the_reply(output: bytes, lines: list[str], utf8: bool) -> None:
    reply = msmtpd.failure_reply(b"451 4.3.0", "x", output, utf8).decode()
    assert [line[10:] for line in reply.splitlines()] == ["x", *lines]
    assert all(line.startswith(("451-4.3.0 ", "451 4.3.0 ")) for line in reply.splitlines())


def test_reply_lines_have_at_most_512_octets_and_no_broken_character() -> None:
    for text in ("x" * 2000, "ü" * 2000, "€" * 2000):
        reply = msmtpd.failure_reply(b"451 4.3.0", "x", text.encode(), True)
        assert 500 < max(map(len, reply.splitlines(True))) <= 512
        reply.decode()


# ---- Log -------------------------------------------------------------------

LINE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} msmtpd\[[0-9]+\] (info|warning|error): .*\n")


def test_a_log_file_gets_lines_and_is_followed_when_it_moves(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = msmtpd.open_log(str(path), inetd=False)
    log.write("info", "one")
    path.rename(tmp_path / "old")
    log.write("warning", "two")
    (tmp_path / "older").write_bytes(path.read_bytes())
    path.unlink()
    log.reopen()
    assert path.exists()  # the old one is let go at once, not with the next line
    log.write("error", "three")
    msmtpd.open_log("stderr", inetd=False).reopen()
    assert (tmp_path / "old").read_text().endswith("info: one\n")
    assert (tmp_path / "older").read_text().endswith("warning: two\n")
    assert LINE.fullmatch(path.read_text()) and path.read_text().endswith("error: three\n")


def test_a_line_that_a_full_disk_has_cut_gets_its_end_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = msmtpd.open_log(str(tmp_path / "log"), inetd=False)
    room, write = [0], os.write

    def write_what_fits(descriptor: int, data: bytes) -> int:
        fits = data[: room[0]]
        if data and not fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(fits)
        return write(descriptor, fits)

    monkeypatch.setattr(os, "write", write_what_fits)
    for text, room[0] in (("one", 1000), ("lost", 0), ("two", 1000), ("cut", 20), ("lost", 0), ("three", 1000)):
        log.write("info", text)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line[-5:] for line in lines] == [": one", ": two", lines[2][-5:], "three"]
    assert len(lines[2]) == 20


def test_a_log_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    msmtpd.open_log("/dev/full", inetd=False).write("info", "lost")
    (tmp_path / "there").mkdir()
    log = msmtpd.open_log(str(tmp_path / "there/log"), inetd=False)
    (tmp_path / "there").rename(tmp_path / "moved")
    log.write("info", "better in the moved file than nowhere")
    log.reopen()
    assert (tmp_path / "moved/log").read_text().endswith("nowhere\n")


def syslog_daemon(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(20)
    sock.bind(str(path))
    return sock


NO_FILE = "cannot open log file '/nowhere/log': No such file or directory; logging to syslog"
NO_SYSLOG = "warning: there is no syslog here; --log=stderr or a file would do"
WHERE_THE_LOG_IS = [  # target, in inetd mode, whether there is a syslog daemon, what standard error hears
    ("/nowhere/log", False, True, [NO_FILE]),
    ("/nowhere/log", False, False, [NO_FILE, NO_SYSLOG]),
    ("/nowhere/log", True, True, []),
    ("/nowhere/log", True, False, [NO_FILE, NO_SYSLOG]),
    ("syslog", False, True, []),
    ("syslog", False, False, [NO_SYSLOG]),
    ("syslog", True, True, []),
    ("syslog", True, False, [NO_SYSLOG]),
]


@pytest.mark.parametrize("target, in_inetd_mode, there, heard", WHERE_THE_LOG_IS)
@pytest.mark.parametrize("kind", ["nothing", "a directory, as systemd has", "a socket that nobody reads"])
def test_a_log_that_is_not_where_it_should_be_is_complained_of(
    target: str, in_inetd_mode: bool, there: bool, heard: list[str], kind: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wrong, path = tmp_path / "wrong", tmp_path / "log"
    if kind == "a socket that nobody reads":
        syslog_daemon(wrong).close()
    elif kind != "nothing":
        wrong.mkdir()
    monkeypatch.setattr(msmtpd, "SYSLOG_SOCKETS", (str(wrong), str(path)) if there else (str(wrong),))
    with syslog_daemon(path) as daemon:
        msmtpd.open_log(target, in_inetd_mode).write("info", "end")
        assert capfd.readouterr().err.splitlines() == [f"msmtpd: {text}" for text in heard]
        if there:
            assert (b"cannot open log file" in daemon.recv(1000)) == (target != "syslog")


@pytest.mark.parametrize("journal", [False, True])
def test_who_reads_the_log_on_standard_error_is_told_once(
    journal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, path = os.fstat(2), tmp_path / "socket"
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + (not journal)}")
    monkeypatch.setattr(msmtpd, "SYSLOG_SOCKETS", [str(path)])
    with syslog_daemon(path):
        for target in ("none", "stderr", "stdout", "syslog", "/nowhere/log", str(tmp_path / "file")):
            expected = target == "stderr" or (journal and target in ("syslog", "/nowhere/log"))
            assert msmtpd.open_log(target, inetd=False).on_stderr == expected
    assert bool(capfd.readouterr().err) == (not journal)


@pytest.mark.parametrize("target", [*msmtpd.STDOUT_NAMES, *msmtpd.STDERR_NAMES])
@pytest.mark.parametrize("journal", [False, True])
def test_a_log_may_be_named_as_a_descriptor_which_systemd_may_have_passed(
    target: str, journal: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    number = 1 if target in msmtpd.STDOUT_NAMES else 2
    status = os.fstat(number)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + (not journal)}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail_with(OSError(errno.ENXIO, "a socket cannot be opened by its name")))
        msmtpd.open_log(target, inetd=False).write("error", "text")
    line = capfd.readouterr()[number - 1]
    assert line == "<3>text\n" if journal else LINE.fullmatch(line)


def test_syslog_gets_facility_level_and_name_and_is_neither_waited_for_nor_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    monkeypatch.setattr(msmtpd, "SYSLOG_SOCKETS", ("/nowhere/log", str(path)))
    log = msmtpd.open_log("syslog", inetd=True)  # it is started later
    with syslog_daemon(path) as daemon:
        for level, number in (("error", 19), ("warning", 20), ("info", 22)):
            log.write(level, "text")
            expected = rf"<{number}>[A-Z][a-z]{{2}} [ 1-3][0-9] [0-9:]{{8}} msmtpd\[{os.getpid()}\]: text"
            assert re.fullmatch(expected, daemon.recv(1000).decode())
        for _ in range(1000):  # it hangs
            log.write("info", "x" * 1000)
    path.unlink()
    log.write("info", "lost")
    with syslog_daemon(path) as daemon:  # it is started again
        log.write("info", "found")
        assert daemon.recv(1000).endswith(b": found")


@pytest.mark.parametrize("kind", ["terminal", "terminal of somebody else", "pipe", "socket"])
def test_a_reader_that_has_stopped_is_not_waited_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "socket":
        reader, writer = (sock.detach() for sock in socket.socketpair())
    else:
        reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    if kind == "terminal of somebody else":
        monkeypatch.setattr(os, "ttyname", lambda descriptor: "/nowhere")
    descriptor = msmtpd.unshared(writer)
    assert (descriptor != writer) == (kind == "terminal") and msmtpd.write_now(descriptor, b"x") == 1
    for size in (10000, 1):
        while msmtpd.write_now(descriptor, b"x" * size):
            pass
    assert os.get_blocking(writer)  # for the others who have it
    for end in {reader, writer, descriptor}:
        os.close(end)


# ---- Event loop ------------------------------------------------------------


class FakeTask(msmtpd.Task):
    """Writes down what the loop calls."""

    def __init__(self, name: str, calls: list[str], due: float = msmtpd.NEVER) -> None:
        self.name, self.calls, self.due_at = name, calls, due

    def ready(self, events: int) -> None:
        self.calls.append(f"{self.name} ready {events}")

    def resume(self) -> None:
        self.calls.append(f"{self.name} resumed")

    def due(self) -> float:
        return self.due_at

    def expire(self) -> None:
        self.calls.append(f"{self.name} expired")
        self.due_at = msmtpd.NEVER


def test_the_loop_reports_what_is_ready_while_it_is_watched() -> None:
    left, right = socket.socketpair()
    calls: list[str] = []
    loop, task = msmtpd.Loop(select.poll(), msmtpd.Log()), FakeTask("task", calls)
    with left, right:
        loop.watch(left.fileno(), msmtpd.WRITE, task)
        loop.turn()
        right.send(b"x")
        loop.watch(left.fileno(), msmtpd.READ, task)
        loop.turn()
        loop.watch(left.fileno(), 0, task)
        loop.resume_later(task)
        loop.turn()
        loop.watch(left.fileno(), msmtpd.WRITE, task)
        right.close()
        loop.turn()
    assert calls == [f"task ready {msmtpd.WRITE}", f"task ready {msmtpd.READ}", "task resumed", "task ready 4"]


def test_tasks_expire_when_they_are_due_and_not_before() -> None:
    calls: list[str] = []
    clock = [1000.0]
    loop = msmtpd.Loop(select.poll(), msmtpd.Log(), lambda: clock[0])
    early, late = (FakeTask(name, calls, due) for name, due in (("early", 1010.0), ("late", 1020.0)))
    for task in (late, early):
        loop.add_timed(task)
    loop.resume_later(late)
    loop.turn()
    clock[0] = 1010.0
    loop.turn()
    late.due_at = 1030.0  # moved away: the timer that fires at 1020 finds nothing
    clock[0] = 1020.0
    loop.turn()
    assert calls == ["late resumed", "early expired"]
    late.due_at = 1025.0
    loop.schedule(1025.0)
    clock[0] = 1025.0
    loop.turn()
    assert calls[-1] == "late expired" and loop._wake_at == msmtpd.NEVER


# ---- Command line ----------------------------------------------------------

PARSED = [
    (["--port", "2500"], {"port": 2500}),
    (["--port=2500"], {"port": 2500}),
    (["--po", "2500", "--int", "::1"], {"port": 2500, "interfaces": ["::1"]}),
    (["--interface=127.0.0.1", "--interface=::1"], {"interfaces": ["127.0.0.1", "::1"]}),
    (["--inetd"], {"inetd": True}),
    (["--log=/x", "--log=syslog"], {"log": "syslog"}),
    (["--auth=joe,pass show x,y"], {"auth": "joe,pass show x,y"}),
    (["--auth=joe,echo a,"], {"auth": "joe,echo a,"}),
    (["--auth=joe user,echo x"], {"auth": "joe user,echo x"}),
    (["--command", "--version"], {"command": "--version"}),
    (["--max-size=1"], {"max_size": 1}),
    (["--port=1", "--"], {"port": 1}),
    ([], {"port": 25, "interfaces": ["127.0.0.1"], "log": "none", "auth": "", "inetd": False}),
    ([], {"command": "msmtp -f %F --", "max_size": 100 * 1024 * 1024}),
]


@pytest.mark.parametrize("arguments, expected", PARSED)
def test_options(arguments: list[str], expected: dict[str, Any]) -> None:
    options = msmtpd.Options(arguments)
    assert {name: getattr(options, name) for name in expected} == expected


REJECTED = [  # command line, what the message says
    (["--bogus=1"], "unknown option '--bogus'; see --help"),
    (["--in"], "--in is ambiguous: --inetd, --interface"),
    (["-p", "25"], "unexpected argument '-p'; options begin with two dashes, see --help"),
    (["--command=msmtp", "-f"], "unexpected argument '-f'; options begin with two dashes, see --help"),
    (["extra"], "unexpected argument 'extra'; quote what has blanks, see --help"),
    (["--", "extra"], "unexpected argument 'extra'"),
    (["--port"], "--port needs an argument"),
    (["--port="], "--port needs an argument"),
    (["--command", ""], "--command needs an argument"),
    (["--inetd=yes"], "--inetd takes no argument"),
    (["--port=0"], "from 1 to 65535, not '0'"),
    (["--port=65536"], "from 1 to 65535"),
    (["--port=smtp"], "--port needs a number from 1 to 65535, not 'smtp'"),
    (["--port=-1"], "from 1 to 65535"),
    (["--port=²"], "from 1 to 65535"),
    (["--max-size=10M"], "a number of octets such as 10485760, not '10M'"),
    (["--auth=,x"], "--auth needs a user name"),
    (["--auth=joe,"], "--auth needs a user name"),
    (["--auth=joe echo x"], "--auth needs a user name, and a comma before a command"),
    (["--=x"], "unknown option '--'"),
    (["--interface=localhost"], "--interface needs an IPv4 or IPv6 address such as 127.0.0.1 or ::1, not 'localhost'"),
    (["--interface=1.2.3.4.5"], "--interface needs an IPv4 or IPv6 address"),
    (["--interface=127.1"], "--interface needs an IPv4 or IPv6 address such as 127.0.0.1 or ::1, not '127.1'"),
    (["--interface=*"], "--interface needs an IPv4 or IPv6 address"),
    (["--interface=fe80::1"], "a link-local address needs its interface, as in fe80::1%eth0"),
    (["--interface=192.0.2.1"], "this machine has no such address, see --interface"),
    (["--auth=joe,exit 3"], "the password command of --auth failed with exit status 3: 'exit 3'"),
    (["--auth=joe,echo x; false\n"], "with exit status 1: 'echo x; false\\n'"),
    (["--auth=joe,:"], "the password command of --auth printed no password: ':'"),
    (["--auth=joe,echo; echo x"], "the password command of --auth printed no password: 'echo; echo x'"),
    (["--auth=joe,cat /dev/zero"], "the password command of --auth printed no password: 'cat /dev/zero'"),
    (["--auth=joe,exec >&-; exit 4"], "the password command of --auth failed with exit status 4"),
    (["--command=cat 'x"], "--command is no valid shell command: "),
    (["--command=if %F"], "--command is no valid shell command: "),
    (["--command= "], "--command is empty"),
    (["--command=cat >> mails;"], 'the recipients would be a command or input; end it in "&& :"'),
]


@pytest.mark.parametrize("arguments, message", REJECTED)
def test_what_is_wrong_with_the_command_line_is_told_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(msmtpd.StartupError) as error:
        options = msmtpd.Options(["--port=2599", *arguments])
        assert not options.user or msmtpd.get_password(options.user, options.password_command, inetd=False)
        msmtpd.Command(options.command, os.environb).check()
        msmtpd.listening_socket(options.interfaces[0], options.port)
    assert message in str(error.value) and "\n" not in str(error.value)


CURES = {
    errno.EACCES: "a port below 1024 takes root (or, on Linux, CAP_NET_BIND_SERVICE), try --port=2500",
    errno.EADDRINUSE: "another server is there already, try another --port",
}


@pytest.mark.parametrize("number", CURES)
def test_a_port_that_cannot_be_had_names_the_cure(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "bind", fail_with(OSError(number, "No")))
    with pytest.raises(msmtpd.StartupError) as error:
        msmtpd.listening_socket("127.0.0.1", 25)
    assert str(error.value) == f"cannot listen on 127.0.0.1 port 25: No; {CURES[number]}"


PASSWORD_COMMANDS = {  # and the password
    "yes a": b"a",
    "echo a; sleep 5 &": b"a",
    "printf a; sleep 5 &": b"a",
    "sleep 0.2; echo a": b"a",
    "echo a >&1": b"a",
    r"printf ' p,w d \r\nnext\n'": b" p,w d ",
}


@pytest.mark.parametrize("command", PASSWORD_COMMANDS)
def test_a_password_is_a_line_whatever_else_its_command_does(command: str) -> None:
    started = time.monotonic()
    assert msmtpd.get_password("joe", command, inetd=True) == PASSWORD_COMMANDS[command]
    assert time.monotonic() - started < 4


def test_nobody_can_connect_before_the_command_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    listening: list[str] = []
    monkeypatch.setattr(msmtpd, "listening_socket", lambda host, port: listening.append(host))
    server: Any = types.SimpleNamespace(queue=types.SimpleNamespace(command=msmtpd.Command("if %F", {})))
    with pytest.raises(msmtpd.StartupError):
        msmtpd.serve_daemon(server, msmtpd.Options([]), [])
    assert not listening


# ---- As a user starts it: the process --------------------------------------

RECORD = r"""#!/bin/sh
# Keeps its arguments and its standard input.  The second file appears last.
name="$MAILS/$$.$(date +%N)"
printf '%s\0' "$@" > "$name.argv"
cat > "$name.part"
mv "$name.part" "$name.mail"
"""


class Box:
    """A directory with a command that keeps each mail in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.record = directory / "record"
        self.record.write_text(RECORD)
        self.record.chmod(0o755)
        self.command = f"{self.record} -f %F --"
        self.environment = {**os.environ, "MAILS": str(directory)}

    def mails(self) -> list[tuple[list[str], bytes]]:
        """Return the arguments and the content of every mail, without its Received field."""
        found = []
        for path in sorted(self.directory.glob("*.mail"), key=lambda path: path.stat().st_mtime_ns):
            arguments = path.with_suffix(".argv").read_bytes().split(b"\0")[:-1]
            found.append(([a.decode() for a in arguments], without_received(path.read_bytes())))
        return found


def without_received(mail: bytes) -> bytes:
    """Take the Received field of this hop away, which must be there."""
    field = re.match(rb"Received: from .*?\n(?![ \t])", mail, re.S)
    assert field, mail[:80]
    return mail[field.end() :]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path / "box")


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


MAIL = b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nSubject: test\r\n\r\nhello\r\n.\r\n"
CONTENT = b"Subject: test\n\nhello\n"


def codes(replies: bytes) -> list[int]:
    """Return the codes of the replies, once for a reply of many lines."""
    return [int(line[:3]) for line in replies.splitlines() if line[3:4] == b" "]


def read_all(sock: socket.socket) -> bytes:
    octets = b""
    while data := sock.recv(65536):
        octets += data
    return octets


def connect(address: Any) -> socket.socket:
    """Connect to a server that may still be starting: a pair of host and port, or a path."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET

    def attempt() -> socket.socket | None:
        sock = socket.socket(family)
        sock.settimeout(20)
        try:
            sock.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            sock.close()
            return None
        return sock

    connected: socket.socket = wait_until(attempt)
    return connected


def converse(address: Any, octets: bytes = MAIL + b"QUIT\r\n") -> bytes:
    """Send octets and the end, and return all replies."""
    with connect(address) as sock:
        sock.sendall(octets)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


class Daemon:
    """A running msmtpd, started as its users do; ready when it says so to systemd's socket."""

    def __init__(self, directory: Path, *options: str, environment: Any = os.environ, **popen: Any) -> None:
        self.port = free_port()
        self.log_path, notify = directory / f"log.{self.port}", directory / f"n{self.port}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, open(self.log_path, "wb") as log:
            ready.bind(str(notify))
            ready.settimeout(20)
            popen = {"stdin": subprocess.DEVNULL, "stderr": log, **popen}
            command = [*RUN, f"--port={self.port}", "--log=stderr", *options]
            self.process = subprocess.Popen(command, env={**environment, "NOTIFY_SOCKET": str(notify)}, **popen)
            try:
                assert ready.recv(100) == b"READY=1"
            except socket.timeout:
                raise AssertionError(self.log()) from None

    def log(self) -> str:
        return self.log_path.read_text()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def talk(self, octets: bytes) -> bytes:
        return converse(("127.0.0.1", self.port), octets)

    def descriptors(self) -> int:
        return len(os.listdir(proc(self.process.pid) / "fd"))

    def children(self) -> list[int]:
        """Return the process ids of the children, zombies too."""
        pid = self.process.pid
        return [int(child) for child in (proc(pid) / f"task/{pid}/children").read_text().split()]

    def stop(self) -> int:
        """End it, within the seconds that are granted to a drain, and return its status."""
        self.process.terminate()
        return self.process.wait(20)


@contextlib.contextmanager
def running(*arguments: str, **popen: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a super-server for the time of a with block."""
    popen.setdefault("stdin", subprocess.DEVNULL)
    process = subprocess.Popen(arguments, **popen)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start daemons that end with the test."""
    daemons: list[Daemon] = []

    def starter(*options: str, **more: Any) -> Daemon:
        daemons.append(Daemon(tmp_path, *options, **more))
        return daemons[-1]

    yield starter
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.wait()


@pytest.mark.parametrize("listed", [None, 0, 3, 64])  # no /dev/fd; FreeBSD; OpenBSD and NetBSD, whatever is open
def test_the_command_inherits_only_descriptors_0_to_2(listed: int | None, tmp_path: Path) -> None:
    patched = f"import os; os.listdir = lambda path: list(map(str, range({listed}))); exec({PROGRAM.read_text()!r})"
    program = RUN if listed is None else [sys.executable, "-I", "-S", "-c", patched]
    leaks = (70, 300, 1000)
    for leak in leaks:
        os.dup2(0, leak)
    command = [*program, "--inetd", f"--command=ls {proc()}/fd > {tmp_path}/fds; :"]
    subprocess.run(command, input=MAIL, stdout=subprocess.DEVNULL, pass_fds=leaks, check=True, timeout=20)
    for leak in leaks:
        os.close(leak)
    assert (tmp_path / "fds").read_text().split() == ["0", "1", "2", "3"]  # 3 is its own, of the directory


@pytest.mark.parametrize("log", ["none", "stderr"])
def test_a_process_that_the_command_leaves_behind_may_print(log: str, start: Start, tmp_path: Path) -> None:
    """Else it would die of SIGPIPE, with a mail that was acknowledged.  Without a log standard error has all of it."""
    os.mkfifo(tmp_path / "go")
    behind = "head -c 200000 /dev/zero; echo late >&2; cat go > /dev/null; mv mail sent"
    daemon = start(f"--log={log}", f"--command=cd {tmp_path}; cat > mail; echo soon; ({behind}) & :")
    before = daemon.descriptors()
    assert codes(daemon.talk(MAIL))[-1] == 250 and not (tmp_path / "sent").exists()
    (tmp_path / "go").write_text("x")
    wait_until((tmp_path / "sent").exists)
    wait_until(lambda: daemon.descriptors() <= before)
    assert bool(re.fullmatch("soon\n\0*late\n", daemon.log())) == (log == "none")


def test_several_interfaces_and_their_addresses_in_the_received_field(start: Start, tmp_path: Path) -> None:
    interfaces = [f"--interface={host}" for host in ("127.0.0.1", "::1", "127.0.0.2", "::1")]
    daemon = start(*interfaces, f"--command=cat > {tmp_path}/mail; :")
    for host, literal in (("127.0.0.1", "[127.0.0.1]"), ("::1", "[IPv6:::1]"), ("127.0.0.2", "[127.0.0.2]")):
        converse((host, daemon.port))
        source = literal.replace("127.0.0.2", "127.0.0.1")
        received = f"Received: from x ({source})\n\tby {literal} (msmtpd) with ESMTP;"
        assert (tmp_path / "mail").read_text().startswith(received)
    assert f"on 127.0.0.1 port {daemon.port}, ::1 port {daemon.port}, 127.0.0.2 port" in daemon.log()


def test_the_process_is_called_msmtpd(start: Start) -> None:
    assert (proc(start().process.pid) / "comm").read_text() == "msmtpd\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract sockets")
def test_systemd_may_be_told_by_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # the kernel chooses a name
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + os.fsdecode(sock.getsockname()[1:]))
        msmtpd.notify_systemd("READY=1")
        assert sock.recv(100, socket.MSG_DONTWAIT) == b"READY=1"


def test_a_service_manager_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setattr(msmtpd, "NOTIFY_TIMEOUT", 0.0001)
    with syslog_daemon(tmp_path / "notify"), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        other.connect(str(tmp_path / "notify"))
        with pytest.raises(BlockingIOError):
            while True:
                other.send(b"x")
        msmtpd.notify_systemd("READY=1")


def test_the_log_tells_all_about_a_mail_and_nothing_secret(start: Start) -> None:
    daemon = start("--auth=joe,echo secret", "--command=echo because; exit 75; :")
    right, wrong = (client_octets(script(f"C: AUTH PLAIN «\0joe\0{word}»")[0]) for word in ("secret", "guessed"))
    daemon.talk(b"EHLO x\r\n" + right + MAIL[8:] + b"MAIL FROM:<a b>\r\nDATA\r\nQUIT\r\n")
    daemon.talk(b"EHLO x\r\n" + wrong + b"QUIT\r\n")
    daemon.connect().close()  # a health check says nothing
    daemon.stop()
    lines = daemon.log().splitlines(True)
    assert all(LINE.fullmatch(line) for line in lines)
    assert [re.sub(r"=\d+\.\d{3} ", "=0.1 ", line[line.index("]") + 2 : -1]) for line in lines[:-2]] == [
        f"info: msmtpd {msmtpd.__version__} on 127.0.0.1 port {daemon.port}, authentication as joe,"
        " command: echo because; exit 75; :",
        "error: session 1 [127.0.0.1]: mail from=<a@b> to=<c@d> count=1 size=24 reply=451 seconds=0.1"
        " result=Command failed for now with exit status 75 (EX_TEMPFAIL)",
        "error: session 1 [127.0.0.1]: command said: because",
        f"warning: session 1 [127.0.0.1]: refused with {msmtpd.BAD_ADDRESS.decode().strip()}: MAIL FROM:<a b>",
        "warning: session 1 [127.0.0.1]: refused with 503 5.5.1 Send MAIL first: DATA",
        "warning: session 2 [127.0.0.1]: authentication failed",
    ]
    assert "info: stopping, " in lines[-2] and lines[-1].endswith(" info: stopped\n")


def test_signals_that_were_blocked_by_whoever_started_us_work(start: Start) -> None:
    blocked = {signal.SIGCHLD, signal.SIGTERM}
    daemon = start("--command=:", preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, blocked))
    assert codes(daemon.talk(MAIL))[-1] == 250
    assert daemon.stop() == 0


@pytest.mark.parametrize("log", ["none", "stderr"])
def test_a_standard_error_that_takes_nothing_stops_nobody(log: str, start: Start) -> None:
    reader, writer = os.pipe()
    command = f"--command=for i in $(seq 70); do echo {'x' * 60}; done; exit 1; :"
    daemon = start(f"--log={log}", command, stderr=writer)
    for _ in range(40):
        assert codes(daemon.talk(MAIL))[-1] == 554
    assert daemon.stop() == 0
    os.close(reader)
    os.close(writer)


def inherit_many() -> None:
    """Leave more descriptors open than select() knows."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for number in range(3, 1100):
        os.dup2(0, number)


def test_many_descriptors_may_be_inherited(start: Start, tmp_path: Path) -> None:
    daemon = start("--command=:", f"--log={tmp_path}/log", close_fds=False, preexec_fn=inherit_many)
    assert codes(daemon.talk(MAIL))[-1] == 250 and (tmp_path / "log").read_text().count("\n") == 2
    process = inetd(subprocess.PIPE, subprocess.PIPE, "--command=:", close_fds=False, preexec_fn=inherit_many)
    output, error = process.communicate(MAIL)
    assert (codes(output)[-1], process.returncode, error) == (250, 0, b"")
    start("--auth=joe,echo x", close_fds=False, preexec_fn=inherit_many)


def test_an_interrupt_while_a_password_is_waited_for_leaves_no_traceback() -> None:
    """To all that run in the terminal, as Ctrl-C sends it."""
    command = [*RUN, "--auth=joe,echo waiting >&2; exec sleep 20"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stderr is not None and process.stderr.readline() == b"waiting\n"
    os.killpg(process.pid, signal.SIGINT)
    assert b"Traceback" not in process.communicate(timeout=20)[1] and process.returncode == 3


@pytest.mark.parametrize("log", ["none", "stderr"])
def test_a_command_that_is_not_there_is_warned_of_at_the_start(start: Start, log: str) -> None:
    missing, builtin = start(f"--log={log}", "--command=no-such-program -f %F --"), start("--command=exec cat")
    warning = "warning: there is no command no-such-program; mails are refused with 451 until there is"
    assert missing.log().count(warning) == 1 and "warning" not in builtin.log()


SHORT = "import msmtpd; msmtpd.IDLE_TIMEOUT = msmtpd.DELIVERY_TIMEOUT = 0.4; raise SystemExit(msmtpd.main())"


def test_what_has_happened_while_the_server_was_stopped_counts_before_what_is_late(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that has ended is not killed, and a client that has spoken not let go."""
    monkeypatch.setattr(sys.modules[__name__], "RUN", [sys.executable, "-c", SHORT])
    daemon = start("--command=sleep 0.2; exit 0; :", cwd=ROOT)
    with daemon.connect() as sends, daemon.connect() as talks:
        sends.sendall(MAIL)
        wait_until(daemon.children)
        assert talks.recv(100) == msmtpd.GREETING
        wait_until(lambda: process_state(daemon.process.pid)[0] == "S")  # it is in the loop's wait
        daemon.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_state(daemon.process.pid)[0] == "T")
        talks.sendall(b"NOOP\r\nQUIT\r\n")
        time.sleep(0.6)
        daemon.process.send_signal(signal.SIGCONT)
        assert codes(read_all(talks)) == [250, 221]
        sends.sendall(b"QUIT\r\n")
        assert codes(read_all(sends)) == [*IN_DATA, 250, 221]


def test_a_passed_socket_that_was_shut_down_makes_no_load(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        script = 'exec 3<&0; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
        command = ["sh", "-c", script, "sh", *RUN, f"--log={tmp_path}/log"]
        with running(*command, stdin=sock) as process:
            wait_until((tmp_path / "log").exists)
            sock.shutdown(socket.SHUT_RDWR)
            time.sleep(0.5)
            used = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            assert sum(map(int, used)) < 0.4 * os.sysconf("SC_CLK_TCK")
    assert (tmp_path / "log").read_text().count("cannot accept clients for now: Invalid argument") == 1


def test_restart_on_the_same_port_at_once(start: Start) -> None:
    """Even with a session open, and a command that lingers."""
    daemon = start("--command=sleep 20 & :")
    lingering = daemon.connect()
    lingering.sendall(MAIL)
    while b"was piped" not in lingering.recv(1000):
        pass
    daemon.process.terminate()
    with lingering:  # which leaves second, so that the port is still in use, as TIME_WAIT
        assert read_all(lingering) == msmtpd.SHUTTING_DOWN
    assert daemon.process.wait(20) == 0
    with running(*RUN, f"--port={daemon.port}", "--command=cat", stderr=subprocess.PIPE) as again:
        assert converse(("127.0.0.1", daemon.port), b"") == msmtpd.GREETING
    assert again.communicate()[1] == b"" and again.returncode == 0


# Passwords


def login_line(user: str, password: str) -> bytes:
    return b"EHLO x\r\nAUTH PLAIN " + b64(f"\0{user}\0{password}".encode()).encode() + b"\r\n" + MAIL[8:] + b"QUIT\r\n"


KEY_RINGS = [  # system, what its tool does, the password or the reason that there is none
    ("darwin", 'password: "secret"', b"secret"),
    ("darwin", 'password: "say "hi""', b'say "hi"'),
    ("darwin", 'password: "0x41"', b"0x41"),
    ("darwin", 'password: 0x70C3A4737377  "p\\303\\244ssw"', "pässw".encode()),
    ("darwin", 'password: 0x615C62  "a\\134b"', b"a\\b"),
    ("darwin", "password: 0xC3A4 ", "ä".encode()),
    ("darwin", "", "the password for joe in the key ring is empty"),
    ("linux", "echo p,w d", b"p,w d"),
    ("linux", "echo help >&2; echo locked >&2; exit 1", "no password for joe in the key ring (locked)"),
    ("linux", "exit 1", "no password for joe in the key ring"),
]


@pytest.mark.parametrize("system, does, found", KEY_RINGS)
def test_the_password_is_looked_up_in_the_key_ring(
    system: str, does: str, found: bytes | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, query = tmp_path / "secret-tool", "lookup host localhost service smtp user joe"
    if system == "darwin":
        tool, query = tmp_path / "security", "find-internet-password -s localhost -r smtp -a joe -g"
        does = f"cat >&2 << 'END'\n{does}\nEND"
    tool.write_text(f"#!/bin/sh\n[ \"$*\" = '{query}' ] || exit 9\n{does}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    password, reason = msmtpd.password_from_key_ring("joe")
    assert (password or reason) == found


def without_desktop() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("DBUS_SESSION_BUS_ADDRESS", "DISPLAY")}


@contextlib.contextmanager
def at_a_terminal(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run msmtpd with a controlling terminal: the process, and the terminal's other end."""
    master, slave = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
    control = functools.partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0)
    started = running(*RUN, *options, **streams, env=without_desktop(), start_new_session=True, preexec_fn=control)
    with started as process:
        os.close(slave)
        yield process, master
    os.close(master)


def read_until(descriptor: int, end: bytes) -> bytes:
    """Read what a program shows at its terminal up to these words, or without words up to its exit."""
    shown = b""
    while not end or not shown.endswith(end):
        assert select.select([descriptor], [], [], 20)[0], shown
        try:
            shown += os.read(descriptor, 4096)
        except OSError:  # nobody has the terminal open any more
            assert not end, shown
            break
    return shown


def test_the_password_is_asked_for_at_the_terminal(tmp_path: Path) -> None:
    port = free_port()
    with at_a_terminal(f"--port={port}", "--auth=joe", "--command=cat") as (process, terminal):
        read_until(terminal, b"Password for joe at msmtpd: ")
        os.write(terminal, b"my secret\n")
        assert codes(converse(("127.0.0.1", port), login_line("joe", "my secret")))[:3] == [220, 250, 235]
        process.terminate()
        assert process.wait(20) == 0
        assert b"secret" not in read_until(terminal, b"")


@pytest.mark.parametrize("typed", [b"\n", b"\x04", b"\x03"], ids=["empty", "end of file", "interrupt"])
def test_no_password_at_the_terminal_is_an_error(typed: bytes) -> None:
    with at_a_terminal("--port=1", "--auth=joe") as (process, terminal):
        read_until(terminal, b"Password for joe at msmtpd: ")
        wait_until(lambda: process_state(process.pid)[0] == "S")  # it reads: Python misses an interrupt just before
        os.write(terminal, typed)
        shown = read_until(terminal, b"")
        assert process.wait(20) == 3
        assert shown.count(b"msmtpd: ") == 1 and b"no password given" in shown


# Start-up errors

STARTUP_ERRORS = [  # options, what the one line says
    (["--bogus"], "unknown option '--bogus'; see --help"),
    (["--interface=\udcff"], "--interface needs an IPv4 or IPv6 address"),
    (["--auth=joe"], ", and no terminal to ask for a password; use --auth=joe,command"),
    (["--inetd", "--auth=joe"], ", and no terminal to ask for a password"),
    (["--in"], "option --in is ambiguous: --inetd, --interface"),
    (["--inetd", "--log=-"], "option --log=- would talk to the client; --log=stderr, syslog or a file will do"),
]


def run_program(*options: str, program: Sequence[str] = RUN, **more: Any) -> subprocess.CompletedProcess[str]:
    more = {"stdin": subprocess.DEVNULL, "timeout": 20, "start_new_session": True, **more}
    return subprocess.run([*program, *options], capture_output=True, text=True, check=False, **more)


@pytest.mark.parametrize("options, message", STARTUP_ERRORS)
def test_a_start_up_error_is_one_line_and_exit_status_3(options: list[str], message: str) -> None:
    result = run_program(*options)
    assert result.returncode == 3 and result.stdout == ""
    assert result.stderr.startswith("msmtpd: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_version_and_help() -> None:
    assert run_program("--version").stdout == f"msmtpd {msmtpd.__version__}\n"
    assert run_program("--help").stdout == msmtpd.HELP_TEXT
    with open("/dev/full", "wb") as full:
        result = subprocess.run([*RUN, "--help"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 3 and b"No space left" in result.stderr and result.stderr.count(b"\n") == 1


EXPOSED = [  # interface, --auth, the warning
    ("0.0.0.0", "", "listening on 0.0.0.0 port {}, which other machines may reach: whoever reaches it can send mail"),
    ("0.0.0.0", "joe", "listening on 0.0.0.0 port {}, which other machines may reach: passwords cross the network"),
    ("::ffff:127.0.0.1", "", ""),
    ("::1", "", ""),
    ("127.0.0.3", "", ""),
]


@pytest.mark.parametrize("host, auth, warning", EXPOSED)
def test_listening_beyond_loopback_is_warned_of(host: str, auth: str, warning: str) -> None:
    options = msmtpd.Options([f"--auth={auth}"] * bool(auth))
    with msmtpd.listening_socket(host, 0) as sock:
        said = msmtpd.exposure([sock], options)
        assert said.startswith(warning.format(sock.getsockname()[1])) and bool(said) == bool(warning)


@pytest.mark.parametrize("limit", range(4, 7))
def test_too_few_descriptors_to_start_are_one_line(limit: int) -> None:
    program = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", sys.executable, "-I", "-S", str(PROGRAM)]
    result = run_program("--port=2599", program=program)
    assert result.returncode == 3 and result.stderr.count("\n") == 1 and "msmtpd: cannot go on: " in result.stderr


SOCKET_COUNTS = {  # LISTEN_FDS, what the one line says
    "\u00b2": "this machine has no such address",  # a digit to Python, but not to int()
    "9" * 5000: "descriptor 3 is no socket: Bad file descriptor; unset LISTEN_FDS",
}


@pytest.mark.parametrize("count", SOCKET_COUNTS, ids=len)
def test_sockets_that_were_not_passed(count: str) -> None:
    program = f"import os; os.environ.update(LISTEN_FDS={count!r}, LISTEN_PID=str(os.getpid()))"
    program += f"; exec({PROGRAM.read_text()!r})"
    result = run_program("--interface=192.0.2.1", "--port=2599", program=[sys.executable, "-I", "-S", "-c", program])
    assert result.returncode == 3 and result.stderr.count("\n") == 1 and SOCKET_COUNTS[count] in result.stderr


def test_it_runs_under_any_name_and_leaves_no_trace(tmp_path: Path) -> None:
    copy = tmp_path / "mail server"
    copy.write_bytes(PROGRAM.read_bytes())
    copy.chmod(0o555)
    assert subprocess.check_output([str(copy), "--version"], cwd="/").startswith(b"msmtpd ")
    assert list(tmp_path.iterdir()) == [copy]


# Hostile addresses, through a process

# To a parser, but delivered where there is none:
ODD = ["o'brien@x", "a'b'c@x", "*@x", "?@x", "[a-z]@x", "{a,b}@x", "a~root#b@x", "a!b^c@x", "%F@x", "%s%n@x"]
ODD += ["a:b,c/d@x"]
HARMLESS = ["x=1@x", "a.b_c+d-e@x"]
HARMFUL = ["$(touch x)@b", "`touch x`@b", "a;touch x", "a;x@b", "a|tee@b", "a&x@b", "a>x@b", "a<x@b", "(x)@b"]
HARMFUL += ["$HOME@b", "${IFS}@b", '"a b"@c', 'a"b@c', "a b@c", "a\tb@c", "a\\b@c", "a\rb@c", "a\0b@c"]
HARMFUL += ["a\ntouch x", "a\r\ntouch x", "-oQ@x", "--", "--help", "-", "~root@x", "#x@b"]

CARRIERS = {  # commands with %F in every place; whether another shell parses it, so that they refuse ODD senders
    "bare": ("{record} -f %F --", False),
    "bare, for the shell": (": ; exec {record} -f %F --", False),
    "single quotes": ("{record} -f '%F' --", False),
    "double quotes": ('{record} -f "%F" --', False),
    "inside sh -c '...'": ("sh -c 'exec {record} -f %F -- \"$@\"' sh", True),
    'inside sh -c "..."': ('sh -c "exec {record} -f %F -- \\"\\$@\\"" sh', True),
}


def ask(stream: Any, line: str) -> bool:
    """Send a command, which may turn out as several lines; tell whether it was accepted."""
    octets = line.encode() + b"\r\n"
    stream.write(octets)
    stream.flush()
    replies = [stream.readline() for _ in range(octets.count(b"\n"))]
    assert all(re.match(rb"[235]\d\d ", reply) for reply in replies), replies
    return bool(replies[0][:1] in b"23")


@pytest.mark.parametrize("name", CARRIERS)
def test_a_hostile_address_is_refused_or_delivered_verbatim(name: str, box: Box, tmp_path: Path) -> None:
    command, reparsed = CARRIERS[name]
    directory, baits = tmp_path / "here", ["a@x", "b@x", "c@d", "x@b"]  # what a glob or a brace could find
    directory.mkdir()
    for bait in baits:
        (directory / bait).touch()
    here, there = socket.socketpair()
    here.settimeout(20)
    program = [*RUN, "--inetd", f"--command={command.format(record=box.record)}"]
    expected = []
    server = running(*program, stdin=there, stdout=there, cwd=directory, env=box.environment)
    with server, here, here.makefile("rwb") as stream:
        assert stream.readline()[:3] == b"220" and ask(stream, "HELO x")
        for address in HARMLESS + ODD + HARMFUL:
            allowed = address in HARMLESS or (address in ODD and not reparsed)
            as_sender = ask(stream, f"MAIL FROM:<{address}>") or not ask(stream, "MAIL FROM:<s@x>")
            as_recipient = ask(stream, f"RCPT TO:<{address}>")
            assert (as_sender, as_recipient) == (allowed, allowed), address
            assert ask(stream, "RCPT TO:<c@d>") and ask(stream, "DATA") and ask(stream, ".")
            expected.append(["-f", address if allowed else "s@x", "--", *[address] * allowed, "c@d"])
    assert [arguments for arguments, _ in box.mails()] == expected
    assert sorted(os.listdir(directory)) == baits


# ---- Inetd -----------------------------------------------------------------


def inetd(
    stdin: Any, stdout: Any, *options: str, stderr: Any = subprocess.PIPE, **more: Any
) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*RUN, "--inetd", *options], stdin=stdin, stdout=stdout, stderr=stderr, **more)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection: the client's, the server's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname(), timeout=20), server.accept()[0]


INETD_SESSIONS = [  # what the client sends, the replies, the exit status
    (MAIL + b"QUIT\r\n", [220, 250, 250, 250, 354, 250, 221], 0),
    (MAIL, [220, 250, 250, 250, 354, 250], 0),
    (MAIL[:-3], [220, 250, 250, 250, 354], 1),
    (b"EHLO x\r\nMAIL FROM:<a@b>\r\n", [220, 250, 250], 1),
    (b"", [220], 0),
    (b"NOOP", [220], 0),
    (b"GET / HTTP/1.1\r\n\r\n", [220], 1),
]


@pytest.mark.parametrize("octets, replies, status", INETD_SESSIONS)
@pytest.mark.parametrize("kind", ["socket", "TCP", "two sockets", "pipes", "file"])
def test_an_inetd_session(kind: str, octets: bytes, replies: list[int], status: int, box: Box, tmp_path: Path) -> None:
    options, environment = f"--command={box.command}", box.environment
    if kind in ("socket", "TCP", "two sockets"):
        writer, stdin = tcp_pair() if kind == "TCP" else socket.socketpair()
        reader, stdout = socket.socketpair() if kind == "two sockets" else (writer, stdin)  # as Node.js makes pipes
        with writer, reader:
            with stdin, stdout:
                process = inetd(stdin, stdout, options, env=environment)
            writer.sendall(octets)
            writer.shutdown(socket.SHUT_WR)
            output = read_all(reader)
        error = process.communicate()[1]
    elif kind == "pipes":
        process = inetd(subprocess.PIPE, subprocess.PIPE, options, env=environment)
        output, error = process.communicate(octets)
    else:
        (tmp_path / "dialogue").write_bytes(octets)
        with open(tmp_path / "dialogue", "rb") as dialogue, open(tmp_path / "replies", "wb") as said:
            process = inetd(dialogue, said, options, env=environment)
            error = process.communicate()[1]
        output = (tmp_path / "replies").read_bytes()
    assert (codes(output), process.returncode, error) == (replies, status, b"")
    assert box.mails() == [(["-f", "a@b", "--", "c@d"], CONTENT)] * replies[5:].count(250)
    received = "from x ([127.0.0.1])\n\tby [127.0.0.1] (" if kind == "TCP" else "from x\n\tby localhost ("
    assert all(received in mail.read_text() for mail in box.directory.glob("*.mail"))


NOISE = [  # options, what the client gets: replies and nothing else
    (("--command=echo noise; echo noise >&2; exit 1; :",), [220, 250, 250, 250, 354, 554]),
    (("--command=no-such-program",), [220, 250, 250, 250, 354, 451]),
    (("--log=stderr", "--command=cat > /dev/null; :"), [220, 250, 250, 250, 354, 250]),
    (("--log=/nowhere/log", "--command=cat > /dev/null; :"), [220, 250, 250, 250, 354, 250]),
    (("--bogus",), []),
    (("--auth=joe,echo noise >&2; exit 1",), []),
    (("--auth=joe",), []),
]


@pytest.mark.parametrize("options, replies", NOISE)
def test_nothing_but_smtp_is_written_where_descriptor_2_is_the_clients_socket(
    options: tuple[str, ...], replies: list[int]
) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(MAIL * bool(replies))
        ours.shutdown(socket.SHUT_WR)
        with theirs:
            process = inetd(theirs, theirs, *options, stderr=theirs, start_new_session=True)
        output = read_all(ours)
        assert all(re.match(rb"[2-5][0-9]{2}[ -]", line) for line in output.splitlines())
        assert codes(output) == replies and process.wait(20) == (0 if replies else 3)


def test_inetd_mode_on_a_listening_socket_is_a_start_up_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, inetd(server, server) as process:
        error = process.communicate()[1]
    assert process.returncode == 3 and error.count(b"\n") == 1
    assert error.startswith(b"msmtpd: descriptor 0 listens; --inetd needs nowait in inetd.conf")


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_socket_that_listens_is_told_from_others(family: int, tmp_path: Path) -> None:
    with socket.socket(family) as server, socket.socket(family) as client:
        server.bind(str(tmp_path / "socket") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            assert [msmtpd.listens(sock) for sock in (server, client, accepted)] == [True, False, False]
            client.sendall(b"x")
            client.close()
            assert not msmtpd.listens(accepted) and accepted.recv(9) == b"x" and not msmtpd.listens(accepted)


@pytest.mark.parametrize("identity", [True, False])
def test_descriptors_of_one_thing_are_told_from_those_of_two(identity: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where fstat(2) has no identity for pipes and sockets, as on the BSDs."""
    ends = [*os.pipe(), *(sock.detach() for sock in socket.socketpair())]
    copies = [os.dup(end) for end in ends]
    os.set_blocking(ends[3], False)
    flags = [os.get_blocking(end) for end in ends]
    with monkeypatch.context() as patch:
        if not identity:
            stat = os.fstat
            patch.setattr(os, "fstat", lambda one: os.stat_result((stat(one).st_mode, 0, 0, *stat(one)[3:])))
        for one, other in itertools.product(range(4), repeat=2):
            if {one, other} != {0, 1}:  # the ends of a pipe are one thing on some systems
                assert msmtpd.is_same(ends[one], copies[other]) == (one == other)
    assert flags == [os.get_blocking(end) for end in ends]
    for end in ends + copies:
        os.close(end)


def test_an_inetd_client_that_has_gone_before_the_start_leaves_no_traceback() -> None:
    client, accepted = tcp_pair()
    reset(client)
    with accepted, inetd(accepted, accepted) as process:
        assert (process.communicate()[1], process.wait(20)) == (b"", 1)


def test_an_inetd_session_on_a_terminal_leaves_it_as_it_was() -> None:
    master, slave = pty.openpty()
    process = inetd(slave, slave, stderr=slave)
    assert read_until(master, b"\n").startswith(b"220 localhost") and not os.get_blocking(slave)
    os.write(master, b"QUIT\n")
    read_until(master, b"221 2.0.0 Bye\r\r\n")  # as a terminal shows CR LF
    assert process.wait(20) == 0 and os.get_blocking(slave)
    os.close(master)
    os.close(slave)


def test_inetd_mode_delays_every_login() -> None:
    begun = time.monotonic()
    process = inetd(subprocess.PIPE, subprocess.PIPE, "--auth=joe,echo secret")
    output, _ = process.communicate(b"EHLO x\r\n" + JOE.encode() + b"\r\nQUIT\r\n")
    assert codes(output) == [220, 250, 235, 221] and time.monotonic() - begun >= 1


def test_a_signal_ends_an_inetd_session_with_a_word() -> None:
    process = inetd(subprocess.PIPE, subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == msmtpd.GREETING
    process.terminate()
    assert process.stdout.read() == msmtpd.SHUTTING_DOWN
    process.communicate()
    assert process.returncode == 1


# ---- Faults, load and limits: in process -----------------------------------
#
# A World is a server without its own time: the clock stands until the test
# sets it, the loop never waits, and clients sit on real sockets.


class World:
    """A server, its loop and its log in the hands of a test."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[str] = []
        self.held = HeldCommand()
        self.clients: list[Caller] = []
        self.loop = msmtpd.Loop(cast(Any, ImpatientPoll()), msmtpd.Log(cast(Any, self)), lambda: self.now)
        self.server = msmtpd.Server(self.loop, self.loop._log, msmtpd.Policy(), self.held, msmtpd.Throttle())
        self.listener = FickleSocket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(1024)
        self.address = self.listener.getsockname()
        self.server.listen([self.listener], lambda state: None)

    def write(self, level: str, text: str) -> None:
        """Be the sink of the log."""
        self.lines.append(f"{level}: {text}")

    def logged(self, text: str) -> int:
        return sum(text in line for line in self.lines)

    def turn(self, times: int = 5) -> None:
        for _ in range(times):
            self.server.turn()

    def wait(self, seconds: float) -> None:
        """Let time pass, all at once."""
        self.now += seconds
        self.turn()

    @property
    def idle(self) -> bool:
        """Whether the loop would wait, and not spin."""
        return not self.loop._poll.poll()

    def call(self, octets: bytes = b"") -> Caller:
        """Return a client whose session has begun, on a pair of sockets, and the replies to what it said are read."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.server.begin(ours.fileno(), ours.fileno(), ours, "127.0.0.1")
        return self._keep(Caller(self, theirs), octets)

    def deliver(self, command: str = "") -> tuple[Caller, msmtpd.Delivery]:
        """Return a client whose mail is in the hands of a command, and the delivery."""
        if command:
            self.server.queue.command = msmtpd.Command(command, os.environb)
        client = self.call(HELO + mail_to("c@d"))
        (delivery,) = self.server.queue.running
        return client, delivery

    def connect(self, octets: bytes = b"") -> Caller:
        """Return a client that may have to wait for its session."""
        return self._keep(Caller(self, socket.create_connection(self.address)), octets)

    def _keep(self, client: Caller, octets: bytes) -> Caller:
        self.clients.append(client)
        client.say(octets) if octets else self.turn()
        return client

    def hang_up(self) -> None:
        for client in self.clients:
            client.sock.close()
        self.turn()

    def reap(self, pid: int = 0) -> None:
        """Wait until a process has exited, and have that noticed as SIGCHLD would."""
        if pid:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self.server.queue.reap()
        self.turn()

    def exit(self, mail: int) -> None:
        """Let the held command of one mail exit."""
        os.write(self.held.writers[mail], b"\n")
        os.waitid(os.P_PID, self.held.pids[mail], os.WEXITED | os.WNOWAIT)

    def end(self, mail: int) -> None:
        self.exit(mail)
        self.reap()

    def close(self) -> None:
        """Leave no process and no descriptor behind."""
        self.hang_up()
        for pid in {*self.held.pids, *(delivery.pid for delivery in self.server.queue.running)} - {0}:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while (self.server.queue.running or self.server.connections) and time.monotonic() < deadline:
            self.server.queue.reap()
            self.wait(400)
        for writer in self.held.writers:
            os.close(writer)
        self.server.admission.close()


class ImpatientPoll:
    """Never waits, since the clock stands while it would."""

    def __init__(self) -> None:
        poll = select.poll()
        self.register, self.unregister = poll.register, poll.unregister
        self.poll = lambda timeout=0: poll.poll(0)


class FickleSocket(socket.socket):
    """A listening socket that fails to accept while `error` is set."""

    error = calls = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.calls += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return super().accept()


class HeldCommand(msmtpd.Command):
    """Stands in for Command: every process exits when the test says so."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.recipients: list[bytes] = []
        self.contents: list[bytes] = []  # of small mails
        self.writers: list[int] = []

    def start(self, sender: bytes, recipients: Sequence[bytes], stdin: int, output: int) -> int:
        reader, writer = os.pipe()
        self.pids.append(msmtpd.spawn([b"/bin/sh", b"-c", b"read line"], {}, reader, output))
        os.close(reader)
        self.writers.append(writer)
        self.recipients += recipients
        self.contents.append(os.read(stdin, 65536))
        return self.pids[-1]


class Caller:
    """A client in a World."""

    def __init__(self, world: World, sock: socket.socket) -> None:
        self.world = world
        self.sock = sock
        self.closed = False  # by the server
        sock.setblocking(False)

    def say(self, octets: bytes) -> list[int]:
        """Send, give the server some turns, and return the codes of its replies."""
        self.sock.sendall(octets)
        self.world.turn()
        return self.hear()

    def hear(self) -> list[int]:
        return codes(self.read())

    def read(self) -> bytes:
        octets = b""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := self.sock.recv(65536):
                octets += data
            self.closed = True
        return octets

    def pump(self, octets: bytes) -> int:
        """Send what the kernel takes, and return how much it took."""
        try:
            return self.sock.send(octets)
        except BlockingIOError:
            return 0

    def flood(self) -> int:
        """Send commands for as long as they are taken, reading no reply, and return how many octets were."""
        taken = 0
        for _ in range(200):
            taken += self.pump(b"HELP\r\n" * 20000)
            self.world.turn()
        return taken


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


HELO = b"HELO x\r\n"
ENVELOPE = b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"
DATA = HELO + ENVELOPE + b"DATA\r\n"
IN_DATA = [220, 250, 250, 250, 354]  # what DATA is answered with


def mail_to(recipient: str) -> bytes:
    return b"MAIL FROM:<a@b>\r\nRCPT TO:<%s>\r\nDATA\r\nx\r\n.\r\n" % recipient.encode()


# Admission


def test_tcp_options_are_set_where_there_are_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, socket.socket(socket.AF_UNIX) as other:
        msmtpd.set_tcp(sock, "TCP_NODELAY")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for pair in ((sock, "TCP_UNKNOWN"), (other, "TCP_NODELAY"), (None, "TCP_NODELAY")):
            msmtpd.set_tcp(*pair)


def test_what_gets_no_reply_is_acknowledged_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel does so 40 ms later, and a client's kernel sends the next small write only then (RFC 1122 4.2.3)."""
    calls: list[str] = []
    monkeypatch.setattr(msmtpd, "set_tcp", lambda sock, option: calls.append(option))
    client = world.call()
    assert calls == ["TCP_NODELAY"]
    unanswered = ("MAIL FR", "x\r\n", ".")  # but not the end of the mail, while its command runs
    pieces = ("EHLO x\r\n", "MAIL FR", "OM:<a@b>\r\nRCPT TO:<c@d>\r\nDA", "TA\r\n", "x\r\n", ".", "\r\n", "NOOP\r\nAU")
    for said in pieces:
        calls.clear()
        client.say(said.encode())
        assert calls == ["TCP_QUICKACK"] * (said in unanswered), said


def test_clients_beyond_the_limit_wait_and_are_served_in_their_order(world: World) -> None:
    world.server.admission.max_sessions = 4
    clients = [world.connect() for _ in range(7)]
    assert [client.hear() for client in clients] == [[220]] * 4 + [[]] * 3
    assert world.idle  # it does not spin while they wait
    for gone, served in ((2, 4), (0, 5), (4, 6)):
        assert clients[gone].say(b"QUIT\r\n") == [221]
        assert [clients.index(client) for client in clients[4:] if client.hear()] == [served]
    assert world.logged("all 4 sessions are taken") == 1 and len(world.server.connections) == 4
    world.hang_up()
    assert world.logged("no longer wait") == 0
    world.wait(msmtpd.CROWDED_TIMEOUT)
    assert world.logged("no longer wait") == 1 and not world.server.connections


USELESS = {  # what others say when they are greeted, and every 8.5 seconds: nothing that delivers a mail
    "silence": (b"", b""),
    "commands": (HELO, b"NOOP\r\n"),
    "recipients": (HELO + b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n"),
    "slow data": (DATA, b"x" * 1023),
    "fast data": (DATA, b"x" * 60_000),
    "logins": (HELO, b"AUTH PLAIN AGEAYg==\r\n"),
    "no end": (b"GET / HTTP/1.0\r\n", b""),
}


@pytest.mark.parametrize("first, again", USELESS.values(), ids=USELESS)
def test_a_new_client_is_served_within_15_seconds_whatever_others_do_that_delivers_no_mail(
    first: bytes, again: bytes, world: World
) -> None:
    world.server.policy = AUTH_POLICY if b"AUTH" in again else msmtpd.Policy()
    world.server.admission.max_sessions = 8
    others = [world.connect() for _ in range(8)]
    for _ in range(5):
        world.turn()
        real, began = world.connect(), world.now
        while not real.hear():
            assert world.now - began <= 15
            for other in others:
                other.pump(again if other.read() != msmtpd.GREETING else first)
            others = [other for other in others if not other.closed]
            others += [world.connect() for _ in range(9 - len(others))]  # they come again
            world.wait(8.5)
        assert real.say(HELO) == [250]
        real.sock.close()
    assert world.logged("further clients wait") <= 1


def test_the_session_that_has_gone_longest_without_a_mail_makes_room(world: World) -> None:
    world.server.admission.max_sessions = 5
    talks, sends, pool, waits, fresh = (world.connect() for _ in range(5))
    for recipient, client in enumerate((pool, waits, fresh)):
        client.say(HELO + mail_to(f"{recipient}@x"))
    sends.say(DATA + b"x" * 60_000)
    world.wait(0.1)
    world.end(0)
    world.wait(msmtpd.CROWDED_TIMEOUT - 1)
    world.end(2)
    world.wait(1)
    talks.say(HELO)
    for client in (pool, fresh):
        assert client.hear()[-1] == 250
    for leaves in (talks, pool, sends):
        assert world.connect().hear() == [220] and leaves.hear()[-1] == 421 and leaves.closed
    assert world.logged("has to make room for another") == 3
    last = world.connect()
    world.wait(msmtpd.CROWDED_TIMEOUT - 1.1)
    assert last.hear() == [] and world.logged("all 5 sessions are taken") == 1
    world.wait(1.1)
    assert last.hear() == [220] and fresh.hear() == [421] and not waits.closed
    world.end(1)
    assert waits.hear()[-1] == 250


def test_a_mail_that_comes_as_slowly_as_it_may_goes_on_until_another_client_waits(world: World) -> None:
    """A hundred MiB would hold its place for 12 days."""
    world.server.admission.max_sessions = 1
    slow = world.call(DATA)
    for _ in range(3600):
        slow.pump(b"x" * 103)
        world.wait(1)
    other, began = world.connect(), world.now
    while not other.hear():
        assert world.now < began + 15
        slow.pump(b"x" * 103)
        world.wait(1)
    assert slow.hear() == [421] and slow.closed


def test_clients_that_come_all_at_once_come_in_within_a_few_turns(world: World) -> None:
    clients = [Caller(world, socket.create_connection(world.address)) for _ in range(60)]
    world.turn(5)
    assert [client.hear() for client in clients] == [[220]] * 60


# Deadlines

PATIENCE = [  # what a client sends, then again every so many seconds, and when it is let go: within an hour, or not
    (b"", b"", 1, 300),
    (HELO, b"NOOP\r\n", 299, None),
    (HELO, b"NO", 99, 300),
    (DATA, b"x" * 1100, 10, None),
    (DATA, b"x" * 900, 10, 2410),
    (DATA, b"x", 10, 301),
    (DATA + b"x" * 60_000, b"", 10, 300),  # which is no credit for later
]


@pytest.mark.parametrize("first, again, pause, end", PATIENCE)
def test_complete_commands_are_progress_and_so_are_mail_data_at_a_kibibyte_in_ten_seconds(
    world: World, first: bytes, again: bytes, pause: int, end: int | None
) -> None:
    client, seconds, heard = world.call(first), 0, b""
    while not client.closed and seconds < 3600:
        seconds += 1
        world.wait(1)
        heard = client.read()
        if seconds % pause == 0:
            client.pump(again)
    if end is None:
        assert not client.closed
        return
    level = "warning" if first.startswith(DATA) else "info"
    assert (seconds, heard) == (end, msmtpd.TIMED_OUT) and not world.held.pids
    assert world.lines == [f"{level}: session 1 [127.0.0.1]: client timed out"]
    assert len(world.server.connections) == 1  # it has not closed
    world.wait(msmtpd.LINGER_TIMEOUT)
    assert not world.server.connections


# Clients that send too much or take too little


def test_a_client_that_takes_no_replies_is_not_read_from_and_let_go(world: World) -> None:
    client = world.call()
    assert client.flood() < 4_000_000 and client.pump(b"HELP") == 0
    (connection,) = world.server.connections
    assert len(connection._replies) <= msmtpd.REPLY_BUFFER + 1024
    assert len(connection._session._input) <= 2 * msmtpd.RECEIVE_SIZE
    assert world.call().say(HELO) == [220, 250]
    world.wait(msmtpd.IDLE_TIMEOUT)
    world.wait(msmtpd.FLUSH_TIMEOUT)
    assert connection not in world.server.connections


def test_replies_that_nobody_takes_fill_only_a_small_buffer_of_the_kernel(world: World) -> None:
    world.connect().flood()
    (connection,) = world.server.connections
    assert connection._sock is not None
    assert connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * msmtpd.REPLY_BUFFER


def test_a_client_that_takes_its_last_replies_slowly_gets_them_all(world: World) -> None:
    client = world.call()
    (connection,) = world.server.connections
    assert connection._sock is not None
    connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    began = world.now
    client.pump(HELO + b"HELP\r\n" * 700 + b"QUIT\r\n")
    world.turn(10)
    heard = b""
    while connection in world.server.connections:
        heard += client.sock.recv(65536)
        world.wait(10.0)  # it reads on in the last moment, each time
    assert world.now > began + 2 * msmtpd.FLUSH_TIMEOUT
    assert (heard + client.read()).endswith(msmtpd.HELP + msmtpd.BYE)


def test_a_flood_of_commands_stays_bounded_lets_others_have_their_turn_and_is_worked_off(world: World) -> None:
    """However much the client sends: one piece of input in memory, TURN_STEPS of work in a turn."""
    client, commands, sent, heard = world.call(HELO), b"NOOP\r\n" * 20000, 0, 0
    (connection,) = world.server.connections
    for _ in range(200):
        sent += client.pump(commands[sent % 6 :])
        world.turn(1)
        replies = client.hear()
        heard += len(replies)
        assert len(replies) <= 2 * msmtpd.TURN_STEPS  # one when it is read, one with the rest
        assert len(connection._session._input) <= 2 * msmtpd.RECEIVE_SIZE
    other = world.call()
    assert other.say(HELO + b"NOOP\r\n") == [220, 250, 250]
    for _ in range(sent // 6 // msmtpd.TURN_STEPS):
        world.turn(1)
        heard += len(client.hear())
    assert heard == sent // 6 > 10_000


@pytest.mark.parametrize("begin, octets", [(HELO, b"NOOP\r\n" * 10_000), (DATA, b"\r\n.." * 15_000)])
def test_a_turn_is_short_however_many_have_something_to_do(begin: bytes, octets: bytes, world: World) -> None:
    """What one may do in a turn is shared by a crowd: its steps, and the octets that are read."""
    clients = [world.call(begin) for _ in range(64)]
    for client in clients:
        client.pump(octets)
    world.turn(1)
    assert max(len(c._session._input) for c in world.server.connections) <= msmtpd.RECEIVE_SIZE // 4
    assert 0 < max(len(client.hear()) for client in clients) <= 2 * msmtpd.TURN_STEPS // 4 or begin == DATA


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_client_that_reads_late_gets_every_reply(world: World, pairs: int) -> None:
    """Its input must be worked off once it reads, though it sends nothing more that would wake us."""
    ours, theirs = zip(*(socket.socketpair() for _ in range(pairs)))
    for sock in ours:
        sock.setblocking(False)
    client, heard = Caller(world, theirs[-1]), b""
    connection = world.server.begin(ours[0].fileno(), ours[-1].fileno(), None, "")
    world.turn()
    assert world.idle  # nothing is watched that is ready all the time
    theirs[0].sendall(b"HELP\r\n" * 5000 + b"QUIT\r\n")
    world.turn(500)
    assert len(connection._replies) > msmtpd.REPLY_BUFFER and world.idle
    while connection in world.server.connections:
        heard += client.read()
        world.turn(1)
    assert heard + client.read() == msmtpd.GREETING + msmtpd.HELP * 5000 + msmtpd.BYE


@pytest.mark.parametrize("last", [b"QUIT\r\n", b"x" * 3000])
def test_a_session_that_has_ended_leaves_nothing_behind(world: World, last: bytes) -> None:
    """Nor does it take the garbage collector to find that out."""
    client, delivery = world.deliver()
    leftovers: list[Any] = [weakref.ref(delivery), weakref.ref(next(iter(world.server.connections)))]
    del delivery
    gc.disable()
    try:
        world.end(0)
        client.say(last)
        world.hang_up()
        assert [leftover() for leftover in leftovers] == [None, None]
    finally:
        gc.enable()


def test_a_client_that_floods_after_the_end_is_dropped(world: World) -> None:
    client = world.call(b"GET / HTTP/1.0\r\n")
    assert client.closed and len(world.server.connections) == 1
    for _ in range(50):
        client.pump(b"x" * 100000)
        world.turn(1)
    world.wait(2.1)
    assert not world.server.connections


@pytest.mark.parametrize("octets, lines", [(DATA + b"x", 1), (HELO + b"MAIL FROM:<a@b>\r\n", 1), (HELO, 0)])
def test_a_client_that_vanishes_in_the_middle_of_a_mail_is_logged(world: World, octets: bytes, lines: int) -> None:
    world.call().sock.sendall(octets)
    world.turn()
    world.hang_up()  # a reset, since it has not heard the replies
    assert not world.server.connections
    assert world.logged("client vanished in the middle of a mail") == len(world.lines) == lines


def test_a_client_that_talks_during_its_delivery_does_not_make_the_loop_spin(world: World) -> None:
    client, _ = world.deliver()
    assert client.say(b"NOOP\r\n") == [] and world.idle
    world.end(0)
    assert client.hear() == [250, 250]


# Authentication

WRONG_AUTH = b"AUTH PLAIN " + b64(b"\0joe\0wrong").encode() + b"\r\n"
RIGHT_AUTH = b"AUTH PLAIN " + b64(b"\0joe\0secret").encode() + b"\r\n"


def test_an_outcome_of_auth_that_is_held_back_delays_nobody_else(world: World) -> None:
    world.server.policy = AUTH_POLICY
    guesser, user, other = world.call(), world.call(), world.call()
    assert guesser.say(HELO + WRONG_AUTH) == [220, 250, 535]
    assert guesser.say(WRONG_AUTH + b"NOOP\r\n") == []
    assert user.say(HELO + RIGHT_AUTH + ENVELOPE) == [220, 250]
    world.wait(0.9)
    assert other.say(HELO + b"NOOP\r\n" * 3) == [220, 250, 250, 250, 250]
    assert guesser.hear() == user.hear() == []
    world.wait(0.2)
    assert guesser.hear() == [535, 250] and user.hear() == [235, 250, 250]


def test_a_pause_that_is_over_has_no_say_in_a_delivery(world: World) -> None:
    """Its deadline must not be taken for one of the delivery: the client would lose its reply."""
    world.server.policy = AUTH_POLICY
    guesser, user = world.call(HELO + WRONG_AUTH), world.call(HELO + RIGHT_AUTH)
    world.wait(1.1)
    assert user.say(mail_to("c@d")) == [235, 250, 250, 354]
    guesser.say(b"QUIT\r\n")  # sets the timer
    world.wait(5)
    world.wait(500)
    world.end(0)
    assert user.hear() == [250] and not user.closed


# Commands


@pytest.fixture
def one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msmtpd, "MAX_COMMANDS", 1)


def test_sixteen_commands_run_at_once_and_further_mails_wait_in_order(world: World) -> None:
    clients = [world.call(HELO + mail_to(f"r{number}@x")) for number in range(20)]
    assert len(world.server.queue.running) == len(world.held.pids) == msmtpd.MAX_COMMANDS == 16
    for mail in (5, 0, 15, 7):
        world.end(mail)
        assert clients[mail].hear() == [250]
    assert world.held.recipients == [f"r{number}@x".encode() for number in range(20)]
    for mail in sorted(set(range(20)) - {5, 0, 15, 7}):
        world.end(mail)
        assert clients[mail].hear() == [250]


def test_the_next_mail_of_a_session_waits_behind_those_of_others(world: World, one_command: None) -> None:
    world.call(HELO + mail_to("g1@x") + mail_to("g2@x"))
    world.call(HELO + mail_to("m@x"))
    for mail in range(3):
        world.end(mail)
    assert world.held.recipients == [b"g1@x", b"m@x", b"g2@x"]


@pytest.mark.parametrize("replies_read", [True, False])
def test_a_client_that_leaves_while_its_mail_waits_has_sent_it(
    world: World, one_command: None, replies_read: bool
) -> None:
    first, gone = world.call(HELO + mail_to("first@x")), world.call()
    gone.say(HELO + mail_to("gone@x")) if replies_read else gone.sock.sendall(HELO + mail_to("gone@x"))
    gone.sock.close()
    world.turn()
    assert len(world.server.connections) == 2  # its place is taken until the mail is through
    world.end(0)
    world.end(1)
    assert [content[-3:] for content in world.held.contents] == [b"\nx\n"] * 2
    assert len(world.server.connections) == 1
    assert world.held.recipients == [b"first@x", b"gone@x"] and first.hear() == [250]
    assert world.logged("to=<gone@x> count=1") == 1


def test_a_mail_whose_turn_does_not_come_in_time_is_answered_while_the_client_is_there(
    world: World, one_command: None
) -> None:
    first, second = world.call(HELO + mail_to("first@x")), world.call(HELO + mail_to("second@x"))
    world.wait(100)
    third = world.call(HELO + mail_to("third@x"))
    world.wait(msmtpd.QUEUE_TIMEOUT - 100 + 0.1)
    assert second.read() == b"451 4.3.0 No command was free in time\r\n" and third.hear() == []
    assert second.say(b"NOOP\r\n") == [250]
    world.end(0)
    assert first.hear() == [250] and len(world.held.pids) == 2
    world.wait(msmtpd.DELIVERY_TIMEOUT - msmtpd.QUEUE_TIMEOUT)  # for the third at least
    world.end(1)
    assert third.hear() == [250] and world.held.recipients == [b"first@x", b"third@x"]


KILLED_TWICE = [(600, signal.SIGTERM), (610, signal.SIGKILL), (610, signal.SIGKILL)]
LATE = {  # what a command does until its time is over, and the signals for it and what is left of its group
    "echo ready; sleep 1000 & sleep 1000; :": [(600, signal.SIGTERM), (600, signal.SIGKILL)],
    """trap '' TERM; sh -c 'trap "" TERM; echo ready; while :; do sleep 1; done' & wait; wait; :""": KILLED_TWICE,
    "sh -c 'kill -STOP $PPID; echo ready'; sleep 1000; :": KILLED_TWICE,
}


@pytest.mark.parametrize("command, expected", LATE.items(), ids=["two programs", "SIGTERM ignored", "stopped"])
def test_a_command_that_takes_too_long_is_ended_with_all_it_has_started(
    world: World, monkeypatch: pytest.MonkeyPatch, command: str, expected: list[tuple[float, int]]
) -> None:
    client, delivery = world.deliver(command)
    pid, began, kill = delivery.pid, world.now, os.killpg
    sent: list[tuple[float, int]] = []

    def ready() -> bool:
        world.turn()
        return delivery._output is not None and delivery._output.kept == b"ready\n"

    def killpg(group: int, number: int) -> None:
        sent.append((world.now - began, number))
        kill(group, number)

    wait_until(ready)
    monkeypatch.setattr(os, "killpg", killpg)
    while world.now < began + expected[-1][0]:
        world.wait(1)
    world.reap(pid)
    assert sent == expected
    assert client.read() == b"451-4.3.0 Command was still running 600 seconds after the mail\r\n451 4.3.0 ready\r\n"
    wait_until(lambda: not group_members(pid))


def test_the_reason_is_found_at_the_end_of_a_big_pipe(world: World) -> None:
    """A pipe has 16 pages, which are not of 4 KiB everywhere."""
    _, delivery = world.deliver()
    assert delivery._output is not None
    fcntl.fcntl(delivery._output.writer, 1031, msmtpd.MAX_PIPE)  # F_SETPIPE_SZ, which Python 3.9 does not name
    os.write(delivery._output.writer, b"x" * (msmtpd.MAX_PIPE - 12) + b"\nTHE REASON\n")
    world.exit(0)
    world.reap()
    assert world.logged("command said: THE REASON") == 1 and not world.server.queue.outputs.leftovers


LONG = "head -c 9000 /dev/zero | tr '\\0' x; echo"
SAID = [  # what a command does, the lines that the log has of it, those that the client gets
    ("echo queued as 4711; exit 0", ["queued as 4711"], []),
    ("echo THE CAUSE; seq 30; exit 65", ["THE CAUSE", *map(str, range(1, 31))], ["26", "27", "28", "29", "30"]),
    (f"echo THE CAUSE; {LONG}; exit 65", ["THE CAUSE", "x" * 512, "...", "x" * 512], ["...", "x" * 500]),
    (f"{LONG}; echo THE CAUSE; exit 65", ["x" * 512, "...", "x" * 512, "THE CAUSE"], ["x" * 500, "THE CAUSE"]),
]


@pytest.mark.parametrize("command, logged, replied", SAID, ids=["success", "source", "long source", "cause behind"])
def test_the_log_has_all_that_is_kept_of_the_output_and_the_reply_its_end(
    world: World, command: str, logged: list[str], replied: list[str]
) -> None:
    client, delivery = world.deliver(f"{command}; :")
    world.reap(delivery.pid)
    level = "error" if replied else "info"
    assert world.lines[-len(logged) :] == [f"{level}: session 1 [127.0.0.1]: command said: {line}" for line in logged]
    assert [line[10:] for line in client.read().decode().splitlines()][-len(replied) or 1 :] == replied


def test_every_recipient_is_in_the_log_on_as_many_lines_as_it_takes() -> None:
    envelope = msmtpd.Envelope(b"\xe9" * 254, True)
    envelope.recipients = [b"r%d@example.org" % i for i in range(900)]
    envelope.recipients += [b"%d" % i + b"\xe9" * 251 for i in range(100, 200)]
    first, *more = envelope.log_lines("size=1")
    assert re.fullmatch(r"mail from=<(\\xe9){254}> to=<r0@.*> count=1000 size=1", first)
    assert more and all(re.fullmatch("also to=<.*>", line) for line in more) and max(map(len, [first, *more])) < 2000
    found = re.findall(r"[=,]<([^>]*)>", first.partition("> to")[2] + "".join(more))
    assert found == [recipient.decode("latin-1").replace("\xe9", r"\xe9") for recipient in envelope.recipients]


def test_a_seventeenth_process_that_is_left_behind_is_warned_of(world: World) -> None:
    writers = []
    for _ in range(msmtpd.MAX_LEFTOVERS + 1):
        assert not world.lines
        output = msmtpd.Output(world.server.queue.outputs)
        writers.append(os.dup(output.writer))
        output.end()
    assert world.logged("warning: commands have left more than 16 processes behind that may print") == 1
    for writer in writers:
        os.close(writer)


@pytest.mark.parametrize("pause, most", [(15, 999), (0, 257)])
def test_a_process_that_is_left_behind_may_print_but_not_on_and_on(pause: int, most: int, world: World) -> None:
    """16 MiB an hour, beside what the command itself has printed."""
    output = msmtpd.Output(world.server.queue.outputs)
    writer, pieces = os.dup(output.writer), 0
    for _ in range(300):
        os.write(writer, bytes(65536))
        world.turn(1)
    output.end()
    while pieces < 999 and not world.lines:
        os.write(writer, bytes(65536))
        world.wait(pause)
        pieces += 1
    assert pieces == most
    assert world.logged("prints on and on, and is cut off; let them print to a file") == (pieces < 999)
    os.close(writer)


def test_process_1_buries_what_commands_leave_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no command: its exit status is ours to know."""
    client, delivery = world.deliver()
    orphans = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(2)]
    for pid in orphans:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    world.server.queue.reap()
    assert zombies(orphans) == orphans
    monkeypatch.setattr(os, "getpid", lambda: 1)
    world.server.queue.reap()
    assert zombies(orphans) == [] and delivery.pid
    world.end(0)
    assert client.hear() == [250]
    world.server.queue.reap()


@pytest.mark.parametrize("missing", ["pipe of the spool", "pipe of the output", "process"])
def test_a_command_that_cannot_be_started_is_tried_again_later(
    world: World, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    client, before, working = world.call(HELO), descriptors(), [True] * (missing == "pipe of the output")
    pipe, fail = os.pipe, fail_with(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
    with monkeypatch.context() as patch:
        if missing == "process":
            patch.setattr(world.held, "start", fail)
        else:
            patch.setattr(os, "pipe", lambda: pipe() if working and working.pop() else fail())
        client.sock.sendall(mail_to("c@d"))
        world.turn()
        reply = client.read()
    assert codes(reply) == [250, 250, 354, 451] and os.strerror(errno.EAGAIN).encode() in reply
    assert descriptors() == before and not world.server.queue.running
    assert world.logged("reply=451") == 1 and world.logged("unexpected") == 0
    client.say(mail_to("c@d"))
    world.end(0)
    assert client.hear() == [250]


# Resources


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EINVAL, errno.EPERM])
def test_a_server_that_cannot_accept_rests_and_recovers_with_one_line_each(world: World, number: int) -> None:
    """For want of descriptors or memory, or because the socket was shut down or is forbidden."""
    old = world.connect()
    world.listener.error = number
    client = world.connect()
    for _ in range(9):
        world.wait(1.01)
        assert old.say(b"NOOP\r\n")[-1] == 250
    world.turn(50)
    assert world.idle and world.listener.calls <= 15 and client.hear() == []
    assert world.logged("cannot accept clients for now") == 1
    world.listener.error = 0
    world.wait(1.01)
    assert client.hear() == [220] and world.logged("no longer wait") == 0
    world.wait(10)
    assert world.logged("no longer wait") == 1 and len(world.lines) == 2
    assert old.say(b"NOOP\r\n") == client.say(b"NOOP\r\n") == [250]


@pytest.mark.parametrize("number, make_room", [(errno.EMFILE, 3), (errno.EINVAL, 0)])
def test_idle_sessions_make_room_where_that_is_of_use(number: int, make_room: int, world: World) -> None:
    silent = [world.connect() for _ in range(3)]
    world.wait(10)
    world.listener.error = number
    world.connect()
    assert [client.hear()[1:] for client in silent].count([421]) == make_room


def test_a_client_that_has_gone_before_it_was_accepted_is_nothing(world: World) -> None:
    world.listener.error = errno.ECONNABORTED
    client = world.connect()
    world.listener.error = 0
    world.turn()
    assert client.hear() == [220] and not world.lines


# Exceptions that nobody expected


def fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


DELIBERATE = fail_with(ValueError("deliberate"))


def test_an_exception_in_a_session_costs_this_client_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(msmtpd.VERBS, b"HELP", (DELIBERATE, ()))
    client, other = world.call(HELO + ENVELOPE), world.call()
    client.sock.sendall(b"HELP\r\nNOOP\r\n")
    world.turn()
    assert client.read() == msmtpd.INTERNAL_ERROR and client.closed
    assert world.logged("error: unexpected ValueError: deliberate") == 1 and world.logged(f"error:   {__file__}:") == 1
    assert all("\n" not in line for line in world.lines)
    other.say(HELO + mail_to("c@d"))
    world.end(0)
    assert other.hear() == [250]
    client.sock.close()
    world.turn()
    assert len(world.server.connections) == 1


@pytest.mark.parametrize("name", ["start", "_spawn", "_judge", "_finish", "_log", "reap"])
def test_an_exception_in_a_delivery_costs_this_client_only(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The process is not forgotten either: no zombie, no descriptor, no place among the commands."""
    client, other = world.call(), world.call()
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(msmtpd.Delivery, name, DELIBERATE)
        heard = client.say(HELO + mail_to("c@d"))
        for mail in range(len(world.held.pids)):
            world.exit(mail)
        world.reap()
    assert (heard + client.hear())[-1] == 421 and world.logged("ValueError: deliberate") == 1
    other.say(HELO + mail_to("c@d"))
    world.end(-1)
    assert other.hear()[-1] == 250
    world.reap()
    assert not world.server.queue.running and descriptors() <= before + len(world.held.pids)
    assert world.logged("Command was ended after an internal error") == (name == "reap")
    assert not zombies(world.held.pids)


@pytest.mark.parametrize("name", ["_flush", "_watch", "_close"])
def test_an_exception_that_comes_again_while_the_session_is_ended(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The fault that ends a session may be in what ends sessions; the loop goes on."""
    client = world.call()
    (victim,) = world.server.connections
    monkeypatch.setattr(victim, name, DELIBERATE)
    client.sock.sendall(HELO + b"QUIT\r\n")
    world.turn()
    assert world.logged("ValueError: deliberate") >= 1
    assert world.call().say(HELO) == [220, 250]
    client.sock.close()
    world.wait(301)
    assert victim not in world.server.connections


def test_a_log_that_fails_in_an_unexpected_way_stops_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "write", DELIBERATE)
    world.call(b"GET / HTTP/1.0\r\n")
    assert world.call().say(HELO) == [220, 250]


# Stop


def test_a_stop_ends_idle_sessions_and_accepts_nothing_more(world: World) -> None:
    fresh, greeted, asked = world.connect(), world.connect(HELO), world.call()
    world.server.stop()
    assert fresh.read() == msmtpd.GREETING + msmtpd.SHUTTING_DOWN
    assert greeted.hear() == [421] and asked.hear() == [220, 421]
    with pytest.raises(ConnectionRefusedError):
        world.connect()
    world.hang_up()
    world.server.run()


def test_a_stop_does_not_wait_for_a_client_that_takes_no_replies(world: World) -> None:
    world.call().flood()
    world.server.stop()
    world.wait(msmtpd.FLUSH_TIMEOUT)
    assert not world.server.connections


STOPPED = [  # what is said before the stop, after it, the codes of the replies then, and to the mail
    (HELO + b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n", [250, 354], [250, 421]),
    (HELO + ENVELOPE, b"DATA\r\nx\r\n.\r\n", [354], [250, 421]),
    (DATA + b"x", b"y\r\n.\r\n", [], [250, 421]),
    (HELO + ENVELOPE + b"DA", b"TA\r\n.\r\n", [354], [250, 421]),
    (HELO + ENVELOPE, b"RSET\r\n", [250, 421], []),
]


@pytest.mark.parametrize("before, after, replies, outcome", STOPPED)
def test_a_stop_lets_a_transaction_come_to_its_end(
    world: World, before: bytes, after: bytes, replies: list[int], outcome: list[int]
) -> None:
    client = world.call(before)
    (connection,) = world.server.connections
    world.server.stop()
    world.turn()
    world.wait(30)
    assert client.say(after + mail_to("next@x")) == replies
    for mail in range(len(world.held.pids)):
        world.end(mail)
    assert client.hear() == outcome and world.held.recipients == [b"c@d"] * bool(outcome)
    assert not connection.orderly
    world.hang_up()
    world.server.run()


def test_a_stop_waits_for_deliveries_that_run_and_for_those_that_wait(world: World, one_command: None) -> None:
    clients = [world.call(HELO + mail_to(f"r{number}@x")) for number in range(3)]
    clients[2].sock.close()
    world.server.stop()
    world.wait(200)  # far beyond the grace for open transactions
    for mail in range(3):
        assert len(world.server.queue.running) == 1
        world.end(mail)
    assert [client.hear() for client in clients[:2]] == [[250, 421]] * 2
    world.hang_up()
    world.server.run()


def test_a_stop_ends_open_transactions_after_a_minute(world: World) -> None:
    client = world.call(DATA + b"x")
    world.call().say(DATA)
    world.server.stop()
    world.wait(59.9)
    assert client.hear() == []
    world.wait(0.2)
    assert client.read() == msmtpd.SHUTTING_DOWN
    world.wait(2.1)
    world.server.run()
    assert not world.held.pids


def test_a_stop_during_a_pause_gives_the_outcome_first(world: World) -> None:
    world.server.policy = AUTH_POLICY
    client = world.call()
    assert client.say(HELO + WRONG_AUTH + WRONG_AUTH) == [220, 250, 535]
    world.server.stop()
    world.wait(1.1)
    assert client.hear() == [535, 421]


def test_a_second_stop_ends_at_once_but_answers_a_mail_that_has_been_delivered(world: World) -> None:
    client, other = world.call(HELO + mail_to("c@d")), world.call(HELO + mail_to("c@d"))
    world.server.stop()
    world.exit(0)
    world.server.queue.reap()
    world.server.stop()
    with pytest.raises(SystemExit) as end:
        world.turn()
    assert end.value.code == 1 and world.logged("second signal, ending at once") == 1
    assert client.hear() == [250, 421] and other.hear() == []
    world.server.stopping = 1


# ---- Faults, load and limits: as processes ---------------------------------


@contextlib.contextmanager
def limited(daemon: Daemon, what: int, value: int) -> Iterator[None]:
    """Set a resource limit of a running server for a while."""
    proc(daemon.process.pid)  # prlimit(2) is Linux's, too
    soft, hard = resource.prlimit(daemon.process.pid, what)
    resource.prlimit(daemon.process.pid, what, (value, hard))
    yield
    resource.prlimit(daemon.process.pid, what, (soft, hard))


def descriptors() -> int:
    gc.collect()  # other tests' sockets
    return len(os.listdir(proc() / "fd"))


def process_state(pid: int) -> tuple[str, int]:
    """Return a process's state and group, an empty state if it has gone."""
    try:
        fields = (proc(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[2])


def zombies(pids: list[int]) -> list[int]:
    return [pid for pid in pids if process_state(pid)[0] == "Z"]


def group_members(group: int) -> list[int]:
    """Return the processes of a group that are alive."""
    pids = [int(name) for name in os.listdir(proc().parent) if name.isdigit()]
    return [pid for pid in pids if process_state(pid)[1] == group and not zombies([pid])]


def big_mail(octets: int) -> bytes:
    return DATA + b"0123456789abcdef\r\n" * (octets // 18) + b".\r\n"


def reset(sock: socket.socket) -> None:
    """Close so that the other side sees a reset connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def idle_descriptors(daemon: Daemon) -> int:
    """Return how many descriptors a server has that has served a session, and has none now."""
    daemon.talk(b"NOOP\r\nQUIT\r\n")
    directory = proc(daemon.process.pid) / "fd"
    wait_until(lambda: sum(os.readlink(path).startswith("socket:") for path in directory.iterdir()) == 1)
    return daemon.descriptors()


def test_a_server_at_rest_has_the_descriptors_that_it_needs(start: Start) -> None:
    needed = ("input", "output", "error", "listener", "reader of signals", "writer of signals")
    assert idle_descriptors(start()) == len(needed)


def quiet(daemon: Daemon) -> None:
    """Wait until a server has no child."""
    wait_until(lambda: not daemon.children())


def test_a_log_on_a_full_disk_never_disturbs_mail(start: Start) -> None:
    daemon = start("--log=/dev/full", "--command=cat > /dev/null; :")
    assert codes(daemon.talk(MAIL + b"GET / HTTP/1.0\r\n"))[-1] == 250
    daemon.process.send_signal(signal.SIGHUP)
    assert codes(daemon.talk(MAIL))[-1] == 250 and daemon.stop() == 0


def test_a_log_that_has_moved_is_opened_anew_by_sighup(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "log"
    daemon = start(f"--log={log}")
    log.rename(log.with_suffix(".old"))
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(log.exists)


# Descriptors, processes


def test_more_clients_than_descriptors(start: Start, box: Box) -> None:
    """They wait, in the dark about it; all is well again when they have gone."""
    daemon = start(f"--command={box.command}", environment=box.environment)
    before = idle_descriptors(daemon)
    with limited(daemon, resource.RLIMIT_NOFILE, before + 10):
        clients = [daemon.connect() for _ in range(40)]
        wait_until(lambda: "cannot accept clients for now: Too many open files" in daemon.log())
        clients[0].sendall(big_mail(100_000) + MAIL)
        replies = b""
        while len(codes(replies)) < 11:
            replies += clients[0].recv(65536)
        assert [code for code in codes(replies) if code >= 400] == [452, 451]
        for client in clients[1:]:
            client.close()
        wait_until(lambda: daemon.descriptors() == before + 1)
        clients[0].sendall(MAIL)
        wait_until(lambda: len(box.mails()) == 1)
        clients[0].close()
    assert codes(daemon.talk(MAIL))[-1] == 250
    quiet(daemon)
    wait_until(lambda: daemon.descriptors() == before)
    assert daemon.log().count("cannot accept clients") <= 5 and "unexpected" not in daemon.log()
    assert daemon.stop() == 0


def test_where_descriptors_are_few_there_are_fewer_sessions(start: Start) -> None:
    """Else silent clients would take all the descriptors, and be met with the long patience."""
    few = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (128, 128))
    daemon = start("--command=cat > /dev/null; :", preexec_fn=few)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(daemon.connect())
        first.sendall(HELO)
        for _ in range(100):
            stack.enter_context(daemon.connect()).sendall(big_mail(100_000)[:80_000])
        wait_until(lambda: "sessions are taken, further clients wait" in daemon.log())
        first.sendall(MAIL + big_mail(100_000) + b"QUIT\r\n")
        assert codes(read_all(first)) == [220, 250, 250, 250, 250, 354, 250, 250, 250, 250, 354, 250, 221]
    assert "cannot" not in daemon.log()


def test_a_client_authenticates_while_there_are_no_descriptors(start: Start) -> None:
    """What only some sessions need may be imported late, but not when it can fail."""
    daemon = start("--command=cat > /dev/null; :", "--auth=joe,echo secret")
    with contextlib.ExitStack() as stack, limited(daemon, resource.RLIMIT_NOFILE, idle_descriptors(daemon) + 8):
        clients = [stack.enter_context(daemon.connect()) for _ in range(30)]
        wait_until(lambda: "cannot accept clients for now" in daemon.log())
        clients[0].sendall(b"EHLO x\r\nAUTH PLAIN AGpvZQBzZWNyZXQ=\r\nQUIT\r\n")
        assert codes(read_all(clients[0])) == [220, 250, 235, 221]
        clients[1].sendall(b"EHLO x\r\nAUTH CRAM-MD5\r\n*\r\nAUTH SCRAM-SHA-256 biwsbj1qb2Uscj1h\r\n*\r\nQUIT\r\n")
        assert codes(read_all(clients[1])) == [220, 250, 334, 501, 334, 501, 221]
    assert daemon.process.poll() is None
    assert codes(daemon.talk(b"QUIT\r\n")) == [220, 221] and "unexpected" not in daemon.log()


# Commands

HUNDRED_MEGABYTES = "head -c 100000000 /dev/zero | tr '\\0' x; head -c 100000000 /dev/zero | tr '\\0' y >&2"
ODD_COMMANDS = {  # what the client is told
    "kill -9 $$; :": "Command was ended by signal 9",
    "sh -c 'kill -9 $$'; exit $?; :": "Command was ended by signal 9",
    "/nonexistent/program": "(exit status 127)",
    "nonexistent-program -x": "Command, or a program in it, could not be run (exit status 127)",
    "/etc/passwd": "(exit status 126)",
    "sleep 10 & echo left; exit 65; :": "554 5.3.0 left",
    "echo too bad; exit 65; :": "554 5.3.0 too bad",  # without reading its input
    f"{HUNDRED_MEGABYTES}; echo; echo last words; exit 65; :": "554 5.3.0 last words",
    "exec < /dev/null > /dev/null 2> /dev/null; exit 75; :": "(EX_TEMPFAIL)",
    "true": "250 2.0.0 Ok, mail was piped",
    "echo 550 nonsense; echo 421 >&2; :": "250 2.0.0 Ok, mail was piped",
    "exec <&-; sleep 0.1; :": "250 2.0.0 Ok, mail was piped",
    "read line; :": "250 2.0.0 Ok, mail was piped",
    "sleep 10 & :": "250 2.0.0 Ok, mail was piped",
    "setsid sleep 10 & :": "250 2.0.0 Ok, mail was piped",
    f"{HUNDRED_MEGABYTES}; :": "250 2.0.0 Ok, mail was piped",
}


@pytest.mark.parametrize("command", ODD_COMMANDS)
def test_a_command_may_be_odd(start: Start, command: str) -> None:
    """However big the mail is, whatever is printed and left behind: a reply at once, and no zombie."""
    daemon, began = start(f"--command={command}"), time.monotonic()
    replies = daemon.talk(big_mail(5_000_000) + b"NOOP\r\nQUIT\r\n")
    assert codes(replies)[:5] == IN_DATA and codes(replies)[6:] == [250, 221]
    assert ODD_COMMANDS[command].encode() in replies and (codes(replies)[5] != 250 or replies.count(b"\n") == 8)
    assert max(map(len, replies.splitlines(True))) <= 512 and daemon.children() == []
    peak = re.findall(r"VmHWM:\s+(\d+)", (proc(daemon.process.pid) / "status").read_text())  # of its memory, in KiB
    assert int(peak[0]) < 40_000
    assert daemon.stop() == 0 and time.monotonic() - began < 8


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)
    read_all(sock)
    sock.close()


@pytest.mark.parametrize("leave", [reset, socket.socket.close, half_close])
def test_a_client_that_vanishes_at_any_octet_leaves_nothing_behind(
    start: Start, box: Box, leave: Callable[[socket.socket], None]
) -> None:
    """Half a mail is never delivered; a whole one is, unless the reset has overtaken it."""
    spool = box.directory / "spool"
    spool.mkdir()
    daemon = start(f"--command={box.command}", environment={**box.environment, "TMPDIR": str(spool)})
    before = idle_descriptors(daemon)
    octets = MAIL.replace(b"hello", b"h" * 40_000) + b"QUIT\r\n"
    end = octets.index(b"\r\n.\r\n") + 5
    body = range(octets.index(b"hhh") + 10, end - 10)
    for place in [n for n in range(len(octets) + 1) if n not in body or n % 8000 == 0]:
        sock = daemon.connect()
        sock.sendall(octets[:place])
        leave(sock)
    assert codes(daemon.talk(MAIL.replace(b"c@d", b"last@x")))[-1] == 250
    quiet(daemon)
    wait_until(lambda: daemon.descriptors() == before)
    whole = len(octets) + 1 - end
    delivered = [arguments[-1] for arguments, _ in box.mails()]
    assert delivered.count("last@x") == 1 and len(delivered) <= whole + 1
    assert leave is reset or len(delivered) == whole + 1
    assert os.listdir(spool) == [] and daemon.stop() == 0
    assert "unexpected" not in daemon.log()


# ---- Exactness: what becomes of a mail when something dies -----------------

GATED = r"""#!/bin/sh
# Takes the mail, waits at the gate and ends as the test has written there.
printf '%s\0' "$@" > "$MAILS/$$.argv"
cat > "$MAILS/$$.part"
: > "$MAILS/$$.running"
: < "$MAILS/gate"
read status < "$MAILS/status"
[ "$status" = 0 ] && mv "$MAILS/$$.part" "$MAILS/$$.mail"
exit "$status"
"""
REST_OF_MAIL = b"lo\r\n.\r\n"


class Stage:
    """A server whose commands wait at a gate, and a client in the middle of a mail."""

    def __init__(self, start: Start, box: Box) -> None:
        self.box, self.spool = box, box.directory / "spool"
        self.spool.mkdir()
        box.record.write_text(GATED)
        os.mkfifo(box.directory / "gate")
        self.daemon = start(f"--command={box.record}", environment={**box.environment, "TMPDIR": str(self.spool)})
        self.client = self.daemon.connect()
        self._others: list[socket.socket] = []
        self._gate = -1

    def reach(self, phase: str) -> None:
        """Bring the client's mail into a phase: its session is idle, it is in the data, waiting or running."""
        if phase == "waiting":
            self._others = [self.daemon.connect() for _ in range(msmtpd.MAX_COMMANDS)]
        for other in self._others:
            other.sendall(MAIL)
        self.await_running(len(self._others))
        self.client.sendall(HELO if phase == "idle" else DATA)
        heard = b""
        while not heard.endswith(msmtpd.HELO_OK if phase == "idle" else msmtpd.START_MAIL):
            heard += self.client.recv(65536)
        if phase != "idle":
            self.client.sendall(b"Subject: test\r\n\r\nhel")
        if phase in ("waiting", "running"):
            self.client.sendall(REST_OF_MAIL)
            self.await_running(len(self._others) or 1)
            self.daemon.talk(b"QUIT\r\n")  # the dot has been read when this is answered

    def await_running(self, number: int) -> None:
        wait_until(lambda: len(list(self.box.directory.glob("*.running"))) == number)

    def suffer(self, event: str, phase: str) -> None:
        process = self.daemon.process
        if event == "the client vanishes":
            reset(self.client)
        elif event == "the client leaves":
            self.client.shutdown(socket.SHUT_RD)
            self.client.close()
        elif event == "the command is killed":
            os.kill(self.daemon.children()[0], signal.SIGKILL)
        elif event == "the command is removed":
            self.box.record.unlink()
        elif event == "the disk is full":
            with limited(self.daemon, resource.RLIMIT_FSIZE, 50_000):
                self.client.sendall(b"x\r\n" * 70_000 + REST_OF_MAIL)
                wait_until(lambda: "Cannot store the mail" in self.daemon.log())
        elif event == "SIGKILL":
            process.kill()
            process.wait()
        elif event.startswith("SIGTERM"):
            process.terminate()
            wait_until(lambda: "stopping, 1 sessions" in self.daemon.log())
            if event == "SIGTERM twice":
                process.terminate()
                assert process.wait(10) == 1
        if (phase, event) in (("data", "SIGTERM"), ("data", "the command is removed")):
            self.client.sendall(REST_OF_MAIL)

    def open_gate(self, status: int) -> None:
        """Let the commands end, those to come too."""
        (self.box.directory / "status").write_text(f"{status}\n")
        self._gate = os.open(self.box.directory / "gate", os.O_RDWR)

    def last_code(self) -> int:
        """Return the code of the last reply but a 421 behind it; 0 if there is none."""
        try:
            self.client.shutdown(socket.SHUT_WR)
            return [*codes(read_all(self.client)), 0][0]
        except OSError:
            return 0

    def delivered(self, expected: int) -> int:
        """Return how many mails were delivered, once these were and every command that began has ended."""
        wait_until(lambda: len(self.box.mails()) >= expected)
        pids = [int(path.stem) for path in self.box.directory.glob("*.running")]
        wait_until(lambda: all(process_state(pid)[0] in ("", "Z") for pid in pids))
        return len(self.box.mails())

    def close(self) -> None:
        if self._gate < 0:
            self.open_gate(75)
        os.close(self._gate)
        for client in (self.client, *self._others):
            client.close()


@pytest.fixture
def stage(start: Start, box: Box) -> Iterator[Stage]:
    stage = Stage(start, box)
    yield stage
    stage.close()


KILLED = "msmtpd is killed by SIGKILL, crashes or is told twice to stop"
EXACTNESS = [  # entry of WHAT BECOMES OF A MAIL, phase and event, exit status; the code of the last reply, deliveries
    ("The client leaves, stalls or dies before the end of its mail", "data", "the client vanishes", 0, 0, 0),
    ("The client dies after the end of its mail", "waiting", "the client leaves", 0, 0, 17),
    ("The client dies after the end of its mail", "running", "the client vanishes", 0, 0, 1),
    ("The command exits with 0, but the reply does not reach the client", "running", "the client leaves", 0, 0, 1),
    ("The command fails", "running", "the command refuses", 65, 554, 0),
    ("The command fails", "running", "the command fails for now", 75, 451, 0),
    ("The command is killed, or takes too long", "running", "the command is killed", 0, 451, 0),
    ("The command cannot be started", "data", "the command is removed", 0, 451, 0),
    ("The disk with the spool is full or cannot be written to", "data", "the disk is full", 0, 452, 0),
    (KILLED, "data", "SIGKILL", 0, 0, 0),
    (KILLED, "waiting", "SIGKILL", 0, 0, 16),
    (KILLED, "running", "SIGKILL", 0, 0, 1),
    ("msmtpd is told to stop", "idle", "SIGTERM", 0, 421, 0),
    ("msmtpd is told to stop", "data", "SIGTERM", 0, 250, 1),
    ("msmtpd is told to stop", "running", "SIGTERM", 0, 250, 1),
    (KILLED, "data", "SIGTERM twice", 0, 0, 0),
    (KILLED, "running", "SIGTERM twice", 0, 0, 1),
]

# Entries whose tests stand elsewhere, and one for which a machine would have to go down.
TESTED_ELSEWHERE = {
    "The mail is over the size limit": "test_a_mail_over_the_limit_is_refused_behind_its_end_and_the_session_goes_on",
    "Something unexpected happens inside msmtpd": "test_an_exception_in_a_session_costs_this_client_only",
    "The log cannot be written to": "test_a_log_on_a_full_disk_never_disturbs_mail",
    "The machine goes down": "test_exactness",
}


@pytest.mark.parametrize("phase, event, status, code, deliveries", [row[1:] for row in EXACTNESS])
def test_exactness(stage: Stage, phase: str, event: str, status: int, code: int, deliveries: int) -> None:
    stage.reach(phase)
    stage.suffer(event, phase)
    stage.open_gate(status)
    assert (stage.last_code(), stage.delivered(deliveries)) == (code, deliveries)
    assert {content for _, content in stage.box.mails()} <= {CONTENT}
    assert os.listdir(stage.spool) == []
    if event == "SIGTERM":
        assert stage.daemon.process.wait(10) == 0
    elif stage.daemon.process.poll() is None:
        quiet(stage.daemon)
        assert codes(stage.daemon.talk(b"NOOP\r\nQUIT\r\n")) == [220, 250, 221]


# ---- Documents -------------------------------------------------------------
#
# --help, manual page and README say the same, and it is true.

ROOT = Path(__file__).resolve().parent
MANUAL = (ROOT / "man/msmtpd.1").read_text()
README = (ROOT / "README.md").read_text()


# Reading the documents


def plain(mdoc: str) -> str:
    """Undo the escapes of mdoc."""
    escapes = {r"\-": "-", r"\(aq": "'", r"\(ga": "`", r"\(ti": "~", r"\(ha": "^", r"\(dq": '"', r"\&": "", r"\e": "\\"}
    return re.sub(r"\\(?:\(..|.)", lambda match: escapes[match[0]], mdoc)


def section(title: str) -> str:
    found = re.search(rf"^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)", MANUAL, re.M | re.S)
    assert found, title
    return found[1]


def rows(mdoc: str) -> list[list[str]]:
    """Return the cells of the .Bl -column lists."""
    cells = [line[4:].split(" Ta ") for line in mdoc.splitlines() if line.startswith(".It ") and " Ta " in line]
    return [[plain(re.sub(r"\b(Fl|Sx|Er|Em) ", "", cell)) for cell in row] for row in cells]


def option_entry(name: str) -> str:
    """Return what the manual page says on an option."""
    found = re.search(rf"^\.It Fl -{name}\b.*?(?=^\.It |^\.El)", MANUAL, re.M | re.S)
    assert found, name
    return plain(found[0])


def examples(document: str) -> list[str]:
    """Return the literal blocks of the manual page or the README."""
    if document is MANUAL:
        return [plain(block) for block in re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", document, re.M | re.S)]
    return re.findall(r"^```sh\n(.*?)^```", document, re.M | re.S)


def msmtpd_arguments(line: str) -> list[str] | None:
    """Return what a line gives to msmtpd: from a shell, inetd.conf, a unit or a container file."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None  # a line of a program or a configuration file
    words = [word.strip("[],") for word in words]
    if words[:1] in (["cp"], ["install"], ["check"]):  # the last is monit's
        return None
    places = [i for i, word in enumerate(words) if re.search(r"(^|[/=])msmtpd(\.py)?$", word) and "--label" not in word]
    if not places:
        return None
    arguments = words[places[-1] + 1 :]
    return arguments[1:] if arguments[:1] == ["--"] else arguments  # behind start-stop-daemon's


def command_lines(document: str) -> list[list[str]]:
    """Return the arguments of every msmtpd in the examples, log lines aside."""
    blocks = [block for block in examples(document) if "msmtpd[" not in block]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [arguments for line in lines if (arguments := msmtpd_arguments(line)) is not None]


# Options


def test_help_fits_a_terminal() -> None:
    lines = msmtpd.HELP_TEXT.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


def test_help_manual_and_program_have_the_same_options() -> None:
    options = sorted(msmtpd.OPTIONS)
    assert sorted(re.findall(r"^  --([a-z-]+)", msmtpd.HELP_TEXT, re.M)) == options
    assert sorted(re.findall(r"^\.It Fl -([a-z-]+)", section("DESCRIPTION"), re.M)) == options
    mentioned = set(re.findall(r"\bFl -([a-z-]+)", MANUAL)) - {"exec", "startas"}  # start-stop-daemon's
    assert mentioned == set(msmtpd.OPTIONS)
    for name in options:
        heading = option_entry(name).splitlines()[0]
        assert ("Ns = Ns" in heading) == (f"--{name}=" in msmtpd.HELP_TEXT) == (name not in msmtpd.FLAGS)


@pytest.mark.parametrize("name", ["interface", "port", "log", "command", "max-size"])
def test_defaults(name: str) -> None:
    options = msmtpd.Options([])
    value = options.interfaces[0] if name == "interface" else str(getattr(options, name.replace("-", "_")))
    assert re.search(rf"The default is (\.\w\w )?{re.escape(value)}[ .]", " ".join(option_entry(name).split()))
    entry = re.split(r"\n  --", msmtpd.HELP_TEXT.partition(f"--{name}=")[2])[0]
    assert f"default {value}" in " ".join(entry.split())


# Limits and outcomes


def test_what_becomes_of_a_mail_is_tested_entry_by_entry() -> None:
    entries = re.findall(r"^\.It (.*)", section("WHAT BECOMES OF A MAIL"), re.M)
    assert {row[0] for row in EXACTNESS} | set(TESTED_ELSEWHERE) == set(entries)
    assert set(TESTED_ELSEWHERE.values()) <= set(globals())


LIMITS = [  # in the order of the manual page, with words of its text
    (msmtpd.MAX_SESSIONS, "sessions at once"),
    (msmtpd.BACKLOG, "clients that wait"),
    (msmtpd.MAX_COMMANDS, "commands running at once"),
    (msmtpd.MAX_LEFTOVERS, "processes that commands have left behind"),
    (msmtpd.LEFTOVER_OUTPUT, "of what one of them prints in an hour"),
    (msmtpd.MAX_MAIL_SIZE, "octets in a mail"),
    (msmtpd.MAX_RECIPIENTS, "recipients"),
    (msmtpd.MAX_HOPS, "times that a mail"),
    (msmtpd.MAX_ADDRESS, "octets in an address"),
    (msmtpd.MAX_COMMAND_LINE, "octets in a command line"),
    (msmtpd.MAX_AUTH_LINE, "octets in a line of AUTH"),
    (msmtpd.MAX_ERRORS, "negative replies"),
    (msmtpd.MAX_AUTH_FAILURES, "failed authentications before"),
    (msmtpd.IDLE_TIMEOUT, "seconds without progress before"),
    (msmtpd.CROWDED_TIMEOUT, "without delivering a mail, where others wait"),
    (msmtpd.DATA_SECONDS_PER_OCTET * 1024, "seconds that a KiB"),
    (msmtpd.QUEUE_TIMEOUT, "for its turn to come"),
    (msmtpd.DELIVERY_TIMEOUT, "seconds from the end of a mail"),
    (msmtpd.KILL_DELAY, "SIGTERM to its SIGKILL"),
    (msmtpd.FLUSH_TIMEOUT, "go on taking its last replies"),
    (msmtpd.STOP_TIMEOUT, "open transactions"),
    (msmtpd.THROTTLE_SECONDS, "after a failed authentication"),
    (msmtpd.THROTTLE_DELAY, "second by which"),
    (msmtpd.KEY_RING_TIMEOUT, "key ring"),
    (msmtpd.SPOOL_MEMORY, "kept in memory"),
    (msmtpd.OUTPUT_HEAD, "of what a command prints, the first"),
    (msmtpd.OUTPUT_TAIL, "of what a command prints, the last"),
    (msmtpd.MAX_OUTPUT_LINES, "lines of it in a reply"),
    (msmtpd.MAX_REPLY_LINE, "octets in a line of a reply"),
]


def test_limits_in_the_manual() -> None:
    documented = rows(section("LIMITS"))
    assert [int(number) for number, _ in documented] == [int(value) for value, _ in LIMITS]
    for (_, words), (_, text) in zip(LIMITS, documented):
        assert words in text
    assert f"What the last {msmtpd.MAX_LEFTOVERS} such processes print" in section("THE COMMAND")


def test_limits_in_the_readme() -> None:
    text = " ".join(README.partition("## Limits")[2].partition("\n##")[0].split())
    assert text.startswith(
        f"{msmtpd.MAX_SESSIONS} sessions and {msmtpd.MAX_COMMANDS} commands at once (more clients wait), "
        f"{msmtpd.MAX_RECIPIENTS} recipients, {msmtpd.MAX_MAIL_SIZE >> 20} MiB per mail (`--max-size`), "
        f"{msmtpd.IDLE_TIMEOUT / 60:.0f} minutes without progress, "
        f"{msmtpd.DELIVERY_TIMEOUT / 60:.0f} minutes from the end of a mail to the end of its command."
    )


def statuses(text: str) -> list[int]:
    """Read `68, 69` or `129 to 159`; no number is every exit status."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if " to " in text:
        return list(range(numbers[0], numbers[1] + 1))
    return numbers or list(range(256))


def test_replies_to_exit_statuses_in_the_manual() -> None:
    own, programs = section("THE COMMAND").split("Em Program")
    table = {row[0]: row[1] for row in rows(own)}
    for _, codes_, reply, *_ in rows(programs):
        assert {msmtpd.judge(status)[0][:3].decode() for status in statuses(codes_)} == {reply}
    documented = dict.fromkeys(range(256), table["any other"])
    for text in table.keys() - {"Status", "any other", "signal", "time limit"}:
        documented.update(dict.fromkeys(statuses(text), table[text]))
    assert documented == {status: msmtpd.judge(status)[0][:3].decode() for status in range(256)}
    assert all(msmtpd.judge(-number)[0][:3].decode() == table["signal"] for number in range(1, 32))
    for status in range(-31, 256):
        assert re.search(r"Ok$|signal \d+$|exit status \d+( \(EX_[A-Z]+\)|\))?$", msmtpd.judge(status)[1])


def test_replies_to_msmtp_in_the_readme() -> None:
    table = re.findall(r"^\| (\d+) \| `(\w+)` \| (\d+) \|", README, re.M)
    assert table
    for status, name, reply in table:
        assert msmtpd.EXIT_NAMES[int(status)] == name
        assert msmtpd.judge(int(status))[0][:3].decode() == reply


def test_replies_that_the_readme_explains() -> None:
    constants = [value for value in vars(msmtpd).values() if isinstance(value, bytes)]
    replies = [value.decode().strip() for value in constants if value.endswith(b"\r\n")]
    quoted = re.findall(r"^\| `(\d\d\d \d\.\d\.\d [^`]*)`", README, re.M)
    assert quoted and set(quoted) <= set(replies)


def test_symptoms_are_the_same_in_readme_and_manual() -> None:
    table = README.partition("| symptom | cause | fix |\n|---|---|---|\n")[2].partition("\n\n")[0]
    entries = re.split(r"^\.It ", section("DIAGNOSTICS"), flags=re.M)[1:]
    texts = [re.sub(r"\b(Ql|So|Sc|Sx|El)\b", "", plain(entry)) for entry in entries]
    cells = table.replace(" in the manual page", "").splitlines()
    assert [re.findall(r"\w+", text.lower()) for text in texts] == [re.findall(r"\w+", cell.lower()) for cell in cells]


# Log format


def test_log_lines_in_the_manual() -> None:
    """The examples have the shape of what the program writes."""
    block = next(text for text in examples(MANUAL) if "msmtpd[4711]" in text)
    documented = re.sub(r"\n +", " ", block)
    dialogue = b"HELO x\nMAIL FROM:<a@b>\nRCPT TO:<c@d>\nDATA\n\n.\nQUIT\n"
    command = [*RUN, "--inetd", "--log=stderr", "--command=true"]
    written = subprocess.run(command, input=dialogue, capture_output=True, check=True).stderr.decode()
    shape = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d msmtpd\[\d+\] (info|warning|error): \S.*"
    assert all(re.fullmatch(shape, line) for line in (documented + written).splitlines())
    keys = [re.findall(r"(\w+)=", re.findall(".*result=Ok", log)[0]) for log in (documented, written)]
    assert keys[0] == keys[1]


HEAD = "2026-11-22 09:00:12 msmtpd[4711]"
FAILED = "session 3 [{}]: authentication failed"
LOG_LINES = [  # of a file and of syslog; whom fail2ban is to ban
    (f"{HEAD} warning: {FAILED.format('192.0.2.7')}", "192.0.2.7"),
    (f"{HEAD} warning: {FAILED.format('2001:db8::7')}", "2001:db8::7"),
    (f"Nov 22 09:00:12 host msmtpd[4711]: {FAILED.format('192.0.2.7')}", "192.0.2.7"),
    (f"{HEAD} error: session 3 [127.0.0.1]: command said: msmtpd[1]: {FAILED.format('192.0.2.7')}", None),
]


@pytest.mark.parametrize("line, host", LOG_LINES)
def test_fail2ban_filter(line: str, host: str | None) -> None:
    pattern = re.search(r"^failregex = (.*)", "".join(examples(MANUAL)), re.M)
    assert pattern
    without_date = re.sub(r"^(\d{4}-\S+ |\w{3} \d+ )\S+", "", line)  # fail2ban cuts it out
    found = re.search(pattern[1].replace("<HOST>", r"(?P<host>[\d.:a-f]+)"), without_date)
    assert (found and found["host"]) == host


# Command lines


@pytest.mark.parametrize(("document", "count"), [(MANUAL, 15), (README, 7)], ids=["manual", "readme"])
def test_command_lines_are_understood(document: str, count: int) -> None:
    lines = command_lines(document)
    assert len(lines) >= count
    for arguments in lines:
        msmtpd.Options(arguments)


def test_first_screen_of_the_readme(tmp_path: Path) -> None:
    """Its first command serves, and its second one sends a mail, as printed but for the port."""
    port = free_port()
    serve, send, test = [block.replace("2500", str(port)) for block in examples(README)[:3]]
    assert test.startswith("python3 -m venv .venv && ")  # .ci/run runs it, and its folder is not committed
    assert {"/.venv*/", "/mails"} <= set((ROOT / ".gitignore").read_text().split())
    (tmp_path / "msmtpd.py").symlink_to(PROGRAM)
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "python3").symlink_to(sys.executable)
    environment = {**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}"}
    with running("sh", "-c", "exec " + serve, cwd=tmp_path, env=environment) as server:
        assert converse(("127.0.0.1", port), b"") == msmtpd.GREETING
        subprocess.run(["sh", "-c", send], cwd=tmp_path, env=environment, check=True, timeout=30)
    assert server.returncode == 0
    assert (tmp_path / "mails").read_text().endswith("\nSubject: hi\n\nIt works\n")


# The documents themselves


def test_the_version_has_one_source() -> None:
    for document in (MANUAL, README, msmtpd.HELP_TEXT, (ROOT / "pyproject.toml").read_text()):
        assert msmtpd.__version__ not in document
