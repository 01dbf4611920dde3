"""The dashboard in a real Chromium, against the real program and a real Locust. Screenshots:
tests/output/."""

from __future__ import annotations

import csv
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from chromium import Chromium
from conftest import API_TOKEN, CALLBACK_TOKEN, cluster_config, create_body
from control_plane import ControlPlane
from locust_process import LocustCluster, find_free_port
from seeded_runs import HOSTILE, ODD_NAMES, SeededRuns, failing
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from target import Target
from waiting import eventually

import loadmanager

EIGHT_HOURS_S = 8 * 3600
NOBODY, NOBODY_ELSE = (
    (ODD_NAMES[3][:200], ODD_NAMES[1]),
    ("tenant-2", "dev"),
)  # tenant and environment of clusters where nothing answers
LOCUSTFILE = """
import sys
sys.path.insert(0, %r)
from locust import HttpUser, constant_pacing, task
import loadmanager_hooks

class Visitor(HttpUser):
    wait_time = constant_pacing(0.1)

    @task(3)
    def browse(self):
        self.client.get("/api/items")

    @task
    def odd(self):
        self.client.get("/api/odd", name=%r)
"""


class Page:
    """The dashboard as a person meets it."""

    def __init__(self, browser: Chromium, plane: ControlPlane) -> None:
        self.browser, self.driver, self.plane = browser, browser.driver, plane

    def open(self, place: str = "#/") -> None:
        self.driver.get("about:blank")  # a change of the fragment alone would not load the page
        self.driver.get(f"{self.plane.url}/{place}")

    def sign_in(self, token: str = API_TOKEN) -> None:
        self.driver.delete_all_cookies()
        self.open()
        self.one("#token").send_keys(token + Keys.ENTER)

    def one(self, css: str):
        return eventually(lambda: self.driver.find_element(By.CSS_SELECTOR, css), what=css)

    def all(self, css: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str = "main") -> str:
        return self.driver.execute_script(
            "const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", css
        )

    def shows(self, words: str, css: str = "main", within_s: float = 10.0) -> None:
        eventually(lambda: words in self.text(css), within_s, 0.05, f"{css} shows {words!r}")

    def press(self, label: str, within: str = "body") -> None:
        find = (
            "return [...document.querySelectorAll(arguments[0] + ' button')].find(b => "
            "b.innerText.trim() === arguments[1] && b.offsetParent && !b.disabled)"
        )
        eventually(lambda: self.driver.execute_script(find, within, label), what=f"button {label}").click()

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def points(self) -> int:
        return self.driver.execute_script("return view.group ? view.group.points.length : 0")

    def is_wider_than_the_window(self) -> bool:
        return self.driver.execute_script("return document.documentElement.scrollWidth > innerWidth")


@pytest.fixture(scope="module")
def browser():
    with Chromium() as browser:
        browser.size(1400, 1000)
        yield browser


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """A Load Manager with 1,000 runs, a long one, a failed one, odd names; and no Locust."""
    folder = tmp_path_factory.mktemp("seeded")
    ids = {}
    with SeededRuns(folder / "lm.db") as runs:
        for number in range(1000):
            runs.finished(
                ("checkout", "browse", "search")[number % 3],
                age_s=90_000 - number * 60,
                samples=2,
                **(failing() if number % 9 == 0 else {}),
            )
        for name in ODD_NAMES:
            name = name[:256]
            runs.finished(
                name, tenant_id=name, env_id=name, cluster_id=name, at_create={"metadata": {name: name}}
            )
        ids["odd"] = runs.finished(
            HOSTILE + "long" * 40,
            endpoint_names=ODD_NAMES,
            at_create={"metadata": {name: name for name in ODD_NAMES}},
            warnings=(HOSTILE,),
            failure_reason=HOSTILE,
        )
        ids["failed"] = runs.finished("checkout", **failing())
        ids["many"] = runs.finished("many endpoints", endpoints=500, fail_percent=1)
        ids["long"] = runs.finished(
            "soak", age_s=EIGHT_HOURS_S + 600, seconds=EIGHT_HOURS_S, samples=EIGHT_HOURS_S, fail_percent=0.3
        )
    clusters = [
        {"id": cluster_id, "baseUrl": "http://127.0.0.1:9", "tenantId": tenant_id, "envId": env_id}
        for cluster_id, (tenant_id, env_id) in ((HOSTILE, NOBODY), ("two", NOBODY_ELSE))
    ]
    with ControlPlane(folder, clusters) as plane:
        plane.ids = ids
        yield plane


