"""`mmfree serve`: the process that serves a model. One thread runs the engine, the main thread the sockets."""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import tyro
import uvicorn

from mmfree_jax.command_line import parse
from mmfree_jax.config import ConfigError, require
from mmfree_jax.devices import use_compile_cache
from mmfree_jax.files import cache_folder
from mmfree_jax.inference.completion import Reader
from mmfree_jax.inference.engine import Engine, Request
from mmfree_jax.inference.sampling import GREEDY, PLAIN
from mmfree_jax.inference.serving.app import Service, make_app
from mmfree_jax.inference.serving.bodies import Limits
from mmfree_jax.inference.serving.chat import find_chat_template
from mmfree_jax.inference.text import TextModel, load_text_model
from mmfree_jax.output import program
from mmfree_jax.remote.reading import fetched

KEY = "MMFREE_API_KEY"  # environment variable: a key on the command line could be read by other users
LOOPBACK = ("127.0.0.1", "::1", "localhost")
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class ServeArguments:
    """Serve a model by HTTP, in the shape of OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models; also
    /health and /metrics. SIGTERM or Ctrl-C lets requests that have begun end, a second one does not."""

    model: tyro.conf.Positional[Path]
    """Folder of the model: a run, an imported, packed or Hugging Face folder."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = 8000
    """Port to listen on; 0: one that is free."""
    api_key: str = ""
    """Key that clients must send; better in the environment variable MMFREE_API_KEY. Empty: none is asked for."""
    name: str = ""
    """Name of the model for clients. Default: that of its folder."""
    slots: int = 8
    """Choices that decode together."""
    context: int = 2048
    """Tokens of a prompt and its completion together, for attention, which keeps room for them in every slot."""
    chat_template: Path | None = None
    """File of a chat template, in place of the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    embedding: Literal["device", "host"] = "device"
    """host: leave the embedding in the host's memory, or in the mapped file of a packed model."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        require(0 <= self.port < 65_536, f"--port {self.port}: must be from 0 to 65535")
        for name, value in {"slots": self.slots, "context": self.context, **dataclasses.asdict(self.limits)}.items():
            require(value >= 1, f"--{name.replace('_', '-')} {value}: must be at least 1")


def main(arguments: list[str]) -> int:
    """Serve a model until a signal comes."""
    chosen = parse(ServeArguments, arguments, f"{program()} serve", urls=("model",))
    use_compile_cache(cache_folder() / "compiled")
    service = make_service(chosen)
    if chosen.host not in LOOPBACK and not service.api_key:
        print(f"warning: whoever reaches {chosen.host} can use the model: ask for a key with {KEY}", file=sys.stderr)
    with listening(chosen.host, chosen.port) as listener:
        host, port = listener.getsockname()[:2]
        with running(service):
            at = f"[{host}]" if ":" in host else host
            print(f"{service.name} · http://{at}:{port}/v1 · {chosen.slots} slots", flush=True)
            return 0 if serve(service, listener) else INTERRUPTED


def make_service(chosen: ServeArguments) -> Service:
    """Load the model, and compile its programs before the first client waits for them."""
    chosen = dataclasses.replace(chosen, model=fetched(chosen.model))
    model = load_text_model(chosen.model, chosen.dtype, chosen.embedding)
    chat = find_chat_template(chosen.model, model.tokenizer, chosen.chat_template)
    engine = Engine(model.served, chosen.slots, chosen.context if model.config.mixer == "attention" else 0)
    warm_up(model, engine)
    name, key = chosen.name or chosen.model.resolve().name, chosen.api_key or os.environ.get(KEY, "")
    return Service(model, name, engine, chosen.limits, chat, key)


def warm_up(model: TextModel, engine: Engine) -> None:
    """Generate a few tokens, greedily and not: these are two programs. Raises what goes wrong."""
    for sampling in (GREEDY, PLAIN):
        reader = Reader(model.tokenizer)
        engine.submit(Request([0], 2, sampling, reader))
        engine.run()
        reader.completion()


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen on an address. Raises ConfigError if that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}") from None
    with listener:
        yield listener


@contextlib.contextmanager
def running(service: Service) -> Iterator[None]:
    """Run the engine in a thread of its own."""
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                if not service.engine.step():
                    service.engine.wait(0.2)
        except Exception as error:  # not even an empty batch could be made again: nothing works any more
            service.broken = error
            service.engine.close(error)

    thread = threading.Thread(target=work, name="engine", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def serve(service: Service, listener: socket.socket) -> bool:
    """Answer requests until a signal comes. Returns whether those that had begun have ended."""
    settings = {"lifespan": "off", "ws": "none", "http": "h11", "log_level": "warning", "access_log": False}
    server = Server(uvicorn.Config(make_app(service), **settings), service)  # type: ignore[arg-type]
    server.run(sockets=[listener])
    return not server.force_exit


class Server(uvicorn.Server):
    """uvicorn, which goes on listening after a signal until requests have ended, so that new ones get an answer."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests at the first signal, and stop at once at the second."""
        self.should_exit = self.force_exit = self.service.draining
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by uvicorn: whether to stop."""
        if self.service.draining and not self.service.active:
            self.should_exit = True
        return await super().on_tick(counter)
