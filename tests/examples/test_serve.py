"""The server of images: what it draws, what it refuses, what it does when a client goes; and its page in a browser."""

import asyncio
import base64
import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import dd_kernels as dd
from dd_kernels.apps import images
from dd_kernels.apps.checkpoint import load_model

serve = pytest.importorskip("serve", reason="needs dd_kernels[serve]", exc_type=ImportError)
websockets = pytest.importorskip("websockets.sync.client")
testclient = pytest.importorskip("fastapi.testclient", reason="needs httpx", exc_type=RuntimeError)


@pytest.fixture
def client():
    with testclient.TestClient(serve.create_app("digits", max_batch=4, max_queue=8)) as client:
        yield client


def drawn(answer):
    """Returns the pixels of an answer's images by their numbers."""
    assert answer.status_code == 200, answer.text
    found = [json.loads(line) for line in answer.text.splitlines()]
    return {line["number"]: np.asarray(Image.open(io.BytesIO(base64.b64decode(line["png"])))) for line in found}


def test_images_are_those_of_the_library(client):
    found = drawn(client.get("/images", params={"n": 3, "seed": 7, "steps": 4, "guidance": 2.0}))
    model, info = load_model("digits")
    table = dd.ddim(info.make_schedule(), 4)
    kwargs = {"model_kwargs": {"y": torch.arange(3)}, "uncond_kwargs": {"y": torch.full((3,), 10)}}
    x = dd.sample(model, (3, 1, 8, 8), table, seed=7, guidance_scale=2.0, **kwargs)
    expected = images.to_uint8(x)[..., 0].numpy()
    assert sorted(found) == [0, 1, 2]
    for number, pixels in found.items():  # other batches round otherwise
        assert np.abs(pixels.astype(int) - expected[number]).max() <= 1


def test_one_class_and_another_sampler(client):
    found = drawn(client.get("/images", params={"n": 2, "steps": 3, "sampler": "unipc", "label": 4}))
    model, info = load_model("digits")
    kwargs = {"model_kwargs": {"y": torch.tensor([4])}}
    x = dd.sample(model, (1, 1, 8, 8), dd.unipc(info.make_schedule(), 3), seed=0, first_sample=1, **kwargs)
    assert np.abs(found[1].astype(int) - images.to_uint8(x)[0, ..., 0].numpy()).max() <= 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sampler": "none"}, "sampler must be one of ddim, dpm++"),
        ({"steps": 1001}, "steps must be an int in [1, 1000]; got 1001"),
        ({"label": 10}, "label must be below 10, the model's number of classes; got 10"),
        ({"n": 9}, "less than or equal to 8"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_what_it_cannot_draw(client, params, message):
    answer = client.get("/images", params=params)
    assert answer.status_code == 422
    assert message in answer.text


def test_a_full_queue_is_said_and_harms_nobody(client):
    service = client.app.state.service
    waiting = [service.request(service.table("ddim", 500), 0, i, None, 1.0) for i in range(10)]
    futures = [service.sampler.submit(request) for request in waiting[:4]]
    while service.sampler._waiting:
        time.sleep(0.01)
    futures += [service.sampler.submit(request) for request in waiting[4:]]
    answer = client.get("/images", params={"n": 3})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert not any(future.cancelled() for future in futures)
    assert sum(not entry.future.cancelled() for entry in service.sampler._waiting) == 6
    for future in futures:
        future.cancel()
    assert len(drawn(client.get("/images", params={"n": 2, "steps": 2}))) == 2


def test_a_client_that_goes_frees_its_places(client):
    service = client.app.state.service
    futures = service.submit([service.request(service.table("ddim", 900), 0, i, None, 1.0) for i in range(6)])

    async def leave():
        stream = serve.lines(futures)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    asyncio.run(leave())
    assert all(future.cancelled() for future in futures)
    assert len(drawn(client.get("/images", params={"n": 1, "steps": 2}))) == 1


def test_an_error_of_the_model_is_a_line(client, monkeypatch):
    """One request of a model that fails for it gets the error, another one its image."""
    service = client.app.state.service
    futures = service.submit(
        [
            service.request(service.table("ddim", 2), 0, 0, 1, 1.0),
            dd.SampleRequest(service.table("ddim", 2), 0, model_kwargs={"y": torch.tensor([1]), "more": 1}),
        ]
    )

    async def read():
        return [json.loads(line) async for line in serve.lines(futures)]

    found = {line["number"]: line for line in asyncio.run(read())}
    assert "png" in found[0]
    assert found[1]["error"].startswith("TypeError")


@pytest.fixture
def address():
    """The address of a server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, serve.__file__, "--model", "digits", "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert any("Uvicorn running" in line for line in server.stderr)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.communicate()


class Browser:
    """Headless Chromium with one page, spoken to in its DevTools protocol."""

    def __init__(self, program, folder):
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
        command = [program, *options, "--remote-debugging-port=0", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        listening = next(line for line in self.process.stderr if "DevTools listening on" in line)
        port = re.search(r":(\d+)/", listening)[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self.closing = contextlib.ExitStack()
        self.socket = self.closing.enter_context(websockets.connect(page["webSocketDebuggerUrl"], max_size=None))

    def evaluate(self, expression):
        """Returns the value of a JavaScript expression in the page."""
        call = {"id": 1, "method": "Runtime.evaluate", "params": {"expression": expression, "returnByValue": True}}
        self.socket.send(json.dumps(call))
        while (answer := json.loads(self.socket.recv(timeout=30))).get("id") != 1:
            pass
        return answer["result"]["result"].get("value")

    def open(self, address, until):
        """Opens a page and returns the text of its status line once that matches."""
        self.evaluate(f"location.href = {address!r}")
        for _ in range(300):
            time.sleep(0.1)
            text = self.evaluate("document.querySelector('output')?.value") or ""
            if re.search(until, text):
                return text
        raise AssertionError(f"the page says {text!r}")

    def close(self):
        self.closing.close()
        self.process.terminate()
        self.process.communicate()


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed")
    found = Browser(program, tmp_path / "profile")
    yield found
    found.close()


@pytest.mark.slow
def test_the_page_in_a_browser(address, browser):
    """Eight images are shown of an address that names them, the button draws others, and an error is said."""
    browser.open(f"{address}/?n=8&steps=3&sampler=unipc", until="^8 of 8 in")
    pictures = "[...document.querySelectorAll('#images img')]"
    assert browser.evaluate(f"{pictures}.map(image => image.naturalWidth)") == [8] * 8
    assert browser.evaluate(f"{pictures}.map(image => image.alt)") == [f"image {i}" for i in range(8)]
    assert browser.evaluate("document.querySelector('[name=sampler]').value") == "unipc"
    browser.evaluate("document.querySelector('[name=n]').value = 2; document.querySelector('button').click()")
    assert browser.open(browser.evaluate("location.href"), until="^2 of 2 in")
    assert browser.evaluate(f"{pictures}.length") == 2
    assert "steps must be an int in [1, 1000]" in browser.open(f"{address}/?n=1&steps=5000", until="steps")
