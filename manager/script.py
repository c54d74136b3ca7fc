"""The manager's entry point: reads the settings, connects engine, controller and listeners, and waits for a signal.

run.sh starts it under supervise.sh, with the settings in LB_ variables. Exit codes: 0 ended by SIGTERM or SIGINT; 1
cannot start; 2 invalid setting; 3 the loop or the listeners failed; 4 another manager has taken over.
"""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from core.controller import Controller
from core.engine import EngineError
from core.settings import SettingError, Settings, read
from engines.docker_engine import DockerEngine
from engines.options import BalancerOptions
from engines.swarm_engine import SwarmEngine
from web.app import as_operator, create_app, waits_in
from web.listeners import Listeners, bind_tcp, bind_unix, raise_file_limit, tls_context
from web.metrics import Tally
from web.recent_log import RecentLog
from web.schemas import one_line

END = (signal.SIGTERM, signal.SIGINT)
END_POLL = 0.2  # seconds between checks whether a signal asks the manager to end
FAILED = 3  # exit status; the supervisor starts the manager again
TAKEN_OVER = 4  # exit status; neither the supervisor nor systemd starts the manager again

log = logging.getLogger("manager")


def serve(controller: Controller, settings: Settings, token: str, gateway: str, recent_log: RecentLog) -> Listeners:
    """Serves on all three listeners. Raises OSError if one cannot be opened."""
    listeners = Listeners()
    # Long polls wait on the listeners' thread, so a change of the snapshot has to wake them there.
    controller.subscribe(listeners.notify)
    wait = waits_in(listeners, controller)
    app = create_app(controller, token, [gateway], wait, recent_log, compute=listeners.compute)
    tls = tls_context(settings.run_dir / "manager.pem") if settings.orchestrator == "swarm" else None
    listeners.add(bind_tcp("127.0.0.1", settings.manager_port), app)
    listeners.add(bind_tcp(gateway, settings.manager_port), app, tls)
    listeners.add(bind_unix(settings.run_dir / "manager.sock"), as_operator(app))
    listeners.start()
    return listeners


class OneLine(logging.Formatter):
    """Formats each record as one line, and a traceback below it. A record may quote a backend's log, which could
    otherwise contain further lines or control characters for the terminal that shows the file."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return one_line(super().formatMessage(record))


def start_log(path: Path) -> RecentLog:
    """Logs to the file and to the RecentLog that GET /log reads."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=5_000_000, backupCount=3)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    recent_log = RecentLog()
    logging.getLogger().addHandler(handler)
    logging.getLogger().addHandler(recent_log)
    log.setLevel(logging.INFO)
    return recent_log


def make_engine(settings: Settings) -> DockerEngine | SwarmEngine:
    """The engine that the settings name, with the variables that only run.sh sets. Raises EngineError."""
    image = os.environ.get("LB_BALANCER_IMAGE", "")
    if not image:
        raise EngineError("LB_BALANCER_IMAGE is not set: it names the balancer's image, and run.sh sets it")
    # The image's name is for people. It may refer to another image now, and a restart is no update.
    settings = replace(settings, image=os.environ.get("LB_IMAGE_ID", settings.image))
    if settings.orchestrator == "docker":
        return DockerEngine(settings, BalancerOptions(image))
    secrets = (os.environ["LB_TOKEN_SECRET"], os.environ["LB_CERTIFICATE_SECRET"])
    return SwarmEngine(settings, BalancerOptions(image, secrets))


def wait_for_end(*alive: Callable[[], bool]) -> None:
    """Returns when SIGTERM or SIGINT is pending (both have to be blocked), or when one of `alive` returns False.

    It polls for pending signals, because `signal.sigtimedwait` returns an arbitrary signal when SIGCONT interrupts it
    after its timeout.
    """
    while all(is_alive() for is_alive in alive) and not signal.sigpending() & set(END):
        time.sleep(END_POLL)


def main() -> int:
    parser = argparse.ArgumentParser(description="The manager; run.sh starts it with its settings in LB_ variables.")
    parser.add_argument("--project", help="the same as LB_PROJECT; run.sh and stop.sh find the manager by it")
    parser.add_argument("--backends", type=int, help="how many to begin with; else as many as before")
    arguments = parser.parse_args()
    try:
        settings = read(os.environ)
    except SettingError as error:
        print(f"manager: {error}", file=sys.stderr)
        return 2
    # stop.sh finds the manager by --project, so the two names have to be the same.
    if arguments.project not in (None, settings.project):
        print(f"manager: --project is {arguments.project}, LB_PROJECT is {settings.project}", file=sys.stderr)
        return 2
    # Before any thread starts: threads inherit the mask, so none of them receives a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, END)
    raise_file_limit()
    recent_log = start_log(settings.run_dir / "manager.log")
    try:
        token = (settings.run_dir / "token").read_text().strip()
        engine = make_engine(settings)
        gateway = engine.gateway()
        ip_file = settings.run_dir / "balancer" / "ip.txt"
        controller = Controller(engine, settings, ip_file, Tally(), check_source=gateway)
        controller.adopt(arguments.backends)
        (settings.run_dir / "backends").unlink(missing_ok=True)  # later managers continue with the saved number
        listeners = serve(controller, settings, token, gateway, recent_log)
    except (EngineError, OSError) as error:
        log.error("cannot start: %s", error)
        print(f"manager: cannot start: {error}", file=sys.stderr)
        return 1
    log.info("manager started, pid %d, at 127.0.0.1 and %s, port %d", os.getpid(), gateway, settings.manager_port)
    loop = threading.Thread(target=controller.run, name="controller", daemon=True)
    loop.start()
    wait_for_end(loop.is_alive, listeners.is_alive)
    status = 0
    if controller.taken_over:
        status = TAKEN_OVER
    elif not (loop.is_alive() and listeners.is_alive()):
        status = FAILED
        log.error("the loop or the listeners have failed; this manager ends")
    controller.close()  # ends all long polls; later ones are refused
    loop.join(10)
    listeners.stop()
    log.info("manager ended")
    return status


if __name__ == "__main__":
    ended = main()
    logging.shutdown()
    os._exit(ended)  # without waiting for other threads: an engine call may take up to 30 s
