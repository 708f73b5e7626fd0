"""Tests of msmtpd with real programs, from Debian, PyPI and npm, as they are.

.ci/run installs them and runs this beside the tests that need no more than
Python; here a program that is missing is a failure and nothing is skipped.
What cannot be installed beside the others (each wants to be *the* MTA or *the*
inetd) is unpacked with dpkg -x into the directory MSMTPD_PEERS; npm's
nodemailer lies there too.
"""

from __future__ import annotations

import contextlib
import email
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import test_msmtpd
from test_msmtpd import (
    CONTENT,
    JOE,
    MAIL,
    MANUAL,
    PROGRAM,
    ROOT,
    RUN,
    Box,
    Daemon,
    big_mail,
    codes,
    connect,
    converse,
    examples,
    free_port,
    login_line,
    process_state,
    read_all,
    run_program,
    running,
    wait_until,
    without_desktop,
    without_received,
)

start, box = test_msmtpd.start, test_msmtpd.box  # fixtures

PEERS = Path(os.environ.get("MSMTPD_PEERS", "/tmp/peers"))
LOGIN = "--auth=joe,echo secret"

JUDGE = """#!/bin/sh
# Fails for a recipient fail-N@... with exit status N and says so; keeps other mails.
# It reads its input first: where a command does not, the C program may say 554 to any status.
code="${*##* fail-}"
if [ "$code" != "$*" ]; then
    cat > /dev/null
    echo "mailbox refused by ${code%%@*}" >&2
    exit "${code%%@*}"
fi
exec "$MAILS/record" "$@"
"""


def need(program: str) -> str:
    """Return the path of a program; the test fails without it."""
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    assert path, f"{program} is not installed, see .ci/run"
    return path


def need_peer(path: str) -> str:
    """Return the path of a program in MSMTPD_PEERS; the test fails without it."""
    assert (PEERS / path).exists(), f"{PEERS / path} is not there, see .ci/run"
    return str(PEERS / path)


class JudgingBox(Box):
    """A box whose command fails where a recipient tells it to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        judge = directory / "judge"
        judge.write_text(JUDGE)
        judge.chmod(0o755)
        self.command = f"{judge} -f %F --"

    def take(self) -> list[tuple[list[str], bytes]]:
        """Return the mails that have come, and forget them."""
        mails = self.mails()
        for path in self.directory.glob("*.*"):
            path.unlink()
        return mails


class Far(JudgingBox):
    """The far end: an msmtpd with such a box."""

    def __init__(self, directory: Path, *options: str) -> None:
        super().__init__(directory / "box")
        self.daemon = Daemon(directory, f"--command={self.command}", *options, environment=self.environment)


@pytest.fixture(scope="module", params=[False, True], ids=["open", "login"])
def login(request: pytest.FixtureRequest) -> bool:
    """Whether all servers of the test want authentication, of joe with `secret`."""
    return bool(request.param)


@pytest.fixture(scope="module")
def far(login: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    server = Far(tmp_path_factory.mktemp("far"), *[LOGIN] * login)
    yield server
    assert server.daemon.stop() == 0


# Real clients


class Client(NamedTuple):
    """How a real client is made to send MESSAGE, or TEXT with headers of its own.

    `send` fills in what stands in braces: {login} becomes `login` where the
    server wants authentication, {message}, {text}, {script} and {config} are
    files, {user} is "joe:secret@" or nothing.
    """

    command: str  # a program with a slash lies in MSMTPD_PEERS
    login: str = ""
    stdin: str = ""  # the file that it reads
    script: str = ""
    config: str = ""
    probe: str = ""  # fails if a library is missing
    exact: bool = False  # the mail arrives as MESSAGE is, octet for octet


SENDER, ONE, TWO = "a@example.com", "c@example.net", "o'brien@example.org"
TEXT = "Grüße, 你好\n.a line with a dot\n..two dots\n\n.\nend".encode()  # without a last line end: clients add it
HEADER = b"""\
From: a@example.com
To: c@example.net
Subject: Hello
Date: Sun, 22 Nov 2026 10:00:00 +0000
Message-ID: <1@example.com>
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

"""
MESSAGE = HEADER + TEXT

ARGUMENTS = "{port} {message} {sender} {one} {two} {login}"
TEXT_ARGUMENTS = "{port} {text} {sender} {one} {two} {login}"
MUTT = """
set smtp_url=smtp://{user}127.0.0.1:{port} from={sender} use_envelope_from=yes
set ssl_starttls=no ssl_force_tls=no charset=utf-8 copy=no
"""

CLIENTS = {
    "smtplib": Client(
        "python {script} " + ARGUMENTS,
        login="joe secret",
        script="""
