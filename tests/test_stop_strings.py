"""Stop strings end a completion at the same token in every decoder, and are trained as its end."""

import copy
import json

import pytest
import torch
from fakes import EOS, Alphabet, tiny_policy

from grpo_core.batch import Task
from grpo_core.config.files import load_overrides
from grpo_core.model.loading import load_tokenizer
from grpo_core.sampling import plain_decoder, stop_strings
from grpo_core.sampling.graph_decoder import GraphDecoder
from grpo_core.sampling.live_rows import PaddedRows
from grpo_core.sampling.request import Draws
from grpo_core.sampling.sampler import Sampler
from grpo_core.sampling.stop_strings import StopStrings
from grpo_core.schema import ConfigError

PROMPTS = [[5, 6, 7], [8, 9], [4], [10, 11, 12, 13]]
TASKS = [Task(i, "p", ids, {}, seed=(0, 0, i)) for i, ids in enumerate(PROMPTS)]
STOP = ["fe", "k"]  # letters of the alphabet's tokens


def sample(policy, stop=(), tasks=TASKS, **options):
    sampler = Sampler(policy.model, Alphabet(), max_new_tokens=24, stop=stop, **options)
    rollouts = sampler.generate(tasks, 6)
    assert sampler.decoder_name == ("plain" if options.get("decoder") == "plain" else "fused")
    return rollouts


def rows(rollouts):
    return [ids[:n] for ids, n in zip(rollouts.completion_ids.tolist(), rollouts.lengths().tolist(), strict=True)]


def cut_naively(row, stop):
    """The row up to the token with which its text first has a stop string, one token after another."""
    (texts,) = [[Alphabet().batch_decode([row[: n + 1]])[0] for n in range(len(row))]]
    return next((row[: n + 1] for n, text in enumerate(texts) if any(s in text for s in stop)), row)


@pytest.mark.parametrize("options", [
    {"decoder": "plain"}, {"decoder": "auto"}, {"decoder": "plain", "rows_at_once": 5}, {"decoder": "auto", "rows_at_once": 5},
])  # fmt: skip
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(options):
    """Against the completions without stop strings, cut one token after another: ids, log-probs, texts, masks."""
    policy = tiny_policy(lora_noise=0.1)
    free, stopped = sample(policy), sample(policy, STOP, **options)
    want = [cut_naively(row, STOP) for row in rows(free)]
    assert rows(stopped) == want and want != rows(free)
    is_stopped = [any(s in text for s in STOP) for text in stopped.completions]
    assert 2 <= sum(is_stopped) < len(want)
    for i, row in enumerate(want):
        n = len(row)
        torch.testing.assert_close(stopped.rollout_logprobs[i, :n], free.rollout_logprobs[i, :n])
        assert (stopped.rollout_logprobs[i, n:] == 0).all() and (stopped.completion_ids[i, n:] == 0).all()
        assert bool(stopped.truncated[i]) == (not is_stopped[i] and EOS not in row)
        assert not is_stopped[i] or stopped.completions[i].endswith(tuple(STOP))
    assert stopped.completion_ids.shape[1] == max(map(len, want))


def test_the_rows_beside_it_do_not_matter():
    """A task alone draws what it draws beside others."""
    policy = tiny_policy(lora_noise=0.1)
    together = rows(sample(policy, STOP))
    alone = [row for task in TASKS for row in rows(sample(policy, STOP, [task]))]
    assert alone == together


@pytest.mark.parametrize("decoder", ["plain", "auto"])
def test_decoders_do_not_draw_to_the_end_what_has_stopped(decoder, monkeypatch):
    """Rows that have a stop string leave, so a batch of them takes a few steps."""
    policy, steps = tiny_policy(lora_noise=0.1), []
    for kind, name in ((PaddedRows, "append"), (GraphDecoder, "_compute_step")):
        own = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *args, own=own: steps.append(1) or own(self, *args))
    sampler = Sampler(policy.model, Alphabet(), max_new_tokens=200, stop=[chr(97 + i) for i in range(2, 16)], decoder=decoder)
    sampler.check_model()
    steps.clear()
    assert sampler.generate(TASKS, 2).completion_ids.shape[1] == 1
    assert len(steps) <= plain_decoder.STOP_EVERY


def test_a_stop_string_across_tokens_and_characters():
    """One token may complete it in its middle, and a character may have several tokens."""
    tokenizer = load_tokenizer("builtin:tiny")
    text = "<answer>é 42</answer> and more"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stop = StopStrings(["</answer>", "é"], tokenizer.batch_decode)
    first = next(n for n in range(len(ids)) if "é" in tokenizer.decode(ids[: n + 1]))
    draws = Draws(torch.tensor([ids]), torch.ones(1, len(ids)), torch.tensor([len(ids)]), torch.tensor([False]))
    cut = stop.cut(draws, 0)
    assert cut.lengths.tolist() == [first + 1] and cut.ended.tolist() == [True]
    cut = StopStrings(["</answer>"], tokenizer.batch_decode).cut(draws, 0)
    assert "</answer>" in tokenizer.decode(cut.ids[0]) and "</answer>" not in tokenizer.decode(cut.ids[0, :-1])
    untouched = StopStrings(["nowhere"], tokenizer.batch_decode).cut(draws, 0)
    assert untouched is draws
    found = stop.are_in(torch.tensor([ids, ids]), torch.tensor([len(ids), 1]))
    assert found.tolist() == [True, False]


