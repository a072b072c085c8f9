"""xformers' attention over what follows prefixes, against the oracle; on the CPU with a stand-in for torch's kernel."""

import pytest
import torch

from tests.kernels.conftest import ON_GPU, check_close, poisoned
from vllm_squeeze.kernels.reference import attend_causal
from vllm_squeeze.kernels.suffix_attention import Suffixes, attend_suffix, why_unsupported

pytestmark = pytest.mark.usefixtures("torch_kernel")

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
H, MAX_ROWS, MAX_TOKENS, MAX_KEYS = 2, 9, 64, 300


def efficient_attention(
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
    compute_log_sumexp, scale, seqlen_k, window_size,
):  # fmt: skip
    """What ``aten::_efficient_attention_forward`` does on a GPU, as far as it is asked here; NaN where it says nothing."""
    assert bias is None and window_size is None and dropout_p == 0 and compute_log_sumexp
    assert custom_mask_type == 2, "causal from the bottom right"
    lengths = cu_seqlens_q.diff()
    assert lengths.max() <= max_seqlen_q
    output = poisoned(torch.empty_like(query))
    lse = poisoned(torch.empty(len(lengths), query.shape[2], -(-max_seqlen_q // 32) * 32))
    for row, (start, length, first, count) in enumerate(zip(cu_seqlens_q, lengths, cu_seqlens_k, seqlen_k)):
        if count:
            keys, values = (cache[0, first : first + count].transpose(0, 1) for cache in (key, value))
            queries = query[0, start : start + length].unsqueeze(2)
            attended, row_lse = attend_causal(queries, keys, values, scale)
            output[0, start : start + length] = attended[:, :, 0].to(query.dtype)
            lse[row, :, :length] = row_lse[:, :, 0].T
    return output, lse, None, None, max_seqlen_q, max_seqlen_k


@pytest.fixture
def torch_kernel(monkeypatch):
    """Puts a stand-in in place of torch's kernel where there is no GPU."""
    fmha = pytest.importorskip("xformers.ops.fmha")
    if not ON_GPU:
        monkeypatch.setattr(fmha.cutlass.FwOp, "OPERATOR", staticmethod(efficient_attention))
        monkeypatch.setattr(fmha.common.AttentionOpBase, "not_supported_reasons", classmethod(lambda cls, inputs: []))


class Step:
    """A step over a paged cache of NaN but for the keys that its squeezed rows may attend to.

    Args:
        rows: of each row its number of query tokens, tokens before its suffix, and of its suffix, 0 for a dense row.
        padding: tokens of the batch beyond those of its rows.
    """

    def __init__(self, rows, group, page_size, dtype, head_size=64, padding=0, transposed=False):
        random = torch.Generator().manual_seed(7)
        counts, self.prefixes, self.lens = (list(column) for column in zip(*rows, strict=True))
        self.starts = torch.tensor([0, *counts]).cumsum(0).int()
        self.max_query_len = max(counts)
        self.query = torch.randn(sum(counts) + padding, H * group, head_size, generator=random).to(dtype)
        pages = [-(-(prefix + length) // page_size) for _, prefix, length in rows]
        shape = (sum(pages) + 4, page_size, H, 2 * head_size)
        cache = torch.full(shape, torch.nan, dtype=dtype)
        if transposed:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        physical = torch.randperm(len(cache), generator=random).split([*pages, 4])
        self.block_table = torch.full((len(rows), max(max(pages), 1) + 2), 10**6, dtype=torch.int32)
        self.keys_values = []
        for row, (_, prefix, length) in enumerate(rows):
            self.block_table[row, : pages[row]] = physical[row].int()
            position = torch.arange(prefix, prefix + length)
            content = torch.randn(length, H, 2 * head_size, generator=random).to(dtype)
            cache[physical[row][position // page_size], position % page_size] = content
            self.keys_values.append(content.transpose(0, 1).to(DEVICE).split(head_size, -1))
        storage = cache.to(DEVICE)
        self.caches = storage.split(head_size, -1)
        self.query, self.block_table, self.starts = (t.to(DEVICE) for t in (self.query, self.block_table, self.starts))
        self.scale = 0.8 * head_size**-0.5

    def fill(self, suffixes):
        prefix, lens = torch.tensor(self.prefixes, device=DEVICE), torch.tensor(self.lens, device=DEVICE)
        # vLLM's rows have a length whether they are squeezed or not
        seq_lens = torch.where(lens > 0, prefix + lens, 1234).int()
        page_size = self.caches[0].shape[1]
        suffixes.fill(lens > 0, prefix, seq_lens, self.starts, self.block_table, page_size)

    def attend(self, suffixes):
        output = torch.full_like(self.query, 5.0)
        packed = torch.full((2, MAX_KEYS, H, self.query.shape[-1]), torch.nan, dtype=self.query.dtype, device=DEVICE)
        lse = attend_suffix(
            self.query, output, *self.caches, suffixes, self.starts, self.max_query_len, self.scale, packed
        )
        return output, lse

    def check(self, output, lse):
        """Compares the tokens of squeezed rows with the oracle; others have to be as they were."""
        for row, (start, end) in enumerate(zip(self.starts.tolist(), self.starts[1:].tolist())):
            if not self.lens[row]:
                assert (output[start:end] == 5.0).all()
                continue
            query = self.query[start:end].unflatten(1, (H, -1))
            expected, expected_lse = attend_causal(query, *self.keys_values[row], self.scale)
            check_close(output[start:end], expected.flatten(1, 2).to(output))
            check_close(lse[:, start:end].T, expected_lse.flatten(1), tolerance=1e-3)
        assert (output[int(self.starts[-1]) :] == 5.0).all()


def make_suffixes():
    return Suffixes.allocate(MAX_ROWS, MAX_TOKENS, MAX_KEYS, DEVICE)


ROWS = [(1, 48, 1), (1, 0, 0), (5, 32, 37), (1, 64, 70), (3, 128, 3), (1, 0, 0), (17, 16, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_squeezed_rows_attend_to_their_suffixes(group, page_size, dtype):
    """Rows of one and of several tokens, suffixes of one key and of several pages, beside rows that are not squeezed."""
    rows = [(count, prefix * page_size // 16, length) for count, prefix, length in ROWS]
    step, suffixes = Step(rows, group, page_size, dtype, padding=3), make_suffixes()
    step.fill(suffixes)
    step.check(*step.attend(suffixes))


@pytest.mark.parametrize(
    "rows", [[(1, 16, 1)], [(1, 16, MAX_KEYS)], [(1, 0, 0)], [(MAX_TOKENS, 32, MAX_TOKENS)]], ids=str
)
@pytest.mark.parametrize("head_size", [32, 80])
def test_one_row(rows, head_size):
    """Of the least, of as many keys as there is room for, without any, and of as many tokens."""
    step, suffixes = Step(rows, 4, 16, torch.float16, head_size), make_suffixes()
    step.fill(suffixes)
    step.check(*step.attend(suffixes))


def test_heads_before_tokens_in_a_page():
    """vLLM's other layout of the KV cache."""
    step, suffixes = Step(ROWS, 2, 16, torch.float16, transposed=True), make_suffixes()
    step.fill(suffixes)
    step.check(*step.attend(suffixes))


def test_nothing_of_an_earlier_step_is_left():
    """First more rows, tokens and keys, then fewer."""
    suffixes = make_suffixes()
    Step(ROWS, 4, 16, torch.float16).fill(suffixes)
    step = Step([(1, 0, 0), (2, 32, 9)], 4, 16, torch.float16, padding=2)
    step.fill(suffixes)
    step.check(*step.attend(suffixes))


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA graphs")
def test_a_graph_replays_over_another_step():
    """Captured over nothing, as vLLM captures it."""
    step, suffixes = Step([(1, 48, 9), (1, 0, 0), (1, 32, 70)], 4, 16, torch.float16), make_suffixes()
    step.attend(suffixes)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.attend(suffixes)
    step.fill(suffixes)
    graph.replay()
    step.check(*captured)


@pytest.mark.skipif(not ON_GPU, reason="xformers is asked about a GPU")
@pytest.mark.parametrize(("head_size", "dtype", "supported"), [(64, torch.float16, True), (84, torch.float16, False)])
def test_what_xformers_supports(head_size, dtype, supported):
    assert (why_unsupported(head_size, dtype, torch.device(DEVICE)) is None) == supported


def test_without_xformers(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert why_unsupported(64, torch.float16, torch.device(DEVICE)) == "xformers is not installed"
