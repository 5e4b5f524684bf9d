"""Language models behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, Inference Providers.

    predictor = Endpoint("http://127.0.0.1:8000/v1", "Qwen/Qwen3-VL-8B-Instruct", "qwen3")
    answers = predictor(rows)  # expression rows of grefcoco.load

The environment variable OPENAI_API_KEY is sent as the key; without it huggingface_hub's own token is used.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import ClassVar
from urllib.parse import urlsplit

from huggingface_hub import AsyncInferenceClient, ChatCompletionOutput
from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError
from PIL import Image

from scoring.answers import Answer, read_text
from scoring.grammars import named, prompt, resize

RETRIES = 6  # of a request, after a fault that may pass
FIRST_DELAY = 1.0  # seconds before the first retry; doubled for each other one
# but for the first two: a body that is not JSON, or of another shape
PASSING_ERRORS = (HTTPError, InferenceTimeoutError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
MOST_DELAY = 60.0  # seconds, whatever the server asks for
PASSING = {408, 409, 425, 429}  # status codes below 500 after which a request is repeated


class Endpoint:
    """The answers of a served model, by chat completion.

    Args:
        url: of the server, up to "/v1".
        model: its name there.
        grammar: in which the model writes boxes, a key of `scoring.grammars.GRAMMARS`.
        concurrency: requests at a time.
        max_tokens: of an answer, with the thoughts of a model that thinks.
        seed: sent with each request; the temperature is 0.
        timeout: seconds for one request.
    """

    columns: ClassVar[list[str]] = ["image", "image_id", "width", "height", "sent_id", "sentence"]

    def __init__(
        self,
        url: str,
        model: str,
        grammar: str,
        concurrency: int = 8,
        max_tokens: int = 2048,
        seed: int = 0,
        timeout: float = 300.0,
    ) -> None:
        self.url, self.model, self.grammar, self.concurrency, self.timeout = url, model, grammar, concurrency, timeout
        self.options = {"model": model, "max_tokens": max_tokens, "seed": seed, "temperature": 0.0}
        named(grammar)
        _check_url(url)
        self.origin = {**self.options, "grammar": grammar, "prompt": prompt(grammar, "{sentence}")}

    def __call__(self, rows: list[dict]) -> list[Answer]:
        """The answers to expression rows, in their order.

        Raises:
            OSError: the server did not answer, after all retries.
            HfHubHTTPError: it refused a request.
        """
        texts = asyncio.run(self._answer_all(rows))
        return [read_text(self.grammar, text, row) for text, row in zip(texts, rows, strict=True)]

    async def _answer_all(self, rows: list[dict]) -> list[str | None]:
        images = {row["image_id"]: row["image"] for row in rows}
        images = {image_id: data_uri(image, self.grammar) for image_id, image in images.items()}
        free = asyncio.Semaphore(self.concurrency)
        key = os.environ.get("OPENAI_API_KEY")
        async with AsyncInferenceClient(base_url=self.url, api_key=key, timeout=self.timeout) as client:
            return await asyncio.gather(
                *(self._answer(client, free, images[row["image_id"]], row["sentence"]) for row in rows)
            )

    async def _answer(
        self, client: AsyncInferenceClient, free: asyncio.Semaphore, image: str, sentence: str
    ) -> str | None:
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": prompt(self.grammar, sentence)},
        ]
        async with free:
            for attempt in range(RETRIES + 1):
                try:
                    completion = await client.chat_completion([{"role": "user", "content": content}], **self.options)
                    return _content(completion)
                except PASSING_ERRORS as error:
                    fault = error
                if not _may_pass(fault):
                    raise fault
                if attempt < RETRIES:
                    await asyncio.sleep(_delay(fault, attempt))
        raise OSError(f"{self.url}: no answer after {RETRIES + 1} requests ({type(fault).__name__}: {fault})")


def data_uri(image: Image.Image, grammar: str) -> str:
    """A PNG of the image in a data URI, at the size that the grammar's numbers refer to."""
    file = BytesIO()
    resize(image, grammar).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _check_url(url: str) -> None:
    """Raises ValueError for a URL that no request can reach, which would be tried again and again."""
    try:
        parts = urlsplit(url)
        is_usable = bool(parts.hostname) and parts.port != 0  # a port above 65535 raises ValueError
    except ValueError:
        is_usable = False
    if not is_usable or any(map(str.isspace, url)):
        raise ValueError(f"{url!r} is no URL of a server, such as http://127.0.0.1:8000/v1")


def _content(completion: ChatCompletionOutput) -> str | None:
    """The text of an answer; None where the server gives none, such as after thoughts that were cut off.

    Raises:
        ValueError: an answer without a text.
    """
    if not completion.choices:
        raise ValueError("the server's answer has no choices")
    content = completion.choices[0].message.content
    if isinstance(content, list):  # of parts
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str | None):
        raise ValueError(f"the server's answer has a {type(content).__name__} for its text")
    return content


def _may_pass(fault: Exception) -> bool:
    if not isinstance(fault, HfHubHTTPError):
        return True
    return fault.response.status_code >= 500 or fault.response.status_code in PASSING


def _delay(fault: Exception, attempt: int) -> float:
    """Seconds until the next request: what the server asks for, or twice as long as before."""
    asked = fault.response.headers.get("Retry-After", "") if isinstance(fault, HfHubHTTPError) else ""
    try:
        seconds = float(asked) if asked[:1].isdigit() else parsedate_to_datetime(asked).timestamp() - time.time()
    except ValueError:
        seconds = FIRST_DELAY * 2**attempt
    return min(max(seconds, 0.0), MOST_DELAY)
