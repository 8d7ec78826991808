"""A server, and ComfyUI's page on it in a headless Chromium."""

from __future__ import annotations

import os

import pytest
from live import server_in
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

# The last four keep the browser from calling its maker at every start.
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --window-size=1920,1080 --disable-dev-shm-usage "
    "--no-first-run --disable-quic --disable-background-networking --disable-component-update "
    "--disable-sync"
)
READY = """
const app = window.app;
return Boolean(app?.graph?.nodes && window.LiteGraph?.registered_node_types?.LowBitInspect
  && app.extensionManager?.setting);
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server; its page shows no first-run tour."""
    with server_in(tmp_path_factory.mktemp("server")) as server:
        server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
        yield server


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """The browser, not on any page yet."""
    options = webdriver.ChromeOptions()
    options.binary_location = os.environ["LOWBIT_CHROME"]
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(os.environ["LOWBIT_CHROMEDRIVER"]))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def page(server, browser):
    """The page, freshly opened and ready."""
    browser.get(server.url)
    WebDriverWait(browser, 180).until(lambda driver: driver.execute_script(READY))
    return browser