@pytest.fixture
def page(browser, seeded):
    page = Page(browser, seeded)
    page.sign_in()
    page.shows("Recent runs")
    return page


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A Load Manager and a real Locust of two workers that calls back every second."""
    hooks = str(Path(__file__).resolve().parent.parent / "locust")
    folder, port = tmp_path_factory.mktemp("live"), find_free_port()
    environment = {
        "CONTROL_PLANE_URL": f"http://127.0.0.1:{port}",
        "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN,
        "METRICS_PUSH_INTERVAL": "1",
        "TENANT_ID": "tenant-1",
        "ENV_ID": "dev",
    }
    with Target(fail_ratio=0.02) as target:
        with LocustCluster(
            LOCUSTFILE % (hooks, HOSTILE), workers=2, env=environment, extra_args=["--host", target.url]
        ) as locust:
            clusters = [{"id": "local", "baseUrl": locust.base_url, "tenantId": "tenant-1", "envId": "dev"}]
            with ControlPlane(folder, clusters, port=port) as plane:
                yield plane


# ---- with a real Locust ----


def test_person_signs_in_starts_a_test_sees_it_grow_stops_it_and_finds_the_report(browser, live):
    page = Page(browser, live)
    page.sign_in()
    page.shows("Nothing is running.")
    page.shows("No finished run yet")
    page.shows("Idle", ".cluster")
    browser.screenshot("no-runs")

    page.press("Start a test")
    page.one("#start-dialog")
    fields = page.all("#start-dialog input")
    for field, text in zip(fields[:4], ("checkout", "many", "20", "1h30x"), strict=True):
        field.clear()
        field.send_keys(text)
    page.press("Start test")
    page.shows("a whole number from 1", "#start-dialog")
    page.shows("like 90s, 5m or 1h30m", "#start-dialog")
    browser.screenshot("start-refused")
    for field, text in ((fields[1], "12"), (fields[3], "2m")):
        field.clear()
        field.send_keys(text)
    page.driver.execute_script(
        "document.querySelectorAll('#start-dialog details').forEach((one) => (one.open = true))"
    )
    page.all("#start-dialog textarea")[-1].send_keys(f"ticket=PERF-1\nnote={HOSTILE}")
    page.press("Start test")

    page.shows("Running", ".run-head", 20)
    run_id = page.driver.current_url.rsplit("/", 1)[1]
    run = live.call("GET", f"/v1/tests/{run_id}")[1]
    assert (run["targetUsers"], run["durationSeconds"], run["metadata"]) == (
        12,
        120,
        {"ticket": "PERF-1", "note": HOSTILE},
    )
    before = eventually(page.points, 15)
    eventually(lambda: page.points() > before + 3, 15, what="the chart grows by itself")
    page.shows("/api/items", ".tabpanel", 15)
    page.shows(HOSTILE, ".tabpanel")
    page.one("#tab-workers").click()
    eventually(lambda: len(page.all(".tabpanel tbody tr")) == 2, 15, what="two workers")
    page.one("#tab-endpoints").click()
    browser.screenshot("running")

    page.press("Stop")
    page.shows("Stop this test?", "dialog")
    assert page.driver.switch_to.active_element.text == "Cancel", "Enter alone must not stop a test"
    page.keys(Keys.ESCAPE)
    eventually(lambda: not page.all("dialog"), what="Escape closes the dialog")
    assert live.call("GET", f"/v1/tests/{run_id}")[1]["status"] == "Running", "not confirmed, so not stopped"
    page.press("Stop")
    page.press("Stop test", "dialog")
    page.shows("Finished", ".run-head", 40)
    eventually(lambda: live.call("GET", f"/v1/tests/{run_id}")[1]["status"] == "Finished")
    final = live.call("GET", f"/v1/tests/{run_id}")[1]["lastMetrics"]
    page.shows(f"{final['totalRequests']:,}", ".tiles")
    browser.screenshot("finished")
    assert page.one("#report").get_attribute("href") == f"{live.url}/v1/tests/{run_id}/report.html"

    page.press("Run again")
    page.press("Start test", "dialog")
    eventually(lambda: run_id not in page.driver.current_url, 20)
    page.shows("Running", ".run-head", 20)
    page.one(".brand").click()
    page.shows("checkout", "#h-running + *, main")
    page.press("Stop", "tr[data-run]")
    page.press("Stop test", "dialog")
    page.shows("Nothing is running.", within_s=40)
    page.press("Delete", f"tr[data-run='{run_id}']")
    page.press("Delete run", "dialog")
    eventually(lambda: not page.all(f"tr[data-run='{run_id}']"))
    assert live.call("GET", f"/v1/tests/{run_id}")[0] == 404


def test_report_opens_from_the_page_of_a_run_with_the_cookie_alone(page):
    run_id = page.plane.ids["failed"]
    page.open(f"#/runs/{run_id}")
    page.one("#report").click()
    tabs = eventually(lambda: page.driver.window_handles if len(page.driver.window_handles) > 1 else None)
    try:
        page.driver.switch_to.window(tabs[-1])
        has_reports = any(route.path == "/v1/tests/{id}/report.html" for route in loadmanager.ROUTES)
        page.shows("checkout" if has_reports else "there is no such path", "body")
        assert page.driver.current_url.endswith(f"{run_id}/report.html")
    finally:
        page.driver.close()
        page.driver.switch_to.window(tabs[0])


# ---- sign-in ----


def test_wrong_token_is_refused_in_words_and_nothing_is_shown(browser, seeded):
    page = Page(browser, seeded)
    page.sign_in("wrong")
    page.shows("not a valid API token", ".sign-in")
    assert "Recent runs" not in page.text() and not page.driver.get_cookies()


def test_token_is_nowhere_a_script_could_read_it(page):
    kept = page.driver.execute_script(
        "return document.cookie + JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + "
        "document.documentElement.outerHTML"
    )
    assert API_TOKEN not in kept and "loadmanager_" not in kept
    assert page.driver.get_cookies()[0]["httpOnly"] is True


def test_sign_out_leaves_nothing_on_the_screen(page):
    page.press("Sign out")
    page.one("#token")
    assert "checkout" not in page.text("body")
    page.open()
    page.one("#token")


# ---- what cannot happen ----


def test_page_asks_no_other_host_for_anything(page):
    page.browser.requests()
    for place in ("#/", *(f"#/runs/{run_id}" for run_id in page.plane.ids.values())):
        page.open(place)
        page.shows("All runs" if "runs/" in place else "Recent runs")
    asked = {
        urlsplit(url).netloc
        for url in page.browser.requests()
        if urlsplit(url).scheme not in ("data", "about")
    }
    assert asked == {f"127.0.0.1:{page.plane.port}"}


def test_hostile_names_are_text_and_never_markup(page):
    page.browser.complaints()
    page.one("#filter").send_keys("<script>")
    page.shows(HOSTILE)
    page.open(f"#/runs/{page.plane.ids['odd']}")
    page.shows(HOSTILE, "h1")
    for name in ODD_NAMES:
        page.shows(" ".join(name.split()), ".tabpanel")
    page.one("#tab-details").click()
    page.shows(ODD_NAMES[0], ".details")
    page.press("Run again")
    page.shows(HOSTILE, "dialog")
    page.browser.screenshot("odd-names")
    assert page.all("main script, main img, main b > *, dialog script, dialog img, main iframe") == []
    assert page.driver.execute_script("return document.scripts.length") == 1
    assert "owned" not in page.driver.title.split("<script>")[0]
    assert [text for text in page.browser.complaints() if "Content Security Policy" in text] == []


def test_policy_stops_a_script_that_got_into_the_page_all_the_same(page):
    injected = """const s = document.createElement('script');
                  s.textContent = 'window.owned = 1'; document.body.append(s);
                  const i = document.createElement('div'); document.body.append(i);
                  i.innerHTML = '<img src=x onerror="window.owned = 1">';"""
    page.driver.execute_script(injected)
    page.shows("Recent runs")
    time.sleep(0.2)  # the time an onerror would have needed
    assert page.driver.execute_script("return window.owned") is None


# ---- the overview ----


def test_thousand_runs_are_filtered_and_paged(page):
    rows = "section[aria-labelledby=h-recent] tbody tr"
    eventually(lambda: len(page.all(rows)) == 25)
    first = page.text(rows)
    page.press("Older")
    page.shows("Page 2")
    assert page.text(rows) != first
    page.press("Newer")
    page.shows("Page 1")
    page.keys("/")
    assert page.driver.switch_to.active_element.get_attribute("id") == "filter"
    page.keys("soak")
    eventually(lambda: len(page.all(rows)) == 1)
    page.press("Clear")
    page.driver.execute_script(
        "const s = document.querySelector('select[aria-label=Status]'); s.value = 'Failed'; "
        "s.dispatchEvent(new Event('change'))"
    )
    eventually(
        lambda: (
            {row.find_element(By.CSS_SELECTOR, "[data-label=Status]").text for row in page.all(rows)}
            == {"Failed"}
        )
    )
    page.one("#filter").send_keys("no such run")
    page.shows("No run matches the filters.")


def test_run_that_somebody_else_starts_appears_by_itself_and_goes_when_it_ends(browser, live):
    page = Page(browser, live)
    page.sign_in()
    page.shows("Nothing is running.")
    body = {
        "tenantId": "tenant-1",
        "envId": "dev",
        "scenarioId": "from elsewhere",
        "targetUsers": 3,
        "spawnRate": 3,
    }
    run_id = live.call("POST", "/v1/tests", body)[1]["id"]
    page.one(f"tr[data-run='{run_id}']")
    page.shows("Running", ".cluster")
    assert live.call("POST", f"/v1/tests/{run_id}/stop")[0] == 200
    page.shows("Nothing is running.", within_s=3)
    eventually(lambda: "Finished" in page.text(f"tr[data-run='{run_id}']"), 3)


def test_every_pushed_number_comes_to_the_screen_by_itself(page):
    plane = page.plane
    run_id = plane.external_run(*NOBODY)
    page.open(f"#/runs/{run_id}")
    page.shows("Running", ".run-head")
    page.driver.execute_script("window.isSamePage = true")
    for number in range(777_001, 777_006):
        assert plane.push(run_id, number) == 200
        page.shows(f"{number:,}", ".tiles")
    assert page.driver.execute_script("return window.isSamePage"), "nothing was loaded again"
    plane.callback("test-stop", {"runId": run_id})


def test_lost_connection_is_said_and_comes_back_by_itself(browser, tmp_path):
    plane = ControlPlane(tmp_path)
    plane.start()
    page = Page(browser, plane)
    try:
        page.sign_in()
        page.shows("No finished run yet")
        plane.end()
        page.shows("Connection to Load Manager lost", "#lost")
        browser.screenshot("connection-lost")
        plane.start()  # sessions do not survive: the page asks for the token again
        page.one("#token").send_keys(API_TOKEN + Keys.ENTER)
        page.shows("No finished run yet")
        assert not page.one("#lost").is_displayed()
    finally:
        plane.end()


# ---- the page of a run ----


def painted_pixels(page: Page, chart: int, colour: str) -> int:
    """How many pixels of a chart have the colour of this CSS variable."""
    return page.driver.execute_script(
        """const canvas = document.querySelectorAll('canvas')[arguments[0]], wanted = css(arguments[1]);
        const [r, g, b] = [1, 3, 5].map((from) => parseInt(wanted.slice(from, from + 2), 16));
        const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let found = 0;
        for (let i = 0; i < data.length; i += 4)
            found += data[i + 3] > 200 && Math.abs(data[i] - r) + Math.abs(data[i + 1] - g)
              + Math.abs(data[i + 2] - b) < 24;
        return found;""",
        chart,
        colour,
    )


def test_chart_of_eight_hours_keeps_every_extreme_and_zooms_in_to_every_sample(page):
    run_id = page.plane.ids["long"]
    page.open(f"#/runs/{run_id}")
    eventually(lambda: page.points() > 400, what="the points of eight hours")
    assert page.points() <= 1000
    rows = csv.DictReader(page.plane.get(f"/v1/tests/{run_id}/metrics.csv").body.decode().splitlines())
    samples = [row for row in rows if row["source"] != "final"]
    assert len(samples) == EIGHT_HOURS_S
    for column, key in (("totalRps", "rps"), ("currentP95Ms", "p95"), ("currentUsers", "users")):
        most = max(float(row[column]) for row in samples)
        drawn = page.driver.execute_script(
            "return Math.max(...view.group.points.map((point) => point[arguments[0]]))", key
        )
        assert drawn == most, f"the highest {column} of {len(samples)} samples is not drawn"
    for chart, colour in ((0, "--rps"), (0, "--failures"), (1, "--p95"), (2, "--users")):
        eventually(lambda c=chart, v=colour: painted_pixels(page, c, v) > 300, what=f"a line in {colour}")

    chart = page.all("canvas")[0]
    begin = ActionChains(page.driver).move_to_element_with_offset(chart, 0, 0)
    begin.click_and_hold().move_by_offset(8, 0).release().perform()
    zoom = eventually(lambda: page.driver.execute_script("return view.group.zoom"))
    assert 60 < zoom[1] - zoom[0] < 400
    every_second = "return view.detail && view.detail.length"
    wanted = zoom[1] - zoom[0] - 2
    eventually(
        lambda: (page.driver.execute_script(every_second) or 0) >= wanted, what="every second of the part"
    )
    page.browser.screenshot("zoomed")
    chart.send_keys(Keys.ESCAPE)
    eventually(lambda: page.driver.execute_script("return view.group.zoom") is None)


def test_pointer_and_keys_read_the_values_of_a_moment(page):
    page.open(f"#/runs/{page.plane.ids['failed']}")
    eventually(page.points)
    chart = page.all("canvas")[1]
    ActionChains(page.driver).move_to_element(chart).perform()
    page.shows("95th percentile", ".chart:nth-child(2) .tip")
    page.browser.screenshot("failed-run")
    chart.send_keys(Keys.ARROW_LEFT)
    page.shows("50th percentile", "#said")
    assert "Response Times" in chart.get_attribute("aria-label")


def test_failed_run_says_why_and_what_to_doubt(page):
    page.open(f"#/runs/{page.plane.ids['failed']}")
    page.shows("cluster local answered nothing for 60 s", ".note.bad")
    page.shows("97% CPU", ".note.warn")
    assert page.driver.execute_script("return view.group.marks.length") == 1


def test_endpoints_have_locusts_columns_sort_and_are_all_there(page):
    page.open(f"#/runs/{page.plane.ids['many']}")
    page.shows("Show all 500")
    heads = [head.text.strip("\u2195\u2191\u2193 ") for head in page.all(".tabpanel th")]
    assert heads == [
        "Type",
        "Name",
        "# Requests",
        "# Fails",
        "Median (ms)",
        "95%ile (ms)",
        "99%ile (ms)",
        "Average (ms)",
        "Min (ms)",
        "Max (ms)",
        "RPS",
    ]
    page.press("Max (ms)", ".tabpanel")
    eventually(lambda: page.text(".tabpanel tbody tr td:nth-child(10)") == "1,399")
    assert page.all(".tabpanel th")[9].get_attribute("aria-sort") == "descending"
    page.press("Show all 500")
    eventually(lambda: len(page.all(".tabpanel tbody tr")) == 500)
    page.keys("/")
    page.keys("items/499")
    eventually(lambda: len(page.all(".tabpanel tbody tr")) == 1)
    assert "Aggregated" in page.text(".tabpanel tfoot")


def test_verdict_thresholds_marks_failures_and_exceptions_are_shown_as_text(page):
    page.open(f"#/runs/{page.plane.ids['failed']}")
    eventually(page.points)
    page.driver.execute_script(
        """const hostile = arguments[0], at = new Date(view.start + 60000).toISOString();
        clearInterval(view.timers[1]);
        view.loadSides = () => {};
        view.show({...view.run, verdict: 'failed', trust: 'doubtful', annotations: [{at, text: hostile}],
            thresholds: [{expr: 'p95ResponseMs < 500', value: 612.4, result: 'failed', firstFailedAt: at},
              {expr: hostile, value: null, result: hostile}]});
        view.failures = [{method: 'GET', name: hostile, error: hostile, occurrences: 1234, firstSeen: at,
          lastSeen: at}];
        view.exceptions = [{count: 2, message: hostile, traceback: hostile + '\\n  line 2',
          nodes: ['w-1', hostile]}];
        view.showTabs();""",
        HOSTILE,
    )
    badges = "return [...document.querySelectorAll('.badges .labelled')].map((one) => one.textContent)"
    assert page.driver.execute_script(badges) == ["Status Failed", "Verdict Failed", "Data Unreliable"]
    page.shows("612.4", "section table")
    page.shows(HOSTILE, "section table")
    assert page.driver.execute_script("return view.group.marks.length") == 2
    page.driver.execute_script("scrollTo(0, 0)")
    page.browser.screenshot("thresholds")
    page.one("#tab-failures").click()
    page.shows("1,234", ".tabpanel")
    page.shows(HOSTILE, ".tabpanel")
    page.browser.screenshot("thresholds")
    page.one("#tab-exceptions").click()
    page.shows("line 2", ".tabpanel")
    assert page.all("main script, main img") == []


def test_history_shows_earlier_runs_of_the_scenario_and_overlays_one(page):
    page.open(f"#/runs/{page.plane.ids['failed']}")
    eventually(page.points)
    page.one("#tab-history").click()
    eventually(lambda: len(page.all(".tabpanel tbody tr")) == 25, what="the newest 25 of 334 runs")
    dots = ".trend svg path:not(.normal):not(.change)"
    assert len(page.all(dots)) == 3 * 26, "they and this one, for each figure"
    assert len(page.all(".trend svg path.normal")) >= 25, "where equal runs lie"
    page.driver.execute_script("""view.trends.totalRps.changePoints = [
        {runId: view.history[3].id, afterRunId: view.history[4].id, before: 10, after: 12,
          changePercent: 20}]; view.simpleText = ''; view.showHistory()""")
    changes = [title.get_attribute("textContent") for title in page.all(".trend svg path.change title")]
    assert any(
        change.startswith("RPS changed by +20") and "after the run of" in change for change in changes
    ), changes
    page.press("Overlay", ".tabpanel")
    page.shows("dotted: the run of")
    assert eventually(lambda: page.driver.execute_script("return view.group.other.length")) > 1
    page.browser.screenshot("history")
    page.press("Remove")
    eventually(lambda: page.driver.execute_script("return view.group.other.length") == 0)
    page.open(f"#/runs/{page.plane.ids['odd']}")
    page.one("#tab-history").click()
    page.shows("No other run of this scenario", ".tabpanel")


def test_hidden_tab_gives_its_connection_back_and_catches_up(page):
    page.driver.execute_script("""window.hide = (hidden) => {
        Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
        document.dispatchEvent(new Event('visibilitychange')); };
        const real = window.setTimeout; window.setTimeout = (work, ms) => real(work, ms === 20000 ? 50 : ms);
        hide(true);""")
    eventually(lambda: page.driver.execute_script("return live.source === null"))
    run_id = page.plane.external_run(*NOBODY_ELSE)
    assert not page.all(f"tr[data-run='{run_id}']")
    page.driver.execute_script("hide(false)")
    page.one(f"tr[data-run='{run_id}']")
    eventually(lambda: page.driver.execute_script("return live.source.readyState") == 1)


def test_unknown_run_is_said(page):
    page.open("#/runs/no-such-run")
    page.shows("There is no such run.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_no_page_is_wider_than_its_window(page, width, scheme):
    page.browser.size(width, 1200)
    page.browser.scheme(scheme)
    try:
        for name, place in (
            ("overview", "#/"),
            *((name, f"#/runs/{run_id}") for name, run_id in page.plane.ids.items()),
        ):
            page.open(place)
            page.shows("All runs" if "runs/" in place else "checkout")
            assert "runs/" not in place or eventually(page.points)
            page.browser.screenshot(f"{name}-{width}-{scheme}")
            assert not page.is_wider_than_the_window(), name
            for tab in page.all(".tabs button") if name == "odd" else ():
                tab.click()
                page.browser.screenshot(f"{name}-{tab.get_attribute('id')}-{width}-{scheme}")
                assert not page.is_wider_than_the_window(), tab.text
    finally:
        page.browser.size(1400, 1000)
        page.browser.scheme("light")


def test_every_control_is_reached_by_tab_and_has_a_name(page):
    page.open(f"#/runs/{page.plane.ids['failed']}")
    eventually(page.points)
    nameless = page.driver.execute_script("""return [...document.querySelectorAll(
        'button, a[href], input, select, textarea, canvas')]
        .filter(e => !(e.innerText || e.getAttribute('aria-label')
          || (e.labels && e.labels.length))).map(e => e.outerHTML)""")
    assert nameless == []
    reached = set()
    for _ in range(40):
        page.keys(Keys.TAB)
        reached.add(
            page.driver.execute_script(
                "const e = document.activeElement; return e.id || e.innerText || e.tagName"
            )
        )
    assert {"Run again", "report", "CANVAS", "tab-endpoints"} <= reached


# ---- scenarios, schedules, judgement ----


def fill(page: Page, dialog: str, **texts: str) -> None:
    """Put texts into the fields of a dialog, as typing does; folded parts are opened."""
    for name, text in texts.items():
        field = page.one(f"{dialog} [name={name}]")
        page.driver.execute_script(
            """const [field, text] = arguments, folded = field.closest('details');
            if (folded) folded.open = true;
            field.value = text;
            for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, {bubbles: true}));""",
            field,
            text,
        )


def leave_the_page_before(browser):
    """A page whose server is gone goes on complaining; that is not ours."""
    browser.driver.get("about:blank")
    browser.complaints()


def test_a_scenario_fills_the_form_users_are_changed_and_schedules_paused(browser, load_manager, fake):
    scenarios = [
        {
            "id": "checkout",
            "description": "buyers only",
            "targetUsers": 7,
            "spawnRate": 3.5,
            "durationSeconds": 90,
        },
        {
            "id": "waves",
            "stages": [
                {"targetUsers": 2, "spawnRate": 2, "durationSeconds": 30},
                {"targetUsers": 4, "spawnRate": 2, "durationSeconds": 30},
            ],
        },
    ]
    lm = load_manager(cluster_config(fake.url), scenarios=scenarios)
    leave_the_page_before(browser)
    made = lm.post(
        "/v1/schedules",
        {"cron": "@daily", "description": HOSTILE[:60], "test": create_body(scenarioId="checkout")},
    ).json
    browser.complaints()  # those of the tests before
    page = Page(browser, lm)
    page.sign_in()
    page.shows(HOSTILE[:60], "[aria-labelledby=h-schedules]")
    page.press("Pause", "[aria-labelledby=h-schedules]")
    page.shows("Paused", "[aria-labelledby=h-schedules]")
    assert lm.get(f"/v1/schedules/{made['id']}").json["paused"] is True
    browser.screenshot("schedules")

    page.press("Start a test")
    scenario = page.one("#start-dialog input[list]")
    scenario.send_keys("waves")
    page.shows("2 stages", "#start-dialog")
    assert not page.all("#start-dialog .load input:enabled"), "stages stand for the numbers"
    scenario.clear()
    scenario.send_keys("checkout")
    page.shows("buyers only", "#start-dialog")
    assert [field.get_attribute("value") for field in page.all("#start-dialog .load input")] == [
        "7",
        "3.5",
        "1m30s",
    ]
    page.press("Start test", "#start-dialog")
    page.shows("Running", ".run-head", 20)
    run_id = page.driver.current_url.rsplit("/", 1)[1]
    page.press("Change users")
    field = page.one("#new-users")
    field.clear()
    field.send_keys("11")
    page.press("Change", "dialog")
    eventually(lambda: [one["targetUsers"] for one in lm.run(run_id).get("usersChanges", ())] == [11], 10)
    assert lm.post(f"/v1/tests/{run_id}/stop").status == 200
    assert not [one for one in browser.complaints() if "/failures" not in one], (
        "the fake has no list of failures"
    )


def table_rows(page: Page, css: str) -> list[list[str]]:
    """The texts of a table's cells, row by row."""
    return page.driver.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.innerText.trim()))",
        css,
    )


