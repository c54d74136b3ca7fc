"""The one loop that carries plans out, and the state that HTTP handlers read and nudge but never wait for Docker on.

`step` is the loop's body: take in what the workers finished, list the containers, let the pure modules decide, hand
the slow work to workers. A list always begins after the last result was taken in, so an old list can never bring a
removed container back. Everything else takes the lock for as long as a plan and a small file take; a report's decision
orders its work at once (`_advance`), without waiting for the next list.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fleet as fleets
import scaler
import show
from engine import Engine, EngineError, Event, TakenOver
from fleet import (
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
from history import History, Point
from meter import Meter, Report
from metrics import Tally
from patience import STEADY, Patience
from scaler import Decision, Memory, Policy
from settings import Settings
from workers import PAUSE, Workers

RELIST = 2.0  # seconds between looks at the engine's list when no event asks for one

log = logging.getLogger("manager")


Clock = Callable[[], float]


class Unknown(LookupError):
    """No backend of ours has this address."""


class Closing(Exception):
    """The manager ends: whoever waits for a change has to ask the next one."""


class Controller:
    def __init__(
        self, engine: Engine, settings: Settings, ip_file: Path, clock: Clock = time.monotonic, inside: str = ""
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
        self._engine, self._ip_file, self._clock, self._inside = engine, ip_file, clock, inside
        self._orders_file = ip_file.with_name("orders.json")
        self._recall_orders()
        self._fleet: Fleet = {}
        self._at: dict[str, list[str]] = {}  # address → names of the backends that have, or had, it
        self.tally = Tally()
        self._meter = Meter()
        self._memory = Memory(started=clock())
        self._lock = threading.Condition()
        self._subscribers: list[Callable[[], None]] = []
        self._revision, self._view = "", show.view({}, settings, inside)
        self._wake = threading.Event()
        self._stopping = False
        self._workers = Workers(engine, done=self._wake.set)
        self._namer = fleets.Namer(f"{settings.project}-backend-")
        self._patience = Patience()
        self.desired = self.policy.min
        self._chance = random.Random()  # noqa: S311 - jitter

    # -- the loop -----------------------------------------------------------------------------------------------

    def adopt(self, wanted: int | None) -> None:
        """Takes over what runs; aims at `wanted` backends, or at as many as there are. Raises EngineError."""
        spec, containers = self._engine.spec(), self._engine.list()
        with self._lock:
            self._publish(fleets.observe({}, containers, self._clock(), self._clock()))
            found = fleets.live(self._fleet)
            # Of what they are made that would be gone back to; an engine that keeps a number goes back by itself.
            others = [backend.spec for backend in found if backend.spec != spec and not self._by_itself]
            self._patience = Patience(spec, previous=others[0] if others else "")
            running = len(found) if self._engine.replicas is None else self._engine.replicas
            self.desired = wanted or running - self.settings.spares
            self._clamp()

    def run(self) -> None:
        threading.Thread(target=self._watch_events, name="events", daemon=True).start()
        while not self._stopping:
            try:
                self.step()
            except TakenOver as taken:
                log.error("%s", taken)
                self.close()
            except Exception:
                log.exception("this pass failed; trying again")
            self._wake.wait(RELIST)
            self._wake.clear()

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
            seen = fleets.observe(self._fleet, containers, listed_at, now, STARTING if self._by_itself else ACTIVE)
            self._meter.forget_gone(now)
            self._publish(self._heard(seen, now))
            self._advance(now)

    def _advance(self, now: float) -> None:
        """Begins every step of the plan; with the lock held."""
        if self.engine_trouble:
            return
        for backend in self._fleet.values():
            if backend.state == ACTIVE and backend.ready:
                self._patience.lives(backend.spec, backend.since, now)
        goal = Goal(self.desired, self.settings.spares, self._patience.spec, self._engine.replicas)
        for step in fleets.plan(self._fleet, goal, self._namer, self.settings.drain_timeout, now):
            self._begin(step, now)

    def _begin(self, step: Step, now: float) -> None:
        if isinstance(step, Drain):
            self._set(self._fleet[step.name].to(DRAINING, now, step.reason))
        elif isinstance(step, Admit):
            spare = self._fleet[step.name]
            self._set(spare.to(ACTIVE if spare.ready else STARTING, now))
        elif isinstance(step, Resize):
            self._workers.resize(step.count, self._patience.spec)
        elif step.name in self._workers.busy or (isinstance(step, Launch) and self._patience.wait(now)):
            return
        elif isinstance(step, Launch):
            spec = self._patience.spec
            self._set(Backend(step.name, SPARE if step.spare else STARTING, now, spec=spec, launched=now))
            self._workers.launch(step.name, spec)
        else:
            backend = self._fleet[step.name]
            if backend.state not in (STOPPED, FAILED):
                self._set(backend.to(STOPPED, now, "drain timeout, and no balancer's word"))
            self._workers.stop(backend)

    def _take_in_results(self) -> None:
        now, after = self._clock(), dict(self._fleet)
        for result in self._workers.results():
            if result.name_taken:
                self._namer.taken.add(result.name)
            backend = after.get(result.name)
            if backend is None or result.still_there:
                continue
            if result.container is not None:
                found = result.container
                after[result.name] = replace(backend, id=found.id, ip=found.ip, since=now, launched=now)
            else:
                del after[result.name]
                if not backend.id:  # it never came to be
                    self._disappointed(backend, result.why, now)
        self._publish(after)

    def _disappointed(self, backend: Backend, why: str, now: float) -> None:
        self.tally.launch_failed()
        before = self._patience.given_up
        self._patience.failed(backend.spec, why, now, self._chance.random())
        if self._patience.given_up and not before:
            log.error("update given up, going back: its backends never got ready: %s", why)
        elif self._patience.failures > 1:
            log.warning(
                "%d launches in vain, next in %.1f s: %s", self._patience.failures, self._patience.wait(now), why
            )

    def _watch_events(self) -> None:
        """Events are hints that save waiting for the next list; while they are cut off, the list still comes."""
        while not self._stopping:
            try:
                for event in self._engine.events():
                    self._hint(event)
            except (EngineError, TakenOver):
                pass  # the loop's own list meets the same and tells it
            self._wake.set()
            time.sleep(PAUSE)

    def _hint(self, event: Event) -> None:
        with self._lock:
            now = self._clock()
            backend = next((b for b in self._fleet.values() if b.id == event.id), None)
            if backend is not None:
                if event.action == "die":
                    self._set(fleets.ended(backend, event.code, now))
                elif backend.state in (SPARE, STARTING, ACTIVE) and event.action == "pause":
                    self._set(backend.to(FAILED, now, fleets.PAUSED))
                elif backend.state in (SPARE, STARTING, ACTIVE) and event.code == 15:
                    self._set(backend.to(DRAINING, now, "somebody else is stopping its container"))
        self._wake.set()

    # -- what HTTP handlers call -------------------------------------------------------------------------------------

    def wait_for_view(self, have: str, timeout: float) -> dict[str, Any] | None:
        """The view as soon as its revision is another than `have`; None after `timeout` seconds, at once with 0.

        Raises Closing as soon as the manager ends. Blocks the thread; who must not asks with 0, and again when notified
        (`subscribe`).
        """
        with self._lock:
            changed = self._lock.wait_for(lambda: self._revision != have or self._stopping, timeout)
            if self._stopping:
                raise Closing
            return {"revision": self._revision, **self._view} if changed else None

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Has `callback` called when the view changes or the manager ends; from any thread, and it must not block."""
        self._subscribers.append(callback)

    def report(self, report: Report) -> Decision | None:
        """Takes a balancer's report in and decides; the decision before where it is too soon for one, None at first."""
        with self._lock:
            now = self._clock()
            for warning in set(report.warnings) - set(self._meter.warnings(report.balancer)):
                log.warning("balancer %s: %s", report.balancer, warning)
            measured = self._meter.add(report, now)
            spoken_of = {name: self._fleet[name] for ip in report.backends for name in self._at.get(ip, ())}
            self.tally.reported(report, spoken_of)
            heard = self._heard(spoken_of, now)
            if heard != spoken_of:
                self._publish({**self._fleet, **heard})
            last = self.decisions[-1] if self.decisions else None
            # One decision an interval, however many balancers report: the limits to growth are per decision.
            soon = last is not None and now - last.at < 0.75 * self.settings.interval
            load = self._meter.load(self.settings.metric, now) if measured and not soon else None
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
        """A balancer says this backend has drained or is dead. Raises Unknown; doing it twice is fine.

        One that drains is stopped when every balancer that reports has said so (or one that gives no name has).
        """
        with self._lock:
            backend = next((b for b in self._fleet.values() if b.ip == ip and b.running), None)
            if backend is None:
                raise Unknown(ip)
            if backend.state == DRAINING:
                said = backend.drained_by | {balancer}
                if balancer and not said >= self._meter.balancers.keys():
                    self._fleet = {**self._fleet, backend.name: replace(backend, drained_by=said)}
                else:
                    self._set(backend.to(STOPPED, self._clock(), reason))
            elif backend.state not in (STOPPED, FAILED) and not self._by_itself:
                self._set(backend.to(FAILED, self._clock(), reason))
        self._wake.set()

    def drain(self, ip: str) -> None:
        """Takes a backend out of rotation and replaces it. Raises Unknown, or ValueError where the engine picks."""
        with self._lock:
            backend = next((b for b in fleets.live(self._fleet) if b.ip == ip), None)
            if backend is None:
                raise Unknown(ip)
            if self._by_itself:
                raise ValueError("this engine picks by itself who leaves; drain a node of it instead")
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
            return [{**vars(decision), "time": round(self._epoch + decision.at, 3)} for decision in self.decisions]

    def past(self, since: float) -> dict[str, Any]:
        """What charts are drawn from, as `History.since` tells it."""
        with self._lock:
            return self._history.since(since)

    def status(self) -> dict[str, Any]:
        with self._lock:
            now = self._clock()
            decision = self.decisions[-1] if self.decisions else None
            return {
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
                "launches": show.launches(self._fleet, self._patience, now),
                "backends": show.backends(self._fleet, self._meter),
                "balancers": show.balancers(self._meter, now),
                "last_decision": vars(decision) if decision else None,
                "settings": show.settings_in_force(self.settings, self.policy),
            }

    @property
    def _by_itself(self) -> bool:
        """Whether the engine keeps a number of backends by itself: what it launches it also replaces."""
        return self._engine.replicas is not None

    # -- with the lock held --------------------------------------------------------------------------------------

    def _heard(self, fleet: Fleet, now: float) -> Fleet:
        """In the light of what balancers say. What the engine launched by itself is waited for, never given up."""
        judged = bool(self._meter.balancers) and not self._by_itself
        return fleets.hear(fleet, self._meter.healthy, judged, now, self._meter.why)

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
            _tell_change(was, is_, now)
            self.tally.changed(was, is_, now)
            if (
                was
                and is_
                and was.state != FAILED == is_.state
                and (was.state in (SPARE, STARTING) or now - is_.launched < STEADY)
            ):
                self._disappointed(is_, is_.reason, now)
        view = show.view(after, self.settings, self._inside)
        if (revision := show.revision(view)) != self._revision:
            self._revision, self._view = revision, view
            self._notify()
            try:
                _write(self._ip_file, "".join(f"{b['ip']}\n" for b in view["backends"] if b["state"] == ACTIVE))
            except OSError as error:
                log.error("a balancer that starts now would find old rules: %s", error)

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
        self.tally.decided(decision)

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
            log.error("the operator's orders would not outlive this manager: %s", error)

    def _recall_orders(self) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError):  # none, or none that can be read: the settings stand
            orders = json.loads(self._orders_file.read_text())
            limits = {name: orders[name] for name in ("min", "max", "target")}
            self.policy, self.paused = replace(self.policy, **limits), bool(orders["paused"])

    def _clamp(self) -> None:
        self.desired = max(self.policy.min, min(self.policy.max, self.desired))

    def _note_engine(self, trouble: str) -> None:
        if trouble and not self.engine_trouble:
            log.error("engine out of reach, the fleet stays as it is: %s", trouble)
        elif self.engine_trouble and not trouble:
            log.info("engine in reach again")
        self.engine_trouble = trouble


def _kinds(decision: Decision) -> tuple[str, ...]:
    """What bent a decision, without the numbers."""
    return (decision.verdict, *(clamp.split(" ")[0] for clamp in decision.clamps))


def _tell_change(before: Backend | None, after: Backend | None, now: float) -> None:
    if before is not None and after is None:
        log.info("backend %s %s removed", before.name, before.ip or "-")
    elif after is not None and (before is None or before.state != after.state):
        came = f"{before.state}→{after.state} after {now - before.since:.1f} s" if before else after.state
        why = f": {after.reason}" if after.reason else ""
        level = logging.WARNING if after.state == FAILED else logging.INFO
        log.log(level, "backend %s %s %s%s", after.name, after.ip or "-", came, why)


def _write(path: Path, text: str) -> None:
    """Replaces the file in one step: whoever reads it sees the old text or the new one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)
