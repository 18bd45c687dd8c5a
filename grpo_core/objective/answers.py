r"""Read the answer that a text states in words or as the letter of a choice.

An answer stands after an answer mark (####), in the last \boxed{}, or after words such as "the answer is". All readers
take time linear in the text.
"""

import re
import unicodedata
from typing import Any

OPEN, CLOSE = "<think>", "</think>"
CHOICE_LETTERS = "ABCDEFGHIJ"
MAX_ANSWER_CHARS = 2000  # a longer text is a solution, not an answer

_MARK = re.compile(r"(?<!#)####(?!#)[ \t]*(?=[^\s#])")
_HEADING = re.compile(r"(?:step|part|case|section|solution|explanation|approach|note|summary|conclusion)\b", re.I)
_SAYS = re.compile(r"\banswer(?:\s+is|\s*:)\s*:?", re.I)
_SAYS_CHOICE = re.compile(
    r"""\b(?:answer|choice|option)(?:\s{1,3}(?:is|was))?\s{0,3}:?\s{0,3}(?:option\s|choice\s)?
        [\s*_$(\[{"']{0,6}(?P<letter>[A-Za-z])(?![A-Za-z'’])(?P<space>\s[a-z])?""",
    re.X | re.I,
)
_ENCLOSED = re.compile(
    r"""[(\[](?P<letter>[A-Z])[)\]] | \*\*(?P<bold>[A-Z])[.):]?\*\*
      | (?m:^)[^\w\n]{0,8}(?P<line>[A-Z])[^\w\n]{0,8}(?m:$)""",
    re.X,
)
_LEADING_LETTER = re.compile(
    r"""[^\w\\]{0,8}(?:\\text[^\w]{0,8})?(?:(?:option|choice)\s)?[^\w]{0,8}
        (?P<letter>[A-Za-z])(?![A-Za-z0-9'’])(?P<space>\s{1,3}\w)?""",
    re.X | re.I,
)
_BRACES = re.compile(r"(?P<box>\\f?boxed\s*\{)|\\.|[{}]", re.S)
_SIGN_OF_BOX = re.compile(  # not the dash of a list
    r"""(?:(?<![\w)}\]])[-−–]|(?:(?<=[=:]\s)|(?<=\bis\s))[-−–]\s)(?:\*\*|\\[,!]|[${(])?\Z""", re.X
)
_LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}")
_LEADING_POINT = re.compile(r"(?:\A|[^.])\.\Z")  # of .5, but not of ...5
_EDGES = " \t\r\n.,;:!?\"'`*_$()[]{}“”‘’«»"


def cut_thinking(text: str, prompt: str | None = None) -> str:
    """Return the text after its reasoning, which ends at the last </think>.

    It is empty where a reasoning that the text or the prompt has opened (<think>) is not closed.
    """
    _, closed, after = text.rpartition(CLOSE)
    if closed:
        return after.partition(OPEN)[0]
    before, opened, _ = text.partition(OPEN)
    if prompt is not None and prompt.rstrip().endswith(OPEN):
        return ""
    return before if opened else text


def find_last_box(text: str) -> str | None:
    r"""Return the content of the last \boxed{} that is closed, or None. A minus in front of the box belongs to it."""
    open_braces: list[int] = []  # where the content of a box begins; -1 for other braces
    box = None
    for match in _BRACES.finditer(text) if "boxed" in text else ():
        if match["box"]:
            open_braces.append(match.end())
        elif match[0] == "{":
            open_braces.append(-1)
        elif match[0] == "}" and open_braces and (start := open_braces.pop()) >= 0:
            box = (start, match.start())
    if box is None:
        return None
    content, start = text[box[0] : box[1]], text.rindex("\\", 0, box[0])
    if not _SIGN_OF_BOX.search(text[max(0, start - 8) : start]):
        return content
    return f"-({content})" if re.search(r"[-−–+=\s]", content) else f"-{content}"


