import pytest
import torch

from diffusers_invsr.training.pair_pool import PairPool


def numbered(start: int, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Aligned images, LR images and labels in which every value tells the pair's number."""
    number = torch.arange(start, start + batch)
    return (
        number[:, None, None, None].expand(-1, 3, 8, 8).float(),
        number[:, None, None, None].expand(-1, 3, 2, 2).float(),
        number.clone(),
    )


def test_until_full_batches_come_back_as_they_are():
    pool = PairPool(3)
    for i in range(3):
        batch = numbered(4 * i)
        assert all(out is given for out, given in zip(pool.exchange(*batch), batch))
    assert not torch.equal(pool.exchange(*numbered(12))[2], torch.arange(12, 16))


def test_pairs_stay_aligned_and_none_is_lost():
    pool, generator = PairPool(5), torch.Generator().manual_seed(0)
    seen = []
    for i in range(40):
        hr, lr, number = pool.exchange(*numbered(4 * i), generator=generator)
        assert hr.shape == (4, 3, 8, 8) and lr.shape == (4, 3, 2, 2) and number.dtype == torch.int64
        assert (hr == number[:, None, None, None]).all() and (lr == number[:, None, None, None]).all()
        # While it fills, batches are used at once, and again later.
        seen += number.tolist() if i >= 5 else []
    rest = pool.tensors[2].tolist()
    # What went in came out once or is still there.
    assert sorted(seen + rest) == list(range(160))


def test_batches_are_mixed():
    pool, generator = PairPool(10), torch.Generator().manual_seed(0)
    origins = [set((pool.exchange(*numbered(4 * i), generator=generator)[2] // 4).tolist()) for i in range(60)]
    mixed = [len(origin) for origin in origins[10:]]
    assert sum(mixed) / len(mixed) > 3
    assert all(i not in origin for i, origin in enumerate(origins[10:], 10))


def test_every_pair_is_as_likely_to_leave():
    counts, generator = torch.zeros(8), torch.Generator().manual_seed(0)
    for _ in range(1000):
        pool = PairPool(4)
        for i in range(4):
            pool.exchange(torch.arange(2 * i, 2 * i + 2))
        counts[pool.exchange(torch.tensor([8, 9]), generator=generator)[0]] += 1
    # 2 of 8: binomial with 1000 tries and a probability of 1/4.
    assert ((counts - 250).abs() < 4 * (1000 * 0.25 * 0.75) ** 0.5).all()


def test_same_generator_same_pairs():
    def run(seed):
        pool, generator = PairPool(3), torch.Generator().manual_seed(seed)
        return torch.cat([pool.exchange(*numbered(4 * i), generator=generator)[2] for i in range(10)])

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_what_comes_out_is_no_view_of_the_pool():
    pool = PairPool(2)
    hr = torch.ones(2, 3)
    for _ in range(3):
        pool.exchange(hr)[0].zero_() if pool.filled == 2 else pool.exchange(hr)
    hr.zero_()
    assert (pool.tensors[0] == 1).all()


def test_memory_is_constant():
    pool = PairPool(3)
    pool.exchange(*numbered(0))
    addresses = [tensor.data_ptr() for tensor in pool.tensors]
    for i in range(1, 20):
        pool.exchange(*numbered(4 * i))
    assert [tensor.data_ptr() for tensor in pool.tensors] == addresses
    assert [len(tensor) for tensor in pool.tensors] == [12, 12, 12]


def test_keeps_no_graph():
    pool = PairPool(1)
    for _ in range(3):
        out = pool.exchange(torch.ones(2, 3, requires_grad=True) * 2)[0]
    assert not out.requires_grad and not pool.tensors[0].requires_grad


@pytest.mark.parametrize("batches_before", [0, 2, 3, 7])
def test_state_is_restored_bit_exactly(batches_before, tmp_path):
    pool, generator = PairPool(3), torch.Generator().manual_seed(0)
    for i in range(batches_before):
        pool.exchange(*numbered(4 * i), generator=generator)
    torch.save(pool.state_dict(), tmp_path / "pool.pt")
    restored = PairPool(3)
    restored.load_state_dict(torch.load(tmp_path / "pool.pt", weights_only=True))
    other = torch.Generator().manual_seed(0)
    other.set_state(generator.get_state())
    for i in range(batches_before, batches_before + 8):
        expected = pool.exchange(*numbered(4 * i), generator=generator)
        for out, tensor in zip(restored.exchange(*numbered(4 * i), generator=other), expected):
            assert torch.equal(out, tensor) and out.dtype == tensor.dtype


def test_loading_copies():
    pool, restored = PairPool(1), PairPool(1)
    pool.exchange(torch.zeros(2))
    restored.load_state_dict(pool.state_dict())
    pool.exchange(torch.ones(2))
    assert torch.equal(restored.exchange(torch.ones(2))[0], torch.zeros(2))


def test_without_batches_it_is_disabled():
    pool = PairPool(0)
    for i in range(3):
        batch = numbered(4 * i, batch=i + 1)
        assert all(out is given for out, given in zip(pool.exchange(*batch), batch))
    assert pool.tensors == []


@pytest.mark.parametrize("num_batches", [-1, 2.0, "3", None, True])
def test_refuses_wrong_number_of_batches(num_batches):
    with pytest.raises(ValueError, match="`num_batches` must be an integer greater than or equal to 0, got"):
        PairPool(num_batches)


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (torch.zeros(2, 3), torch.zeros(3, 3)),
        (torch.zeros(()),),
        (torch.zeros(2, 3),),
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(4, 3), torch.zeros(4, 3)),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)),
    ],
    ids=["none", "batch sizes", "scalar", "fewer", "shape", "batch size", "type"],
)
def test_refuses_tensors_that_do_not_fit(tensors):
    pool = PairPool(2)
    pool.exchange(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="^`tensors` must have the "):
        pool.exchange(*tensors)


def test_refuses_the_state_of_another_pool():
    with pytest.raises(ValueError, match="`state_dict` must be from a pool of 3 batches, got one of 2"):
        PairPool(3).load_state_dict(PairPool(2).state_dict())
