"""Serves a model's images by HTTP: all requests share one running batch, and a page shows each image when it is ready.

    pip install 'dd_kernels[serve]'
    python examples/serve.py --port 8000

Open http://127.0.0.1:8000, or ask for lines of JSON: curl -N 'http://127.0.0.1:8000/images?n=4&seed=7&sampler=unipc'.
Image number k of a seed is the same in any request, whatever else the server draws at the time.
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import json
import pathlib
import queue
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import HTMLResponse, StreamingResponse
from torch import Tensor

import dd_kernels as dd
from dd_kernels.apps import images
from dd_kernels.apps.checkpoint import load_model
from dd_kernels.samplers.named import FEW_STEP_SAMPLERS

SAMPLERS = {"ddim": dd.ddim, **FEW_STEP_SAMPLERS}
PAGE = pathlib.Path(__file__).with_suffix(".html")


class Service:
    """A model, the samplers that a client may name, and the running batch that draws for all clients."""

    def __init__(self, model: str | None, max_batch: int, max_queue: int) -> None:
        self.model, self.info = load_model(model)
        self.schedule = self.info.make_schedule()
        self.sampler = dd.Sampler(self.model, self.info.sample_shape, max_batch=max_batch, max_queue=max_queue)

    @functools.lru_cache(maxsize=64)  # noqa: B019, a server has one service
    def table(self, name: str, steps: int) -> dd.StepTable:
        """Returns a sampler's table; raises ``ValueError`` for steps that the schedule does not have."""
        learned = self.model.config["learn_variance"]
        return SAMPLERS[name](self.schedule, steps, prediction=self.info.prediction, learned_variance=learned)

    def request(self, table: dd.StepTable, seed: int, number: int, label: int | None, guidance: float) -> Any:
        """Returns the request for image ``number`` of a seed; without a label the classes take turns."""
        classes, null = self.model.config["num_classes"], self.model.null_label
        if classes is None:
            return dd.SampleRequest(table, seed, number)
        condition = {"y": torch.tensor([number % classes if label is None else label])}
        guided: dict[str, Any] = (
            {} if guidance == 1 else {"uncond_kwargs": {"y": torch.tensor([null])}, "guidance_scale": guidance}
        )
        return dd.SampleRequest(table, seed, number, model_kwargs=condition, **guided)

    def check(self, sampler: str, label: int | None, guidance: float) -> None:
        """Raises ``ValueError`` for what this model cannot draw."""
        classes = self.model.config["num_classes"]
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
        if label is not None and not 0 <= label < (classes or 0):
            raise ValueError(f"label must be below {classes or 0}, the model's number of classes; got {label}")
        if guidance != 1 and self.model.null_label is None:
            raise ValueError(f"guidance needs a model trained with dropped labels; got {guidance}")

    def submit(self, requests: Sequence[dd.SampleRequest]) -> list[Future[Tensor]]:
        """Queues all requests or, where the queue is too short for them, none; raises ``queue.Full``."""
        futures: list[Future[Tensor]] = []
        try:
            for request in requests:
                futures.append(self.sampler.submit(request))
        except queue.Full:
            for future in futures:
                future.cancel()
            raise
        return futures


async def lines(futures: Sequence[Future[Tensor]]) -> AsyncIterator[str]:
    """Yields a line of JSON for each image when it is ready; cancels those that are left when the client goes."""

    async def line(number: int, future: Future[Tensor]) -> str:
        try:
            image = images.to_uint8(await asyncio.wrap_future(future))[0]
            found = {"number": number, "png": base64.b64encode(images.png_bytes(image.numpy())).decode()}
        except Exception as error:
            found = {"number": number, "error": f"{type(error).__name__}: {error}"}
        return f"{json.dumps(found)}\n"

    try:
        for ready in asyncio.as_completed([line(number, future) for number, future in enumerate(futures)]):
            yield await ready
    finally:
        for future in futures:
            future.cancel()


def create_app(model: str | None = None, max_batch: int = 16, max_queue: int = 256) -> FastAPI:
    """Returns the application; its running batch takes steps as long as the application runs."""
    service = Service(model, max_batch, max_queue)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with service.sampler.serving():
            yield

    app = FastAPI(title="dd_kernels", lifespan=lifespan)
    app.state.service = service

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        samplers = "".join(f"<option>{name}</option>" for name in SAMPLERS)
        classes = "".join(f"<option value='{i}'>{name}</option>" for i, name in enumerate(service.info.classes))
        return PAGE.read_text(encoding="utf-8").replace("{samplers}", samplers).replace("{classes}", classes)

    @app.get("/images")
    async def draw(
        n: Annotated[int, Query(ge=1, le=max_queue)] = 1,
        seed: Annotated[int, Query(ge=0, lt=2**64)] = 0,
        sampler: str = "ddim",
        steps: Annotated[int, Query(ge=1)] = 20,
        label: int | None = None,
        guidance: Annotated[float, Query(ge=0, le=100)] = 1.0,
    ) -> StreamingResponse:
        try:
            service.check(sampler, label, guidance)
            table = service.table(sampler, steps)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        try:
            futures = service.submit([service.request(table, seed, i, label, guidance) for i in range(n)])
        except queue.Full as error:
            raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
        return StreamingResponse(lines(futures), media_type="application/x-ndjson")

    return app


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model file that train wrote, or a bundled one's name")
    parser.add_argument("--max-batch", type=int, default=16, help="images in flight (default: 16)")
    parser.add_argument("--max-queue", type=int, default=256, help="images that may wait besides (default: 256)")
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    args = parser.parse_args()
    uvicorn.run(create_app(args.model, args.max_batch, args.max_queue), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
