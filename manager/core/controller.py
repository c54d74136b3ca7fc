"""The one loop that carries plans out, and the state that HTTP handlers read and change without waiting for the engine.

`step` is the loop's body: take in what the workers finished, list the containers, let the pure modules decide, give
the slow work to workers. A list always begins after the last result was taken in, so an old list can never bring a
removed container back. Everything else takes the lock for as long as a plan and a small file take. A report's decision
begins its work at once (`_advance`), without waiting for the next list.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from core import fleet as fleets
from core import path_check, scaler
from core import snapshot as snapshots
from core.engine import BalancerState, Engine, EngineError, Event, TakenOver
from core.fleet import (
    ACTIVE,
    DRAINING,
    FAILED,
    SPARE,
    STARTING,
    STOPPED,
    Admit,
    Backend,
    Drain,
    Fleet,
    Goal,
    Launch,
    Resize,
    Step,
)
from core.history import History, Point
from core.launch_backoff import STABLE, LaunchBackoff
from core.load import LoadTracker, Report
from core.path_check import PathCheck
from core.scaler import Decision, Memory, Policy
from core.settings import Settings
from core.workers import BALANCER, PAUSE, Workers

RELIST = 2.0  # seconds between two lists of the engine's when no event asks for one
# Docker's list still shows a container as running for some 0.1 s after the event of its end, so there is a second list.
RELIST_AFTER_EVENT = 0.25
SUSPENDED = 2.0  # seconds by which a wait of the loop has to be late to show that the process was stopped meanwhile
SIGKILL, SIGTERM = 9, 15

log = logging.getLogger("manager")


Clock = Callable[[], float]


class Recorder(Protocol):
    """Counts what happens, for whoever shows it."""

    def changed(self, before: Backend | None, after: Backend | None, now: float) -> None: ...
    def reported(self, report: Report, fleet: Fleet) -> None: ...
    def keep(self, balancers: Collection[str]) -> None: ...
    def decided(self, decision: Decision) -> None: ...
    def launch_failed(self) -> None: ...


class Unknown(LookupError):
    """No backend of ours has this address."""


class Closing(Exception):
    """The manager ends: whoever waits for a change has to ask the next one."""


class Controller:
    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        ip_file: Path,
        recorder: Recorder,
        clock: Clock = time.monotonic,
        *,
        backend_subnet: str = "",
        check_source: str = "",
    ) -> None:
        self.settings = settings
        self.policy = Policy(
            settings.min,
            settings.max,
            settings.target,
            settings.metric,
            settings.stable_window,
            settings.panic_window,
        )
        self.paused = False
        self.engine_trouble = ""
        self.decisions: deque[Decision] = deque(maxlen=1000)
        self._history = History()
        self._epoch = time.time() - clock()  # what the clock counts from, for showing dates only
        self._engine, self._ip_file, self._clock, self._backend_subnet = engine, ip_file, clock, backend_subnet
        self._check_source = check_source
        self._orders_file = ip_file.with_name("orders.json")
        self._refused_file = ip_file.with_name("refused_update.json")
        self._recall_orders()
        self._fleet: Fleet = {}
        self._at: dict[str, list[str]] = {}  # address → names of the backends that have, or had, it
        self.recorder = recorder
        self._load = LoadTracker()
        self._memory = Memory(started=clock())
        self._lock = threading.Condition()
        self._subscribers: list[Callable[[], None]] = []
        self._revision, self._snapshot = "", snapshots.for_balancers({}, settings, backend_subnet, check_source)
        self._wake = threading.Event()
        self._hinted = False  # an event came since the last list began
        self._stopping = False
        self._workers = Workers(engine, done=self._wake.set)
        self._namer = fleets.Namer(f"{settings.project}-backend-")
        self._backoff = LaunchBackoff()
        self._balancer_backoff = LaunchBackoff()
        self._balancer_repaired_at = float("-inf")
        self._balancer_state = BalancerState.RUNNING
        self.path = PathCheck()
        self._panic: list[str] = []
        self._judged_since: float | None = None  # since when a balancer has reported without a gap
        self._failed_name = ""  # the backend that the backoff's newest reason is about
        self.desired = self.policy.min
        self._chance = random.Random()  # noqa: S311 - jitter

    # -- the loop -----------------------------------------------------------------------------------------------

    def adopt(self, wanted: int | None) -> None:
        """Takes over what runs; aims at `wanted` backends, or at as many as there are. Raises EngineError."""
        serving = _lines(self._ip_file)
        spec = self._engine.spec()
        refused = self._recall_refused(spec)
        if self._by_itself and refused:
            self._engine.refused = _digest(spec)
        containers = self._engine.list()
        with self._lock:
            now = self._clock()
            self._publish(fleets.observe({}, containers, now, now, serving))
            self._balancer_state = self._engine.balancer
            found = fleets.live(self._fleet)
            # Of what they are made that would be gone back to; an engine that keeps a number goes back by itself.
            others = [backend.spec for backend in found if backend.spec != spec and not self._by_itself]
            self._backoff = LaunchBackoff(spec, previous=others[0] if others else "")
            if refused:
                self._backoff.given_up, self._backoff.refused = refused, spec
                if others:
                    self._backoff.spec, self._backoff.previous = others[0], ""
            running = len(found) if self._engine.replicas is None else self._engine.replicas
            self.desired = wanted or running - self.settings.spares
            self._clamp()

    def run(self) -> None:
        for body in (self._watch_events, self._check_path_regularly):
            threading.Thread(target=body, daemon=True).start()
        while not self._stopping:
            try:
                self.step()
            except TakenOver as taken:
                log.error("%s", taken)
                self.close()
            except Exception:
                log.exception("this pass failed; trying again")
            pause = RELIST_AFTER_EVENT if self._hinted else RELIST
            self._hinted = False
            began = self._clock()
            self._wake.wait(pause)
            self._wake.clear()
            late = self._clock() - began - pause
            if late > SUSPENDED:
                self.resume(late)

    def resume(self, seconds: float) -> None:
        """This process was stopped for so long: what it has not seen meanwhile counts for and against nobody."""
        log.warning("this process was stopped for %.0f s; nothing that was not seen meanwhile counts", seconds)
        with self._lock:
            self._fleet = fleets.skip(self._fleet, seconds)

    def close(self) -> None:
        """Ends the loop and every long poll; the backends stay."""
        with self._lock:
            self._stopping = True
            self._notify()
        self._wake.set()

    def step(self) -> None:
        """One pass from the actual fleet towards the desired one."""
        with self._lock:
            self._take_in_results()
        listed_at = self._clock()
        try:
            containers = self._engine.list()
        except EngineError as error:
            self._note_engine(str(error))
            return
        self._note_engine("")
        with self._lock:
            now = self._clock()
            seen = fleets.observe(self._fleet, containers, listed_at, now)
            if self._engine.balancers is not None:
                self._load.keep(self._engine.balancers, listed_at)
                self.recorder.keep(self._engine.balancers)
            self._publish(self._judged(seen, now))
            if self._engine.refused and not self._backoff.given_up:
                self._backoff.given_up = "the engine went back by itself: its backends did not stay up"
                self._remember_refused(self._engine.refused)
            self._advance(now)
            self._keep_balancer(now)

    def _advance(self, now: float) -> None:
        """Begins every step of the plan; with the lock held."""
        if self.engine_trouble:
            return
        goal = Goal(self.desired, self.settings.spares, self._backoff.spec, self._engine.replicas)
        for backend in self._fleet.values():
            if backend.serves:
                self._backoff.mark_stable(backend.spec, backend.since, now)
        self._backoff.settle(fleets.is_complete(self._fleet, goal), now)
        for step in fleets.plan(self._fleet, goal, self._namer, self.settings.drain_timeout, now):
            self._begin(step, now)

    def _keep_balancer(self, now: float) -> None:
        """Has the balancer repaired where the engine's list shows that it does not run as it should."""
        state = self._engine.balancer
        being_repaired = BALANCER in self._workers.busy
        if state != self._balancer_state and (state is BalancerState.RUNNING or not being_repaired):
            level = logging.INFO if state is BalancerState.RUNNING else logging.WARNING
            log.log(level, "balancer: %s", state.value)
            self._balancer_state = state
        self._balancer_backoff.settle(state is BalancerState.RUNNING, now)
        if state is not BalancerState.RUNNING:
            self._repair_balancer(now)

    def _repair_balancer(self, now: float) -> None:
        if BALANCER in self._workers.busy or self._balancer_backoff.wait(now):
            return
        if now - self._balancer_repaired_at < STABLE:  # the last one did not stay up: that counts once
            self._balancer_repaired_at = float("-inf")
            self._balancer_backoff.failed("", "it did not stay up", now, self._chance.random())
            if self._balancer_backoff.wait(now):
                return
        self._balancer_repaired_at = now
        self._workers.repair_balancer()

    def _begin(self, step: Step, now: float) -> None:
        if isinstance(step, Drain):
            backend = self._fleet[step.name]
            self._set(backend.to(DRAINING, now, step.reason))
            if step.unhealthy:
                self._launch_failed(backend, step.reason, now, served=now - backend.since >= STABLE)
        elif isinstance(step, Admit):
            spare = self._fleet[step.name]
            self._set(spare.to(ACTIVE if spare.ready else STARTING, now))
        elif isinstance(step, Resize):
            self._workers.resize(step.count, self._backoff.spec)
        elif step.name in self._workers.busy or (isinstance(step, Launch) and self._backoff.wait(now)):
            return
        elif isinstance(step, Launch):
            spec = self._backoff.spec
            self._set(Backend(step.name, SPARE if step.spare else STARTING, now, spec=spec, launched=now))
            self._workers.launch(step.name, spec)
        else:
            backend = self._fleet[step.name]
            if backend.state not in (STOPPED, FAILED):
                self._set(backend.to(STOPPED, now, "drain timeout, and no balancer reported the end"))
            self._workers.stop(backend)

    def _take_in_results(self) -> None:
        now, after = self._clock(), dict(self._fleet)
        for result in self._workers.results():
            if result.name == BALANCER:
                self._balancer_repaired(result.why, now)
                continue
            if result.name_taken:
                self._namer.take(result.name)
            if result.last_log_line and result.name == self._failed_name:
                before = self._backoff.given_up
                self._backoff.explain(f"last log line: {result.last_log_line}")
                if self._backoff.given_up != before:
                    self._remember_refused(_digest(self._backoff.refused))
            backend = after.get(result.name)
            if backend is None or result.still_there:
                continue
            if result.container is not None:
                found = result.container
                after[result.name] = replace(backend, id=found.id, ip=found.ip, since=now, launched=now)
            else:
                del after[result.name]
                if not backend.id:  # its container was never created
                    self._launch_failed(backend, result.why, now)
        self._publish(after)

    def _balancer_repaired(self, problem: str, now: float) -> None:
        if problem:
            self._balancer_repaired_at = float("-inf")  # it never ran, which is counted here
            log.error("the balancer cannot be started: %s", problem)
            self._balancer_backoff.failed("", problem, now, self._chance.random())

    def _launch_failed(self, backend: Backend, why: str, now: float, served: bool = False) -> None:
        self.recorder.launch_failed()
        given_up_before = self._backoff.given_up
        self._backoff.failed(backend.spec, why, now, self._chance.random(), served)
        self._failed_name = backend.name
        if self._backoff.given_up and not given_up_before:
            log.error("update given up, going back: its backends failed: %s", why)
            self._remember_refused(_digest(self._backoff.refused))
        elif self._backoff.failures > 1:
            wait = self._backoff.wait(now)
            log.warning("%d backends failed in a row, next launch in %.1f s: %s", self._backoff.failures, wait, why)

    def _watch_events(self) -> None:
        """Events are hints that save waiting for the next list; while they are cut off, the list still comes."""
        while not self._stopping:
            try:
                for event in self._engine.events():
                    self._hint(event)
            except (EngineError, TakenOver):
                pass  # the loop's own list meets the same error and logs it
            except Exception:
                log.exception("an event could not be handled; the engine's list shows what happened")
            self._wake.set()
            time.sleep(PAUSE)

    def _hint(self, event: Event) -> None:
        with self._lock:
            now = self._clock()
            backend = next((b for b in self._fleet.values() if b.id == event.id), None)
            if backend is not None:
                if event.action == "die":
                    self._set(fleets.ended(backend, event.code, now))
                elif event.action == "kill" and event.code == SIGKILL:
                    self._set(replace(backend, external=True))  # `docker kill`, not the kernel for want of memory
                elif backend.state in (SPARE, STARTING, ACTIVE) and event.action == "pause":
                    self._set(replace(backend, external=True).to(FAILED, now, fleets.PAUSED))
                elif backend.state in (SPARE, STARTING, ACTIVE) and event.code == SIGTERM:
                    self._set(backend.to(DRAINING, now, "somebody else is stopping its container"))
        self._hinted = True
        self._wake.set()

    # -- what HTTP handlers call -------------------------------------------------------------------------------------

    def wait_for_snapshot(self, have: str, timeout: float) -> dict[str, Any] | None:
        """The view as soon as its revision is another than `have`; None after `timeout` seconds, at once with 0.

        Raises Closing as soon as the manager ends. Blocks the thread; who must not asks with 0, and again when notified
        (`subscribe`).
        """
        with self._lock:
            changed = self._lock.wait_for(lambda: self._revision != have or self._stopping, timeout)
            if self._stopping:
                raise Closing
            return {"revision": self._revision, **self._snapshot} if changed else None

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Has `callback` called when the view changes or the manager ends; from any thread, and it must not block."""
        self._subscribers.append(callback)

    def report(self, report: Report) -> Decision | None:
        """Takes a balancer's report in and decides; the decision before where it is too soon for one, None at first."""
        with self._lock:
            now = self._clock()
            for warning in set(report.warnings) - set(self._load.warnings(report.balancer)):
                log.warning("balancer %s: %s", report.balancer, warning)
            measured = self._load.add(report, now)
            self._note_panic()
            reported = {name: self._fleet[name] for ip in report.backends for name in self._at.get(ip, ())}
            self.recorder.reported(report, reported)
            judged = self._judged(reported, now)
            if judged != reported:
                self._publish({**self._fleet, **judged})
            last = self.decisions[-1] if self.decisions else None
            # One decision an interval, however many balancers report: the limits to growth are per decision.
            soon = last is not None and now - last.at < 0.75 * self.settings.interval
            load = self._load.load(self.settings.metric, now) if measured and not soon else None
            if load is None:
                return last
            decision, self._memory = scaler.decide(self.policy, self._memory, load, self.desired, now)
            self._tell(decision)
            if self.settings.record:
                self._record(now, load.rate)
            if not self.paused:
                self.desired = decision.desired
                self._advance(now)  # at once: a spare is in rotation before the next look at the engine's list
            self._chart(decision)
        return decision

    def stop(self, ip: str, reason: str, balancer: str = "") -> None:
        """A balancer reports that this draining backend is done. Raises Unknown; doing it twice is fine.

        It is stopped when every balancer that reports has said so (or one that gives no name has). One that does not
        drain is drained: no report of one balancer stops a backend that others may still send connections to.
        """
        with self._lock:
            backend = next((b for b in self._fleet.values() if b.ip == ip and b.running), None)
            if backend is None:
                raise Unknown(ip)
            if backend.state == DRAINING:
                done = backend.drained_by | {balancer}
                if balancer and not done >= self._load.balancers.keys():
                    self._fleet = {**self._fleet, backend.name: replace(backend, drained_by=done)}
                else:
                    self._set(backend.to(STOPPED, self._clock(), reason))
            elif backend.state not in (STOPPED, FAILED) and not self._by_itself:
                self._set(backend.to(DRAINING, self._clock(), reason))
        self._wake.set()

    def drain(self, ip: str) -> None:
        """Takes a backend out of rotation and replaces it. Raises Unknown, or ValueError where the engine picks."""
        with self._lock:
            backend = next((b for b in fleets.live(self._fleet) if b.ip == ip), None)
            if backend is None:
                raise Unknown(ip)
            if self._by_itself:
                raise ValueError("this engine picks the backends to stop by itself; drain a node of it instead")
            self._set(backend.to(DRAINING, self._clock(), "drained by hand"))
        self._wake.set()

    def scale(self, minimum: int | None, maximum: int | None, target: float | None) -> Policy:
        """Changes the policy's limits until run.sh sets others. Raises ValueError when they cross."""
        with self._lock:
            changes = {"min": minimum, "max": maximum, "target": target}
            policy = replace(self.policy, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
            if policy.min > policy.max:
                raise ValueError(f"min {policy.min} would be above max {policy.max}")
            self.policy = policy
            self._clamp()
            self._keep_orders()
            self._advance(self._clock())
        return policy

    def pause(self, paused: bool) -> None:
        """While paused, decisions are made and shown but not carried out."""
        with self._lock:
            self.paused = paused
            self._keep_orders()

    def history(self) -> list[dict[str, Any]]:
        """The last decisions, oldest first, with every number; `time` in seconds since 1970."""
        with self._lock:
            return [{**asdict(decision), "time": round(self._epoch + decision.at, 3)} for decision in self.decisions]

    def past(self, since: float) -> dict[str, Any]:
        """What charts are drawn from, as `History.since` tells it."""
        with self._lock:
            return self._history.since(since)

    def status(self) -> dict[str, Any]:
        with self._lock:
            now = self._clock()
            decision = self.decisions[-1] if self.decisions else None
            status = {
                "project": self.settings.project,
                "desired": self.desired,
                "current": len(fleets.live(self._fleet)),
                "metric": self.settings.metric,
                "rate": round(decision.rate, 3) if decision else None,
                "target": self.policy.target,
                "min": self.policy.min,
                "max": self.policy.max,
                "paused": self.paused,
                "revision": self._revision,
                "engine": self.engine_trouble or "ok",
                "launches": snapshots.launches(self._fleet, self._backoff, now),
                "balancer": self._balancer_status(),
                "rotation_panic": self._load.panic,
                "data_path": {
                    "working": self.path.working,
                    "problem": self.path.problem,
                    "findings": [asdict(finding) for finding in self._load.findings],
                },
                "backends": snapshots.backends(self._fleet, self._load),
                "balancers": snapshots.balancers(self._load, now),
                "last_decision": asdict(decision) if decision else None,
                "settings": snapshots.settings_in_force(self.settings, self.policy),
            }
            return snapshots.with_problems(status)

    @property
    def _by_itself(self) -> bool:
        """Whether the engine keeps a number of backends by itself: what it launches it also replaces."""
        return self._engine.replicas is not None

    # -- with the lock held --------------------------------------------------------------------------------------

    def _judged(self, fleet: Fleet, now: float) -> Fleet:
        """In the light of the balancers' reports. What the engine launched by itself is waited for, never given up."""
        if not self._load.reports(now):
            self._judged_since = None
        elif self._judged_since is None:
            self._judged_since = now
        since = None if self._by_itself else self._judged_since
        return fleets.apply_health(fleet, self._load.verdict, since, self.settings.ready_timeout, now)

    def _note_panic(self) -> None:
        """Logs once when balancers begin, and once when they cease, to keep unhealthy backends in rotation."""
        panic = self._load.panic
        if panic and not self._panic:
            log.warning("fewer than half of the backends are healthy: all stay in rotation (panic)")
        elif self._panic and not panic:
            log.info("at least half of the backends are healthy again: the others leave rotation")
        self._panic = panic

    def _balancer_status(self) -> dict[str, str]:
        """For /status: `running`; `starting` while it is being repaired; `failed` with the problem after a failure."""
        problem = self._balancer_backoff.why
        if self._balancer_state is BalancerState.RUNNING:
            return {"state": "running", "problem": ""}
        return {"state": "failed" if problem else "starting", "problem": problem}

    # -- the test of the data path ---------------------------------------------------------------------------------

    def _check_path_regularly(self) -> None:
        while not self._stopping:
            time.sleep(path_check.PERIOD)
            try:
                self.check_path()
            except Exception:
                log.exception("the test of the data path failed; trying again")

    def check_path(self) -> None:
        """One connection through each balancer, while there is a healthy backend to accept it."""
        with self._lock:
            healthy = any(backend.serves for backend in self._fleet.values())
        if not healthy or self._balancer_state is not BalancerState.RUNNING:
            return
        errors = self._engine.check_path()
        failed = {target: error for target, error in errors.items() if error}
        with self._lock:
            before = self.path.problem
            if failed:
                target, error = next(iter(failed.items()))
                self.path.failed(target, error, self._load.findings)
            elif errors:
                self.path.passed()
            if self.path.problem and not before:
                found = (self.path.target, self.path.error, self.path.found)
                log.error("connections through the balancer at %s fail: %s; found: %s", *found)
            elif before and not self.path.problem:
                log.info("connections through the balancer work again")
            kinds = {finding.kind for finding in self._load.findings}
            if self.path.problem and kinds & path_check.REPAIRABLE:
                self._repair_balancer(self._clock())

    def _notify(self) -> None:
        self._lock.notify_all()
        for callback in self._subscribers:
            callback()

    def _set(self, backend: Backend) -> None:
        self._publish({**self._fleet, backend.name: backend})

    def _publish(self, after: Fleet) -> None:
        """Makes `after` the fleet: tells every change of state, moves the revision, writes ip.txt, wakes long polls."""
        before, self._fleet, now = self._fleet, after, self._clock()
        changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if not changed and self._revision:
            return
        self._at = {}
        for backend in after.values():
            self._at.setdefault(backend.ip, []).append(backend.name)
        for name in sorted(changed, key=fleets.by_number):
            was, is_ = before.get(name), after.get(name)
            _log_change(was, is_, now)
            self.recorder.changed(was, is_, now)
            if was and is_ and was.state != FAILED == is_.state and not is_.external:
                served = was.state == ACTIVE and now - was.since >= STABLE
                self._launch_failed(is_, is_.reason, now, served)
        view = snapshots.for_balancers(after, self.settings, self._backend_subnet, self._check_source)
        if (revision := snapshots.revision(view)) != self._revision:
            self._revision, self._snapshot = revision, view
            self._notify()
            try:
                _write(self._ip_file, "".join(f"{b['ip']}\n" for b in view["backends"] if b["state"] == ACTIVE))
            except OSError as error:
                log.error("ip.txt cannot be written, so a balancer that starts now begins with old rules: %s", error)

    def _tell(self, decision: Decision) -> None:
        """One line for a decision that changes something, or holds for another reason than the one before it."""
        before = self.decisions[-1] if self.decisions else None
        news = decision.verdict != scaler.OK or before is None or _kinds(before) != _kinds(decision)
        paused = "; paused: not carried out" if self.paused and decision.verdict != scaler.OK else ""
        change = f"{decision.current}→{decision.desired}"
        log.log(
            logging.INFO if news else logging.DEBUG, "%s %s  %s%s", decision.verdict, change, decision.reason, paused
        )
        self.decisions.append(decision)
        self.recorder.decided(decision)

    def _chart(self, decision: Decision) -> None:
        """Keeps what this decision saw and, unless paused, what it changed."""
        at = self._epoch + decision.at
        serving = sum(backend.state == ACTIVE for backend in self._fleet.values())
        capacity = decision.current * self.policy.target
        self._history.add(Point(at, decision.rate, capacity, serving, self.desired))
        if not self.paused:
            self._history.note(decision, at)

    def _record(self, now: float, rate: float) -> None:
        """Adds to the trace that tests/bench/replay.py reads: seconds since 1970, load."""
        with suppress(OSError), self._ip_file.with_name("trace.csv").open("a") as trace:  # a full disk stops no scaling
            trace.write(f"{self._epoch + now:.1f},{rate:.3f}\n")

    def _keep_orders(self) -> None:
        """The operator's orders outlive a crash of the manager."""
        p = self.policy
        orders = {"min": p.min, "max": p.max, "target": p.target, "paused": self.paused}
        try:
            _write(self._orders_file, json.dumps(orders))
        except OSError as error:
            log.error("the operator's settings cannot be saved, so they end with this manager: %s", error)

    def _recall_orders(self) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError):  # none, or none that can be read: the settings stand
            orders = json.loads(self._orders_file.read_text())
            limits = {name: orders[name] for name in ("min", "max", "target")}
            self.policy, self.paused = replace(self.policy, **limits), bool(orders["paused"])

    def _remember_refused(self, digest: str) -> None:
        """Keeps which update was given up, so that a restarted manager does not try it again."""
        refused = {"spec": digest, "why": self._backoff.given_up}
        try:
            _write(self._refused_file, json.dumps(refused))
        except OSError as error:
            log.error("a restarted manager would try the refused update again: %s", error)

    def _recall_refused(self, spec: str) -> str:
        """Why the update to `spec` was given up by a manager before this one; empty where it was not."""
        with suppress(OSError, ValueError, KeyError, TypeError):  # no file, or none that can be read
            refused = json.loads(self._refused_file.read_text())
            if refused["spec"] == _digest(spec):
                return str(refused["why"])
        return ""

    def _clamp(self) -> None:
        self.desired = max(self.policy.min, min(self.policy.max, self.desired))

    def _note_engine(self, trouble: str) -> None:
        if trouble and not self.engine_trouble:
            log.error("engine unreachable, the fleet stays as it is: %s", trouble)
        elif self.engine_trouble and not trouble:
            log.info("engine reachable again")
        self.engine_trouble = trouble


def _kinds(decision: Decision) -> tuple[str, ...]:
    """The verdict and which limits applied, without the numbers."""
    return (decision.verdict, *(clamp.kind for clamp in decision.clamps))


def _log_change(before: Backend | None, after: Backend | None, now: float) -> None:
    if before is not None and after is None:
        log.info("backend %s %s removed", before.name, before.ip or "-")
    elif after is not None and (before is None or before.state != after.state):
        came = f"{before.state}→{after.state} after {now - before.since:.1f} s" if before else after.state
        why = f": {after.reason}" if after.reason else ""
        level = logging.WARNING if after.state == FAILED else logging.INFO
        log.log(level, "backend %s %s %s%s", after.name, after.ip or "-", came, why)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(path: Path) -> set[str]:
    """The lines of a file; none where it is not there."""
    with suppress(OSError):
        return set(path.read_text().split())
    return set()


def _write(path: Path, text: str) -> None:
    """Replaces the file in one step: whoever reads it sees the old text or the new one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)
