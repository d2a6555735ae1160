"""The page in a real browser: over a real daemon, and over samples of clusters that are larger, ill or hostile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from lab import CommandFailed
from lab.browser import Browser, Tab
from lab.plan import PROJECT
from tests.engine.conftest import Cluster

PLACE = "127.0.0.1:9789"
SETTINGS = {"WEFT_LISTEN": PLACE}
SAMPLES_PORT = 8077

LIVE = "document.documentElement.dataset.contact === 'live'"
_FILTER = "table inet firewall { chain input { type filter hook input priority 0; udp dport 4789 drop; }; }"
_LABEL = "document.activeElement.getAttribute('aria-label') ?? ''"
_CONTRASTS = """
(() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(colour[i] / 255), 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  const shown = (one) => one.getClientRects().length && !one.closest('.unseen, noscript, title');
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const [text, one] = [walker.currentNode.data.trim(), walker.currentNode.parentElement];
    if (!text || !shown(one)) continue;
    const drawn = one.namespaceURI.endsWith('svg');
    const plate = drawn && one.closest('.knot:not(.silent)')?.querySelector('rect');
    const front = rgb(getComputedStyle(one)[drawn ? 'fill' : 'color']);
    const [a, b] = [front, plate ? rgb(getComputedStyle(plate).fill) : behind(one)].map(light);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) poor.push(`${text.slice(0, 30)}: ${contrast.toFixed(2)}`);
  }
  return [...new Set(poor)];
})()
"""
"""Texts whose contrast to what is behind them is less than WCAG's 4.5."""


@pytest.fixture(scope="module")
def browser(engines: Cluster) -> Iterator[Browser]:
    """In h1, which also serves the samples."""
    argv = engines.h1.enter([sys.executable, "-m", "lab.sample", str(SAMPLES_PORT)])
    environment = {"PYTHONPATH": f"{PROJECT}:{PROJECT}/plugin", "PYTHONUNBUFFERED": "1", "PATH": "/usr/bin:/bin"}
    with (
        subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as samples,
        Browser(engines.h1.enter) as made,
    ):
        assert samples.stdout
        assert samples.stdout.readline().startswith("http")
        yield made
        samples.kill()


def sample(browser: Browser, name: str, *, width: int = 1280) -> Tab:
    tab = browser.open(f"http://127.0.0.1:{SAMPLES_PORT}/{name}/", width=width)
    tab.wait(LIVE, f"the sample {name} is shown")
    return tab


def daemon(browser: Browser) -> Tab:
    tab = browser.open(f"http://{PLACE}/")
    tab.wait(LIVE, "the page is live")
    return tab


def says(tab: Tab, *words: str) -> None:
    for word in words:
        tab.wait(f"document.body.innerText.includes({json.dumps(word)})", f"the page says {word}")


def reach(tab: Tab, label: str) -> None:
    """By Tab and the arrows alone, from the search on."""
    tab.evaluate("document.getElementById('search').focus()")
    for _ in range(60):
        tab.press("Tab")
        for _ in range(20):
            if str(tab.evaluate(_LABEL)).startswith(label):
                return
            before = tab.evaluate(_LABEL)
            if not tab.evaluate("document.activeElement.closest('#picture svg') !== null"):
                break
            tab.press("ArrowDown")
            if tab.evaluate(_LABEL) == before:
                break
    raise AssertionError(f"the keyboard does not reach {label}")


def test_hosts_networks_and_containers_appear_by_themselves(cluster: Cluster, browser: Browser) -> None:
    cluster.network("app", subnet="10.77.0.0/24")
    first = cluster.run(cluster.h1, "web1", "app")
    tab = daemon(browser)
    says(tab, "h1", "h2", "app", "10.77.0.0/24", "2 hosts", "1 network", "1 endpoint")
    second = cluster.run(cluster.h2, "web2", "app")
    says(tab, "2 endpoints")
    reach(tab, "Network app: plain, 2 endpoints on 2 hosts")
    tab.press("Enter")
    says(tab, "web1", first, "web2", second)
    assert tab.evaluate("document.activeElement.closest('#panel') !== null")
    tab.press("Escape")
    assert str(tab.evaluate(_LABEL)).startswith("Network app")
    says(tab, f"endpoint {second} on h2 is there")  # among the last events
    assert tab.complaints() == []
    assert {url.removeprefix(f"http://{PLACE}/") for url in tab.requests()} == {
        *("", "page.css", "page.js", "dom.js", "health.js", "panel.js", "peers.js", "picture.js", "icon.svg", "stream")
    }
    tab.close()


def test_the_page_can_load_and_run_nothing_but_its_own(browser: Browser) -> None:
    tab = daemon(browser)
    policy = tab.evaluate("fetch('state').then((answer) => answer.headers.get('Content-Security-Policy'))")
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    tab.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))")
    assert "weft on h1" in tab.evaluate("document.title")
    assert "Content Security Policy" in str(tab.complaints())
    tab.close()