def normalise_text(text: str) -> str:
    """Return the text for a comparison: Unicode NFKC, no case, single spaces, no punctuation at either end.

    The point of .5 and the minus of -5 are no punctuation.

    >>> normalise_text(" **The  Eiffel Tower.** ")
    'the eiffel tower'
    """
    text = _LATEX_TEXT.sub(r"\1", text) if "\\" in text else text
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    bare = text.lstrip(_EDGES)
    is_decimal = bare[:1].isdecimal() and _LEADING_POINT.search(text[: len(text) - len(bare)][-2:])
    return ("." if is_decimal else "") + bare.rstrip(_EDGES)


def find_answer(text: str, *, strict: bool = False) -> str | None:
    r"""Return the text in which a completion states its answer, or None.

    It is the line after the last ####, else the content of the last \boxed{}, else what follows the last "answer is" or
    "answer:" on its line, else (unless `strict`) the last line.
    """
    answer = _marked_text(text)
    if answer is None:
        if ends := [match.end() for match in _SAYS.finditer(text)]:
            answer = text[ends[-1] :].strip().partition("\n")[0]
        elif not strict:
            answer = text.strip().rpartition("\n")[2]
    return answer


def final_text(text: str, *, strict: bool = False) -> str | None:
    """Return the normalised answer of a completion (see `find_answer`), or None if it has none."""
    answer = find_answer(text, strict=strict)
    answer = normalise_text(answer[:MAX_ANSWER_CHARS]) if answer else ""
    return answer or None


def accepted_texts(value: Any) -> set[str] | None:
    """Return the normalised answers that a gold answer accepts, or None if it has none. A list accepts any item."""
    if isinstance(value, (list, tuple)):
        return {text for item in value for text in accepted_texts(item) or ()} or None
    if value is None or isinstance(value, (dict, set)):
        return None
    text = str(value)
    marked = _marked_text(text)
    text = normalise_text(text if marked is None else marked)
    return {text} if 0 < len(text) <= MAX_ANSWER_CHARS else None


def check_letters(letters: str) -> str | None:
    """Return what the letters of choices must be, or None if they are that."""
    is_set = re.fullmatch("[A-Za-z]+", letters) and len({*letters.upper()}) == len(letters)
    return None if is_set else f"it must be letters from A to Z, none of them twice, such as {CHOICE_LETTERS}"


def final_choice(text: str, letters: str = CHOICE_LETTERS, *, strict: bool = False) -> str | None:
    r"""Return the letter of the choice that a completion makes, in upper case, or None if it makes none.

    It is the letter at the beginning of a marked answer (#### B, \boxed{B}), else the last one said as in "the answer
    is (B)", else (unless `strict`) the last one in brackets, in bold or alone on a line.
    """
    letters, marked = letters.upper(), _marked_text(text)
    if marked is not None:
        return _leading_letter(marked, letters)
    letter = None
    for match in _SAYS_CHOICE.finditer(text):
        is_article = match["letter"] in "aAI" and match["space"]  # "the answer is a number"
        if match["letter"].upper() in letters and not is_article:
            letter = match["letter"].upper()
    if letter is None and not strict:
        for match in _ENCLOSED.finditer(text):
            candidate = match["letter"] or match["bold"] or match["line"]
            letter = candidate if candidate in letters else letter
        if letter is None and len(text.strip()) <= 2:
            letter = _leading_letter(text, letters)
    return letter


def accepted_choices(value: Any, letters: str = CHOICE_LETTERS) -> set[str] | None:
    """Return the letters that a gold answer accepts: "B", "(B)", "B) Paris", "#### B", a list of them; else None."""
    if isinstance(value, (list, tuple)):
        return {letter for item in value for letter in accepted_choices(item, letters) or ()} or None
    if not isinstance(value, str):
        return None
    marked = _marked_text(value)
    text = value if marked is None else marked
    letter = _leading_letter(text, letters.upper())
    return None if letter is None else {letter}


def _leading_letter(text: str, letters: str) -> str | None:
    match = _LEADING_LETTER.match(text.lstrip())
    if match is None or match["space"]:  # "A dog" begins with a word, "A) dog" with a letter
        return None
    letter = match["letter"].upper()
    return letter if letter in letters else None


def _marked_text(text: str) -> str | None:
    """Return the line after the last answer mark, else the content of the last box, else None."""
    after = None
    for match in _MARK.finditer(text):
        if not _HEADING.match(text, match.end()):
            after = match.end()
    return find_last_box(text) if after is None else text[after:].partition("\n")[0]
