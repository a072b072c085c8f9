"""A running ``vllm serve``, by its HTTP routes."""

import json
import os
import urllib.error
import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

INDEX_METRIC = "vllm:squeeze_index"
KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT = 600
"""Seconds. A long prefix is computed while the server is asked for it."""


class Server:
    """Asks a server.

    Args:
        url: where it listens: "http://localhost:8000".
    """

    def __init__(self, url: str):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--url: {url!r} must begin with http:// or https://")
        self.url = url.rstrip("/").removesuffix("/v1")

    def index_states(self) -> dict[str, str]:
        """What each index that it serves is, by name: "on the devices", "loading" or "waiting".

        Raises:
            OSError: it cannot be reached, or refuses.
        """
        families = text_string_to_metric_families(self._ask("/metrics").decode())
        samples = (sample for family in families if family.name == INDEX_METRIC for sample in family.samples)
        return {sample.labels["index"]: sample.labels["state"] for sample in samples if sample.value}

    def model(self) -> str:
        """The name of the model that it serves.

        Raises:
            OSError: it cannot be reached, or refuses.
        """
        return json.loads(self._ask("/v1/models"))["data"][0]["id"]

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """What it answers on a route of the OpenAI API.

        Raises:
            OSError: it cannot be reached, or refuses.
        """
        return json.loads(self._ask(route, json.dumps(body).encode()))

    def _ask(self, route: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + route, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise OSError(f"{self.url}{route}: {error.code} {error.read()[:500].decode(errors='replace')}") from None
        except (urllib.error.URLError, TimeoutError) as error:
            raise OSError(f"{self.url}{route}: {getattr(error, 'reason', error)}") from None
