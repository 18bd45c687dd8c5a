r"""Read the number that a text states as its answer.

`final_number` reads a completion, `read_gold` a gold answer. Both are exact (fractions) and take time linear in the
text. They understand signs, thousands commas, currency signs, units, percent signs, decimals, exponents (1e3,
1 \times 10^{3}), fractions (3/4, \frac{3}{4}, \tfrac34) and mixed numbers (1 1/2). An expression that is not one
number, such as 2\sqrt{3}, 3x or 10:30, is none.

Groups of three digits (1'234, and 1 234 with a thin or no-break space) are one number. With an ordinary space they are
one number behind an answer mark and in a box; elsewhere, as in "rows 5 600", they may be two numbers and are none.
"""

import re
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from typing import Any

from grpo_core.objective.answers import find_last_box
from grpo_core.objective.units import KNOWN_UNIT

MAX_NUMBER_CHARS = 300  # a longer number counts as no number: exact arithmetic with it would be slow
MAX_EXPONENT = 300  # of ten, for the same reason
MAX_CANDIDATES = 64  # last numbers of a text among which the one that stands alone is looked for
LINE = 200  # characters before the last number in which its line begins
WINDOW = 24  # characters before a number that decide whether it belongs to a unit, a root or a power

_MINUS_SIGNS = "−–‐‑‒﹣－"
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_VULGAR |= {"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys(_MINUS_SIGNS, "-"),
        **{sign: f" {fraction} " for sign, fraction in _VULGAR.items()},
        **{"％": "%", "，": ",", "．": ".", "⁄": "/", "＝": "=", "＋": "+"},
        **dict.fromkeys("º˚", "°"),
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_GROUPS = r"(?<![\d.,])(?<!\d[{0}])[1-9]\d{{0,2}}(?:[{0}]\d{{3}})++(?!\d|[{0}]\d)"  # begins only where a run does
_SPACED_GROUPS = re.compile(_GROUPS.format(" "))
_REPLACEMENTS = [
    (re.compile(_GROUPS.format("\u00a0\u2009\u202f'’")), lambda match: re.sub(r"\D", "", match[0])),
    (re.compile(r"\\[,!]|\{,\}"), lambda match: "," if match[0] == "{,}" else ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[;: ]|~|\\q?quad(?![A-Za-z])|[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"\\(?:left|right|text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox)(?![A-Za-z])"), ""),
    (re.compile(r"\^\s?(?:\\circ(?![A-Za-z])|\{\s?\\circ\s?\})|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\\approx(?![A-Za-z])"), "≈"),
    (re.compile(r"\\[lr]?vert(?![A-Za-z])"), "|"),
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+"), lambda match: "^" + match[0].translate(_SUPERSCRIPTS)),
]
_FRACTION = re.compile(
    r"""\\[dtc]?frac\s*
        (?:\{\s?(?P<top>-?\s?\d[\d,]*(?:\.\d+)?)\s?\}|(?P<top_digit>\d))\s*
        (?:\{\s?(?P<under>-?\s?\d+)\s?\}|(?P<under_digit>\d))""",
    re.X,
)
_PLAIN = r"[$€£¥]?[ ]?(?:\d[\d,]*+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:[ ]?/[ ]?\d+|[ ]\d+/\d+)?"
# The sign of |-5| and -|5|, of -(5), -**5** and -((-5)).
_ABSOLUTE = re.compile(rf"(?:(?<![\w|)}}\]])\|[-+]|(?<=-)\|[-+]?|(?<=-[ ])\|[-+]?)[ ]?({_PLAIN})\|(?![\w|])")
_SIGN_OF_BRACKET = re.compile(
    rf"""(?P<sign>-[ ]?|\b(?:minus|negative)[ ]{{1,2}})(?P<open>(?:[({{\[][ ]?|\*\*|\*){{1,4}})(?P<inner>[-+][ ]?)?
        (?P<number>{_PLAIN}(?:[ ]?[A-Za-z°%]{{1,20}}){{0,3}}\.?)(?P<close>(?:[ ]?[)}}\]]|\*\*|\*){{1,8}})""",
    re.X | re.I,
)
_CLOSING = {"(": ")", "{": "}", "[": "]", "**": "**", "*": "*"}
_HIDDEN_SIGN = re.compile(r"(?<![\w)}\]])-(?:\\?[({\[|][ ]?|\\[A-Za-z]+[ ]?\{)+\Z")  # of a number in another bracket
_POWER = r"\s?(?:\^|\*\*)\s?(?:\{\s?([-+]?\d{1,9})\s?\}|([-+]?\d{1,9}))"
_TIMES_POWER_OF_TEN = re.compile(r"(?<=\d)[ ]{0,4}(?:\\times|\\cdot|[×·*x])\s{0,4}10" + _POWER)
_POWER_OF_TEN = re.compile(r"(?<![\w.,/*^])10" + _POWER)

_NUMBER = re.compile(
    r"""(?P<sign>-[ ]{0,2})?(?:[$€£¥][ ]?(?P<inner_sign>-[ ]?)?)?
        (?P<value>
            (?<![\d.,])[1-9]\d{0,2}(?:\.\d{3})+,\d{1,2}(?![\d.,])    # 1.234,50
          | (?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?(?![\d,])   # 12,34,567
          | \d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)
          | \d+(?:\.\d+)?
          | (?<!\d)\.\d+
        )
        (?P<exponent>[eE][-+]?\d++(?!\w))?
        (?: [ ]?/[ ]?(?P<under>\d++)(?![.,]++\d)
          | [ ]{1,2}(?P<top>\d++)[ ]?/[ ]?(?P<bottom>\d++)(?![.,]++\d) )?""",
    re.X,
)
_MARK = re.compile(
    r"""(?<!\#)\#{4}(?!\#)
        (?: \s | \*\*? | \\?[(\[] | [{$€£¥~≈:=] | \\f?boxed | [A-Za-z]{1,3}[ ]?=
          | (?:the\s)?(?:final\s)?answer(?:\s(?:is|was))? )*+
        (?=(?:(?:minus|negative)[ ]{1,2})?[-+]?[ ]{0,2}[$€£¥]?[ ]?-?[ ]?\.?\d | [-+]?\\(?!boxed))""",
    re.X | re.I,
)
_HEADING = re.compile(r"\d{1,2}(?:[.):][ \t]+[A-Za-z]|st\b|nd\b|rd\b|th\b)")  # "#### 2. Compute", "#### 2nd step"

_COMMANDS = "sqrt pi pm mp infty frac dfrac tfrac log ln sin cos tan exp le leq ge geq lt gt ne neq in cup cap begin"
_COMMANDS += " binom overline sum int theta alpha beta ldots dots cdots div cdot times"
_NOT_A_NUMBER = re.compile(
    r"[<>≤≥≠±√π∞∪∈]|\\(?:" + "|".join(_COMMANDS.split()) + r")(?![A-Za-z])|(?<![A-Za-z])(?:sqrt|pi)(?![A-Za-z])"
)
_ATTACHED = re.compile(r"(?:[A-Za-zµΩ]|(?<=[\w)}\]])_\s?\{?\s?|\^\s?\{?\s?[-+]?|(?<=\w)\*\*)\Z")  # m2, m^2, x_1, CO2
_CURRENCY_CODE = re.compile(r"(?<![A-Za-z])(?:USD|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD|Rs|RM|US)\Z")
_COMMAND_BEFORE = re.compile(r"\\([A-Za-z]++)\Z")
_ROOT_BEFORE = re.compile(
    r"(?:\\[dtc]?frac\s?\{|\}\s?\{|\\sqrt(?:\[[^\]]*\])?\s?\{?|√\s?[({]?|sqrt\s?\(?|\\log(?:_\S+)?|\\pi)\s?-?\Z"
)
_EXPRESSION_AFTER = re.compile(
    r"""[ ]?\}?[ ]?(?:\\(?:sqrt|pi|log|ln|sin|cos|tan|theta|overline|infty)(?![A-Za-z]) | [√π^] | _\{?\d | \*\*[ ]?\d)
      | [ ]?(?:sqrt|pi)(?![A-Za-z]) | [xyzinabqruvw](?![A-Za-z]) | [ ][xyz]{2,3}(?![A-Za-z])
      | (?!(?:"""
    + KNOWN_UNIT
    + r""")(?![A-Za-z]))[A-Za-z]{2,3}(?![A-Za-z])""",  # 6xy, 4ac
    re.X,
)
_OPERATOR_AFTER = re.compile(
    r"[ ]?(?:[+×÷·]|\*[ ]?[\w(\\]|/[ ]?(?![A-Za-z]{2})|-[ ]?(?:\d|[A-Za-z](?![A-Za-z])|\\)|:\d|,\d"
    r"|\\(?:pm|mp|cdot|times|div)(?![A-Za-z])|[xyz](?![A-Za-z]))"
)
_OPERATOR_BEFORE = re.compile(r"(?:[\w)}\]][ ]?[+*/×÷·^]|\\(?:pm|mp|cdot|times|div))[ ]?\Z")
_SUBTRACTION_BEFORE = re.compile(r"(?:[\d)}\]][ ]*|(?<![A-Za-z])[A-Za-z][ ]*|\w)\Z")
_OPEN_END = re.compile(r"!|\.\.|…")  # a factorial, a repeating decimal
_SIGN_BEFORE = re.compile(r"(?:[=(\[{:≈<>*×·/+,$]|\b(?:is|equals|was|be))\Z", re.I)
_PLAIN_GOLD = re.compile(r"(?<!#)####[ ]?(-?[0-9]{1,15})\Z|\A(-?[0-9]{1,15})\Z")  # most answers: read at once
_MINUS_WORD = re.compile(r"(?:(?P<negative>\bnegative)|\bminus)[ ]\Z", re.I)
_SCALED = re.compile(  # behind a number of a gold answer: its value is another one
    r"""[ ]?\{?[ ]?(?:tenth|dozen|lakh|crore|half|(?:hundred|thousand|[mbtr]illion|quadrillion)(?:th)?)s?(?![A-Za-z])
      | [ ](?:squared|cubed|factorial)(?![A-Za-z]) | [ ]and[ ](?:a|one)[ ](?:half|third|quarter|fifth)(?![A-Za-z])
      | (?-i:[kKMBe])(?![A-Za-z]) | [ ]?(?-i:bn|mn|mln|mio|mrd|tn)\.?(?![A-Za-z])""",
    re.X | re.I,
)
_SCALED_AMOUNT = re.compile(r"[$€£¥][ ]?[\d.,]{1,40}[ ][kKMB][.)}\]*]{0,4}\s*\Z")  # $6 M; without $ it may be a unit
_SCALED_BEFORE = re.compile(r"\b(?:half|third|quarter|twice|thrice|double|triple|times|plus)[ ](?:of[ ])?\Z", re.I)
_TWO_EQUATIONS = re.compile(  # x = 5, y = 6
    r"(?:\A|=)[ ]?-?[\d./]+[ ]?(?:[,;](?!\d)|and\b|or\b)(?:[ ]?(?:and|or)\b)?[ ]?[A-Za-z](?:_\w{1,9})?[ ]?="
)
_CLAUSE_END = re.compile(
    r"""[;:\n⇒→] | ,(?!\d) | \\(?:implies|Rightarrow|quad) | => | \.\s
      | \b(?:so|and|or|is|are|then|thus|get|gives|if|when)\b(?:\s?\})?""",
    re.X,
)
_SUBSCRIPTED = re.compile(r"(?<![A-Za-z])[A-Za-z]_(?:\w|\{\w{1,9}\})")
_BESIDE_VARIABLE = re.compile(  # 2x, x + 1, x^2, \sqrt{x}, (x + 1), |x|, sin x; but not "5 a day"
    r"""(?:[+*/^×·(|√}]\s?|\d(?:\s(?!a\b))?|(?<!\w)-\s?|[ ]-\s?|\}\s?\{\s?|\\[A-Za-z]++\s?[{(]?
          |\b(?:sqrt|sin|cos|tan|log|ln)(?:\s\(?|\())
        (?P<right>[a-z])(?![A-Za-z]|-[A-Za-z]{2})
      | (?<![A-Za-z\\])(?P<left>[a-z])(?=\s?(?:[+*/^×·]|-(?![A-Za-z]{2})|\\(?:cdot|times)))""",
    re.X,
)
_SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z])|\n")


