"""A headless Chromium for tests of pages, which reaches nothing but this machine and says what it asked for."""

import contextlib
import json
import shutil

import pytest
from conftest import needs

BROWSER, DRIVER = (shutil.which(program) for program in ("chromium", "chromedriver"))
needs_browser = needs(BROWSER and DRIVER, "chromium or chromedriver")


@contextlib.contextmanager
def headless_browser(profile):
    """A driver of a browser that keeps its things in the folder `profile`."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium (extra [clients]) is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        "--window-size=1200,900",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def requests(driver) -> list[str]:
    """Addresses that pages asked for since the last call, but those that name their own content.

    What the browser's own pages ask for counts for nothing.
    """
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    addresses = [one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome")]
    return [address for address in addresses if not address.startswith(("data:", "blob:", "chrome"))]


def complaints(driver) -> list[str]:
    """What the browser's console has called errors since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def set_width(driver, width: int, height: int) -> None:
    """The window as a phone's; the driver's own window has a least width."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
