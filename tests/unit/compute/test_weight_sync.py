"""A digest sees every bit and no layout; buckets carry every tensor to all who take part."""

import threading

import pytest
import torch

from posttrain.compute import weight_sync, weight_transfer
from posttrain.compute.weight_sync import WRAP, digest, fingerprint
from posttrain.compute.weight_transfer import Receiver, Sender

CPU = torch.device("cpu")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_change_of_the_last_bit_of_any_element_is_seen(dtype: torch.dtype):
    tensor = drawn(7, 5, dtype=dtype)
    before = fingerprint(tensor)
    for place in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1).view(weight_sync.INTEGERS[dtype.itemsize])[place] ^= 1
        assert fingerprint(changed) != before


def test_rows_columns_and_elements_that_changed_places_are_seen():
    tensor = drawn(64, 32)
    swapped = tensor.clone()
    swapped[3, 4], swapped[9, 7] = tensor[9, 7], tensor[3, 4]
    others = [tensor.flip(0), tensor.flip(1), tensor.mT.contiguous().view(64, 32), swapped, -tensor]
    assert len({int(fingerprint(each)) for each in (tensor, *others)}) == 6


def test_fingerprints_of_parts_add_up_to_that_of_the_whole():
    tensor = drawn(50, 24, dtype=torch.bfloat16)
    parts = [(0, 20, 0, 24), (20, 50, 0, 10), (20, 50, 10, 24)]
    found = [fingerprint(tensor[top:end, left:right], row=top, column=left) for top, end, left, right in parts]
    assert sum(map(int, found)) % WRAP == int(fingerprint(tensor)) % WRAP


def test_the_size_of_chunks_and_the_strides_of_a_tensor_do_not_count(monkeypatch):
    tensor = drawn(40, 30)
    strided = drawn(40, 60)[:, ::2].copy_(tensor)
    before = digest([("a", tensor), ("b", strided)])
    monkeypatch.setitem(weight_sync.CHUNK_ELEMENTS, "cpu", 64)
    assert digest([("a", tensor), ("b", strided)]) == before
    assert fingerprint(strided) == fingerprint(tensor)


def test_names_shapes_dtypes_and_order_are_part_of_a_digest():
    zeros = torch.zeros(4, 4)
    found = [
        digest([("a", zeros), ("b", zeros)]),
        digest([("b", zeros), ("a", zeros)]),
        digest([("a", zeros.view(2, 8)), ("b", zeros)]),
        digest([("a", zeros.bfloat16()), ("b", zeros)]),
        digest([("a", zeros)]),
        digest([("a", torch.tensor(0.0))]),
    ]
    assert len(set(found)) == len(found)


def test_buckets_carry_every_tensor_to_every_worker(monkeypatch):
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", 600)
    shapes = ((3,), (10, 10), (2, 3, 5), (1,), (7, 9))  # in bfloat16 the second takes 200 bytes, all of them 406
    weights = [(f"w{n}", drawn(*shape)) for n, shape in enumerate(shapes * 3)]
    sender = Sender(CPU, lambda part: iter(weights), largest=100)
    address, buckets, received = sender.meet("127.0.0.1"), [], [[], []]
    workers, ready = [Receiver(CPU), Receiver(CPU)], threading.Barrier(3)

    def work(number: int) -> None:
        worker = workers[number]
        worker.join(address, rank=1 + number, world_size=3, timeout_s=30)
        while ready.wait(30) >= 0 and buckets[-1]:
            received[number] += [(name, tensor.clone()) for name, tensor in worker.receive(buckets[-1])]
            worker.done()
            ready.wait(30)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    sender.join(world_size=3, timeout_s=30)
    for _ in range(2):  # the same group serves every sync
        sender.start("bfloat16")
        while True:
            buckets.append(sender.fill())
            if not buckets[-1]:
                break
            ready.wait(30)
            sender.send()
            ready.wait(30)
    ready.wait(30)
    for thread in threads:
        thread.join(30)
    sent = [(name, tensor.bfloat16()) for name, tensor in weights]
    assert len([each for each in buckets if each]) > 2, "one bucket would have held them all"
    for found in received:
        assert [name for name, _ in found] == [name for name, _ in sent] * 2
        assert digest(found[: len(sent)]) == digest(found[len(sent) :]) == digest(sent) == sender.digest("bfloat16")
