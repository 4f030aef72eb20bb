"""The latent browser in a real browser, headless: what it shows, clicks, keys, a phone, the dark, hostile text.

Needs Debian's chromium and chromium-driver (any Chromium and its driver on the path) and is skipped without them.
"""

import math
import shutil
import tempfile

import pytest

from analysis.dashboard.content import gather
from analysis.dashboard.page import render
from analysis.latents import open_runs

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the path")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def content(trained):
    return gather(open_runs([trained / "jumprelu", trained / "topk"]), n_latents=300)


@pytest.fixture(scope="module")
def driver():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        yield driver
        driver.quit()


class Page:
    """A page in the browser, by the few things that a user does with it."""

    def __init__(self, driver, file, width, height):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys
        from selenium.webdriver.support.wait import WebDriverWait

        self.driver, self.keys, self._css = driver, Keys, By.CSS_SELECTOR
        self._wait = WebDriverWait(driver, 20, poll_frequency=0.05)
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get(file.as_uri())
        self.until(lambda: self.js("return document.body.dataset.ready"))

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, condition):
        return self._wait.until(lambda _: condition())

    def all(self, css):
        return self.driver.find_elements(self._css, css)

    def one(self, css):
        return self.driver.find_element(self._css, css)

    def text(self, css):
        """Of the element, seen or not."""
        return self.one(css).get_property("textContent")

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def rows(self):
        """Every latent of the list, in its order."""
        return self.js("return state.rows")

    def set(self, control, value):
        self.js("const c = document.getElementById(arguments[0]); c.value = arguments[1];"
                "c.dispatchEvent(new Event('input', {bubbles: true}))", control, value)

    def shows(self, view):
        return self.until(lambda: self.js("return document.body.dataset.view") == view)


@pytest.fixture
def open_page(driver, tmp_path):
    def open_page(content, width=1280, height=900):
        file = tmp_path / "dashboard.html"
        file.write_text(render(content))
        return Page(driver, file, width, height)

    return open_page


@pytest.fixture
def page(open_page, content):
    return open_page(content)


def by_frequency(part):
    return sorted(range(part["d_sae"]), key=lambda i: -part["frequency"][i])


def test_the_overview_needs_no_network_and_shows_the_runs(page, content):
    assert page.js("return performance.getEntriesByType('resource').length") == 0
    assert page.driver.get_log("browser") == []
    table = page.text("#overview table")
    for part in content["runs"]:
        assert part["name"] in table and f"{part['metrics']['fvu']:.4g}" in table
    assert [f.text for f in page.all(".panels figcaption")][:2] == ["delta LM loss (nats per token)", "FVU"]
    assert len(page.all("circle.shown")) == 4  # two panels, two runs
    titles = [t.get_property("textContent") for t in page.all("#overview .panels figure:first-child title")][:2]
    assert all(any(title.startswith(part["name"] + ": L0 ") for title in titles) for part in content["runs"])
    assert "150 of the" in page.text("#overview .note")


def test_the_list_has_every_latent_and_only_those_in_sight_are_elements(page, content):
    part = content["runs"][0]
    assert sorted(page.rows()) == list(range(512))
    shown = [part["frequency"][i] for i in page.rows()]
    assert shown == sorted(part["frequency"], reverse=True)
    assert 5 < len(page.all(".row")) < 40
    page.js("document.getElementById('list').scrollTop = 200 * 44")
    page.until(lambda: page.js("return document.getElementById('row-' + state.rows[205]) !== null"))
    assert page.text("#found") == "512 of 512 latents, 150 in detail"


