"""A server as a rollout sees it: /generate, the OpenAI-compatible endpoint, and our admin endpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai
import requests

from sglang_er.rollout.errors import RolloutError

REQUEST_TIMEOUT_S = 600.0
# The last reply of a batch may precede the server's own bookkeeping of it.
IDLE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Response:
    """One response. `tokens` is the server's own count. The ids and logprobs are there where they were asked for.

    `top`: per position, token id -> logprob of the most likely tokens.
    """

    text: str
    tokens: int
    finish: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[dict[int, float]] = field(default_factory=list)


class Client:
    """Talks to one server; safe to use from several threads. Every failure is a RolloutError."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = requests.Session()
        # As many connections as a batch may hold; the default pool of 10 would throw the others away.
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=256))
        # No retries: a request that was sent twice would be measured once.
        self._openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S)

    def healthy(self) -> bool:
        """True once the server has answered a request by generating a token."""
        try:
            return self._session.get(f"{self.url}/health_generate", timeout=30).status_code == 200
        except requests.RequestException:
            return False

    def generate(self, prompt: str | Sequence[int], sampling: Mapping[str, Any], top_logprobs: int = 0) -> Response:
        """SGLang's own endpoint; a text or token ids, which go to the model as they are."""
        given = {"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}
        body: dict[str, Any] = {**given, "sampling_params": dict(sampling)}
        if top_logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": top_logprobs}
        reply = self._call("POST", "/generate", body)
        meta = reply["meta_info"]
        chosen = meta.get("output_token_logprobs") or []
        return Response(
            text=reply["text"],
            tokens=int(meta["completion_tokens"]),
            finish=str((meta.get("finish_reason") or {}).get("type")),
            ids=[int(entry[1]) for entry in chosen],
            logprobs=[float(entry[0]) for entry in chosen],
            top=[{int(t[1]): float(t[0]) for t in entry} for entry in meta.get("output_top_logprobs") or [] if entry],
        )

    def chat(self, prompt: str, max_tokens: int, temperature: float) -> Response:
        """The OpenAI-compatible endpoint, through OpenAI's own client; the server applies the chat template."""
        try:
            reply = self._openai.chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": prompt}],
                max_tokens=max_tokens,
                temperature=temperature,
            )
        except openai.APIStatusError as error:
            raise RolloutError(f"the OpenAI endpoint: {error.status_code} {_one_line(error.message)}") from error
        except openai.OpenAIError as error:
            raise RolloutError(f"the OpenAI endpoint failed: {_cause(error)}") from error
        if not reply.choices or reply.usage is None:
            raise RolloutError("the OpenAI endpoint sent a reply without a choice or without usage")
        choice = reply.choices[0]
        return Response(
            text=choice.message.content or "", tokens=reply.usage.completion_tokens, finish=choice.finish_reason
        )

    def state(self) -> dict[str, Any]:
        """GET /er/state of the first engine."""
        engine: dict[str, Any] = self._call("GET", "/er/state")["engines"][0]
        return engine

    def model_path(self) -> str:
        """What the server was told to load."""
        return str(self._call("GET", "/model_info")["model_path"])

    def set_policy(self, changes: Mapping[str, Any]) -> None:
        """Switch the policy; waits until the server counts itself idle."""
        self._when_idle("/er/policy", dict(changes), busy=409)

    def flush_cache(self) -> None:
        """Empty the prefix cache; waits until the server counts itself idle."""
        self._when_idle("/flush_cache", None, busy=400)

    def _when_idle(self, path: str, body: Mapping[str, Any] | None, busy: int) -> None:
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            reply = self.send("POST", path, body)
            if reply.status_code == 200:
                return
            if reply.status_code != busy or time.monotonic() > deadline:
                said = f"POST {path}" + (f" {body}" if body else "")
                raise RolloutError(f"{said}: {reply.status_code} {_one_line(reply.text)}")
            time.sleep(0.05)

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> requests.Response:
        """Any status is an answer. Raises RolloutError where there is none."""
        try:
            try:
                return self._request(method, path, body)
            except requests.ConnectionError as error:
                if not isinstance(_innermost(error), ConnectionResetError):
                    raise
                # The server closes connections that were idle for 5 s; one that is used again at that moment is lost
                # with a request that nobody has read.
                return self._request(method, path, body)
        except requests.RequestException as error:
            raise RolloutError(f"{method} {path}: {_cause(error)}") from error

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> requests.Response:
        return self._session.request(method, self.url + path, json=body, timeout=REQUEST_TIMEOUT_S)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        reply = self.send(method, path, body)
        if reply.status_code != 200:
            raise RolloutError(f"{method} {path}: {reply.status_code} {_one_line(reply.text)}")
        try:
            return reply.json()
        except ValueError as error:
            raise RolloutError(f"{method} {path}: the reply is not JSON: {_one_line(reply.text)}") from error


def _one_line(what: object) -> str:
    return " ".join(str(what).split())[:300]


def _cause(error: BaseException) -> str:
    """The innermost reason: what HTTP libraries wrap around `connection refused` fills a screen."""
    cause = _innermost(error)
    return _one_line(cause) or type(cause).__name__


def _innermost(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
