"""The ledger counts every draw once and its digest tells two histories apart."""

from posttrain.data.sample import shift
from posttrain.data.types import Pack
from posttrain.workflow.ledger import Ledger


def one_pack(*ids: int, advantage: float = 1.0) -> Pack:
    sample = shift(ids, [1.0] * len(ids), advantages=[advantage] * len(ids))
    return Pack(samples=(sample,), num_units=1)


def test_every_draw_is_trained_or_dropped_with_its_reason():
    ledger = Ledger()
    assert [ledger.draw() for _ in range(3)] == [0, 1, 2]
    assert ledger.balance() == 3
    assert ledger.drop("reward_error") == 1
    ledger.commit([one_pack(1, 2, 3)], draws=2)
    assert ledger.balance() == 0
    assert ledger.state()["dropped"] == {"reward_error": 1}


def test_a_restored_ledger_continues_the_chain():
    whole = Ledger()
    whole.commit([one_pack(1, 2)], draws=1)
    restored = Ledger(whole.state())
    for ledger in (whole, restored):
        ledger.commit([one_pack(3, 4)], draws=1)
    assert whole.state() == restored.state()


def test_the_digest_depends_on_content_and_order():
    def digest(*packs: Pack) -> str:
        ledger = Ledger()
        for each in packs:
            ledger.commit([each], draws=1)
        return ledger.digest

    first, second = one_pack(1, 2, 3), one_pack(1, 2, 4)
    histories = [digest(first), digest(second), digest(first, second), digest(second, first)]
    assert len({*histories, digest(one_pack(1, 2, 3, advantage=0.5))}) == 5
