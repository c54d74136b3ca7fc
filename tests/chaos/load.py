"""Sends a mix of requests at a fixed rate, whether or not the earlier ones were answered (open loop).

    python3 load.py ADDRESS PORT FILE [--wave SECONDS] [--rate FACTOR]

Three kinds: `new`, one request on a connection; `kept`, several requests on a connection, some time apart; `download`,
a short request that names the backend, then one that takes seconds, on one connection. Writes a line of JSON for each
request when it has ended: [kind, start, end, outcome, backend]. Times are of the machine's monotonic clock; `outcome`
is ok or what failed; `backend` is empty if no answer named one. At SIGTERM it starts no more and waits for the others.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import math
import re
import signal
import time
from typing import TextIO

RATES = {"new": 40.0, "kept": 2.0, "download": 1.0}  # connections per second
KEPT_REQUESTS, KEPT_PAUSE = 8, 0.5  # requests of a kept connection, seconds between them
DOWNLOAD = 3.0  # seconds
# Seconds until a request without a complete answer has failed. TCP sends what was lost again 0.2, 0.6, 1.4, 3, 6.2 and
# 12.6 s later, so a fault of 6 s or more ends for it at 12.6 s.
TIMEOUT = 20.0
WAVE_DEPTH = 0.6  # of the rate, up and down
FLUSH = 0.5  # seconds between writes of the file


class Client:
    def __init__(self, address: str, port: int, file: TextIO) -> None:
        self._address, self._port, self._file = address, port, file
        self.ended = asyncio.Event()

    async def connection(self, kind: str) -> None:
        """Opens a connection and sends its requests; the first that fails is the last."""
        backend, outcome, writer = "", "", None
        for number, path in enumerate(paths(kind)):
            if number and kind == "kept":
                await asyncio.sleep(KEPT_PAUSE)
            start = time.monotonic()
            try:
                async with asyncio.timeout(TIMEOUT):
                    if writer is None:
                        reader, writer = await asyncio.open_connection(self._address, self._port)
                    writer.write(f"GET {path} HTTP/1.1\r\nHost: chaos\r\n\r\n".encode())
                    status, backend, last = await self._answer(reader, backend)
                    outcome = "ok" if status == "200" else f"status {status}"
            except (OSError, EOFError, ValueError) as error:
                outcome, last = reason(error), True
            self._file.write(json.dumps([kind, start, time.monotonic(), outcome, backend]) + "\n")
            if last:
                break
        if writer is not None:
            writer.close()

    @staticmethod
    async def _answer(reader: asyncio.StreamReader, backend: str) -> tuple[str, str, bool]:
        """(status, backend, whether the server closes the connection)."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        named = re.search(r"X-Backend: (\S+)", head)
        length = re.search(r"Content-Length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        return head.split(" ")[1], named[1] if named else backend, "Connection: close" in head

    async def send(self, kind: str, rate: float, wave: float) -> None:
        """Starts connections of one kind until `ended`."""
        running: set[asyncio.Task[None]] = set()
        due = began = time.monotonic()
        while not self.ended.is_set():
            factor = 1 + WAVE_DEPTH * math.sin(2 * math.pi * (due - began) / wave) if wave else 1.0
            due += 1 / (rate * factor)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self.connection(kind))
            running.add(task)
            task.add_done_callback(running.discard)
        if running:
            await asyncio.wait(running)

    async def flush(self) -> None:
        while True:
            self._file.flush()
            await asyncio.sleep(FLUSH)


def paths(kind: str) -> list[str]:
    if kind == "kept":
        return ["/"] * KEPT_REQUESTS
    return ["/", f"/download?seconds={DOWNLOAD:g}"] if kind == "download" else ["/"]


def reason(error: Exception) -> str:
    """One word for why a request failed."""
    match error:
        case TimeoutError():
            return "timeout"
        case ConnectionRefusedError():
            return "refused"
        case ConnectionResetError():
            return "reset"
        case EOFError():
            return "closed"
        case OSError(errno=number) if number:
            return errno.errorcode.get(number, "error")
    return "malformed"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("file")
    parser.add_argument("--wave", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=1.0)
    options = parser.parse_args()
    with open(options.file, "w") as file:  # noqa: PTH123
        client = Client(options.address, options.port, file)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, client.ended.set)
        flushing = asyncio.create_task(client.flush())
        kinds = [client.send(kind, rate * options.rate, options.wave) for kind, rate in RATES.items()]
        await asyncio.gather(*kinds)
        flushing.cancel()


if __name__ == "__main__":
    asyncio.run(main())
