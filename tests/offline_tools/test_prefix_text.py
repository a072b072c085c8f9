"""The tokens of a prefix must be those that every request on it begins with, however its tokenizer merges."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_squeeze.offline_tools.prefix_text import (
    chat_tokens,
    common_start,
    describe,
    given_tokens,
    raw_tokens,
    read_token_ids,
)

TEXT = "The quick brown fox jumps over the lazy dog. It does so again and again, and then"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte pairs, merged across the end of a text as those of real models are."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [TEXT + end for end in ("", "s", "1", ".", " and")] * 20
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_requests_that_go_on_with_the_text_begin_with_its_tokens(tokenizer):
    found = raw_tokens(tokenizer, TEXT)
    assert TEXT.startswith(tokenizer.decode(found.ids))
    for end in ("s", " What?", ".\n", "\n\nWhy?", "1", "\u00e9", "..."):
        assert tokenizer(TEXT + end).input_ids[: len(found.ids)] == found.ids
    whole = tokenizer(TEXT).input_ids
    assert found.unstable == len(whole) - len(found.ids) > 0, "this text's last token does not merge"


def test_a_text_that_nothing_merges_with_is_kept_whole(tokenizer):
    text = "The quick brown fox\n\n"
    assert tokenizer.decode(raw_tokens(tokenizer, text).ids).startswith("The quick brown fox")


def test_conversations_begin_with_the_system_message(tokenizer):
    tokenizer.chat_template = TEMPLATE
    found = chat_tokens(tokenizer, TEXT)
    assert tokenizer.decode(found.ids).startswith(f"<system>{TEXT}</><user")
    for question in ("Why?", "What does the fox do?"):
        messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids[: len(found.ids)] == found.ids


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "has no chat template"), ("{{ messages[1].content }} {{ messages[0].content }}", "does not begin with")],
    ids=["no-template", "question-first"],
)
def test_templates_that_do_not_begin_with_the_system_message(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"^--chat-system: .*{message}.*use --raw$"):
        chat_tokens(tokenizer, TEXT)


def test_given_tokens_are_taken_as_they_are():
    assert given_tokens(None, read_token_ids("[3, 0, 2147483647]")).ids == [3, 0, 2147483647]


@pytest.mark.parametrize(
    ("sequences", "start"),
    [([[1, 2, 3], [1, 2, 4]], [1, 2]), ([[1, 2], [1, 2, 3]], [1, 2]), ([[1], [2]], []), ([[], [1]], []), ([[5]], [5])],
)
def test_common_start(sequences, start):
    assert common_start(sequences) == start


def test_the_first_and_the_last_tokens_are_shown(tokenizer):
    ids = tokenizer(TEXT).input_ids
    line = describe(ids, tokenizer, count=2)
    assert line.count("=") == 4 and " ... " in line
    assert line.startswith(f"{ids[0]}={tokenizer.decode(ids[:1])!r} ")
    assert describe(ids[:4], tokenizer, count=2).count("=") == 4