import smtplib, sys
port, message, sender, one, two, *login = sys.argv[1:]
with smtplib.SMTP("127.0.0.1", int(port), "client.example") as smtp, open(message, "rb") as file:
    if login:
        smtp.login(*login)
    smtp.sendmail(sender, [one, two], file.read().replace(b"\\n", b"\\r\\n"), ["BODY=8BITMIME"])
""",
        exact=True,
    ),
    "aiosmtplib": Client(
        "python {script} " + ARGUMENTS,
        login="joe secret",
        script="""
import aiosmtplib, asyncio, sys
port, message, sender, one, two, *login = sys.argv[1:]
user, password = login or (None, None)
with open(message, "rb") as file:
    mail = file.read()
asyncio.run(aiosmtplib.send(
    mail, sender=sender, recipients=[one, two], hostname="127.0.0.1", port=int(port), username=user, password=password
))
""",
        probe=f"{sys.executable} -c 'import importlib.util as u; u.find_spec(\"aiosmtplib\") or 1/0'",
        exact=True,
    ),
    "curl": Client(
        "curl -sSv smtp://127.0.0.1:{port}/client.example --mail-from {sender} --mail-rcpt {one} --mail-rcpt {two}"
        " -T {message} {login}",
        login="--user joe:secret",
        exact=True,
    ),
    "swaks": Client(
        "swaks --server 127.0.0.1:{port} --helo client.example -f {sender} -t {one},{two} --data @{message} {login}",
        login="--auth LOGIN --auth-user joe --auth-password secret",
        exact=True,
    ),
    "swaks, pipelining": Client(
        "swaks --server 127.0.0.1:{port} --helo client.example -f {sender} -t {one},{two}"
        " --data @{message} --pipeline {login}",
        login="--auth PLAIN --auth-user joe --auth-password secret",
        exact=True,
    ),
    "msmtp": Client(
        "msmtp -C {config} -f {sender} -- {one} {two}",
        stdin="{message}",
        config="host 127.0.0.1\nport {port}\nauth {onoff}\nuser joe\npasswordeval echo secret\n",
        exact=True,
    ),
    "s-nail": Client(
        "s-nail -:/ -Sv15-compat -Ssendwait -Snosave -Smta=smtp://{user}127.0.0.1:{port} -Ssmtp-auth=none"
        " {login} -Sfrom={sender} -s Hello {one} {two}",
        login="-Ssmtp-auth=plain",
        stdin="{text}",
    ),
    "git send-email": Client(
        "git send-email --quiet --smtp-server=127.0.0.1 --smtp-server-port={port} --from={sender} --to={one} --to={two}"
        " --confirm=never --suppress-cc=all --no-validate {login} {message}",
        login="--smtp-user=joe --smtp-pass=secret",
        probe="sh -c 'perl -MAuthen::SASL -MMail::Address -e1 && test -x $(git --exec-path)/git-send-email'",
    ),
    "mutt": Client("mutt -n -F {config} -s Hello -- {one} {two}", stdin="{text}", config=MUTT),
    "neomutt": Client("neomutt -n -F {config} -s Hello -- {one} {two}", stdin="{text}", config=MUTT),
    "GNU mailutils": Client(
        "mail.mailutils --no-config -n -E 'set sendmail=smtp://{user}127.0.0.1:{port}'"
        " -r {sender} -s Hello {one} {two}",
        stdin="{text}",
    ),
    "ssmtp": Client(
        "usr/sbin/ssmtp -C {config} -f {sender} {login} {one} {two}",
        login="-au joe -ap secret",
        stdin="{message}",
        config="mailhub=127.0.0.1:{port}\nhostname=client.example\nFromLineOverride=YES\n",
    ),
    "nullmailer": Client(
        "sh {script} {peers}/usr/lib/nullmailer/smtp {message} {sender} {one} {two}"
        " --host=127.0.0.1 --port={port} {login}",
        login="--user=joe --pass=secret",
        script="""
program=$1 message=$2
{ printf '%s\\n' "$3" "$4" "$5" ""; cat "$message"; echo; } > "$message.queued"
shift 5
exec "$program" "$@" 3< "$message.queued"
""",
        probe=f"test -x {PEERS}/usr/lib/nullmailer/smtp",
        exact=True,
    ),
    "nc, typed": Client(
        "nc -N 127.0.0.1 {port}",
        stdin="{config}",
        config="HELO x\n{auth}MAIL FROM:{sender}\nRCPT TO:{one}\nrcpt to: <{two}>\nDATA\n{typed}\n.\nQUIT\n",
        exact=True,
    ),
    "nodemailer": Client(
        "node {script} " + TEXT_ARGUMENTS,
        login="joe secret",
        script="""