def final_number(text: str, *, strict: bool = False) -> Fraction | None:
    r"""Return the final number of `text` as an exact fraction, or None if it has none.

    It is the one after the last answer mark ####, else the one in the last \boxed{}, else (unless `strict`) the last
    number of the text. A heading such as "#### Step 3" is no answer mark. A box must hold one number.

    >>> final_number("so she has 3 + 4 = 7 left.\n#### 1,234.50 dollars")
    Fraction(2469, 2)
    """
    text = _clean(text)
    marked = _find_marked(text)
    if marked is None:
        return None if strict else _last_number(text)
    answer, is_box = marked
    if states_equation(answer):
        return None
    return _only_number(answer) if is_box else _first_number(answer)


def read_gold(value: Any) -> set[Fraction] | None:
    """Return the numbers that a gold answer accepts, or None if it cannot be read as a number.

    A text needs an answer mark or a box with exactly one number, or a last sentence with exactly one. "5 million",
    "3 : 4", "5!" and "5 or 6" are not one number, nor is the right side of an equation of one unknown, "2x = 4". A list
    accepts any of its items.
    """
    if isinstance(value, (list, tuple)):
        numbers = [number for item in value for number in read_gold(item) or ()]
        return set(numbers) or None
    if value is None or isinstance(value, (bool, dict, set)):
        return None
    if plain := _PLAIN_GOLD.search(str(value)):
        return {Fraction(plain[1] or plain[2])}
    text = _clean(str(value))
    if _SCALED_AMOUNT.search(text):
        return None
    marked = _find_marked(text)
    if marked is not None:
        number = _gold_number(marked[0])
    else:
        number = _gold_number(text)
        sentences = [part for part in _SENTENCE_END.split(text) if part.strip()]
        if number is None and len(sentences) > 1:
            number = _gold_number(sentences[-1])
    return None if number is None else {number}


