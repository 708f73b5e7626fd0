"""bare PORT COMMAND...: answers 250 to every line, in time, and runs the command; no checks, limits, errors or log."""

import os
import selectors
import signal
import socket
import sys

port, *command = sys.argv[1:]
environment = dict(os.environb)  # as octets: else it is encoded for every process
selector = selectors.DefaultSelector()
running = {}  # by process id of the command: the session's descriptor, and the other end of its output


class Session:
    def __init__(self):
        self.sock, _ = listener.accept()
        self.descriptor, self.recipient, self.input, self.in_data = self.sock.fileno(), "", b"", False
        os.write(self.descriptor, b"220 Hello\r\n")
        selector.register(self.descriptor, selectors.EVENT_READ, self.receive)

    def receive(self):
        self.input += os.read(self.descriptor, 65536)
        if not self.in_data:
            self.answer(self.input[:4])
        elif self.input.endswith(b"\r\n.\r\n"):
            self.deliver()

    def answer(self, verb):
        if verb == b"RCPT":
            self.recipient = self.input[9:-3].decode()
        self.input, self.in_data = b"", verb == b"DATA"
        if verb:
            os.write(self.descriptor, b"354 Go\r\n" if self.in_data else b"250 Ok\r\n")
        if verb in (b"QUIT", b""):
            selector.unregister(self.descriptor)
            self.sock.close()

    def deliver(self):
        (mail, mail_end), (output, output_end) = os.pipe(), os.pipe()
        os.write(mail_end, self.input[:-3].replace(b"\r", b""))
        os.close(mail_end)
        actions = [(os.POSIX_SPAWN_DUP2, mail, 0), (os.POSIX_SPAWN_DUP2, output_end, 1)]
        pid = os.posix_spawn(command[0], [*command, self.recipient], environment, file_actions=actions)
        os.close(mail)
        os.close(output_end)
        running[pid] = self.descriptor, output
        self.input, self.in_data = b"", False


def reap():
    os.read(signals, 4096)
    for pid in list(running):
        if os.waitpid(pid, os.WNOHANG)[0]:
            descriptor, output = running.pop(pid)
            os.read(output, 4096)
            os.close(output)
            os.write(descriptor, b"250 Ok\r\n")


listener = socket.create_server(("127.0.0.1", int(port)), backlog=1024)
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
selector.register(listener, selectors.EVENT_READ, Session)
signals, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
signal.signal(signal.SIGCHLD, lambda number, frame: None)
selector.register(signals, selectors.EVENT_READ, reap)
while True:
    for key, _ in selector.select():
        key.data()