def test_a_click_opens_a_latent_with_everything_about_it(page, content):
    part = content["runs"][0]
    latent = next(i for i in by_frequency(part) if i in part["details"])
    page.one(f"#row-{latent}").click()
    page.shows("latent")
    own = "#latent article:first-child "
    assert page.text(own + "h2").endswith(f"Latent {latent}")
    facts = page.text(own + ".facts")
    assert f"{100 * part['frequency'][latent]:.3g}" in facts and f"{part['max'][latent]:.3g}" in facts
    details = part["details"][latent]
    bars = [t.get_property("textContent") for t in page.all(own + ".histogram title")]
    assert [int(bar.split(": ")[1].replace(",", "")) for bar in bars] == details["counts"]
    promoted = [t.get_attribute("title") for t in page.all(own + ".promoted .token")]
    assert promoted == [page.js("return JSON.stringify(arguments[0])", content["tokens"][i])
                        for i in details["effects"][0][0]]
    assert len(page.all(own + ".suppressed li")) == 10
    contexts = page.all(own + ".context")
    assert len(contexts) == len(details["contexts"])
    for element, (_, at, tokens, on, values) in zip(contexts, details["contexts"], strict=True):
        marks = element.find_elements("css selector", "mark")
        assert [float(m.get_attribute("title").rsplit(": ", 1)[1]) for m in marks] == pytest.approx(values)
        (about,) = element.find_elements("css selector", "mark.about")
        assert about.get_attribute("title") == marks[on.index(at)].get_attribute("title")
        whole = "".join(content["tokens"][i] for i in tokens)
        plain = page.js("const e = arguments[0].querySelector('.text').cloneNode(true);"
                        "e.querySelectorAll('sub').forEach((s) => s.remove()); return e.textContent", element)
        assert "".join(plain.replace("↵", "").split()) == "".join(whole.split())


def test_the_nearest_latent_of_the_other_run_stands_beside_it(page, content):
    first, _ = content["runs"]
    latent = next(i for i in by_frequency(first) if i in first["details"])
    near, cosine = (column[0] for column in first["details"][latent]["nearest"][1])
    page.js("location.hash = arguments[0]", f"#latent/0/{latent}")
    page.shows("latent")
    assert [h.get_property("textContent") for h in page.all("#latent h2")] == [
        f"A Latent {latent}", f"B Latent {near} nearest, cosine {cosine:.2f}"]
    left, right = (article.rect for article in page.all("#latent article"))
    assert right["x"] >= left["x"] + left["width"] and abs(left["y"] - right["y"]) < 1
    page.one(f'#latent article:first-child a[href="#latent/1/{near}"]').click()
    page.until(lambda: page.js("return state.run") == 1)
    assert page.text("#latent h2") == f"B Latent {near}" and page.one("#run").get_property("value") == "1"
    assert page.js("return state.rows[state.active]") == near
    page.driver.back()
    page.until(lambda: page.text("#latent h2") == f"A Latent {latent}")


def test_everything_by_keyboard(page, content):
    order = page.rows()

    def active():  # in one go: where the list scrolls, its rows are made again at some moment after
        selected, described = page.js("""
            const rows = [...document.querySelectorAll('.row[aria-selected="true"]')];
            const list = document.getElementById("list");
            return [rows.map((row) => row.id), list.getAttribute("aria-activedescendant")]""")
        assert selected == [described]
        return int(described.removeprefix("row-"))

    page.one("body").send_keys("jjjk")
    assert active() == order[2]
    page.one("body").send_keys("/")
    assert page.js("return document.activeElement.id") == "search"
    page.press("137", page.keys.ENTER)
    page.shows("latent")
    assert page.text("#latent h2").endswith("Latent 137")
    page.press(page.keys.CONTROL + "a", page.keys.BACKSPACE)
    page.press(page.keys.ESCAPE)  # leaves the box, then the latent
    assert page.js("return [document.activeElement.id, document.body.dataset.view]") == ["list", "latent"]
    page.press(page.keys.ESCAPE)
    page.shows("list")
    page.press(page.keys.HOME, page.keys.ARROW_DOWN, page.keys.ARROW_DOWN)
    assert active() == order[2]
    page.press(page.keys.END)
    assert active() == order[-1]
    page.press(page.keys.ARROW_DOWN)
    assert active() == order[-1]
    page.press(page.keys.HOME, page.keys.ENTER)
    page.shows("latent")
    page.press("j")
    page.until(lambda: page.text("#latent h2").endswith(f"Latent {order[1]}"))
    assert f"Latent {order[1]}, fires on" in page.text("#spoken")
    assert not page.one("#latent mark sub").is_displayed()
    page.press("n")
    assert page.one("#latent mark sub").is_displayed() and page.one("#numbers").get_attribute("aria-pressed") == "true"
    page.one("#numbers").click()
    assert not page.one("#latent mark sub").is_displayed()


