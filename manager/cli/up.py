"""The second part of `./run.sh`, once Docker runs and .venv is complete: it starts the project or changes its settings.

The name of each step is printed before the step begins. If a step fails or a signal arrives, the run undoes its
changes: a new project is removed, and a running one gets its previous files, and with them its previous manager's
settings and images.
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
from json import dumps
from pathlib import Path

import docker.errors
import requests

from cli import doctor, down, file_copies, images, network, output, startup, swarm, unit
from cli.arguments import Arguments, run_arguments
from cli.output import Failed, Output, Undo
from cli.project import Project, keep, write
from core.settings import ROOT, SETTINGS, read, stored, variable, with_stored
from core.state_files import StateFiles, digest

CHECK_GRACE = 5.0  # seconds for the check of the kernel to end after an interrupt
MANAGER_START = 10.0  # seconds until the manager answers
SUPERVISOR_START = 2.0  # seconds until the supervisor's process has to exist
POLL = 0.05  # seconds
# In run/PROJECT/: what a start, or the manager that it starts, writes. A start that fails restores them.
FILES = (
    *("token", "secrets/balancer/token", swarm.KEY_FILE, swarm.CERTIFICATE_FILE, "settings.json", "environment"),
    *("balancer/hostip.txt", "balancer/operator_settings.json", "balancer/refused_update.json"),
)


@dataclass(frozen=True)
class Images:
    """The names of the two images, and the id of the backends' image, whose name may later refer to another image."""

    balancer: str
    backend: str
    backend_id: str


