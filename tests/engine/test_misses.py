"""Prompts that begin as an indexed prefix does, but not with the whole of it, on the server's metrics."""

from tests.engine.conftest import engine, generate, tokens

PREFIX = tokens(seed=1, count=600)
DIFFERING = [PREFIX[:length] + [7] + PREFIX[length + 1 :] for length in (16, 300, 470)]


def test_misses_are_counted_by_cause(models, indexes):
    model = models("llama")
    index = indexes(model, PREFIX)
    with engine(model, index) as llm:
        generate(llm, [PREFIX + [5], PREFIX[:479], PREFIX[:40], *DIFFERING, PREFIX[:15], [7] * 100], num_tokens=1)
        generate(llm, DIFFERING[:1], num_tokens=1)
        found = {
            (metric.labels["index"], metric.labels["cause"]): metric.value
            for metric in llm.get_metrics()
            if metric.name == "vllm:squeeze_misses"
        }
    assert found == {(index.name, "too short"): 2, (index.name, "differs"): 4}
