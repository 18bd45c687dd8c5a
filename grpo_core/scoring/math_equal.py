r"""The reward `math_equal`: the completion's answer equals a gold answer, in whatever form both are written.

Numbers are read and compared exactly (objective/numbers.py). Other answers (roots, variables, sets, intervals,
matrices, equations) are parsed and compared by the library math-verify, in a child process with a time limit.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from grpo_core.objective.answers import final_text, find_answer, normalise_text
from grpo_core.objective.numbers import final_number, read_gold, states_equation
from grpo_core.objective.rewards import REWARDS, cut_all_thinking
from grpo_core.objective.units import KNOWN_UNIT, LENGTH
from grpo_core.scoring.deadline import check_seconds, compute_deadline
from grpo_core.scoring.limited_calls import LimitedCalls

PERCENTS = ("either", "number", "fraction")  # what 50% equals: 50 and 0.5, 50, or 0.5
UNITS = ("ignore", "compare")
MAX_CHARS = 500  # of an answer; a longer one is a solution and cannot be judged
DIGITS = 6  # significant ones to which a decimal must equal a gold answer that is not whole
WARM_UP = (r"\frac{1}{2}", r"2\sqrt{3}", "(x+1)^2", r"\{1, 2\}", "x=3", "[0, 1)")  # the parser is slow at first

_MINUS = re.compile("[−–‐‑‒﹣－]")
_PERCENT = re.compile(r"\s{0,3}(?:\\?%|％|\bper\s?cent\b)")
_DELIMITERS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_CURRENCY = re.compile(r"(?:\\\$|[€£¥])\s*")
_LATEX_UNIT = re.compile(r"\\(?:text(?:rm|bf|it)?|math(?:rm|bf|it)|mbox)\s*\{\s*([^{}]*?)\s*\}|\\[,;:! ]|~")
_UNIT = r"""(?P<unit>[A-Za-zµΩ°]+(?:\s?[/·*]\s?[A-Za-z]+)*)
    \s?(?:\^?\s?\{?(?P<power>[-−]?[1-9])\}?|(?P<raised>[²³]))?"""
_UNIT_AT_END = re.compile(rf"(?<=[\d)}}\s]){_UNIT}\s*\Z", re.X)
_UNIT_BEHIND_NUMBER = re.compile(rf"(?<=\d)\s?{_UNIT}(?![A-Za-z])", re.X)
_POWER = r"(?:\s?\^?\s?\{?[1-9]\}?|[²³])"
_TEXT_UNIT = re.compile(
    rf"""(?<=[\d)}}\]i])(?:\\[,;:! ]|[~\s])*\\(?:text(?:rm|bf|it)?|math(?:rm|bf|it)|mbox)\s*
        \{{[A-Za-z°/·.\s]+{_POWER}?\}}{_POWER}?\Z""",
    re.X,
)
_WORD_UNIT = re.compile(  # of letters: a unit, or a word longer than a product of variables is
    rf"""(?:(?<=[\d)}}\]])\s*|(?<=\\pi)\s+(?!hr\b))
        (?: (?:{LENGTH}|(?:square|cubic|sq|cu)\s[A-Za-z]{{1,12}}){_POWER}?
          | (?:{KNOWN_UNIT}) | (?<=\s)(?:[A-Za-z]{{5,}}|[msgL]{_POWER}?) )
        (?:\s(?:{KNOWN_UNIT}|[A-Za-z]{{4,}}|of)){{0,2}}\Z""",
    re.X,
)
_RAISED = str.maketrans("²³−", "23-")
_SIGNS = [
    (re.compile(r"√\s?\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s?(\d+(?:\.\d+)?|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹]+"), lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}"),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])|π"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\])(?=(?:sin|cos|tan|log|ln)[ (])"), r"\\"),
    (re.compile(r"(?<=[\w)}])\s?[*·×]\s?(?=[\w(\\])"), r" \\cdot "),
    (re.compile(r"\\varnothing(?![A-Za-z])|∅"), r"\\emptyset "),
    (re.compile("∞"), r"\\infty "),
]
_WORDS = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*")  # "no solution", but not x, whose brackets may be an interval's
_PRODUCT = re.compile("[b-df-hj-np-tv-z]{2,4}|[abcxyz]{2,4}")  # of variables: xy, abc; "on" and ABC are words
_NAMES = "pi infinity infty and or sin cos tan log ln exp sqrt gcd lcm min max mod frac in"
_COMMANDS = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"(?<![A-Za-z\d)}^_])[A-Za-z]{2,}(?![A-Za-z\d^_(])")
_EQUATION = re.compile(  # of variables, such as 2x + y = 5: it is not the number 5, as x = 5 and 2 + 3 = 5 are
    r"(?:(?<![A-Za-z\\])[A-Za-z]\s*[-+*/^]|[-+*/^\d]\s*[A-Za-z](?![A-Za-z]))[^=]*="
)
_BASE = re.compile(r"\d\s*_\s*\{?\s*(?:\\text\s*\{\s*)?(\d+)")  # 12_8 is a number to the base 8
_CLAUSES = re.compile(r"=|≈|\bis\b|\bare\b|:")


def read_golds(value: Any) -> list[str] | None:
    """Return the gold answers of a row as texts, or None if it has none of at most MAX_CHARS. A list accepts any item.

    A text with an answer mark, a box or "answer is" is read as a completion is: "...so it is #### 7" is 7.
    """
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in read_golds(item) or ()] or None
    if value is None or isinstance(value, (bool, dict, set)):
        return None
    text = str(value).strip()
    marked = find_answer(text, strict=True)
    text = text if marked is None else marked.strip()
    return [text] if 0 < len(text) <= MAX_CHARS else None


def final_answer(text: str) -> Fraction | str | None:
    """Return the final number of a completion, else its final text, for a majority vote."""
    number = final_number(text)
    return final_text(text) if number is None else number


@functools.cache
def load_library() -> None:
    """Import the library, and let its parser see a few expressions."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit of its own
    for text in WARM_UP:
        _parse(text)


