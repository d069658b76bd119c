"""What ranks send each other to agree: JSON of any length, integers, devices, facts; ranks are threads."""

from __future__ import annotations

import json

import pytest
from threads import in_ranks
from torch.distributed import HashStore

from adapter.parallel import agreement
from adapter.parallel.agreement import differences, require_alike
from adapter.parallel.devices import Visible, check, take_device
from adapter.parallel.group import exchange
from adapter.parallel.launchers import Launch
from policies.errors import UserError


def test_an_exchange_takes_facts_of_any_length_which_may_differ():
    def facts(rank):
        return {"rank": rank, "name": "ü" * 64 * rank, "long": [None, 0.5] * 1000 * (rank == 2)}

    results, _ = in_ranks(3, lambda world: exchange(world, facts(world.rank)))
    assert results == [[facts(rank) for rank in range(3)]] * 3


def test_integers_of_64_bits_arrive():
    numbers = [[-(2**63), rank, 2**63 - 1] for rank in range(3)]
    assert in_ranks(3, lambda world: world.gather_integers(numbers[world.rank]))[0] == [numbers] * 3


def test_ranks_that_are_alike_go_on():
    assert in_ranks(2, lambda world: require_alike(world, {"tp_size": "2"}))[0] == [None, None]


@pytest.mark.parametrize("facts, words", [
    ([{"tp_size": "2"}, {"tp_size": "4"}], "tp_size: 2 (rank 0); 4 (rank 1)"),
    ([{"tp_size": "2"}, {}, {"tp_size": "2"}], "tp_size: 2 (rank 0, 2); none (rank 1)"),
    ([{"generation": json.dumps({"a": list(range(n))})} for n in (99, 98)], "generation: digest "),
])
def test_unlike_ranks_are_an_error_on_every_rank(facts, words):
    results, _ = in_ranks(len(facts), lambda world: require_alike(world, facts[world.rank]))
    assert all(isinstance(error, UserError) and words in str(error) for error in results), results
    assert len(set(map(str, results))) == 1


def test_unlike_releases_and_checkouts_are_named():
    """As the hosts of one job may have them."""
    here = agreement._releases()
    assert here["torch"].startswith("2.") and here["deepspeed"]
    assert differences([here, here, here | {"transformers": "4.49.0", "the code of adapter and policies": "x"}]) == [
        f"transformers: {here['transformers']} (rank 0, 1); 4.49.0 (rank 2)",
        f"the code of adapter and policies: {here['the code of adapter and policies']} (rank 0, 1); x (rank 2)"]


def on_gpus(*devices, host="alpha"):
    """Ranks of one host and the accelerators that each sees."""
    return [Visible(host, rank, "cuda", seen) for rank, seen in enumerate(devices)]


@pytest.mark.parametrize("seen, taken", [
    (on_gpus(["a", "b"], ["a", "b"]), [0, 1]),  # deepspeed, torchrun: everyone sees all
    (on_gpus(["a"], ["b"], ["c"], ["d"]), [0, 0, 0, 0]),  # srun --gpus-per-task=1
    (on_gpus(["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]), [0, 1, 0, 1]),  # srun --gpus-per-task=2
    (on_gpus(["a"], ["b"]) + on_gpus(["c"], ["d"], host="beta"), [0, 0, 0, 0]),
    ([Visible("alpha", rank, "cpu") for rank in range(3)], []),
])
def test_each_rank_takes_an_accelerator_of_its_own(seen, taken):
    check(seen)
    if taken:
        assert [v.index for v in seen] == taken and len({v.taken for v in seen}) == len(seen)


@pytest.mark.parametrize("seen, words", [
    (on_gpus(["a"], ["a"], ["a"], ["a"]), r"share.*: rank 0, 1, 2, 3 on host alpha\. Rank 0 sees 1 in all"),
    (on_gpus(["a", "b"], ["a", "b"], ["a", "b"]), "rank 0, 2 on host alpha.* sees 2 in all"),
    (on_gpus(["a", "b"], ["b", "a"]), "rank 0, 1 on host alpha"),  # bound to the same one, unlike orders
    (on_gpus(["a"], []), "rank 1 sees no accelerator"),
    ([*on_gpus(["a"]), Visible("beta", 0, "cpu")], "unlike devices: cpu on rank 1; cuda on rank 0"),
])
def test_ranks_that_cannot_have_one_each_are_refused(seen, words):
    with pytest.raises(UserError, match=words):
        check(seen)


def test_every_rank_refuses_what_one_sees(monkeypatch):
    """Through the store, before any collective: the ranks of a host that sees no accelerator and of one that does."""
    from adapter.parallel import devices

    store, views = HashStore(), [*on_gpus(["a"]), Visible("beta", 0, "cpu")]
    monkeypatch.setattr(devices, "visible", lambda local_rank: views[local_rank])  # the thread's own, below

    def join(world):
        take_device(Launch(world.rank, 2, world.rank, 2), store)

    results, _ = in_ranks(2, join)
    assert all(isinstance(error, UserError) and "unlike devices" in str(error) for error in results), results