def states_equation(text: str) -> bool:
    """Return True if the right side of the last clause belongs to an equation of one unknown, such as 2x + 1 = 5.

    x = 5, 2 + 3 = 5, A = r^2 = 5 and a + b = 5 give the value of what stands on the left.
    """
    clauses = [part for part in _CLAUSE_END.split(text) if "=" in part]
    if not clauses:
        return False
    left, _, right = clauses[-1].partition("=")
    left = re.sub(r"(?<=[\d.])\s?x\s?(?=[($.\d])", "*", left)  # 5 x 3 = 15
    if len(set(_SUBSCRIPTED.findall(left))) > 1:  # x_1 + x_2 = 4
        return False
    if re.search(r"\d\s?[A-Za-z]", right):  # 3 * 5 m = 15 m has units
        return False
    if re.match(r"[\s$\\(\[{*]{0,8}[A-Za-z]\s?\([^()]{0,20}\)\s?\Z", left):  # f(2)
        return False
    variables = {match["left"] or match["right"] for match in _BESIDE_VARIABLE.finditer(left)} - {"e"}
    return bool(variables) and (len(variables) == 1 or bool(re.search(r"\d", left)))


def _gold_number(text: str) -> Fraction | None:
    """Return the number of a gold answer that has exactly one, without a word that changes its value."""
    if _TWO_EQUATIONS.search(text) or states_equation(text):
        return None
    for match in _standing_alone(text):
        before = text[max(0, match.start() - WINDOW) : match.start()]
        if _SCALED.match(text, match.end()) or _SCALED_BEFORE.search(before):
            return None
    return _only_number(text)