def test_every_control_has_a_name(page):
    nameless = page.js("""
        const all = document.querySelectorAll("input, select, button, [role=listbox], [role=img], section");
        const named = (e) => e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim();
        return [...all].filter((e) => !named(e)).map((e) => e.outerHTML)""")
    assert nameless == []


def test_search_finds_numbers_tokens_and_text(page, content):
    part, tokens = content["runs"][0], content["tokens"]

    def promoted(i):
        ids = part["details"][i]["effects"][0][0] if i in part["details"] else part["promoted"][i]
        return [tokens[t].lower() for t in ids]

    def shown(i):
        return ["".join(tokens[t] for t in c[2]).lower() for c in part["details"].get(i, {"contexts": []})["contexts"]]

    word = next(t.strip().lower() for t in tokens if t.strip().isalpha() and len(t) > 6
                and any(t.strip().lower() in text for i in range(512) for text in shown(i)))
    expected = {
        "contexts": {i for i in range(512) if any(word in text for text in shown(i))},
        "promoted": {i for i in range(512) if any(word in text for text in promoted(i))},
        "id": set(),
    }
    page.set("search", word.upper())
    for scope, found in {**expected, "all": expected["contexts"] | expected["promoted"]}.items():
        page.set("scope", scope)
        assert set(page.rows()) == found, scope
    assert 0 < len(expected["contexts"]) < 512
    page.set("search", "17")
    assert page.rows()[0] == 17 and page.text("#found").startswith(f"{len(page.rows())} of 512 latents")
    page.set("scope", "id")
    assert page.rows() == [17]
    page.set("search", "no such text anywhere")
    page.set("scope", "all")
    assert page.rows() == [] and page.all(".row") == []
    page.one("body").send_keys("j")
    page.one("#list").send_keys(page.keys.ENTER)
    assert page.js("return document.body.dataset.view") == "overview"


def test_filter_and_order(page, content):
    part = content["runs"][0]
    page.set("low", "0.5")
    page.set("high", "5")
    kept = {i for i, frequency in enumerate(part["frequency"]) if 0.005 <= frequency <= 0.05}
    assert set(page.rows()) == kept and 0 < len(kept) < 512
    page.set("low", "")
    page.set("high", "")
    page.set("sort", "rare")
    frequency = [part["frequency"][i] for i in page.rows()]
    alive = [f for f in frequency if f]
    assert alive == sorted(alive) and frequency == alive + [0] * (512 - len(alive))
    page.set("sort", "strong")
    assert [part["max"][i] for i in page.rows()] == sorted(part["max"], reverse=True)
    page.set("sort", "id")
    assert page.rows() == list(range(512))


def test_another_run(page, content):
    page.js("const r = document.getElementById('run'); r.value = '1'; r.dispatchEvent(new Event('change'))")
    part = content["runs"][1]
    assert [part["frequency"][i] for i in page.rows()] == sorted(part["frequency"], reverse=True)


def test_latents_without_details_say_why(page, content):
    part = content["runs"][1]
    listed = next(i for i in range(512) if part["frequency"][i] and i not in part["details"])
    for latent, words in ((listed, "Listed only"), (part["frequency"].index(0), "It fired on none of these tokens.")):
        page.js("location.hash = arguments[0]", f"#latent/1/{latent}")
        page.until(lambda title=f"Latent {latent}": page.text("#latent h2").endswith(title))
        assert words in page.text("#latent .note")


@pytest.mark.parametrize("address", ["#latent/0/99999", "#latent/7/1", "#latent/0/x", "#<img src=x>"])
def test_an_address_that_leads_nowhere_is_the_overview(page, address):
    page.js("location.hash = arguments[0]", address)
    page.js("return new Promise((done) => setTimeout(done, 50))")
    assert page.js("return document.body.dataset.view") == "overview" and page.driver.get_log("browser") == []


