"With this folder in PYTHONPATH a process contacts nobody: each address that is asked for is written to the file CONTACTED and refused. Sockets between processes of one machine, which have no address, work"
import os, socket

def refuse(what, address):
    with open(os.environ["CONTACTED"], "a") as f: f.write(f"{what} {address}\n")
    raise OSError(f"{what} {address}: this test contacts nobody")

def guarded(name, method):
    def call(self, *args): return method(self, *args) if self.family == getattr(socket, "AF_UNIX", None) else refuse(name, args[-1])
    return call

for name in ("connect", "connect_ex", "sendto"): setattr(socket.socket, name, guarded(name, getattr(socket.socket, name)))
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"): setattr(socket, name, lambda *args, _name=name, **kw: refuse(_name, args or kw))