def _clean(text: str) -> str:
    """Return the text with one spelling for each sign, space, fraction and power of ten."""
    for pattern, replacement in _REPLACEMENTS[:1]:  # before the spaces lose their kind
        text = pattern.sub(replacement, text)
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REPLACEMENTS[1:]:
        text = pattern.sub(replacement, text)
    if "frac" in text:
        text = _FRACTION.sub(_write_fraction, text)
    text = _join_signs(text)
    if "10" in text:
        text = _TIMES_POWER_OF_TEN.sub(lambda match: f"e{match[1] or match[2]} ", text)
        text = _POWER_OF_TEN.sub(lambda match: f"1e{match[1] or match[2]} ", text)
    return text


def _join_signs(text: str) -> str:
    if "-" in text or re.search("minus|negative", text, re.I):
        text = _SIGN_OF_BRACKET.sub(_write_sign, _ABSOLUTE.sub(r"\1", text))
    return text


def _write_sign(match: re.Match) -> str:
    """Return a number with its sign directly in front of it, without the brackets between the two."""
    opened = re.findall(r"\*\*|\S", match["open"])
    closed = re.findall(r"\*\*|\S", match["close"])
    if [_CLOSING[sign] for sign in reversed(opened)] != closed[: len(opened)]:
        return match[0]
    sign = "+" if (match["inner"] or "").startswith("-") else match["sign"]
    return sign + match["number"] + "".join(closed[len(opened) :])