def test_on_a_phone_one_thing_at_a_time_and_nothing_is_cut_off(open_page, content):
    page = open_page(content, 390, 844)

    def visible():
        return [s.get_attribute("id") for s in page.all("main > section") if s.is_displayed()]

    def fits():
        return page.js("return document.documentElement.scrollWidth <= innerWidth && [...document.querySelectorAll("
                       "'main > section')].every((s) => s.scrollWidth <= innerWidth)")

    assert visible() == ["overview"] and fits()
    page.one("#to-list").click()
    page.shows("list")
    assert visible() == ["browser"] and fits()
    row = page.all(".row")[1]
    assert row.rect["height"] >= 44 and row.rect["width"] == 390  # wide enough for a thumb
    row.click()
    page.shows("latent")
    assert visible() == ["latent"] and fits()
    left, right = (article.rect for article in page.all("#latent article"))
    assert right["y"] >= left["y"] + left["height"] and left["width"] > 350
    page.driver.back()
    page.shows("list")
    assert visible() == ["browser"]


def luminance(color):
    """Relative luminance of a css ``rgb(...)`` or ``color(srgb ...)``, WCAG 2."""
    numbers = [float(n) for n in color.split("(")[1].rstrip(")").replace("srgb", "").replace(",", " ").split()[:3]]
    channels = [n / 255 for n in numbers] if color.startswith("rgb") else numbers
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_by_day_and_by_night(open_page, content, driver, scheme):
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]})
    page = open_page(content)
    page.one("#list").send_keys(page.keys.ENTER)
    page.shows("latent")

    def colour(css, which):
        return luminance(page.js("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]",
                                 css, which))

    background, text, faint = colour("body", "backgroundColor"), colour("body", "color"), colour("#found", "color")
    assert (background > 0.8) if scheme == "light" else (background < 0.05)

    def contrast(a, b):
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    hottest = colour("mark.about", "backgroundColor")  # of the strongest context: the full colour
    assert contrast(text, background) > 7 and contrast(faint, background) > 4.5 and contrast(text, hottest) > 4.5
    assert math.isclose(colour("mark.about", "color"), text)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_hostile_text_is_shown_and_never_run(open_page, content):
    hostile = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"><b>bold</b>'
    part = content["runs"][0]
    page = open_page({**content, "tokens": [hostile] * len(content["tokens"]), "where": hostile,
                      "runs": [{**part, "name": hostile, "notes": [hostile]}, content["runs"][1]]})
    latent = next(i for i in by_frequency(part) if i in part["details"])
    page.one(f"#row-{latent}").click()
    page.shows("latent")
    assert hostile in page.text("#latent .context .text") and page.text("#where") == hostile
    assert hostile in page.text("#overview .note") and hostile in page.text("#run")
    assert page.all("img") == [] and page.all("section b b") == [] and page.js("return window.hacked") is None
    # And if a text became mark-up after all, the page's policy would not let it run or load.
    page.js("document.getElementById('overview').innerHTML = arguments[0]", hostile)
    page.js("const s = document.createElement('script'); s.textContent = 'window.hacked = 3'; document.body.append(s)")
    page.js("return new Promise((done) => setTimeout(done, 100))")
    assert page.js("return window.hacked") is None
    refused = " ".join(entry["message"] for entry in page.driver.get_log("browser"))
    assert "Content Security Policy" in refused and "img" in refused


def test_a_run_without_text(open_page, content):
    part = {**content["runs"][0], "promoted": None, "notes": ["no text here"]}
    part["details"] = {i: {"bin": d["bin"], "counts": d["counts"], "effects": None, "contexts": []}
                       for i, d in part["details"].items()}
    page = open_page({**content, "tokens": [], "runs": [part]})
    assert not page.one("#run").is_displayed() and "no text here" in page.text("#overview")
    latent = next(i for i in by_frequency(part) if i in part["details"])
    page.one(f"#row-{latent}").click()
    page.shows("latent")
    assert page.all(".context") == page.all(".effects") == [] and page.all(".histogram rect")
    page.set("search", "the")
    assert page.rows() == [] and page.driver.get_log("browser") == []
