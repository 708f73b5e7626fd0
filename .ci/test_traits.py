"""Every way in and every mechanism, under each trait of other systems, and under all those of one: see traits.py.

Every session sends a small mail and one of 200 kB.  The command is a script without #!, which refuses them
where it has a descriptor that is not its own or the session of a terminal.  PyPy is run as it is.
"""

from __future__ import annotations

import base64
import os
import shutil
import smtplib
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import traits

import test_msmtpd
from test_msmtpd import PROGRAM, Daemon, scram, without_received

LEAKS = (70, 300)  # descriptors that whoever starts msmtpd has left open
SCRIPT = """\
for one in 70 300; do [ ! -e /proc/$$/fd/$one ] || { echo "has descriptor $one"; exit 1; }; done
read -r pid name state parent group session rest < /proc/$$/stat
[ "$session" != "$SESSION" ] || { echo "is in the session that msmtpd is in"; exit 1; }
cat > "$1"
"""
MAILS = {"small": "hello\n", "big": "x" * 99 + "\n" + "y" * 199_899 + "\n"}
MECHANISMS = ("none", "PLAIN", "LOGIN", "CRAM-MD5", "SCRAM-SHA-256")


def log_in(smtp: smtplib.SMTP, mechanism: str) -> None:
    smtp.user, smtp.password = "joe", "secret"
    if mechanism != "SCRAM-SHA-256":
        smtp.auth(mechanism, getattr(smtp, "auth_" + mechanism.lower().replace("-", "_")))
        return
    first, *_ = scram("joe", "secret")
    _, challenge = smtp.docmd("AUTH", f"{mechanism} {base64.b64encode(first.encode()).decode()}")
    *_, proof = scram("joe", "secret", challenge=base64.b64decode(challenge).decode())
    _, final = smtp.docmd(base64.b64encode(proof.encode()).decode())
    assert base64.b64decode(final).startswith(b"v=") and smtp.docmd("")[0] == 235


def converse(smtp: smtplib.SMTP, mechanism: str, mails: Path) -> str:
    """Send the mails and tell what became of it; they have arrived as they should in `mails`."""
    smtp.ehlo("x")
    if mechanism not in smtp.esmtp_features.get("auth", "none").split():
        return "not offered"
    if mechanism != "none":
        log_in(smtp, mechanism)
    for size, content in MAILS.items():
        smtp.sendmail("a@b", [f"{mails.name}.{size}"], content)
        assert without_received(mails.with_name(f"{mails.name}.{size}").read_bytes()) == content.encode()
    return "right" if smtp.quit()[0] == 221 else "no end"


def inetd(way: str, options: list[str], **popen: Any) -> tuple[Any, Any]:
    """Start msmtpd on a socket, on descriptor 2 as well, or on pipes; and a client that has its greeting."""
    command = [*test_msmtpd.RUN, "--inetd", *options]
    smtp: Any = smtplib.SMTP()
    if way == "socket":
        smtp.sock, theirs = socket.socketpair()
        smtp.sock.settimeout(20)
        popen.update(stdin=theirs, stdout=theirs, stderr=theirs)
        with theirs:
            process: Any = subprocess.Popen(command, **popen)
    else:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **popen)
        smtp.sock = SimpleNamespace(sendall=process.stdin.write, close=process.stdin.close)
        smtp.file = process.stdout
    assert smtp.getreply()[0] == 220
    return process, smtp


@pytest.mark.parametrize("trait", [*traits.TRAITS, *traits.SYSTEMS, "PyPy itself"])
def test_mails_arrive(trait: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = [sys.executable, "-I", "-S", traits.__file__, trait]
    if trait == "PyPy itself":
        python = [shutil.which("pypy3") or pytest.skip("pypy3 is not there"), "-I", "-S"]
    monkeypatch.setattr(test_msmtpd, "RUN", [*python, str(PROGRAM)])
    script = tmp_path / "script"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    options = {True: [f"--command={script}"], False: [f"--command={script}", "--auth=joe,echo secret"]}
    environment = {**os.environ, "SESSION": str(os.getsid(0))}

    def cell(way: str, mechanism: str) -> str:
        mails = tmp_path / f"{way}.{mechanism}"
        try:
            if way == "daemon":
                return converse(smtplib.SMTP("127.0.0.1", daemons[mechanism == "none"].port), mechanism, mails)
            process, smtp = inetd(way, options[mechanism == "none"], cwd=tmp_path, pass_fds=LEAKS, env=environment)
            outcome = converse(smtp, mechanism, mails)
            smtp.close()
            assert process.wait(20) == 0
            return outcome
        except Exception as error:
            return repr(error)

    for leak in LEAKS:
        os.dup2(0, leak)
    daemons = {
        is_open: Daemon(tmp_path, *options[is_open], environment=environment, cwd=tmp_path, pass_fds=LEAKS)
        for is_open in options
    }
    cells = [(way, mechanism) for way in ("daemon", "socket", "pipes") for mechanism in MECHANISMS]
    with ThreadPoolExecutor() as pool:
        outcomes = dict(zip(cells, pool.map(cell, *zip(*cells))))
    statuses = [daemon.stop() for daemon in daemons.values()]
    for leak in LEAKS:
        os.close(leak)
    outcome = "not offered" if trait == "nohashlib" else "right"
    assert outcomes == {cell: outcome if cell[1] == "SCRAM-SHA-256" else "right" for cell in cells}
    assert statuses == [0, 0]
