"""Prompts that ask questions about a prefix."""

from types import SimpleNamespace

from benchmarks.running import question_prompts

EARLIER = [(), (("1?", "one"), ("2?", "two"))]


class Tokenizer:
    """Tokens are characters; a chat template, if there is one, writes each role's initial before what it says."""

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, conversation, add_generation_prompt: bool, return_dict: bool) -> list[str]:
        assert add_generation_prompt and not return_dict
        return list("|".join(f"{message['role'][0]}:{message['content']}" for message in conversation) + "|a:")

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text))


def test_conversations_go_on():
    prompts = question_prompts(Tokenizer("template"), "text", ["0?", "3?"], EARLIER)
    assert ["".join(prompt) for prompt in prompts] == ["s:text|u:0?|a:", "s:text|u:1?|a:one|u:2?|a:two|u:3?|a:"]
    assert question_prompts(Tokenizer("template"), "text", ["0?"]) == prompts[:1]


def test_without_a_chat_template_prompts_are_raw():
    prompts = question_prompts(Tokenizer(None), "text", ["0?", "3?"], EARLIER)
    expected = ["text\n0?\nAnswer:", "text\n1?\nAnswer: one\n2?\nAnswer: two\n3?\nAnswer:"]
    assert ["".join(prompt) for prompt in prompts] == expected
    assert question_prompts(Tokenizer(None), "text", ["0?"]) == prompts[:1]