def _check_percent(value: str) -> str | None:
    return None if value in PERCENTS else f"it must be one of {', '.join(PERCENTS)}"


def _check_units(value: str) -> str | None:
    return None if value in UNITS else f"it must be one of {', '.join(UNITS)}"


def _check_seconds(value: float) -> str | None:
    return None if 0 < value < float("inf") else "it must be above 0"


@REWARDS.register(
    "math_equal",
    never_null=("answer",),
    gold={"answer": read_golds},
    answer=final_answer,
    argument_limits={
        **{"percent": _check_percent, "units": _check_units},
        **dict.fromkeys(("seconds", "reward_timeout"), _check_seconds),
    },
    needs=("math_verify", "math"),
    own_process=True,
    prepare=load_library,
    check_arguments=check_seconds,
)
def math_equal(
    completions: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    answer: Sequence[Any],
    percent: str = "either",
    units: str = "ignore",
    seconds: float = 2.0,
    strict: bool = False,
    outside_thinking: bool = False,
    reward_timeout: float = 30.0,
) -> list[float | None]:
    r"""1.0 if the completion's answer equals that of the column `answer` in whatever form, else 0.0; None without one.

    3/4, 0.75 and \frac{3}{4} are equal, as are 2\sqrt{3} and \sqrt{12}, (x+1)^2 and x^2+2x+1, {1,2} and 2, 1. The
    answer stands after the last ####, else in the last \boxed{}, else after "answer is", else (unless `strict`) in the
    last line. A comparison of more than `seconds` counts as not equal; None for those beyond `reward_timeout`. It uses
    https://github.com/huggingface/Math-Verify.
    """
    load_library()
    deadline = compute_deadline(reward_timeout)
    texts = cut_all_thinking(completions, prompts) if outside_thinking else completions
    judged: dict[tuple[str, str], bool | None] = {}  # a group often has the same answer several times
    rewards: list[float | None] = []
    for text, gold in zip(texts, answer, strict=True):
        golds = read_golds(gold)
        if golds is None:
            rewards.append(None)
            continue
        final = _find_final(text, strict)
        number = final_number(text, strict=strict)
        results: list[bool | None] = []
        for wanted in golds if final is not None else ():
            key = (f"{number} {final}", wanted)
            if key not in judged:
                judged[key] = _is_equal(
                    final, number, wanted, percent, units, min(seconds, deadline - time.monotonic())
                )
            results.append(judged[key])
        rewards.append(1.0 if True in results else None if None in results else 0.0)
    return rewards


def _find_final(text: str, strict: bool) -> str | None:
    r"""Return the answer of a completion; where its line is only \[, \] or $$, the last displayed formula."""
    final = find_answer(text, strict=strict)
    if final is None or final.strip().rstrip(".") not in ("\\[", "\\]", "$$"):
        return final
    end, opening = max((text.rfind(closing), opening) for opening, closing in (("\\[", "\\]"), ("$$", "$$")))
    start = text.rfind(opening, 0, max(end, 0))
    return text[start + 2 : end].strip() if start >= 0 else final


