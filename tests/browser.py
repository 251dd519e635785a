"""A headless Chromium for tests of pages: what a page shows, logs and fetches, and a picture of it."""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser", "open_browser"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# A container's root has no sandbox, and its /dev/shm may be small. What a browser asks of its maker is left out.
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",  # this machine only
)
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


class Browser:
    """One window of a headless browser.

    Args:
        driver: Selenium's driver of a Chromium that keeps its console.

    Attributes:
        driver: The same, for clicks and uploads.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str, *, width: int = 1200, height: int = 900, is_dark: bool = False) -> None:
        """Show a file or an address in a window of that many pixels, in light or dark colours; empty the console."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        self.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get_log("browser")
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def errors(self) -> list[str]:
        """Return the errors and warnings that the console has shown since the last call or `open`."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def text(self) -> str:
        """Return the text that a reader sees."""
        return self.driver.execute_script("return document.body.innerText")

    def count(self, selector: str) -> int:
        """Return the number of elements that a CSS selector finds."""
        return self.driver.execute_script("return document.querySelectorAll(arguments[0]).length", selector)

    def requests(self) -> list[str]:
        """Return the addresses that the page has fetched; what it holds itself is none."""
        script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
        return [name for name in self.driver.execute_script(script) if not name.startswith("data:")]

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")

    def screenshot(self, path: Path) -> Path:
        """Save a picture of the whole page, as PNG; return its path."""
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(picture["data"]))
        return path


def open_browser(profile: Path) -> Browser:
    """Start a browser, or skip the test that asks for one where there is none.

    Args:
        profile: Folder for what the browser keeps.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (requirements-dev.txt)")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs a browser and its driver (on Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (*OPTIONS, *CAMERA, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver, env={**os.environ, "no_proxy": "localhost,127.0.0.1"})
    return Browser(webdriver.Chrome(options=options, service=service))
