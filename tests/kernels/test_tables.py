import torch

from vllm_squeeze.kernels.tables import LEAST_SPREAD, frame_of, packed, packed_keys, unpacked, unpacked_keys


def test_words_have_even_elements_below():
    """Each more by 8 than it is: -7 is 1, 0 is 8."""
    words, scales = packed(torch.tensor([[-7.0, -6, -5, -4, -3, -2, -1, 0], [14, 12, 10, 8, 6, 4, 2, 0]]))
    assert words.dtype == torch.int32 and words.flatten().tolist() == [0x86427531 - 2**32, 0x8ACE9BDF - 2**32]
    assert scales.tolist() == [1, 2]


def test_whole_numbers_stay_as_they_are():
    vectors = torch.randint(-7, 8, (3, 5, 64), generator=torch.Generator().manual_seed(0)).float()
    vectors[..., 9] = 7
    assert torch.equal(unpacked(*packed(vectors)), vectors)


def test_what_keys_have_in_common_takes_no_bits():
    """Means of other directions, and spreads that differ by a factor of a thousand: errors are of a step along each."""
    random = torch.Generator().manual_seed(0)
    spread = torch.logspace(-3, 0, 32)
    keys = 50 * torch.randn(2, 1, 32, generator=random) + spread * torch.randn(2, 40, 32, generator=random)
    sizes = torch.ones(2, 40, dtype=torch.int32)
    frame = frame_of(keys, sizes)
    error = unpacked_keys(*packed_keys(keys, frame), frame) - keys
    assert (error.square().mean(1).sqrt() < 0.2 * spread).all()
    assert torch.allclose(frame[:, 0], keys.mean(1), atol=1e-5) and (frame[:, 1].amax(-1) == 1).all()


def test_frames_are_of_clusters_that_have_keys():
    keys = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[3, 1, 0, 2, 5, 1, 0, 0, 4]])
    whole = keys.masked_fill((sizes == 0)[..., None], 1e4)
    those = sizes[0] > 0
    torch.testing.assert_close(frame_of(whole, sizes), frame_of(keys[:, those], sizes[:, those]))


def test_a_single_cluster_and_none_have_frames():
    key = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    frame = frame_of(key, torch.ones(1, 1))
    assert torch.equal(frame[:, 0], key[:, 0]) and (frame[:, 1] == LEAST_SPREAD).all()
    assert torch.equal(unpacked_keys(*packed_keys(key, frame), frame), key)
    assert frame_of(key[:, :0], torch.ones(1, 0)).isfinite().all()


def test_nothing_stays_nothing():
    words, scales = packed(torch.zeros(2, 16))
    assert not scales.any() and (words == 0x88888888 - 2**32).all()