def test_comparison_is_a_table_of_figures_with_baseline_change_bar_and_judgement(browser, tmp_path):
    with SeededRuns(tmp_path / "lm.db") as runs:
        earlier = runs.finished()
        gone = str(uuid.uuid4())
        regressions = ["totals: p95ResponseMs went from 80 to 90 (+12.5%), allowed is 10%", HOSTILE]
        comparison = {
            "with": "previous",
            "baseline": earlier,
            "tolerances": {"p95ResponseMs": "10%", "p50ResponseMs": "10%"},
            "differences": ["users differs: 5 and 6"],
            "warnings": ["totals: p50ResponseMs not judged: 3 requests, 20 are needed"],
            "noise": [],
            "regressions": regressions,
        }
        slower = runs.finished(comparison=comparison, verdict="failed")
        orphan = runs.finished(comparison={**comparison, "baseline": gone}, verdict="failed")
    with ControlPlane(tmp_path) as plane:
        leave_the_page_before(browser)
        page = Page(browser, plane)
        page.sign_in()
        page.shows("Recent runs")
        page.open(f"#/runs/{slower}")
        page.shows("Compared with previous run " + earlier[:8])
        rows = eventually(lambda: table_rows(page, ".comparison"), what="the table of figures")
        figures = {row[1]: row for row in rows}
        assert figures["95%ile"][0] == "All requests" and figures["95%ile"][6] == "Regression"
        assert figures["95%ile"][2].endswith(" ms") and figures["95%ile"][4].endswith("%")
        assert (
            figures["Median"][6].startswith("Cannot tell")
            and "3 requests, 20 are needed" in figures["Median"][6]
        )
        assert figures["99%ile"][6] == "Not judged"
        bar = page.driver.execute_script(
            "return document.querySelector('.comparison .change-bar i').getBoundingClientRect().width"
        )
        assert bar > 0
        for text in (HOSTILE, "users differs: 5 and 6"):
            page.shows(text, ".comparison")
        page.press("Show all figures", ".comparison")
        eventually(lambda: len(table_rows(page, ".comparison")) > len(rows), what="the endpoints' figures")
        assert not browser.complaints()

        page.open(f"#/runs/{orphan}")
        page.shows(regressions[0], ".comparison")  # the baseline is gone: its sentences are all there is
        browser.complaints()  # the 404 of it


