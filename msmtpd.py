#!/usr/bin/env python3
"""msmtpd: a minimal SMTP server that pipes each mail to a command.

It takes mail from local programs that insist on SMTP and hands it to
``msmtp -f %F --``, or to any other command that reads a mail on standard
input.  There is no queue: a client is told 250 once the command has exited
with status 0, and the reason otherwise.

    bytes from the client -> Session.step() -> actions -> Connection
        bytes      a reply: to the output buffer, then to the client
        Note       a line for the log
        AuthResult nothing is read or answered until the throttle lets it
        Deliver    the command runs with the spooled mail as its standard
                   input; the outcome comes back by Session.conclude()
        Close      flush, shut down, forget

The sections.  Each opens with a few lines on how it works:

    Limits          every number, with its unit and its reason
    Replies         every fixed reply, named by its meaning
    Paths           reverse-path, forward-path and parameters
    Mail data       spool, transparency, line ends, end of data, Received field
    Authentication  the SASL mechanisms and the throttle
    Session         the SMTP server as a pure protocol machine
    Delivery        the command, its arguments, its outcome
    Log             none, syslog, a file, standard error
    Event loop      descriptors, timers, fairness
    Server          connections, deliveries, listeners, signals
    Inetd           one session on descriptors 0 and 1
    Passwords       from a command, the key ring or a prompt
    Command line    options, start-up, main

Python 3.9 or later, standard library only.  In inetd mode every session pays
for every import (2 to 13 ms each, beside 9 ms for the interpreter), so what
a plain session does not need is imported where it is used.
"""

from __future__ import annotations

import _socket  # the C core of socket, which takes 10 ms and is for the daemon only
import binascii
import errno
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    import socket
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from typing import Any, Union

    Reply = bytes
    Action = Union[Reply, "Note", "AuthResult", "Deliver", "Close"]
    Sink = Union["SyslogSink", "StreamSink", "FileSink"]
    Exchange = Generator[bytes, bytes, bool]  # a SASL mechanism at work
else:
    import _signal as signal  # the C core of signal: without its enums, 5 ms less

__version__ = "1.0.0"


# ---- Limits ----------------------------------------------------------------
#
# Octets and seconds, unless a line says otherwise.  What a user may want to
# know stands in the manual page too, and a test holds the two together.

MAX_SESSIONS = 256  # beyond it clients wait in the backlog
MAX_COMMANDS = 16  # commands running at once; further mails wait their turn
MAX_LEFTOVERS = 16  # processes that commands have left behind and whose output we read
BACKLOG = 1024  # connections the kernel holds for us; it may cap this lower
MAX_RECIPIENTS = 1000  # in a transaction, as Postfix; RFC 5321 4.5.3.1.8 asks for 100
MAX_MAIL_SIZE = 100 * 1024 * 1024  # the default of --max-size
MAX_COMMAND_LINE = 4096  # RFC 5321 4.5.3.1.4 asks for 512, extensions add to it
MAX_AUTH_LINE = 12288  # RFC 4954 section 4
MAX_HOPS = 8  # of a mail through msmtpd; less than MAX_COMMANDS, or a loop could take all of them
MAX_ADDRESS = 254  # a path has 256 with its brackets, RFC 5321 4.5.3.1.3
MAX_REPLY_LINE = 512  # with CRLF, RFC 5321 4.5.3.1.5
MAX_OUTPUT_LINES = 5  # of the command, in a reply: msmtp needs three
MAX_ERRORS = 20  # negative replies since the last mail, as Postfix's hard limit
MAX_AUTH_FAILURES = 3  # in a session
SCRAM_ITERATIONS = 4096  # RFC 7677 section 4: at least

NEVER = float("inf")
IDLE_TIMEOUT = 300.0  # without progress, RFC 5321 4.5.3.2.7
CROWDED_TIMEOUT = 10.0  # without delivering a mail, where others wait
DATA_SECONDS_PER_OCTET = 10.0 / 1024  # mail data slower than 1 KiB in 10 s is no progress
DELIVERY_TIMEOUT = 600.0  # from the end of a mail: clients wait that long, RFC 5321 4.5.3.2.6
QUEUE_TIMEOUT = 300.0  # of it for its turn to come: a command that is killed may have sent the mail already
KILL_DELAY = 10.0  # between SIGTERM and SIGKILL for a command
STOP_TIMEOUT = 60.0  # for open transactions after SIGTERM
FLUSH_TIMEOUT = 10.0  # for the client to go on taking our last replies
LINGER_TIMEOUT = 2.0  # for it to close after them
RETRY_DELAY = 1.0  # before accepting again when there was no place
THROTTLE_SECONDS = 60.0  # after an authentication failure, while ...
THROTTLE_DELAY = 1.0  # ... every outcome of AUTH is held back by this
NOTIFY_TIMEOUT = 1.0  # for a service manager that is slow to take what we tell it: nobody else is served meanwhile
KEY_RING_TIMEOUT = 30.0  # for a key ring that waits to be unlocked

RESERVED_DESCRIPTORS = 64  # not for sessions: commands, listeners, log
RECEIVE_SIZE = 65536  # more makes malloc map and unmap memory at every receive
SPOOL_MEMORY = 32768  # of a mail before it goes to a file; also fits into a pipe
REPLY_BUFFER = 65536  # of replies not yet taken by the client, before we stop reading
OUTPUT_HEAD = 1024  # of what the command prints, kept for the log: the cause, before a script's source ...
OUTPUT_TAIL = 3072  # ... or behind it
MAX_PIPE = 1048576  # of a command's output in a pipe: 16 pages, which are of 64 KiB at most
LEFTOVER_OUTPUT = 16 * 1024 * 1024  # in an hour, of a process that a command has left behind
TURN_STEPS = 64  # of one session, before the others have their turn
TURN_TASKS = 16  # with twice as many, each does less in a turn; also how many clients come in in one
LOG_FIELD = 512  # characters of a client's or a command's text in a log line


# ---- Replies ---------------------------------------------------------------
#
# RFC 5321 section 4.2, with the enhanced status codes of RFC 3463; the
# greeting and the replies to HELO and EHLO carry none (RFC 2034 section 4).

GREETING = b"220 localhost ESMTP msmtpd\r\n"
HELO_OK = b"250 localhost\r\n"
BYE = b"221 2.0.0 Bye\r\n"
OK = b"250 2.0.0 Ok\r\n"
SENDER_OK = b"250 2.1.0 Ok\r\n"
RECIPIENT_OK = b"250 2.1.5 Ok\r\n"
DELIVERED = b"250 2.0.0 Ok, mail was piped\r\n"
NOT_VERIFIED = b"252 2.5.0 Send the mail, then it will be tried\r\n"
HELP = b"214 2.0.0 EHLO HELO MAIL RCPT DATA RSET NOOP VRFY AUTH QUIT, see msmtpd(1)\r\n"
START_MAIL = b"354 Send data\r\n"
AUTHENTICATED = b"235 2.7.0 Authentication succeeded\r\n"

SHUTTING_DOWN = b"421 4.3.2 Server is shutting down, try again later\r\n"
TIMED_OUT = b"421 4.4.2 Timeout, closing connection\r\n"
TOO_MANY_SESSIONS = b"421 4.4.5 Another client needs the place, come again with a mail\r\n"
INTERNAL_ERROR = b"421 4.3.0 Internal error, see the log of msmtpd\r\n"
TOO_MANY_ERRORS = b"421 4.7.0 Too many errors, closing connection\r\n"
TOO_MANY_FAILURES = b"421 4.7.0 Too many authentication failures, closing connection\r\n"

TOO_MANY_RECIPIENTS = b"452 4.5.3 Too many recipients, send the rest in another mail\r\n"
SPOOL_FAILED = b"452 4.3.1 Cannot store the mail, try again later\r\n"

UNKNOWN_COMMAND = b"500 5.5.2 Command not recognized\r\n"
LINE_TOO_LONG = b"500 5.5.2 Line too long\r\n"
NAME_MISSING = b"501 Say your name: EHLO name\r\n"
SENDER_SYNTAX = b"501 5.5.4 Syntax: MAIL FROM:<address>\r\n"
RECIPIENT_SYNTAX = b"501 5.5.4 Syntax: RCPT TO:<address>\r\n"
ADDRESS_SYNTAX = b"501 5.1.3 Address needs the form <user@host>, without a name\r\n"
PARAMETER_SYNTAX = b"501 5.5.4 Parameter has a bad value\r\n"
NO_ARGUMENT = b"501 5.5.4 No argument allowed\r\n"
AUTH_SYNTAX = b"501 5.5.4 Syntax: AUTH mechanism [initial response]\r\n"
AUTH_MALFORMED = b"501 5.5.2 Authentication exchange is malformed\r\n"
AUTH_CANCELLED = b"501 5.7.0 Authentication cancelled\r\n"
NOT_IMPLEMENTED = b"502 5.5.1 Command not implemented\r\n"
NO_GREETING = b"503 5.5.1 Send EHLO first\r\n"
NO_SENDER = b"503 5.5.1 Send MAIL first\r\n"
NO_RECIPIENT = b"503 5.5.1 Send RCPT first\r\n"
NESTED_MAIL = b"503 5.5.1 Sender is already given\r\n"
ALREADY_AUTHENTICATED = b"503 5.5.1 Already authenticated\r\n"
AUTH_IN_TRANSACTION = b"503 5.5.1 Not in the middle of a mail\r\n"
UNKNOWN_MECHANISM = b"504 5.5.4 Authentication mechanism not supported\r\n"
AUTH_REQUIRED = b"530 5.7.0 Authentication required\r\n"
AUTH_FAILED = b"535 5.7.8 Wrong user name or password\r\n"
MAIL_TOO_BIG = b"552 5.3.4 Mail is too big\r\n"
BAD_ADDRESS = b"553 5.1.3 Address has a character, a form or a length that is not allowed\r\n"
NEEDS_SMTPUTF8 = b"553 5.6.7 Address needs SMTPUTF8\r\n"
NOT_FOR_COMMAND = b"553 5.1.7 Address has a character that this server's command cannot take\r\n"
MAIL_LOOP = b"554 5.4.6 Mail loop, the command sends mails back to msmtpd\r\n"
NO_VALID_RECIPIENTS = b"554 5.5.1 No valid recipients\r\n"
UNKNOWN_PARAMETER = b"555 5.5.4 Parameter not recognized\r\n"


