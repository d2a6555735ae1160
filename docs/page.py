"""Takes the picture docs/page.png of the page over a sample: `make picture`."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

from lab.browser import Browser
from lab.sample import server

FILE = Path(__file__).with_name("page.png")


def main() -> None:
    samples = server()
    Thread(target=samples.serve_forever, daemon=True).start()
    with Browser() as browser:
        tab = browser.open(f"http://127.0.0.1:{samples.port}/faulty/", width=1200, height=1376)
        tab.wait("document.querySelector('#picture svg') !== null", "the picture is drawn")
        tab.screenshot(FILE, whole=False)
    samples.shutdown()


if __name__ == "__main__":
    main()
