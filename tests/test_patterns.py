"""Whoever sends a text decides its length: no pattern of ours may take more than a time in proportion to it."""

from __future__ import annotations

import ast
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from acestep import words
from acestep.lm.metadata import parse_lyrics, parse_reasoning
from deployments.ingress.openai.messages import looks_like_lyrics

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 100_000  # a quadratic pattern takes minutes for it
SHORT = {"acestep/words.py": words.MAX_CHARS}  # files whose patterns are shown no longer texts
CPU_S = 5.0
FLAGS = {name: getattr(re, name) for name in ("IGNORECASE", "DOTALL", "MULTILINE", "ASCII", "VERBOSE")}
CALLS = ("compile", "match", "search", "fullmatch", "sub", "split", "findall", "finditer")


def patterns() -> Iterator[tuple[str, str | bytes, int, bool]]:
    """Every pattern that stands in our sources: (where, pattern, flags, whether it is looked for anywhere in a text)."""
    for path in sorted([*ROOT.glob("acestep/**/*.py"), *ROOT.glob("deployments/**/*.py")]):
        name = str(path.relative_to(ROOT))
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            named = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
            text: ast.expr | None = None
            if named and node.func.value.id == "re" and node.func.attr in CALLS:  # type: ignore[attr-defined]
                text = node.args[0]
            for keyword in node.keywords:
                if keyword.arg == "pattern":
                    text = keyword.value
            if text is None or isinstance(text, ast.Name):  # the operator's own
                continue
            flags = re.NOFLAG
            for flag in (n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)):
                flags |= FLAGS.get(flag, re.NOFLAG)
            where = f"{name}:{node.lineno}"
            yield where, _written(text), flags, _anywhere(tree, node)


def _anywhere(tree: ast.Module, made: ast.Call) -> bool:
    """Whether a pattern is used otherwise than from a text's beginning."""
    method = made.func.attr if isinstance(made.func, ast.Attribute) else "search"
    if method != "compile":
        return method not in ("match", "fullmatch")
    assigned = [n.targets[0] for n in ast.walk(tree) if isinstance(n, ast.Assign) and n.value is made]
    names = [target.id for target in assigned if isinstance(target, ast.Name)]
    used = [
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in names
    ]
    return not used or not set(used) <= {"match", "fullmatch"}


def _written(text: ast.expr) -> str | bytes:
    """The pattern; what is put into an f-string is some word."""
    if isinstance(text, ast.Constant) and isinstance(text.value, (str, bytes)):
        return text.value
    if isinstance(text, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "word" for p in text.values)
    if isinstance(text, ast.BinOp):  # text % number
        left = _written(text.left)
        return left.replace(b"%d", b"64") if isinstance(left, bytes) else left.replace("%d", "64")
    if isinstance(text, ast.Call):  # "|".join(words)
        return "word|other word"
    raise AssertionError(f"a pattern that this test cannot read: {ast.dump(text)}")


def attacks(pattern: str, length: int) -> Iterator[str]:
    """Long texts made of what the pattern looks for, which end otherwise."""
    found = {w for w in re.findall(r"[A-Za-z_]+|[^A-Za-z_\s\\]", pattern) if w}
    literal = re.sub(r"\\([^A-Za-z0-9])", r"\1", re.sub(r"\(\?[^)]*\)|\\[A-Za-z]|[()*+?^$]", "", pattern))
    pumps = {*found, literal, " ", "\n", "\t", "a", "A", "0", "a ", "a\n", "a.", ", ", "/a", "0,", "[a", " \n", "<a>"}
    starts = {"", "A", "a", "# language\n", "<", "[", *(w for w in found if w.isalpha()), literal[:40]}
    for pump in sorted(pumps - {""}):
        long = (pump * length)[:length]
        for start in sorted(starts):
            yield f"{start}{long}\x01"


def _late(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError


@pytest.fixture
def quick() -> Iterator[None]:
    """Processor time, which the machine's other work does not change. The matcher lets signals in."""
    before = signal.signal(signal.SIGVTALRM, _late)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


FOUND = list(patterns())


def read_key(text: str) -> object:
    return words.readable(words.read_key, text)


def test_patterns_are_found_where_they_stand() -> None:
    assert len(FOUND) > 30
    assert any("messages" in where for where, *_ in FOUND)


@pytest.mark.parametrize(("where", "pattern", "flags", "anywhere"), FOUND, ids=[where for where, *_ in FOUND])
def test_no_pattern_takes_longer_than_its_text(where: str, pattern: str | bytes, flags: int, anywhere: bool) -> None:
    before = signal.signal(signal.SIGVTALRM, _late)
    length = SHORT.get(where.partition(":")[0], LENGTH)
    is_bytes = isinstance(pattern, bytes)
    compiled = re.compile(pattern, flags)
    try:
        for text in attacks(pattern.decode("latin-1") if is_bytes else pattern, length):
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
            (compiled.search if anywhere else compiled.fullmatch)(text.encode("utf-8", "replace") if is_bytes else text)  # type: ignore[arg-type]
    except TimeoutError:
        pytest.fail(f"{where}: {pattern!r} on {text[:60]!r}...")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize(
    "text",
    ["<prompt>", "<lyrics>", "<think>", "<think></think", "# language\n", "\n", " ", "A ", "<|audio_code_1", "caption: ", "[", "'"],
)  # fmt: skip
@pytest.mark.parametrize("start", ["", "A", "</think># language\n", "<think>caption: '"])
@pytest.mark.parametrize("read", [read_key, words.is_instrumental, parse_lyrics, parse_reasoning, looks_like_lyrics])
def test_what_reads_texts_takes_no_longer_either(read: object, text: str, start: str, quick: None) -> None:
    read(start + text * (20_000 // len(text)) + "\x01")  # type: ignore[operator]
