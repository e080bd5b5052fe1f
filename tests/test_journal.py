"""When an answer may go on elsewhere, and what of it is counted."""

import dataclasses

from engine.request import DecodeStats, Request
from serve_app.chunks import Chunk
from serve_app.journal import Journal

REQUEST = Request("r", (1, 2))
RUNNING, WAITING = Chunk(running=True), Chunk()


def lost_while(journal: Journal, last: Chunk) -> bool:
    journal.request()
    journal.record(last)
    return journal.lost()


def test_a_journal_resumes_from_all_tokens_so_far() -> None:
    journal = Journal(dataclasses.replace(REQUEST, generated=(5,)))
    journal.record(Chunk([6, 7]))
    assert journal.lost()
    journal.record(Chunk([8]))
    assert journal.request().generated == (5, 6, 7, 8)
    assert journal.resumed == 1


def test_a_request_whose_engine_died_twice_continues_alone_and_is_given_up_with_the_third() -> None:
    journal = Journal(REQUEST)
    assert lost_while(journal, RUNNING)
    assert not journal.request().alone
    assert lost_while(journal, RUNNING)
    assert journal.request().alone
    assert not lost_while(journal, RUNNING)


def test_a_request_on_probation_is_not_blamed_for_an_engine_that_dies_while_it_waits() -> None:
    journal = Journal(REQUEST)
    lost_while(journal, RUNNING)
    lost_while(journal, RUNNING)
    for _ in range(10):
        assert lost_while(journal, WAITING)
        assert journal.request().alone


def test_engines_that_die_while_a_request_waits_make_it_suspect_half_as_fast() -> None:
    journal = Journal(REQUEST)
    for _ in range(3):
        assert lost_while(journal, WAITING)
        assert not journal.request().alone
    assert lost_while(journal, WAITING)
    assert journal.request().alone


def test_an_engine_that_never_had_the_request_counts_for_nothing() -> None:
    journal = Journal(REQUEST)
    for _ in range(20):
        journal.request()
        assert journal.lost()
    assert not journal.alone and not journal.accepted and journal.resumed == 0


def test_statistics_of_an_engine_that_handed_over_are_added_to_the_next_ones() -> None:
    journal = Journal(REQUEST)
    first = DecodeStats(("ar",), 3, 3, cached_tokens=16)
    journal.request()
    journal.record(Chunk([1, 2, 3], "moved", dataclasses.asdict(first)))
    journal.moved()
    journal.request()
    last = DecodeStats(("ar", "linear_spec"), 2, 8, 14, 6, cached_tokens=3)
    shown = journal.record(Chunk([4], "stop", dataclasses.asdict(last)))
    assert shown.stats is not None
    assert DecodeStats(**shown.stats) == DecodeStats(
        ("ar", "linear_spec"), 5, 11, 14, 6, cached_tokens=16, resumed=1
    )


def test_a_replica_that_hands_over_what_it_never_ran_is_no_engine_outlived() -> None:
    journal = Journal(REQUEST)
    journal.request()
    journal.record(Chunk(finish_reason="moved"))
    journal.moved()
    assert journal.resumed == 0
