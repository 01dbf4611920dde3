"""The reference has everything that can be asked, set and read; /docs shows it, with a search."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from chromium import Chromium
from selenium.webdriver.common.by import By
from waiting import eventually

import loadmanager

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = loadmanager.reference_markdown()


def test_command_prints_the_reference_without_a_configuration_or_a_network(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "reference"],
        cwd=tmp_path, capture_output=True, text=True, timeout=30, env={},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == REFERENCE


EVERYTHING = [
    *(f"`{route.method} {route.path}` | {route.access} |" for route in loadmanager.ROUTES),
    *(f"`{path}`" for path, _ in loadmanager.config_keys()),
    *(f"| `{command.name}` | {command.about}" for command in loadmanager.COMMANDS),
    *(name for command in loadmanager.COMMANDS for one in command.all_arguments for name in one.names),
    *(f"`{metric.sample_name}`" for metric in loadmanager.METRICS),
    *(f"`{event}`" for event in (*loadmanager.LOG_EVENTS, *loadmanager.NOTIFY_EVENTS)),
    *(f"`{name}`" for name in (*loadmanager.VARIABLES, *loadmanager.METRIC_WORDS)),
    *(f"`{number}` | {about}" for number, about in loadmanager.EXITS.items()),
    *(f"`?{name}=`" for route in loadmanager.ROUTES for name in route.query),
    *(f"`{name}`" for route in loadmanager.ROUTES for name in (*(route.body or {}), *route.more_body)),
]


def test_everything_is_in_the_reference():
    positional = {"file", "run"}
    missing = [
        one
        for one in EVERYTHING
        if one not in REFERENCE and one not in positional and one.startswith(("`", "|", "-"))
    ]
    assert not missing, missing


def test_tables_have_as_many_cells_in_each_row_as_in_their_head():
    for chapter in [*loadmanager.route_chapters(), *loadmanager.reference_chapters()]:
        for row in chapter.rows:
            assert len(row) == len(chapter.columns), f"{chapter.title}: {row}"


def test_route_without_a_subject_cannot_be_declared():
    for route in loadmanager.ROUTES:
        assert loadmanager.resource_of(route.path)
    assert loadmanager.openapi_document()["paths"]["/v1/tests"]["post"]["tags"] == ["Runs"]


@pytest.mark.parametrize(
    "markdown, shown",
    [
        ("a **b** `<c> **d**` *e*", "<p>a <b>b</b> <code>&lt;c&gt; **d**</code> <em>e</em></p>"),
        ("- one\n- two\n  more", "<ul><li>one\n</li><li>two\n  more</li></ul>"),
        ("```yaml\na: <b>\n```", "<pre>a: &lt;b&gt;\n</pre>"),
        ("## T\n\nx", "<section><h2>T</h2><p>x</p></section>"),
        (
            "| a | b |\n| --- | --- |\n| `x\\|y` | <z> |",
            "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td><code>x|y</code></td>"
            "<td>&lt;z&gt;</td></tr></tbody></table>",
        ),
    ],
    ids=["words", "list", "code", "heading", "table"],
)
def test_markdown_of_the_reference_becomes_html(markdown, shown):
    assert loadmanager.html_of_markdown(markdown).strip() == shown


# ---- /docs ----


@pytest.fixture
def docs(lm):
    """The page in a browser, once its routes are shown."""
    with Chromium() as browser:
        browser.driver.get(f"{lm.url}/docs")
        eventually(
            lambda: browser.driver.find_elements(By.CSS_SELECTOR, "#routes details"), what="routes are shown"
        )
        yield browser


def shown(browser, css):
    """Texts of what a reader sees of these elements."""
    return [one.text for one in browser.driver.find_elements(By.CSS_SELECTOR, css) if one.is_displayed()]


def type_into_search(browser, words):
    field = browser.driver.find_element(By.ID, "search")
    field.clear()
    field.send_keys(words)


def test_docs_have_all_routes_by_subject_and_the_rest_of_the_reference(docs):
    assert shown(docs, "#routes h3")[:2] == ["Pages and sign-in", "Administration"]
    assert len(shown(docs, "#routes summary")) == len(loadmanager.ROUTES)
    headings = shown(docs, "#reference h2, #reference h3")
    assert {"Runs", "Commands", "Section storage", "Figures for Prometheus", "Events of the log"} <= set(
        headings
    )
    assert not docs.complaints()
    elsewhere = [url for url in docs.requests() if url.startswith("http") and "//127.0.0.1:" not in url]
    assert not elsewhere, "the page asks no other host"


def test_search_of_the_docs_finds_routes_keys_and_words_and_hides_the_rest(docs):
    type_into_search(docs, "retentiondays")
    rows = shown(docs, "#reference tbody tr")
    assert any(row.startswith("storage.retentionDays") for row in rows), rows
    assert not shown(docs, "#routes summary"), "no route has that word"
    type_into_search(docs, "stop every run")
    assert [text for text in shown(docs, "#routes summary") if "/v1/stop-all" in text]
    assert len(shown(docs, "#routes summary")) < 4
    type_into_search(docs, "no such words at all")
    assert shown(docs, "#found") == ["nothing has all these words"] and not shown(docs, "section")
    type_into_search(docs, "x\b")
    assert len(shown(docs, "#routes summary")) == len(loadmanager.ROUTES), "all is back"
