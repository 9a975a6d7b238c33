"""What this process's sockets have sent, by the kernel's own count, and the interface that stays inside the host."""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path

_TCP_NOT_SENT = 144  # where struct tcp_info (Linux 4.19 and later) keeps bytes that wait in the socket (uint32) …
_TCP_SENT, _TCP_SENT_AGAIN = 200, 208  # … and bytes sent, in all and repeatedly (uint64)


def loopback() -> str:
    """The name of the loopback interface, which Linux calls ``lo`` and BSD systems ``lo0``."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def socket_bytes_sent() -> int | None:
    """Bytes that this process has sent through the TCP sockets it holds open, by the kernel's count; None where it has none.

    Bytes on their way count, too: the last ones of a training are seldom acknowledged when it ends. Those that were lost
    and sent again count once.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as copy:
                if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_SENT_AGAIN + 8)
                    sent, again = struct.unpack_from("QQ", info, _TCP_SENT)
                    total += sent - again + struct.unpack_from("I", info, _TCP_NOT_SENT)[0]
        except OSError:
            continue
        except struct.error:  # an older kernel's tcp_info is shorter
            return None
    return total