def test_comparison_shows_the_servers_own_judgement_interval_and_message(page):
    page.open(f"#/runs/{page.plane.ids['failed']}")
    eventually(page.points)
    page.driver.execute_script(
        """const figure = {
            endpoint: 'GET /x', metric: 'p95ResponseMs', baseline: 100, candidate: 130, change: 30,
            changePercent: 30, judgement: 'improvement', reason: 'beyond 90 to 110', interval: [20, 40],
            later: {}};
        const told = {endpoint: null, metric: 'p99ResponseMs', baseline: 1, candidate: 2, change: 1,
          changePercent: 100,
            judgement: 'cannot tell', reason: 'not enough runs to tell: 2 of 5'};
        view.show({...view.run, comparison: {with: 'history', baseline: 'b'.repeat(36), runs: ['a', 'b'],
          figures: [told, figure],
            figuresCut: 0, judgement: 'no regression', message: 'none of 9 figures got worse',
            regressions: [], unknown: 1}});"""
    )
    page.shows("Compared with 2 runs, the newest run bbbbbbbb", ".comparison")
    page.shows("none of 9 figures got worse", ".comparison")
    rows = table_rows(page, ".comparison")
    assert [row[6] for row in rows] == ["Cannot tell not enough runs to tell: 2 of 5", "Improvement"]
    assert "between 120 ms and 140 ms" in page.driver.execute_script(
        "return document.querySelector('.comparison tr:nth-child(2) td:nth-child(4) span').title"
    )


