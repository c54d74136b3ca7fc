"""The campaign's backend: names itself in every answer, and fails as the files in /tmp say.

    GET /                    a short answer             GET /download?seconds=S   one that takes S seconds
    GET /ok                  the health path

broken: answers with 500 at once. slow: answers late. sick: the health path answers with 500. flap: it does so every
other second. oom: takes memory until the kernel ends it. Each file is looked for at each request.

After SIGTERM it serves for LINGER seconds, then closes its listener and finishes the requests in progress.
"""

import asyncio
import os
import re
import signal
import socket
import time
from pathlib import Path

LINGER = float(os.environ.get("LINGER", "1"))  # seconds; set in a Swarm, as for the sample server
FINISH = 20.0  # seconds
IDLE = 30.0  # seconds between two requests of a connection
SLOW = 0.4  # seconds
CHUNK, PAUSE = b"." * 4096, 0.1  # ten a second
NAME = socket.gethostname()


class State:
    draining = False
    in_progress = 0


def has(file: str) -> bool:
    return (Path("/tmp") / file).exists()


def healthy() -> bool:
    return not has("sick") and not (has("flap") and int(time.time()) % 2)


def take_memory() -> None:
    taken = []
    while True:
        taken.append(bytearray(b"x" * 2**20))


async def answer(path: str, writer: asyncio.StreamWriter) -> None:
    if has("oom"):
        take_memory()
    if path == "/ok":
        return send(writer, "200 OK" if healthy() else "500 Internal Server Error", NAME)
    if has("broken"):
        return send(writer, "500 Internal Server Error", NAME)
    if has("slow"):
        await asyncio.sleep(SLOW)
    if seconds := re.fullmatch(r"/download\?seconds=([\d.]+)", path):
        return await download(writer, float(seconds[1]))
    return send(writer, "200 OK", NAME)


def head(status: str, length: int) -> bytes:
    closing = "Connection: close\r\n" if State.draining else ""
    return f"HTTP/1.1 {status}\r\nX-Backend: {NAME}\r\nContent-Length: {length}\r\n{closing}\r\n".encode()


def send(writer: asyncio.StreamWriter, status: str, body: str) -> None:
    writer.write(head(status, len(body)) + body.encode())


async def download(writer: asyncio.StreamWriter, seconds: float) -> None:
    chunks = int(seconds / PAUSE)
    writer.write(head("200 OK", chunks * len(CHUNK)))
    for _ in range(chunks):
        writer.write(CHUNK)
        await writer.drain()
        await asyncio.sleep(PAUSE)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while not State.draining or not reader.at_eof():
            request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE)
            State.in_progress += 1
            try:
                await answer(request.split(b" ", 2)[1].decode(errors="replace"), writer)
                await writer.drain()
            finally:
                State.in_progress -= 1
            if State.draining or b"connection: close" in request.lower():
                break
    except (OSError, EOFError, IndexError, asyncio.LimitOverrunError, TimeoutError):
        pass  # the client has gone, or sent no HTTP
    finally:
        writer.close()


async def main() -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)  # as process 1 it would be ignored
    server = await asyncio.start_server(serve, "0.0.0.0", 8000, backlog=4096)
    await ended.wait()
    State.draining = True
    await asyncio.sleep(LINGER)
    server.close()
    deadline = time.monotonic() + FINISH
    while State.in_progress and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    os._exit(0)


asyncio.run(main())
