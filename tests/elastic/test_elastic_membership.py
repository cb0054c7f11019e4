"""Laws of ``Membership``, in a small world of hosts and workers that obey it, die, hang and come back as hypothesis likes."""

from __future__ import annotations

import signal
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.elastic.actions import Change, CloseHost, EndWorker, Finish, Form, Interrupt, OpenHost, StartWorker, Tell, number_places
from horoyolo.elastic.membership import BELOW_LIMIT_S, UP, Limits, Membership
from horoyolo.elastic.rests import Rests
from horoyolo.launch.hosts import Host

KILLED, ABORTED = -signal.SIGKILL, -signal.SIGABRT


class World:
    """What the actions of a Membership do, and what a generation's workers do by themselves. Time is told, not taken."""

    def __init__(self, limits: Limits, *hosts: Host) -> None:
        self.now = 1000.0
        self.membership = Membership(limits)
        self.opening: list[str] = []
        self.open: set[str] = set()
        self.closing: list[str] = []
        self.phase: dict[str, str] = {}  # worker -> starting, ready, placed, up, dying
        self.slot: dict[str, tuple[str, int]] = {}
        self.generation = dict[str, int]()
        self.form: Form | None = None
        self.finish: Finish | None = None
        self.told: list[str] = []
        self.list = list(hosts)
        self.membership.found(self.list)
        self.formed: list[Form] = []

    def decide(self) -> None:
        self.membership.found(self.list)
        for action in self.membership.decide(self.now):
            self.obey(action)

    def obey(self, action: object) -> None:
        match action:
            case OpenHost():
                assert action.host.name not in self.open
                assert action.host.name not in self.closing, "two agents of one host, which would kill each other"
                self.opening.append(action.host.name)
            case CloseHost():
                assert not any(host == action.host for host, _ in self.slot.values())
                self.open.remove(action.host)
                self.closing.append(action.host)
            case StartWorker():
                assert action.host in self.open
                assert (action.host, action.slot) not in self.slot.values(), "two workers in one slot"
                self.phase[action.worker], self.slot[action.worker] = "starting", (action.host, action.slot)
                self.generation[action.worker] = 0
            case EndWorker():
                if action.worker in self.phase:  # it may have ended by itself meanwhile
                    self.phase[action.worker] = "dying"
            case Form():
                self.check(action)
                self.form = action
                self.formed.append(action)
                for place in action.places:
                    self.phase[place.worker], self.generation[place.worker] = "placed", action.generation
            case Interrupt():
                for name in action.workers:
                    if self.phase[name] == "up":
                        self.say_ready(name)
                    elif self.phase[name] == "placed":
                        self.end(name, ABORTED)
            case Change():
                for name in action.leaving:
                    self.membership.left(name, self.now)
                    self.phase[name] = "leaving"
                for name in action.staying:
                    self.say_ready(name)
            case Tell():
                self.told.append(action.line)
            case Finish():
                self.finish = action

    def check(self, form: Form) -> None:
        limits = self.membership.limits
        assert [place.rank for place in form.places] == list(range(len(form.places)))
        assert all(self.phase[place.worker] == "ready" for place in form.places), "a place for one that is not ready"
        assert len(form.places) >= limits.min_np or form.stop
        if self.form:
            assert form.generation == self.form.generation + 1
            before = [place.worker for place in self.form.places]
            now = [place.worker for place in form.places]
            survivors = [name for name in before if name in now]
            assert [name for name in now if name in survivors] == survivors, "survivors changed their order"
            assert not survivors or now[0] == survivors[0]
        hosts = [place.host for place in form.places]
        assert sum(one != other for one, other in pairwise(hosts)) == len(set(hosts)) - 1, "a host's ranks are apart"

    def say_ready(self, name: str) -> None:
        self.phase[name] = "ready"
        self.membership.ready(name, self.generation[name], self.now)

    def end(self, name: str, status: int) -> None:
        if name in self.phase:
            del self.phase[name], self.slot[name]
            self.membership.ended(name, status, self.now)

    def lose(self, host: str) -> None:
        for name in [name for name, (there, _) in self.slot.items() if there == host]:
            del self.phase[name], self.slot[name]
        self.open.discard(host)
        self.opening = [name for name in self.opening if name != host]
        self.closing = [name for name in self.closing if name != host]
        self.membership.host_lost(host, "gone", self.now)

    def settle(self) -> None:
        """One round of what goes by itself."""
        for host in self.opening:
            self.open.add(host)
            self.membership.host_ready(host)
        self.opening = []
        for host in self.closing:
            self.membership.host_lost(host, "its agent has ended", self.now)
        self.closing = []
        for name, phase in list(self.phase.items()):
            if phase == "starting":
                self.say_ready(name)
            elif phase == "placed" and self.form and all(place.worker in self.phase for place in self.form.places):
                self.phase[name] = "up"
                self.membership.joined(name, self.generation[name])
            elif phase in ("dying", "leaving"):
                self.end(name, KILLED if phase == "dying" else 0)
        self.decide()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.decide()

    def run(self, seconds: float, step_s: float = 1.0) -> World:
        """Nothing happens but what goes by itself."""
        end_s = self.now + seconds
        while self.now < end_s and not self.finish:
            self.pass_time(min(step_s, end_s - self.now))
            self.settle()
            self.settle()
        return self

    def coming(self) -> int:
        """Workers that start or are ready, in slots that the list has."""
        slots = {host.name: host.slots for host in self.list}
        there = (self.slot[name] for name, phase in self.phase.items() if phase in ("starting", "ready"))
        return sum(slot < slots.get(host, 0) for host, slot in there)

    def up(self) -> list[str]:
        """The workers of the present generation when it is up, by rank."""
        generation = self.membership.generation
        return list(generation.members) if generation and generation.state == UP else []

    def pick(self, index: int, *phases: str) -> str | None:
        names = [name for name, phase in self.phase.items() if phase in phases]
        return names[index % len(names)] if names else None