class Start:
    """One run of ./run.sh. `run` calls the parts in their order."""

    def __init__(self, arguments: Arguments, out: Output, undo: Undo) -> None:
        self.arguments, self.settings = arguments, arguments.settings
        self.output, self.undo = out, undo
        self._project_existed = False
        self._given_up_before = False  # an earlier run's update was given up, and this run does not try it again
        self._swarm_secrets: dict[str, str] = {}  # their names, by file
        self._files: dict[str, str] = {}  # the settings with the paths of copied files
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
        # The balancer's image that the project has was tried when it was new.
        if stored(project.name).get("balancer_image") != built.balancer:
            self._check_kernel(built.balancer)
        self._make_network()
        rotate = self.arguments.rotate_secrets
        if rotate:
            project.rotate_token()
        self._swarm_secrets = swarm.share_secrets(project, built.balancer, rotate, self.undo) if self.swarm else {}
        self._files = file_copies.copy_files(project, settings, project.docker.images.get(built.backend_id))
        secrets = {**(swarm.variables(self._swarm_secrets) if self.swarm else {}), **self._files}
        # The manager launches the backends and the balancer.
        self._start_manager(address or network.gateway(project.network()), built, secrets)
        self._wait()
        if self.arguments.at_boot:
            with self.output.step(f"Enabling {unit.name(project.name)}, which starts the manager at boot"):
                unit.install(project.name, "enable", self.output)

    def remove_replaced(self) -> None:
        """Removes the secrets and the copies of files that the settings before needed. After that, the run cannot be
        undone."""
        file_copies.remove_unused(self.project, self._files)
        if self.swarm:
            swarm.remove_rotated(self.project, self._swarm_secrets)

    # -- before anything starts ---------------------------------------------------------------------------------------

    def _check_host(self) -> None:
        obstacles = doctor.obstacles(doctor.Host(self.settings, os.environ))
        if obstacles:
            raise Failed("\nrun.sh: ".join(obstacles))

    def _images(self) -> Images:
        client, base = self.project.docker, self.settings.base_image
        balancer = images.build(client, self.output, "balancer", base)
        backend = self.settings.image
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
        made_from["python"] = sys.version
        made_from["secrets"] = " ".join(secrets.values())
        made_from["token"] = digest(self.project.token)
        return dumps({**self.arguments.variables, **made_from}, indent=1)

    def _start_manager(self, address: str, built: Images, secrets: Mapping[str, str]) -> None:
        project, out = self.project, self.output
        path, settings_text = self.run_dir / "settings.json", self._settings_text(built, secrets)
        unchanged = path.exists() and path.read_text() == settings_text
        refused_update = self.run_dir / "balancer" / "refused_update.json"
        self._given_up_before = refused_update.exists()
        complete = project.manager_runs() and project.supervisor_runs()
        if complete and unchanged and not self.arguments.backends:
            out.say("The manager is up and its settings are unchanged")
            return
        if self._project_existed:
            self._keep_settings()
        # A supervisor that has failed is not there for a moment: its unit starts it again.
        if project.manager_runs() or project.supervisor_runs() or unit.is_installed(project.name):
            with out.step("Stopping the manager, to start it with changed settings"):
                project.end_manager()
        # The files that the manager and the balancer read.
        project.write_secrets()
        self._write_run_time_files(f"{address}:{self.settings.manager_port}\n")
        same_settings = self.arguments.variables == with_stored({variable("project"): project.name})
        only_rotates = self.arguments.rotate_secrets and same_settings
        if not unchanged and not only_rotates:
            refused_update.unlink(missing_ok=True)  # it may be tried again
            self._given_up_before = False
        # Changed settings replace the limits and the pause that the operator has set.
        if not same_settings:
            (self.run_dir / "balancer" / "operator_settings.json").unlink(missing_ok=True)
        # In a file of mode 0600, because every user may read a unit.
        environment = self._environment(built, secrets).items()
        text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment)
        write(self.run_dir / "environment", text)
        write(path, settings_text)
        # An interrupted stop.sh may have left a drain, which would keep the balancer out of service until its end.
        for balancer in project.containers("balancer"):
            with suppress(docker.errors.APIError):  # the balancer does not run
                balancer.exec_run(["rm", "-f", "/run/draining"])
        with out.step("Starting the manager"):
            self._launch(self.arguments.backends, self.settings.manager_port)

    def _keep_settings(self) -> None:
        """Registers what undoes a change of a running project: the manager ends, its files are restored, and it is
        started again."""
        if not (self.run_dir / "environment").exists() or not stored(self.project.name):
            return  # somebody has deleted them
        desired = StateFiles(self.run_dir / "balancer" / "ip.txt").read_fleet().desired
        self.undo.add("go back to the settings before", partial(self._go_back, str(desired or "")))
        for name in FILES:
            keep(self.run_dir / name, self.undo)
        self.undo.add("stop the manager", self.project.end_manager)

    def _go_back(self, backends: str) -> None:
        """Starts the manager with the settings before, whose files are restored, and waits until the project serves
        again. It does not wait until all backends have been replaced."""
        settings = read(with_stored({variable("project"): self.project.name}))
        with self.output.step("Starting the manager with the settings before"):
            self._launch(backends, settings.manager_port)
        with self.output.step(f"Waiting for the first answer on port {settings.port}") as step:
            startup.wait_until_it_serves(settings, step.log)

    def _write_run_time_files(self, address: str) -> None:
        """Writes hostip.txt, the manager's address for the balancer, and links both run-time files into balancer/."""
        (self.run_dir / "balancer").mkdir(exist_ok=True)
        (self.run_dir / "balancer" / "hostip.txt").write_text(address)
        # The links are for people who look for the files beside the balancer's code, where the original project has
        # them.
        for name in images.RUN_TIME_FILES:
            link = ROOT / "balancer" / name
            # In one step, because other projects of this checkout make the same links.
            fresh = link.with_name(f".{name}.{self.project.name}")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(Path("..", "run", self.project.name, "balancer", name))
            fresh.replace(link)

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

    def _launch(self, backends: str, manager_port: int) -> None:
        """Starts the supervisor, as a unit if systemd is this host's init, and waits until its manager answers."""
        project = self.project
        if backends:
            write(self.run_dir / "backends", backends)
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
        while not _manager_answers(manager_port):
            waited = time.monotonic() - began
            supervisor_ended = waited > SUPERVISOR_START and not project.supervisor_runs()
            if supervisor_ended or waited > MANAGER_START:
                project.end_manager()
                raise Failed("the manager does not answer")
            time.sleep(POLL)

    # -- until it serves ----------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Waits until the service answers and, without --no-wait, until an update of the backends has ended."""
        with self.output.step(f"Waiting for the first answer on port {self.settings.port}") as step:
            startup.wait_until_it_serves(self.settings, step.log)
        if not self.arguments.no_wait:
            with self.output.step("Waiting until every backend has these settings") as step:
                startup.wait_for_update(self.settings, self._given_up_before, step.log)
        if self._given_up_before:
            self.output.say("An earlier update was given up; ./run.sh --status has the reason")

    def print_summary(self) -> None:
        settings = self.settings
        host = "localhost" if settings.bind == "0.0.0.0" else settings.bind
        is_default = settings.project == SETTINGS["project"].default
        self.output.say("")
        self.output.say(f"  service   http://{host}:{settings.port}/")
        self.output.say(f"  manager   http://localhost:{settings.manager_port}/")
        self.output.say(f"  log       tail -F '{self.run_dir / 'manager.log'}'")
        self.output.say(f"  stop      ./stop.sh{'' if is_default else f' --project {settings.project}'}")


def _manager_answers(port: int) -> bool:
    with suppress(requests.RequestException), requests.Session() as session:
        session.trust_env = False  # this host is reached through no proxy
        return session.get(f"http://127.0.0.1:{port}/status", timeout=5).status_code == 200
    return False


def run(arguments: Arguments, out: Output) -> None:
    with Undo(out) as undo:
        if os.environ.get("ENGINE_STARTED"):
            undo.add("stop the Docker Engine", lambda: out.run("bash", "-c", ". manager/host.sh; stop_unused_engine"))
        start = Start(arguments, out, undo)
        start.run()
    start.print_summary()
    start.remove_replaced()


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
