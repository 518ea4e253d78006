"""A headless Chromium for tests of pages: it reaches only this machine and records its requests."""

import contextlib
import json
import shutil

import pytest
from conftest import needs

BROWSER, DRIVER = (shutil.which(program) for program in ("chromium", "chromedriver"))
needs_browser = needs(BROWSER and DRIVER, "chromium or chromedriver")
ARGUMENTS = (
    "--headless=new --no-sandbox --disable-dev-shm-usage --no-first-run --disable-background-networking".split()
)
ARGUMENTS += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--window-size=1200,900"]


@contextlib.contextmanager
def headless_browser(profile):
    """Yields a driver of a browser with its profile in the folder `profile`."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium (extra [clients]) is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def requests(driver) -> list[str]:
    """Returns the URLs that pages requested since the last call, without data: and blob: and the browser's own."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    addresses = [one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome")]
    return [address for address in addresses if not address.startswith(("data:", "blob:", "chrome"))]


def complaints(driver) -> list[str]:
    """Returns the errors on the browser's console since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def set_width(driver, width: int, height: int) -> None:
    """Emulates a screen of this size, e.g. a phone's; a real window has a minimum width."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
