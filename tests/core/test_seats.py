"""Who moves off a cordoned GPU, and in which order; and what Ray is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from serving.core.seats import (
    Moves,
    Seat,
    Stage,
    Taken,
    app_of,
    decide_moves,
    next_number,
    number_of,
    ray_share,
    seat_name,
)

GIB = 1 << 30


def ready(number: int, *, cordoned: bool = False) -> Taken:
    return Taken(f"m.{number}", Stage.READY, cordoned)


def starting(number: int) -> Taken:
    return Taken(f"m.{number}", Stage.STARTING)


def leaving(number: int) -> Taken:
    return Taken(f"m.{number}", Stage.LEAVING, True)


def plenty(asked: int) -> int:
    return asked


def full(_: int) -> int:
    return 0


def test_names() -> None:
    name = seat_name("model-m.x-v1-0123abcd", 12)
    assert (app_of(name), number_of(name)) == ("model-m.x-v1-0123abcd", 12)
    assert app_of("model-m-v1-0123abcd") == "model-m-v1-0123abcd"


def test_a_new_seat_has_a_number_that_no_other_seat_has_or_had() -> None:
    assert next_number("m", ()) == 0
    assert next_number("m", {"m.9", "m.10", "m"}) == 11
    assert next_number("m.x", {"m.x", "m.12", "m.x.3"}) == 4, "others' seats are none of its own"


def test_where_nothing_is_cordoned_nothing_moves() -> None:
    assert decide_moves(2, [ready(0), ready(1)], plenty) == Moves()
    assert decide_moves(2, [ready(0), starting(1)], plenty) == Moves()


def test_a_replacement_comes_first_and_only_a_ready_one_lets_the_old_one_go() -> None:
    old = ready(0, cordoned=True)
    assert decide_moves(1, [old], plenty) == Moves(add=1)
    assert decide_moves(1, [old, starting(1)], plenty) == Moves()
    assert decide_moves(1, [old, ready(1)], plenty) == Moves(leave=("m.0",))
    assert decide_moves(1, [leaving(0), ready(1)], plenty) == Moves()


def test_a_lost_neighbour_stops_a_move_until_it_is_back() -> None:
    seats = [ready(0, cordoned=True), starting(1), ready(2)]
    assert decide_moves(2, seats, plenty) == Moves()


def test_as_many_move_as_there_is_room_for() -> None:
    old = [ready(i, cordoned=True) for i in range(3)]
    assert decide_moves(3, old, full) == Moves(no_room=3)
    assert decide_moves(3, old, lambda _: 1) == Moves(add=1, no_room=2)
    assert decide_moves(3, [*old, starting(3)], full) == Moves(no_room=2)


def test_what_was_called_off_takes_its_replacement_back() -> None:
    assert decide_moves(1, [ready(0), starting(1)], plenty) == Moves(leave=("m.1",))
    assert decide_moves(1, [ready(0), ready(1)], plenty) == Moves(leave=("m.1",))
    one_of_two = [ready(0), ready(1, cordoned=True), starting(2), starting(3)]
    assert decide_moves(2, one_of_two, plenty) == Moves(leave=("m.3",))


def test_a_seat_that_somebody_deleted_is_made_again() -> None:
    assert decide_moves(2, [ready(0)], full) == Moves(add=1)


@dataclass
class Site:
    """Seats that a controller moves while things happen to it; nothing of it is remembered."""

    count: int
    space: int
    seats: dict[int, Taken] = field(default_factory=dict)
    number: int = 0

    def add(self) -> None:
        self.seats[self.number] = starting(self.number)
        self.number += 1

    def room(self, asked: int) -> int:
        healthy = sum(not s.cordoned for s in self.seats.values())
        return max(0, min(asked, self.space - healthy))

    def step(self) -> Moves:
        moves = decide_moves(self.count, list(self.seats.values()), self.room)
        ready_before = sum(s.stage is Stage.READY for s in self.seats.values())
        for _ in range(moves.add):
            self.add()
        for name in moves.leave:
            del self.seats[number_of(name)]
        ready_after = sum(s.stage is Stage.READY for s in self.seats.values())
        assert ready_after >= min(ready_before, self.count), "capacity was given up"
        return moves

    def load(self) -> None:
        for n, s in self.seats.items():
            if s.stage is Stage.STARTING:
                self.seats[n] = ready(n)


@given(st.integers(1, 5), st.integers(0, 12), st.data())
def test_moves_end_where_they_should_and_give_up_no_capacity(
    count: int, space: int, data: st.DataObject
) -> None:
    site = Site(count, space)
    for _ in range(count):
        site.add()
    site.load()
    for _ in range(data.draw(st.integers(0, 6))):
        for n in data.draw(st.sets(st.sampled_from(sorted(site.seats)))):
            if site.seats[n].stage is Stage.READY:
                site.seats[n] = ready(n, cordoned=data.draw(st.booleans()))
        site.step()
        if data.draw(st.booleans()):
            site.load()
    for _ in range(2 * count + 3):
        site.step()
        site.load()
    last = site.step()
    cordoned = sum(s.cordoned for s in site.seats.values())
    assert (last.add, last.leave, last.no_room) == (0, (), cordoned), "it does not flap"
    assert len(site.seats) == count
    assert not cordoned or site.room(1) == 0


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.floats(0.01, 1.0), st.integers(0, 7)), max_size=60),
)
def test_ray_has_room_wherever_memory_has(gpus: int, asked: list[tuple[float, int]]) -> None:
    memory, ray = [80 * GIB] * gpus, [1.0] * gpus
    for share, number in asked:
        needed, gpu = int(share * 80 * GIB), number % gpus
        if needed > memory[gpu]:
            continue
        memory[gpu] -= needed
        taken = ray_share(needed, 80 * GIB)
        # Ray fills the fullest GPU that has room.
        fits = [i for i, left in enumerate(ray) if left >= taken - 1e-9]
        assert fits, (share, ray)
        ray[min(fits, key=lambda i: ray[i])] -= taken


def test_shares_are_what_ray_can_count() -> None:
    assert ray_share(20 * GIB, 80 * GIB) == 0.125
    assert ray_share(1, 80 * GIB) == Seat(0).num_gpus == 0.0001
    assert ray_share(80 * GIB, 80 * GIB) == 0.5
    assert ray_share(10 * GIB, 10 * GIB, ray_gpus=1, devices=7) == 0.0714, "slices of one GPU"