def test_idle_cluster_is_called_idle_whatever_locust_calls_it(page):
    words = page.driver.execute_script(
        """const idle = {activeRunId: null, workers: [], problem: null};
        const states = ['ready', 'stopped', 'running', 'unreachable', 'asleep', 'new words'];
        return states.map((state) => clusterState({...idle, state})[0]);"""
    )
    assert words == ["Idle", "Idle", "Running", "Unreachable", "Asleep", "New words"]


def test_run_that_never_began_says_so_and_has_no_charts(browser, load_manager):
    lm = load_manager(cluster_config("http://127.0.0.1:9"))
    leave_the_page_before(browser)
    run_id = lm.create().json["runId"]
    page = Page(browser, lm)
    page.sign_in()
    page.shows("Recent runs")
    page.open(f"#/runs/{run_id}")
    page.shows("This run never began, so there are no measurements.")
    assert not [canvas for canvas in page.all("canvas") if canvas.is_displayed()]
    assert not page.one(".tiles").is_displayed()
    page.shows("Load", ".details")
    browser.screenshot("never-began")


def test_schedule_is_made_changed_and_deleted_on_the_page(browser, load_manager, fake):
    lm = load_manager(cluster_config(fake.url))
    leave_the_page_before(browser)
    page = Page(browser, lm)
    page.sign_in()
    page.shows("No schedule", ".schedules")
    page.press("New schedule")
    fill(page, "#schedule-dialog", cron="61 2 * * *", timezone="Europe/Berlin", scenarioId="browse")
    fill(page, "#schedule-dialog", targetUsers="many", thresholds="p95ResponseMs << 5", tags="read, write")
    page.press("Create schedule")
    page.shows("a whole number from 1", "#schedule-dialog")
    fill(page, "#schedule-dialog", targetUsers="7")
    page.press("Create schedule")
    page.shows("0 to 59", "#schedule-dialog")  # the server's words, at the field
    assert page.one("#schedule-dialog [name=thresholds]").get_attribute("aria-invalid") == "true"
    assert lm.get("/v1/schedules").json == []
    browser.screenshot("schedule-refused")
    fill(page, "#schedule-dialog", cron="30 2 * * mon-fri", thresholds="p95ResponseMs < 500")
    page.press("Create schedule")
    page.shows("browse on acme / dev", ".schedules")
    (made,) = lm.get("/v1/schedules").json
    assert (made["cron"], made["timezone"], made["test"]["targetUsers"]) == (
        "30 2 * * mon-fri",
        "Europe/Berlin",
        7,
    )
    assert (made["test"]["thresholds"], made["test"]["tags"]) == (["p95ResponseMs < 500"], ["read", "write"])
    page.shows("02:30", ".schedules")  # in the schedule's own zone, with its date
    page.shows(str(time.gmtime().tm_year)[:2], ".schedules details summary")
    assert len(page.all(".schedules details div")) == 4, "the other four of the next five times"

    page.press("Edit", ".schedules")
    fill(page, "#schedule-dialog", description="nightly", targetUsers="9")
    page.press("Save")
    page.shows("nightly", ".schedules")
    (changed,) = lm.get("/v1/schedules").json
    assert (changed["id"], changed["test"]) == (made["id"], {**made["test"], "targetUsers": 9})

    page.press("Delete", ".schedules")
    page.press("Delete schedule", "dialog")
    page.shows("No schedule", ".schedules")
    assert lm.get("/v1/schedules").json == []