def test_a_fault_is_told_as_soon_as_the_doctor_finds_it(cluster: Cluster, browser: Browser) -> None:
    h1 = cluster.h1
    fault = "a packet filter of h1 drops UDP port 4789"

    def look() -> None:
        with suppress(CommandFailed):  # it exits with 1 if there is a fault
            h1.ask_weft("doctor")

    tab = daemon(browser)
    assert fault not in tab.text()
    h1.run("nft", _FILTER)
    try:
        look()
        says(tab, fault, "udp dport 4789 drop", "udp-port")
        assert tab.evaluate("document.querySelector('#fault-list .on').textContent") == "on h1"
        assert tab.evaluate("document.querySelector('#fault-list .command button') !== null")
    finally:
        h1.run("nft", "delete table inet firewall")
    look()
    tab.wait(f"!document.body.innerText.includes({json.dumps(fault)})", "the fault is gone")
    for way in (0, 1):  # from each host to the other; on a busy machine a probe may be missed
        cell = f"document.querySelectorAll('#peers tbody tr')[{way}].children[{2 - way}].innerText"
        tab.wait(f"/[mµ]s\\s+1450 bytes|% lost/.test({cell})", "round trip and largest packet, or the loss")
    tab.close()


def test_a_lost_daemon_is_said_and_found_again_and_a_silent_host_is_named(cluster: Cluster, browser: Browser) -> None:
    tab = daemon(browser)
    cluster.h2.stop_weft()
    cluster.h1.stop_weft()
    says(tab, "Lost contact", "h2")
    cluster.h1.start_weft()
    tab.wait(LIVE, "the page is live again")
    assert "Lost contact" not in tab.text()
    silent = "document.querySelector('#picture .warp.silent')"
    tab.wait(f"{silent} !== null", "the thread of h2 is a silent one", timeout=30)
    says(tab, "2 hosts, 1 silent")
    cluster.h2.start_weft()
    tab.wait(f"{silent} === null", "h2 is back", timeout=30)
    tab.close()


@pytest.mark.parametrize("name", ["healthy", "faulty", "empty", "large", "hostile"])
def test_all_text_can_be_read_and_nothing_sticks_out(browser: Browser, name: str) -> None:
    tab = sample(browser, name, width=320)
    for dark in (False, True):
        tab.emulate(dark=dark)
        assert tab.evaluate(_CONTRASTS) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 320
    assert tab.complaints() == []
    tab.close()


def test_names_that_are_html_stay_text(browser: Browser) -> None:
    tab = sample(browser, "hostile")
    says(tab, "<img src=x")
    tab.evaluate("for (const one of document.querySelectorAll('.item')) one.dispatchEvent(new MouseEvent('click'))")
    assert tab.evaluate("document.querySelectorAll('img').length") == 1  # the sign beside weft's name
    assert tab.evaluate("document.title.includes('weft on')")
    assert all(f":{SAMPLES_PORT}/hostile/" in url and url[-1] != "x" for url in tab.requests())
    assert tab.complaints() == []
    tab.close()


def test_a_fault_is_told_with_its_cause_its_evidence_and_a_command_to_copy(browser: Browser) -> None:
    tab = sample(browser, "faulty")
    says(tab, "1 fault and 1 warning", "a packet filter of ada drops UDP port 4789, incoming", "probes are lost")
    browser.call("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    command = "nft insert rule inet filter input udp dport 4789 accept"
    tab.press("Tab", "Tab")  # past the way to skip the faults
    assert tab.evaluate(_LABEL) == f"Copy: {command}"
    tab.press("Enter")
    says(tab, "Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == command
    tab.close()


def test_a_hundred_hosts_and_two_hundred_networks_are_still_a_picture(browser: Browser) -> None:
    tab = sample(browser, "large")
    drawn = "document.querySelectorAll('#picture .item.{}').length"
    assert tab.evaluate(drawn.format("network")) == 12
    assert 5 <= tab.evaluate(drawn.format("host")) <= 12
    assert tab.evaluate("document.querySelectorAll('#peers tbody tr').length") == 12
    tab.evaluate("document.getElementById('search').focus()")
    tab.press(*"metrics-31")
    tab.wait(f"{drawn.format('network')} === 1", "the search finds one network")
    says(tab, "metrics-31")
    tab.close()


def test_several_hosts_in_one_column_can_be_looked_at_alone(browser: Browser) -> None:
    tab = sample(browser, "large")
    label = tab.evaluate("document.querySelector('.host[data-key^=\"hosts \"]').getAttribute('aria-label')")
    reach(tab, label)
    tab.press("Enter")
    says(tab, f"Only {label.split(',')[0]}")
    assert tab.evaluate("document.querySelectorAll('#picture .item.host').length") >= 5
    tab.close()


def test_who_wants_no_motion_gets_none(browser: Browser) -> None:
    tab = sample(browser, "healthy")
    tab.emulate(still=True)
    tab.evaluate("document.querySelector('.knot rect').classList.add('pulse')")
    assert tab.evaluate("getComputedStyle(document.querySelector('.pulse')).animationName") == "none"
    tab.close()
