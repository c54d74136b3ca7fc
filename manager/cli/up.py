"""The second part of `./run.sh`, once Docker runs and .venv is complete: it starts the project or changes its settings.

The name of each step is printed before the step begins. If a step fails or a signal arrives, the run undoes its
changes: a new project is removed, and a running one gets its previous settings and image again. The settings are stored
before the start counts as a success, because the next run compares with them.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from json import dumps, loads
from pathlib import Path

import requests

from cli import doctor, down, file_copies, images, network, output, startup, swarm, unit
from cli.arguments import Arguments, run_arguments
from cli.output import Failed, Output, Undo
from cli.project import Project, write
from core.settings import ROOT, SETTINGS, read, stored, variable, with_stored
from core.state_files import StateFiles, digest

CHECK_GRACE = 5.0  # seconds for the check of the kernel to end after an interrupt
MANAGER_START = 10.0  # seconds until the manager answers
SUPERVISOR_START = 2.0  # seconds until the supervisor's process has to exist
POLL = 0.05  # seconds


@dataclass(frozen=True)
class Images:
    """The names of the two images, and the id of the backends' image, whose name may later refer to another image."""

    balancer: str
    backend: str
    backend_id: str


class Start:
    """One run of ./run.sh. `run` calls the parts in their order."""

    def __init__(
        self, arguments: Arguments, out: Output, undo: Undo, image: str = "", files: Mapping[str, str] | None = None
    ) -> None:
        """`image` and `files` override the backends' image and the copies of their files: a run that restores the
        previous settings gives the previous ones."""
        self.arguments, self.settings = arguments, arguments.settings
        self.output, self.undo, self._image = out, undo, image
        self._files = files or {}
        self._project_existed = False
        self.project = Project(self.settings.project, out)
        self.run_dir = self.project.run_dir
        self.swarm = self.settings.orchestrator == "swarm"

    def run(self) -> None:
        settings, project = self.settings, self.project
        address = ""
        if self.swarm:
            may_init = self.arguments.swarm_init
            address = swarm.join(project, settings.advertise, settings.registry, may_init, self.undo)
        # First the parts that leave nothing to undo when they fail.
        self._check_host()
        built = self._images()
        # A balancer that exists has already tried its rules on this kernel.
        if not self.project.containers("balancer"):
            self._check_kernel(built.balancer)
        self._make_network()
        rotate = self.arguments.rotate_secrets
        if rotate:
            project.rotate_token()
        names = swarm.share_secrets(project, built.balancer, rotate, self.undo) if self.swarm else {}
        if not self._files:
            self._files = file_copies.keep(project, settings, project.docker.images.get(built.backend_id))
        secrets = {**(swarm.variables(names) if self.swarm else {}), **self._files}
        # The manager launches the backends and the balancer.
        self._start_manager(address or network.gateway(project.network()), built, secrets)
        self._wait()
        # Part of the start: without this file, the next run would not know the project's settings.
        write(self.run_dir / "settings.json", self._settings_text(built, secrets))
        file_copies.remove_unused(project, self._files)
        if self.swarm:
            swarm.remove_rotated(project, names)
        if self.arguments.at_boot:
            with self.output.step(f"Enabling {unit.name(project.name)}, which starts the manager at boot"):
                unit.install(project.name, "enable", self.output)

    # -- before anything starts ---------------------------------------------------------------------------------------

    def _check_host(self) -> None:
        obstacles = doctor.obstacles(doctor.Host(self.settings, os.environ))
        if obstacles:
            raise Failed("\nrun.sh: ".join(obstacles))

    def _images(self) -> Images:
        client, base = self.project.docker, self.settings.base_image
        balancer = images.build(client, self.output, "balancer", base)
        backend = self._image or self.settings.image
        if not backend:
            backend = images.build(client, self.output, "server", base)
        elif not images.exists(client, backend):
            images.pull(client, self.output, backend)
        backend_id = client.images.get(backend).id
        if self.swarm and self.settings.registry:
            balancer = swarm.publish(self.project, self.settings.registry, balancer)
            backend = swarm.publish(self.project, self.settings.registry, backend)
        return Images(balancer, backend, backend_id)

    def _check_kernel(self, image: str) -> None:
        try:
            with self.output.step("Checking that this kernel has what the rules need"):
                # An interrupt does not end it while the engine creates its container, which could be found, and
                # removed, only later.
                self.output.run(*doctor.check_rules(image, self.project.name), grace=CHECK_GRACE)
        finally:
            self.project.remove_checks()

    # -- the network and the manager ----------------------------------------------------------------------------------

    def _make_network(self) -> None:
        project = self.project
        # If parts of the project exist, a failure does not remove them: they may be serving.
        if project.containers() or project.services() or project.manager_runs() or project.supervisor_runs():
            self._project_existed = True
        else:
            self.undo.add("remove the project", lambda: down.remove(project, drain=0))
        network.make(project, self.settings.subnet, overlay=self.swarm, datapath=self.settings.datapath)
        network.add_host_rules(project)

    def _settings_text(self, built: Images, secrets: Mapping[str, str]) -> str:
        """The text of settings.json: the settings and everything else that a manager is started with. If this has
        changed, a new manager has to be started."""
        made_from = {"backend_image": built.backend_id, "balancer_image": built.balancer}
        made_from["manager"] = images.digest("manager", self.settings.base_image)
        made_from["secrets"] = " ".join(secrets.values())
        made_from["files"] = dumps(self._files)
        made_from["token"] = digest(self.project.token)
        return dumps({**self.arguments.variables, **made_from}, indent=1)

    def _start_manager(self, address: str, built: Images, secrets: Mapping[str, str]) -> None:
        project, out = self.project, self.output
        path = self.run_dir / "settings.json"
        unchanged = path.exists() and path.read_text() == self._settings_text(built, secrets)
        complete = project.manager_runs() and project.supervisor_runs()
        if complete and unchanged and not self.arguments.backends:
            out.say("The manager is up and its settings are unchanged")
            return
        restores = bool(self._image)
        if self._project_existed and path.exists() and not restores:
            desired = StateFiles(self.run_dir / "balancer" / "ip.txt").read_fleet().desired
            self.undo.add("go back to the settings before", partial(self._go_back, desired))
        if project.manager_runs() or project.supervisor_runs():
            with out.step("Stopping the manager, to start it with changed settings"):
                project.end_manager()
        # The files that the manager and the balancer read.
        project.write_secrets(self.undo)
        self._write_run_time_files(f"{address}:{self.settings.manager_port}\n")
        if not unchanged and not self.arguments.rotate_secrets:
            (self.run_dir / "balancer" / "refused_update.json").unlink(missing_ok=True)  # it may be tried again
        same_settings = self.arguments.variables == with_stored({variable("project"): project.name})
        if not same_settings:
            self._forget_operator_settings()
        with out.step("Starting the manager"):
            self._launch(self._environment(built, secrets))

    def _write_run_time_files(self, address: str) -> None:
        """Writes hostip.txt, the manager's address for the balancer, and links both run-time files into balancer/."""
        (self.run_dir / "balancer").mkdir(exist_ok=True)
        (self.run_dir / "balancer" / "hostip.txt").write_text(address)
        # The links are for people who look for the files beside the balancer's code, where the original project has
        # them.
        for name in images.RUN_TIME_FILES:
            link = ROOT / "balancer" / name
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", "run", self.project.name, "balancer", name))

    def _forget_operator_settings(self) -> None:
        """Changed settings replace the limits and the pause that the operator has set."""
        place = self.run_dir / "balancer"
        with suppress(FileNotFoundError):
            (place / "operator_settings.json").replace(place / "operator_settings.before")

    def _environment(self, built: Images, secrets: Mapping[str, str]) -> dict[str, str]:
        """The environment variables that the manager is started with."""
        engine = {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}
        variables = {**engine, **self.arguments.variables, **secrets}
        # Swarm would look a name up in a registry; it uses an id as it is.
        by_id = self.swarm and not self.settings.registry
        balancer = self.project.docker.images.get(built.balancer).id if by_id else built.balancer
        default_health = "tcp" if self.settings.image else ""
        health = variables[variable("health")] or default_health
        found = {"LB_BALANCER_IMAGE": balancer, "LB_IMAGE": built.backend, "LB_IMAGE_ID": built.backend_id}
        return {**variables, **found, "LB_HEALTH": health}

    def _launch(self, environment: Mapping[str, str]) -> None:
        """Starts the supervisor, as a unit if systemd is this host's init, and waits until its manager answers."""
        project = self.project
        # In a file of mode 0600, because every user may read a unit.
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
        write(self.run_dir / "environment", "".join(lines))
        if self.arguments.backends:
            write(self.run_dir / "backends", self.arguments.backends)
        # systemd restarts a supervisor that was killed. Without systemd, the supervisor gets a session of its own, so
        # that closing the terminal does not end it.
        if unit.usable():
            unit.install(project.name, "start", self.output)
        else:
            command = [str(ROOT / "manager" / "supervise.sh"), "--project", project.name]
            streams = {"stdin": subprocess.DEVNULL, "stdout": self.output.log, "stderr": self.output.log}
            subprocess.Popen(command, start_new_session=True, **streams)  # type: ignore[call-overload]
        # When a manager cannot start, its supervisor ends as well, and no answer will come.
        began = time.monotonic()
        while not self._manager_answers():
            waited = time.monotonic() - began
            supervisor_ended = waited > SUPERVISOR_START and not project.supervisor_runs()
            if supervisor_ended or waited > MANAGER_START:
                project.end_manager()
                raise Failed("the manager does not answer")
            time.sleep(POLL)

    def _manager_answers(self) -> bool:
        with suppress(requests.RequestException), requests.Session() as session:
            session.trust_env = False  # this host is reached through no proxy
            return session.get(f"http://127.0.0.1:{self.settings.manager_port}/status", timeout=5).status_code == 200
        return False

    def _go_back(self, desired: int) -> None:
        """Starts the manager with the stored settings, image and files and `desired` backends, and waits until the
        project serves again. It does not wait until all backends have been replaced."""
        self.project.end_manager()
        with suppress(FileNotFoundError):
            kept = self.run_dir / "balancer" / "operator_settings.before"
            kept.replace(kept.with_name("operator_settings.json"))
        variables = with_stored({variable("project"): self.project.name})
        arguments = Arguments(read(variables), variables, backends=str(desired or ""), no_wait=True)
        before = stored(self.project.name)
        files = loads(before.get("files", "{}"))
        Start(arguments, self.output, Undo(self.output), before["backend_image"], files).run()

    # -- until it serves ----------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Waits until the service answers and, without --no-wait, until an update of the backends has ended."""
        with self.output.step(f"Waiting for the first answer on port {self.settings.port}") as step:
            startup.wait_until_it_serves(self.settings, step.log)
        if not self.arguments.no_wait:
            with self.output.step("Waiting until every backend has these settings") as step:
                startup.wait_for_update(self.settings, step.log)

    def print_summary(self) -> None:
        settings = self.settings
        host = "localhost" if settings.bind == "0.0.0.0" else settings.bind
        is_default = settings.project == SETTINGS["project"].default
        self.output.say("")
        self.output.say(f"  service   http://{host}:{settings.port}/")
        self.output.say(f"  manager   http://localhost:{settings.manager_port}/")
        self.output.say(f"  log       tail -F '{self.run_dir / 'manager.log'}'")
        self.output.say(f"  stop      ./stop.sh{'' if is_default else f' --project {settings.project}'}")


def run(arguments: Arguments, out: Output) -> None:
    with Undo(out) as undo:
        if os.environ.get("ENGINE_STARTED"):
            undo.add("stop the Docker Engine", lambda: out.run("bash", "-c", ". manager/host.sh; stop_engine"))
        start = Start(arguments, out, undo)
        start.run()
    (start.run_dir / "balancer" / "operator_settings.before").unlink(missing_ok=True)
    start.print_summary()


def main() -> int:
    arguments = run_arguments(sys.argv[1:], os.environ)
    run_dir = arguments.settings.run_dir
    status = output.main("run.sh", run_dir, "run.log", lambda out: run(arguments, out))
    if status == 0 and arguments.follow:
        command = ["tail", "-n", "20", "-F", str(run_dir / "manager.log")]
        os.execvp(command[0], command)  # noqa: S606 - a fixed program
    return status


if __name__ == "__main__":
    sys.exit(main())
