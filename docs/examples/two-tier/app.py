"""Counts its requests in redis, which has a password. GREETING and REDIS_HOST are environment variables."""

import os
import socket
from pathlib import Path

import flask
import redis

app = flask.Flask(__name__)
password = Path("/run/secrets/password").read_text().strip()
database = redis.Redis(os.environ["REDIS_HOST"], password=password)


@app.get("/")
def count() -> str:
    return f"{os.environ['GREETING']}, request {database.incr('requests')}, answered by {socket.gethostname()}\n"


@app.get("/healthz")
def healthy() -> str:
    """A backend without its database gets no requests."""
    database.ping()
    return "ok\n"
