"""The words of the field stand in messages, help, reference and READMEs, in comments, docstrings and names;
those they took the place of do not come back."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import loadmanager

ROOT = Path(loadmanager.__file__).parent
SOURCE = Path(loadmanager.__file__).read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)

# What must not be said, and what is said instead; a pattern may leave out what it means elsewhere.
INSTEAD = {
    r"allowed (is|are)\b": "must be",
    r"(?<!in a )(?<!at the )\bmoments?\b": "time, timestamp, point in time",
    r"stands? twice": "is a duplicate",
    r"\b(is|are|was|were|who is) told\b": "is reported, is notified",
    r"\b[Ss]omebody|\b[Nn]obody": "someone, no one",
    r"\boftener\b|\banew\b": "more often, again",
    r"\bswarmed\b": "started",
    r"\brespread": "rebalance",
    r"so many workers|goes to \S+ workers?": "scale to",
    r"\bdoubtful\b": "unreliable",
    r"\bartefacts?\b": "attachment",
    r"whatever it does": "with retries",
    r"\bnonsense\b": "invalid response",
    r"never for now": "paused",
    r"\bruns? goes on\b": "is still running",
    r"\bstranger": "untrusted",
    r"\bFile twin\b": "`...File` variant",
    r"\bsilent for\b": "unreachable for",
}
HONEST = {
    "doubtful": "the value of the JSON key trust",
    "artefacts": "the table's name, which a database has had since its first version",
}
# What must not be said in comments and docstrings. Quotes between backticks are of the API or of code.
IN_COMMENTS = {
    r"\bmoments?\b": "time, timestamp, point in time",
    r"\btold\b|\b[Tt]ells? (of|that|whether)\b": "notified, reports",
    r"\b[Ss]omebody|\b[Nn]obody|\b[Aa]nybody": "someone, no one, anyone",
    r"\boftener\b|\banew\b": "more often, again",
    r"\bswarmed\b": "a test is started",
    r"\bbelieved\b": "cached, accepted, trusted",
    r"\bstranger": "untrusted",
    r"\bgo(es)? on\b": "continue, is still running",
    r"\bthe wire\b": "the API's JSON, the response body",
    r"\bkept beside a run\b": "attachment",
    r"\bsteady (seconds|clock)": "monotonic",
    r"\bdid it pass\b|\bwho may do what\b": "Thresholds and verdict; Authentication and authorization",
    r"\bstretch of a run": "time block",
    r"\bdoubtful\b(?!`)": "unreliable",
}
IN_NAMES = {
    r"^_?wire|_wire\b|^wire": "to_json, run_json, list_json",
    r"moment": "time, timestamp",
    r"artefact": "attachment",
    r"^note$|^_?note_": "record_sample, record_failure, on_change",
    r"(^|_)(MOST|LEAST)(_|$)": "MAX, MIN",
    r"^steady_s$|^Alarm$": "monotonic_s, ScheduledCall",
    r"heard_at": "last_seen_at",
    r"^doubts|DOUBTS|^_doubt": "unreliable_reasons",
    r"^(Plan|Engine|Watch|Journal|Record|Usage)$": "LoadProfile, Orchestrator, RunMonitor, DatabaseWriter,"
    " StoredRun, RateCounter",
    r"^NotAllowed$": "InvalidValue",
    r"^busy_with$|^claimed_users$": "active_run_id, reserved_users",
    r"^in_background$": "start_thread",
    r"^told$|(^|_)(is_told|told_)|^_?tell_|^_tell$": "reported, notify_, report_, print_",
}
HONEST_NAMES = {
    "note": "what an audit entry says of its request",
    "artefacts": "rows of the table of this name, which a database has had since its first version",
}


def docstrings() -> set[int]:
    with_body = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bodies = [node.body[0] for node in ast.walk(TREE) if isinstance(node, with_body)]
    return {id(first.value) for first in bodies if isinstance(first, ast.Expr)}


def texts() -> list[tuple[str, str]]:
    """Where, and what a user may read: the program's strings without docstrings, SQL and JavaScript."""
    left_out = docstrings()
    found = []
    for node in ast.walk(TREE):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in left_out:
            continue
        text = node.value
        is_code = re.match(r"\s*(SELECT|INSERT|CREATE|DELETE|UPDATE)\b", text) or "=> {" in text
        if not is_code and text not in HONEST:
            found += [(f"loadmanager.py:{node.lineno}", line) for line in text.splitlines()]
    for path in (ROOT / "README.md", *ROOT.glob("*/README.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [(f"{path.name} of {path.parent.name}", line) for line in lines]
    return found


@pytest.mark.parametrize("word", INSTEAD)
def test_word_that_was_replaced_does_not_come_back(word):
    pattern = re.compile(word)
    found = [f"{where}: {line.strip()}" for where, line in texts() if pattern.search(without_honest(line))]
    assert not found, f"say instead: {INSTEAD[word]}\n" + "\n".join(found)


def comments() -> list[tuple[str, str]]:
    """Where, and what a reader of the program reads beside its code, each comment and docstring a line."""
    read = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    found = [(f"loadmanager.py:{one.start[0]}", one.string) for one in read if one.type == tokenize.COMMENT]
    said = docstrings()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Constant) and id(node) in said:
            found.append((f"loadmanager.py:{node.lineno}", " ".join(str(node.value).split())))
    return found


@pytest.mark.parametrize("word", IN_COMMENTS)
def test_word_does_not_come_back_in_comments_and_docstrings(word):
    found = [f"{where}: {text}" for where, text in comments() if re.search(word, without_honest(text))]
    assert not found, f"say instead: {IN_COMMENTS[word]}\n" + "\n".join(found)


def names() -> set[str]:
    """What functions, classes, arguments, variables and attributes are called."""
    found = set()
    for node in ast.walk(TREE):
        for field in ("name", "arg", "id", "attr"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                found.add(name)
    return found


@pytest.mark.parametrize("word", IN_NAMES)
def test_word_does_not_come_back_in_names(word):
    found = sorted(name for name in names() - set(HONEST_NAMES) if re.search(word, name))
    assert not found, f"call it instead: {IN_NAMES[word]}\n" + "\n".join(found)


def without_honest(line: str) -> str:
    """The line without what it quotes of the API."""
    return re.sub(r"`[^`]*`|\"trust\": \"doubtful\"", "", line)


def test_every_word_is_found_where_it_is_said():
    """The patterns above can fail: each finds the words it is there for."""
    said = (
        "allowed is x, the moment, stands twice, who is told, somebody, anew, swarmed, respread,"
        " so many workers,"
        " doubtful, artefact, whatever it does, nonsense, never for now, the run goes on, a stranger,"
        " a File twin, was silent for 5 s"
    )
    assert [word for word in INSTEAD if not re.search(word, said)] == []
