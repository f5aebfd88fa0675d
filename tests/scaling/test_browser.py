"""The report in a real browser: quiet, offline, readable wide and narrow, light and dark, and reachable by keyboard."""

import os

import pytest
from browser import Browser, find_browser

SIZES, SCHEMES = (1280, 400), ("light", "dark")
READABLE = 4.5  # contrast of text, WCAG 2.2 success criterion 1.4.3

OVERFLOW = """
[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && e.getClientRects().length)
  .filter(e => !e.closest('svg') || e.tagName === 'text' && e.textContent.trim())
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
  .map(e => e.tagName + ' ' + e.textContent.slice(0, 40)).slice(0, 5)
"""
CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
                     return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = c => rgb(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => { while (e && rgb(getComputedStyle(e).backgroundColor)[3] < 255) e = e.parentElement;
                        return getComputedStyle(e || document.body).backgroundColor; };
  const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const texts = [...document.querySelectorAll('h1,h2,h3,p,th,td,summary,select,.choose,svg.main-svg text')];
  return Math.min(...texts.filter(e => e.getClientRects().length && e.textContent.trim()).map(e => {
    const style = getComputedStyle(e);
    return ratio(light(e.closest('svg') ? style.fill : style.color), light(ground(e)));
  }));
})()
"""
SMALLEST = "Math.min(...[...document.querySelectorAll('p,td,th')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
DRAWN = """
[...document.querySelectorAll('.js-plotly-plot')].filter(e => e.getClientRects().length).map(e =>
  [e.querySelectorAll('.scatterlayer .trace').length, e.querySelector('.main-svg').getBoundingClientRect().width])
"""
SETTLED = "new Promise(done => setTimeout(done, 500))"
FOCUSED = """
(() => { const e = document.activeElement;
         return [e.tagName, parseFloat(getComputedStyle(e).outlineWidth), e.getBoundingClientRect().height > 0]; })()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        assert "REQUIRE_BROWSER" not in os.environ, "no Chromium is installed, and REQUIRE_BROWSER is set"
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(written):
    return written[1][0] / "report.html"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", SIZES)
def test_page_is_quiet_offline_and_readable(browser, page, width, scheme):
    """No complaint on the console, nothing fetched, nothing wider than the window, all text in sufficient contrast."""
    browser.open(page, width, scheme)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OVERFLOW) == []
    assert browser.run(CONTRAST) >= READABLE
    assert browser.run(SMALLEST) >= 13
    figures = browser.run(DRAWN)
    assert len(figures) >= 6
    assert all(traces > 0 and 0.8 * min(width, 1080) < wide <= width for traces, wide in figures)


def test_the_verdict_is_what_is_seen_first(browser, page):
    browser.open(page, 1280, "light")
    assert "Not decided" in browser.run("document.querySelector('.verdict p').textContent")
    assert browser.run("document.querySelector('.verdict').getBoundingClientRect().bottom") < 900


def test_figures_follow_the_colour_scheme_while_the_page_is_open(browser, page):
    browser.open(page, 1280, "light")
    ink = "getComputedStyle(document.querySelector('.xtick text')).fill"
    before = browser.run(ink)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.run(SETTLED)
    assert browser.run(ink) != before
    assert browser.complaints() == []


def test_everything_is_reached_by_keyboard(browser, page):
    """Tab visits every control and every box that scrolls, each visibly marked; Enter opens what is folded."""
    browser.open(page, 1280, "light")
    wanted = "[...document.querySelectorAll('summary,.scroll,button')].filter(e => e.checkVisibility()).length"
    count = browser.run(wanted)
    seen = []
    for _ in range(count):
        browser.press("Tab")
        seen.append(browser.run(FOCUSED))
    assert {tag for tag, _, _ in seen} == {"SUMMARY", "DIV", "BUTTON"}
    assert all(outline >= 2 and visible for _, outline, visible in seen)
    browser.run("document.querySelector('.verdict summary').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('.verdict details').open")
