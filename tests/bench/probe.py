"""Sends requests over new connections at a fixed rate, whether or not the earlier ones were answered (open loop).

    python3 probe.py ADDRESS PORT RATE SECONDS

Prints a JSON list of [seconds since 1970, duration in seconds, the answer's body; empty if it failed].
"""

import json
import socket
import sys
import threading
import time

TIMEOUT = 8.0  # seconds
REQUEST = b"GET / HTTP/1.0\r\n\r\n"


def request(address: tuple[str, int], results: list[tuple[float, float, str]]) -> None:
    sent, answer = time.time(), b""
    try:
        with socket.create_connection(address, TIMEOUT) as connection:
            connection.sendall(REQUEST)
            answer = connection.makefile("rb").read()
    except OSError:
        pass
    head, _, body = answer.decode().partition("\r\n\r\n")
    results.append((sent, time.time() - sent, body.strip() if " 200 " in head else ""))


def main(host: str, port: str, rate: str, seconds: str) -> None:
    results: list[tuple[float, float, str]] = []
    began, threads = time.monotonic(), []
    for number in range(round(float(rate) * float(seconds))):
        time.sleep(max(0.0, began + number / float(rate) - time.monotonic()))
        thread = threading.Thread(target=request, args=((host, int(port)), results))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    json.dump(sorted(results), sys.stdout)


main(*sys.argv[1:])