class Refused(Exception):
    """A command that is answered with a negative reply and has no effect."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply


# ---- Paths -----------------------------------------------------------------
#
# The arguments of MAIL and RCPT: pure functions that raise Refused.  They are no
# grammar police (msmtp and the next server judge addresses), but a second line of
# defence behind Command: no octet that a shell could take for a separator, a
# variable, a command or a redirection ever gets through.  Where one is parsed all
# the same, is_plain() leaves those that mean themselves to a shell, and nothing to
# a program of sed.

_PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789@._+-="
_ALLOWED = _PLAIN + b"/%,:#!'*?^{}~[]"
_NON_ASCII = bytes(range(128, 256))


def split_path(argument: bytes, keyword: bytes, syntax: Reply) -> tuple[bytes, bytes]:
    """Split ``FROM:<path> parameters`` into the bare path and the parameters.

    Blanks after the colon and a path without brackets are tolerated, a source
    route is dropped (RFC 5321 appendix C), and so are quotes without need.
    """
    rest = argument[len(keyword) :].strip()
    if argument[: len(keyword)].upper() != keyword or not rest:
        raise Refused(syntax)
    enclosed = rest.startswith(b"<")
    path, end, parameters = rest[enclosed:].partition(b">" if enclosed else b" ")
    keywords = (word.partition(b"=")[0].replace(b"-", b"") for word in parameters.split())
    if (enclosed and not end) or b"<" in path or b">" in path or not all(map(bytes.isalnum, keywords)):
        raise Refused(ADDRESS_SYNTAX)
    if path.startswith(b"@"):
        path = path.partition(b":")[2] or path
    return unquote(path) if path.startswith(b'"') else path, parameters


def unquote(path: bytes) -> bytes:
    """Take off quotes that change nothing (RFC 5322 3.4.1); those that are needed stay, and get refused."""
    local, end, domain = path[1:].partition(b'"')
    needless = local and end and not local.translate(None, _ALLOWED.replace(b"@", b"") + _NON_ASCII)
    return local + domain if needless and domain[:1] in (b"", b"@") else path


def check_address(address: bytes, utf8: bool) -> None:
    """Refuse what no mailbox of ours looks like.

    A leading ``-`` could be taken for an option by the command; ``#`` and
    ``~`` begin a comment and a home directory if a shell comes by once more.
    A slash at the beginning, ``..`` and, where there is no domain, any slash
    or a leading ``+`` would name a file to ``cat >> box/%F`` or to mailx.
    """
    misleading = address[:1] in b"-#~/@" or address[-1:] == b"@" or b".." in address.split(b"/")
    if b"@" not in address:
        misleading |= b"/" in address or address[:1] == b"+"
    if misleading or len(address) > MAX_ADDRESS or address.translate(None, _ALLOWED + _NON_ASCII):
        raise Refused(BAD_ADDRESS)
    if not utf8 and not address.isascii():
        raise Refused(NEEDS_SMTPUTF8)
    if not address.decode(errors="surrogateescape").isprintable():  # nor is what is no UTF-8
        raise Refused(BAD_ADDRESS)


def is_plain(address: bytes) -> bool:
    """Tell whether an address means itself to a shell that parses it unquoted (zsh looks up ``=name``)."""
    return not address.translate(None, _PLAIN + _NON_ASCII) and not address.startswith(b"=")


def mail_parameters(parameters: bytes) -> tuple[int, bool]:
    """Read the parameters of MAIL: (declared size in octets or 0, SMTPUTF8)."""
    size, utf8 = 0, False
    for parameter in parameters.split():
        keyword, equals, value = parameter.upper().partition(b"=")
        if keyword == b"SIZE":  # RFC 1870: up to 20 digits
            valid = value.isdigit() and len(value) <= 20
            size = int(value) if valid else 0
        elif keyword == b"BODY":  # RFC 6152
            valid = value in (b"7BIT", b"8BITMIME")
        elif keyword == b"SMTPUTF8":  # RFC 6531 section 3.4
            valid = utf8 = not equals
        elif keyword == b"AUTH":  # RFC 4954 section 5: we may ignore it
            valid = value != b""
        else:
            raise Refused(UNKNOWN_PARAMETER)
        if not valid:
            raise Refused(PARAMETER_SYNTAX)
    return size, utf8


# ---- Mail data -------------------------------------------------------------
#
# MailData decodes what follows DATA and writes it to a Spool.  Octets are
# octets: 8-bit, NUL, long lines and stray CR or LF pass.  Only transparency is
# undone (RFC 5321 4.5.2) and CRLF becomes LF.
#
# Which sequence ends the data is settled by how the client ended the line that
# said DATA.  After CRLF only CRLF.CRLF does: whoever lets LF.LF, CR.CR or the
# like do too can have a second mail smuggled into the first (CVE-2023-51764).
# After a bare LF, which only a person or a script types, LF.LF or LF.CRLF does.
# After CR CR LF, which comes from a program that has its CRLF translated once more
# and from no mail server, so does CRLF.CRCRLF, which such a one sends.
#
# What may be the beginning of an end, or of a stuffed dot, where a piece of
# input was cut is held back until the next piece.


class Spool:
    """A mail waiting for its command: in memory, beyond SPOOL_MEMORY in a file.

    The file is unlinked from the start, so that it is gone whatever happens.
    It lies in TMPDIR or in /tmp.  Methods raise OSError.
    """

    def __init__(self) -> None:
        self._memory = bytearray()
        self._file = -1  # its descriptor, once there is one

    def write(self, data: bytes) -> None:
        if self._file < 0 and len(self._memory) + len(data) <= SPOOL_MEMORY:
            self._memory += data
        else:
            self._write_file(data)

    def _write_file(self, data: bytes | bytearray) -> None:
        if self._file < 0:
            self._file = unlinked_file(os.environ.get("TMPDIR") or "/tmp")
            memory, self._memory = self._memory, bytearray()
            self._write_file(memory)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    def open(self) -> int:
        """Return a descriptor of its own from which the whole mail can be read."""
        if self._file < 0:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            try:
                whole = os.write(writer, self._memory) == len(self._memory)
            except OSError:
                whole = False
            os.close(writer)
            if whole:
                return reader
            os.close(reader)  # a pipe may be as small as a page where many are open
            self._write_file(b"")
        os.lseek(self._file, 0, os.SEEK_SET)
        return os.dup(self._file)

    def close(self) -> None:
        self._memory = bytearray()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def unlinked_file(directory: str) -> int:
    """Return a descriptor of a new file without a name.

    Not by tempfile, which takes 13 ms to import, and needs a descriptor for
    that just when a big mail comes.
    """
    try:
        return os.open(directory, os.O_RDWR | os.O_TMPFILE, 0o600)
    except (AttributeError, OSError):
        pass  # neither every system nor every file system knows it
    path = os.path.join(directory, f"msmtpd.{os.urandom(16).hex()}")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    return descriptor


# What ends the data, the longest first, by the end of the line that said DATA.
ENDS_OF_DATA = {
    b"\r\n": (b"\r\n.\r\n",),
    b"\n": (b"\r\n.\r\n", b"\n.\r\n", b"\n.\n"),
    b"\r\r\n": (b"\r\n.\r\r\n", b"\r\n.\r\n"),
}

_OUR_FIELD = b" (msmtpd) with "  # see received_field()


class MailData:
    """The decoder of one mail's data, writing to a spool.

    What goes wrong (too big, spool full) is kept in `failure`, and the rest of
    the data is read and dropped, since the client can be answered only then.
    """

    def __init__(self, spool: Spool, limit: int, line_end: bytes) -> None:
        self.spool = spool
        self.size = 0  # octets as sent, without transparency and end of data
        self.failure: Reply | None = None
        self.trouble = ""  # the reason for it, for the log
        self._hops = 0
        self._header: bytes | None = b"\n"  # the end of what has come of it, None once it is over
        self._limit = limit
        self._ends = ENDS_OF_DATA[line_end]
        self._eol = line_end[-2:]
        # A dot may be the very first octet: the data begin as if behind a line end.
        self._held = self._eol
        self._unsent = len(self._eol)  # octets of the text to come that are only this

    def feed(self, data: bytes) -> int:
        """Decode `data`; return how many octets follow the end, -1 without an end."""
        data = self._held + data
        dots = self._eol + b"." in data  # mostly not, which saves the other searches
        found, end = min(((data.find(end), end) for end in self._ends if dots and end in data), default=(-1, b""))
        if end:
            at = found + end.index(b".")
            left = len(data) - found - len(end)
        else:
            at = len(data) - cut_end(data, self._ends)
            left = -1
        self._held = data[at:]
        self._put(data[:at].replace(self._eol + b".", self._eol) if dots else data[:at])
        return left

    def _put(self, data: bytes) -> None:
        if data:
            data = data[self._unsent :]
            self._unsent = 0
        self.size += len(data)
        if self.failure is not None:
            return
        text = b"\n".join(data.split(b"\r\n"))  # faster than replace() on lines of text
        if self._header is not None:
            self._count_hops(self._header + text)
        if self.size > self._limit:
            self._fail(MAIL_TOO_BIG, f"Mail is over the limit of {self._limit} octets")
        elif self._hops > MAX_HOPS:
            self._fail(MAIL_LOOP, f"Mail has passed msmtpd {self._hops} times")
        else:
            try:
                self.spool.write(text)
            except OSError as error:
                self._fail(SPOOL_FAILED, f"Cannot store the mail in TMPDIR: {error.strerror}")

    def _count_hops(self, text: bytes) -> None:
        """Count our Received fields, up to the empty line that ends the header."""
        header, empty_line, _ = text.partition(b"\n\n")
        self._hops += header.count(_OUR_FIELD)
        self._header = None if empty_line else header[1 - len(_OUR_FIELD) :]  # one may come in two pieces

    def _fail(self, reply: Reply, trouble: str) -> None:
        self.failure = reply
        self.trouble = trouble
        self.spool.close()


def cut_end(data: bytes, ends: Sequence[bytes]) -> int:
    """Return how many of the last octets of `data` may be the beginning of an end."""
    for length in range(min(len(data), len(ends[0]) - 1), 0, -1):
        if any(end.startswith(data[-length:]) for end in ends):
            return length
    return 0


def ip_address(name: object) -> str:
    """Return the IP address of a socket's name, an IPv4 one as such; empty for a Unix socket."""
    if not isinstance(name, tuple):
        return ""
    host = str(name[0])
    return host[7:] if host.startswith("::ffff:") and "." in host else host


def address_literal(host: str) -> str:
    """Return an IP address as RFC 5321 4.1.3 writes it."""
    host = host.partition("%")[0]
    return f"[IPv6:{host}]" if ":" in host else f"[{host}]"


_ODD_IN_NAME = bytes(range(256)).translate(None, _PLAIN.translate(None, b"@+=") + b":[]")
_CLEAN_NAME = bytes.maketrans(_ODD_IN_NAME, b"?" * len(_ODD_IN_NAME))


def received_field(name: bytes, client: str, server: str, protocol: str, date: float) -> bytes:
    """Return the Received field of RFC 5321 4.4, in LF lines as the command gets them.

    `client` and `server` are IP addresses, or empty where there are none
    (pipes); `date` is in seconds since the epoch.
    """
    clean = name[:255].translate(_CLEAN_NAME).decode()
    source = f" ({address_literal(client)})" if client else ""
    by = address_literal(server) if server else "localhost"
    when = time.strftime("%a, %d %b %Y %H:%M:%S %z", time.localtime(date))
    return f"Received: from {clean}{source}\n\tby {by} (msmtpd) with {protocol};\n\t{when}\n".encode()


def open_spool(sock: _socket.socket | None, client: str, name: bytes, protocol: str) -> Spool:
    """Return a spool that begins with the Received field."""
    server = ip_address(sock.getsockname()) if sock else ""
    spool = Spool()
    spool.write(received_field(name, client, server, protocol, time.time()))
    return spool


# ---- Authentication --------------------------------------------------------
#
# A mechanism is a generator that yields challenges, is sent responses (both
# without base64) and returns whether they were right.  It raises Refused for
# what is malformed.  Nothing that the client sent is kept or logged.
#
# User and password are both compared, in constant time, whatever comes first,
# and prepare()d on both sides: letters may be typed in more ways than one.
# All four mechanisms work without TLS, which there is none of on loopback;
# CRAM-MD5 and SCRAM serve clients that refuse to send a password without it.


class Credentials:
    """The one user who may send mail, and the password."""

    def __init__(self, user: str, password: bytes) -> None:
        # Imported now: later there may be no descriptor left to read the modules with.
        import hashlib
        import hmac  # noqa: F401
        import stringprep  # noqa: F401

        self.user = prepare(user.encode(errors="surrogateescape"))
        self.password = password
        self.prepared = prepare(password)
        self.mechanisms = dict(MECHANISMS)
        if not hasattr(hashlib, "pbkdf2_hmac"):  # a Python without OpenSSL
            del self.mechanisms[b"SCRAM-SHA-256"]

    def match(self, user: bytes, proof: bytes, expected: bytes) -> bool:
        """Compare in a time that tells nothing about where, or whether, which of them differs."""
        import hmac

        return hmac.compare_digest(prepare(user), self.user) & hmac.compare_digest(proof, expected)


def prepare(text: bytes) -> bytes:
    """Return what SASLprep (RFC 4013) makes of a user name or a password, but for its refusals."""
    import stringprep
    import unicodedata

    characters = [c for c in text.decode(errors="surrogateescape") if not stringprep.in_table_b1(c)]
    mapped = "".join(" " if stringprep.in_table_c12(c) else c for c in characters)
    # Where nothing would be left it stays as it is: nobody gets in with an empty password.
    return unicodedata.normalize("NFKC", mapped).encode(errors="surrogateescape") or text


class FinalChallenge(bytes):
    """A challenge that tells the client that its response was right, before the end of the exchange."""


def auth_plain(credentials: Credentials) -> Exchange:
    """PLAIN, RFC 4616.  Any authzid will do: there is only one user."""
    fields = (yield b"").split(b"\0")
    if len(fields) != 3:
        raise Refused(AUTH_MALFORMED)
    return credentials.match(fields[1], prepare(fields[2]), credentials.prepared)


def auth_login(credentials: Credentials) -> Exchange:
    """LOGIN, which has no RFC; clients compare these very prompts."""
    user = yield b"Username:"
    password = yield b"Password:"
    return credentials.match(user, prepare(password), credentials.prepared)


def auth_cram_md5(credentials: Credentials) -> Exchange:
    """CRAM-MD5, RFC 2195."""
    import hashlib
    import hmac

    def md5(data: bytes = b"") -> Any:
        return hashlib.md5(data, usedforsecurity=False)  # FIPS policies forbid the other kind

    challenge = b"<%s.%d@localhost>" % (fresh_nonce(), time.time())
    user, _, digest = (yield challenge).rpartition(b" ")
    keys = (credentials.password, credentials.prepared)  # RFC 2195 says nothing, and clients differ
    expected = [hmac.new(key, challenge, md5).hexdigest().encode() for key in keys]
    return True in [credentials.match(user, digest.lower(), proof) for proof in expected]


def auth_scram_sha_256(credentials: Credentials) -> Exchange:
    """SCRAM-SHA-256 without channel binding, RFC 5802 and RFC 7677."""
    import hashlib
    import hmac

    def sign(key: bytes, message: bytes) -> bytes:
        return hmac.new(key, message, "sha256").digest()

    header, first_bare, user, nonce = scram_client_first((yield b""))
    salt = os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", credentials.prepared, salt, SCRAM_ITERATIONS)
    nonce += fresh_nonce()
    server_first = b"r=%s,s=%s,i=%d" % (nonce, encode_base64(salt), SCRAM_ITERATIONS)

    bare, separator, proof64 = (yield server_first).rpartition(b",p=")
    if not separator or bare.split(b",")[:2] != [b"c=" + encode_base64(header), b"r=" + nonce]:
        raise Refused(AUTH_MALFORMED)
    proof = decode_base64(proof64)
    message = b",".join((first_bare, server_first, bare))
    client_key = sign(salted, b"Client Key")
    signature = sign(hashlib.sha256(client_key).digest(), message)
    expected = bytes(a ^ b for a, b in zip(client_key, signature))
    if not credentials.match(user, proof, expected):
        return False
    server_signature = sign(sign(salted, b"Server Key"), message)
    if (yield FinalChallenge(b"v=" + encode_base64(server_signature))):
        raise Refused(AUTH_MALFORMED)  # it has only to acknowledge
    return True