def _write_fraction(match: re.Match) -> str:
    top, under = (match["top"] or match["top_digit"]), (match["under"] or match["under_digit"])
    top, under = top.replace(" ", "").replace(",", ""), under.replace(" ", "")
    sign = "-" if top.startswith("-") != under.startswith("-") else ""
    space = " " if match.string[match.start() - 1 : match.start()].isdigit() else ""  # a mixed number
    fraction = f"{sign}{top.lstrip('-')}/{under.lstrip('-')}"
    is_negated = sign and match.string[max(0, match.start() - 2) : match.start()].rstrip(" ").endswith("-")
    return f"({fraction})" if is_negated else space + fraction


def _find_marked(text: str) -> tuple[str, bool] | None:
    """Return the line behind the last answer mark, else the last box, and whether it is a box; None without either.

    Groups of three digits are joined there.
    """
    after = None
    for match in _MARK.finditer(text):
        if not _HEADING.match(text, match.end()):
            after = match
    answer = find_last_box(text) if after is None else text[after.end() :].partition("\n")[0]
    if answer is None:
        return None
    answer = answer if after else _join_signs(answer)  # -\\boxed{-5}
    return _SPACED_GROUPS.sub(lambda match: match[0].replace(" ", ""), answer), after is None


def _first_number(line: str) -> Fraction | None:
    """Return the number at the beginning of the line behind an answer mark, or None if that is an expression."""
    if re.search(r"\d", result := line.rpartition("=")[2]):
        line = result
    match = _NUMBER.search(line)
    if match is None or _NOT_A_NUMBER.search(line[: match.start()]):
        return None
    if _is_in_expression(line, match) or _OPERATOR_AFTER.match(line, match.end()):
        return None
    return _value(line, match, is_start=True)


def _only_number(text: str) -> Fraction | None:
    """Return the number of a text that has exactly one, or whose part after the last = has; else None."""
    if re.search(r"\d", result := re.split("[=≈]", text)[-1]):
        text = result
    candidates = list(islice(_standing_alone(text), 2))
    if len(candidates) != 1 or _NOT_A_NUMBER.search(text):
        return None
    match = candidates[0]
    before = text[max(0, match.start() - WINDOW) : match.start()]
    may_subtract = match["sign"] and before.strip() and not _SIGN_BEFORE.search(before.rstrip())
    if may_subtract and (match["sign"] != "-" or _SUBTRACTION_BEFORE.search(before)):
        return None
    if _is_in_expression(text, match) or _OPERATOR_BEFORE.search(before):
        return None
    if _OPERATOR_AFTER.match(text, match.end()) or _OPEN_END.match(text, match.end()):
        return None
    return _value(text, match, is_start=True)


