import torch

from vllm_squeeze.kernels.tables import packed, unpacked


def test_words_have_even_elements_below():
    """Each more by 8 than it is: -7 is 1, 0 is 8."""
    words, scales = packed(torch.tensor([[-7.0, -6, -5, -4, -3, -2, -1, 0], [14, 12, 10, 8, 6, 4, 2, 0]]))
    assert words.dtype == torch.int32 and words.flatten().tolist() == [0x86427531 - 2**32, 0x8ACE9BDF - 2**32]
    assert scales.tolist() == [1, 2]


def test_whole_numbers_stay_as_they_are():
    vectors = torch.randint(-7, 8, (3, 5, 64), generator=torch.Generator().manual_seed(0)).float()
    vectors[..., 9] = 7
    assert torch.equal(unpacked(*packed(vectors)), vectors)


def test_nothing_stays_nothing():
    words, scales = packed(torch.zeros(2, 16))
    assert not scales.any() and (words == 0x88888888 - 2**32).all()