def _is_equal(final: str, number: Fraction | None, gold: str, percent: str, units: str, seconds: float) -> bool | None:
    """Return whether the answer `final`, which is the number `number` unless that is None, equals `gold`.

    None if only the library can say it, and no `seconds` are left.
    """
    if len(final) > MAX_CHARS:
        if number is None:
            return False
        final = final[-MAX_CHARS:]
    if units == "compare" and (unit := read_unit(gold)) and unit not in _read_units(final):
        return False
    is_equation = "=" not in gold and states_equation(final)
    number = None if is_equation else number
    scales = _list_scales(bool(_PERCENT.search(gold)), bool(_PERCENT.search(final)), percent)
    gold_numbers = None if _EQUATION.search(gold) else read_gold(gold)
    if gold_numbers is not None and number is not None:
        return any(
            _is_near(number * scale, value * gold_scale) for value in gold_numbers for gold_scale, scale in scales
        )
    if _squeeze(final) == _squeeze(gold) != "":
        return True
    bases = [match[1] for match in map(_BASE.search, (gold, final)) if match]
    if len({*bases}) == 2:  # the library does not see them
        return False
    if _WORDS.fullmatch(words := normalise_text(gold)) and normalise_text(final) == words:
        return True
    if (listed := _list_items(gold)) is not None and listed == _list_items(final):
        return True
    if is_equation:  # of which the library takes the right side
        return False
    if not _list_words(gold) <= _list_words(final):  # the library takes words for products of their letters
        return False
    if seconds <= 0:
        return None
    tidied = (_tidy(gold), _tidy(final))
    forms = dict.fromkeys([tidied, (_cut_unit(tidied[0]), _cut_unit(tidied[1]))])  # 6hr is 6rh, and 6 hours
    pairs = [(_scale(form[0], gold_scale), _scale(form[1], scale)) for form in forms for gold_scale, scale in scales]
    return any(_COMPARISONS.call(*pair, seconds=seconds) for pair in pairs)


def _list_words(text: str) -> set[str]:
    """Return the words of an answer in lower case: those in letters, and without a digit those in text commands too."""
    text = _cut_unit(_tidy(text))
    if not re.search(r"\d", text):
        text = _LATEX_UNIT.sub(lambda match: f" {match[1] or ''} ", text)
    words = _WORD.findall(_COMMANDS.sub(" ", text))
    return {word.casefold() for word in words if not _PRODUCT.fullmatch(word)} - {*_NAMES.split()}


def _list_items(text: str) -> set[str] | None:
    r"""Return the items of a list of words, such as \text{blue, red}, in lower case; None for any other answer.

    Their order makes no difference, as in the library's lists of numbers and of texts. Items in parentheses have one.
    """
    plain = _LATEX_UNIT.sub(lambda match: f" {match[1] or ''} ", _DELIMITERS.sub("", text))
    plain = re.sub(r"\[{}]", "", plain).strip().rstrip(".")
    items = [" ".join(item.split()).casefold() for item in re.split(r",\s*(?:and\s)?|\sand\s", plain)]
    are_words = all(_WORDS.fullmatch(item) and not _PRODUCT.fullmatch(item) for item in items)
    return {*items} if len(items) > 1 and are_words else None


def _list_scales(gold_is_percent: bool, is_percent: bool, percent: str) -> list[tuple[Fraction, Fraction]]:
    """Return the pairs of factors of gold answer and answer with which the two are compared."""
    whole, hundredth = Fraction(1), Fraction(1, 100)
    if gold_is_percent == is_percent:
        return [(whole, whole)]
    as_fraction = (hundredth, whole) if gold_is_percent else (whole, hundredth)
    return {"number": [(whole, whole)], "fraction": [as_fraction]}.get(percent, [(whole, whole), as_fraction])


def _is_near(number: Fraction, gold: Fraction) -> bool:
    """Return whether two numbers are equal, to DIGITS significant digits if `gold` is not whole."""
    if number == gold or gold.denominator == 1:
        return number == gold
    try:
        return f"{float(number):.{DIGITS}g}" == f"{float(gold):.{DIGITS}g}"
    except OverflowError:
        return False


