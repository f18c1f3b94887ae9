"""The page in a real browser: pictures follow uploads and sliders, and a broken file gets a sentence.

It runs as a Space does, out of a folder that `python app.py --space` has written, and reaches nothing but itself. With
`LDAE_SCREENSHOT=docs/demo.png` it also makes the picture of README.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SECONDS = 120  # to wait for anything; it takes a few
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of the running page."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("page")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(folder / "uploads")}
    subprocess.run([sys.executable, ROOT / "app.py", "--space", folder / "space"], check=True, env=environment)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder / "space", env=environment | {"PYTHONPATH": ""})
    try:
        wait(lambda: process.poll() is not None or answers(port), "the page starts")
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def wait(condition, what):
    """What a condition gives as soon as it is true."""
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {SECONDS} seconds until {what}"
        time.sleep(0.1)
    return found


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def source(browser, name):
    return browser.execute_script(f"return document.querySelector('#{name} img')?.src")


def changed(browser, act, *names):
    """Acts, and waits until all of these pictures have changed."""
    before = {name: source(browser, name) for name in names}
    act()
    wait(lambda: all(source(browser, name) not in (None, before[name]) for name in names), f"{names} change")


def message(browser):
    return browser.execute_script("return document.querySelector('#message')?.innerText ?? ''")


def upload(browser, path):
    wait(lambda: browser.find_elements("css selector", "#upload input[type=file]"), "the drop area is empty")
    browser.find_element("css selector", "#upload input[type=file]").send_keys(str(path))


def slide(browser, name, value):
    browser.execute_script(
        f"const slider = document.querySelector('#{name} input[type=range]'); slider.value = {value};"
        "for (const event of ['input', 'change']) slider.dispatchEvent(new Event(event, {bubbles: true}));"
    )


def requested(browser):
    """The addresses outside that the page has asked for."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    sent = (m["params"] for m in messages if m["method"] == "Network.requestWillBeSent")
    addresses = {params["request"]["url"] for params in sent if params["documentURL"].startswith("http")}
    return {address for address in addresses if not address.startswith(("http://127.0.0.1:", "data:", "blob:"))}


def test_without_gradio_one_line_says_so():
    code = f"import runpy, sys; sys.modules['gradio'] = None; runpy.run_path({str(ROOT / 'app.py')!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == 'app.py: error: Gradio is not installed; pip install -e ".[demo]"\n'


@pytest.fixture
def app(monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.syspath_prepend(ROOT)
    import app

    return app


@pytest.mark.parametrize("host", ["999.1.1.1", "192.0.2.1", "x" * 70])
def test_an_address_that_is_not_this_machines_is_refused(app, host):
    with pytest.raises(ValueError, match="cannot listen at --host"):
        app.validate_address(host, None)


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_a_free_port_is_taken_and_one_in_use_refused(app, host):
    app.validate_address(host, None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}; choose"):
            app.validate_address(host, port)


@pytest.mark.browser
def test_mistakes_end_with_one_line(page):
    port = page.rpartition(":")[2]
    for given, said in (
        (["--model", "/missing"], "--model: there is no folder"),
        (["--port", port], f"--port {port}; choose"),
    ):
        ran = subprocess.run([sys.executable, ROOT / "app.py", *given], capture_output=True, text=True, timeout=SECONDS)
        assert ran.returncode == 2
        last = ran.stderr.splitlines()[-1]
        assert last.startswith("app.py: error: ")
        assert said in last
        assert "Traceback" not in ran.stderr


@pytest.mark.browser
def test_the_page_follows_its_user(page, browser, tmp_path):
    browser.get(f"{page}/?__theme=light")
    wait(lambda: source(browser, "denoised"), "the first example is shown")
    if path := os.environ.get("LDAE_SCREENSHOT"):
        screenshot(browser, Path(path))

    deep = np.linspace(0, 65535, 80 * 90).reshape(80, 90).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "sixteen-bits.png")
    everything = ("clean", "noisy", "denoised", "features", "nearest")
    changed(browser, lambda: upload(browser, tmp_path / "sixteen-bits.png"), *everything)
    changed(browser, lambda: slide(browser, "sigma", 1.2), "noisy", "denoised")
    assert "σ = 1.20" in browser.find_element("id", "caption").text
    changed(browser, lambda: slide(browser, "percent", 20), "noisy", "denoised")
    assert "sees 13 of 64 patches" in browser.find_element("id", "caption").text

    before = {name: source(browser, name) for name in everything}
    (tmp_path / "broken.png").write_bytes((tmp_path / "sixteen-bits.png").read_bytes()[:200])
    upload(browser, tmp_path / "broken.png")
    assert wait(lambda: message(browser), "the sentence is there") == (
        "This image is damaged and cannot be decoded. Try another copy of it, or another image."
    )
    assert {name: source(browser, name) for name in everything} == before

    example = browser.find_elements("css selector", "#examples button")[1]
    changed(browser, example.click, *everything)
    wait(lambda: not message(browser), "the sentence is gone")
    assert requested(browser) == set()


def screenshot(browser, path):
    """Writes the whole page as it is at first."""
    wait(
        lambda: browser.execute_script("return [...document.images].every(x => x.complete)"), "all pictures are loaded"
    )
    browser.set_window_size(1280, browser.execute_script("return document.body.scrollHeight") + 140)
    time.sleep(1)  # until what moves is still
    browser.save_screenshot(str(path))