const [port, text, from, one, two, user, pass] = process.argv.slice(2);
require("nodemailer").createTransport({host: "127.0.0.1", port, auth: user && {user, pass}})
  .sendMail({from, to: [one, two], subject: "Hello", text: require("fs").readFileSync(text)})
  .catch(error => { console.error(error.message); process.exit(1); });
""",
        probe=f"test -d {PEERS}/node_modules/nodemailer",
    ),
    "Perl Net::SMTP": Client(
        "perl {script} " + ARGUMENTS,
        login="joe secret",
        script="""
use Net::SMTP;
my ($port, $message, $from, $one, $two, @login) = @ARGV;
my $smtp = Net::SMTP->new("127.0.0.1", Port => $port, Hello => "client.example") or die "no connection";
$smtp->auth(@login) or die $smtp->message if @login;
open my $file, "<:raw", $message or die;
$smtp->mail($from) && $smtp->to($one, $two) && $smtp->data(<$file>) or die $smtp->message;
$smtp->quit;
""",
        probe="perl -MAuthen::SASL -e1",
        exact=True,
    ),
    "Ruby net/smtp": Client(
        "ruby {script} " + ARGUMENTS,
        login="joe secret",
        script="""
require "net/smtp"
port, message, from, one, two, user, password = ARGV
Net::SMTP.start("127.0.0.1", port.to_i, "client.example", user, password, user && :plain) do |smtp|
  smtp.send_message File.binread(message), from, one, two
end
""",
        exact=True,
    ),
    "tcllib": Client(
        "tclsh {script} " + TEXT_ARGUMENTS,
        login="joe secret",
        script="""
package require smtp
package require mime
lassign $argv port text from one two user password
set file [open $text]
fconfigure $file -encoding utf-8
set part [mime::initialize -canonical text/plain -param {charset utf-8} -encoding 8bit -string [read $file]]
set login [expr {$user eq "" ? {} : [list -username $user -password $password]}]
smtp::sendmessage $part -servers 127.0.0.1 -ports $port -usetls 0 {*}$login \\
    -originator $from -recipients $one,$two -header [list From $from] -header {Subject Hello}
""",
        probe="sh -c 'echo \"exit [catch {package require mime}]\" | tclsh'",
    ),
}


def fill_in(client: Client, place: Path, port: int, login: bool, message: bytes, one: str) -> dict[str, str]:
    """Write the client's files to a directory and return what its braces stand for."""
    fields = {"port": str(port), "sender": SENDER, "one": one, "two": TWO, "peers": str(PEERS)}
    fields.update(user="joe:secret@" * login, auth=f"{JOE}\n" * login, onoff="on" if login else "off")
    fields.update({name: str(place / name) for name in ("message", "text", "script", "config")})
    stuffed = message.decode("latin-1").replace("\n.", "\n..")
    (place / "message").write_bytes(message)
    (place / "text").write_bytes(TEXT)
    (place / "script").write_text(client.script)
    (place / "config").write_text(client.config.format(**fields, typed=stuffed), encoding="latin-1")
    (place / "config").chmod(0o600)
    return fields


def send(
    name: str, place: Path, port: int, login: bool, message: bytes = MESSAGE, one: str = ONE
) -> subprocess.CompletedProcess[str]:
    """Run a real client to send a mail to `one` and TWO."""
    client = CLIENTS[name]
    fields = fill_in(client, place, port, login, message, one)
    arguments = []
    for word in shlex.split(client.command):
        added = shlex.split(client.login) if login else []
        arguments += added if word == "{login}" else [word.format(**fields)]
    arguments[0] = find_client(arguments[0], client.probe)
    environment = {
        "HOME": str(place),
        "PATH": os.environ["PATH"],
        "LC_ALL": "C.UTF-8",
        "NODE_PATH": f"{PEERS}/node_modules",
        "HELOHOST": "client.example",  # nullmailer
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": SENDER,
    }
    with open(client.stdin.format(**fields) or os.devnull, "rb") as stdin:
        return subprocess.run(
            arguments,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=place,
            env=environment,
            timeout=30,
            errors="replace",
        )