A, B, C = Host("a", 2), Host("b", 2), Host("c", 1)
EVENTS = ("settle", "second", "minute", "kill", "kill one that joins", "break", "hang", "lose", "hosts", "decide")


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3),
    st.none() | st.integers(3, 6),
    st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 20)), max_size=60),
)
def test_whatever_happens_the_job_comes_back_to_all_its_workers(min_np, max_np, events):
    world = World(Limits(min_np, max_np), A, B, C)
    lists = [[A, B, C], [A], [B, C], [Host("a", 1), B], [C, A]]
    for event, index in events:
        match event:
            case "settle":
                world.settle()
            case "second" | "minute":
                world.pass_time(1.0 if event == "second" else 60.0)
            case "kill":
                name = world.pick(index, "starting", "ready", "placed", "up", "leaving")
                world.end(name or "", KILLED)
            case "kill one that joins":
                world.end(world.pick(index, "placed") or "", KILLED)
            case "break":
                name = world.pick(index, "up")
                if name:
                    world.membership.broken(name, world.generation[name], world.now)
            case "hang":
                for action in world.membership.kill(world.pick(index, "up", "ready", "starting") or "", "still", world.now):
                    world.obey(action)
            case "lose":
                world.lose((world.pick(index, "up", "ready", "starting", "placed") and sorted(world.open)[index % len(world.open)]) or "")
            case "hosts":
                world.list = lists[index % len(lists)]
            case "decide":
                world.decide()
        if world.finish:
            break
    if world.finish:
        assert world.finish.status == 1
        for_want_of_workers = "fewer than" in world.finish.why or "was left" in world.finish.why
        assert for_want_of_workers or any(why in world.finish.why for why in ("can't be used", "times in a row", "failed by themselves"))
        assert not for_want_of_workers or world.coming() < min_np, "it is ended though enough workers are about to be there"
        return
    world.list = [A, B, C]
    world.run(700, step_s=10)
    if world.finish or world.membership.stopping:
        return  # for want of workers, for too long
    assert len(world.up()) == min(5, max_np or 5)
    assert sorted(world.phase.values()) == ["up"] * len(world.up())


@pytest.fixture
def world() -> World:
    """Two hosts of two slots each, all four workers up."""
    world = World(Limits(2), A, B).run(5)
    assert [place.host for place in world.form.places] == ["a", "a", "b", "b"]
    return world