def test_what_can_never_stop_a_completion_is_refused():
    """Nothing, a number, and the text of a token that is in no text."""
    for word, sentence in (
        ("sampling.stop=['']", "sampling.stop is .*; a text that ends a completion must not be empty"),
        ("sampling.stop=[a, 3]", "sampling.stop is .*; it must be a list of text or text"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_overrides([word])
    assert load_overrides(["sampling.stop=</answer>"]).sampling.stop_strings == ["</answer>"]
    tokenizer = copy.deepcopy(load_tokenizer("builtin:tiny"))
    with pytest.raises(ConfigError, match="sampling.stop has .*, but the token .* is never in a completion's text"):
        Sampler(tiny_policy().model, tokenizer, max_new_tokens=4, stop=[f"x{tokenizer.eos_token}"])


@pytest.mark.slow
def test_a_run_with_a_stop_string_trains_evaluates_and_samples_with_it(tmp_path, here):
    """The text given to rewards has the stop string, nothing follows it, and the completion is not truncated."""
    words = ["evaluation.num_tasks=8", "data.limit=50", "trainer.completions_per_step=16", "sampling.max_new_tokens=24", f"output_dir={tmp_path}"]
    done = here("train", "--config", "tiny", *words, "trainer.num_steps=1", "sampling.stop=[th, '4']")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "completions.jsonl").read_text().splitlines()]
    stopped = [row for row in lines if "th" in row["text"] or "4" in row["text"]]
    assert stopped and not any(row["truncated"] for row in stopped)
    assert all(row["text"].count("th") + row["text"].count("4") == 1 for row in stopped)
    evaluated = here("evaluate", tmp_path / "tiny", "--limit", "4")
    sampled = here("sample", tmp_path / "tiny", "Ada has 3 pens and buys 4 more. How many pens are left?")
    assert (evaluated.returncode, sampled.returncode) == (0, 0), evaluated.stderr + sampled.stderr




def decode_bytes(rows):
    """Texts of rows of bytes, where a part of a character alone is a replacement character."""
    return [bytes(row).decode(errors="replace") for row in rows]


def decode_stripped(rows):
    """Texts of rows of bytes without spaces around them, as SentencePiece decodes."""
    return [text.strip() for text in decode_bytes(rows)]


@pytest.mark.parametrize(("stop", "text", "decode"), [
    ("b→", "a b→", decode_bytes),  # its last character is of three tokens
    ("b ", "a b c", decode_stripped),  # a space alone has no text
])  # fmt: skip
def test_a_row_with_a_stop_string_is_reported_when_it_is_complete(stop, text, decode):
    stops, ids = StopStrings([stop], decode), torch.tensor([list(text.encode())])
    want = [stop in decode([ids[0, : n + 1].tolist()])[0] for n in range(ids.shape[1])]
    assert [bool(stops.are_in(ids, torch.tensor([n + 1]))) for n in range(ids.shape[1])] == want and any(want)


def test_only_rows_whose_newest_tokens_may_complete_a_stop_string_are_decoded():
    decoded = []
    stops = StopStrings(["x>"], lambda rows: decoded.extend(rows) or decode_bytes(rows))
    ids, lengths = torch.tensor([list(b"abc"), list(b"ac>"), list(b"bx>")]), torch.tensor([3, 3, 3])
    assert stops.are_in(ids, lengths).tolist() == [False, False, True]
    decoded.clear()
    assert stops.are_in(ids, lengths).tolist() == [False, False, True]
    assert list(b"abc") not in decoded and list(b"ac>") in decoded


def test_a_token_beyond_the_table_of_known_tokens_may_complete_a_stop_string():
    size = stop_strings.KNOWN_IDS
    texts = {size - 2: "a", size - 1: "b", size: "c", size + 1: ">"}
    stops = StopStrings([">"], lambda rows: ["".join(texts[i] for i in row) for row in rows])
    ids = torch.tensor([[size - 2] * 3, [size - 2, size - 1, size], [size - 2, size, size + 1]])
    for _ in range(2):
        assert stops.are_in(ids, torch.tensor([3, 3, 3])).tolist() == [False, False, True]


@pytest.mark.parametrize(("text", "stop"), [("a>b>c>", "c>"), ("aab", "ab"), ("a>>", ">"), ("b>", "a>"), (">>>>>x", ">x")])
def test_the_end_is_found_with_few_decodings(text, stop):
    count = []
    stops = StopStrings([stop], lambda rows: count.append(len(rows)) or decode_bytes(rows))
    ids = list(text.encode())
    end = next((n for n in range(1, len(ids) + 1) if stop.encode() in bytes(ids[:n])), None)
    assert stops.find(ids) == end
    count.clear()
    assert stops.find(ids) == end and sum(count) <= 1 + len(bin(text.count(stop[-1])))
    count.clear()
    assert stops.find(list(b"uvw")) is None and count == [3]  # its three tokens, which are new, and no text