def find_client(program: str, probe: str) -> str:
    """Return the path of a client; the test fails without it or what it needs."""
    assert not probe or not subprocess.run(shlex.split(probe)).returncode, f"{probe} fails, see .ci/run"
    return sys.executable if program == "python" else need_peer(program) if "/" in program else need(program)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_real_client_sends_its_mail(name: str, login: bool, far: Far, tmp_path: Path) -> None:
    """To several recipients, with UTF-8 text and lines that begin with a dot."""
    result = send(name, tmp_path, far.daemon.port, login)
    assert result.returncode == 0, result.stdout
    [(arguments, content)] = far.take()
    assert arguments == ["-f", SENDER, "--", ONE, TWO]
    if CLIENTS[name].exact:
        assert content == MESSAGE + b"\n"
    else:
        mail = email.message_from_bytes(content)
        assert mail["Subject"] == "Hello"
        payload = mail.get_payload(decode=True)
        assert isinstance(payload, bytes) and payload.replace(b"\r\n", b"\n").rstrip(b"\n") == TEXT


LIBRARIES = sorted((ROOT / ".ci" / "clients").iterdir())  # the bench has them too


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_mails_of_a_library_arrive_as_they_are(
    library: Path, start: Callable[..., Daemon], box: Box, tmp_path: Path
) -> None:
    """Several in a session: the field's libraries write body and final dot apart, and say RSET in between."""
    daemon = start(f"--command={box.command}", environment=box.environment)
    (tmp_path / "text").write_bytes(TEXT)
    subprocess.run([library, str(daemon.port), "3", tmp_path / "text"], check=True, timeout=30)
    assert daemon.stop() == 0
    payloads = [email.message_from_bytes(content).get_payload(decode=True) for _, content in box.mails()]
    assert [isinstance(text, bytes) and text.rstrip(b"\n") for text in payloads] == [TEXT] * 3  # PHPMailer adds two


# The main job: client -> msmtpd -> msmtp -> msmtpd -> command

MSMTPRC = """
account default
host 127.0.0.1
port {port}
auth {auth}
user joe
password secret
"""
LONG = b"x" * 3000 + b" \xe9\xff latin-1 \t\n.\n..\n" + b".y" * 1500 + b"\n\n \nend"