def _last_number(text: str) -> Fraction | None:
    """Return the last number of the text; None if it has none or that is part of an expression."""
    for match in reversed(deque(_NUMBER.finditer(text), maxlen=MAX_CANDIDATES)):  # a list would be slow
        if _is_in_expression(text, match):
            return None
        if not _is_attached(text, match):
            line = text[max(0, match.start() - LINE) : match.end()].rpartition("\n")[2]
            is_equation = line.startswith("####") and states_equation(line)  # elsewhere it is a step of the solution
            return None if is_equation or _is_ambiguous(text, match) else _value(text, match, is_start=False)
    return None


def _standing_alone(text: str) -> Iterator[re.Match]:
    """Yield the numbers of the text that are not part of a unit, an exponent or a subscript."""
    for match in _NUMBER.finditer(text):
        if not _is_attached(text, match):
            yield match


def _is_attached(text: str, match: re.Match) -> bool:
    """Return True for the 2 of m2, m^2, x_2 and CO2."""
    start = match.start("value")
    before = text[max(0, start - WINDOW) : start]
    if not _ATTACHED.search(before) or _CURRENCY_CODE.search(before):
        return False
    command = _COMMAND_BEFORE.search(before)
    return command is None or command[1] in _COMMANDS.split()


def _is_in_expression(text: str, match: re.Match) -> bool:
    r"""Return True for a number beside a root, a power or a variable, or in a fraction with one: the 2 of 2\sqrt{3}."""
    start = match.start("value")
    return bool(_ROOT_BEFORE.search(text[max(0, start - WINDOW) : start]) or _EXPRESSION_AFTER.match(text, match.end()))


def _is_ambiguous(text: str, match: re.Match) -> bool:
    """Return True if the number is the end of 0,75 or of 12 345, which may be one number or two."""
    before = text[max(0, match.start() - WINDOW) : match.start()]
    return bool(
        re.search(r"(?:\A|[^\d,.])\d{1,15},\Z", before)
        or (re.fullmatch(r"\d{3}", match["value"]) and re.search(r"(?:\A|[^\d,.])\d{1,3} \Z", before))
    )


def _value(text: str, match: re.Match, *, is_start: bool) -> Fraction | None:
    """Return a match of `_NUMBER` with its sign; `is_start`: a minus at the beginning of the text is a sign."""
    if len(match[0]) > MAX_NUMBER_CHARS or abs(int((match["exponent"] or "e0")[1:])) > MAX_EXPONENT:
        return None
    if _HIDDEN_SIGN.search(text[max(0, match.start() - WINDOW) : match.start()]):
        return None
    digits = match["value"]
    if re.search(r"\.\d{3},|\.\d{3}\.", digits):  # 1.234,50
        digits = digits.replace(".", "").replace(",", ".")
    value = Fraction(digits.replace(",", "")) * Fraction(10) ** int((match["exponent"] or "e0")[1:])
    for name in ("under", "bottom"):
        if match[name] and not int(match[name]):
            return None
    if match["under"]:
        value /= int(match["under"])
    elif match["bottom"]:
        part = Fraction(int(match["top"]), int(match["bottom"]))
        if part >= 1 or value.denominator != 1:  # two numbers, not a mixed one
            return None if is_start else part
        value += part
    return -value if match["inner_sign"] or _is_negative(text, match, is_start) else value


def _is_negative(text: str, match: re.Match, is_start: bool) -> bool:
    """Return True if the minus in front of the number is a sign: not a hyphen, a subtraction or a list's dash."""
    before = text[max(0, match.start() - WINDOW) : match.start()]
    if not match["sign"]:
        word = _MINUS_WORD.search(before)
        ahead = before[: word.start()].rstrip() if word else ""
        is_sign = word and (word["negative"] or not ahead or _SIGN_BEFORE.search(ahead))
        return bool(is_sign)  # and not a subtraction, as in "ten minus 5"
    if match["sign"] == "-":
        is_hyphen, is_subtraction = re.match(r"\w", before[-1:]), re.match(r"[\d)\]}]", before.rstrip()[-1:])
        return not is_hyphen and not is_subtraction
    before = before.rstrip(" ")
    return bool(_SIGN_BEFORE.search(before)) or (is_start and not text[: match.start()].strip())