def test_start_form_gives_thresholds_stages_tags_and_user_classes(browser, load_manager, fake):
    lm = load_manager(cluster_config(fake.url))
    leave_the_page_before(browser)
    page = Page(browser, lm)
    page.sign_in()
    page.press("Start a test")
    fill(
        page,
        "#start-dialog",
        scenarioId="waves",
        profile="stages",
        thresholds="p95ResponseMs < 500\nerrorRate < 1",
    )
    fill(page, "#start-dialog", metadata="version=2.1", compareWith="previous")
    page.press("Add a stage", "#start-dialog")
    inputs = page.all("#start-dialog .stage input")
    for field, text in zip(inputs, ("2", "2", "30s", "4", "1", "soon"), strict=True):
        field.clear()
        field.send_keys(text)
    page.press("Start test", "#start-dialog")
    page.shows("stage 2: like 90s, 5m or 1h30m", "#start-dialog")
    inputs[5].clear()
    inputs[5].send_keys("1m")
    browser.screenshot("start-stages")
    page.press("Start test", "#start-dialog")
    page.shows("Status", ".run-head", 20)
    run = lm.run(page.driver.current_url.rsplit("/", 1)[1])
    stages = [(one["targetUsers"], one["spawnRate"], one["durationSeconds"]) for one in run["stages"]]
    assert stages == [(2, 2, 30), (4, 1, 60)]
    assert [one["expr"] for one in run["thresholds"]] == ["p95ResponseMs < 500", "errorRate < 1"]
    assert (run["metadata"], run["compareWith"]) == ({"version": "2.1"}, "previous")
    lm.post(f"/v1/tests/{run['id']}/stop")