def scram_client_first(message: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Split SCRAM's first message into GS2 header, the bare rest, user and nonce.

    We offer no channel binding: a client that has none says ``n``, one that
    has it but sees that we have not says ``y`` (RFC 5802 section 6).
    """
    fields = message.split(b",")
    valid = len(fields) > 3 and fields[0] in (b"n", b"y") and fields[1][:2] in (b"", b"a=")
    if not valid or fields[2][:2] != b"n=" or fields[3][:2] != b"r=" or len(fields[3]) == 2:
        raise Refused(AUTH_MALFORMED)
    user = fields[2][2:].replace(b"=2C", b",").replace(b"=3D", b"=")
    header = b",".join(fields[:2]) + b","
    return header, message[len(header) :], user, fields[3][2:]


def fresh_nonce() -> bytes:
    """Return text that nobody can foresee."""
    return binascii.hexlify(os.urandom(16))


def encode_base64(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False)


def ask(challenge: bytes) -> Reply:
    return b"334 %s\r\n" % encode_base64(challenge)


def decode_base64(text: bytes) -> bytes:
    """Decode strictly: Python's decoder skips what is not base64."""
    try:
        data = binascii.a2b_base64(text)
    except binascii.Error:
        raise Refused(AUTH_MALFORMED) from None
    if encode_base64(data) != text:
        raise Refused(AUTH_MALFORMED)
    return data


# The mechanisms, and whether the client speaks first in them.  The order is the
# one that EHLO offers: some clients take the first they know.
MECHANISMS: Mapping[bytes, tuple[Callable[[Credentials], Exchange], bool]] = {
    b"PLAIN": (auth_plain, True),
    b"LOGIN": (auth_login, True),
    b"CRAM-MD5": (auth_cram_md5, False),
    b"SCRAM-SHA-256": (auth_scram_sha_256, True),
}


class Throttle:
    """Slows down guessing: for a while after a failure every outcome comes late.

    Right or wrong, in every session: an early answer would tell them apart.
    In inetd mode, where no session knows of the others, it is `always` so.
    """

    def __init__(self, always: bool = False) -> None:
        self._until = NEVER if always else 0.0

    def delay(self, now: float, failed: bool) -> float:
        """Take note of an outcome that is known `now`; return for how many seconds to hold it back."""
        late = now < self._until
        if failed:
            self._until = max(self._until, now + THROTTLE_SECONDS)
        return THROTTLE_DELAY if late else 0.0


# ---- Session ---------------------------------------------------------------
#
# The SMTP server as a pure protocol machine: bytes in, actions out; no
# descriptors, no clock, no log.  receive() takes input in whatever pieces it
# comes, b"" for its end; step() takes the next line (or piece of mail data) out
# of it and returns what is to be done, [] when more input is needed.
#
# The end of input is an input too.  What came before it is worked off first;
# then the session ends, orderly unless a transaction was open.
#
# What decides the next reply: the name of the greeting, whether the client is
# authenticated, the envelope of the open transaction, and who reads, which is
# the mail data if there is one, else an AUTH exchange if there is one, else the
# commands; nobody while a delivery runs and after the end.  The rest of the
# state is input not yet read, and counters.
#
# VERBS names for each verb what it does and what must hold before it, which
# _command() checks; the methods for the verbs refuse only arguments and numbers
# of recipients, by raising Refused, and step() answers.  A refused command never
# ends the session; QUIT, too many errors or failures to authenticate, and a
# client that does not speak SMTP do.
# Each refusal is a line in the log, with the command: step() sees to that too.


def escape(text: bytes) -> str:
    """Turn text from outside into printable ASCII, so that it forges neither a log line nor a terminal's commands."""
    return "".join(c if " " <= c <= "~" and c != "\\" else f"\\x{ord(c):02x}" for c in text.decode("latin-1"))


def printable(text: bytes) -> str:
    """Escape, and cut."""
    escaped = escape(text[:LOG_FIELD])
    return escaped[:LOG_FIELD] + "..." * (len(escaped) > LOG_FIELD or len(text) > LOG_FIELD)


class Note:
    """Something for the log."""

    def __init__(self, level: str, text: str) -> None:
        self.level = level
        self.text = text


class AuthResult:
    """How an authentication went, and `then` what follows: the throttle may hold that back."""

    def __init__(self, failed: bool, then: list[Action]) -> None:
        self.failed = failed
        self.then = then


class Deliver:
    """A complete mail.  The session goes on with Session.conclude()."""

    def __init__(self, envelope: Envelope, spool: Spool, size: int) -> None:
        self.envelope = envelope
        self.spool = spool
        self.size = size


class Close:
    """The end of the session; `orderly` if the client wished it."""

    def __init__(self, orderly: bool) -> None:
        self.orderly = orderly


class Envelope:
    """An open mail transaction."""

    def __init__(self, sender: bytes, utf8: bool) -> None:
        self.sender = sender  # the reverse-path, b"" for the null one
        self.utf8 = utf8
        self.recipients: list[bytes] = []  # forward-paths
        self.tried = 0  # how many RCPT there were, accepted or not

    def log_lines(self, outcome: str) -> list[str]:
        """Return what the log says of the mail: every recipient, on as many lines as it takes."""
        lists = [""]
        for recipient in self.recipients:
            lists += [""] * (len(lists[-1]) > LOG_FIELD)
            lists[-1] += f",<{escape(recipient)}>"
        first = f"mail from=<{escape(self.sender)}> to={lists[0][1:]} count={len(self.recipients)} {outcome}"
        return [first, *(f"also to={more[1:]}" for more in lists[1:])]


class Policy:
    """What every session of this process offers and accepts."""

    def __init__(
        self,
        max_size: int = MAX_MAIL_SIZE,
        credentials: Credentials | None = None,
        takes: Callable[[bytes, bool], bool] = lambda address, is_sender: True,
    ) -> None:
        self.max_size = max_size
        self.credentials = credentials
        self.takes = takes  # Command.takes
        offers = [b"localhost", b"PIPELINING", b"SIZE %d" % max_size, b"8BITMIME", b"SMTPUTF8"]
        if credentials:
            offers.append(b"AUTH " + b" ".join(credentials.mechanisms))
        lines = [b"250-%s\r\n" % offer for offer in offers]
        self.ehlo_reply = b"".join(lines) + b"250 ENHANCEDSTATUSCODES\r\n"


_TLS_HANDSHAKE = b"\x16\x03"  # how what a TLS client sends begins, RFC 8446 section 5.1
_STUN_COOKIE = b"\x21\x12\xa4\x42"  # RFC 8489 section 5
HTTP_METHODS = b"GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH PRI".split()


def other_protocol(line: bytes, verb: bytes) -> str:
    """Tell what a client does instead of SMTP: a browser can be made to send any text behind that."""
    if line == _TLS_HANDSHAKE:
        return "TLS"
    if verb in HTTP_METHODS or b" HTTP/" in line:
        return "HTTP"
    if verb == b"PROXY":
        return "PROXY protocol"
    return "STUN" if _STUN_COOKIE in line else "sends header lines" if verb.endswith(b":") else ""


_SECRET = b"AUTH ..."  # what the log has of a command that may tell a password


class Session:
    """One SMTP session.

    `open_spool` is called with the greeting's name and the protocol for the
    Received field, and returns the spool for a mail.
    """

    def __init__(self, policy: Policy, open_spool: Callable[[bytes, str], Spool]) -> None:
        self._policy = policy
        self._open_spool = open_spool
        self.name: bytes | None = None  # of HELO or EHLO
        self._esmtp = False
        self.authenticated = policy.credentials is None
        self.envelope: Envelope | None = None
        self._exchange: Exchange | None = None  # gets the next line
        self.data: MailData | None = None  # gets the next input
        self._deaf = False  # while a delivery runs, and after the end
        self._errors = 0  # since the last mail
        self._said = b""  # the last command, as far as the log may have it
        self._auth_failures = 0
        self._input = b""
        self._at = 0  # where the unread input begins
        self.ended = False  # nothing comes behind it
        self._overlong = False  # the rest of the line is to be skipped
        self._line_end = b""  # of the last line

    # Input and output

    def receive(self, data: bytes) -> None:
        """Take input, in any pieces, at any time; b"" says that no more will come."""
        self._input = self._input[self._at :] + data
        self._at = 0
        self.ended = not data

    def step(self) -> list[Action]:
        """Work off the next line or piece of data; [] if it is not there yet."""
        if self._deaf:
            return []
        actions: list[Action] = []
        if self._at < len(self._input):
            try:
                actions = self._read_line() if self.data is None else self._read_data(self.data)
            except Refused as refused:
                self._exchange = None
                text = f"refused with {refused.reply[:-2].decode()}: {printable(self._said)}"
                return [Note("warning", text), *self._negative(refused.reply)]
        return self._leave() if self.ended and not actions else actions

    def conclude(self, delivered: bool, reply: Reply) -> list[Action]:
        """End the transaction that Deliver began, with the reply to its mail."""
        self.end_transaction()
        self._deaf = False
        if not delivered:
            return self._negative(reply)
        self._errors = 0
        return [reply]

    def _negative(self, reply: Reply) -> list[Action]:
        if reply is not TOO_MANY_RECIPIENTS:  # which only asks for another mail
            self._errors += 1
        if self._errors < MAX_ERRORS:
            return [reply]
        return [reply, TOO_MANY_ERRORS, Note("warning", "too many errors"), *self._end(orderly=False)]

    def _end(self, orderly: bool) -> list[Action]:
        self._deaf = True
        return [Close(orderly)]

    def _leave(self) -> list[Action]:
        if self.envelope is None:
            return self._end(orderly=True)
        return [Note("warning", "client left in the middle of a mail"), *self._end(orderly=False)]

    def end_transaction(self) -> None:
        """Drop the envelope and the mail data, if there are any."""
        self.envelope = None
        if self.data is not None:
            self.data.spool.close()
            self.data = None

    # Readers: who gets the next input

    def _read_line(self) -> list[Action]:
        line = self._take_line()
        if line is None:
            return []
        if self._exchange is None or line == _TLS_HANDSHAKE:
            return self._command(line)
        return self._respond(line.strip())

    def _command(self, line: bytes) -> list[Action]:
        verb, _, argument = line.replace(b"\t", b" ").rstrip(b" ").partition(b" ")
        verb = verb.upper()
        if line == b"\0" and not self._said and self._errors == 2:
            verb = b"PROXY"  # its binary form begins with two empty lines and this one
        self._remember(line, verb)
        if verb not in VERBS:
            return self._unknown(line, verb)
        effect, conditions = VERBS[verb]
        for holds, reply in conditions:
            if not holds(self):
                raise Refused(reply)
        return effect(self, argument.strip())

    def _remember(self, line: bytes, verb: bytes) -> None:
        """Keep what the client says for the log, but nothing of AUTH, even where that has not been begun."""
        secret = verb == b"AUTH" if verb in VERBS else b"AUTH" in line.upper() or self._said == _SECRET
        self._said = _SECRET if secret else line

    def _unknown(self, line: bytes, verb: bytes) -> list[Action]:
        what = other_protocol(line, verb)
        if not what:
            raise Refused(UNKNOWN_COMMAND)
        text = f"client does not speak SMTP but {what}: {printable(self._said)}"
        return [Note("warning", text), *self._end(orderly=False)]

    def _read_data(self, data: MailData) -> list[Action]:
        assert self.envelope is not None
        left = data.feed(self._input[self._at :])
        self._at = len(self._input) - max(left, 0)
        if left < 0:
            return []
        self.data = None
        if data.failure is None:
            self._deaf = True
            return [Deliver(self.envelope, data.spool, data.size)]
        lines = self.envelope.log_lines(f"size={data.size} reply={data.failure[:3].decode()} result={data.trouble}")
        self.end_transaction()
        return [*(Note("error", line) for line in lines), *self._negative(data.failure)]

    def _take_line(self) -> bytes | None:
        """Take the next line, without its end; None while it is incomplete.

        A line may end in LF alone, or in CR CR LF.  One over the limit is
        dropped as it comes and refused when its end has come.
        """
        end = self._input.find(b"\n", self._at) + 1
        if self._input.startswith(_TLS_HANDSHAKE, self._at) and not self._overlong:
            end = self._at + len(_TLS_HANDSHAKE)  # it has no lines
        line = self._input[self._at : end or None]
        if len(line) > MAX_COMMAND_LINE and not self._overlong:
            in_auth = self._exchange is not None or line[:5].upper() == b"AUTH "
            if len(line) > MAX_AUTH_LINE or not in_auth:
                self._overlong = True
                self._remember(line[: LOG_FIELD + 1], b"")
        if end or self._overlong:
            self._at += len(line)
        if not end:
            return None
        if self._overlong:
            self._overlong = False
            raise Refused(LINE_TOO_LONG)
        text = line.rstrip(b"\r\n")
        self._line_end = line[len(text) :][-3:]
        return text

    # Verbs: what each does once its conditions hold

    def _greet(self, name: bytes, esmtp: bool) -> list[Action]:
        if not name:
            raise Refused(NAME_MISSING)
        self.end_transaction()
        self.name = name
        self._esmtp = esmtp
        return [self._policy.ehlo_reply if esmtp else HELO_OK]

    def _mail(self, argument: bytes) -> list[Action]:
        path, parameters = split_path(argument, b"FROM:", SENDER_SYNTAX)
        size, utf8 = mail_parameters(parameters)
        if path:
            self._check_address(path, utf8, is_sender=True)
        if size > self._policy.max_size:
            raise Refused(MAIL_TOO_BIG)
        self.envelope = Envelope(path, utf8)
        return [SENDER_OK]

    def _rcpt(self, argument: bytes) -> list[Action]:
        assert self.envelope is not None
        self.envelope.tried += 1
        path, parameters = split_path(argument, b"TO:", RECIPIENT_SYNTAX)
        self._check_address(path, self.envelope.utf8, is_sender=False)
        if parameters:
            raise Refused(UNKNOWN_PARAMETER)
        if len(self.envelope.recipients) >= MAX_RECIPIENTS:
            if self.envelope.tried > MAX_RECIPIENTS + MAX_ERRORS:  # the log has had enough of it
                return [TOO_MANY_RECIPIENTS]
            raise Refused(TOO_MANY_RECIPIENTS)
        self.envelope.recipients.append(path)
        return [RECIPIENT_OK]

    def _check_address(self, path: bytes, utf8: bool, is_sender: bool) -> None:
        check_address(path, utf8)
        if not self._policy.takes(path, is_sender):
            raise Refused(NOT_FOR_COMMAND)

    def _start_data(self, argument: bytes) -> list[Action]:
        assert self.envelope is not None and self.name is not None
        if argument:
            raise Refused(NO_ARGUMENT)
        if not self.envelope.recipients:
            raise Refused(NO_VALID_RECIPIENTS if self.envelope.tried else NO_RECIPIENT)
        spool = self._open_spool(self.name, self._protocol(self.envelope))
        self.data = MailData(spool, self._policy.max_size, self._line_end)
        return [START_MAIL]

    def _protocol(self, envelope: Envelope) -> str:
        """Return the ``with`` of the Received field, RFC 3848 and RFC 6531 4.3."""
        authenticated = self._policy.credentials is not None
        base = "UTF8SMTP" if envelope.utf8 else "ESMTP" if self._esmtp or authenticated else "SMTP"
        return base + "A" * authenticated

    def _rset(self, argument: bytes) -> list[Action]:
        self.end_transaction()
        return [OK]

    # Authentication

    def _auth(self, argument: bytes) -> list[Action]:
        credentials = self._policy.credentials
        assert credentials is not None
        words = argument.split()
        if not 1 <= len(words) <= 2:
            raise Refused(AUTH_SYNTAX)
        mechanism = words[0].upper()
        if mechanism not in credentials.mechanisms:
            raise Refused(UNKNOWN_MECHANISM)
        exchange, client_first = credentials.mechanisms[mechanism]
        if len(words) == 2 and not client_first:
            raise Refused(AUTH_SYNTAX)  # RFC 4954 section 4
        self._exchange = exchange(credentials)
        challenge = next(self._exchange)
        if len(words) == 2:
            return self._respond(b"" if words[1] == b"=" else words[1])
        return [ask(challenge)]

    def _respond(self, line: bytes) -> list[Action]:
        """Give the client's response to the exchange, which ends unless it asks on."""
        assert self._exchange is not None
        if line == b"*":
            raise Refused(AUTH_CANCELLED)
        try:
            challenge = self._exchange.send(decode_base64(line))
        except StopIteration as end:
            self._exchange = None
            return self._finish_auth(end.value)
        if isinstance(challenge, FinalChallenge):
            return [AuthResult(False, [ask(challenge)])]
        return [ask(challenge)]

    def _finish_auth(self, success: bool) -> list[Action]:
        if success:
            self.authenticated = True
            return [AuthResult(False, [AUTHENTICATED])]
        self._auth_failures += 1
        if self._auth_failures < MAX_AUTH_FAILURES:
            then = self._negative(AUTH_FAILED)
        else:
            then = [TOO_MANY_FAILURES, *self._end(orderly=False)]
        return [Note("warning", "authentication failed"), AuthResult(True, then)]


if TYPE_CHECKING:
    Effect = Callable[[Session, bytes], list[Action]]
    Condition = tuple[Callable[[Session], bool], Reply]

_GREETED: Condition = (lambda s: s.name is not None, NO_GREETING)
_AUTHENTICATED: Condition = (lambda s: s.authenticated, AUTH_REQUIRED)
_NO_TRANSACTION: Condition = (lambda s: s.envelope is None, NESTED_MAIL)
_TRANSACTION: Condition = (lambda s: s.envelope is not None, NO_SENDER)
_AUTH_OFFERED: Condition = (lambda s: s._policy.credentials is not None, NOT_IMPLEMENTED)
_NOT_OFFERED: Condition = (lambda s: False, NOT_IMPLEMENTED)
_NOT_AUTHENTICATED: Condition = (lambda s: not s.authenticated, ALREADY_AUTHENTICATED)
_AUTH_ALONE: Condition = (lambda s: s.envelope is None, AUTH_IN_TRANSACTION)

VERBS: Mapping[bytes, tuple[Effect, tuple[Condition, ...]]] = {
    b"EHLO": (lambda s, name: s._greet(name, esmtp=True), ()),
    b"HELO": (lambda s, name: s._greet(name, esmtp=False), ()),
    b"AUTH": (Session._auth, (_AUTH_OFFERED, _GREETED, _NOT_AUTHENTICATED, _AUTH_ALONE)),
    b"MAIL": (Session._mail, (_GREETED, _AUTHENTICATED, _NO_TRANSACTION)),
    b"RCPT": (Session._rcpt, (_GREETED, _AUTHENTICATED, _TRANSACTION)),
    b"DATA": (Session._start_data, (_GREETED, _AUTHENTICATED, _TRANSACTION)),
    b"RSET": (Session._rset, ()),
    b"NOOP": (lambda s, _: [OK], ()),
    b"HELP": (lambda s, _: [HELP], ()),
    b"VRFY": (lambda s, _: [NOT_VERIFIED], ()),
    b"EXPN": (Session._rset, (_NOT_OFFERED,)),
    b"STARTTLS": (Session._rset, (_NOT_OFFERED,)),
    b"QUIT": (lambda s, _: [BYE, *s._end(orderly=True)], ()),
}


# ---- Delivery --------------------------------------------------------------
#
# The text of --command is a shell command, in which an address must be nothing but
# itself.  That is left to no parser of shell syntax, which could only be wrong:
#
# 1. %F stands free if no quote, backquote, "$(" or "<<" is before it and its word
#    is just %F, '%F' or "%F", or that behind -f, --name= or name=.  It becomes a
#    quoted reference to MSMTPD_SENDER, which no shell parses.
# 2. Anywhere else the sender is put in as text and must be plain.  That means itself
#    in every quoting, here-document, comment and shell, and does nothing in a program
#    of sed or perl as long as it has none of their delimiters, as + in s+x+%F+.  It
#    needs an @ where a word may be a program, as in $x, or syntax, as in a case.
# 3. The recipients are "$@" behind the text.  They and the sender must be plain if
#    something may parse the arguments once more: a shell, ssh, xargs, ..., or $x.
#
# So no shell parses an address that is not plain.  Nothing helps who writes $x for
# "$x" where that is the sender by set -- %F, or with an IFS of his own.
#
# A text without shell syntax runs without the shell, which means the same and is
# three times as fast.  Each command runs in a session of its own with the spool as
# descriptor 0 and a pipe to us as 1 and 2; no other descriptor, no ignored or blocked
# signal.  What its exit status means to the client is in judge().

# Those that can be reset, not what a C library keeps for itself.  One that is left out costs two system calls.
_SIGNALS = {number for number in signal.valid_signals() if signal.getsignal(number) is not None}
_SIGNALS -= {signal.SIGKILL, signal.SIGSTOP}
_NO_SHELL_SYNTAX = _PLAIN + b"/%,: \t"
_TO_BLANKS = bytes.maketrans(b"\n|&;()<>`{}", b" " * 11)
_PARSERS = b"""busybox dbclient eval find ksh93 make msmtpq msmtp-enqueue.sh parallel plink runuser sem sg slogin
    sshpass su watch xargs""".split()  # and whatever ends in "sh"
_REFERENCE = b'"$MSMTPD_SENDER"'

# Regular expressions.  _START is where a program may be named: behind a separator, even one in quotes (that finds too
# much rather than too little), and behind assignments, redirections, options, numbers and the words in _PREFIXES: no
# two of these begin alike, or the search would take exponential time.
_PREFIXES = b"if|then|elif|else|while|until|do|time|exec|command|builtin|eval|env|nohup|nice|setsid|timeout|sudo|xargs"
_WORD = rb"""(?:[^\s;&|<>()'"`]|'[^']*'|"[^"]*"|`[^`]*`|\$\([^)]*\)+)*"""
_SETTING = rb"(?:[^\W\d]\w*\+?=|[<>]+(?![<>])[&|]?\s*(?=\S)|[-\d!{])" + _WORD
_PROGRAM = rb"(?:[^\s=<>!{\d-][^\s=<>]*/|/)?(?:%s)" % _PREFIXES
_START = rb"(?:\A|(?<![<>])[;&|\n]%s)" + rb"(?:\s*(?:%s|%s)(?![^\s<>]))*\s*" % (_SETTING, _PROGRAM)
_BAD_END = _START % b"" + rb"\Z|<<-?\s*\W?(\w+)(?s:.*)\n\t*\1\Z"  # or the end of a here-document
_VARIABLE = _START % rb"|\(|`(?!\s)" + rb'(?:"*[$`]|(?<=\s)%F)|\)[\s{]*"*[$`]'  # the last: case and function
_HANDLE = rb"(?<![^\s|&;()<>])(?:-\w|-[\w-]+=|(\w+)=(?!(?s:.*)\$\W*\2\b))?"  # no $name may come behind name=
_FREE = rb"""((?:(?!\$\(|<<|%%F)[^'"`])*%s)(['"]?)%%F\3(?=[\s|&;()<>])""" % _HANDLE
_DELIMITER = rb"(?<![a-z])[a-z]{0,2}[symqrw%\\]([@._+=-])"  # of an operator of sed or perl: s, y, tr, qq, \

EXIT_NAMES = {status: name for name, status in vars(os).items() if name.startswith("EX_")}
TEMPORARY = (os.EX_NOHOST, os.EX_UNAVAILABLE, os.EX_OSERR, os.EX_CANTCREAT, os.EX_IOERR, os.EX_TEMPFAIL)


class StartupError(Exception):
    """Something that keeps msmtpd from starting, in one line that says what to do."""


class Command:
    """The text of --command, made ready to run.  Raises StartupError where it leaves no place for recipients."""

    def __init__(self, text: str, environment: Mapping[bytes, bytes]) -> None:
        self._environment = dict(environment)
        self._text = command = os.fsencode(text.rstrip())
        if not command:
            raise StartupError("--command is empty; see --help")
        words, joined = command.split(), command.replace(b"\\\n", b"")
        names = [word.rpartition(b"/")[2] for word in joined.translate(_TO_BLANKS, b"'\"\\").split()]
        self._direct = not command.translate(None, _NO_SHELL_SYNTAX) and b"=" not in words[0]
        self._parsed = any(name in _PARSERS or (name[-2:] == b"sh" and b"." not in name) for name in names)
        script = command + b' "$@"'
        self._script = [script.replace(b"%F", _REFERENCE, 1)]  # the sender comes between its parts
        if self._direct and words.count(b"%F") == command.count(b"%F") and names[0] not in _PREFIXES.split(b"|"):
            return  # what is clear without re, which takes 7 ms to import

        import re

        bare = re.sub(rb"\\\W", b"_", joined)  # behind a backslash there is no syntax
        if re.search(_BAD_END, bare):
            reason = "behind the end of --command the recipients would be a command or input"
            raise StartupError(reason + '; end it in "&& :", below a here-document in ":"')
        self._parsed |= bool(re.search(_VARIABLE, bare))
        self._words = not re.search(_VARIABLE + rb"|<<|case|\s%F[<>]", bare)
        before, _, after = script.partition(b"%F")
        free = re.match(_FREE, script)
        self._script = [free[1] + _REFERENCE + script[free.end() :]] if free else script.split(b"%F", 1)
        self._delimiters = set(b"".join(re.findall(_DELIMITER, before))) & set(before[-1:] + after[:1] + b"+")

    def takes(self, address: bytes, is_sender: bool) -> bool:
        """Tell whether the command can be given an address."""
        if not is_sender or len(self._script) == 1:
            return not self._parsed or is_plain(address)
        # A word without @ may be a program, the end of a here-document or of a case, or the 2 of 2>.
        known = self._words or b"@" in address
        return is_plain(address) and known and not self._delimiters.intersection(address)

    def start(self, sender: bytes, recipients: Sequence[bytes], stdin: int, output: int) -> int:
        """Start the command for one mail, return its process id.  It owns neither descriptor.  Raises OSError."""
        sender = sender or b"MAILER-DAEMON"
        environment = {**self._environment, b"MSMTPD_SENDER": sender}
        if self._direct:
            try:
                words = self._text.replace(b"%F", sender, 1).split()
                return spawn([*words, *recipients], environment, stdin, output)
            except OSError as error:  # a builtin, a script without #!, or missing: for the shell
                if error.errno not in (errno.ENOENT, errno.EACCES, errno.ENOEXEC):
                    raise
        return spawn([b"/bin/sh", b"-c", sender.join(self._script), b"sh", *recipients], environment, stdin, output)

    def check(self) -> str:
        """Let the shell read a command that it will have to run; return a warning, or "".  Raises StartupError."""
        name, *rest = os.fsdecode(self._text).split()
        if os.path.basename(name) == "setsid" and not {"-w", "--wait"}.intersection(rest):
            return "setsid does not wait for its command, whose failure nobody will see; use setsid --wait"
        if self._direct and any(os.access(os.path.join(place, name), os.X_OK) for place in os.get_exec_path()):
            return ""
        import subprocess

        check = subprocess.run(["/bin/sh", "-n", "-c", b"a@b".join(self._script)], stderr=subprocess.PIPE, check=False)
        if check.returncode:
            reason = " ".join(last_lines(check.stderr, utf8=False))
            raise StartupError(f"--command is no valid shell command: {reason}")
        search = ["/bin/sh", "-c", 'command -v "$1"', "sh", name]  # it may be a builtin
        if self._direct and subprocess.run(search, stdout=subprocess.DEVNULL, check=False).returncode:
            return f"there is no command {name}; mails are refused with 451 until there is"
        return ""


def spawn(arguments: list[bytes], environment: Mapping[bytes, bytes], stdin: int, output: int) -> int:
    """Start a process in a session of its own, with all signals as they are by default."""
    try:
        actions = [(os.POSIX_SPAWN_DUP2, *pair) for pair in ((stdin, 0), (output, 1), (output, 2))]
        options: Any = {"file_actions": actions, "setsigmask": (), "setsigdef": _SIGNALS, "setsid": True}
        return os.posix_spawnp(arguments[0], arguments, environment, **options)
    except (AttributeError, NotImplementedError):  # PyPy has none, and that of the BSDs makes no session
        import subprocess
    popen: Any = {"stdin": stdin, "stdout": output, "stderr": output, "start_new_session": True}
    popen["preexec_fn"] = lambda: [signal.signal(number, signal.SIG_DFL) for number in _SIGNALS]
    child = subprocess.Popen(arguments, env=environment, **popen)
    child.returncode = 0  # it is ours to wait for, not that module's
    return child.pid


def judge(status: int) -> tuple[bytes, str]:
    """Return reply code and explanation for an exit status, -n for signal n.

    What is not the mail's fault is temporary: the client shall try again.
    """
    if status == 0:
        return b"250 2.0.0", "Ok"
    if status in (126, 127):
        return b"451 4.3.5", f"Command, or a program in it, could not be run (exit status {status})"
    if status < 0 or 129 <= status <= 159:
        return b"451 4.3.0", f"Command was ended by signal {-status if status < 0 else status - 128}"
    name = f" ({EXIT_NAMES[status]})" if status in EXIT_NAMES else ""
    if status in TEMPORARY:
        return b"451 4.3.0", f"Command failed for now with exit status {status}{name}"
    return b"554 5.3.0", f"Command failed with exit status {status}{name}"


def failure_reply(code: bytes, text: str, output: bytes, utf8: bool) -> Reply:
    """Return a reply that says what happened and what the command had to say about it.

    `code` is the reply code and the enhanced one; the output's last lines are
    cleaned to printable text, and to ASCII unless the client knows better.
    """
    room = MAX_REPLY_LINE - len(code) - len(b" \r\n")
    texts = [line.encode()[:room].decode(errors="ignore").encode() for line in (text, *last_lines(output, utf8))]
    lines = [b"%s %s\r\n" % (code, line) for line in texts]
    return b"".join(line.replace(b" ", b"-", 1) for line in lines[:-1]) + lines[-1]


def last_lines(output: bytes, utf8: bool, most: int = MAX_OUTPUT_LINES) -> list[str]:
    """Return the last few lines of a command's output that are not blank, as printable text."""
    lines = []
    for line in output.decode(errors="replace").replace("\t", " ").splitlines():
        text = "".join(c if c.isprintable() and (utf8 or c.isascii()) else "?" for c in line).strip()
        if text:
            lines.append(text)
    return lines[-most:]


# ---- Log -------------------------------------------------------------------
#
# Nothing here waits: a terminal may be stopped, a pipe or the syslog daemon hang.
# What cannot be written at once is dropped; a line that a full disk has cut gets
# its end before the next.  Failing to write one never disturbs a mail.  Text that
# comes from a client or a command goes through escape() or last_lines(): nobody
# forges a line or an escape sequence.

LOG_MAIL = 2 << 3  # RFC 5424 section 6.2.1, as are these:
SEVERITIES = {"info": 6, "warning": 4, "error": 3}
SYSLOG_SOCKETS = ("/dev/log", "/var/run/log", "/var/run/syslog")  # of Linux, the BSDs, macOS


class Log:
    """Where the log goes: a sink, or nowhere."""

    def __init__(self, sink: Sink | None = None, on_stderr: bool = False) -> None:
        self._sink = sink
        self.silent = sink is None
        self.on_stderr = on_stderr  # who reads standard error has these lines, too

    def write(self, level: str, text: str) -> None:
        """Log one line; `level` is info, warning or error."""
        if self._sink is not None:
            try:
                self._sink.write(level, text.encode("ascii", "backslashreplace").decode())
            except Exception:
                pass  # a full disk, or whatever else it is, is no reason to refuse mail

    def reopen(self) -> None:
        if isinstance(self._sink, FileSink):
            try:
                self._sink.open()
            except OSError:
                pass  # the old file goes on


class SyslogSink:
    """The system's log, facility mail.  syslog(3) would wait for a daemon that hangs."""

    def __init__(self) -> None:
        self._sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        self._sock.setblocking(False)

    def connect(self) -> bool:
        """Find the daemon, which may have been started anew, and return whether it is there."""
        return any(self._sock.connect_ex(path) == 0 for path in SYSLOG_SOCKETS)

    def write(self, level: str, text: str) -> None:
        date = time.strftime("%b %e %H:%M:%S")
        line = f"<{LOG_MAIL + SEVERITIES[level]}>{date} msmtpd[{os.getpid()}]: {text}".encode()
        try:
            self._sock.send(line)
        except BlockingIOError:
            pass  # it is there, but does not read
        except OSError:
            if self.connect():
                self._sock.send(line)


class StreamSink:
    """An open descriptor, such as standard error.  What it cannot take at once is dropped."""

    def __init__(self, descriptor: int, journal: bool = False) -> None:
        self.descriptor = descriptor
        self._journal = journal  # which has date and name of its own, see sd-daemon(3)
        self._torn = False  # the last line has no end

    def write(self, level: str, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        head = f"<{SEVERITIES[level]}>" if self._journal else f"{now} msmtpd[{os.getpid()}] {level}: "
        line = f"{head}{text}\n".encode()
        written = write_now(self.descriptor, b"\n" * self._torn + line)
        if written:
            self._torn = written < self._torn + len(line)


def unshared(descriptor: int) -> int:
    """Open a terminal anew: O_NONBLOCK is for all who share a descriptor, and a shell may trip over it."""
    try:
        return os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return descriptor  # no terminal, or one of somebody else's, as behind su(1)


def write_now(descriptor: int, data: bytes) -> int:
    """Write what can be written without waiting, and return how much.

    Others may share the descriptor, so it is non-blocking only for this moment.  To ask poll() would
    not do: "writable" means PIPE_BUF octets for a pipe, but one for a terminal.
    """
    try:
        blocking = os.get_blocking(descriptor)
        os.set_blocking(descriptor, False)
        try:
            return os.write(descriptor, data)
        finally:
            os.set_blocking(descriptor, blocking)
    except OSError:
        return 0


class FileSink:
    """A file, which is opened anew when it has been moved away (log rotation)."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._stream = StreamSink(-1)
        self.open()

    def open(self) -> None:
        """Open the file (again).  Raises OSError, and keeps the one it had."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
        if self._stream.descriptor >= 0:
            os.close(self._stream.descriptor)
        self._stream.descriptor = descriptor

    def write(self, level: str, text: str) -> None:
        try:
            if not os.path.exists(self._path) or not os.path.samefile(self._path, self._stream.descriptor):
                self.open()
        except OSError:
            pass  # better in the moved file than nowhere
        self._stream.write(level, text)


# ---- Event loop ------------------------------------------------------------
#
# One loop, no threads.  A task is what waits for descriptors and deadlines; the
# loop calls its ready() and expire().  A task that has more to do than its
# turn allows asks for another one and is resumed after everybody else; the more
# have something to do, the less one may: `crowd`.
#
# There is one timer, `_wake_at`: no task is due before it.  Deadlines mostly
# move away, with every bit of progress, and cost nothing then: only when the
# timer fires are all tasks asked when they are due.  A task whose deadline
# comes nearer says so by schedule().
#
# An exception in a task ends that task, by its crash(), and nothing else.
#
# The wait is poll(2) itself, without the module selectors.  It is on every system,
# takes regular files (epoll does not) and descriptors beyond 1024 (select() does
# not), and to watch a descriptor, or no longer, takes no system call.

READ, WRITE = select.POLLIN, select.POLLOUT


class Task:
    """What the loop calls.

    ready() when a descriptor can be read or written, as READ or WRITE in
    `events` say, resume() when it was asked to, expire() at the time that due()
    tells by the loop's clock, crash() when one of these has raised an exception.
    """

    def ready(self, events: int) -> None: ...
    def resume(self) -> None: ...
    def expire(self) -> None: ...
    def crash(self) -> None: ...
    def due(self) -> float:
        return NEVER


class Loop:
    """Watches descriptors and deadlines on behalf of tasks.

    `now` is the clock's reading when the wait of this turn was over, in seconds.
    """

    def __init__(self, poll: select.poll, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock()
        self._poll = poll
        self._log = log
        self._clock = clock
        self._watched: dict[int, tuple[Task, int]] = {}
        self._resumable: dict[Task, None] = {}  # in the order of their requests
        self._timed: set[Task] = set()
        self._wake_at = NEVER
        self.crowd = 1  # what a task may do in this turn is divided by this

    def watch(self, descriptor: int, events: int, task: Task) -> None:
        """Call task.ready() whenever the descriptor is; `events` 0 for no longer."""
        if events:
            self._watched[descriptor] = task, events
            self._poll.register(descriptor, events)
        elif self._watched.pop(descriptor, None):
            self._poll.unregister(descriptor)

    def resume_later(self, task: Task) -> None:
        """Call task.resume() when all that is ready now has had its turn."""
        self._resumable[task] = None

    def add_timed(self, task: Task) -> None:
        """Call task.expire() once it is due, until remove_timed()."""
        self._timed.add(task)
        self.schedule(task.due())

    def remove_timed(self, task: Task) -> None:
        self._timed.discard(task)

    def schedule(self, when: float) -> None:
        """See to it that a task is not late that is due at `when`."""
        self._wake_at = min(self._wake_at, when)

    def turn(self) -> None:
        """Wait for something to do and let everybody have a turn at it."""
        timeout = None if self._wake_at == NEVER else max(0.0, self._wake_at - self._clock()) * 1000
        ready = self._poll.poll(0 if self._resumable else timeout)
        self.now = self._clock()
        if self.now >= self._wake_at:  # we may have been stopped: what has happened counts before what is late
            ready = self._poll.poll(0)
        self.crowd = (len(ready) + len(self._resumable)) // TURN_TASKS or 1
        for descriptor, mask in ready:
            task, events = self._watched.get(descriptor, (None, 0))
            if task is not None:  # one before it may have closed the descriptor
                self.guard(task, task.ready, mask & events or events)  # after an error, for all that is waited for
        resumable, self._resumable = self._resumable, {}
        for task in resumable:
            self.guard(task, task.resume)
        if self.now >= self._wake_at:
            self._expire()

    def _expire(self) -> None:
        for task in list(self._timed):
            if task in self._timed and task.due() <= self.now:
                self.guard(task, task.expire)
        self._wake_at = min((task.due() for task in self._timed), default=NEVER)

    def guard(self, task: Task, method: Callable[..., None], *arguments: object) -> None:
        """Call a task's method; an exception is logged and ends only this task."""
        try:
            method(*arguments)
        except Exception as error:
            self._report(error)
            try:
                task.crash()
            except Exception as second:
                self._report(second)

    def _report(self, error: Exception) -> None:
        """Log a traceback; the traceback module might need descriptors that have run out."""
        self._log.write("error", f"unexpected {type(error).__name__}: {error}; please report it, with this traceback:")
        trace = error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            self._log.write("error", f"  {code.co_filename}:{trace.tb_lineno} in {code.co_name}")
            trace = trace.tb_next


# ---- Server ----------------------------------------------------------------
#
# Server begins and stops sessions; Admission decides who may come in, by its
# Listeners, and who must leave for that.  Connection performs the actions
# of a Session on descriptors.  Queue lets mails wait for their turn, Delivery
# runs the command for one, Output is what that prints.  Signals turns signals
# into events.
#
# The way of a mail: Connection.ready() reads, resume() performs what Session
# makes of it, Queue starts a Delivery when all input of this turn of the loop is
# worked off, reap() finds that its command has exited, and conclude() lets the
# session go on with the reply.
#
# Back-pressure is one rule: while a delivery or a pause is pending, or the
# client does not take its replies, nothing is read from it.
#
# Children are waited for one by one, by their process id, whenever a signal
# wakes us.  Every descriptor is close-on-exec.


class Server(Task):
    """The sessions of one process, from their beginning to the end of it all."""

    def __init__(self, loop: Loop, log: Log, policy: Policy, command: Command, throttle: Throttle) -> None:
        self.loop = loop
        self.log = log
        self.policy = policy
        self.throttle = throttle
        self.queue = Queue(loop, log, command)
        self.connections: set[Connection] = set()
        self.admission = Admission(loop, log, self.connections)
        self.stopping = 0  # how often it has been told to
        self.sessions = 0  # begun so far
        self._stop_at = NEVER  # when those that have not ended must
        self._notify: Callable[[str], None] = lambda state: None
        loop.add_timed(self)

    def listen(self, sockets: Iterable[socket.socket], notify: Callable[[str], None]) -> None:
        """Accept clients on listening sockets; `notify` gets systemd's state messages."""
        self.admission.listeners = [Listener(self, sock) for sock in sockets]
        self._notify = notify
        self.admission.update()
        notify("READY=1")

    def begin(self, reader: int, writer: int, sock: _socket.socket | None, client: str) -> Connection:
        """Begin a session on two descriptors, and their socket if it is one.

        `client` is an IP address, or empty where there is none.
        """
        self.sessions += 1
        connection = Connection(self, reader, writer, sock, client)
        self.connections.add(connection)
        self.loop.add_timed(connection)
        self.loop.guard(connection, connection.resume)
        return connection

    def ended(self, connection: Connection) -> None:
        """Forget a session, which makes room for another."""
        self.connections.discard(connection)
        self.admission.rest_until = NEVER  # there is a place now
        self.loop.remove_timed(connection)

    def run(self) -> None:
        """Serve until there is nothing left: no listener, no session, no command."""
        while self.admission.listeners or self.connections or self.queue.running:
            self.turn()

    def turn(self) -> None:
        self.admission.update()
        self.loop.turn()
        if self.stopping > 1:  # after this turn: a mail may have been delivered in it
            raise SystemExit(1)

    def stop(self) -> None:
        """Finish what is under way and accept nothing more; a second call ends at once."""
        self.stopping += 1
        if self.stopping > 1:
            self.log.write("warning", "second signal, ending at once")
            return
        self._stop_at = self.loop.now + STOP_TIMEOUT
        self.loop.schedule(self._stop_at)
        self._notify("STOPPING=1")
        sessions, commands = len(self.connections), len(self.queue.running)
        self.log.write("info", f"stopping, {sessions} sessions and {commands} commands to finish")
        self.admission.close()
        self._stop_sessions(now=False)

    def _stop_sessions(self, now: bool) -> None:
        for connection in list(self.connections):
            self.loop.guard(connection, connection.stop, now)

    def due(self) -> float:
        return self._stop_at

    def expire(self) -> None:
        self._stop_at = NEVER
        self._stop_sessions(now=True)


class Admission(Task):
    """Who may come in, and who must leave for that.

    Where all sessions are taken, or descriptors have run out, a client gets the
    place of the session that has gone longest without delivering a mail, if it
    has for CROWDED_TIMEOUT.  Whatever else it does is no merit, or a crowd could
    keep everybody out with NOOP.  If there is none, clients wait in the backlog.
    """

    def __init__(self, loop: Loop, log: Log, connections: set[Connection]) -> None:
        self.max_sessions = MAX_SESSIONS
        self.listeners: list[Listener] = []
        self._loop = loop
        self._log = log
        self._connections = connections
        self._open = False  # the listeners are watched
        self.rest_until = NEVER  # while nothing is accepted
        self._crowded_until = NEVER  # while clients have to wait, or have had to lately
        loop.add_timed(self)

    def update(self) -> None:
        """Watch the listeners or not, as it is right now: called in every turn of the loop."""
        admits = self.rest_until == NEVER
        if admits != self._open:
            self._open = admits
            for listener in self.listeners:
                listener.watch(admits)

    def places(self) -> int:
        """Return how many clients may come in now; for the first of them somebody may have to leave."""
        if len(self._connections) >= self.max_sessions:
            self._make_room(f"all {self.max_sessions} sessions are taken, further clients wait")
        return min(TURN_TASKS, self.max_sessions - len(self._connections))

    def failed(self, error: OSError) -> None:
        """Take note that a client could not be accepted."""
        dismiss = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
        self._make_room(f"cannot accept clients for now: {error.strerror}", dismiss)

    def _make_room(self, reason: str, dismiss: bool = True) -> None:
        """End the session that is worth least, or else accept nothing until one has ended or a moment is over."""
        now = self._loop.now
        useless = [c for c in self._connections if c.worth != NEVER and c.delivered_at <= now - CROWDED_TIMEOUT]
        if dismiss and useless:
            victim = min(useless, key=lambda connection: connection.worth)
            self._loop.guard(victim, victim.make_room)
            return
        if self._crowded_until == NEVER:
            self._log.write("warning", reason)
        self._crowded_until = now + CROWDED_TIMEOUT
        self.rest_until = now + RETRY_DELAY
        self._loop.schedule(self.rest_until)

    def close(self) -> None:
        """Accept nothing any more."""
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    def due(self) -> float:
        return min(self.rest_until, self._crowded_until)

    def expire(self) -> None:
        if self._loop.now >= self.rest_until:
            self.rest_until = NEVER
        if self._loop.now >= self._crowded_until:
            self._crowded_until = NEVER
            self._log.write("info", "clients no longer wait")


def set_tcp(sock: _socket.socket | None, option: str) -> None:
    """Set an option where the system has it and the socket is TCP."""
    try:
        if sock is not None:
            sock.setsockopt(_socket.IPPROTO_TCP, getattr(_socket, option), 1)
    except (AttributeError, OSError):
        pass


# The phases of a connection
OPEN = "open"  # reads commands or data, answers them
PAUSED = "paused"  # the throttle holds back the outcome of an authentication
DELIVERING = "delivering"  # a delivery waits or runs
CLOSING = "closing"  # the last replies are being written
DRAINING = "draining"  # they are; what the client still sends is dropped
CLOSED = "closed"  # nothing is left


class Connection(Task):
    """Performs the actions of a Session on two descriptors, which may be one socket.

    PAUSED <-- _pause() --- OPEN --- _deliver() --> DELIVERING
       |  --- _reopen() -->   |   <-- _reopen() ---     |
       +----------------------+-------------------------+
                              | _close()
                           CLOSING ---- _drain() --> DRAINING
                              | _forget()               | _forget()
                              +--------> CLOSED <-------+

    From OPEN and PAUSED a client that has vanished goes to CLOSED at once.
    """

    def __init__(self, server: Server, reader: int, writer: int, sock: _socket.socket | None, client: str) -> None:
        self._server = server
        self._loop = server.loop
        self._number = server.sessions
        self._reader = reader
        self._writer = writer
        self._sock = sock
        set_tcp(sock, "TCP_NODELAY")
        self._client = client
        # Not a bound method: connection and session would be a cycle, which only the garbage collector frees.
        self._session = Session(server.policy, lambda name, protocol: open_spool(sock, client, name, protocol))
        self._phase = OPEN
        self._actions: list[Action] = []  # not yet performed
        self._replies = bytearray(GREETING)  # not yet written
        self._events = 0  # that we wait for
        self.delivered_at = self._loop.now  # when its last mail was, or it began
        self._deadline = self._loop.now + IDLE_TIMEOUT  # moved away by any progress; NEVER while DELIVERING
        self.orderly = False  # ended by QUIT or EOF between mails

    def log(self, level: str, text: str) -> None:
        self._server.log.write(level, f"session {self._number} [{self._client or 'local'}]: {text}")

    # Input and output

    def ready(self, events: int) -> None:
        if events & READ:
            self._receive()
        else:
            self._flush()
            self.resume()

    def _receive(self) -> None:
        try:
            data = os.read(self._reader, RECEIVE_SIZE // self._loop.crowd)
        except BlockingIOError:
            return
        except OSError:
            self._vanish()
            return
        if self._phase == DRAINING:
            if not data:
                self._forget()
            return
        if self._session.data is not None:
            earned = self._deadline + len(data) * DATA_SECONDS_PER_OCTET
            self._deadline = min(self._loop.now + IDLE_TIMEOUT, earned)
        self._session.receive(data)
        self.resume()

    def _flush(self) -> None:
        try:
            while self._replies:
                del self._replies[: os.write(self._writer, self._replies)]
                if self._phase == CLOSING:
                    self._set_deadline(FLUSH_TIMEOUT)
        except BlockingIOError:
            return
        except OSError:
            self._vanish()
        if self._phase == CLOSING:
            self._drain()

    def _watch(self, hungry: bool = False) -> None:
        """Tell the loop what we wait for; `hungry` says that the session has asked for input."""
        if self._phase == CLOSED:
            return
        if self._phase == OPEN and not hungry and len(self._replies) <= REPLY_BUFFER:
            self._loop.resume_later(self)  # its turn is over, or its replies have just been taken
        events = READ * (hungry or self._phase == DRAINING) | WRITE * bool(self._replies)
        if events == self._events:
            return
        self._events = events
        if self._reader == self._writer:
            self._loop.watch(self._reader, events, self)
        else:
            self._loop.watch(self._reader, events & READ, self)
            self._loop.watch(self._writer, events & WRITE, self)

    # Actions

    def resume(self) -> None:
        """Perform what the session wants until it needs input, must wait, or its turn is over."""
        hungry = False
        for _ in range(TURN_STEPS // self._loop.crowd):
            if self._server.stopping:
                self.stop(now=False)
            if self._phase != OPEN or len(self._replies) > REPLY_BUFFER:
                break
            actions = self._actions or self._session.step()
            self._actions = []
            if not actions:
                hungry = True
                if not self._replies:
                    set_tcp(self._sock, "TCP_QUICKACK")  # most clients send the final dot only after that
                break
            self._deadline = self._loop.now + IDLE_TIMEOUT
            for action in actions:
                self._perform(action)
        self._flush()
        self._watch(hungry)

    def _perform(self, action: Action) -> None:
        if isinstance(action, bytes):
            self._replies += action
        elif isinstance(action, Deliver):
            self._deliver(action)
        elif isinstance(action, AuthResult):
            self._actions = action.then
            self._pause(self._server.throttle.delay(self._loop.now, action.failed))
        elif isinstance(action, Note):
            self.log(action.level, action.text)
        else:
            self._close(b"", action.orderly)

    def conclude(self, delivered: bool, reply: Reply) -> None:
        """Take the outcome of the session's delivery; its client may have gone."""
        if self._phase == DELIVERING:
            self._actions = self._session.conclude(delivered, reply)
            if delivered:
                self.delivered_at = self._loop.now
            self._reopen()

    # Time

    def due(self) -> float:
        return self._deadline

    @property
    def worth(self) -> float:
        """When it delivered its last mail, later for what has come of the next; NEVER while that is delivered."""
        if self._phase == DELIVERING:
            return NEVER
        return self.delivered_at + (self._session.data.size * DATA_SECONDS_PER_OCTET if self._session.data else 0.0)

    def make_room(self) -> None:
        if self._phase in (OPEN, PAUSED):
            self._dismiss("client has to make room for another", TOO_MANY_SESSIONS)
        self._forget()

    def _dismiss(self, reason: str, reply: Reply) -> None:
        self.log("warning" if self._session.envelope else "info", reason)
        self._close(reply)

    def expire(self) -> None:
        if self._phase == OPEN:
            self._dismiss("client timed out", TIMED_OUT)
        elif self._phase == PAUSED:
            self._reopen()
        else:
            self._forget()

    def _set_deadline(self, delay: float) -> None:
        self._deadline = self._loop.now + delay
        self._loop.schedule(self._deadline)

    # Phases

    def _pause(self, delay: float) -> None:
        if delay:
            self._phase = PAUSED
            self._set_deadline(delay)

    def _deliver(self, mail: Deliver) -> None:
        self._phase = DELIVERING
        self._deadline = NEVER
        self._server.queue.submit(self, mail)

    def _reopen(self) -> None:
        self._phase = OPEN
        self._set_deadline(IDLE_TIMEOUT)
        self._loop.resume_later(self)

    def stop(self, now: bool) -> None:
        """End a session because the server stops: before its next mail, or `now`, but for a delivery."""
        busy = self._session.envelope or (self._actions and len(self._replies) <= REPLY_BUFFER)
        if (self._phase == OPEN and (now or not busy)) or (self._phase == PAUSED and now):
            self._close(SHUTTING_DOWN)

    def crash(self) -> None:
        if self._phase != CLOSED:
            try:
                self._close(INTERNAL_ERROR)
            except Exception:
                self._forget()  # what has failed may be what this needs
                raise

    def _close(self, last_reply: Reply, orderly: bool = False) -> None:
        """Read nothing more, and send what is still to be said."""
        self._replies += last_reply
        self.orderly = orderly
        self._phase = CLOSING
        self._set_deadline(FLUSH_TIMEOUT)
        self._flush()
        self._watch()

    def _drain(self) -> None:
        """End our direction, and wait for the client's end unless it has said QUIT.

        If we closed while input is unread, the kernel would reset the
        connection and the client might never see our last reply.
        """
        try:
            if self._sock is not None and not self._session.ended and not self.orderly:
                self._sock.shutdown(_socket.SHUT_WR)
                self._phase = DRAINING
                self._set_deadline(LINGER_TIMEOUT)
                return
        except OSError:
            pass  # the client has gone already
        self._forget()

    def _vanish(self) -> None:
        """Forget a client that has reset the connection; but its place stays taken while its delivery goes on."""
        if self._phase == DELIVERING:
            self._replies.clear()
            return
        if self._session.envelope and self._phase == OPEN:
            self.log("warning", "client vanished in the middle of a mail")
        self._forget()

    def _forget(self) -> None:
        if self._phase == CLOSED:
            return
        self._phase = CLOSED
        self._replies.clear()
        self._session.end_transaction()
        self._loop.watch(self._reader, 0, self)
        self._loop.watch(self._writer, 0, self)
        if self._sock is not None:
            self._sock.close()
        self._server.ended(self)


class Queue(Task):
    """The mails whose commands run or wait for their turn."""

    def __init__(self, loop: Loop, log: Log, command: Command) -> None:
        self.loop = loop
        self.log = log
        self.command = command
        self.outputs = Outputs(loop, log)
        self.running: set[Delivery] = set()
        self._waiting: list[Delivery] = []

    def submit(self, connection: Connection, mail: Deliver) -> None:
        """Put a mail at the end of the queue."""
        delivery = Delivery(self, connection, mail)
        self._waiting.append(delivery)
        self.loop.add_timed(delivery)
        self.loop.resume_later(self)

    def resume(self) -> None:
        """Start commands, until MAX_COMMANDS are running or no mail waits."""
        while self._waiting and len(self.running) < MAX_COMMANDS:
            delivery = self._waiting.pop(0)
            self.running.add(delivery)
            self.loop.guard(delivery, delivery.start)

    def reap(self) -> None:
        """Look which commands have exited."""
        for delivery in list(self.running):
            self.loop.guard(delivery, delivery.reap)
        try:  # process 1 inherits what commands leave behind
            while os.getpid() == 1 and (child := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
                if child.si_pid in [delivery.pid for delivery in self.running]:
                    break  # it has just exited, and we shall be told
                os.waitpid(child.si_pid, 0)
        except ChildProcessError:
            pass

    def finished(self, delivery: Delivery) -> None:
        """Forget a delivery, which makes room for another."""
        self.running.discard(delivery)
        if delivery in self._waiting:
            self._waiting.remove(delivery)
        self.loop.remove_timed(delivery)
        self.loop.resume_later(self)


class Delivery(Task):
    """Runs the command for one mail, and tells the client how it went."""

    def __init__(self, queue: Queue, connection: Connection, mail: Deliver) -> None:
        self._queue = queue
        self._connection = connection
        self._mail = mail
        self._received = queue.loop.now
        self.deadline = self._received + QUEUE_TIMEOUT  # for its turn, then for its command
        self.pid = 0  # while it runs
        self._output: Output | None = None  # once it runs
        self._killed = ""  # why it was: then its exit status tells nothing

    # The process

    def start(self) -> None:
        self.deadline = self._received + DELIVERY_TIMEOUT
        try:
            self._spawn()
        except OSError as error:
            self._fail(b"451 4.3.0", "Command could not be started", os.fsencode(error.strerror or ""))
        finally:
            self._mail.spool.close()

    def _spawn(self) -> None:
        envelope = self._mail.envelope
        stdin = self._mail.spool.open()
        try:
            self._output = Output(self._queue.outputs)
            self.pid = self._queue.command.start(envelope.sender, envelope.recipients, stdin, self._output.writer)
        finally:
            os.close(stdin)

    def due(self) -> float:
        return self.deadline

    def expire(self) -> None:
        """End a mail whose turn has not come, or its command: first by SIGTERM, then by SIGKILL."""
        if not self.pid:
            self._mail.spool.close()
            self._fail(b"451 4.3.0", "No command was free in time", b"")
            return
        self._kill_group(signal.SIGKILL if self._killed else signal.SIGTERM)
        self._killed = f"Command was still running {DELIVERY_TIMEOUT:.0f} seconds after the mail"
        self.deadline = self._queue.loop.now + KILL_DELAY

    def _kill_group(self, number: int) -> None:
        """Send a signal to the command and all that it has started."""
        try:
            os.killpg(self.pid, number)
        except OSError:
            pass  # it has just ended

    def reap(self) -> None:
        """Finish if the command has exited."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return
        if self._killed:
            self._kill_group(signal.SIGKILL)  # what is left of its group
        self.pid = 0
        self._judge(os.waitstatus_to_exitcode(status))

    def crash(self) -> None:
        """Tell the client, and leave no process behind whose outcome nobody would tell."""
        if self.pid:
            self._killed = "Command was ended after an internal error"
            self._kill_group(signal.SIGKILL)
        else:
            self._release()
        self._connection.crash()

    # The outcome

    def _judge(self, status: int) -> None:
        assert self._output is not None
        self._output.end()
        if self._killed:  # even if it exits with 0 now: a script may do so when the program in it has been killed
            self._fail(b"451 4.3.0", self._killed, self._output.kept)
        elif status == 0:
            self._finish(True, DELIVERED, "Ok", self._output.kept)
        else:
            self._fail(*judge(status), self._output.kept)

    def _fail(self, code: bytes, text: str, output: bytes) -> None:
        self._finish(False, failure_reply(code, text, output, self._mail.envelope.utf8), text, output)

    def _finish(self, delivered: bool, reply: Reply, text: str, output: bytes) -> None:
        if not self._queue.log.silent:
            self._log("info" if delivered else "error", reply, text, output)
        self._release()
        self._connection.conclude(delivered, reply)

    def _log(self, level: str, reply: Reply, text: str, output: bytes) -> None:
        seconds = self._queue.loop.now - self._received
        outcome = f"size={self._mail.size} reply={reply[:3].decode()} seconds={seconds:.3f} result={text}"
        said = ["command said: " + line[:LOG_FIELD] for line in last_lines(output, utf8=False, most=len(output))]
        for line in self._mail.envelope.log_lines(outcome) + said:
            self._connection.log(level, line)

    def _release(self) -> None:
        if self._output is not None:
            self._output.end()
        self._queue.finished(self)


class Outputs:
    """Where what commands print goes, and those that print on after their command's end."""

    def __init__(self, loop: Loop, log: Log) -> None:
        self.loop = loop
        self.log = log
        self.mirror = -1  # our standard error, where nobody would see it else
        self.leftovers: list[Output] = []


class Output(Task):
    """What one command prints: a pipe, of which head and tail are kept.

    It is read after the command's end too, while another process can print into
    it: that would wait or die of SIGPIPE otherwise, with a mail perhaps that has
    been acknowledged.
    """

    def __init__(self, outputs: Outputs) -> None:
        self.kept = b""
        self._forgiven_at = 0.0  # when all that it has printed will be: some is with every second
        self._outputs = outputs
        # We keep the other end, or its EOF would wake us just before SIGCHLD does.
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        outputs.loop.watch(self._reader, READ, self)

    def ready(self, events: int) -> None:
        if not self._read():
            self._close()
        elif self.writer < 0 and self._forgiven_at > self._outputs.loop.now + 3600:
            self._abandon("a process that a command has left behind prints on and on, and")

    def _read(self) -> bool:
        """Keep head and tail of what is printed; return whether more may come."""
        try:
            data = os.read(self._reader, RECEIVE_SIZE)
        except BlockingIOError:
            return True
        text = self.kept + data
        if len(text) > OUTPUT_HEAD + OUTPUT_TAIL:
            text = text[:OUTPUT_HEAD] + b"\n...\n" + text[-OUTPUT_TAIL:]
        self.kept = text
        self._forgiven_at = max(self._forgiven_at, self._outputs.loop.now) + len(data) * 3600 / LEFTOVER_OUTPUT
        if data and self._outputs.mirror >= 0:
            write_now(self._outputs.mirror, data)
        return bool(data)

    def end(self) -> None:
        """Take what is in the pipe now that its command has ended."""
        if self.writer < 0:
            return
        os.close(self.writer)
        self.writer = -1
        self._forgiven_at = 0.0  # a command itself may print what it wants
        # Up to the end, but not for ever: the biggest pipe (16 pages of 64 KiB), and its end.
        if not all(self._read() for _ in range(MAX_PIPE // RECEIVE_SIZE + 1)):
            self._close()
            return
        self._outputs.leftovers.append(self)
        if len(self._outputs.leftovers) > MAX_LEFTOVERS:
            self._outputs.leftovers[0]._abandon(
                f"commands have left more than {MAX_LEFTOVERS} processes behind that may print, the oldest"
            )

    def _abandon(self, reason: str) -> None:
        self._outputs.log.write("warning", f"{reason} is cut off; let them print to a file")
        self._close()

    def _close(self) -> None:
        if self in self._outputs.leftovers:
            self._outputs.leftovers.remove(self)
        self._outputs.loop.watch(self._reader, 0, self)
        os.close(self._reader)
        self._reader = -1

    def crash(self) -> None:
        self._close()


class Listener(Task):
    """A listening socket."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        sock.setblocking(False)
        # Clients' sockets inherit it; Linux would take up to 4 MB of replies for a client that reads none.
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, REPLY_BUFFER)
        self._server = server
        self._sock = sock

    def watch(self, wanted: bool) -> None:
        self._server.loop.watch(self._sock.fileno(), READ * wanted, self)

    def ready(self, events: int) -> None:
        for _ in range(self._server.admission.places()):
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, ConnectionError):
                return  # nobody is left, or a client has gone already
            except OSError as error:
                self._server.admission.failed(error)
                return
            sock.setblocking(False)
            self._server.begin(sock.fileno(), sock.fileno(), sock, ip_address(address))

    def close(self) -> None:
        self.watch(False)
        self._sock.close()


class Signals(Task):
    """Turns signals into events of the loop, through a pipe that Python writes them to."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._reader, writer = os.pipe()
        for end in (self._reader, writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever has started us may have blocked some
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: None)
        server.loop.watch(self._reader, READ, self)

    def ready(self, events: int) -> None:
        try:
            numbers = os.read(self._reader, 4096)
        except BlockingIOError:
            return
        self._server.queue.reap()
        if signal.SIGHUP in numbers:
            self._server.log.reopen()
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._server.stop()


# ---- Inetd -----------------------------------------------------------------
#
# The same Server without listeners, and one Connection on descriptors 0 and 1:
# a socket, two pipes, a terminal or a regular file.  Classic inetd puts the
# socket on descriptor 2 as well, where nothing but SMTP may ever be written;
# main() has seen to that before anything else.


def serve_inetd(server: Server) -> int:
    """Serve one session on descriptors 0 and 1 and return the exit status."""
    sock, client = standard_socket()
    blocking = [os.get_blocking(descriptor) for descriptor in (0, 1)]
    try:
        for descriptor in (0, 1):
            os.set_blocking(descriptor, False)
        connection = server.begin(0, 1, sock, client)
        server.run()
    finally:
        # They may be somebody else's terminal or file too.  A socket on 0 is closed by now.
        for descriptor in (0, 1) if sock is None else (1,):
            os.set_blocking(descriptor, blocking[descriptor])
    return 0 if connection.orderly else 1


def is_same(one: int, other: int) -> bool:
    """Tell whether two descriptors are open on the same file, pipe or socket."""
    if not os.path.sameopenfile(one, other) or os.fstat(one).st_ino:
        return os.path.sameopenfile(one, other)
    # Sockets of the BSDs, and pipes of OpenBSD, are all alike; but duplicates share O_NONBLOCK.
    blocking, before = os.get_blocking(one), os.get_blocking(other)
    os.set_blocking(one, not before)
    same = os.get_blocking(other) != before
    os.set_blocking(one, blocking)
    return same


def listens(sock: _socket.socket) -> bool:
    """Tell whether a socket listens; neither macOS nor OpenBSD lets us ask for SO_ACCEPTCONN."""
    try:
        sock.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.EINVAL)  # EINVAL: a Unix socket on Linux
    return False


def standard_socket() -> tuple[_socket.socket | None, str]:
    """Return descriptor 0 as a socket, if it is one and 1 is the same, and the client's address."""
    if not is_same(0, 1):
        return None, ""  # some programs make pipes of sockets
    try:
        sock = _socket.socket(fileno=0)
    except OSError:
        return None, ""
    if listens(sock):
        raise StartupError("descriptor 0 listens; --inetd needs nowait in inetd.conf, Accept=yes in a .socket unit")
    try:
        return sock, ip_address(sock.getpeername())
    except OSError:  # the client has gone already
        return sock, ""


# ---- Passwords -------------------------------------------------------------
#
# From the command given with --auth, else from the key ring, else from a
# prompt if there is a terminal.  Whatever fails ends the start-up with one
# line.  In inetd mode nothing may touch descriptors 0 and 1, nor wait for a
# person.


def get_password(user: str, command: str, inetd: bool) -> bytes:
    """Return the password for --auth=user,command or --auth=user.  Raises StartupError."""
    if command:
        return password_from_command(command, inetd)
    password, trouble = password_from_key_ring(user)
    if password:
        return password
    if inetd or not has_terminal():
        raise StartupError(f"{trouble}, and no terminal to ask for a password; use --auth={user},command")
    return password_from_prompt(user)


def password_from_command(command: str, inetd: bool) -> bytes:
    import subprocess

    stdin = subprocess.DEVNULL if inetd else None
    output = b""
    with subprocess.Popen(command, shell=True, stdin=stdin, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout
        poll = select.poll()  # select() would refuse a descriptor beyond 1024
        poll.register(process.stdout, READ)
        while b"\n" not in output and len(output) < MAX_AUTH_LINE:  # a client could not say more
            gone = process.poll() is not None  # maybe leaving another behind that keeps its output open
            ready = poll.poll(100)
            piece = process.stdout.read(MAX_AUTH_LINE) if ready else b""
            output += piece
            if not piece and (ready or gone):
                break
    if process.returncode not in (0, -signal.SIGPIPE, 128 + signal.SIGPIPE):
        raise StartupError(f"the password command of --auth failed with exit status {process.returncode}: {command!a}")
    password = first_line(output)
    if not 0 < len(password) < MAX_AUTH_LINE:
        raise StartupError(f"the password command of --auth printed no password: {command!a}")
    return password


def first_line(output: bytes) -> bytes:
    return output.partition(b"\n")[0].rstrip(b"\r")


def password_from_key_ring(user: str) -> tuple[bytes, str]:
    """Look where the manual page tells to store it; return the password, or b"" and the reason."""
    import subprocess

    query = ["secret-tool", "lookup", "host", "localhost", "service", "smtp", "user", user]
    if sys.platform == "darwin":
        query = ["security", "find-internet-password", "-s", "localhost", "-r", "smtp", "-a", user, "-g"]
    try:
        result = subprocess.run(
            query, stdin=subprocess.DEVNULL, capture_output=True, timeout=KEY_RING_TIMEOUT, check=False
        )
    except OSError as error:
        return b"", f"cannot ask the key ring by {query[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return b"", f"the key ring did not answer within {KEY_RING_TIMEOUT:.0f} seconds"
    if result.returncode:
        reason = "".join(f" ({line})" for line in last_lines(result.stderr, utf8=False)[-1:])
        return b"", f"no password for {user} in the key ring{reason}"
    password = result.stdout
    if query[0] == "security":  # password: "..." or, if that is not plain ASCII, 0x...; -w leaves the two alike
        text = result.stderr.partition(b"password: ")[2].rstrip(b"\n")
        password = binascii.unhexlify(text[2:].split()[0]) if text.startswith(b"0x") else text[1:-1]
    return first_line(password), f"the password for {user} in the key ring is empty"


def has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
        return True
    except OSError:
        return False


def password_from_prompt(user: str) -> bytes:
    import getpass

    try:
        password = getpass.getpass(f"Password for {user} at msmtpd: ")
    except (EOFError, KeyboardInterrupt):
        password = ""
    if not password:
        raise StartupError("no password given")
    return os.fsencode(password)


# ---- Command line ----------------------------------------------------------
#
# Options as getopt_long(3) takes them: --port 2500, --port=2500, --po 2500.
# Every error is one line on standard error that says what to do, and exit
# status 3.  argparse and getopt are not used: importing them takes longer than
# all the rest of the start-up.

EXIT_STARTUP = 3
DEFAULT_COMMAND = "msmtp -f %F --"
DEFAULT_INTERFACE = "127.0.0.1"
DEFAULT_PORT = 25
# Opening a name would fail for a socket and for the pipe of another user: the descriptor itself is meant.
STDOUT_NAMES = ("-", "stdout", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
STDERR_NAMES = ("stderr", "/dev/stderr", "/dev/fd/2", "/proc/self/fd/2")

HELP_TEXT = f"""\
Usage: msmtpd [option...]
A minimal SMTP server that pipes each mail to a command.

  --version               print the version and exit
  --help                  print this help and exit
  --inetd                 serve one SMTP session on standard input and output
  --interface=ip          listen on this IPv4 or IPv6 address (default
                          {DEFAULT_INTERFACE}); may be given several times
  --port=number           listen on this port (default {DEFAULT_PORT})
  --log=none|syslog|stderr|file
                          where to log to (default none)
  --command=cmd           pipe mails to this command (default {DEFAULT_COMMAND}):
                          %F becomes the sender, the recipients are appended
  --auth=user[,passwordeval]
                          require authentication; the password is what the
                          command passwordeval prints, or else comes from the
                          key ring or a prompt (default: no authentication)
  --max-size=bytes        refuse bigger mails (default {MAX_MAIL_SIZE})

For a first try, as anybody, with the mails going to a file:
  msmtpd --port=2500 --log=stderr --command='cat >> mails && :'
The manual page msmtpd(1) tells the rest.
"""

FLAGS = ("version", "help", "inetd")
OPTIONS = (*FLAGS, "interface", "port", "log", "command", "auth", "max-size")


class Options:
    """The command line, read and checked."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.inetd = False
        self.interfaces: list[str] = []
        self.port = DEFAULT_PORT
        self.log = "none"
        self.command = DEFAULT_COMMAND
        self.auth = ""
        self.max_size = MAX_MAIL_SIZE
        for name, value in parse_options(arguments):
            if name in ("version", "help"):
                os.write(1, (HELP_TEXT if name == "help" else f"msmtpd {__version__}\n").encode())
                raise SystemExit(0)
            elif name == "interface":
                self.interfaces.append(value)
            elif name == "port":
                self.port = parse_number(name, value, 65535, " from 1 to 65535")
            elif name == "max-size":
                self.max_size = parse_number(name, value, 2**63 - 1, " of octets such as 10485760")
            else:
                setattr(self, name, name == "inetd" or value)
        self.interfaces = list(dict.fromkeys(self.interfaces)) or [DEFAULT_INTERFACE]
        self.user, comma, self.password_command = self.auth.partition(",")
        if self.auth and (not self.user or (not self.password_command if comma else " " in self.user)):
            raise StartupError("--auth needs a user name, and a comma before a command; see --help")


def parse_options(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Split the command line into pairs of option and argument.  Raises StartupError."""
    options = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--" and not rest:
            break
        if word == "--" or not word.startswith("--"):
            unexpected = rest[0] if word == "--" else word
            cure = "options begin with two dashes" if unexpected[:1] == "-" else "quote what has blanks"
            raise StartupError(f"unexpected argument {unexpected!a}; {cure}, see --help")
        given, equals, value = word[2:].partition("=")
        name = complete_option(given)
        if name not in FLAGS and not equals and rest:
            value = rest.pop(0)
        if name not in FLAGS and not value:
            raise StartupError(f"option --{name} needs an argument; see --help")
        if name in FLAGS and equals:
            raise StartupError(f"option --{name} takes no argument; see --help")
        options.append((name, value))
    return options


def complete_option(given: str) -> str:
    """Return the option that is meant by its name or an unambiguous beginning of it."""
    candidates = [name for name in OPTIONS if given and name.startswith(given)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise StartupError(f"option --{given} is ambiguous: " + ", ".join("--" + name for name in candidates))
    raise StartupError(f"unknown option {'--' + given!a}; see --help")


def parse_number(name: str, value: str, highest: int, kind: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 20 and 1 <= int(value) <= highest):
        raise StartupError(f"option --{name} needs a number{kind}, not {value!a}")
    return int(value)


def open_log(target: str, inetd: bool) -> Log:
    """Open the log; a file that cannot be opened is replaced by syslog, as the manual says."""
    if target == "none":
        return Log()
    if target in STDOUT_NAMES and inetd:
        raise StartupError(f"option --log={target} would talk to the client; --log=stderr, syslog or a file will do")
    if target in STDOUT_NAMES + STDERR_NAMES:
        descriptor = 1 if target in STDOUT_NAMES else 2
        return Log(StreamSink(unshared(descriptor), is_journal(descriptor)), os.path.sameopenfile(descriptor, 2))
    text = ""
    if target != "syslog":
        try:
            return Log(FileSink(target))
        except OSError as error:
            text = f"cannot open log file {target!a}: {error.strerror}; logging to syslog"
    syslog = SyslogSink()
    there, log = syslog.connect(), Log(syslog, on_stderr=is_journal(2))
    if text:
        log.write("error", text)
    if text and not (there and (inetd or log.on_stderr)):
        complain(text)
    if not there:
        complain("warning: there is no syslog here; --log=stderr or a file would do")
    return log


def is_journal(descriptor: int) -> bool:
    """Tell whether systemd's journal reads this descriptor, see systemd.exec(5)."""
    status = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def complain(text: str) -> None:
    write_now(2, f"msmtpd: {text}\n".encode(errors="backslashreplace"))


# Start-up


def protect_descriptors(inetd: bool) -> bool:
    """Settle who sees which descriptor; return whether standard error is ours to write to.

    0 to 2 shall be open, so that no file of ours becomes one of them.  Others
    that we have inherited are none of the command's business.  In inetd mode 2
    may be the client's connection: nobody may write there, not even Python.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    shared = inetd and not os.isatty(2) and (is_same(0, 2) or is_same(1, 2))
    if shared:
        os.dup2(null, 2)
    before = listed_descriptors()
    os.close(null)
    listed = listed_descriptors()  # the same where there is no /proc, and on the BSDs, whatever is open
    for descriptor in listed if listed != before else range(4096):
        try:
            os.set_inheritable(descriptor, descriptor <= 2)
        except OSError:
            pass  # not open
    return not shared


def listed_descriptors() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        return []


def name_process() -> None:
    """Be msmtpd, not python3, for pgrep, monit and their like."""
    try:
        with open("/proc/self/comm", "wb", 0) as name:
            name.write(b"msmtpd")
    except OSError:
        pass  # not Linux


def passed_sockets() -> list[socket.socket]:
    """Take over what sd_listen_fds(3) describes."""
    import socket

    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        return []
    sockets = []
    for descriptor in range(3, 3 + int(count[:9])):
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError as error:
            raise StartupError(f"descriptor {descriptor} is no socket: {error.strerror}; unset LISTEN_FDS") from None
        if not listens(sock):
            raise StartupError(f"socket {descriptor} from LISTEN_FDS does not listen; with Accept=yes use --inetd")
        sockets.append(sock)
    return sockets


def listening_socket(host: str, port: int) -> socket.socket:
    import socket

    try:  # getaddrinfo takes 127.1 and * as well
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host.partition("%")[0])
    except (OSError, ValueError):
        raise StartupError(
            f"option --interface needs an IPv4 or IPv6 address such as 127.0.0.1 or ::1, not {host!a}"
        ) from None
    try:
        # As octets: a string would go through the IDNA codec, which takes 7 ms to import.
        family, kind, protocol, _, address = socket.getaddrinfo(
            os.fsencode(host), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
    except OSError as error:
        raise StartupError(f"cannot listen on {host}: {error.strerror}; see --interface") from None
    try:
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        cures = {
            errno.EADDRINUSE: "; another server is there already, try another --port",
            errno.EACCES: "; a port below 1024 takes root (or, on Linux, CAP_NET_BIND_SERVICE), try --port=2500",
            errno.EINVAL: "; a link-local address needs its interface, as in fe80::1%eth0",
            errno.EADDRNOTAVAIL: "; this machine has no such address, see --interface",
        }
        cure = cures.get(error.errno or 0, "")
        raise StartupError(f"cannot listen on {host} port {port}: {error.strerror}{cure}") from None
    return sock


def describe(sock: socket.socket) -> str:
    name = sock.getsockname()
    return f"{name[0]} port {name[1]}" if isinstance(name, tuple) else os.fsdecode(name) or "a socket"


def notify_systemd(state: str) -> None:
    """Tell the service manager, as sd_notify(3) does."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        import socket

        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(NOTIFY_TIMEOUT)
                sock.connect("\0" + path[1:] if path.startswith("@") else path)
                sock.send(state.encode())
        except OSError:
            pass  # it is of no use to fail now


def exposure(sockets: Iterable[socket.socket], options: Options) -> str:
    """Return a warning if clients beyond this machine can connect."""
    hosts = {describe(sock): ip_address(sock.getsockname()) for sock in sockets}
    outside = ", ".join(name for name, host in hosts.items() if host not in ("", "::1") and host[:4] != "127.")
    danger = "passwords cross the network in the clear" if options.auth else "whoever reaches it can send mail"
    return f"listening on {outside}, which other machines may reach: {danger}" if outside else ""


def affordable_sessions() -> int:
    """Return for how many sessions there are descriptors: each may need one for its client and one for its spool."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MAX_SESSIONS
    return max(1, min(MAX_SESSIONS, (limit - RESERVED_DESCRIPTORS) // 2))


def serve_daemon(server: Server, options: Options, passed: list[socket.socket]) -> int:
    trouble = server.queue.command.check()  # which takes time: nobody shall be able to connect before
    sockets = passed or [listening_socket(host, options.port) for host in options.interfaces]
    where = ", ".join(describe(sock) for sock in sockets)
    user = f"authentication as {options.user}" if options.user else "no authentication"
    command = printable(os.fsencode(options.command))
    server.log.write("info", f"msmtpd {__version__} on {where}, {user}, command: {command}")
    for warning in (exposure(sockets, options), trouble):
        if warning:
            server.log.write("warning", warning)
            if not server.log.on_stderr:
                complain("warning: " + warning)
    if server.log.silent:
        server.queue.outputs.mirror = unshared(2)
    server.admission.max_sessions = affordable_sessions()
    server.listen(sockets, notify_systemd)
    server.run()
    server.log.write("info", "stopped")
    return 0


def build_server(options: Options) -> Server:
    log = open_log(options.log, options.inetd)
    credentials = None
    if options.user:
        credentials = Credentials(options.user, get_password(options.user, options.password_command, options.inetd))
    ours = (b"LISTEN_FDS", b"LISTEN_PID", b"LISTEN_FDNAMES", b"NOTIFY_SOCKET")  # not the command's
    environment = {name: value for name, value in os.environb.items() if name not in ours}
    command = Command(options.command, environment)
    policy = Policy(options.max_size, credentials, command.takes)
    server = Server(Loop(select.poll(), log), log, policy, command, Throttle(always=options.inetd))
    Signals(server)
    return server


def main() -> int:
    """Run msmtpd with the options in sys.argv and return its exit status."""
    # Before the options are read: what is wrong with them must not reach a client.
    inetd = any(len(word) > 4 and "--inetd".startswith(word) for word in sys.argv[1:])
    audible = not inetd
    try:
        audible = protect_descriptors(inetd)
        name_process()
        options = Options(sys.argv[1:])
        passed = [] if options.inetd else passed_sockets()  # while no descriptor of ours could be taken for one
        server = build_server(options)
        return serve_inetd(server) if options.inetd else serve_daemon(server, options, passed)
    except StartupError as error:
        reason = str(error)
    except (OSError, ImportError) as error:  # too few descriptors, processes or memory
        reason = f"cannot go on: {error}"
    except KeyboardInterrupt:  # while a password was waited for; later it is an event
        return EXIT_STARTUP
    if audible:
        complain(reason)
    else:
        Log(SyslogSink()).write("error", reason)
    return EXIT_STARTUP


if __name__ == "__main__":
    # Nothing is buffered, and tearing the interpreter down would take 3 ms of an inetd session.
    os._exit(main())