def test_a_death_costs_the_slot_10_s_and_longer_each_time(world):
    rest = []
    for _ in range(8):
        victim = next(name for name in world.up() if world.slot[name] == ("b", 1))
        world.end(victim, KILLED)
        began_s = world.now
        world.settle()
        world.decide()
        assert len(world.form.places) == 3
        while ("b", 1) not in world.slot.values():
            world.run(1)
        rest.append(world.now - began_s)
        world.run(20)
        assert len(world.up()) == 4
    assert rest == pytest.approx([10, 20, 40, 80, 160, 300, 300, 300], abs=2)
    world.run(700, step_s=10)
    world.end(next(name for name in world.up() if world.slot[name] == ("b", 1)), KILLED)
    world.run(13)
    assert len(world.up()) == 4  # ten good minutes: forgotten


def test_a_lost_host_costs_its_workers_and_comes_back(world):
    survivors = world.up()[2:]
    world.lose("a")
    world.run(1)
    assert world.up() == survivors
    world.run(15)
    assert world.up()[:2] == survivors
    assert len(world.up()) == 4


def test_who_aborts_in_a_broken_rendezvous_is_started_again_at_once(world):
    world.end(world.up()[0], KILLED)
    world.decide()
    world.decide()  # places for three
    first, second, third = [place.worker for place in world.form.places]
    world.end(second, KILLED)
    world.decide()  # the other two abort, by the interrupt
    assert first not in world.phase
    world.run(5)
    assert {world.slot[name] for name in world.up()} == {("a", 1), ("b", 1)}
    assert third not in world.up()


def test_workers_that_fail_to_join_do_not_end_the_job(world):
    world.end(world.up()[0], KILLED)
    world.decide()
    world.decide()
    for place in world.form.places:  # one dies, and the others' initialisation fails
        world.end(place.worker, KILLED if place.rank == 1 else 1)
    world.run(60)
    assert not world.finish
    assert len(world.up()) == 4


def test_too_few_wait_and_then_stop_with_a_checkpoint(world):
    world.lose("a")
    for name in [name for name in world.up() if world.slot.get(name) == ("b", 0)]:
        world.end(name, KILLED)
    world.list = [Host("b", 1, None)]
    world.membership.limits = Limits(2)
    world.run(BELOW_LIMIT_S - 20, step_s=10)
    assert not world.finish
    assert not world.form.stop
    world.run(40)
    assert world.form.stop
    assert world.membership.too_few
    (place,) = world.form.places
    world.end(place.worker, 75)
    world.settle()
    assert world.finish == Finish(75, "")


def test_too_few_go_on_waiting_for_those_that_start(world):
    """On a host that has to fetch an image first, say: whether they hang is for the watchdog to say."""
    world.list = [B]
    world.end(world.up()[-1], KILLED)
    world.lose("a")
    for _ in range(100):
        world.pass_time(10)
        world.phase = {name: "slow" if phase == "starting" else phase for name, phase in world.phase.items()}
        world.settle()
    assert sorted(world.phase.values()) == ["ready", "slow"]
    assert not world.finish
    assert not world.membership.stopping


def test_a_worker_that_stops_by_itself_does_not_stop_for_want_of_workers(world):
    """It found the file STOP."""
    for name in world.up():
        world.end(name, 75)
    world.decide()
    assert world.finish == Finish(75, "")
    assert not world.membership.too_few


def test_newcomers_wait_for_each_other(world):
    world.list = [A, B, Host("c", 2)]
    world.settle()
    world.settle()
    early, late = [name for name, phase in world.phase.items() if phase == "starting"]
    world.say_ready(early)
    world.pass_time(1)
    assert world.phase[world.up()[0]] == "up"
    world.say_ready(late)
    world.decide()
    world.run(1)
    assert len(world.up()) == 6


def test_a_slow_newcomer_holds_nobody_up(world):
    world.list = [A, B, Host("c", 2)]
    world.settle()
    world.settle()
    early, slow = [name for name, phase in world.phase.items() if phase == "starting"]
    world.say_ready(early)
    world.pass_time(6)
    world.decide()
    assert [place.worker for place in world.form.places][-1] == early
    assert slow not in [place.worker for place in world.form.places]


def test_all_hosts_may_be_exchanged(world):
    world.list = [Host("c", 2)]
    world.settle()
    assert len(world.formed) == 1  # nobody may go before somebody else has the state
    world.run(5)
    assert [world.slot[name][0] for name in world.up()] == ["c", "c"]
    assert [len(form.places) for form in world.formed] == [4, 6, 2]
    assert not world.open - {"c"}