def read_unit(text: str) -> str:
    r"""Return the unit at the end of an answer, such as "m^2" of "25 m2" and of "25 \text{ m}^2"; empty if none."""
    text = _clean_units(text)
    if currency := _CURRENCY.match(text):
        return _name_currency(currency)
    match = _UNIT_AT_END.search(text)
    return "" if match is None else _name_unit(match)


def _read_units(text: str) -> set[str]:
    """Return the unit at the end of an answer, and those behind the numbers in it, which may be a sentence."""
    cleaned = _clean_units(text)
    behind = {_name_unit(match) for match in _UNIT_BEHIND_NUMBER.finditer(cleaned)}
    return {read_unit(text)} | behind | {_name_currency(match) for match in _CURRENCY.finditer(cleaned)}


def _clean_units(text: str) -> str:
    if len(re.findall(r"(?<!\\)\$", text)) == 1:  # no delimiter
        text = text.replace("$", r"\$")
    text = _DELIMITERS.sub("", _LATEX_UNIT.sub(lambda match: f" {match[1] or ''}", text)).strip().rstrip(".")
    return re.sub(r"\^\s?\{?\s?\\circ\s?\}?|\\degree", "°", text)


def _name_currency(match: re.Match) -> str:
    return match[0].strip().lstrip("\\")


def _name_unit(match: re.Match) -> str:
    """Return a unit with its power in one spelling: "m^2", "km/hour"."""
    words = re.split(r"\s*[/·*]\s*", match["unit"])
    words = [word.lower().removesuffix("s") if len(word) > 3 else word for word in words]
    power = (match["power"] or match["raised"] or "").translate(_RAISED)
    return "/".join(words) + (f"^{power}" if power else "")


def _squeeze(text: str) -> str:
    """Return an answer without spaces, delimiters, text commands, and punctuation at its end."""
    text = _LATEX_UNIT.sub(lambda match: match[1] or "", _MINUS.sub("-", text))
    return re.sub(r"\s|\\left(?![a-z])|\\right(?![a-z])|\*\*", "", _DELIMITERS.sub("", text)).rstrip(".,;")


def _tidy(text: str) -> str:
    """Return an answer without percent sign, currency sign, and punctuation at its end."""
    text = _PERCENT.sub("", _MINUS.sub("-", text)).strip().rstrip(".,;").rstrip()
    if len(_DELIMITERS.findall(text)) == 2 and _DELIMITERS.match(text) and _DELIMITERS.search(text[-2:]):
        text = _DELIMITERS.sub("", text).strip()
    return _CURRENCY.sub("", _write_latex(text))


def _write_latex(text: str) -> str:
    r"""Return an answer with the LaTeX of signs and names that the library does not know: √2, x², 2*pi, ∅."""
    for pattern, replacement in _SIGNS:
        text = pattern.sub(replacement, text)
    return text


def _cut_unit(text: str) -> str:
    return _WORD_UNIT.sub("", _TEXT_UNIT.sub("", text))


def _scale(text: str, scale: Fraction) -> str:
    return text if scale == 1 else rf"\frac{{{text}}}{{{scale.denominator}}}"


def _parse(text: str) -> list[Any]:
    """Return the expressions in an answer; the whole of it is one unless it marks them by $ or \\(."""
    from math_verify import parse

    marked = text if _DELIMITERS.search(text) else f"${text}$"
    return parse(marked, _make_targets(), fallback_mode="no_fallback", parsing_timeout=None)


@functools.cache
def _make_targets() -> list[Any]:
    """Return what the library looks for: its own settings, but units stay, for it takes the ab of 6ab for one."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    latex = LatexExtractionConfig()
    normalization = dataclasses.replace(latex.normalization_config, units=False)
    return [dataclasses.replace(latex, normalization_config=normalization), ExprExtractionConfig()]


def _compare(gold: str, answer: str) -> bool:
    """Return whether two answers are equal as expressions.

    Where `gold` is no equation, what stands behind the last = or "is" of `answer` may be the equal one.
    """
    from math_verify import verify

    wanted = _parse(gold)
    if not wanted:
        return False
    if verify(wanted, _parse(answer), timeout_seconds=None):
        return True
    clause = _CLAUSES.split(answer)[-1].strip()
    may_differ = clause not in ("", answer) and "=" not in gold
    return may_differ and verify(wanted, _parse(clause), timeout_seconds=None)


_COMPARISONS = LimitedCalls(_compare)
