"""`mmfree serve` as a process: it says where it listens, serves, and ends well at a signal."""

import os
import signal
import subprocess
import sys
import threading

import openai
import pytest

from mmfree_jax import commands
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from mmfree_jax.inference.packed import save_packed
from mmfree_jax.inference.text import load_text_model
from tests.inference.small import made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "tiny-model"
    save_packed(made("bitnet"), path, tokenizer_json=byte_tokenizer().backend.to_str())
    (path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1].content }}:")
    return path


def test_the_command_serves_until_a_signal_and_lets_a_stream_end(folder, programs):
    environment = os.environ | {"MMFREE_API_KEY": "k", "MMFREE_JAX_CACHE": str(programs)}
    alone = load_text_model(folder).generate([*"abcdefgh"], max_tokens=800, temperature=0)
    prompt = next(text for text, found in zip("abcdefgh", alone, strict=True) if found.finish == "length")
    command = [sys.executable, "-m", "launch", "serve", str(folder), "--port", "0", "--context", "900", "--slots", "2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = threading.Timer(120, process.kill)
    watch.start()
    try:
        line = process.stdout.readline()
        name, url, slots = line.strip().split(" · ")
        assert (name, slots) == ("tiny-model", "2 slots"), line
        client = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
        chat = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=3)
        assert chat.usage.prompt_tokens == 3
        stream = client.completions.create(model=name, prompt=prompt, max_tokens=800, temperature=0, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIStatusError, match="shutting down"):
            client.completions.create(model=name, prompt="x")
        assert [part.choices[0].finish_reason for part in stream][-1] == "length"
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        watch.cancel()
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--slots", "0"], "--slots 0: must be at least 1"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1 port 8000"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja: no such file"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(folder, arguments, message, capsys):
    assert commands.main(["serve", str(folder), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("mmfree_jax.inference.serving")]:
        monkeypatch.delitem(sys.modules, name)
    assert commands.main(["serve", "model"]) == 1
    assert "needs uvicorn: pip install 'mmfree-jax[serve]'" in capsys.readouterr().err
