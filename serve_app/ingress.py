"""The HTTP ingress: OpenAI's endpoints. Validates, tokenizes, follows the engine and answers; knows no torch."""

import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from engine.checkpoint import local_folder
from engine.config import MODES
from engine.request import Request as EngineRequest
from engine.tokenizer import Tokenizer
from serve_app import limits, offload, request_body
from serve_app.answer import Answer
from serve_app.config import AppConfig
from serve_app.engine_client import EngineClient
from serve_app.errors import ApiError
from serve_app.generation import Generation
from serve_app.middleware import LastResort
from serve_app.schemas import ChatRequest, CompletionRequest, GenerationRequest, choice_seed
from serve_app.streaming import Envelope, EventStream, frames

app = FastAPI(title="TriServe", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
app.add_middleware(LastResort)


@app.exception_handler(ApiError)
async def _answer_api_error(_: Request, error: ApiError) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(error.body(), error.status, headers)


@app.exception_handler(HTTPException)
async def _answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"[: limits.ERROR_CHARACTERS]
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    body = ApiError(message, status=error.status_code, code=code).body()
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


def _body_of(model: type[GenerationRequest]) -> dict[str, Any]:
    schema = model.model_json_schema()
    inlined = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined}}}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """`schema` with its references replaced by what they refer to: OpenAPI keeps definitions elsewhere."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}


# Above the class: `serve.ingress` takes a copy of it, and of what it refers to, as soon as it is defined.
def _too_long(request: str, context: int, param: str) -> ApiError:
    message = f"the context holds {context} tokens; {request}"
    return ApiError(message, param=param, code="context_length_exceeded")


@serve.ingress(app)
class Ingress:
    """Stateless but for the tokenizer: any number of them may run."""

    def __init__(self, config: AppConfig, engine: DeploymentHandle[Any]) -> None:
        self._config = config
        self._model = config.model_name
        self._tokenizer = Tokenizer(local_folder(config.engine.checkpoint, weights=False))
        self._engine = EngineClient(engine, config.serve.heartbeat_seconds, config.serve.start_seconds)
        self._open = 0  # completions being answered
        self._draining = False
        self._started = int(time.time())
        self._context = 0  # tokens; 0 until an engine has said it

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(self) -> dict[str, Any]:
        """An engine takes requests and makes steps; otherwise 503. Tells how busy the engines are."""
        if self._draining:
            raise ApiError("the server is about to stop", status=503, code="draining")
        replicas = await self._engine.status()
        if not any(map(self._engine.serving, replicas)):
            why = replicas[0]["error"] or "no engine replica makes steps and takes requests"
            raise ApiError(why, status=503, code="engine_unavailable")
        return {"status": "ready", "replicas": replicas}

    async def drain(self) -> int:
        """Takes no more completions; returns how many are still being answered."""
        self._draining = True
        return self._open

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self._card()]}

    @app.get("/v1/models/{name:path}")
    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return await self._card()

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat(self, request: Request) -> Response:
        body = await request_body.read(request, ChatRequest, self._config.server.max_body_bytes)
        self._check_model(body.model)
        messages = [message.plain() for message in body.messages]
        size = await self._check_size([message["content"] for message in messages], "messages")
        try:
            prompt = await offload.run(size, self._tokenizer.encode_chat, messages)
        except ValueError as error:
            raise ApiError(f"messages: {error}", param="messages", code="invalid_value") from error
        return await self._complete(body, [prompt], "messages")

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
    async def completions(self, request: Request) -> Response:
        body = await request_body.read(request, CompletionRequest, self._config.server.max_body_bytes)
        self._check_model(body.model)
        prompts = [
            await self._encode_prompt(prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]
        return await self._complete(body, prompts, "prompt")

    async def _encode_prompt(self, prompt: str) -> list[int]:
        size = await self._check_size([prompt], "prompt")
        return await offload.run(size, self._tokenizer.encode_prompt, prompt)

    async def _check_size(self, texts: Sequence[str], param: str) -> int:
        """The characters of `texts`. Refuses what cannot fit before it costs a tokenization."""
        context = await self._context_tokens()
        least = sum(self._tokenizer.least_tokens(text) for text in texts)
        if least > context:
            raise _too_long(f"this request has at least {least} in its {param}", context, param)
        return sum(map(len, texts))

    async def _complete(
        self, body: GenerationRequest, prompts: Sequence[Sequence[int]], param: str
    ) -> Response:
        chat = isinstance(body, ChatRequest)
        envelope = Envelope(
            f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()), self._model, chat
        )
        answers = await self._answers(envelope.id, body, prompts, param)
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        ignored = body.ignored_params()
        headers = {"x-ignored-params": ", ".join(ignored)} if ignored else {}
        server = self._config.server
        interval = server.stream_interval_seconds if body.stream else server.whole_interval_seconds
        if self._draining:
            raise ApiError("the server is about to stop", status=503, code="draining")
        generation = Generation(self._engine, answers, interval)
        self._open += 1
        generation.on_close(self._close)
        try:
            if body.stream:
                await generation.settle(server.keep_alive_seconds)
                stream = frames(
                    envelope, generation, server.keep_alive_seconds, prompt_tokens, body.include_usage
                )
                return EventStream(stream, generation, headers)
            async for _ in generation.events(None):
                pass
            usage = generation.usage(prompt_tokens)
            generation.close()
            return JSONResponse(envelope.whole(generation, usage), headers=headers)
        except BaseException:
            generation.close()
            raise

    def _close(self) -> None:
        self._open -= 1

    async def _answers(
        self, response_id: str, body: GenerationRequest, prompts: Sequence[Sequence[int]], param: str
    ) -> list[Answer]:
        """One per prompt and choice. Raises ApiError if the context cannot hold one of them."""
        engine = self._config.effective_engine
        mode = body.chosen_mode(engine.default_mode)
        seed = secrets.randbits(limits.SEED_BITS) if body.seed is None else body.seed
        diffusion = body.diffusion_params(engine.diffusion)
        answers: list[Answer] = []
        for prompt in prompts:
            max_tokens = await self._answer_tokens(body, len(prompt), param)
            for choice in range(body.choices):
                request = EngineRequest(
                    id=f"{response_id}-{len(answers)}",
                    prompt=tuple(prompt),
                    sampling=body.sampling(choice_seed(seed, choice), max_tokens),
                    mode=mode,
                    diffusion=diffusion,
                )
                answers.append(Answer(request, self._tokenizer, body.stops))
        return answers

    async def _answer_tokens(self, body: GenerationRequest, prompt_tokens: int, param: str) -> int:
        context = await self._context_tokens()
        if prompt_tokens == 0:
            raise ApiError(f"{param}: holds no token", param=param, code="invalid_value")
        left = context - prompt_tokens
        wanted = body.answer_tokens
        if left < 1 or (wanted or 0) > left:
            asked = f" and {wanted} to generate" if wanted else ""
            raise _too_long(
                f"this request has {prompt_tokens} in its {param}{asked}",
                context,
                param if left < 1 else body.answer_tokens_param,
            )
        return min(left, self._config.server.default_max_tokens) if wanted is None else wanted

    async def _context_tokens(self) -> int:
        if not self._context:
            self._context = int((await self._engine.status())[0]["max_model_len"])
        return self._context

    async def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._started,
            "owned_by": "triserve",
            "max_model_len": await self._context_tokens(),
            "modes": ["auto", *MODES],
        }

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._model):
            message = f"the model {name!r} does not exist; this server has {self._model!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
