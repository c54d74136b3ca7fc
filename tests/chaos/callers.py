"""Bad clients, and a flood of SYNs without a client: bounded in number and time, and only to the site's own listeners.

    python3 callers.py SEED PLACE…      garbage, huge, slow and silent callers at each PLACE, ADDRESS:PORT or a socket
    python3 callers.py flood ADDRESS PORT NUMBER SOURCES

The first half of this module are the faults that start it as a program.
"""

from __future__ import annotations

import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network

if __name__ != "__main__":
    from chaos.allowances import nothing
    from chaos.fault import Fault, Injected, Stage
    from chaos.product import BALANCER, MANAGER_PORT, PORT, PROJECT
    from chaos.site import FLOOD_SOURCES, HOST, call

EACH = 25  # callers of each kind at each place
LASTING = 5.0  # seconds
SYNS, SYN_RATE = 6000, 2000  # per second


# -- the faults ------------------------------------------------------------------------------------------------------


def bad_callers(stage: Stage) -> Injected:
    """At the manager's listeners and the balancer's, from the host; at the service, from outside."""
    gateway = stage.site.docker("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", PROJECT)
    places = [f"127.0.0.1:{MANAGER_PORT}", f"{gateway}:{MANAGER_PORT}", str(stage.product.run_dir / "manager.sock")]
    if stage.product.datapath == "host":
        places.append("127.0.0.2:5000")
    else:
        format_ = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        places.append(f"{stage.site.docker('inspect', '-f', format_, BALANCER)}:5000")
    program = [sys.executable, __file__, str(stage.random.random())]
    inside = subprocess.Popen(stage.site.on_host(*program, *places))
    call(*stage.site.on_outside(*program, f"{HOST}:{PORT}"))
    inside.wait(60)
    return Injected()


def flood(stage: Stage) -> Injected:
    call(*stage.site.on_outside(sys.executable, __file__, "flood", HOST, str(PORT), str(SYNS), FLOOD_SOURCES))
    return Injected()


def faults() -> list[Fault]:
    return [
        Fault(
            "garbage, huge, slow and silent callers", "callers", bad_callers, nothing, "each has its limits", budget=12
        ),
        Fault("SYN flood", "callers", flood, nothing, "SYNs without a client cost no connection", budget=10),
    ]


# -- the program -----------------------------------------------------------------------------------------------------

Talk = Callable[[socket.socket, random.Random], None]


def garbage(connection: socket.socket, chance: random.Random) -> None:
    connection.sendall(chance.randbytes(4096))


def huge(connection: socket.socket, chance: random.Random) -> None:
    """Headers without an end, or a body that was announced as a gigabyte."""
    if chance.random() < 0.5:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"X-Huge: " + b"x" * 2**17)
    else:
        connection.sendall(b"POST /pkts_info HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 2**20)


def slow(connection: socket.socket, chance: random.Random) -> None:
    """A byte at a time."""
    deadline = time.monotonic() + LASTING
    for byte in b"GET /status HTTP/1.1\r\nHost: localhost\r\n":
        if time.monotonic() > deadline:
            break
        connection.sendall(bytes([byte]))
        time.sleep(0.4)


def silent(connection: socket.socket, chance: random.Random) -> None:
    time.sleep(LASTING)


def caller(place: str, talk: Talk, chance: random.Random) -> None:
    family = socket.AF_UNIX if "/" in place else socket.AF_INET
    with suppress(OSError), socket.socket(family) as connection:
        connection.settimeout(LASTING)
        host, _, port = place.partition(":")
        connection.connect(place if "/" in place else (host, int(port)))
        talk(connection, chance)


def all_callers(seed: str, places: list[str]) -> None:
    chance = random.Random(seed)
    threads = []
    for place in places:
        for talk in (garbage, huge, slow, silent):
            for _ in range(EACH):
                arguments = (place, talk, random.Random(chance.random()))
                threads.append(threading.Thread(target=caller, args=arguments))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def syn(source: bytes, target: bytes, source_port: int, port: int) -> bytes:
    """An IP packet with a SYN; the kernel adds the header's length and checksum."""
    fields = (source_port, port, source_port, 0, 5 << 4, 2, 65535)
    segment = struct.pack("!HHIIBBHHH", *fields, 0, 0)
    pseudo = source + target + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(segment))
    segment = struct.pack("!HHIIBBHHH", *fields, checksum(pseudo + segment), 0)
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_TCP, 0, source, target) + segment


def send_syns(address: str, port: int, number: int, sources: str) -> None:
    hosts = [host.packed for host in IPv4Network(sources).hosts()]
    target, began = IPv4Address(address).packed, time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for sent in range(number):
            packet = syn(hosts[sent % len(hosts)], target, 1024 + sent // len(hosts), port)
            raw.sendto(packet, (address, 0))
            time.sleep(max(0.0, began + sent / SYN_RATE - time.monotonic()))


if __name__ == "__main__":
    if sys.argv[1] == "flood":
        send_syns(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        all_callers(sys.argv[1], sys.argv[2:])
