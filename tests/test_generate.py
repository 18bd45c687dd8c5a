"""`generate` of an opened policy: texts and chats in, completions out."""

from dataclasses import replace

import pytest
import torch

from grpo_core.batch import Task
from grpo_core.commands.open_policy import make_prompt_tasks, open_source
from grpo_core.schema import ConfigError

QUESTION = "Question: Ada has 7 boxes with 6 pens each. How many pens has she?\n"
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture(scope="module")
def opened():
    return open_source("builtin:tiny", ["sampling.max_new_tokens=4"])


def test_long_runs_a_text_is_continued_as_it_is(opened):
    task = Task(0, QUESTION, opened.tokenizer(QUESTION)["input_ids"], {})
    (expected,) = opened.sampler.generate([task], 1, greedy=True).completions
    assert opened.generate([QUESTION]) == [expected] and expected
    assert opened.generate([QUESTION, "Question: What is 1 + 1?\n"])[0] == expected
    assert opened.generate([]) == []


def test_long_runs_a_completion_is_a_function_of_seed_and_place(opened):
    def draw(prompts=(QUESTION,) * 4, **settings):
        return opened.generate(list(prompts), temperature=1.0, max_new_tokens=12, **settings)

    first = draw(seed=1)
    assert first == draw(seed=1) and len(set(first)) > 1 and first != draw(seed=2)
    assert draw(prompts=[QUESTION], seed=1) == first[:1]
    small = replace(opened, config=replace(opened.config, evaluation=replace(opened.config.evaluation, batch_size=3)))
    assert small.generate([QUESTION] * 4, temperature=1.0, max_new_tokens=12, seed=1) == first


@pytest.mark.parametrize("limit", [2, 4, 12])
def test_long_runs_the_limit_may_be_above_that_of_the_run(opened, limit):
    length = len(opened.tokenizer(opened.generate([QUESTION], max_new_tokens=limit)[0])["input_ids"])
    assert length <= limit and (length > 4) == (limit > 4)
    assert opened.sampler.max_new_tokens == 4
    prefix = opened.generate([QUESTION], max_new_tokens=2, temperature=1.0)[0]
    assert opened.generate([QUESTION], max_new_tokens=limit, temperature=1.0)[0].startswith(prefix)


def test_long_runs_a_chat_goes_through_the_chat_template(opened, monkeypatch):
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 2 + 3?"}]
    monkeypatch.setattr(opened.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match=r"prompts\[0\] is a chat, but the model's tokenizer has no chat template"):
        opened.generate([chat])
    monkeypatch.setattr(opened.tokenizer, "chat_template", CHAT_TEMPLATE)
    text = "[system] Think.\n[user] What is 2 + 3?\n[assistant] "
    (task,) = make_prompt_tasks([chat], opened.tokenizer, 0)
    assert task.prompt == text and task.prompt_ids == opened.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert opened.generate([chat]) == opened.generate([text])


@pytest.mark.parametrize(
    "prompts, settings, sentence",
    [
        ("text", {}, "prompts is one text; it must be a list"),
        ([QUESTION, ""], {}, r"prompts\[1\] is empty"),
        ([3], {}, r"prompts\[0\] is '3'; it must be a text, or a list of messages"),
        ([["a", "b"]], {}, r"prompts\[0\] is .*; it must be a text, or a list of messages"),
        ([[{"role": "user"}]], {}, "it must be a text, or a list of messages with role and content"),
        ([{"role": "user", "content": "x"}], {}, r"prompts\[0\] is .*; it must be a text, or a list of messages"),
        (["\ud83d"], {}, r"prompts\[0\] has the lone surrogate"),
        ([QUESTION], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ([QUESTION], {"temperature": -1.0}, "temperature is -1.0"),
        ([QUESTION], {"max_new_tokens": 10**6}, "are together more than the model's"),
    ],
)
def test_long_runs_what_cannot_be_completed_is_refused(opened, prompts, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        opened.generate(prompts, **settings)


def test_long_runs_generating_changes_no_weight_and_no_random_state(opened):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    before = {name: p.clone() for name, p in opened.policy.model.named_parameters()}
    opened.generate([QUESTION], temperature=1.0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) for name, p in opened.policy.model.named_parameters())
