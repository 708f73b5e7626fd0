"""aiosmtpd PORT COMMAND...: with a handler that runs the command."""

import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, create_subprocess_exec

from aiosmtpd.controller import Controller

port, *command = sys.argv[1:]


class Handler:
    async def handle_DATA(self, server, session, envelope):
        words = [word.replace("%F", envelope.mail_from) for word in command]
        process = await create_subprocess_exec(*words, *envelope.rcpt_tos, stdin=PIPE, stdout=PIPE, stderr=STDOUT)
        await process.communicate(envelope.content)
        return "554 Failed" if process.returncode else "250 Ok"


Controller(Handler(), "127.0.0.1", int(port), data_size_limit=10**8).start()
signal.pause()
