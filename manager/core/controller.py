"""The manager's loop, and the methods that the HTTP handlers call. These never wait for the engine.

`step` is one pass of the loop: take the workers' results, list the containers, plan, and give slow work to the workers.
A list begins after the results were taken; an older list could bring a removed container back. The lock is never held
during a call of the engine, only while planning and while writing a small file. A decision is carried out immediately
after the report that caused it, without waiting for the next list.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mode
from typing import Any, Protocol

from core import event_log, fleet, path_check, plan, scaler, snapshot
from core.balancer_keeper import BalancerKeeper
from core.engine import Engine, EngineError, Event, TakenOver
from core.fleet import ACTIVE, DRAINING, FAILED, SPARE, STARTING, STOPPED, Backend, Fleet
from core.history import History, Point, Shares
from core.launch_backoff import STABLE, LaunchBackoff
from core.load import LoadTracker, Report
from core.publisher import Publisher
from core.reasons import Cause, Reason
from core.scaler import Decision, Memory, Policy
from core.settings import Settings
from core.state_files import SavedFleet, StateFiles, digest
from core.what_if import Recorded, Recording, WhatIf, replay
from core.workers import BALANCER, PAUSE, Result, Workers

RELIST = 2.0  # seconds between two lists of the engine's containers without an event
# Docker's list shows a container as running for about 0.1 s after the event of its end, so an event causes two lists.
RELIST_AFTER_EVENT = 0.25
MAX_LATENESS = 2.0  # seconds by which a wait may end late; more means that the process was stopped
MIN_DECISION_GAP = 0.75  # intervals

log = logging.getLogger("manager")


class Recorder(Protocol):
    """Is called for everything that the metrics count."""

    def changed(self, before: Backend | None, after: Backend | None, now: float) -> None: ...
    def reported(self, report: Report, last: Report | None, fleet: Fleet) -> None: ...
    def decided(self, decision: Decision) -> None: ...
    def failed(self) -> None: ...


class UnknownBackend(LookupError):
    """No backend of the project has this address."""


def _policy(settings: Settings) -> Policy:
    return Policy(
        min=settings.min,
        max=settings.max,
        target=settings.target,
        metric=settings.metric,
        stable_window=settings.stable_window,
        panic_window=settings.panic_window,
    )


class Controller:
    """Times are those of `clock`, in seconds; `chance` returns a number from 0 to 1."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        ip_file: Path,
        recorder: Recorder,
        clock: Callable[[], float] = time.monotonic,
        *,
        check_source: str = "",
        chance: Callable[[], float] = random.random,
    ) -> None:
        # What the HTTP handlers read.
        self.settings, self.recorder = settings, recorder
        self.decisions: deque[Decision] = deque(maxlen=1000)
        self.engine_trouble = ""
        self.taken_over = False  # by another manager
        self._files = StateFiles(ip_file)
        self._saved = SavedFleet()
        policy = _policy(settings)
        self.policy, self.paused = self._files.read_operator_settings(policy)
        self.desired = self.policy.min

        # The state of the fleet and of its load; read and changed with the lock held.
        self._lock = threading.Condition()
        self._fleet: Fleet = {}
        self._names_at: dict[str, list[str]] = {}  # address → names of the backends that have or had it
        self._load = LoadTracker()
        self._rotation_panic = False  # a balancer keeps unhealthy backends in rotation
        self._reports_since: float | None = None  # since when a balancer has reported without a gap
        self._memory = Memory(started=clock())
        self._history = History()
        self._recording = Recording(self._memory)
        self._backoff = LaunchBackoff()
        self._failed_name = ""  # the backend of the newest failure

        # The parts that do the work, and the loop's signals.
        self._engine, self._clock, self._chance = engine, clock, chance
        self._epoch = time.time() - clock()  # seconds since 1970 at the clock's zero; only for dates
        self._wake = threading.Event()
        self._hinted = False  # an event has come since the last list began
        self._lists_soon = False  # the next list comes within RELIST_AFTER_EVENT
        self._workers = Workers(engine, done=self._wake.set)
        self._namer = plan.Namer(f"{settings.project}-backend-")
        self._publisher = Publisher(settings, self._files, self._lock, check_source)
        self._balancer = BalancerKeeper(self._workers, chance, on_host=settings.datapath == "host")
        self.path = self._balancer.path

    # -- the loop -----------------------------------------------------------------------------------------------------

    def adopt(self, wanted: int | None) -> None:
        """Adopts the running backends. The desired number is the first known one of: `wanted`, the number that a Swarm
        keeps, the number that the manager before this one has saved, the number that run without the spares.

        Raises EngineError.
        """
        saved = self._files.read_fleet()
        spec = self._engine.spec()
        refusal = self._files.read_refusal(spec)
        # An engine that keeps a number carries updates out, so it has to know which one not to try again.
        if refusal and self._engine_keeps_number:
            self._engine.refused = digest(spec)
        containers = self._engine.list()
        with self._lock:
            now = self._clock()
            adopted = fleet.observe({}, containers, now, now, saved.states)
            found = fleet.capacity_of(adopted)
            # Without a saved number, running spares are not known as such.
            number_before = self._engine.replicas or saved.desired or len(found) - self.settings.spares
            self.desired = wanted or number_before
            self._apply_limits()
            if wanted and self.desired != wanted:
                event_log.number_limited(wanted, self.policy)
            self._backoff = self._adopted_backoff(spec, refusal, adopted, saved)
            self._balancer.state = self._engine.balancer
            self._backoff.delays_launches = not self._engine_keeps_number
            self._set_fleet(adopted)

    def _adopted_backoff(self, spec: str, refusal: Reason, adopted: Fleet, saved: SavedFleet) -> LaunchBackoff:
        """Launches use `spec`. If that fails, they return to the spec that most of the adopted backends have; an engine
        that keeps a number of backends goes back to the previous spec on its own. A `spec` that was refused before is
        not tried again."""
        # Ended backends count, too: after a reboot of the host there are no others.
        older = [b for b in adopted.values() if b.spec != spec and not self._engine_keeps_number]
        # Those that were not in rotation may be made from the spec of an update that never worked.
        proven = [backend for backend in older if saved.states.get(backend.id) == ACTIVE]
        previous = mode(backend.spec for backend in proven or older) if older else ""
        if refusal:
            return LaunchBackoff(previous or spec, refused=spec, refusal=refusal)
        return LaunchBackoff(spec, previous)

    def run(self) -> None:
        """The loop; returns after `close`."""
        for body in (self._watch_events, self._test_path_regularly):
            threading.Thread(target=body, daemon=True).start()
        while not self._publisher.closing:
            # An event that comes from here on causes another list.
            self._lists_soon, self._hinted = self._hinted, False
            try:
                self.step()
            # An error of one pass must not end the manager: the next pass starts from a new list.
            except TakenOver as taken:
                log.error("%s", taken)
                self.taken_over = True
                self.close()
            except Exception:
                log.exception("this pass failed; trying again")
            pause = RELIST_AFTER_EVENT if self._lists_soon else RELIST
            began = self._clock()
            self._wake.wait(pause)
            self._wake.clear()
            late = self._clock() - began - pause
            if late > MAX_LATENESS:
                self.extend_deadlines(late)

    def extend_deadlines(self, seconds: float) -> None:
        """Moves the deadlines of all backends by the time for which this process was stopped."""
        log.warning("this process was stopped for %.0f s; deadlines of backends are extended by that", seconds)
        with self._lock:
            self._fleet = fleet.extend_deadlines(self._fleet, seconds, self._clock())

    def close(self) -> None:
        """Ends the loop and every long poll. The backends continue to run."""
        with self._lock:
            self._publisher.close()
        self._wake.set()

    def step(self) -> None:
        """One pass from the actual fleet towards the desired one."""
        with self._lock:
            self._take_results()
        listed_at = self._clock()
        try:
            containers = self._engine.list()
        except EngineError as error:
            self._note_engine(str(error))
            return
        self._note_engine("")
        with self._lock:
            now = self._clock()
            if self._engine.balancers is not None:
                self._load.keep(self._engine.balancers, listed_at)
            self._set_fleet(self._with_health(fleet.observe(self._fleet, containers, listed_at, now), now))
            # The engine has given an update up. This is stored, so that the next manager does not try it again.
            if self._engine.refused and not self._backoff.refusal:
                self._backoff.refusal = Reason(Cause.ENGINE_GAVE_UP)
                self._files.write_refusal(self._engine.refused, self._backoff.refusal)
            self._advance(now)
            self._balancer.keep(self._engine.balancer, now)

    def _note_engine(self, trouble: str) -> None:
        if bool(trouble) != bool(self.engine_trouble):
            event_log.engine(trouble)
        self.engine_trouble = trouble

    def _watch_events(self) -> None:
        """Makes the loop list the containers after an event. Without events, it lists them every RELIST seconds."""
        while not self._publisher.closing:
            try:
                for event in self._engine.events():
                    self._take_event(event)
            except (EngineError, TakenOver):
                pass  # the loop's next list raises the same error, and logs it
            except Exception:
                log.exception("handling an event failed; the next list of containers has its result")
            self._wake.set()
            time.sleep(PAUSE)

    def _take_event(self, event: Event) -> None:
        with self._lock:
            backend = next((b for b in self._fleet.values() if b.id == event.id), None)
            if backend is not None:
                self._set(fleet.after_event(backend, event.action, event.code, self._clock()))
        self._hinted = True
        # Most events may be those of foreign containers, which must not cause one list each.
        if backend is not None or not self._lists_soon:
            self._wake.set()

    def _test_path_regularly(self) -> None:
        while not self._publisher.closing:
            time.sleep(path_check.PERIOD)
            try:
                self.check_path()
            except Exception:
                log.exception("the test of the data path failed; trying again")

    def check_path(self) -> None:
        """Opens one connection through each balancer, if there is a healthy backend that can accept it."""
        with self._lock:
            healthy = any(backend.serves for backend in self._fleet.values())
        if healthy and self._balancer.running:
            errors = self._engine.check_path()
            with self._lock:
                self._balancer.path_tested(errors, self._load.findings, self._clock())

    # -- what HTTP handlers call --------------------------------------------------------------------------------------

    def wait_for_snapshot(self, have: str, timeout: float) -> dict[str, Any] | None:
        """The snapshot as soon as its revision is not `have`; None after `timeout` seconds.

        Raises Closing when the manager ends. Blocks the thread. A caller that must not block uses a timeout of 0, and
        calls again after each notification (`subscribe`).
        """
        return self._publisher.wait(have, timeout)

    def subscribe(self, callback: Callable[[], None]) -> None:
        """From now on, calls `callback` when the snapshot changes or the manager ends. This may be on any thread, with
        the lock held, so the callback must not block."""
        self._publisher.subscribe(callback)

    def report(self, report: Report) -> Decision | None:
        """Takes a balancer's report and decides how many backends to have. Returns the new decision; or the last one
        (None if there is none) if it is too soon or no rate can be measured."""
        with self._lock:
            now = self._clock()
            # Reports repeat a warning for as long as its cause lasts; it is logged once.
            last_report = self._load.newest_of(report.balancer)
            for warning in set(report.warnings) - set(last_report.warnings if last_report else ()):
                log.warning("balancer %s: %s", report.balancer, warning)
            measured = self._load.add(report, now)
            self._note_rotation_panic()
            self._note_health(report, last_report, now)

            # One decision in each interval, however many balancers report, because each decision may grow by one step.
            last = self.decisions[-1] if self.decisions else None
            too_soon = last is not None and now - last.at < MIN_DECISION_GAP * self.settings.interval
            load = self._load.load(self.settings.metric, now) if measured and not too_soon else None
            return self._decide(load, now) if load is not None else last

    def stop(self, ip: str, reason: str, short_id: str = "") -> None:
        """A balancer reports that the drain of this backend is over, so it is stopped. Raises UnknownBackend, also if
        another backend with another id has the address now.

        A backend that is not draining yet is drained first, because the balancer may still send connections to it; but
        a Swarm chooses what to stop itself. Idempotent.
        """
        with self._lock:
            backend = fleet.with_address(self._fleet, ip)
            if backend is None or short_id not in ("", backend.short_id):
                raise UnknownBackend(ip)
            if backend.state in (STOPPED, FAILED):
                return
            reported = Reason(Cause.BALANCER_REPORT, detail=reason)
            if backend.state == DRAINING:
                self._set(backend.to(STOPPED, self._clock(), reported))
            elif not self._engine_keeps_number:
                self._set(backend.to(DRAINING, self._clock(), reported))
        self._wake.set()

    def drain(self, ip: str) -> None:
        """Drains and replaces a starting or active backend. Raises UnknownBackend, or ValueError if the backend is in
        another state or the engine chooses which to stop."""
        with self._lock:
            backend = fleet.with_address(self._fleet, ip)
            if backend is None:
                raise UnknownBackend(ip)
            if backend.state not in (STARTING, ACTIVE):
                raise ValueError(f"{ip} is {backend.state}; only starting and active backends can be drained")
            if self._engine_keeps_number:
                raise ValueError("this engine chooses the backends to stop; drain one of its nodes instead")
            self._set(backend.to(DRAINING, self._clock(), Reason(Cause.OPERATOR)))
        self._wake.set()

    def scale(self, minimum: int | None, maximum: int | None, target: float | None) -> Policy:
        """Changes the limits; None keeps one. They hold until run.sh is run with other settings.

        Raises ValueError if min would be above max.
        """
        with self._lock:
            old = self.policy
            new = replace(old, min=minimum or old.min, max=maximum or old.max, target=target or old.target)
            if new.min > new.max:
                raise ValueError(f"min {new.min} would be above max {new.max}")
            self.policy = new
            self._apply_limits()
            self._files.write_operator_settings(self.policy, self.paused)
            self._advance(self._clock())
        return new

    def pause(self, paused: bool) -> None:
        """While paused, decisions are made and recorded but not carried out."""
        with self._lock:
            self.paused = paused
            self._files.write_operator_settings(self.policy, paused)

    def past_decisions(self) -> list[dict[str, Any]]:
        """The last decisions with all their numbers, oldest first; `time` in seconds since 1970."""
        with self._lock:
            return [{**asdict(decision), "time": round(self._epoch + decision.at, 3)} for decision in self.decisions]

    def history(self, since: float) -> dict[str, Any]:
        """The data of the charts after `since`, seconds since 1970: see History.since."""
        with self._lock:
            return self._history.since(since)

    def shares(self, name: str) -> Shares:
        """The shares of the backend with that name over the last half hour; none for an unknown one."""
        with self._lock:
            backend = self._fleet.get(name)
            return self._history.shares_of(backend.id if backend else "")

    def what_if(self, policy: Policy) -> WhatIf:
        """The fleet of the last hour as it was, and as this policy would have made it."""
        with self._lock:
            recording = self._recording.copy()
        return replay(recording, policy, self._epoch)

    def status(self) -> dict[str, Any]:
        """The body of GET /status."""
        with self._lock:
            now = self._clock()
            decision = self.decisions[-1] if self.decisions else None
            status = {
                "project": self.settings.project,
                "desired": self.desired,
                "current": len(fleet.capacity_of(self._fleet)),
                "metric": self.settings.metric,
                "rate": round(decision.rate, 3) if decision else None,
                "target": self.policy.target,
                "min": self.policy.min,
                "max": self.policy.max,
                "paused": self.paused,
                "revision": self._publisher.revision,
                "engine": self.engine_trouble or "ok",
                "launches": snapshot.launches(self._fleet, self._backoff, now),
                "balancer": self._balancer.status(),
                "rotation_panic": self._load.panic,
                "data_path": {
                    "working": self.path.working,
                    "problem": self.path.problem,
                    "findings": [asdict(finding) for finding in self._load.findings],
                },
                "backends": snapshot.backends(self._fleet, self._load, self._epoch),
                "balancers": snapshot.balancers(self._load, now),
                "last_decision": asdict(decision) if decision else None,
                "settings": snapshot.settings_in_force(self.settings, self.policy),
            }
        return snapshot.with_problems(status)

    # -- with the lock held: decisions --------------------------------------------------------------------------------

    @property
    def _engine_keeps_number(self) -> bool:
        """Whether the engine itself replaces backends and chooses which to stop."""
        return self._engine.replicas is not None

    def _apply_limits(self) -> None:
        self.desired = max(self.policy.min, min(self.policy.max, self.desired))

    def _with_health(self, backends: Fleet, now: float) -> Fleet:
        """These backends with the health in the balancers' reports. A backend that the engine itself launches has no
        deadline to become ready, because the manager could not replace it."""
        if not self._load.reports(now):
            self._reports_since = None
        elif self._reports_since is None:
            self._reports_since = now
        since = None if self._engine_keeps_number else self._reports_since
        return fleet.apply_health(backends, self._load.verdict, since, self.settings.ready_timeout, now)

    def _note_health(self, report: Report, last_report: Report | None, now: float) -> None:
        """Applies a report's health to the backends that it may change. `step` applies the health of all backends.

        The verdict on an unhealthy backend scans all balancers, which is too slow for each row of each report: 100
        balancers with 600 unhealthy backends would keep more than one processor busy.
        """
        names = [name for ip in report.backends for name in self._names_at.get(ip, ())]
        reported = {name: self._fleet[name] for name in names}
        self.recorder.reported(report, last_report, reported)
        changed: dict[str, Backend] = {}
        for name, backend in reported.items():
            healthy = report.backends[backend.ip].healthy
            if healthy is not backend.healthy:
                changed[name] = backend
        after = self._with_health(changed, now)
        if after != changed:
            self._set_fleet({**self._fleet, **after})

    def _note_rotation_panic(self) -> None:
        panic = bool(self._load.panic)
        if panic != self._rotation_panic:
            event_log.rotation_panic(panic)
        self._rotation_panic = panic

    def _decide(self, load: scaler.Load, now: float) -> Decision:
        before = self.decisions[-1] if self.decisions else None
        decision, self._memory = scaler.decide(self.policy, self._memory, load, self.desired, now)
        event_log.decided(decision, before, self.paused)
        self.decisions.append(decision)
        self.recorder.decided(decision)
        if self.settings.record:
            self._files.append_to_trace(self._epoch + now, load.rate)
        if not self.paused:
            self.desired = decision.desired
            self._advance(now)
        self._recording.add(Recorded(now, self.policy, load, decision.current, self.desired))

        # The charts get the numbers that the decision was based on and, unless paused, its change.
        at = self._epoch + now
        serving = sum(backend.state == ACTIVE for backend in self._fleet.values())
        self._history.add(Point(at, decision.rate, decision.current * self.policy.target, serving, self.desired))
        if not self.paused:
            self._history.note(decision, at)
        if self._history.needs_shares(at):
            shares = {backend.id: self._load.share(backend) for backend in self._fleet.values() if backend.id}
            self._history.add_shares(shares, at)
        return decision

    # -- with the lock held: the plan and its results -----------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Begins every step of the plan."""
        self._save_fleet()
        # While the engine is unreachable, the states here are outdated and no step can be carried out.
        if self.engine_trouble:
            return
        engine, spec = self._engine, self._backoff.spec
        goal = plan.Goal(self.desired, self.settings.spares, spec, engine.replicas, engine.made_from)
        for backend in self._fleet.values():
            if backend.serves:
                self._backoff.mark_stable(backend.spec, backend.since, now)
        self._backoff.settle(plan.is_complete(self._fleet, goal), now)
        for step in plan.plan(self._fleet, goal, self._namer, self.settings.drain_timeout, now):
            self._begin(step, now)

    def _begin(self, step: plan.Step, now: float) -> None:
        match step:
            case plan.Drain(name, reason):
                backend = self._fleet[name]
                self._set(backend.to(DRAINING, now, reason))
                if reason.cause is Cause.UNHEALTHY:
                    self._count_failure(backend, reason, now, served=True)
            case plan.Admit(name):
                spare = self._fleet[name]
                self._set(spare.to(ACTIVE if spare.ready else STARTING, now))
            case plan.Resize(count):
                self._workers.resize(count, self._backoff.spec)
            case plan.Launch(name, spare):
                # A step that cannot begin now is part of the next plan.
                if name not in self._workers.busy and not self._backoff.wait(now):
                    spec, state = self._backoff.spec, SPARE if spare else STARTING
                    self._set(Backend(name, state, now, spec=spec, launched=now))
                    self._workers.launch(name, spec)
            case plan.Stop(name):
                if name not in self._workers.busy:
                    backend = self._fleet[name]
                    if backend.state == DRAINING:  # for too long, see plan.plan
                        self._set(backend.to(STOPPED, now, Reason(Cause.DRAIN_TIMEOUT)))
                    self._workers.stop(backend)

    def _take_results(self) -> None:
        now, after = self._clock(), dict(self._fleet)
        for result in self._workers.results():
            if result.name == BALANCER:
                self._balancer.repaired(result.why, now)
            else:
                self._take_result(result, after, now)
        self._set_fleet(after)

    def _take_result(self, result: Result, after: dict[str, Backend], now: float) -> None:
        """Applies the result of a launch or a stop to the fleet `after`."""
        if result.name_taken:
            self._namer.mark_taken(result.name)
        if result.last_log_line and result.name == self._failed_name:
            self._explain_failure(result.last_log_line)
        backend = after.get(result.name)
        # A container that is still there keeps its state, so the next plan stops it again.
        if backend is None or result.still_there:
            return
        if result.container is not None:
            found = result.container
            after[result.name] = replace(backend, id=found.id, ip=found.ip, since=now, launched=now)
            return
        launch_failed = bool(result.why)
        # The next plan uses another name, so a name that is taken is no failure.
        if launch_failed and not result.name_taken:
            self._count_failure(backend, Reason(Cause.LAUNCH_ERROR, detail=result.why), now)
        # If a list has shown a container, the next one shows whether it is still there. It may be that of another
        # backend, which was renamed to this name.
        if not (launch_failed and backend.id):
            del after[result.name]

    def _count_failure(self, backend: Backend, reason: Reason, now: float, served: bool = False) -> None:
        """Counts the failure of a launch or of a backend, which may delay the next launch or end an update."""
        self.recorder.failed()
        failures_before, refused_before = self._backoff.failures, self._backoff.refused
        self._backoff.failed(backend.spec, reason, now, self._chance(), served)
        self._failed_name = backend.name
        given_up = self._backoff.refused != refused_before
        event_log.failed(self._backoff, failures_before, given_up, now)
        if given_up:
            self._files.write_refusal(digest(self._backoff.refused), self._backoff.refusal)

    def _explain_failure(self, last_log_line: str) -> None:
        self._failed_name = ""  # another backend may get the name
        refusal_before = self._backoff.refusal
        self._backoff.explain(last_log_line)
        if self._backoff.refusal != refusal_before:
            self._files.write_refusal(digest(self._backoff.refused), self._backoff.refusal)

    def _set(self, backend: Backend) -> None:
        self._set_fleet({**self._fleet, backend.name: backend})

    def _set_fleet(self, after: Fleet) -> None:
        """Replaces the fleet by `after`: logs and counts the changes, counts failures, publishes the snapshot."""
        before, self._fleet, now = self._fleet, after, self._clock()
        changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if not changed and self._publisher.revision:
            return
        self._names_at = {}
        for backend in after.values():
            self._names_at.setdefault(backend.ip, []).append(backend.name)
        for name in sorted(changed, key=fleet.by_number):
            old, new = before.get(name), after.get(name)
            event_log.backend_changed(old, new, now)
            self.recorder.changed(old, new, now)
            if old is None or new is None:
                continue
            has_failed = new.state == FAILED and old.state != FAILED
            # What another program does to a container is no failure of the backend.
            if has_failed and not new.external:
                served = old.state == ACTIVE and now - old.since >= STABLE
                self._count_failure(new, new.reason, now, served)
        self._publisher.publish(after)
        self._save_fleet()

    def _save_fleet(self) -> None:
        """Saves the fleet for the next manager, if it differs from what was saved last."""
        states = {backend.id: backend.state for backend in self._fleet.values() if backend.id}
        fleet_now = SavedFleet(self.desired, states)
        if fleet_now != self._saved and self._files.write_fleet(fleet_now):
            self._saved = fleet_now