@pytest.fixture(scope="module")
def near(login: bool, far: Far, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The msmtpd whose command is msmtp, which sends to the far end."""
    directory = tmp_path_factory.mktemp("near")
    account = directory / "msmtprc"
    account.write_text(MSMTPRC.format(port=far.daemon.port, auth="on" if login else "off"))
    account.chmod(0o600)
    daemon = Daemon(directory, f"--command={need('msmtp')} -C {account} -f %F --", *[LOGIN] * login)
    yield daemon
    assert daemon.stop() == 0


@pytest.mark.parametrize("name", ["curl", "swaks", "smtplib", "msmtp"])
def test_the_main_job(name: str, login: bool, near: Daemon, far: Far, tmp_path: Path) -> None:
    """A mail arrives octet for octet, a refusal with msmtp's explanation."""
    message = HEADER + LONG
    result = send(name, tmp_path, near.port, login, message)
    assert result.returncode == 0, result.stdout
    [(arguments, content)] = far.take()
    assert arguments == ["-f", SENDER, "--", ONE, TWO]
    assert without_received(content) == message + b"\n"

    for status, code in (("75", "451"), ("65", "554")):
        result = send(name, tmp_path, near.port, login, message, one=f"fail-{status}@example.net")
        assert result.returncode != 0
        assert code in result.stdout
        for words in ("the server did not accept the mail", f"mailbox refused by {status}", "could not send mail"):
            assert words in result.stdout, result.stdout
    assert far.take() == []


def test_postfix_sends_many_mails_in_parallel_sessions(start: Callable[..., Daemon], box: Box) -> None:
    """Postfix's own client: smtp-source, several mails in each session."""
    source = need_peer("usr/sbin/smtp-source")
    daemon = start(f"--command={box.command}", environment=box.environment)
    options = shlex.split("-d -s 5 -m 40 -r 3 -f a@example.com -t c@example.net -M client.example")
    environment = {"LD_LIBRARY_PATH": f"{PEERS}/usr/lib/postfix"}
    subprocess.run([source, *options, f"127.0.0.1:{daemon.port}"], env=environment, check=True, timeout=30)
    mails = box.mails()
    assert len(mails) == 40
    for arguments, content in mails:
        assert arguments == ["-f", SENDER, "--", "3c@example.net", "2c@example.net", ONE]
        assert content.endswith(b"\n\nLa de da de da 1.\nLa de da de da 2.\nLa de da de da 3.\nLa de da de da 4.\n")
    assert daemon.stop() == 0


# inetd, xinetd, systemd, start-stop-daemon

MAIL_CODES = [220, 250, 250, 250, 354, 250, 221]
MAIL_ARGUMENTS = ["-f", "a@b", "--", "c@d"]


def box_command(box: Box) -> str:
    """Return a command of one word that keeps mails and needs nothing in the environment but msmtpd's own."""
    deliver = box.directory / "deliver"
    deliver.write_text(f'#!/bin/sh\nMAILS={box.directory} exec {box.record} -f "$MSMTPD_SENDER" -- "$@"\n')
    deliver.chmod(0o755)
    return str(deliver)


INETD = "127.0.0.1:{port} stream tcp nowait {user} {program} {program} {options}\n"
XINETD = """
service {port}
{{
    type = UNLISTED
    socket_type = stream
    protocol = tcp
    wait = no
    bind = 127.0.0.1
    port = {port}
    user = {user}
    server = {program}
    server_args = {options}
}}
"""
SUPERSERVERS = {  # program and options, a line of its configuration
    "inetd": ("inetd -i {config}", INETD),
    "xinetd": ("usr/sbin/xinetd -dontfork -f {config} -pidfile {config}.pid -filelog {config}.log", XINETD),
}


@pytest.mark.parametrize("name", SUPERSERVERS)
def test_a_superserver_runs_msmtpd(name: str, box: Box, tmp_path: Path) -> None:
    """A mail comes with the client's address; a start-up error leaves the connection empty."""
    line, service = SUPERSERVERS[name]
    config, log = tmp_path / "config", tmp_path / "log"
    good, bad = free_port(), free_port()
    fixed = {"program": need(RUN[0]), "user": pwd.getpwuid(os.getuid()).pw_name}
    services = [(good, f"--inetd --log={log} --command={box_command(box)}"), (bad, "--inetd --bogus")]
    for port, words in services:
        with config.open("a") as file:
            file.write(service.format(**fixed, port=port, options=" ".join([*RUN[1:], words])))
    program, *arguments = line.format(config=config).split()
    with running(need_peer(program) if "/" in program else need(program), *arguments):
        for _ in range(2):
            assert codes(converse(("127.0.0.1", good))) == MAIL_CODES
        assert converse(("127.0.0.1", bad), b"") == b""
    assert box.mails() == [(MAIL_ARGUMENTS, CONTENT)] * 2
    received = next(box.directory.glob("*.mail")).read_bytes()
    assert received.startswith(b"Received: from x ([127.0.0.1])\n\tby [127.0.0.1] (msmtpd) with ESMTP;\n")
    assert log.read_text().count(" [127.0.0.1]: mail from=<a@b> to=<c@d> count=1 ") == 2


@pytest.mark.parametrize("kinds", [["tcp4"], ["tcp4", "tcp6", "unix"]], ids="+".join)
def test_systemd_passes_listening_sockets(kinds: list[str], box: Box, tmp_path: Path) -> None:
    four, six, path = free_port(), free_port("::1"), str(tmp_path / "socket")
    known = {
        "tcp4": (f"127.0.0.1:{four}", ("127.0.0.1", four)),
        "tcp6": (f"[::1]:{six}", ("::1", six)),
        "unix": (path, path),
    }
    listen = [f"--listen={known[kind][0]}" for kind in kinds]
    notify = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as states:
        states.bind(str(notify))
        states.settimeout(20)
        variables = [f"--setenv=NOTIFY_SOCKET={notify}", "--setenv=MAILS"]
        program = [*RUN, "--port=1", f"--command={box.command}"]
        activate = need("systemd-socket-activate")
        with running(activate, *listen, *variables, *program, env=box.environment) as process:
            for kind in kinds:
                assert codes(converse(known[kind][1])) == MAIL_CODES
            process.terminate()
            assert process.wait(20) == 0
        assert [states.recv(100), states.recv(100)] == [b"READY=1", b"STOPPING=1"]
    assert box.mails() == [(MAIL_ARGUMENTS, CONTENT)] * len(kinds)


def test_systemd_starts_an_instance_for_each_connection(box: Box) -> None:
    """Accept=yes and StandardInput=socket in a unit."""
    port = free_port()
    activate = [need("systemd-socket-activate"), f"--listen=127.0.0.1:{port}", "--accept", "--inetd", "--setenv=MAILS"]
    program = [*RUN, "--inetd", f"--command={box.command}"]
    with running(*activate, *program, env=box.environment):
        for _ in range(2):
            assert codes(converse(("127.0.0.1", port))) == MAIL_CODES
    assert box.mails() == [(MAIL_ARGUMENTS, CONTENT)] * 2


def start_and_stop(directory: Path, port: int, options: list[str]) -> None:
    """Manage the program as the manual page shows it, and send a mail in between."""
    manage, pidfile, program = need("start-stop-daemon"), directory / "msmtpd.pid", str(directory / "msmtpd")
    user = ["--chuid", "nobody"] if os.getuid() == 0 else []
    begin = [manage, "--start", "--pidfile", str(pidfile), "--make-pidfile", *user, "--background", "--exec", program]
    end = [manage, "--stop", "--pidfile", str(pidfile), "--remove-pidfile", "--quiet", "--signal", "TERM"]
    subprocess.run([*begin, "--", *options], check=True, timeout=20)
    assert codes(converse(("127.0.0.1", port))) == MAIL_CODES
    pid = int(pidfile.read_text())
    assert program.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    subprocess.run(end, check=True, timeout=20)
    wait_until(lambda: process_state(pid)[0] in ("", "Z"))
    assert not pidfile.exists()


def test_start_stop_daemon_starts_stops_and_starts_again() -> None:
    """In a directory that another user can reach, too: pytest's own are for us alone."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        box, port, program = Box(directory / "box"), free_port(), directory / "msmtpd"
        box.directory.chmod(0o777)
        program.write_bytes(PROGRAM.read_bytes())
        program.chmod(0o755)
        for _ in range(2):
            start_and_stop(directory, port, ["--port", str(port), "--command", box_command(box)])
        assert box.mails() == [(MAIL_ARGUMENTS, CONTENT)] * 2


# The key ring

KEY_RING = """
printf pw | gnome-keyring-daemon --unlock --components=secrets >&2
printf 'ring pässword' | secret-tool store --label=msmtpd host localhost service smtp user msmtpd-user
echo "$DBUS_SESSION_BUS_ADDRESS"
read end
"""


@pytest.fixture
def desktop(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a desktop session whose key ring is open and has the password of the manual page."""
    for program in ("gnome-keyring-daemon", "secret-tool"):
        need(program)
    places = {name: str(tmp_path) for name in ("HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME")}
    environment = {**without_desktop(), **places}
    with subprocess.Popen(
        [need("dbus-run-session"), "--", "sh", "-c", KEY_RING],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as session:
        assert session.stdin is not None and session.stdout is not None
        yield {**environment, "DBUS_SESSION_BUS_ADDRESS": session.stdout.readline().strip()}
        session.stdin.close()


def test_the_password_is_found_in_the_key_ring(desktop: dict[str, str], start: Callable[..., Daemon], box: Box) -> None:
    environment = {**desktop, "MAILS": str(box.directory)}
    daemon = start("--auth=msmtpd-user", f"--command={box.command}", environment=environment)
    assert codes(daemon.talk(login_line("msmtpd-user", "ring pässword"))) == [220, 250, 235, 250, 250, 354, 250, 221]
    assert codes(daemon.talk(login_line("msmtpd-user", "pw")))[:4] == [220, 250, 535, 530]
    assert box.mails() == [(MAIL_ARGUMENTS, CONTENT)]


# Side by side with the C program

C_DIALOGUES = {  # steps, each sent when the reply to the one before is there
    "HELO": ["HELO x", "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", "Subject: x\r\n\r\n..dot\r\n\xe9\r\n.", "QUIT"],
    "EHLO": ["EHLO x", "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "RCPT TO:<e@f>", "DATA", "Subject: x\r\n\r\nx\r\n.", "QUIT"],
    "null sender": ["EHLO x", "MAIL FROM:<>", "RCPT TO:<c@d>", "DATA", "x\r\n.", "QUIT"],
    "several mails": ["EHLO x", *["MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", "x\r\n\r\ny\r\n."] * 3, "QUIT"],
    "exit status 65": ["EHLO x", "MAIL FROM:<a@b>", "RCPT TO:<fail-65@x>", "DATA", "x\r\n."],
    "exit status 75": ["EHLO x", "MAIL FROM:<a@b>", "RCPT TO:<fail-75@x>", "DATA", "x\r\n."],
    "exit status 1": ["EHLO x", "MAIL FROM:<a@b>", "RCPT TO:<fail-1@x>", "DATA", "x\r\n."],
}


def step_by_step(sock: socket.socket, steps: list[str]) -> list[str]:
    """Send each step when the reply to the one before has come; return the codes."""
    with sock, sock.makefile("rwb") as stream:

        def code() -> str:
            while (line := stream.readline())[3:4] == b"-":
                pass
            return bytes(line[:3]).decode()

        found = [code()]
        for step in steps:
            stream.write(step.encode("latin-1") + b"\r\n")
            stream.flush()
            found.append(code())
        return found


@pytest.fixture(scope="module")
def old(login: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[JudgingBox, int]]:
    """The C program, with the options that the far end has."""
    box, port = JudgingBox(tmp_path_factory.mktemp("old")), free_port()
    program = need_peer("usr/bin/msmtpd")
    options = [f"--port={port}", f"--command={box.command}", *[LOGIN] * login]
    with running(program, *options, env=box.environment, stderr=subprocess.DEVNULL):
        yield box, port


@pytest.mark.parametrize("name", C_DIALOGUES)
def test_replies_arguments_and_mails_are_those_of_the_c_program(
    name: str, login: bool, far: Far, old: tuple[JudgingBox, int]
) -> None:
    hello, *rest = C_DIALOGUES[name]
    steps = [hello, *[JOE] * login, *rest]
    theirs = step_by_step(connect(("127.0.0.1", old[1])), steps)
    ours = step_by_step(far.daemon.connect(), steps)
    assert ours == theirs
    assert re.fullmatch("220( 250)+( 235)?( 250)+( 354 250 (250 250 354 250 )*221| 354 (451|554))", " ".join(ours))
    assert far.take() == old[0].take()


SHELL_COMMANDS = [  # run in a directory of their own; what is in their files afterwards is compared
    "cat > mail; echo > rcpt",
    "cat >mail;printf '%s,' -f %F --from='%F' > rcpt",
    'cat > mail; printf "<%s>" "%F" >rcpt --',
    "{ cat; } > mail && echo a b > rcpt",
    "cat > mail; for i in 1 2; do echo $i >> rcpt; done; echo >> rcpt",
    "X='a b'; cat > mail; echo \"$X\" ~root 'it'\\''s' > rcpt",
]


@pytest.mark.parametrize("command", SHELL_COMMANDS)
def test_shell_commands_do_what_they_do_under_the_c_program(command: str, tmp_path: Path) -> None:
    outcomes = []
    for name, program in (("ours", RUN), ("theirs", [need_peer("usr/bin/msmtpd")])):
        directory = tmp_path / name
        directory.mkdir()
        here, there = socket.socketpair()
        here.settimeout(20)
        with running(*program, "--inetd", f"--command={command}", stdin=there, stdout=there, cwd=directory):
            there.close()
            found = step_by_step(here, C_DIALOGUES["EHLO"])
        outcomes.append((found, (directory / "rcpt").read_text(), without_received((directory / "mail").read_bytes())))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0][-2:] == ["250", "221"] and "c@d e@f" in outcomes[0][1].replace(",", " ").replace("><", " ")


# A full disk, and limits that do not bind root


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    path = tmp_path / "tiny"
    path.mkdir()
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    mount = [*sudo, need("mount"), "-t", "tmpfs", "-o", "size=64k,mode=1777", "tmpfs", str(path)]
    subprocess.run(mount, check=True)
    yield path
    subprocess.run([*sudo, need("umount"), "-l", str(path)], check=True)


def test_a_full_disk_refuses_big_mails_for_now_and_nothing_else(
    start: Callable[..., Daemon], box: Box, tiny: Path
) -> None:
    daemon = start(f"--command={box.command}", environment={**box.environment, "TMPDIR": str(tiny)})
    with daemon.connect() as sock:
        sock.sendall(big_mail(200_000) + MAIL + big_mail(40_000) + b"QUIT\r\n")
        replies = read_all(sock)
    assert codes(replies) == [220, 250, 250, 250, 354, 452, 250, 250, 250, 354, 250, 250, 250, 250, 354, 250, 221]
    assert [len(content) for _, content in box.mails()] == [len(CONTENT), 40_000 // 18 * 17]
    (tiny / "filler").write_bytes(b"x" * 60_000)
    assert codes(daemon.talk(big_mail(40_000)))[-1] == 452
    (tiny / "filler").unlink()
    assert codes(daemon.talk(big_mail(40_000)))[-1] == 250
    assert daemon.log().count("Cannot store the mail in TMPDIR: No space left") == 2
    assert os.listdir(tiny) == [] and "unexpected" not in daemon.log()


OWN_DEV = """
mount -t tmpfs tmpfs "$0" && touch "$0/null" && mount --bind /dev/null "$0/null" &&
ln -s "$0.log" "$0/log" && ln -s /proc/self/fd "$0/fd" && mount --rbind "$0" /dev && exec "$@"
"""


def test_a_syslog_daemon_that_hangs_stops_nobody(
    start: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    unshare = [need("unshare"), "-m" if os.geteuid() == 0 else "-rm", "sh", "-c", OWN_DEV, str(tmp_path / "dev")]
    monkeypatch.setattr(test_msmtpd, "RUN", [*unshare, *RUN])
    with test_msmtpd.syslog_daemon(tmp_path / "dev.log") as syslog:
        daemon = start("--log=syslog", "--command=:")
        replies = codes(daemon.talk(MAIL * 600))  # more than its queue takes
        assert replies.count(354) == 600 and replies[-1] == 250 and daemon.stop() == 0
        assert b" msmtpd[%d]: msmtpd " % daemon.process.pid in syslog.recv(1000)


def test_a_privileged_port_names_the_cure() -> None:
    if os.geteuid():
        result = run_program("--port=25")
    else:
        setpriv = [need("setpriv"), "--reuid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
        result = subprocess.run(
            [*setpriv, "/usr/bin/python3", "-I", "-S", "-", "--port=25"],
            input=PROGRAM.read_text(),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert result.returncode == 3
    assert (
        "Permission denied; a port below 1024 takes root (or, on Linux, CAP_NET_BIND_SERVICE), try --port=2500"
        in result.stderr
    )


@pytest.mark.parametrize("option", ["--command=cat; :", "--auth=joe,echo x"])
def test_too_few_processes_to_start_are_one_line(option: str) -> None:
    """The limit does not bind root, so another user runs what comes on standard input."""
    setpriv = [need("setpriv"), "--reuid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
    as_nobody = [] if os.geteuid() else setpriv
    result = subprocess.run(
        [*as_nobody, need("prlimit"), "--nproc=0", "/usr/bin/python3", "-I", "-S", "-", "--port=2599", option],
        input=PROGRAM.read_text(),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 3 and result.stderr.count("\n") == 1
    assert "cannot go on: " in result.stderr and "Resource temporarily unavailable" in result.stderr


def python_for(user: str | None) -> str:
    """Return a Python that a user may execute, which root's own may not be."""
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError, ValueError):
            if subprocess.run([python, "-I", "-S", "-c", ""], user=user, check=False).returncode == 0:
                return python
    raise AssertionError(f"{user} cannot run Python")


@contextlib.contextmanager
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Daemon, Box, str | None]]:
    """A server that does not run as root, so that limits on processes hold for it."""
    user = None if os.geteuid() else "nobody"
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        program = [python_for(user), "-I", "-S", shutil.copy(PROGRAM, directory)]
        monkeypatch.setattr(test_msmtpd, "RUN", program)
        mask = os.umask(0)
        try:
            directory.chmod(0o777)
            box = Box(directory / "box")
            daemon = Daemon(directory, f"--command={box.command}", environment=box.environment, user=user)
        finally:
            os.umask(mask)
        yield daemon, box, user
        daemon.process.kill()
        daemon.process.wait()


LIMIT_PROCESSES = """
import resource, sys
_, hard = resource.prlimit(int(sys.argv[1]), resource.RLIMIT_NPROC)
resource.prlimit(int(sys.argv[1]), resource.RLIMIT_NPROC, (int(sys.argv[2]), hard))
"""


def test_no_processes_for_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    with unprivileged(monkeypatch) as (daemon, box, user):

        def limit_processes(number: int) -> None:
            """As the user it runs as: root of a container may not."""
            arguments = [str(daemon.process.pid), str(number)]
            subprocess.run([python_for(user), "-c", LIMIT_PROCESSES, *arguments], user=user, check=True)

        limit_processes(1)
        replies = daemon.talk(MAIL + MAIL + b"QUIT\r\n")
        assert codes(replies) == [220, 250, 250, 250, 354, 451, 250, 250, 250, 354, 451, 221]
        assert b"Resource temporarily unavailable" in replies
        limit_processes(1000)
        assert codes(daemon.talk(MAIL))[-1] == 250
        assert len(box.mails()) == 1
        assert daemon.log().count("reply=451") == 2 and "unexpected" not in daemon.log()


# The manual page, as its readers have it


def test_manual_lint() -> None:
    result = subprocess.run([need("mandoc"), "-T", "lint", ROOT / "man/msmtpd.1"], capture_output=True, text=True)
    assert result.stdout + result.stderr == ""


def test_manual_groff() -> None:
    command = [need("groff"), "-mdoc", "-ww", "-T", "utf8", str(ROOT / "man/msmtpd.1")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stderr == ""


def test_examples_survive_copying_from_the_terminal() -> None:
    """No renderer turns a hyphen or a quote of a command line into a prettier character."""
    rendered = subprocess.run(
        [need("mandoc"), "-T", "utf8", "-O", "width=300", ROOT / "man/msmtpd.1"], capture_output=True, text=True
    )
    text = re.sub(r".\x08", "", rendered.stdout)
    for block in examples(MANUAL):
        for line in block.splitlines():
            assert line.strip() in text
