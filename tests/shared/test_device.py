import threading

import pytest
import torch

from fedcmr.shared.device import one_core_each


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def threads_of_others():
    """As many as torch gives a thread that is new now."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_every_item_has_one_core_and_results_keep_their_order(four_threads):
    meeting = threading.Barrier(4, timeout=30)

    def work(item):
        meeting.wait()  # passes only where four work at once
        return item, torch.get_num_threads(), threading.get_ident()

    results = list(one_core_each(work, range(8)))
    assert [item for item, _, _ in results] == list(range(8))
    assert {num_threads for _, num_threads, _ in results} == {1}
    assert len({thread for _, _, thread in results}) == 4
    assert (torch.get_num_threads(), threads_of_others()) == (4, 4)


def test_an_only_item_has_one_core_too(four_threads):
    # Else its last digits would tell whether somebody else was there.
    assert list(one_core_each(lambda _: torch.get_num_threads(), [0])) == [1]


def test_side_by_side_nothing_that_is_cast_is_shared_and_elsewhere_it_is_kept(four_threads):
    def cache(_):
        return torch.autocast("cpu", torch.bfloat16)._cache_enabled

    assert list(one_core_each(cache, [0, 1])) == [False, False]
    assert cache(0)


def test_after_an_error_torch_has_its_cores_again(four_threads):
    with pytest.raises(ZeroDivisionError):
        list(one_core_each(lambda item: 1 / item, [1, 0, 2]))
    assert (torch.get_num_threads(), threads_of_others()) == (4, 4)


def test_on_one_core_nothing_is_shared_out():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = threading.get_ident()
        assert list(one_core_each(lambda _: threading.get_ident(), range(3))) == [here] * 3
    finally:
        torch.set_num_threads(before)