def test_changed_users_are_shown_and_a_finished_run_shows_the_users_it_had(page):
    page.open(f"#/runs/{page.plane.ids['failed']}")
    eventually(page.points)
    page.shows("Users, at most\n200", ".tiles")
    page.driver.execute_script(
        """const at = new Date(view.start + 8000).toISOString();
        view.show({...view.run, usersChanges: [{at, targetUsers: 300, spawnRate: 10, by: 'kim'}]});
        view.choose('details');"""
    )
    page.shows("Users 200 \u2192 300", ".run-head")
    page.shows("300 users at 10/s after 0:08, by kim", ".details")


def test_run_of_some_seconds_has_points_in_every_chart(page):
    drawn = page.driver.execute_script(
        """const start = Date.parse('2026-11-25T03:11:34Z');
        const sample = (seconds, source, users, rps, p50) => ({timestamp: new Date(start
          + seconds * 1000).toISOString(), source,
            currentUsers: users, totalRps: rps, p50ResponseMs: p50,
            failuresPerSec: source === 'poll' ? 0 : null});
        const points = pointsOf([sample(1, 'poll', 10, 0, null), sample(1.5, 'push', 10, 0, 24),
          sample(2, 'poll', 10, 0, null),
            sample(2.5, 'push', 20, 0, 24), sample(3.5, 'push', 0, 28.7, 24),
            sample(3.5, 'final', 20, 28.7, 24)], start);
        const of = (key) => points.filter((point) => isNumber(point[key])).map((point) => [point.t,
          point[key]]);
        return {users: of('users'), rps: of('rps'), p50: of('p50')};"""
    )
    assert drawn["users"] == [[1.5, 10], [2.5, 20]], (
        "cached polls say less than pushes; the end is not 0 users"
    )
    assert drawn["rps"][-1] == [3.5, 28.7], "too short for a current rate: the whole run's is drawn"
    assert drawn["p50"][0] == [1.5, 24]