def test_a_host_that_comes_back_at_once_waits_for_its_last_agent_to_end(world):
    world.list = [A]
    while not world.closing:
        world.settle()
    world.list = [A, B]
    for _ in range(30):
        world.pass_time(1)
    assert world.closing == ["b"]
    world.settle()
    world.settle()
    assert "b" in world.opening or "b" in world.open  # at once: it is no failure
    world.run(15)
    assert len(world.up()) == 4


def test_a_run_that_is_done_is_done(world):
    first, *others = world.up()
    world.membership.done(first, world.now)
    world.end(first, 0)
    world.decide()
    assert not world.finish
    for name in others:
        world.membership.done(name, world.now)
        world.end(name, 0)
    world.decide()
    assert world.finish == Finish(0, "")


def test_a_death_after_the_end_changes_nothing(world):
    for name in world.up():
        world.membership.done(name, world.now)
    for name, status in zip(world.up(), (0, KILLED, 0, 0), strict=True):
        world.end(name, status)
    world.decide()
    assert world.finish
    assert world.finish.status in (0, 1)


def test_workers_that_lose_each_other_again_and_again_end_the_job(world):
    for _ in range(12):
        if world.up():
            name = world.up()[0]
            world.membership.broken(name, world.generation[name], world.now)
        world.run(2)
    assert world.finish
    assert "network" in world.finish.why


def test_workers_that_never_find_each_other_end_the_job():
    """A wrong --nic, a firewall: one of them fails and the others abort, each time."""
    world = World(Limits(2), A)
    for _ in range(3000):
        world.pass_time(1)
        for name in [name for name, phase in world.phase.items() if phase == "starting"]:
            world.say_ready(name)
        for host in world.opening:
            world.open.add(host)
            world.membership.host_ready(host)
        world.opening = []
        world.end(world.pick(0, "placed") or "", 1)
        if world.finish:
            break
    assert world.finish
    assert world.finish.status == 1
    assert "--nic" in world.finish.why
    assert len(world.formed) == 11


def test_deaths_while_joining_do_not_add_up_over_generations_that_came_up(world):
    for _ in range(12):
        world.membership._slot_rests = Rests()
        world.end(world.pick(0, "up"), KILLED)
        world.decide()
        world.decide()  # places for the others
        world.end(world.pick(0, "placed"), KILLED)
        world.run(5)
        assert world.up()
        assert not world.finish


def test_too_few_at_the_start_is_told_once():
    world = World(Limits(3), A).run(25)
    assert world.told == []
    world.run(300)
    assert world.told == ["2 workers are ready, at least 3 are wanted (--min-np): waiting for more, 570 s"]
    world.run(400)
    assert world.finish
    assert world.finish.status == 1


def test_workers_that_take_long_to_start_are_waited_for():
    """The first scan of very many images: whether they hang is for the watchdog to say. Two are ready soon before the limit, one is not."""
    world = World(Limits(2), A, C)
    world.settle()
    world.settle()
    assert list(world.phase.values()) == ["starting"] * 3
    for _ in range(int(BELOW_LIMIT_S) // 10 + 20):
        world.pass_time(10)
    assert not world.finish
    world = World(Limits(2), A, C)
    world.settle()
    world.settle()
    world.pass_time(BELOW_LIMIT_S - 15)
    for name in list(world.phase)[:2]:
        world.say_ready(name)
    for _ in range(40):
        world.pass_time(1)
    assert not world.finish
    assert len(world.formed) == 1
    assert len(world.formed[0].places) == 2


def test_hosts_that_can_not_be_reached_end_a_job_that_has_not_begun():
    world = World(Limits(3), A, B)
    for _ in range(3):
        while "b" not in world.opening:
            world.pass_time(1)
        world.lose("b")
    world.run(1)
    assert world.finish
    assert world.finish.status == 1
    assert "b can't be used" in world.finish.why


def test_places_are_numbered_as_horovod_does():
    places = number_places([("w0", "a"), ("w1", "a"), ("w2", "b"), ("w3", "c"), ("w4", "c")])
    assert [(place.local_rank, place.local_size, place.cross_rank, place.cross_size) for place in places] == [
        *((0, 2, 0, 3), (1, 2, 0, 2), (0, 1, 1, 3), (0, 2, 2, 3), (1, 2, 1, 2)),
    ]