def test_narrow_screen_shows_runs_as_cards_with_every_figure(page):
    page.browser.size(390, 900)
    try:
        page.open()
        row = page.one("section[aria-labelledby=h-recent] tbody tr")
        labels = ("Status", "Users", "RPS", "Failures", "95%ile (ms)", "Time")
        for label in labels:
            cell = row.find_element(By.CSS_SELECTOR, f"[data-label='{label}']")
            assert cell.is_displayed() and cell.rect["x"] + cell.rect["width"] <= 390, label
        assert not page.is_wider_than_the_window()
    finally:
        page.browser.size(1400, 1000)


def test_page_links_to_the_reference_of_the_api(page):
    assert page.one("#top a[href=docs]").is_displayed()


def end_run(plane: ControlPlane, run_id: str) -> None:
    plane.callback("test-stop", {"runId": run_id})
    plane.wait_for(run_id, "Finished")


NOTES_OF_STREAM = """
window.streamNotes = [];
for (const what of ["connect", "failed", "rest"]) {
  const before = live[what];
  live[what] = function (...given) {
    const answer = before.apply(this, given);
    streamNotes.push(what + ": " + document.getElementById("live").textContent);
    return answer;
  };
}
addEventListener("focus", () => streamNotes.push("focus"));
"""


def test_every_one_of_many_tabs_is_answered_and_those_without_a_stream_ask_instead(page, seeded):
    """A browser has six connections to a server: six streams would leave none for the next tab."""
    # As windows side by side: none is hidden, so none gives its stream back for that, however long
    # this takes.
    in_sight = "Object.defineProperty(document, 'hidden', {get: () => false, configurable: true})"
    first = page.driver.current_window_handle
    page.driver.execute_script(in_sight)
    page.driver.execute_script(NOTES_OF_STREAM)
    run_id = seeded.external_run(*NOBODY)
    try:
        for _ in range(8):
            page.driver.switch_to.new_window("tab")
            page.open(f"#/runs/{run_id}")
            page.driver.execute_script(in_sight)
            page.shows("ui-started-test", "h1", within_s=15)
        page.shows("Live", "#live")
        seeded.push(run_id, 424_242)
        page.shows("424,242", ".tiles")
        page.driver.switch_to.window(first)
        # Chromium may give the window the focus as it switches, and with it the stream.
        notes = page.driver.execute_script("return streamNotes")
        assert "rest: Every 5 s" in notes, notes
        page.driver.execute_script("dispatchEvent(new Event('focus'))")
        page.shows("Live", "#live")
    finally:
        for tab in page.driver.window_handles:
            if tab != first:
                page.driver.switch_to.window(tab)
                page.driver.close()
        page.driver.switch_to.window(first)
        page.driver.execute_script("delete document.hidden")
        end_run(seeded, run_id)


def test_charts_of_a_long_run_are_drawn_when_a_pixel_was_added(page, seeded):
    run_id = seeded.external_run(*NOBODY)
    seeded.push(run_id, 10)
    page.open(f"#/runs/{run_id}")
    eventually(lambda: page.points() > 0, what="a point is drawn")
    count_draws = (
        "window.draws = 0; view.group.end = 1e5; view.group.drawnEnd = arguments[0]; view.group.draw = "
        "() => window.draws++; view.group.grow(); return window.draws"
    )
    assert page.driver.execute_script(count_draws, 1e5 - 1) == 0
    assert page.driver.execute_script(count_draws, 1e5 - 1000) == 1
    end_run(seeded, run_id)
